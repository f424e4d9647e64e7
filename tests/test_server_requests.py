"""The requests that clients of OpenAI's API send: every documented field, lists of prompts, echo, replayed turns."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai.types.chat as openai_chat
import openai.types.completion_create_params as openai_completions
import pytest
import torch
from fastapi.testclient import TestClient
from helpers import endless
from server import MODEL, Served, serving
from server_process import save_model, server_process
from test_native import wide_model
from test_server_liveness import slow_forward

from knn_ssd.cli import main
from knn_ssd.engine import Engine
from knn_ssd.errors import PromptError
from knn_ssd.scoring import prompt_logprobs
from knn_ssd.server import completions
from knn_ssd.server.app import ServeSettings, make_app
from knn_ssd.server.fields import SamplingFields
from knn_ssd.server.messages import Message, TextPart, ToolCall
from knn_ssd.server.owners import Owners
from knn_ssd.server.schemas import MOST_TOTAL_CHOICES, ChatRequest, CompletionRequest, StreamOptions
from knn_ssd.speculation.decode import FinishReason
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tokenization import TemplateOptions, encode

TEMPLATE = (
    "{% for m in messages %}{% if not (loop.last and m['role'] == 'assistant' and not add_generation_prompt) %}"
    "{{ m['role'] + ': ' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments.city }}]{% endfor %}"
    "{% if m.role == 'tool' %}<{{ m.tool_call_id }} {{ m.name }}>{% endif %}{{ '\n' }}"
    "{% else %}{{ m['role'] + ': ' + m['content'] }}{% endif %}{% endfor %}"
    "{% if thinking %}think {% endif %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def own_engine() -> Engine:
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = TEMPLATE
    return Engine(endless(tiny_model()), tokenizer)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    settings = ServeSettings(MODEL, aliases=("someone/tiny", "/models/tiny"), origins=("https://example.org",))
    yield from serving(settings, own_engine())


@pytest.fixture(scope="module")
def engine() -> Engine:
    return own_engine()


def chat(served: Served, **body: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a fox"}], "max_tokens": 4, **body}
    return httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=30)


def complete(served: Served, **body: Any) -> httpx.Response:
    body = {"model": MODEL, "prompt": "a fox", "max_tokens": 4, "temperature": 0, **body}
    return httpx.post(f"{served.url}/v1/completions", json=body, timeout=30)


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    assert [each["index"] for each in choices] == list(range(len(choices)))
    return [each["text"] if "text" in each else each["message"]["content"] for each in choices]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# --- Fields with the values that they have by default

SHARED: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "metadata": {"run": "7"},
    "n": 1,
    "seed": 7,
    "service_tier": "auto",
    "stop": [],
    "stream": False,
    "stream_options": {"include_usage": False, "include_obfuscation": False},
    "top_p": 1,
    "user": "someone",
    "top_k": -1,
    "min_p": 0,
    "repetition_penalty": 1,
    "ignore_eos": False,
    "min_tokens": 0,
    "stop_token_ids": [],
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "use_beam_search": False,
    "best_of": 1,
    "priority": 3,
}
CHAT_ONLY: dict[str, Any] = {
    "audio": None,
    "function_call": "none",
    "functions": [],
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "a fox"},
    "moderation": None,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"ttl": "24h"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "none",
    "response_format": {"type": "text"},
    "safety_identifier": "s",
    "store": False,
    "tool_choice": "auto",
    "tools": [],
    "verbosity": "medium",
    "web_search_options": None,
    "chat_template_kwargs": {},
    "add_generation_prompt": True,
    "continue_final_message": False,
    "max_completion_tokens": 4,
}
COMPLETION_ONLY: dict[str, Any] = {"echo": False, "suffix": "", "logprobs": None}


@pytest.mark.parametrize("name", [*SHARED, *CHAT_ONLY])
def test_a_default_is_accepted_in_a_chat(served: Served, name: str) -> None:
    value = {**SHARED, **CHAT_ONLY}[name]
    plain = texts(chat(served, temperature=0))
    assert texts(chat(served, temperature=0, **{name: value})) == plain
    assert texts(chat(served, temperature=0, **{name: None})) == plain or name == "max_tokens"


@pytest.mark.parametrize("name", [*SHARED, *COMPLETION_ONLY])
def test_a_default_is_accepted_in_a_completion(served: Served, name: str) -> None:
    value = {**SHARED, **COMPLETION_ONLY}[name]
    plain = texts(complete(served))
    assert texts(complete(served, **{name: value})) == plain
    assert texts(complete(served, **{name: None})) == plain


@pytest.mark.parametrize(
    ("documented", "known"),
    [
        (openai_chat.completion_create_params.CompletionCreateParamsBase, ChatRequest),
        (openai_completions.CompletionCreateParamsBase, CompletionRequest),
        (openai_chat.ChatCompletionStreamOptionsParam, StreamOptions),
        (openai_chat.ChatCompletionContentPartTextParam, TextPart),
        (openai_chat.ChatCompletionSystemMessageParam, Message),
        (openai_chat.ChatCompletionDeveloperMessageParam, Message),
        (openai_chat.ChatCompletionUserMessageParam, Message),
        (openai_chat.ChatCompletionToolMessageParam, Message),
        (openai_chat.ChatCompletionMessageFunctionToolCallParam, ToolCall),
    ],
)
def test_every_parameter_of_openai_s_client_is_known(documented: type[Any], known: type[Any]) -> None:
    """It is honoured, or inert, or refused by its name where it has another value than its default."""
    assert set(documented.__annotations__) <= set(known.model_fields)


def test_all_defaults_at_once_and_nulls_for_all_are_accepted(served: Served) -> None:
    plain = texts(chat(served, temperature=0))
    assert texts(chat(served, temperature=0, **SHARED, **CHAT_ONLY)) == plain
    nulls = dict.fromkeys({**SHARED, **CHAT_ONLY}) | {"max_completion_tokens": 4, "temperature": 0}
    assert texts(chat(served, **nulls)) == plain
    assert chat(served, temperature=None, top_p=None).status_code == 200
    assert complete(served, temperature=None, max_tokens=None).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("moderation", {"model": "m"}),
        ("reasoning_effort", "high"),
        ("audio", {"voice": "alloy"}),
        ("best_of", 3),
        ("suffix", "end"),
        ("use_beam_search", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("guided_json", {}),
        ("nonsense", 1),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(served: Served, name: str, value: Any) -> None:
    for refused in (chat(served, **{name: value}), complete(served, **{name: value})):
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert (error["message"], error["param"]) == (f"'{name}' is not supported", name)
        assert error["code"] == "unsupported_parameter"


OTHER_SAMPLING: dict[str, Any] = {
    "presence_penalty": 1.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"65": 2},
    "top_k": 3,
    "min_p": 0.2,
    "repetition_penalty": 1.2,
    "ignore_eos": True,
    "min_tokens": 2,
    "stop_token_ids": [65],
}


@pytest.mark.parametrize("name", OTHER_SAMPLING)
def test_a_sampling_option_is_the_engine_s(served: Served, engine: Engine, name: str) -> None:
    assert set(OTHER_SAMPLING) == set(SamplingFields.model_fields)
    body = {"model": MODEL, "prompt": "a", name: OTHER_SAMPLING[name]}
    options = CompletionRequest.model_validate(body).options()
    assert name in options
    wanted = engine.generate("a fox", **{**options, "temperature": 0, "max_new_tokens": 12, "plain": True}).text
    assert texts(complete(served, max_tokens=12, temperature=0, **{name: OTHER_SAMPLING[name]})) == [wanted]


def test_the_engine_s_sampling_options_do_what_they_say(served: Served, engine: Engine) -> None:
    penalised = engine.generate("a fox", max_new_tokens=12, repetition_penalty=1.7, chat=False).text
    assert texts(complete(served, max_tokens=12, repetition_penalty=1.7)) == [penalised]
    drawn = engine.generate("a fox", max_new_tokens=12, temperature=1.5, top_k=2, seed=4, chat=False).text
    assert texts(complete(served, max_tokens=12, temperature=1.5, top_k=2, seed=4)) == [drawn]


def test_a_seed_may_be_negative_as_in_openai_s_api(served: Served) -> None:
    drawn = [texts(complete(served, seed=seed, temperature=1.5, max_tokens=9)) for seed in (-3, -3, -4, -(2**63))]
    assert drawn[0] == drawn[1]
    assert len(set(map(tuple, drawn))) == 3
    assert complete(served, seed=2**63).status_code == 400


# --- Lengths


@pytest.mark.parametrize("asked", [10_000, -1, 2**70])
def test_more_tokens_than_fit_are_the_rest_of_the_context(served: Served, asked: int) -> None:
    for reply in (chat(served, max_tokens=asked, temperature=0), complete(served, max_tokens=asked)):
        usage = reply.json()["usage"]
        assert usage["total_tokens"] == 256
        assert reply.json()["choices"][0]["finish_reason"] == "length"
    assert chat(served, max_tokens=None, temperature=0).json()["usage"]["total_tokens"] == 256


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"logit_bias": {"5": 1000}}, "logit_bias.5"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", ""]}, "stop"),
        ({"messages": [{"role": "user", "content": "a"}, 1]}, "messages.1"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"stream_options": {"include_usage": "perhaps"}}, "stream_options.include_usage"),
    ],
)
def test_a_refusal_names_the_place_of_the_value(served: Served, change: dict[str, Any], param: str) -> None:
    error = chat(served, **change).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("asked", [0, -2, 1.5, "many"])
def test_other_numbers_of_tokens_are_refused(served: Served, asked: Any) -> None:
    assert chat(served, max_tokens=asked).status_code == 400
    assert complete(served, max_tokens=asked).status_code == 400


# --- Prompts


def test_a_list_of_prompts_has_a_choice_for_each(served: Served, engine: Engine) -> None:
    prompts = ["a fox", "SELECT", "3 + 4"]
    alone = [texts(complete(served, prompt=prompt))[0] for prompt in prompts]
    assert len(set(alone)) == 3
    together = complete(served, prompt=prompts)
    assert texts(together) == alone
    ids = [engine.encode(prompt, chat=False) for prompt in prompts]
    assert texts(complete(served, prompt=ids)) == alone
    assert texts(complete(served, prompt=ids[0])) == alone[:1]
    usage = together.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (sum(map(len, ids)), 12)


def test_n_and_seed_hold_for_each_prompt_of_a_list(served: Served) -> None:
    options = {"temperature": 1, "seed": 5, "n": 2, "max_tokens": 8}
    alone = [texts(complete(served, prompt=prompt, **options)) for prompt in ("a fox", "SELECT")]
    assert texts(complete(served, prompt=["a fox", "SELECT"], **options)) == alone[0] + alone[1]
    assert complete(served, prompt=["a fox"] * 2, n=2).json()["usage"]["prompt_tokens"] == 10


def test_a_list_of_prompts_streams_by_index(served: Served) -> None:
    prompts = ["a fox", "SELECT", "3 + 4"]
    streamed = {0: "", 1: "", 2: ""}
    ended = []
    for each in events(complete(served, prompt=prompts, stream=True)):
        (choice,) = each["choices"]
        streamed[choice["index"]] += choice["text"]
        ended += [choice["index"]] if choice["finish_reason"] else []
    assert list(streamed.values()) == texts(complete(served, prompt=prompts))
    assert sorted(ended) == [0, 1, 2]


def test_more_prompts_than_the_queue_is_long_are_answered(engine: Engine) -> None:
    with TestClient(make_app(engine, ServeSettings(MODEL))) as http:
        body = {"model": MODEL, "prompt": ["a fox"] * 100, "max_tokens": 1, "temperature": 0}
        assert len(http.post("/v1/completions", json=body).json()["choices"]) == 100


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "at least 1 item"),
        ([[]], "at least 1 item"),
        (["a", ""], "at least 1 character"),
        (["a", [5]], "valid string"),
        ([[5], "a"], "valid"),
        (["a"] * (MOST_TOTAL_CHOICES + 1), "at most 256 items"),
        (None, "Field required"),
        ({"a": 1}, "valid string"),
        (["a", "b" * 300], "the model's context is 256"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused(served: Served, prompt: Any, sentence: str) -> None:
    refused = complete(served, prompt=prompt)
    assert refused.status_code == 400
    assert sentence in refused.json()["error"]["message"]
    assert served.scheduler.waiting == 0


def test_choices_of_all_prompts_are_bounded(served: Served) -> None:
    refused = complete(served, prompt=["a"] * 100, n=3)
    assert refused.status_code == 400
    assert "at most 256 choices" in refused.json()["error"]["message"]
    rounds = complete(served, prompt=["a"] * 2, knn_ssd={"rounds": True})
    assert "single prompt" in rounds.json()["error"]["message"]


# --- Echo


def reference(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities (n - 1, V) of what follows each token but the last, by transformers alone."""
    with torch.no_grad():
        return engine.model(torch.tensor([token_ids])).logits[0, :-1].float().log_softmax(-1)


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_gives_the_prompt_s_log_probabilities(
    served: Served, engine: Engine, max_tokens: int, as_ids: bool
) -> None:
    prompt = "a fox and a goose went down to the river, and they talked"
    ids = engine.encode(prompt, chat=False)
    body: dict[str, Any] = {"prompt": ids if as_ids else prompt, "echo": True, "logprobs": 2, "max_tokens": max_tokens}
    reply = complete(served, **body)
    (choice,) = reply.json()["choices"]
    assert choice["text"][: len(prompt)] == prompt
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    n = len(ids)
    assert {len(each) for each in logprobs.values()} == {n + max_tokens}
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"][:n] == list(range(n))
    assert all(len(prompt) <= at <= len(choice["text"]) for at in logprobs["text_offset"][n:])
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    expected = reference(engine, ids)
    found = torch.tensor(logprobs["token_logprobs"][1:n])
    torch.testing.assert_close(found, expected[range(n - 1), ids[1:]], atol=1e-4, rtol=1e-4)
    for own, top, row in zip(found.tolist(), logprobs["top_logprobs"][1:n], expected, strict=True):
        assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)
        assert own <= max(top.values())
    assert reply.json()["usage"]["completion_tokens"] == max_tokens
    assert reply.json()["usage"]["prompt_tokens"] == n
    assert choice["text"][len(prompt) :] == texts(complete(served, prompt=prompt, max_tokens=max_tokens or 1))[
        0
    ] * bool(max_tokens)


def test_echo_in_a_stream_is_what_it_is_whole(served: Served) -> None:
    for body in (
        {"echo": True, "logprobs": 1, "max_tokens": 5},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"echo": True, "max_tokens": 5},
        {"echo": True, "max_tokens": 0},
        {"echo": True, "logprobs": 0, "max_tokens": 3, "prompt": ["a fox", "SELECT"]},
    ):
        whole = complete(served, **body).json()["choices"]
        pieces = [choice for each in events(complete(served, **body, stream=True)) for choice in each["choices"]]
        for choice in whole:
            own = [each for each in pieces if each["index"] == choice["index"]]
            assert "".join(each["text"] for each in own) == choice["text"]
            assert [each["finish_reason"] for each in own if each["finish_reason"]] == ["length"]
            if choice["logprobs"] is not None:
                for name, values in choice["logprobs"].items():
                    assert [v for each in own if each["logprobs"] for v in each["logprobs"][name]] == values


def test_likelihoods_as_an_evaluation_harness_asks_for_them(served: Served, engine: Engine) -> None:
    """lm-evaluation-harness's `local-completions` sends lists of token ids, and sums what follows the context."""
    contexts, endings = ["a fox", "one and one is"], [" ran", " two"]
    ids = [engine.encode(c + e, chat=False) for c, e in zip(contexts, endings, strict=True)]
    reply = complete(served, prompt=ids, echo=True, logprobs=1, max_tokens=1, seed=1234)
    for context, token_ids, choice in zip(contexts, ids, reply.json()["choices"], strict=True):
        rows = reference(engine, token_ids)
        start = len(engine.encode(context, chat=False))
        own = sum(float(rows[at - 1, token_ids[at]]) for at in range(start, len(token_ids)))
        assert sum(choice["logprobs"]["token_logprobs"][start:-1]) == pytest.approx(own, abs=1e-3)
        greedy = all(
            token == max(top.values())
            for token, top in zip(
                choice["logprobs"]["token_logprobs"][start:-1],
                choice["logprobs"]["top_logprobs"][start:-1],
                strict=True,
            )
        )
        assert greedy == all(int(rows[at - 1].argmax()) == token_ids[at] for at in range(start, len(token_ids)))


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 64, 65, 150])
def test_prompt_logprobs_are_those_of_one_pass(length: int) -> None:
    for engine in (Engine(tiny_model()), Engine(wide_model("llama"))):
        token_ids = [3 + 7 * n % 100 for n in range(length)]
        found = prompt_logprobs(engine.backend, token_ids, 3)
        assert [each.token for each in found] == token_ids[1:]
        expected = reference(engine, token_ids)
        for each, row, token in zip(found, expected, token_ids[1:], strict=True):
            assert each.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [token for token, _ in each.top] == row.topk(3).indices.tolist()


def test_scored_prompts_share_passes_and_leave_their_prefix() -> None:
    engine = Engine(endless(wide_model("llama")), tiny_tokenizer())
    with TestClient(make_app(engine, ServeSettings(MODEL, Owners.dividing(2**22)))) as http:
        body = {"model": MODEL, "prompt": list(range(3, 103)), "max_tokens": 2, "temperature": 0}
        plain = http.post("/v1/completions", json={**body, "store": False}).json()
        scored = http.post("/v1/completions", json={**body, "echo": True, "logprobs": 0}).json()
    assert scored["choices"][0]["text"].endswith(plain["choices"][0]["text"])
    assert scored["usage"]["prompt_tokens_details"]["cached_tokens"] in (0, 99)  # 0 without kernels


# --- Conversations


def prompt_of(messages: list[dict[str, Any]], **options: Any) -> str:
    """The text that the chat template makes of a request."""
    request = ChatRequest.model_validate({"model": MODEL, "messages": messages, **options})
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = TEMPLATE
    return str(tokenizer.decode(encode(tokenizer, request.prompts[0], 10_000, template=request.template)))


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}


def test_tool_turns_are_replayed() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "short"}]},
        {"role": "user", "content": "how is Rome?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "assistant", "content": "It is sunny.", "reasoning_content": "hm", "annotations": [], "refusal": None},
        {"role": "user", "content": [{"type": "text", "text": "thanks", "cache_control": {"type": "ephemeral"}}]},
    ]
    for message in messages[4:5]:
        message["cache_control"] = {"type": "ephemeral"}
    assert prompt_of(messages) == (
        "system: be short\nuser: how is Rome?\nassistant: [weather Rome]\ntool: sunny<c1 weather>\n"
        "assistant: It is sunny.\nuser: thanks\nassistant: "
    )


@pytest.mark.parametrize("arguments", ["", "{}", "not json", "[" * 5000, "[1]", {"city": "Rome"}])
def test_arguments_of_any_kind_are_replayed(arguments: Any) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": arguments}}
    text = prompt_of([{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "user", "content": "x"}])
    assert text.startswith("assistant: [f ")


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({"role": "user"}, "needs its content"),
        ({"role": "user", "content": None}, "needs its content"),
        ({"role": "robot", "content": "a"}, "'system', 'developer', 'user', 'assistant' or 'tool'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'text'"),
        ({"role": "assistant", "audio": {"id": "a"}}, "'messages.0.audio' is not supported"),
        ({"role": "user", "content": "a", "nonsense": 1}, "'messages.0.nonsense' is not supported"),
    ],
)
def test_messages_that_cannot_be_used_are_refused(served: Served, message: dict[str, Any], sentence: str) -> None:
    refused = chat(served, messages=[message])
    assert refused.status_code == 400
    assert sentence in refused.json()["error"]["message"]


def test_the_last_message_is_continued(served: Served, engine: Engine) -> None:
    messages = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "once upon"}]
    assert prompt_of(messages, continue_final_message=True) == "user: a fox\nassistant: once upon"
    both = {"continue_final_message": True, "add_generation_prompt": False}
    assert prompt_of(messages, **both) == "user: a fox\nassistant: once upon"
    assert prompt_of(messages[:1], add_generation_prompt=False) == "user: a fox\n"
    own = engine.generate("user: a fox\nassistant: once upon", max_new_tokens=8, chat=False).text
    assert texts(chat(served, messages=messages, **both, max_tokens=8, temperature=0)) == [own]


def test_variables_of_the_template_are_given_and_nothing_else(served: Served) -> None:
    messages = [{"role": "user", "content": "a"}]
    assert prompt_of(messages, chat_template_kwargs={"thinking": True}) == "user: a\nthink assistant: "
    for name in ("chat_template", "tokenize", "add_generation_prompt", "conversation", "tools", "return_tensors"):
        refused = chat(served, chat_template_kwargs={name: "{% for i in range(10 ** 9) %}{% endfor %}"})
        assert refused.status_code == 400
        assert f"'{name}' cannot be a variable" in refused.json()["error"]["message"]
    tokenizer = tiny_tokenizer(chat=True)
    with pytest.raises(PromptError, match="cannot be a variable"):
        encode(tokenizer, messages, 100, template=TemplateOptions(variables={"tokenize": True}))


# --- Models


@pytest.mark.parametrize("name", [MODEL, "someone/tiny", "/models/tiny"])
def test_a_model_has_several_names(served: Served, name: str) -> None:
    assert chat(served, model=name).json()["model"] == name
    described = httpx.get(f"{served.url}/v1/models/{name}").json()
    assert (described["id"], described["object"]) == (name, "model")


def test_a_model_that_is_not_served_is_not_found(served: Served) -> None:
    for reply in (httpx.get(f"{served.url}/v1/models/gpt-9"), chat(served, model="gpt-9")):
        assert reply.status_code == 404
        assert reply.json()["error"]["code"] == "model_not_found"
        assert "'tiny' is" in reply.json()["error"]["message"]
    assert served.client.models.retrieve("someone/tiny").id == "someone/tiny"


# --- Streams


def test_usage_in_a_stream(served: Served) -> None:
    whole = complete(served, max_tokens=9).json()["usage"]
    last = events(complete(served, max_tokens=9, stream=True, stream_options={"include_usage": True}))
    assert last[-1]["choices"] == []
    assert last[-1]["usage"]["total_tokens"] == whole["total_tokens"]
    assert all(each["usage"] is None for each in last[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    each = [event["usage"] for event in events(complete(served, max_tokens=9, stream=True, stream_options=options))]
    counts = [usage["completion_tokens"] for usage in each]
    assert counts == sorted(counts)
    assert (counts[0] > 0, counts[-1]) == (True, 9)
    assert {usage["prompt_tokens"] for usage in each} == {whole["prompt_tokens"]}
    chats = events(chat(served, stream=True, stream_options=options))
    assert chats[0]["usage"]["completion_tokens"] == 0
    bare = events(complete(served, stream=True, stream_options=None))
    assert all("usage" not in event for event in bare)


def test_headers_come_at_once_and_comments_while_the_prefill_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "HEADERS_SEC", 0.3)
    monkeypatch.setattr(completions, "PING_SEC", 0.2)
    engine = own_engine()
    slow_forward(engine, 2.0)
    for own in serving(ServeSettings(MODEL), engine):
        body = {"model": MODEL, "prompt": "a fox and a goose", "max_tokens": 3, "temperature": 0, "stream": True}
        began = time.monotonic()
        with httpx.stream("POST", f"{own.url}/v1/completions", json=body, timeout=30) as reply:
            assert time.monotonic() - began < 1
            assert "x-knn-ssd-exactness" in reply.headers
            assert "x-knn-ssd-plan" not in reply.headers
            text = "".join(reply.iter_text())
        assert text.count(": ping\n\n") >= 3
        assert text.endswith("data: [DONE]\n\n")
        client = own.client.completions.create(
            **{key: value for key, value in body.items() if key != "stream"}, stream=True
        )
        assert sum(bool(chunk.choices[0].finish_reason) for chunk in client) == 1


def test_a_stream_with_a_short_prefill_has_all_headers(served: Served) -> None:
    reply = complete(served, stream=True)
    assert {"x-knn-ssd-exactness", "x-knn-ssd-plan", "x-knn-ssd-neighbours"} <= set(reply.headers)
    assert complete(served, prompt="x" * 300, stream=True).status_code == 400


# --- Browsers


def test_pages_of_other_origins_are_let_in_by_name(served: Served) -> None:
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    url = f"{served.url}/v1/chat/completions"
    allowed = httpx.options(url, headers={"origin": "https://example.org", **ask})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://example.org"
    assert httpx.options(url, headers={"origin": "https://evil.example", **ask}).status_code == 400
    reply = httpx.get(f"{served.url}/v1/models", headers={"origin": "https://example.org"})
    assert reply.headers["access-control-allow-origin"] == "https://example.org"
    assert "x-knn-ssd-route" in reply.headers["access-control-expose-headers"]
    refused = httpx.post(url, json={}, headers={"origin": "https://example.org"})
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == "https://example.org"
    with TestClient(make_app(own_engine(), ServeSettings(MODEL))) as http:
        assert "access-control-allow-origin" not in http.get("/v1/models", headers={"origin": "https://a.b"}).headers
    keyed = ServeSettings(MODEL, Owners.dividing(keys=["secret"]), origins=("*",))
    with TestClient(make_app(own_engine(), keyed)) as http:
        assert http.options("/v1/models", headers={"origin": "https://a.b", **ask}).status_code == 200
        assert http.get("/v1/models", headers={"origin": "https://a.b"}).status_code == 401


# --- Metrics


def test_histograms_tell_where_the_time_went(engine: Engine) -> None:
    with TestClient(make_app(engine, ServeSettings(MODEL))) as http:
        http.post("/v1/completions", json={"model": MODEL, "prompt": ["a", "b"], "max_tokens": 3})
        text = http.get("/metrics").text
    for part in ("queue", "prefill", "decode"):
        assert f"knn_ssd_{part}_seconds_count 2.0" in text
        assert f'knn_ssd_{part}_seconds_bucket{{le="300.0"}} 2.0' in text


# --- The command


def test_a_served_model_has_its_own_names_and_the_template_of_a_file(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[-1]['content'] }}!", "utf-8")
    with server_process(folder, "--chat-template", str(template), "--cors", "https://example.org") as own:
        body = {"max_tokens": 2, "messages": [{"role": "user", "content": "hi"}]}
        for name in ("tiny", "model", str(folder)):
            reply = httpx.post(f"{own.url}/v1/chat/completions", json={"model": name, **body}, timeout=30)
            assert reply.json()["usage"]["prompt_tokens"] == len("hi!")
        models = httpx.get(f"{own.url}/v1/models", headers={"origin": "https://example.org"})
        assert models.headers["access-control-allow-origin"] == "https://example.org"


def test_a_template_of_one_s_own_says_what_ends_a_reply() -> None:
    engine = own_engine()
    pad = {"logit_bias": {0: 100.0}, "max_new_tokens": 5}
    assert engine.generate("a", **pad).finish_reason is FinishReason.LENGTH
    engine.use_chat_template("{% for m in messages %}{{ m['content'] }}<pad>{% endfor %}")
    assert engine.generate("a", **pad).finish_reason is FinishReason.EOS
    assert engine.generate("a", chat=False, **pad).finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot be read: No such file"), (b"\xff", "it is not UTF-8"), (b"\n{% if %}", "not valid, at line 2")],
)
def test_a_template_that_cannot_be_used_is_reported(
    tmp_path: Path, content: bytes | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "template.jinja"
    if content is not None:
        file.write_bytes(content)
    folder = save_model(tmp_path / "model")
    assert main(["serve", "--port", "0", "--model", str(folder), "--chat-template", str(file)]) == 2
    errors = capsys.readouterr().err
    assert sentence in errors
    assert "Traceback" not in errors
