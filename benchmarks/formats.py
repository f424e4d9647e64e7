"""Decoding from a checkpoint's weights as they are, beside the same weights unpacked: speed, identity and memory.

    python benchmarks/formats.py --prompts FILE.jsonl… [--model FILE.gguf] [--limit N] [--max-new-tokens N]
        [--unpacked bfloat16 float32] [--check]

One engine runs the file as it is, and one each of it in the dtypes of `--unpacked`; each decodes plainly and with
default settings. All of them take turns prompt by prompt, in rotating order, in one process. Prints medians over the
prompts of milliseconds per token and of the prefill, on how many prompts the output of default settings was that of
plain decoding, the memory of the weights and of the 4-bit copies, and the seconds of loading, in which a GGUF file is
converted if it has not been yet. For llama.cpp on the same file: `benchmarks/peers/run.sh`.

`--check` first compares each quantised matrix of a GGUF file, as the kernels read it, with the float32 values that the
`gguf` package unpacks: all values, and products with random inputs, bit by bit.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from knn_ssd import Engine
from knn_ssd.backends.transformers.linears import multiplied_by
from knn_ssd.kernels.gguf_rows import KIND_OF, GGUFRows
from knn_ssd.kernels.weights import TensorKeeper, best_blocks, read_rows
from knn_ssd.loading.gguf_file import open_parts, parts_of
from knn_ssd.outputs import Generation
from knn_ssd.prompts import read_prompts
from knn_ssd.tools.memory import size


def has_unpacked_bits(tensor: Any) -> bool:
    """Whether a matrix of a GGUF file, and its products, have the bits that its unpacked values have."""
    rows = GGUFRows(torch.tensor(tensor.data.view(np.uint8)), tensor.tensor_type.name, int(tensor.shape[0]))
    values, keeper = rows.dequantised(), TensorKeeper()
    own, unpacked = (best_blocks(each).matrix(keeper) for each in (rows, values))
    found, inputs = read_rows(own, list(range(own.rows))), torch.randn(3, own.cols)
    products = [multiplied_by(matrix)(inputs) for matrix in (own, unpacked)]
    return all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in ((found, values), products))


def check(model: str) -> None:
    """Prints by type how many matrices of a GGUF file have the bits of their unpacked values."""
    equal, count = Counter[str](), Counter[str]()
    for tensor in (each for reader in open_parts(parts_of(Path(model))) for each in reader.tensors):
        name = tensor.tensor_type.name
        if name in KIND_OF and len(tensor.shape) > 1:
            count[name] += 1
            equal[name] += has_unpacked_bits(tensor)
        elif name != "F32":
            print(f"{tensor.name} is {name}, which is unpacked")
    for name in sorted(count):
        print(f"{name}: {equal[name]} of {count[name]} matrices have the bits of their unpacked values")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=8, help="prompts per file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--unpacked", nargs="*", default=["bfloat16"], metavar="DTYPE", help="default: bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare a GGUF file's values with their unpacked ones")
    args = parser.parse_args()
    if args.check:
        check(args.model)
    engines, load_sec = {}, {}
    for name in ("auto", *args.unpacked):
        started = time.perf_counter()
        engines[name] = Engine.from_pretrained(args.model, dtype=name, device="cpu", answers=False)
        load_sec[name] = time.perf_counter() - started
    chooser = random.Random(args.seed)
    files = [read_prompts(path) for path in args.prompts]
    prompts = [each for file in files for each in chooser.sample(file, min(args.limit, len(file)))]
    for engine in engines.values():
        engine.prepare()
        engine.generate("Hello", max_new_tokens=8)  # the warm-up
    methods = [(name, plain) for name in engines for plain in (True, False)]
    results: dict[tuple[str, bool], list[Generation]] = {method: [] for method in methods}
    for turn, prompt in enumerate(prompts):
        for name, plain in methods[turn % len(methods) :] + methods[: turn % len(methods)]:
            result = engines[name].generate(prompt.prompt, max_new_tokens=args.max_new_tokens, plain=plain)
            results[name, plain].append(result)
    titles = "plain ms/token  default ms/token  speed-up  prefill ms  same as plain  memory  4-bit copies  load s"
    print(f"weights     {titles}")
    for name, engine in engines.items():
        plain, default = results[name, True], results[name, False]
        plain_ms, default_ms = (
            statistics.median(1e3 * each.stats.decode_sec / len(each.token_ids) for each in own)
            for own in (plain, default)
        )
        prefill_ms = statistics.median(1e3 * each.stats.prefill_sec for each in plain)
        same = sum(a.token_ids == b.token_ids for a, b in zip(plain, default, strict=True))
        print(
            f"{'as they are' if name == 'auto' else name:11} {plain_ms:14.2f} {default_ms:17.2f} "
            f"{plain_ms / default_ms:9.2f} {prefill_ms:11.1f}  {same} of {len(prompts)}  "
            f"{size(engine.backend.weight_bytes)}  {size(engine.backend.low_bit_bytes)}  {load_sec[name]:.1f}"
        )


if __name__ == "__main__":
    main()
