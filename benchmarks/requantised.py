"""Writes a GGUF file anew with its matrices in another type, for `formats.py`.

    python benchmarks/requantised.py OUT.gguf [--source FILE.gguf] [--type Q8_0] [--shuffled]

Without `--source` it is the file of the default model. The new file's weights are not those of the source: each matrix
is unpacked and quantised again. Metadata and vectors are copied. With `--shuffled`, the dimensions of the hidden
states, of each MLP and of each head's values are put in a random order, the same for all matrices that share them: the
model computes what it did, and a block of the new file has weights from many blocks of the source, whose 4-bit grid it
then does not repeat.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

from knn_ssd.loading.resolve import find_embedded

_OWN = ("GGUF.", "general.architecture")  # what a writer writes by itself


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Copies all metadata but the architecture's name."""
    for field in reader.fields.values():
        if not field.name.startswith(_OWN):
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


# The sizes that the rows and the columns of each matrix of a Llama-like model have.
_SIZES = {
    **dict.fromkeys(("token_embd", "output", "attn_q", "attn_k"), (None, "hidden")),
    **dict.fromkeys(("ffn_gate", "ffn_up"), ("mlp", "hidden")),
    **{"attn_v": ("values", "hidden"), "attn_output": ("hidden", "values"), "ffn_down": ("hidden", "mlp")},
    **dict.fromkeys(("attn_norm", "ffn_norm", "output_norm"), ("hidden",)),
}


def shuffler(reader: Any, seed: int = 0) -> Callable[[str, np.ndarray], np.ndarray]:
    """A function that puts the dimensions of a Llama-like model's tensors, by name, in a random order."""
    chooser = np.random.default_rng(seed)
    architecture = reader.fields["general.architecture"].contents()
    heads, hidden, mlp = (
        int(reader.fields[f"{architecture}.{name}"].contents())
        for name in ("attention.head_count", "embedding_length", "feed_forward_length")
    )
    orders = {"hidden": chooser.permutation(hidden), "mlp": chooser.permutation(mlp)}
    of_head = chooser.permutation(hidden // heads)

    def shuffled(name: str, values: np.ndarray) -> np.ndarray:
        stem = re.sub(r"blk\.\d+\.|\.(weight|bias)", "", name)
        for axis, size in enumerate(_SIZES.get(stem, ())[: values.ndim]):
            if size == "values":
                starts = np.arange(0, values.shape[axis], len(of_head))
                values = values.take((starts[:, None] + of_head).ravel(), axis)
            elif size is not None:
                values = values.take(orders[size], axis)
        return np.ascontiguousarray(values)

    return shuffled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--source", type=Path, metavar="FILE.gguf")
    parser.add_argument("--type", default="Q8_0", choices=["Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "F16"])
    parser.add_argument("--shuffled", action="store_true", help="in another order of dimensions")
    args = parser.parse_args()
    source = args.source or find_embedded()
    if source is None or not source.is_file():
        sys.exit("error: the default model is not installed as a GGUF file: name one with --source")
    reader: Any = GGUFReader(source)
    kind = GGMLQuantizationType[args.type]
    writer = GGUFWriter(args.out, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    order = shuffler(reader) if args.shuffled else lambda _, values: values
    for tensor in reader.tensors:
        values = order(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        own = kind if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
