"""LangChain's chat model and its completion model."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
import pytest
from client_server import Server
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

QUESTION = "Name three colours."


def chat(server: Server, **options: Any) -> ChatOpenAI:
    given = {"temperature": 0, "max_tokens": 12, "max_retries": 0, **options}
    return ChatOpenAI(model=server.model, base_url=server.api, api_key=server.key, **given)


def test_a_chat_its_usage_and_its_stream(server: Server) -> None:
    said = server.say(QUESTION, max_tokens=12)
    answer = chat(server).invoke(QUESTION)
    assert answer.content == said
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 12
    assert answer.response_metadata["finish_reason"] == "length"
    chunks = list(chat(server, stream_usage=True).stream(QUESTION))
    assert "".join(str(chunk.content) for chunk in chunks) == said
    whole: Any = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["output_tokens"] == 12
    assert asyncio.run(chat(server).ainvoke(QUESTION)).content == said


def test_a_conversation_stop_strings_sampling_and_log_probabilities(server: Server) -> None:
    said = server.say(QUESTION, max_tokens=12)
    stop = said.strip().split()[-1]
    assert chat(server).invoke(QUESTION, stop=[stop]).content == said[: said.index(stop)]
    turns = [SystemMessage("Be brief."), HumanMessage("Hello."), AIMessage("Hi!"), HumanMessage("Name a colour.")]
    assert chat(server).invoke(turns).content
    sampled = chat(server, temperature=0.8, top_p=0.9, seed=7, presence_penalty=0.5, n=2)
    assert len(sampled.generate([[HumanMessage(QUESTION)]]).generations[0]) == 2
    logged = chat(server, logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert "".join(each["token"] for each in logged.response_metadata["logprobs"]["content"]) == said


def test_several_prompts_at_once(server: Server) -> None:
    prompts = ["Name a colour.", "Name a fruit.", "Name a city."]
    assert [each.content for each in chat(server).batch(prompts)] == [server.say(p, max_tokens=12) for p in prompts]


def test_the_completion_model(server: Server) -> None:
    model = OpenAI(
        model=server.model, base_url=server.api, api_key=server.key, temperature=0, max_tokens=8, max_retries=0
    )
    said = server.complete("One, two,", max_tokens=8)
    assert model.invoke("One, two,") == said
    assert "".join(model.stream("One, two,")) == said
    assert model.batch(["One, two,", "Red, green,"])[0] == said
    stop = said.strip().split()[-1]
    assert model.invoke("One, two,", stop=[stop]) == said[: said.index(stop)]


def test_errors_are_those_of_openai_s_client(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(model=server.model, base_url=server.api, api_key="wrong", max_retries=0).invoke(QUESTION)
    with pytest.raises(openai.BadRequestError):
        chat(server, temperature=9).invoke(QUESTION)


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


@pytest.mark.usefixtures("structured")
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server: Server, method: Any, request: pytest.FixtureRequest) -> None:
    if method == "function_calling":
        request.getfixturevalue("tools")
    model = chat(server, max_tokens=200).with_structured_output(City, method=method)
    assert isinstance(model.invoke("Describe Paris."), City)


@pytest.mark.usefixtures("tools")
def test_tools(server: Server) -> None:
    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"Sunny in {city}."

    model = chat(server, max_tokens=200).bind_tools([weather], tool_choice="any")
    call = model.invoke("What is the weather in Paris?").tool_calls[0]
    assert call["name"] == "weather"
    assert str(weather.invoke(call["args"])).startswith("Sunny in ")
