"""Writes a GGUF file anew with its matrices in another type, for `formats.py`.

    python benchmarks/requantised.py OUT.gguf [--source FILE.gguf] [--type Q8_0]

Without `--source` it is the file of the default model. The new file's weights are not those of the source: each matrix
is unpacked and quantised again. Metadata and vectors are copied.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

from knn_ssd.loading.resolve import find_embedded

_OWN = ("GGUF.", "general.architecture")  # what a writer writes by itself


def copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    """Copies all metadata but the architecture's name."""
    for field in reader.fields.values():
        if not field.name.startswith(_OWN):
            inner = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--source", type=Path, metavar="FILE.gguf")
    parser.add_argument("--type", default="Q8_0", choices=["Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "F16"])
    args = parser.parse_args()
    source = args.source or find_embedded()
    if source is None or not source.is_file():
        sys.exit("error: the default model is not installed as a GGUF file: name one with --source")
    reader: Any = GGUFReader(source)
    kind = GGMLQuantizationType[args.type]
    writer = GGUFWriter(args.out, reader.fields["general.architecture"].contents())
    copy_metadata(reader, writer)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        own = kind if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
