"""Memory of a server over a long time under mixed requests, and whether its answers stay the same.

    python benchmarks/soak.py [--minutes 30] [--clients 8] [--model M] [--out out/soak.svg]

Starts `knn-ssd serve` with a small prefix cache, which is full early, and lets clients send whole answers, streams,
streams that they leave midway, and bad requests, each of which must be refused. A greedy answer must be the same each
time. Samples the server's resident memory, prints it at the start, after a quarter and at the end, and draws it.

Exits with 1 if the memory is not level: if its median over the last quarter of the time is more than 3 % (or, if that
is more, 16 MiB) above its median over the second quarter. The first quarter, in which caches and allocators fill, does
not count. Exits with 1 as well if an answer changed, or a request was answered otherwise than it should be.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from knn_ssd.bench.workload import read_workloads, stream
from knn_ssd.tools.plot_canvas import GREY, INK, check_format, new_figure, write_picture

MOST_GROWTH = 0.03  # of the second quarter's memory
MOST_GROWTH_MIB = 16.0  # if that is more: what allocators give and take
START_SEC = 600.0  # for a model that is converted first
BAD_REQUESTS: list[tuple[int, dict[str, Any]]] = [
    (400, {"temperature": 9}),
    (400, {"messages": []}),
    (400, {"max_tokens": -5}),
    (400, {"logit_bias": {"5": 1000}}),
    (400, {"messages": [{"role": "user", "content": "long " * 200_000}]}),
    (404, {"model": "no-such-model"}),
]


@dataclass(frozen=True)
class Sample:
    """The resident memory at a time since the start, in minutes and MiB."""

    minutes: float
    mib: float


@dataclass
class Crowd:
    """Clients that send requests until a time, each choosing by chance what it does.

    Args:
        client: of the server.
        prompts: what is asked.
        max_tokens: the longest answer.
        until: on the monotonic clock.

    Attributes:
        done: what was done how often.
        faults: what went wrong, in words.
    """

    client: httpx.Client
    prompts: Sequence[object]
    max_tokens: int
    until: float
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    _answers: dict[int, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seed: int) -> None:
        """Is one of the clients."""
        chance = random.Random(seed)
        while time.monotonic() < self.until and not self.faults:
            way = chance.choice(["whole", "whole", "streamed", "streamed", "sampled", "left", "bad"])
            try:
                getattr(self, f"_{way}")(chance)
            except httpx.HTTPError as error:
                self.faults.append(f"{way}: {type(error).__name__}: {error}")
            with self._lock:
                self.done[way] += 1

    def _body(self, place: int, **more: Any) -> dict[str, Any]:
        prompt = self.prompts[place]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return {"model": "m", "messages": messages, "temperature": 0, "max_tokens": self.max_tokens, **more}

    def _whole(self, chance: random.Random) -> None:
        place = chance.randrange(len(self.prompts))
        self._check(place, self._ask(self._body(place))["choices"][0]["message"]["content"])

    def _sampled(self, chance: random.Random) -> None:
        place = chance.randrange(len(self.prompts))
        self._ask(self._body(place, temperature=1, n=chance.choice([1, 2]), logprobs=True))

    def _streamed(self, chance: random.Random) -> None:
        place = chance.randrange(len(self.prompts))
        self._check(place, "".join(self._pieces(self._body(place))))

    def _left(self, chance: random.Random) -> None:
        """Reads a few pieces, and closes the connection."""
        body = self._body(chance.randrange(len(self.prompts)), max_tokens=4 * self.max_tokens)
        pieces = self._pieces(body)
        for _ in zip(range(chance.randrange(6)), pieces, strict=False):
            pass
        pieces.close()

    def _bad(self, chance: random.Random) -> None:
        status, wrong = chance.choice(BAD_REQUESTS)
        response = self.client.post("/v1/chat/completions", json={**self._body(0), **wrong})
        if response.status_code != status:
            self.faults.append(f"{json.dumps(wrong)[:80]} was answered with {response.status_code}, not {status}")

    def _ask(self, body: dict[str, Any]) -> Any:
        response = self.client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        return response.json()

    def _pieces(self, body: dict[str, Any]) -> Generator[str, None, None]:
        with self.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        self.faults.append(f"in a stream: {event['error']['message']}")
                        return
                    yield "".join(choice["delta"].get("content") or "" for choice in event["choices"])

    def _check(self, place: int, text: str) -> None:
        with self._lock:
            first = self._answers.setdefault(place, text)
        if text != first:
            self.faults.append(f"prompt {place} was answered {text!r}, and before {first!r}")


@contextmanager
def server(options: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Starts a server; yields its address and its process."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        command = [sys.executable, "-m", "knn_ssd", "serve", "--port", "0", "--name", "m", *options]
        with subprocess.Popen(command, stdout=log, stderr=log) as process:
            try:
                yield _address(process, log), psutil.Process(process.pid)
            finally:
                process.terminate()


def _address(process: subprocess.Popen[bytes], log: Any) -> str:
    due, said = time.monotonic() + START_SEC, ""
    while time.monotonic() < due and process.poll() is None:
        log.seek(0)
        said = log.read()
        if found := re.search(r"(http://\S+)/v1", said):
            return found[1]
        time.sleep(0.1)
    sys.exit(f"The server did not start:\n{said}")


def sampled(process: psutil.Process, crowd: Crowd, every_sec: float) -> list[Sample]:
    """Samples the memory of a process until the clients are done, or one has found a fault."""
    started, samples = time.monotonic(), []
    while time.monotonic() < crowd.until and not crowd.faults:
        samples.append(Sample((time.monotonic() - started) / 60, process.memory_info().rss / 2**20))
        time.sleep(every_sec)
    return samples


def quarters(samples: Sequence[Sample]) -> list[float]:
    """The median memory over each quarter of the time, in MiB."""
    end = samples[-1].minutes
    parts: list[list[float]] = [[], [], [], []]
    for sample in samples:
        parts[min(int(4 * sample.minutes / end), 3) if end else 0].append(sample.mib)
    return [statistics.median(part or [samples[-1].mib]) for part in parts]


def is_level(second: float, last: float) -> bool:
    """Whether the memory of the last quarter is hardly above that of the second."""
    return last - second <= max(MOST_GROWTH * second, MOST_GROWTH_MIB)


def draw(samples: Sequence[Sample], out: Path) -> None:
    """Draws the memory over time, with the medians that are compared."""
    figure = new_figure()
    figure.set_size_inches(7, 3.6)
    axes = figure.add_subplot()
    axes.plot([each.minutes for each in samples], [each.mib for each in samples], color="#0072b2", linewidth=1)
    end, (_, second, _, last) = samples[-1].minutes, quarters(samples)
    axes.hlines([second, last], [end / 4, 3 * end / 4], [end / 2, end], color=INK, linewidth=2)
    axes.set(xlabel="minutes", ylabel="resident memory of the server, MiB", ylim=(0, None), xlim=(0, end))
    axes.set_title("Lines: the medians of the second and the last quarter", fontsize=9, color=GREY)
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_picture(figure, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model")
    parser.add_argument("--prompts", nargs="+", default=[], help="default: the built-in ones")
    parser.add_argument("--limit", type=int, default=20, help="prompts in all")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--prefix-cache", metavar="MIB", default="32", help="as `knn-ssd serve` has it")
    parser.add_argument("--out", type=Path, default=Path("out/soak.svg"), help="the picture: .svg, .png or .pdf")
    args = parser.parse_args()
    check_format(args.out)
    prompts = [prompt.prompt for prompt in stream(read_workloads(args.prompts), 1.0)][: args.limit]
    options = [*(["--model", args.model] if args.model else []), "--prefix-cache", args.prefix_cache]
    with (
        server([*options, "--waiting", str(2 * args.clients)]) as (address, process),
        httpx.Client(base_url=address, timeout=600) as client,
        ThreadPoolExecutor(args.clients) as pool,
    ):
        crowd = Crowd(client, prompts, args.max_new_tokens, time.monotonic() + 60 * args.minutes)
        running = [pool.submit(crowd.run, seed) for seed in range(args.clients)]
        samples = sampled(process, crowd, min(1.0, 60 * args.minutes / 40))
        for each in running:
            each.result()
    draw(samples, args.out)
    report(crowd, samples, args.out)


def report(crowd: Crowd, samples: Sequence[Sample], out: Path) -> None:
    """Prints what came of it, and exits with 1 if that is not as it should be."""
    medians = quarters(samples)
    print("requests: " + ", ".join(f"{count} {way}" for way, count in sorted(crowd.done.items())))
    quarter = next(each.mib for each in samples if each.minutes >= samples[-1].minutes / 4)
    start, end = samples[0].mib, samples[-1].mib
    print(f"memory: {start:.1f} MiB at the start, {quarter:.1f} after a quarter, {end:.1f} at the end")
    print("median of each quarter: " + ", ".join(f"{median:.1f}" for median in medians) + " MiB")
    print(f"picture: {out}")
    for fault in crowd.faults:
        print(f"fault: {fault}")
    level = is_level(medians[1], medians[3])
    print("The memory is level." if level else "The memory is not level.")
    sys.exit(0 if level and not crowd.faults else 1)


if __name__ == "__main__":
    main()
