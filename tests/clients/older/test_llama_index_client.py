"""LlamaIndex's OpenAI-like model, for chats and for completions."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from client_server import Server
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

QUESTION = "Name three colours."


def model(server: Server, **options: Any) -> OpenAILike:
    given = {"temperature": 0, "max_tokens": 12, "max_retries": 0, "is_chat_model": True, **options}
    return OpenAILike(model=server.model, api_base=server.api, api_key=server.key, **given)


def test_a_chat_and_its_stream(server: Server) -> None:
    said = server.say(QUESTION, max_tokens=12)
    turn = [ChatMessage(role="user", content=QUESTION)]
    assert model(server).chat(turn).message.content == said
    assert "".join(part.delta or "" for part in model(server).stream_chat(turn)) == said
    assert model(server).complete(QUESTION).text == said
    assert asyncio.run(model(server).achat(turn)).message.content == said
    raw: Any = model(server).chat(turn).raw
    assert raw.usage.completion_tokens == 12


def test_a_completion_and_its_stream(server: Server) -> None:
    said = server.complete("One, two,", max_tokens=12)
    own = model(server, is_chat_model=False)
    assert own.complete("One, two,").text == said
    assert "".join(part.delta or "" for part in own.stream_complete("One, two,")) == said
    stop = said.strip().split()[-1]
    assert own.complete("One, two,", stop=[stop]).text == said[: said.index(stop)]


def test_a_conversation_and_sampling(server: Server) -> None:
    turns = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(role="user", content="Hello."),
        ChatMessage(role="assistant", content="Hi!"),
        ChatMessage(role="user", content="Name a colour."),
    ]
    sampled = model(server, temperature=0.8, additional_kwargs={"seed": 3, "top_p": 0.9})
    assert sampled.chat(turns).message.content == sampled.chat(turns).message.content


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


@pytest.mark.usefixtures("structured")
def test_structured_output(server: Server) -> None:
    own = model(server, max_tokens=200, should_use_structured_outputs=True)
    answer = own.as_structured_llm(City).complete("Describe Paris.")
    assert isinstance(answer.raw, City)
