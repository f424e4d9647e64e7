"""instructor, which parses answers into pydantic models."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import pytest
from client_server import Server
from pydantic import BaseModel, Field


class City(BaseModel):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


def client(server: Server, mode: instructor.Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=server.api, api_key=server.key, max_retries=0), mode=mode)


def test_a_chat_without_a_model_of_the_answer(server: Server) -> None:
    answer = client(server, instructor.Mode.MD_JSON).chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Name three colours."}],
        response_model=None,
        temperature=0,
        max_tokens=12,
    )
    assert answer.choices[0].message.content == server.say("Name three colours.", max_tokens=12)


@pytest.mark.parametrize("mode", [instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS])
def test_an_answer_is_parsed(server: Server, mode: instructor.Mode, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue("tools" if mode is instructor.Mode.TOOLS else "structured")
    city = client(server, mode).chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Describe Paris."}],
        response_model=City,
        temperature=0,
        max_tokens=200,
        max_retries=0,
    )
    assert isinstance(city, City)
