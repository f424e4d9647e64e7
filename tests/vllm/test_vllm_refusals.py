"""What cannot be done is refused before a token is generated, in a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from atlases import Vectors
from in_vllm import LAYERS, Opener, save_tiny_model

from knn_ssd.backends.base import Pooling
from knn_ssd.plan import Plan

PLAN = Plan.skipping(LAYERS, [2]).to_json()


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({}, "needs either an atlas or a plan, got neither"),
        ({"atlas": "a", "plan": PLAN}, "needs either an atlas or a plan, got both"),
        ({"plan": PLAN, "speed": 3}, "has no setting 'speed'"),
        ({"plan": PLAN, "adaptive": "yes"}, "'adaptive' must be true or false"),
        ({"plan": PLAN, "neighbours": 0}, "'neighbours' must be a whole number"),
        ({"plan": {"num_layers": 4}}, "is not a plan"),
        ({"plan": Plan.skipping(7, [2]).to_json()}, "the plan is for 7 layers, and the model has 4"),
        ({"atlas": "nowhere"}, "there is no atlas at 'nowhere'"),
    ],
)
def test_settings_that_cannot_be_used(opened: Opener, tiny: Path, asked: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        opened(tiny, asked)


def test_mean_pooling_beside_prefix_caching(opened: Opener, tiny: Path, tmp_path: Path) -> None:
    asked = {"atlas": str(Vectors(tiny, Pooling.MEAN).atlas().save(tmp_path / "atlas"))}
    with pytest.raises(Exception, match="made with mean pooling"):
        opened(tiny, asked, enable_prefix_caching=True)
    opened(tiny, asked, enable_prefix_caching=False)


def test_an_atlas_of_another_model(opened: Opener, tiny: Path, tmp_path: Path) -> None:
    asked = {"atlas": str(Vectors(tiny, Pooling.LAST).atlas().save(tmp_path / "atlas"))}
    other = save_tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(Exception, match=r"calibrated on another model.*weights hash"):
        opened(other, asked)


def test_a_family_that_is_not_known(opened: Opener, tmp_path: Path) -> None:
    from knn_ssd.testing import tiny_model, tiny_tokenizer

    model = tiny_model("gemma2", head_dim=32, hidden_size=64, num_hidden_layers=LAYERS, eos_token_id=None)
    model.config.architectures = ["Gemma2ForCausalLM"]
    model.save_pretrained(tmp_path / "gemma")
    tiny_tokenizer().save_pretrained(tmp_path / "gemma")
    with pytest.raises(Exception, match="does not know the layers of vLLM's Gemma2ForCausalLM"):
        opened(tmp_path / "gemma", {"plan": PLAN})


class Holding:
    """A configuration as `refuse_unsuitable` reads it."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        ("kv_transfer_config", object(), "a KV connector"),
        ("lora_config", object(), "LoRA"),
        ("pipeline_parallel_size", 2, "pipeline parallelism"),
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("data_parallel_size", 2, "data parallelism"),
        ("is_hybrid", True, "recurrent state"),
        ("uses_mrope", True, "positions of images"),
    ],
)
def test_features_that_drafts_would_corrupt(where: str, value: Any, reason: str) -> None:
    from knn_ssd.errors import UsageError
    from knn_ssd.vllm_plugin.settings import read_settings, refuse_unsuitable

    parallel = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "decode_context_parallel_size": 1}
    model = {"is_hybrid": False, "is_attention_free": False, "uses_mrope": False}
    config = {"kv_transfer_config": None, "lora_config": None}
    for part in (parallel, model, config):
        if where in part:
            part[where] = value
    whole = Holding(
        **config,
        parallel_config=Holding(**parallel),
        model_config=Holding(**model, hf_text_config=Holding(num_hidden_layers=LAYERS)),
        cache_config=Holding(enable_prefix_caching=True),
    )
    with pytest.raises(UsageError, match=reason):
        refuse_unsuitable(whole, read_settings({"knn_ssd": {"plan": PLAN}}))


def test_an_unknown_vllm_is_refused(opened: Opener, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.40.1")
    with pytest.raises(Exception, match=r"supports vLLM 0\.32 to 0\.33, and this is vLLM 0\.40\.1"):
        opened(tiny, {"plan": PLAN})


def test_a_plugin_that_was_not_loaded_says_so(opened: Opener, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from knn_ssd.vllm_plugin import hooks

    opened(tiny)
    wrapped = GPUModelRunner.propose_draft_token_ids
    monkeypatch.setattr(GPUModelRunner, "propose_draft_token_ids", getattr(wrapped, hooks._MARK))
    with pytest.raises(Exception, match="vLLM has not loaded the plugin"):
        opened(tiny, {"plan": PLAN})
