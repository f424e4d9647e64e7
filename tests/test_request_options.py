"""The options of a request: a wrong one is refused in our own words before anything runs, and None is the default."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from helpers import PROMPT, endless, endless_tokenizer, skip_something, transformers_output

from knn_ssd.engine import Engine
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.plan import Plan
from knn_ssd.request_options import RequestOptions
from knn_ssd.sampling import SamplingParams
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.testing import tiny_model, tiny_tokenizer

NOT_NUMBERS: list[Any] = ["2", [1.0], True, {}, 1j, torch.tensor([1.0, 2.0])]
NOT_WHOLE: list[Any] = [*NOT_NUMBERS, 2.0, 2.5]
NOT_FLAGS: list[Any] = ["yes", 1, 0.0, []]
WRONG: dict[str, list[Any]] = {
    "temperature": [*NOT_NUMBERS, -1, float("nan")],
    "top_k": [*NOT_WHOLE, -1],
    "top_p": [*NOT_NUMBERS, 0, 1.5],
    "min_p": [*NOT_NUMBERS, -0.1, 2],
    "repetition_penalty": [*NOT_NUMBERS, 0, -1.0, float("inf")],
    "seed": [*NOT_WHOLE, -1, 2**64],
    "presence_penalty": [*NOT_NUMBERS, 2.1, -3, float("nan")],
    "frequency_penalty": [*NOT_NUMBERS, 2.1, -3, float("nan")],
    "logit_bias": ["5", [5], 7, {"5": 1.0}, {5.0: 1.0}, {5: "1"}, {5: 101}, {5: float("nan")}, {-1: 0.0}, {128: 0.0}],
    "min_tokens": [*NOT_WHOLE, -1, 257],
    "max_new_tokens": [*NOT_WHOLE, 0, -5],
    "stop": [5, b"a", ["a", 1], [["a"]], {"a"}, "", ["a", ""]],
    "stop_token_ids": [5, "5", ["5"], [5.0], [-1], [128], [True]],
    "ignore_eos": NOT_FLAGS,
    "grammar": ["json", 5, {"type": "object"}],
    "plain": NOT_FLAGS,
    "domain": [5, ["math"], "math"],
    "plan": ["low", {}, Plan.skipping(3, [0])],
    "adaptive": NOT_FLAGS,
    "chat": NOT_FLAGS,
    "logprobs": [*NOT_WHOLE, -1],
    "store": NOT_FLAGS,
    "owner": ["me", 5],
}
CASES = [(name, value) for name, values in WRONG.items() for value in values]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(endless(tiny_model()), tiny_tokenizer(chat=True), answers=False)


def test_every_option_is_tried() -> None:
    assert set(WRONG) == {field.name for field in fields(RequestOptions)}


def _items(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else [value] if isinstance(value, str) else []


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda each: str(each)[:30])
def test_an_option_that_cannot_be_used_is_refused_by_name_before_the_prompt_is_run(
    engine: Engine, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.backend, "open", lambda *_: pytest.fail("the prompt was run before"))
    fact = "a plan for 3 layers" if isinstance(value, Plan) else "a stop string" if "" in _items(value) else name
    for call in (engine.generate, engine.stream):
        with pytest.raises(UsageError, match=fact):
            call("hi", **{name: value})
    with pytest.raises(UsageError):
        engine.generate_batch(["hi"], **{name: value})


@pytest.mark.parametrize("name", WRONG)
def test_none_is_an_option_s_default(engine: Engine, name: str) -> None:
    given: dict[str, Any] = {"max_new_tokens": 8} if name != "max_new_tokens" else {}
    endless = Engine(engine.model, endless_tokenizer(), answers=False)
    output = endless.generate("hi", **{**given, name: None}).token_ids
    assert output[:8] == endless.generate("hi", max_new_tokens=8).token_ids
    assert len(output) == (8 if given else 256 - len(endless.encode("hi"))), "no limit is up to the context"


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_none_is_the_default_of_sampling_params_too(name: str) -> None:
    assert SamplingParams(**{name: None}) == SamplingParams()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2, "seed": 3},
        {"temperature": np.float32(2), "seed": np.int64(3)},
        {"temperature": 2.0, "seed": 3, "top_k": np.int64(0), "top_p": 1, "min_p": 0, "repetition_penalty": 1},
    ],
)
def test_numbers_may_be_of_any_kind_that_holds_them(engine: Engine, options: dict[str, Any]) -> None:
    expected = engine.generate("hi", max_new_tokens=8, temperature=2.0, seed=3)
    assert engine.generate("hi", max_new_tokens=np.int32(8), **options).token_ids == expected.token_ids


def test_whole_numbers_do_for_every_number(engine: Engine) -> None:
    numbers = {"temperature": 1, "top_p": 1, "min_p": 1, "repetition_penalty": 2, "presence_penalty": 1}
    as_floats = {name: float(value) for name, value in numbers.items()}
    outputs = [
        engine.generate("hi", max_new_tokens=8, seed=1, top_k=5, frequency_penalty=1, logit_bias={9: 2}, **each)
        for each in (numbers, as_floats)
    ]
    assert outputs[0].token_ids == outputs[1].token_ids


def test_an_unknown_option_is_refused_with_the_nearest_or_with_all(engine: Engine) -> None:
    with pytest.raises(UsageError, match=r"there is no option 'temprature'\. Did you mean 'temperature'\?"):
        engine.generate("hi", temprature=1.0)
    with pytest.raises(UsageError, match=r"there is no option 'zzzz'\. Choose from temperature, top_k, "):
        engine.generate_batch(["hi"], zzzz=1)


@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        (None, "the prompt must be text, messages or token ids, got None"),
        (5, "must be text, messages or token ids, got 5"),
        (b"hi", "must be text, messages or token ids, got b'hi'"),
        ({"role": "user", "content": "hi"}, "must be text, messages or token ids"),
        (["hi", "there"], "is a list of 2 prompts. Use `generate_batch`"),
        ([[5, 6], [7]], "is a list of 2 prompts. Use `generate_batch`"),
        (torch.tensor([[5, 6]]), "is a list of 1 prompts. Use `generate_batch`"),
        ([[{"role": "user", "content": "hi"}]], "is a list of 1 prompts"),
        ([5, 6.0], r"must be messages or token ids throughout, got 6\.0 in it"),
        ([5, True], "must be messages or token ids throughout, got True in it"),
        ([5, None], "got None in it"),
        ([{"role": "user", "content": "hi"}, 5], "got 5 in it"),
        (torch.tensor(5), "must be text, messages or token ids, got 5"),
        (np.array([5.5]), r"got 5\.5 in it"),
    ],
)
def test_a_prompt_of_the_wrong_kind_is_refused(engine: Engine, prompt: Any, fact: str) -> None:
    with pytest.raises(PromptError, match=fact):
        engine.generate(prompt)


@pytest.mark.parametrize("prompt", [PROMPT, tuple(PROMPT), torch.tensor(PROMPT), np.array(PROMPT)])
def test_token_ids_may_come_in_any_list(engine: Engine, prompt: Any) -> None:
    assert engine.encode(prompt) == PROMPT


def test_what_a_chat_template_refuses_is_the_prompt_s_fault(engine: Engine) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    with pytest.raises(PromptError, match="the chat template cannot be applied to the prompt: no system role"):
        Engine(engine.model, tokenizer).generate([{"role": "system", "content": "x"}])


@pytest.mark.parametrize("option", ["threads", "neighbours", "prefix_cache"])
@pytest.mark.parametrize("value", ["2", 2.0, True, [2]])
def test_the_engine_s_own_numbers_are_whole(engine: Engine, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{option} must be a whole number, got"):
        Engine(engine.model, backend=engine.backend, **{option: value})


# --- Where an output ends


def stop_token(engine: Engine, place: int) -> int:
    """The token at a place of PROMPT's output, where it is the first of its kind."""
    output = engine.generate(PROMPT, max_new_tokens=24).token_ids
    assert output[place] not in output[:place]
    return output[place]


@pytest.mark.parametrize("options", [{"plain": True}, {"plan": skip_something()}, {}])
def test_a_stop_token_ends_the_output_and_is_no_part_of_the_text(engine: Engine, options: dict[str, Any]) -> None:
    whole = engine.generate(PROMPT, max_new_tokens=24).token_ids
    for place in (0, 1, 3):
        stopped = engine.generate(PROMPT, max_new_tokens=24, stop_token_ids=[stop_token(engine, place)], **options)
        assert stopped.token_ids == whole[: place + 1]
        assert stopped.finish_reason is FinishReason.STOP
        assert engine.tokenizer is not None
        assert stopped.text == engine.tokenizer.decode(whole[:place], skip_special_tokens=True)


@pytest.mark.parametrize("options", [{"plain": True}, {"plan": skip_something()}, {}])
def test_an_end_token_can_be_ignored(options: dict[str, Any]) -> None:
    model = endless(tiny_model())
    endless_output = transformers_output(model, PROMPT, 24)
    model.generation_config.eos_token_id = endless_output[3]
    engine = Engine(model, answers=False)
    assert engine.generate(PROMPT, max_new_tokens=24, **options).finish_reason is FinishReason.EOS
    ignored = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True, **options)
    assert list(ignored.token_ids) == endless_output
    both = engine.generate(PROMPT, max_new_tokens=24, ignore_eos=True, stop_token_ids=[endless_output[3]], **options)
    assert both.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("options", [{"plain": True}, {"plan": skip_something()}, {}])
@pytest.mark.parametrize("min_tokens", [1, 3, 4, 10])
def test_before_min_tokens_neither_end_tokens_nor_stop_tokens_nor_stop_strings_end_the_output(
    options: dict[str, Any], min_tokens: int
) -> None:
    model = endless(tiny_model(seed=3))
    model.lm_head.weight[:33] = 0  # only printable characters, one a token
    model.lm_head.weight[127:] = 0
    engine = Engine(model, tiny_tokenizer(), answers=False)
    whole = engine.generate("hello", max_new_tokens=30)
    stop = whole.text[2:4]
    ended = engine.generate("hello", max_new_tokens=30, stop=stop, min_tokens=min_tokens, **options)
    text = whole.text
    at = next((i for i in range(len(text)) if text.startswith(stop, i) and i + len(stop) > min_tokens), len(text))
    assert ended.text == text[:at]
    token = whole.token_ids[0]
    for kind in ("stop_token_ids", "eos"):
        if kind == "eos":
            model.generation_config.eos_token_id = token
        given: dict[str, Any] = {"stop_token_ids": [token]} if kind != "eos" else {}
        late = engine.generate("hello", max_new_tokens=30, min_tokens=min_tokens, **given, **options)
        plain = engine.generate("hello", max_new_tokens=30, min_tokens=min_tokens, plain=True, **given)
        assert late.token_ids == plain.token_ids
        assert len(late.token_ids) > min_tokens
        assert token not in late.token_ids[:min_tokens]
