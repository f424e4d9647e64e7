"""Runs llama.cpp on the prompts of a benchmark, by llama-cpp-python, with weights of 16, 8 or 4 bits, or a GGUF file's.

    benchmarks/peers/run.sh llama_cpp RUN_FOLDER --model DIR [--bits 16|8|4] [--kv-bits 32|16] [--gguf FILE]

The model is converted by the script that comes with llama.cpp, in bfloat16, and quantised by llama.cpp itself, to Q8_0
or Q4_0, the 8- and 4-bit types that its CPU kernels are fastest with. With 16 bits the KV cache is in float32, which
rounds nothing; otherwise it is in float16, the default of llama.cpp. `--kv-bits` chooses another; the method is then
named after it, too. Models that its converter does not support cannot be measured, and end with an error.

With `--gguf`, the file that the benchmark ran is run as it is, with the KV cache in float32. Its method is called lossy
as well: llama.cpp rounds the inputs of quantised weights to 8 bits.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import convert, fail, kept, longest, measure, parser, read_jobs, weights_dtype

OWN_KV_BITS = {16: 32, 8: 16, 4: 16}  # by default, by the bits of the weights


def main() -> None:
    options = parser(__doc__)
    add_bits(options)
    options.add_argument("--gguf", type=Path, metavar="FILE", help="the GGUF file that the benchmark ran")
    args = options.parse_args()
    if args.gguf is not None and not args.gguf.is_file():
        fail(f"there is no file '{args.gguf}': name the GGUF file that the benchmark ran")
    jobs = read_jobs(args.run)

    import llama_cpp

    cache = llama_cpp.GGML_TYPE_F32 if args.gguf or kv_bits(args) == 32 else llama_cpp.GGML_TYPE_F16
    model = llama_cpp.Llama(
        str(args.gguf or gguf_file(args.model, args.bits, args.threads)),
        n_ctx=longest(jobs),
        n_threads=args.threads,
        n_threads_batch=args.threads,
        type_k=cache,
        type_v=cache,
        flash_attn=True,
        verbose=False,
    )

    def generate(token_ids: list[int], count: int) -> tuple[list[int], dict[str, Any]]:
        started = time.perf_counter()
        stream = model.generate(token_ids, temp=0.0, repeat_penalty=1.0, reset=False)
        model.reset()  # drop the KV cache of the prompt before
        tokens = [next(stream)]
        prefill_sec = time.perf_counter() - started
        while len(tokens) < count:
            tokens.append(next(stream))
        stream.close()
        return tokens, {"prefill_sec": prefill_sec, "rounds": count}

    lossy = bool(args.gguf) or args.bits < 16 or kv_bits(args) < 32 or weights_dtype(args.model) != "bfloat16"
    measure(args.run, _method(args), jobs, generate, lossy=lossy, on_request=args.on_request)


def _method(args: argparse.Namespace) -> str:
    if args.gguf:
        return "llama-cpp-gguf"
    return f"llama-cpp-{args.bits}" + (f"-kv{args.kv_bits}" if kv_bits(args) != OWN_KV_BITS[args.bits] else "")


def add_bits(options: argparse.ArgumentParser) -> None:
    """Adds the options of precision, which the server has as well."""
    options.add_argument("--bits", type=int, choices=(16, 8, 4), default=16, help="of the weights (default: 16)")
    text = "of the KV cache (default: 32 with weights of 16 bits, else 16)"
    options.add_argument("--kv-bits", type=int, choices=(32, 16), help=text)


def kv_bits(args: argparse.Namespace) -> int:
    """Bits of a number in the KV cache, as asked for or by default."""
    return args.kv_bits or OWN_KV_BITS[args.bits]


def gguf_file(model: Path, bits: int, threads: int) -> Path:
    """The model as a GGUF file with weights of the given bits, made at first use."""
    whole = kept(model, "bf16.gguf", lambda path: to_gguf(model, path))
    if bits == 16:
        return whole
    return kept(model, f"{bits}-bit.gguf", lambda path: quantised(whole, path, bits, threads))


@contextmanager
def llama_cpp_source() -> Iterator[Path]:
    """A temporary folder with the source of llama.cpp that belongs to the llama-cpp-python that is installed."""
    name = f"llama-cpp-python=={version('llama-cpp-python')}"
    with tempfile.TemporaryDirectory() as folder:
        fetch = ["pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, name]
        convert([sys.executable, "-m", *fetch], "pip cannot fetch the source of llama.cpp")
        with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        yield next(Path(folder).glob("*/vendor/llama.cpp"))


def to_gguf(model: Path, path: Path) -> None:
    """Converts with the script that comes with llama.cpp."""
    with llama_cpp_source() as source:
        command = [sys.executable, source / "convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", path]
        convert(command, f"llama.cpp's converter cannot convert '{model}'")


def quantised(whole: Path, path: Path, bits: int, threads: int) -> None:
    """Quantises a GGUF file."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0 if bits == 8 else llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(str(whole).encode(), str(path).encode(), ctypes.byref(params)):
        fail(f"llama.cpp cannot quantise '{whole}' to {bits} bits: choose other --bits")


if __name__ == "__main__":
    main()
