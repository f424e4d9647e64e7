"""OpenAI's own client: what most programs and the other clients here use."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from client_server import Server, serving
from pydantic import BaseModel, Field

QUESTION: Any = [{"role": "user", "content": "Name three colours."}]
GREEDY: Any = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.api, api_key=server.key, max_retries=0, timeout=120) as own:
        yield own


@pytest.fixture(scope="module")
def said(server: Server) -> str:
    return server.say("Name three colours.", max_tokens=12)


def test_a_chat(client: openai.OpenAI, server: Server, said: str) -> None:
    answer = client.chat.completions.create(model=server.model, messages=QUESTION, **GREEDY)
    assert answer.choices[0].message.content == said
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_chat_with_system_and_earlier_turns(client: openai.OpenAI, server: Server) -> None:
    messages: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello."}]},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Name a colour."},
    ]
    answer = client.chat.completions.create(model=server.model, messages=messages, **GREEDY)
    assert answer.choices[0].message.content
    replayed = [*messages, answer.choices[0].message, {"role": "user", "content": "And another."}]
    assert client.chat.completions.create(model=server.model, messages=replayed, **GREEDY).choices[0].message.content


def test_a_streamed_chat(client: openai.OpenAI, server: Server, said: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model=server.model, messages=QUESTION, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1])


def test_the_helper_for_streams(client: openai.OpenAI, server: Server, said: str) -> None:
    """The helper itself refuses answers that were cut, so this one ends at a stop string."""
    stop = said.strip().split()[-1]
    with client.chat.completions.stream(model=server.model, messages=QUESTION, stop=stop, **GREEDY) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == said[: said.index(stop)]


def test_a_stream_that_is_left(client: openai.OpenAI, server: Server) -> None:
    stream = client.chat.completions.create(model=server.model, messages=QUESTION, stream=True)
    next(iter(stream))
    stream.close()
    assert server.say("Name a colour.", max_tokens=4)


def test_completions(client: openai.OpenAI, server: Server) -> None:
    expected = [server.complete(prompt, max_tokens=8) for prompt in ("One, two,", "Red, green,")]
    answer = client.completions.create(
        model=server.model, prompt=["One, two,", "Red, green,"], temperature=0, max_tokens=8
    )
    assert [choice.text for choice in answer.choices] == expected
    chunks = client.completions.create(model=server.model, prompt="One, two,", temperature=0, max_tokens=8, stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected[0]


def test_stop_strings_and_several_choices(client: openai.OpenAI, server: Server, said: str) -> None:
    stop = said.strip().split()[-1]
    answer = client.chat.completions.create(model=server.model, messages=QUESTION, stop=[stop], **GREEDY)
    assert answer.choices[0].message.content == said[: said.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    sampled = client.chat.completions.create(
        model=server.model, messages=QUESTION, n=3, temperature=1.0, top_p=0.9, seed=7, max_tokens=12
    )
    assert [choice.index for choice in sampled.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in sampled.choices}) > 1
    again = client.chat.completions.create(
        model=server.model, messages=QUESTION, n=3, temperature=1.0, top_p=0.9, seed=7, max_completion_tokens=12
    )
    assert [c.message.content for c in again.choices] == [c.message.content for c in sampled.choices]


def test_log_probabilities(client: openai.OpenAI, server: Server, said: str) -> None:
    answer = client.chat.completions.create(
        model=server.model, messages=QUESTION, logprobs=True, top_logprobs=3, **GREEDY
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(each.token for each in logprobs.content) == said
    for each in logprobs.content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == each.top_logprobs[0].logprob <= 0
    plain = client.completions.create(
        model=server.model, prompt="One, two,", logprobs=2, echo=True, max_tokens=2, temperature=0
    )
    own = plain.choices[0].logprobs
    assert own is not None
    assert own.tokens is not None
    assert own.token_logprobs is not None
    assert "".join(own.tokens) == plain.choices[0].text
    assert own.token_logprobs[0] is None


def test_models(client: openai.OpenAI, server: Server) -> None:
    assert [model.id for model in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model
    assert client.models.retrieve(f"HuggingFaceTB/{server.model}").owned_by == "knn-ssd"
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.models.retrieve("gpt-9")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"messages": []}, "messages"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_a_bad_request_is_the_client_s_error_with_the_parameter(
    client: openai.OpenAI, server: Server, change: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": server.model, "messages": QUESTION, **change})
    assert caught.value.param == param
    assert param in caught.value.message


def test_other_errors_have_the_client_s_classes(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        client.with_options(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=server.model, input="a", encoding_format="float")
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=server.model, input="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "long " * 20_000}], max_tokens=1
        )


def test_a_client_s_own_timeout_ends_the_request(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model=server.model, messages=QUESTION, temperature=0, extra_body={"ignore_eos": True}
        )


def test_a_full_queue_is_a_rate_limit_error_after_which_the_client_tries_again(tmp_path: Path) -> None:
    with serving(tmp_path / "serve.log", "--running", "1", "--waiting", "1") as small:
        own = openai.OpenAI(base_url=small.api, api_key=small.key, max_retries=0, timeout=120)

        def ask(client: openai.OpenAI) -> str:
            try:
                answer = client.chat.completions.create(
                    model=small.model, messages=QUESTION, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
                )
                return answer.choices[0].message.content or ""
            except openai.RateLimitError as error:
                return f"refused, again in {error.response.headers['retry-after']} s"

        with ThreadPoolExecutor(6) as pool:
            refused = list(pool.map(ask, [own] * 6))
            assert any(text == "refused, again in 1 s" for text in refused)
            patient = list(pool.map(ask, [own.with_options(max_retries=30)] * 4))
            assert len(set(patient)) == 1
            assert not patient[0].startswith("refused")


def test_the_asynchronous_client(server: Server, said: str) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.api, api_key=server.key, max_retries=0) as client:
            asked = [client.chat.completions.create(model=server.model, messages=QUESTION, **GREEDY) for _ in range(3)]
            whole = [answer.choices[0].message.content or "" for answer in await asyncio.gather(*asked)]
            stream = await client.chat.completions.create(model=server.model, messages=QUESTION, stream=True, **GREEDY)
            return [*whole, "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])]

    assert asyncio.run(ask()) == [said] * 4


class City(BaseModel):
    name: str = Field(max_length=20)
    size: Literal["small", "large"]


@pytest.mark.usefixtures("structured")
def test_an_answer_is_parsed_into_a_pydantic_model(client: openai.OpenAI, server: Server) -> None:
    answer = client.chat.completions.parse(
        model=server.model,
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        response_format=City,
        temperature=0,
        max_tokens=200,
    )
    assert isinstance(answer.choices[0].message.parsed, City)


@pytest.mark.usefixtures("structured")
def test_json_mode(client: openai.OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Describe Paris as a short JSON object."}],
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=300,
    )
    assert answer.choices[0].finish_reason == "length" or isinstance(
        json.loads(answer.choices[0].message.content or ""), dict
    )


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called_and_its_result_is_used(client: openai.OpenAI, server: Server, choice: Any) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    answer = client.chat.completions.create(
        model=server.model, messages=messages, tools=[WEATHER], tool_choice=choice, temperature=0, max_tokens=200
    )
    calls: Any = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason in ("tool_calls", "stop")
    assert [call.function.name for call in calls] == ["weather"] * len(calls)
    assert set(json.loads(calls[0].function.arguments)) == {"city"}
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": "Sunny."}
    messages += [answer.choices[0].message, result]
    final = client.chat.completions.create(model=server.model, messages=messages, **GREEDY)
    assert final.choices[0].message.content


@pytest.mark.usefixtures("tools")
def test_a_streamed_tool_call(client: openai.OpenAI, server: Server) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    with client.chat.completions.stream(
        model=server.model, messages=messages, tools=[WEATHER], tool_choice="required", temperature=0, max_tokens=200
    ) as stream:
        final = stream.get_final_completion()
    calls: Any = final.choices[0].message.tool_calls
    assert set(json.loads(calls[0].function.arguments)) == {"city"}
