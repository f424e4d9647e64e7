"""What is reported of tokens: the target's log-probabilities, and the origin of each token; in Python and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from helpers import NUM_LAYERS, PROMPT, endless, endless_tokenizer, keep_everything, skip_something
from server import MODEL, Served, serving

from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.engine import Engine
from knn_ssd.errors import UsageError
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.plan import Plan, Policy
from knn_ssd.server.app import ServeSettings
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.speculation.decode import TokenLogprobs
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tokenization import spell

SOURCES = {"prefill", "self", "lookup", "retrieval", "corrected", "bonus", "plain"}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(endless(tiny_model()), endless_tokenizer())


def reference(engine: Engine, prompt: list[int], output: tuple[int, ...]) -> torch.Tensor:
    """The log-softmax (n, V) of transformers' logits at the places of an output."""
    logits = engine.model(torch.tensor([[*prompt, *output]])).logits[0]
    return logits[len(prompt) - 1 : -1].float().log_softmax(dim=-1)


@pytest.mark.parametrize(
    "options",
    [
        {"plain": True},
        {"plan": keep_everything()},
        {"plan": skip_something()},
        {"plan": skip_something(), "temperature": 0.7, "top_k": 5, "seed": 3, "repetition_penalty": 1.3},
        {"stop": ["e"], "plan": keep_everything()},
    ],
)
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 96, "head_dim": 32}], ids=["transformers", "native"])
def test_log_probabilities_are_those_of_transformers_logits(sizes: dict[str, Any], options: dict[str, Any]) -> None:
    engine = Engine(endless(tiny_model(**sizes)), tiny_tokenizer())
    result = engine.generate(PROMPT, max_new_tokens=40, logprobs=3, **options)
    expected = reference(engine, PROMPT, result.token_ids)
    values, _ = expected.topk(3)
    assert [each.token for each in result.logprobs] == list(result.token_ids)
    for row, best, each in zip(expected, values, result.logprobs, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
        assert [value for _, value in each.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert [value for _, value in each.top] == pytest.approx([float(row[token]) for token, _ in each.top], abs=1e-4)


def test_drafts_change_no_log_probability(engine: Engine) -> None:
    plain = engine.generate(PROMPT, max_new_tokens=40, logprobs=2, plain=True)
    drafted = engine.generate(PROMPT, max_new_tokens=40, logprobs=2, plan=keep_everything())
    assert drafted.stats.accepted
    assert [each.token for each in drafted.logprobs] == [each.token for each in plain.logprobs]
    for one, other in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_log_probabilities_are_reported_only_where_asked_for(engine: Engine) -> None:
    assert engine.generate(PROMPT, max_new_tokens=4).logprobs == ()
    only_own = engine.generate(PROMPT, max_new_tokens=4, logprobs=0).logprobs
    assert [each.top for each in only_own] == [()] * 4
    every = engine.generate(PROMPT, max_new_tokens=1, logprobs=10**6).logprobs[0]
    assert len(every.top) == engine.backend.vocab_size
    with pytest.raises(UsageError, match="logprobs must be 0 or more, got -1"):
        engine.stream(PROMPT, logprobs=-1)


@pytest.mark.parametrize("plan", [None, keep_everything(), skip_something(), Plan.plain(NUM_LAYERS)])
@pytest.mark.parametrize("stop", [[], ["zz"], ["e", "I("]])
def test_the_pieces_of_a_chunk_are_its_tokens_texts(engine: Engine, plan: Plan | None, stop: list[str]) -> None:
    stream = engine.stream("a fox", max_new_tokens=40, plan=plan, stop=stop)
    chunks = list(stream)
    assert "".join(piece for chunk in chunks for piece in chunk.pieces) == stream.result.text
    for number, chunk in enumerate(chunks):
        origins = chunk.round.origins
        assert len(chunk.pieces) == len(origins) == len(chunk.round.tokens)
        assert set(origins) <= SOURCES
        assert (origins == ("prefill",)) == (number == 0)
        assert sum(origin in {"self", "lookup", "retrieval"} for origin in origins) == chunk.round.accepted
        if number and not chunk.round.drafted:
            assert origins == ("plain",)


def test_a_rejected_draft_is_corrected_and_an_accepted_one_has_a_bonus(engine: Engine) -> None:
    for plan, own in ((keep_everything(), "bonus"), (skip_something(), "corrected")):
        rounds = [chunk.round for chunk in engine.stream(PROMPT, max_new_tokens=60, plan=plan)]
        assert any(each.origins[-1] == own for each in rounds)
        for each in rounds[1:-1]:
            assert each.origins[-1] == ("bonus" if each.accepted == each.drafted else "corrected")


def test_tokens_are_spelled_as_they_stand_in_a_text() -> None:
    tokenizer = tiny_tokenizer()
    assert spell(tokenizer, ord(" ")).text == " "
    assert spell(tokenizer, ord("a")).data == b"a"
    assert spell(tokenizer, 2).text == "</s>"
    assert spell(None, 5).text == ""


@pytest.mark.real
def test_tokens_that_are_parts_of_characters_have_their_bytes(embedded_engine: Engine) -> None:
    tokenizer = embedded_engine.tokenizer
    assert tokenizer is not None
    text = "Grüße, 東京 🦊 naïve"
    data = [spell(tokenizer, token).data for token in tokenizer(text)["input_ids"]]
    assert b"".join(each or b"" for each in data).decode() == text
    assert any(each is not None and len(each) < len(each.decode("utf-8", "replace").encode()) for each in data)


# --- Over HTTP


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    yield from serving(ServeSettings(MODEL))


def ask(served: Served, **options: Any) -> Any:
    messages: Any = [{"role": "user", "content": "a fox"}]
    options = {"temperature": 0, "max_tokens": 20, **options}
    return served.client.chat.completions.create(model=MODEL, messages=messages, **options)


@pytest.fixture(scope="module")
def expected(engine: Engine) -> tuple[TokenLogprobs, ...]:
    return engine.generate("a fox", max_new_tokens=20, plain=True, logprobs=2).logprobs


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_the_official_client_reads_a_chat_s_logprobs(
    served: Served, expected: tuple[TokenLogprobs, ...], stream: bool, plain: bool
) -> None:
    extra = {"extra_body": {"knn_ssd": {"plain": plain}}}
    answer = ask(served, logprobs=True, top_logprobs=2, stream=stream, **extra)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        content = [one for choice in choices if choice.logprobs for one in choice.logprobs.content]
        text = "".join(choice.delta.content or "" for choice in choices)
    else:
        content, text = answer.choices[0].logprobs.content, answer.choices[0].message.content
    assert "".join(one.token for one in content) == text
    assert [bytes(one.bytes).decode() for one in content] == [one.token for one in content]
    for one, own in zip(content, expected, strict=True):
        assert one.logprob == pytest.approx(own.logprob, abs=1e-4)
        assert [each.logprob for each in one.top_logprobs] == pytest.approx([p for _, p in own.top], abs=1e-4)
        assert one.top_logprobs[0].token == one.token  # greedy


def test_a_chat_without_top_logprobs_has_the_tokens_own_alone(served: Served) -> None:
    content = ask(served, logprobs=True, n=2).choices[1].logprobs.content
    assert [one.top_logprobs for one in content] == [[]] * 20
    assert ask(served).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [True, False])
def test_completions_have_logprobs_in_their_own_format(served: Served, engine: Engine, stream: bool) -> None:
    own = engine.generate("fox", max_new_tokens=16, chat=False, logprobs=2)
    answer: Any = served.client.completions.create(model=MODEL, prompt="fox", temperature=0, logprobs=2, stream=stream)
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    reported = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for each in reported for token in each.tokens]
    assert "".join(tokens) == own.text
    assert [p for each in reported for p in each.token_logprobs] == pytest.approx(
        [p.logprob for p in own.logprobs], abs=1e-4
    )
    offsets = [offset for each in reported for offset in each.text_offset]
    assert offsets == [len("".join(tokens[:index])) for index in range(16)]
    tops = [top for each in reported for top in each.top_logprobs]
    for token, top, mine in zip(tokens, tops, own.logprobs, strict=True):
        assert token in top
        assert 2 <= len(top) <= 3
        assert set(top) == {token, *(spell(engine.tokenizer, other).text for other, _ in mine.top)}


def body(**extension: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": "a fox"}]
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 20, "knn_ssd": extension}


def chat(served: Served, **extension: bool) -> httpx.Response:
    return httpx.post(f"{served.url}/v1/chat/completions", json=body(**extension), timeout=60)


def test_plain_decoding_can_be_asked_for(served: Served) -> None:
    plain, drafted = chat(served, plain=True), chat(served)
    assert plain.headers["x-knn-ssd-plan"] == "plain decoding"
    assert drafted.headers["x-knn-ssd-plan"] != "plain decoding"
    assert plain.json()["choices"] == drafted.json()["choices"]
    assert plain.json()["usage"]["completion_tokens_details"]["rejected_prediction_tokens"] == 0
    assert "knn_ssd" not in plain.json()


def test_rounds_are_reported_with_the_text_of_each_token(served: Served) -> None:
    answer = chat(served, rounds=True).json()
    reported = answer["knn_ssd"]
    assert {key: reported[key] for key in ("route", "fallback", "anchor", "distance")} == {
        "route": None,
        "fallback": False,
        "anchor": None,
        "distance": None,
    }
    assert reported["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    tokens = [token for each in reported["rounds"] for token in each["tokens"]]
    assert "".join(token["text"] for token in tokens) == answer["choices"][0]["message"]["content"]
    assert tokens[0]["source"] == "prefill"
    assert {token["source"] for token in tokens} <= SOURCES
    assert len(tokens) == 20
    accepted = sum(each["accepted"] for each in reported["rounds"])
    assert accepted == answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"]
    assert all(each["sec"] >= 0 and each["index"] == 0 for each in reported["rounds"])


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_stream_reports_the_route_first_and_then_its_rounds(served: Served, path: str) -> None:
    asked = body(rounds=True) | {"stream": True}
    if path == "completions":
        asked = {**asked, "prompt": "a fox"}
        del asked["messages"]
    stream = httpx.stream("POST", f"{served.url}/v1/{path}", json=asked, timeout=60)
    with stream as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    assert {"route", "plan", "prompt_tokens"} <= set(events[0]["knn_ssd"])
    assert not any("plan" in event.get("knn_ssd", {}) for event in events[1:])
    tokens = 0
    for event in events:
        choice = event["choices"][0]
        text = choice.get("text") or choice.get("delta", {}).get("content") or ""
        reported = event.get("knn_ssd", {}).get("tokens", [])
        assert "".join(token["text"] for token in reported) == text
        tokens += len(reported)
    assert tokens == 20


def test_the_route_is_reported_with_its_anchor() -> None:
    engine = Engine(endless(tiny_model()), endless_tokenizer(), tiny_atlas())
    for own in serving(ServeSettings(MODEL), engine):
        answer = chat(own, rounds=True)
        reported = answer.json()["knn_ssd"]
        assert (reported["route"], reported["fallback"], reported["anchor"]) == ("fox", False, 1)
        assert reported["distance"] == pytest.approx(0, abs=1e-5)
        assert reported["plan"] == answer.headers["x-knn-ssd-plan"] == "skip MLP 2; drafts up to 4"
        assert answer.headers["x-knn-ssd-route"] == "fox"
        points = httpx.get(f"{own.url}/atlas").json()["points"]
        assert [point["anchor"] for point in points] == [0, 1]
        assert [point["domain"] for point in points] == ["sum", "fox"]
        assert all(0 <= point[axis] <= 1 for point in points for axis in "xy")


def tiny_atlas() -> Atlas:
    """One anchor each for two prompts, of which the second is the one that is asked."""
    engine = Engine(endless(tiny_model()), endless_tokenizer())
    prompts = [engine.encode(prompt) for prompt in ("12 + 7 is 19", "a fox")]
    vectors = [engine.backend.open(len(ids)).prefill(ids).mean.numpy() for ids in prompts]
    plan = Plan.skipping(NUM_LAYERS, mlp=[2], policy=Policy(4, 0.0))
    return Atlas(
        fingerprint=fingerprint(engine.model, engine.tokenizer),
        pooling=Pooling.MEAN,
        anchors=np.stack(vectors),
        anchor_domains=("sum", "fox"),
        domains={"sum": DomainEntry(plan, 0.5), "fox": DomainEntry(plan, 0.5)},
        fallback=Plan.plain(NUM_LAYERS),
        cost=CostProfile(0.01, 0.001, 0.002, (0.01, 0.011)),
    )


def test_without_an_atlas_the_map_has_no_points(served: Served) -> None:
    assert httpx.get(f"{served.url}/atlas").json() == {"points": []}
