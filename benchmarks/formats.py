"""Decoding from a checkpoint's weights as they are, beside the same weights unpacked: speed, identity and memory.

    python benchmarks/formats.py --prompts FILE.jsonl… [--model FILE.gguf] [--limit N] [--max-new-tokens N]
        [--unpacked bfloat16 float32]

One engine runs the file as it is, and one each of it in the dtypes of `--unpacked`; each decodes plainly and with
default settings. All of them take turns prompt by prompt, in rotating order, in one process. Prints medians over the
prompts of milliseconds per token and of the prefill, on how many prompts the output of default settings was that of
plain decoding, and the memory of the weights and of the 4-bit copies. For llama.cpp on the same file:
`benchmarks/peers/run.sh`.
"""

from __future__ import annotations

import argparse
import random
import statistics

from knn_ssd import Engine
from knn_ssd.outputs import Generation
from knn_ssd.prompts import read_prompts
from knn_ssd.tools.memory import size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=8, help="prompts per file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--unpacked", nargs="*", default=["bfloat16"], metavar="DTYPE", help="default: bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    engines = {
        name: Engine.from_pretrained(args.model, dtype=name, device="cpu", answers=False)
        for name in ("auto", *args.unpacked)
    }
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
    print("weights     plain ms/token  default ms/token  speed-up  prefill ms  same as plain  memory  4-bit copies")
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
            f"{size(engine.backend.weight_bytes)}  {size(engine.backend.low_bit_bytes)}"
        )


if __name__ == "__main__":
    main()
