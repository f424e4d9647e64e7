"""Agents of pydantic-ai, with tools where the server has them."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from client_server import Server
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelSettings, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "Name three colours."
GREEDY = ModelSettings(temperature=0, max_tokens=12)


def agent(server: Server, key: str = "", **options: Any) -> Agent[None, Any]:
    provider = OpenAIProvider(base_url=server.api, api_key=key or server.key)
    return Agent(OpenAIChatModel(server.model, provider=provider), **{"model_settings": GREEDY, **options})


def test_a_run_its_usage_and_its_stream(server: Server) -> None:
    said = server.say(QUESTION, max_tokens=12)
    result = agent(server).run_sync(QUESTION)
    assert result.output == said.strip()

    async def streamed() -> str:
        async with agent(server).run_stream(QUESTION) as running:
            return "".join([piece async for piece in running.stream_text(delta=True)])

    assert asyncio.run(streamed()).strip() == said.strip()


def test_instructions_earlier_turns_and_stop_strings(server: Server) -> None:
    own = agent(server, instructions="Be brief.")
    first = own.run_sync("Hello.")
    assert own.run_sync("Name a colour.", message_history=first.all_messages()).output
    said = server.say(QUESTION, max_tokens=12)
    stop = said.strip().split()[-1]
    settings = ModelSettings(temperature=0, max_tokens=12, stop_sequences=[stop])
    stopped = agent(server).run_sync(QUESTION, model_settings=settings).output
    assert stopped.strip() == said[: said.index(stop)].strip()


def test_a_refusal_is_pydantic_ai_s_error(server: Server) -> None:
    with pytest.raises(ModelHTTPError) as caught:
        agent(server, key="wrong").run_sync(QUESTION)
    assert caught.value.status_code == 401


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


@pytest.mark.usefixtures("structured")
def test_native_structured_output(server: Server) -> None:
    settings = ModelSettings(temperature=0, max_tokens=200)
    result = agent(server, output_type=NativeOutput(City), model_settings=settings).run_sync("Describe Paris.")
    assert isinstance(result.output, City)


@pytest.mark.usefixtures("tools")
def test_output_by_a_tool(server: Server) -> None:
    settings = ModelSettings(temperature=0, max_tokens=200)
    result = agent(server, output_type=City, model_settings=settings).run_sync("Describe Paris.")
    assert isinstance(result.output, City)


@pytest.mark.usefixtures("tools")
def test_a_tool_is_offered_and_the_run_ends(server: Server) -> None:
    """A model this small may or may not call it; either way the agent must come to an end."""
    own = agent(server, model_settings=ModelSettings(temperature=0, max_tokens=60))

    @own.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"Sunny in {city}."

    assert isinstance(own.run_sync("What is the weather in Paris?").output, str)
