"""Speed-ups by prompt length: the prompts as they are, and the same ones lengthened by other prompts before them.

    python benchmarks/lengths.py --out FOLDER [--prompts FILE.jsonl…] [--model M] [--limit N] [--lengths 1024 2048 …]

`--limit` prompts of the second half of every domain are measured, as they are and lengthened with other prompts of the
files, as `knn-ssd bench --prompt-tokens` does. A length for which the model's context or the files are too short is
left out, with a message. `FOLDER` keeps records, summary and report of each length, and is continued if it exists.
Prints speed-ups over plain decoding and the time to the first token.
"""

from __future__ import annotations

from _recipes import measured, stream_options, with_interval

from knn_ssd import Engine
from knn_ssd.bench.run import BenchSettings
from knn_ssd.bench.summary import formatted
from knn_ssd.bench.workload import halves, lengthened, limit_each, read_workloads, stream
from knn_ssd.errors import PromptError
from knn_ssd.loading.resolve import load_model

METHODS = ("plain", "lookup", "low", "auto")


def main() -> None:
    parser = stream_options(__doc__, METHODS, limit=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096], help="in tokens")
    args = parser.parse_args()
    loaded = load_model(args.model, device="cpu")
    engine = Engine(loaded.model, loaded.tokenizer, answers=False)
    prompts = read_workloads(args.prompts)
    short = stream(limit_each(halves(prompts)[1], args.limit), 1.0)
    workloads = {"as they are": short}
    for length in args.lengths:
        try:
            if length + args.max_new_tokens > engine.backend.context_length:
                raise PromptError(f"with the answer it is over the model's context of {engine.backend.context_length}")
            workloads[f"{length}"] = lengthened(short, prompts, length, engine.tokenizer)
        except PromptError as error:
            print(f"{length} tokens are left out: {error}")
    print(
        "| prompt tokens | method | accepted | decoding | end to end, 95 % | first token, sec | over plain's | same |"
    )
    print("|--:|---|" + "--:|" * 6)
    asked = BenchSettings(args.max_new_tokens)
    for name, ordered in workloads.items():
        out = args.out / name.replace(" ", "-")
        methods = measured(engine, ordered, args.methods, out, asked, loaded.name)["methods"]
        for method, own in methods.items():
            first, plain = own["first_token_sec_mean"], methods["plain"]["first_token_sec_mean"]
            figures = [formatted(own[key], "{:.2f}") for key in ("acceptance_rate", "decode_speedup")]
            times = [formatted(first, "{:.3f}"), formatted(first and first / plain, "{:.2f}")]
            cells = [name, f"`{method}`", *figures, with_interval(own), *times, f"{own['identical_to_plain']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
