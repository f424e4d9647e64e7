"""Many clients for a while: every response equals that to a single client, and nothing remains of any of them."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from server_process import CONTEXT, MODEL, ServerProcess, save_model, server_process

pytestmark = pytest.mark.xdist_group("server process")

CLIENTS = 32
WAVES = (80, 120, 120)  # requests; the first fills what allocators and threads keep
FEW = 40
REFUSED = "refused, again in 1 s"
PROMPTS = ["once upon a time", "3 + 4 = ", "a fox", "SELECT name", "guten Tag", "x" * 120]
# A session that is left behind keeps its key/value cache: 4 layers x 2 heads x 8 numbers x 2 x 256 tokens x 4 bytes
# or 128 KiB here, some 30 MB over the two later waves. What allocators keep above the first wave's is far less.
MOST_GROWTH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Ask:
    """A valid request.

    Args:
        chat: a conversation, or a text to continue.
        prompt: its text.
        options: temperature, seed, stop strings, n.
    """

    chat: bool
    prompt: str
    options: tuple[tuple[str, Any], ...]

    def send(self, client: openai.OpenAI, **more: Any) -> Any:
        options: Any = {"model": MODEL, **dict(self.options), **more}
        if self.chat:
            return client.chat.completions.create(messages=[{"role": "user", "content": self.prompt}], **options)
        return client.completions.create(prompt=self.prompt, **options)

    def whole(self, client: openai.OpenAI) -> tuple[tuple[str, str], ...]:
        """Text and reason of each choice."""
        choices = self.send(client).choices
        return tuple((c.message.content if self.chat else c.text, c.finish_reason) for c in choices)

    def streamed(self, client: openai.OpenAI) -> tuple[tuple[str, str], ...]:
        """The same, from a stream."""
        count = dict(self.options).get("n", 1)
        texts, reasons = [""] * count, [""] * count
        for chunk in self.send(client, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += (choice.delta.content if self.chat else choice.text) or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        return tuple(zip(texts, reasons, strict=True))


def some_asks() -> list[Ask]:
    """Greedy and sampled, with stop strings and several choices, over both paths."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0, "max_tokens": 24},
        {"temperature": 0, "max_tokens": 40, "stop": ("a", "Q")},
        {"temperature": 0.9, "seed": 5, "max_tokens": 20},
        {"temperature": 1.1, "top_p": 0.8, "seed": 11, "max_tokens": 12, "n": 2},
    ]
    return [Ask(chat, prompt, tuple(way.items())) for chat in (True, False) for prompt in PROMPTS for way in ways]


MESSAGES: Any = [{"role": "user", "content": "a fox"}]
NONSENSE: list[tuple[type[openai.APIStatusError], dict[str, Any]]] = [
    (openai.BadRequestError, {"extra_body": {"logit_bias": {"5": 1000}}}),
    (openai.NotFoundError, {"model": "gpt-9"}),
    (openai.BadRequestError, {"messages": []}),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": "long " * CONTEXT}]}),
    (openai.BadRequestError, {"temperature": 9}),
]


@dataclass(frozen=True)
class Crowd:
    """Clients that send waves of requests, each deciding by its own number what it does.

    Args:
        server: that answers.
        expected: what each request is answered alone.
    """

    server: ServerProcess
    expected: dict[Ask, Any]

    def wave(self, size: int, first: int = 0) -> Counter[str]:
        """Sends as many; what was done how often."""
        with ThreadPoolExecutor(CLIENTS) as pool, self.server.client as client:
            done = [pool.submit(self._one, client, number) for number in range(first, first + size)]
            return Counter(way for each in done for way in each.result())

    def _one(self, client: openai.OpenAI, number: int) -> list[str]:
        chance = random.Random(number)
        ask = chance.choice(list(self.expected))
        way = chance.choice(["whole", "whole", "streamed", "streamed", "left", "nonsense"])
        wrong, change = chance.choice(NONSENSE)
        refused = []
        while True:
            try:
                if way == "left":
                    leave(ask, client, chance.randrange(6))
                elif way == "nonsense":
                    with pytest.raises(wrong):
                        client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **change})
                else:
                    assert getattr(ask, way)(client) == self.expected[ask]
            except openai.RateLimitError as error:
                refused.append(f"refused, again in {error.response.headers['retry-after']} s")
                time.sleep(chance.uniform(0.05, 0.4))  # sooner than it says, so that the test is short
            else:
                return [way, *refused]


def leave(ask: Ask, client: openai.OpenAI, after: int) -> None:
    """Disconnects in mid-stream."""
    stream = ask.send(client, stream=True, max_tokens=150)
    for _ in zip(range(after), stream, strict=False):
        pass
    stream.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("load") / "model")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with server_process(model, "--waiting", "2000") as own:
        yield own


@pytest.fixture(scope="module")
def expected(server: ServerProcess) -> dict[Ask, Any]:
    """The response to each request when it is the only one."""
    with server.client as client:
        return {ask: ask.whole(client) for ask in some_asks()}


def test_every_response_equals_that_to_a_single_client_and_nothing_remains(
    server: ServerProcess, expected: dict[Ask, Any]
) -> None:
    assert len(set(expected.values())) > len(expected) * 3 // 4  # an answer that is mixed up is noticed
    crowd = Crowd(server, expected)
    levels = []
    for number, size in enumerate(WAVES):
        done = crowd.wave(size, first=1000 * number)
        assert set(done) == {"whole", "streamed", "left", "nonsense"}
        assert done.total() == size
        server.wait_until_idle()
        levels.append(server.resident_bytes())
    assert levels[-1] - levels[0] < MOST_GROWTH_BYTES


def test_with_a_short_queue_clients_try_again_until_each_has_its_answer(model: Path, expected: dict[Ask, Any]) -> None:
    with server_process(model, "--running", "4", "--waiting", "4") as small:
        done = Crowd(small, expected).wave(FEW)
        small.wait_until_idle()
        assert done[REFUSED] > 0
        assert done.total() - done[REFUSED] == FEW
        with small.client as client:
            ask = next(iter(expected))
            assert ask.whole(client) == expected[ask]


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_tests_of_a_group_run_in_one_process(request: pytest.FixtureRequest) -> None:
    assert request.node.nodeid.endswith("@server process")
