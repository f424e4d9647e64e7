"""Small GGUF files of tiny models, for tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
    quantize,
)
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from knn_ssd import testing
from knn_ssd.kernels.gguf_rows import GGUFRows

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def random_rows(quantisation: str, rows: int, cols: int) -> GGUFRows:
    """A quantised matrix of random bits, whose scales are finite, of either sign and now and then zero or subnormal."""
    kind = GGMLQuantizationType[quantisation]
    block_cols, block_bytes = GGML_QUANT_SIZES[kind]
    chooser = np.random.default_rng(0)
    blocks = chooser.integers(0, 256, (rows * (cols // block_cols), block_bytes), dtype=np.uint8)
    for start in {"Q6_K": (208,), "Q4_K": (0, 2)}.get(quantisation, (0,)):
        scales = (chooser.standard_normal(len(blocks)) / cols / (100 if block_cols == 256 else 1)).astype(np.float16)
        scales[:: len(blocks) // 2 + 1], scales[-1:] = 0, np.float16(6e-8)
        blocks[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return GGUFRows(torch.from_numpy(blocks.reshape(rows, -1)), quantisation, cols)


def tiny_model() -> PreTrainedModel:
    """Its sizes are those that `write_gguf` states; blocks of a quantised file need rows of 32."""
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return testing.tiny_model(**sizes, vocab_size=260, tie_word_embeddings=True)


def vocabulary() -> tuple[list[str], list[str]]:
    """A byte-level vocabulary of 260 tokens, and its one merge (two line ends)."""
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"], ["Ċ Ċ"]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The row order llama.cpp wants for its rotary embedding."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    tensors = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if name.startswith("model.layers."):
            layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
            heads = {"attn_q": 4, "attn_k": 2}.get(names[part])
            tensors[f"blk.{layer}.{names[part]}.weight"] = permuted(value, heads) if heads else value
        else:
            tensors["token_embd.weight" if "embed" in name else "output_norm.weight"] = value
    return tensors


def tiny_writer(path: Path, architecture: str, num_layers: int = 2) -> GGUFWriter:
    """A writer with the sizes of `tiny_model`, or another number of layers."""
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    return writer


def write_gguf(
    path: Path,
    model: PreTrainedModel | None = None,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "llama",
    splitting: str | None = "smollm",
    more: Callable[[GGUFWriter], None] = lambda _: None,
    left_out: str | None = None,
    only: Collection[str] | None = None,
) -> Path:
    """Writes a file of the tiny model, or another with its sizes.

    Args:
        path: the file.
        model: None is the tiny model.
        kind: the type of all matrices.
        architecture: what the file says it is.
        splitting: the name of the pre-tokenizer; None writes no vocabulary.
        more: adds metadata or tensors.
        left_out: a tensor that is not written.
        only: the tensors that are written; None is all.
    """
    writer = tiny_writer(path, architecture)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(260)
    if splitting is not None:
        add_vocabulary(writer, splitting)
    more(writer)
    for name, value in gguf_tensors(model or tiny_model()).items():
        if name == left_out or (only is not None and name not in only):
            continue
        blocks = kind if value.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(value, blocks), raw_dtype=blocks)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_family(
    path: Path,
    family: str,
    architecture: str,
    chosen: Callable[[str], str] = lambda _: "F32",
    *,
    splitting: str | None = None,
    more: Callable[[GGUFWriter], None] = lambda _: None,
    **sizes: Any,
) -> PreTrainedModel:
    """Writes a file of a family whose tensors have gguf's own names for its weights, and returns the model that has the
    file's values.

    Args:
        path: the file.
        family: transformers' name of it.
        architecture: llama.cpp's name of it.
        chosen: the type of each matrix, by its name in the model.
        splitting: the name of the pre-tokenizer; None writes no vocabulary.
        more: adds metadata or tensors.
        sizes: further sizes of the model.
    """
    options = {"num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 260, **sizes}
    model = testing.tiny_model(family, **options)
    count = options["num_hidden_layers"]
    writer = tiny_writer(path, architecture, count)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(options["vocab_size"])
    writer.add_key_length(getattr(model.config, "head_dim", None) or 8)
    if splitting is not None:
        add_vocabulary(writer, splitting)
    more(writer)
    names = get_tensor_name_map(next(key for key, value in MODEL_ARCH_NAMES.items() if value == architecture), count)
    for name, weight in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        theirs = f"{names.get_name(stem)}.{suffix}"
        if weight.dim() < 2:
            torch.nn.init.normal_(weight, 0.0 if suffix == "bias" else 1.0, 0.1)
        if weight.dim() < 2 or chosen(name) == "F32":
            writer.add_tensor(theirs, weight.numpy())
            continue
        rows = random_rows(chosen(name), *weight.shape)
        weight.copy_(rows.dequantised())
        writer.add_tensor(theirs, rows.data.numpy(), raw_dtype=GGMLQuantizationType[chosen(name)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_vocabulary(writer: GGUFWriter, splitting: str) -> None:
    tokens, merges = vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges * 2)  # early versions of transformers 5 cannot read a list of one
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
