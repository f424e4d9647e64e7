"""For tests, of this package and of others: tiny random models, a tokenizer for them, and planted redundancy.

Everything random has a seed, nothing is downloaded, and nothing takes more than a second.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from knn_ssd.backends.structure import find_structure

VOCAB_SIZE = 128
_FIRST_CHARACTER, _LAST_CHARACTER = 33, 126  # printable, without the space

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # wide, so that the next tokens differ clearly and near-ties are rare
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}

# Configuration values of each model family beyond the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 16, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 8,
    },
    "phi3": {},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "gpt2": {
        **{"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 64, "n_positions": 256},
        **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")),
        **dict.fromkeys(("num_key_value_heads", "max_position_embeddings", "head_dim")),
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 2.0,
    },
    "stablelm": {"head_dim": None, "use_qkv_bias": True, "qk_layernorm": True},
    "cohere2": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm4": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "falcon": {"num_key_value_heads": None, "head_dim": None},
    "mixtral": {**_MOE, "num_local_experts": 4, "sliding_window": None},
    "qwen2_moe": {**_MOE, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "gpt_oss": {
        **{**_MOE, "num_local_experts": 4, "sliding_window": 16},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    },
}


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of a transformers `model_type` with a few thousand weights; `overrides` go to its config."""
    settings = {**_SIZES, **FAMILIES.get(family, {}), **overrides}
    given = {k: v for k, v in settings.items() if v is not None or k == "sliding_window"}
    config = AutoConfig.for_model(family, **given)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # type: ignore[no-untyped-call]
    model.requires_grad_(False)
    return model


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer over printable ASCII for the tiny models: ids are character codes, 0 to 2 are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    newline = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("\n")[0][0]
    symbols = {32: space, 10: newline, **{code: chr(code) for code in range(33, 127)}}
    assert set(symbols.values()) <= set(alphabet)
    vocabulary |= {symbol: code for code, symbol in symbols.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    return fast


@dataclass(frozen=True, slots=True)
class PlantedModel:
    """A tiny model in which each domain has its own redundant sublayers.

    Args:
        model: a Llama whose output stays in the domain of the prompt.
        tokens: the token ids of each domain; a prompt of a domain consists of its tokens.
        redundant: for each domain, the sublayers that have no effect there, as indices into `Plan.modes`.
    """

    model: PreTrainedModel
    tokens: Mapping[str, range]
    redundant: Mapping[str, frozenset[int]]

    def prompt(self, domain: str, length: int, seed: int) -> str:
        """A random prompt of a domain, for `tiny_tokenizer`: one character is one token."""
        tokens = self.tokens[domain]
        generator = torch.Generator().manual_seed(seed)
        return "".join(chr(tokens[int(i)]) for i in torch.randint(len(tokens), (length,), generator=generator))


def planted_tiny_model(
    redundant: Mapping[str, Collection[int]], num_layers: int = 8, leftover: float = 0.0, seed: int = 0
) -> PlantedModel:
    """A tiny model with a different redundant set of sublayers per domain, as arXiv 2505.16162 assumes of real models.

    The embedding of a token holds its domain along a direction that no sublayer writes to and that the LM head reads,
    so that text stays in its domain. The output of a redundant sublayer is multiplied by `leftover` for tokens of that
    domain.
    """
    domains = list(redundant)
    size = (_LAST_CHARACTER - _FIRST_CHARACTER + 1) // len(domains)
    starts = {domain: _FIRST_CHARACTER + i * size for i, domain in enumerate(domains)}
    tokens = {domain: range(start, start + size) for domain, start in starts.items()}
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "initializer_range": 0.4}
    model = tiny_model(
        "llama", seed, num_hidden_layers=num_layers, tie_word_embeddings=False, eos_token_id=None, **sizes
    )
    weights = dict(model.named_parameters())
    directions = torch.eye(len(domains), 64)  # (domains, D)
    # Weak enough in the text to leave it varied, strong enough in the head to hold it in its domain.
    for name, strength in (("model.embed_tokens.weight", 2), ("lm_head.weight", 1000)):
        weights[name][:, : len(domains)] = 0  # (V, D)
        for direction, members in zip(directions, tokens.values(), strict=True):
            weights[name][members.start : members.stop] += strength * direction
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[: len(domains)] = 0  # (D, …): nothing is written along the domains' directions
    sets = {domain: frozenset(redundant[domain]) for domain in domains}
    plant(model, list(sets.values()), leftover, directions)
    return PlantedModel(model, tokens, sets)


def plant(
    model: PreTrainedModel,
    redundant: Sequence[Collection[int]],
    leftover: float = 0.0,
    directions: torch.Tensor | None = None,
) -> None:
    """Makes sublayers of a model redundant: their output is multiplied by `leftover`, which is zero or nearly so.

    Args:
        model: the model, which is changed in place.
        redundant: sets of sublayers, as indices into `Plan.modes`: one for each direction, or one for all tokens.
        leftover: the factor for their output.
        directions: (domains, D); a token belongs to the domain whose direction its hidden state is most aligned with.
    """
    structure = find_structure(model)
    for index, modules in enumerate(zip(structure.layers, structure.attention, structure.mlp, strict=True)):
        layer, *sublayers = modules
        for place, sublayer in enumerate(sublayers):
            where = torch.tensor([2 * index + place in members for members in redundant])
            if where.any():
                name = next(name for name, child in layer.named_children() if child is sublayer)
                setattr(layer, name, _Gated(sublayer, directions, where, leftover))


class _Gated(nn.Module):
    """A sublayer whose output is multiplied by `leftover` for tokens of the domains in which it is redundant."""

    def __init__(
        self, inner: nn.Module, directions: torch.Tensor | None, redundant: torch.Tensor, leftover: float
    ) -> None:
        super().__init__()
        self.inner = inner
        self.directions = directions  # (domains, D)
        self.redundant = redundant  # (domains,) bool
        self.leftover = leftover

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]  # (1, n, D)
        output = self.inner(*args, **kwargs)
        if self.directions is None:
            gate: Any = self.leftover
        else:
            domain = (hidden @ self.directions.T).argmax(dim=-1)  # (1, n)
            gate = torch.where(self.redundant[domain], self.leftover, 1.0)[..., None].to(hidden.dtype)
        return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate
