"""Several prompts at once: the same outputs as one by one, in order, with shared forward passes; errors end all."""

from __future__ import annotations

import random
from typing import Any

import pytest
from helpers import endless, keep_everything, skip_something
from test_batcher import Counting
from test_native import random_plan, tokens, wide_model

from knn_ssd.backends.base import ForwardOutput, ForwardRequest
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.engine import Engine
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.kernels import binding
from knn_ssd.plan import Plan, Policy
from knn_ssd.request_options import BatchRequest
from knn_ssd.testing import tiny_model, tiny_tokenizer

native = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")


@pytest.fixture
def engine() -> Engine:
    return Engine(endless(wide_model("llama")))


@native
@pytest.mark.parametrize("concurrency", [1, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"plain": True},
        {"plan": Plan.low(4, Policy(5, 0.0))},
        {"plan": random_plan(random.Random(1))},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {5: 3}},
        {"plan": Plan.low(4, Policy(5, 0.0)), "temperature": 1.2, "seed": 7, "min_tokens": 9},
    ],
)
def test_outputs_are_those_of_one_by_one_in_order(engine: Engine, options: dict[str, Any], concurrency: int) -> None:
    prompts = [tokens(1 + 17 * i % 90, i) for i in range(12)]
    alone = [engine.generate(prompt, max_new_tokens=16, **options).token_ids for prompt in prompts]
    counting = Counting(engine.backend)  # type: ignore[arg-type]
    outputs = engine.generate_batch(prompts, concurrency=concurrency, max_new_tokens=16, **options)
    assert [output.token_ids for output in outputs] == alone
    assert min(concurrency, 2) <= max(counting.sizes) <= concurrency


@native
def test_each_request_of_a_batch_can_have_options_of_its_own(engine: Engine) -> None:
    chooser = random.Random(2)
    drafts: list[dict[str, Any]] = [{}, {"plain": True}, {"plan": Plan.low(4)}, {"plan": random_plan(chooser)}]
    requests = [
        BatchRequest(
            tokens(chooser.randint(1, 99), i),
            {
                "max_new_tokens": chooser.randint(1, 30),
                "temperature": chooser.choice([0.0, 1.0]),
                "seed": i,
                **drafts[i % 4],
            },
        )
        for i in range(11)
    ]
    found = dict(engine.stream_batch(requests, 4))
    for place, request in enumerate(requests):
        assert found[place].token_ids == engine.generate(request.prompt, **request.options).token_ids


@native
def test_what_ends_first_comes_first(engine: Engine) -> None:
    requests = [BatchRequest(tokens(9, i), {"max_new_tokens": 30 - 10 * i, "plain": True}) for i in range(3)]
    assert [place for place, _ in engine.stream_batch(requests)] == [2, 1, 0]


@pytest.mark.parametrize("plan", [skip_something(), keep_everything()])
def test_a_backend_that_shares_no_passes_gives_the_same_one_after_the_other(plan: Plan) -> None:
    model = endless(tiny_model("gemma2"))
    engine = Engine(model, backend=TransformersBackend(model))
    prompts = [tokens(5 + i, i) for i in range(5)]
    alone = [engine.generate(prompt, plan=plan, max_new_tokens=12).token_ids for prompt in prompts]
    assert [each.token_ids for each in engine.generate_batch(prompts, plan=plan, max_new_tokens=12)] == alone


@native
def test_no_prompts_are_no_outputs_and_an_iterator_of_prompts_will_do(engine: Engine) -> None:
    assert engine.generate_batch([]) == []
    assert len(engine.generate_batch(iter([tokens(3), tokens(4)]), max_new_tokens=2)) == 2


@native
def test_one_prompt_or_option_that_cannot_be_used_stops_all_before_the_first(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(engine.model, tiny_tokenizer(chat=True), backend=engine.backend)
    monkeypatch.setattr(engine.backend, "open", lambda *_: pytest.fail("a prompt was run before"))
    with pytest.raises(PromptError, match="prompt '1' is empty"):
        engine.generate_batch(["hi", " ", "there"])
    with pytest.raises(PromptError, match="prompt '2' must be text, messages or token ids, got None"):
        engine.generate_batch(["hi", "there", None])
    with pytest.raises(PromptError, match="the prompts are one text"):
        engine.generate_batch("hi")
    with pytest.raises(PromptError, match=r"prompt '0' has the token id 999999"):
        engine.generate_batch([[999999]])
    with pytest.raises(PromptError, match="prompt '0' must be text, messages or token ids, got 5"):
        engine.generate_batch([5, 6])  # the token ids of one prompt
    for prompts in (None, 5):
        with pytest.raises(UsageError, match="prompts must be a list of prompts, got"):
            engine.generate_batch(prompts)
    with pytest.raises(UsageError, match="a request of a batch must be a BatchRequest, got 'hi'"):
        engine.stream_batch(["hi"])
    with pytest.raises(UsageError, match="options must be a mapping from names to values, got 'plain'"):
        BatchRequest("hi", "plain")
    with pytest.raises(UsageError, match="top_p must be in"):
        list(engine.stream_batch([BatchRequest("hi"), BatchRequest("hi", {"top_p": 2.0})]))
    for concurrency in (0, "8", 2.0, None, True):
        with pytest.raises(UsageError, match="concurrency must be"):
            engine.generate_batch(["hi"], concurrency=concurrency)


class Watched:
    """Counts the sessions that are open, and may raise an error from a forward pass."""

    def __init__(self, backend: NativeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open_sessions = 0
        self.error: BaseException | None = None
        self.failed = False
        open_, forward_batch = backend.open, backend.forward_batch

        def opening(*arguments: Any) -> Any:
            session = open_(*arguments)
            close = session.close
            self.open_sessions += 1

            def closing() -> None:
                self.open_sessions -= 1
                close()

            monkeypatch.setattr(session, "close", closing)
            return session

        def running(requests: list[ForwardRequest]) -> list[ForwardOutput]:
            if self.error is not None and (len(requests) > 2 or self.failed):
                self.failed = True  # from then on, each request fails alone as well
                raise self.error
            return forward_batch(requests)

        monkeypatch.setattr(backend, "open", opening)
        monkeypatch.setattr(backend, "forward_batch", running)


@native
@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
def test_an_error_ends_all_requests_and_leaves_the_engine_as_it_was(
    engine: Engine, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = engine.generate(tokens(9), max_new_tokens=8, plain=True).token_ids
    watched = Watched(engine.backend, monkeypatch)  # type: ignore[arg-type]
    watched.error = error
    with pytest.raises(type(error)):
        engine.generate_batch([tokens(9, i) for i in range(6)], max_new_tokens=20)
    assert watched.open_sessions == 0
    watched.error = None
    assert engine.generate_batch([tokens(9)], max_new_tokens=8, plain=True)[0].token_ids == expected


@native
def test_a_batch_that_is_left_closes_its_sessions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(engine.backend, monkeypatch)  # type: ignore[arg-type]
    requests = [BatchRequest(tokens(9, i), {"max_new_tokens": 5 + i}) for i in range(6)]
    outputs: Any = engine.stream_batch(requests, 3)
    next(outputs)
    assert watched.open_sessions > 0
    outputs.close()
    assert watched.open_sessions == 0
