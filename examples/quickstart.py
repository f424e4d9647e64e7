"""Streams one prompt with a plan made by hand. Run it with `python examples/quickstart.py ["A PROMPT"]`."""

from __future__ import annotations

import sys

from knn_ssd import Engine, Plan, Policy


def main(prompt: str) -> None:
    """Decodes a prompt plainly, then with drafts that skip two sublayers, and compares the output."""
    engine = Engine.from_pretrained(dtype="float32")  # a Hub id, a directory or a .gguf file may be named
    plain = engine.generate(prompt, max_new_tokens=48)

    # An atlas would choose the plan; calibrate one with `knn-ssd calibrate --out atlas`, and give atlas="atlas".
    layers = engine.backend.num_layers
    plan = Plan.skipping(layers, attention=[layers - 2], mlp=[layers // 2], policy=Policy(max_draft=4, threshold=0.6))
    stream = engine.stream(prompt, max_new_tokens=48, plan=plan)
    for chunk in stream:
        print(chunk.text, end="", flush=True)
    stats = stream.result.stats
    print(f"\n\n{plan.describe()}: drafted {stats.drafted}, accepted {stats.accepted}, {stats.rounds} rounds")
    print(f"identical to plain decoding: {stream.result.token_ids == plain.token_ids}")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["What is the capital of France?"])
