"""What tokens that a grammar forces save: requests with a JSON schema, with forced drafts and without, interleaved.

    python benchmarks/structured.py [--model M] [--repeats N] [--limit N]

All other drafters work in both. The first line says whether all outputs were the same; then come the medians over
prompts and repeats in seconds of decoding, plain decoding with the same masks included, and their ratios.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from knn_ssd import Engine, Generation, Grammar
from knn_ssd.speculation.grammar_draft import GrammarDraft

_TEXT = {"type": "string", "maxLength": 40}
_PERSON = {
    "type": "object",
    "properties": {
        "first_name": _TEXT,
        "family_name": _TEXT,
        "year_of_birth": {"type": "integer", "minimum": 1000, "maximum": 2025},
        "occupation": {"enum": ["scientist", "artist", "politician", "athlete", "other"]},
        "nationality": _TEXT,
    },
    "required": ["first_name", "family_name", "year_of_birth", "occupation", "nationality"],
    "additionalProperties": False,
}
_ORDER = {
    "type": "object",
    "properties": {
        "customer_name": _TEXT,
        "delivery_address": {
            "type": "object",
            "properties": {"street": _TEXT, "house_number": {"type": "integer"}, "city": _TEXT},
            "required": ["street", "house_number", "city"],
            "additionalProperties": False,
        },
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"product": _TEXT, "quantity": {"type": "integer", "minimum": 1, "maximum": 99}},
                "required": ["product", "quantity"],
                "additionalProperties": False,
            },
            "minItems": 1,
            "maxItems": 3,
        },
        "payment_method": {"enum": ["invoice", "credit card", "cash"]},
    },
    "required": ["customer_name", "delivery_address", "items", "payment_method"],
    "additionalProperties": False,
}
PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("Describe Marie Curie as JSON.", _PERSON),
    ("Describe the composer of the Moonlight Sonata as JSON.", _PERSON),
    ("Invent a famous athlete, as JSON.", _PERSON),
    ("Write as JSON: Ann Lee, 12 Mill Lane, Leeds, orders 3 pens and 2 notebooks and pays in cash.", _ORDER),
    ("Write as JSON: John Smith of 5 High Street in York orders a lamp on invoice.", _ORDER),
    ("Invent an order of a bakery, as JSON.", _ORDER),
]


@contextmanager
def without_forced_drafts() -> Iterator[None]:
    """Requests in this context draft nothing that a grammar forces."""
    forced = GrammarDraft.forced
    GrammarDraft.forced = lambda *_args, **_options: []  # type: ignore[method-assign]
    try:
        yield
    finally:
        GrammarDraft.forced = forced  # type: ignore[method-assign]


def runs(engine: Engine, prompt: str, grammar: Grammar) -> dict[str, Generation]:
    """The same request with forced drafts, without, and plainly."""
    options: dict[str, Any] = {"grammar": grammar, "max_new_tokens": 256, "store": False}
    forced = engine.generate(prompt, **options)
    with without_forced_drafts():
        unforced = engine.generate(prompt, **options)
    return {"forced drafts": forced, "without": unforced, "plain": engine.generate(prompt, plain=True, **options)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=int, default=len(PROMPTS), help="prompts measured")
    args = parser.parse_args()
    engine = Engine.from_pretrained(args.model)
    engine.prepare()
    taken: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {"without": [], "plain": []}
    is_same, tokens, forced_tokens = True, 0, 0
    for repeat in range(args.repeats + 1):
        for prompt, schema in PROMPTS[: args.limit]:
            found = runs(engine, prompt, Grammar.json_schema(schema))
            is_same = is_same and len({each.token_ids for each in found.values()}) == 1
            if not repeat:
                continue  # warms up
            for name, each in found.items():
                taken.setdefault(name, []).append(each.stats.decode_sec)
            for name, each in ratios.items():
                each.append(found[name].stats.decode_sec / found["forced drafts"].stats.decode_sec)
            tokens += len(found["forced drafts"].token_ids)
            count = found["forced drafts"].stats.by_drafter.get("grammar")
            forced_tokens += count.accepted if count is not None else 0
    print(f"all outputs the same: {'yes' if is_same else 'NO'}")
    print(f"tokens that the grammar forced: {forced_tokens / tokens:.0%} of {tokens}")
    for name, seconds in taken.items():
        quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
        print(f"{name:14} {statistics.median(seconds):8.3f} s  (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})")
    for name, each in ratios.items():
        ratio = statistics.median(taken[name]) / statistics.median(taken["forced drafts"])
        print(f"forced drafts are {ratio:.2f}x as fast as {name} by medians; by pairs {statistics.median(each):.2f}x")
    if not is_same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
