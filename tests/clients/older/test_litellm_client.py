"""LiteLLM, which many programs and its own proxy use."""

from __future__ import annotations

import asyncio
import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # without it, prices are fetched at the import

import litellm
import pytest
from client_server import Server

QUESTION = [{"role": "user", "content": "Name three colours."}]


def options(server: Server, provider: str = "openai", **more: Any) -> dict[str, Any]:
    at = {"model": f"{provider}/{server.model}", "api_base": server.api, "api_key": server.key}
    return {**at, "temperature": 0, "max_tokens": 12, "max_retries": 0, **more}


@pytest.fixture(scope="module")
def said(server: Server) -> str:
    return server.say(QUESTION[0]["content"], max_tokens=12)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_a_chat_and_its_stream(server: Server, said: str, provider: str) -> None:
    answer = litellm.completion(messages=QUESTION, **options(server, provider))
    assert answer.choices[0].message.content == said
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    chunks = list(
        litellm.completion(
            messages=QUESTION, stream=True, stream_options={"include_usage": True}, **options(server, provider)
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == said
    assert chunks[-1].usage.completion_tokens == 12


def test_the_asynchronous_function_stop_strings_and_sampling(server: Server, said: str) -> None:
    assert asyncio.run(litellm.acompletion(messages=QUESTION, **options(server))).choices[0].message.content == said
    stop = said.strip().split()[-1]
    stopped = litellm.completion(messages=QUESTION, stop=[stop], **options(server))
    assert stopped.choices[0].message.content == said[: said.index(stop)]
    sampled = litellm.completion(messages=QUESTION, **options(server, temperature=0.9, top_p=0.9, seed=3, n=2))
    assert len(sampled.choices) == 2


def test_a_completion(server: Server) -> None:
    said = server.complete("One, two,", max_tokens=12)
    own = options(server, "text-completion-openai")
    assert litellm.text_completion(prompt="One, two,", **own).choices[0].text == said
    chunks = litellm.text_completion(prompt="One, two,", stream=True, **own)
    assert "".join(chunk.choices[0].text or "" for chunk in chunks if chunk.choices) == said


def test_errors_have_litellm_s_classes(server: Server) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(messages=QUESTION, **options(server, api_key="wrong"))
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=QUESTION, **options(server, temperature=9))
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=QUESTION, **{**options(server), "model": "openai/gpt-9"})
