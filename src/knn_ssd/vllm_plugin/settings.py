"""Reads the settings under `knn_ssd` in vLLM's `additional_config`, and refuses unsafe configurations at startup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from knn_ssd.atlas import Atlas
from knn_ssd.backends.base import Pooling
from knn_ssd.errors import UsageError
from knn_ssd.plan import Plan

KEY = "knn_ssd"
_EXAMPLE = 'Give --additional-config \'{"knn_ssd": {"atlas": "FOLDER"}}\'.'


@dataclass(frozen=True, slots=True)
class PluginSettings:
    """The plugin's settings; either an atlas or a plan is given.

    Args:
        atlas: holds a plan for each domain, chosen by prompt.
        plan: the plan for all prompts.
        adaptive: whether draft lengths are chosen in each step by expected tokens per second, none included; otherwise
            every draft follows the plan's policy.
        neighbours: how many nearest anchors vote for the domain.
    """

    atlas: Atlas | None
    plan: Plan | None
    adaptive: bool = True
    neighbours: int = 1

    @property
    def plans(self) -> dict[str | None, Plan]:
        """The plans by domain; under None the fallback plan, or the one plan without an atlas."""
        if self.atlas is None:
            assert self.plan is not None
            return {None: self.plan}
        return {None: self.atlas.fallback, **{name: domain.plan for name, domain in self.atlas.domains.items()}}


def read_settings(additional_config: Any) -> PluginSettings:
    """The settings in vLLM's `additional_config`.

    Raises:
        UsageError: there are none, or they cannot be used.
        AtlasError: the atlas cannot be read.
    """
    asked = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if not isinstance(asked, Mapping):
        raise UsageError("knn-ssd was given neither an atlas nor a plan", _EXAMPLE)
    known = ("atlas", "plan", "adaptive", "neighbours")
    unknown = sorted(set(asked) - set(known))
    if unknown:
        raise UsageError(f"'{KEY}' has no setting '{unknown[0]}'", f"It has {', '.join(known)}.")
    if ("atlas" in asked) == ("plan" in asked):
        raise UsageError(f"'{KEY}' needs either an atlas or a plan, got {'both' if 'atlas' in asked else 'neither'}")
    adaptive, neighbours = asked.get("adaptive", True), asked.get("neighbours", 1)
    if not isinstance(adaptive, bool):
        raise UsageError(f"'adaptive' must be true or false, got {adaptive!r}")
    if isinstance(neighbours, bool) or not isinstance(neighbours, int) or neighbours < 1:
        raise UsageError(f"'neighbours' must be a whole number, 1 or more, got {neighbours!r}")
    if "atlas" in asked:
        return PluginSettings(Atlas.load(asked["atlas"]), None, adaptive, neighbours)
    try:
        plan = Plan.from_json(asked["plan"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"'plan' is not a plan as atlas.json has them: {error!r}") from error
    return PluginSettings(None, plan, adaptive, neighbours)


def refuse_unsuitable(config: Any, settings: PluginSettings) -> None:
    """Raises a `UsageError` for features in a `VllmConfig` that drafts would corrupt or do not support."""
    model, parallel = config.model_config, config.parallel_config
    reasons = {
        "a KV connector would transfer the keys and values of drafts": config.kv_transfer_config is not None,
        "with pipeline parallelism no rank has all layers": parallel.pipeline_parallel_size > 1,
        "context parallelism spreads a request's cache over ranks": (
            getattr(parallel, "decode_context_parallel_size", 1) > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1
        ),
        "data parallelism needs all ranks to run the same forward passes": parallel.data_parallel_size > 1,
        "LoRA adapters are mapped to the rows of the target's forward pass": config.lora_config is not None,
        "recurrent state cannot be rewound after a draft": model.is_hybrid or model.is_attention_free,
        "drafts do not support the positions of images (M-RoPE)": model.uses_mrope,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"knn-ssd cannot draft here: {reason}", "Turn that feature off, or run without knn-ssd.")
    atlas = settings.atlas
    if atlas is not None and atlas.pooling is Pooling.MEAN and config.cache_config.enable_prefix_caching:
        raise UsageError(
            "the atlas was made with mean pooling, and prefix caching leaves no hidden states of cached prompt tokens",
            "Calibrate with --pooling last, or serve with --no-enable-prefix-caching.",
        )
    layers = model.hf_text_config.num_hidden_layers
    wrong = [plan.num_layers for plan in settings.plans.values() if plan.num_layers != layers]
    if wrong:
        raise UsageError(f"the plan is for {wrong[0]} layers, and the model has {layers}")
