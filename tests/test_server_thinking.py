"""Thinking before an answer of a demanded form: no part of the form, and no part of the answer's content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import pytest
from openai import OpenAI
from server import MODEL, Served, serving
from test_server_requests import chat
from test_server_structured import FORMAT, HERMES, PAINT, SCHEMA, TEMPLATES, engine, with_special_tokens

from knn_ssd.outputs import Chunk
from knn_ssd.server.app import ServeSettings
from knn_ssd.server.reply_text import ReplyText
from knn_ssd.server.schemas import ChatRequest
from knn_ssd.server.structured import JsonSchemaFormat, format_grammar
from knn_ssd.server.thinking import Thinking
from knn_ssd.server.tool_calls import ToolReply, ToolUse
from knn_ssd.server.tool_formats import ToolFormat
from knn_ssd.speculation.decode import Round
from knn_ssd.testing import tiny_tokenizer
from knn_ssd.tokenization import Detokenizer

SWITCH = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
QWEN = HERMES + SWITCH + "{# </think> #}"  # the model opens its thinking itself
HERMES_CALL = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red", "size": 3}}\n</tool_call>'  # of PAINT
R1 = HERMES + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"  # the template opens it
MARKS = ["<think>", "</think>"]  # 3 and 4
SHORTLY = {"temperature": 1.2, "seed": 5, "max_tokens": 400, "logit_bias": {3: 100, 4: 2}}  # thinks a few tokens


@pytest.fixture(scope="module", params=[QWEN, R1], ids=["qwen", "r1"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    yield from serving(ServeSettings(MODEL), engine(request.param, MARKS))


def message(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]["message"]
    return found


# --- Where the form begins


@pytest.mark.parametrize("special", [[], MARKS], ids=["text", "special tokens"])
@pytest.mark.parametrize(
    ("template", "good", "bad"),
    [
        (
            QWEN,
            ["<think>\nno { form</think>\n\n{}", "<think></think>{}", "{}", "\n\n<think>a</think>{}"],
            ["<think>{}", "a</think>{}", "\n{}", "\n\n\n<think></think>{}"],
        ),
        (R1, ["no { form</think>\n\n{}", "</think>{}"], ["{}", "a</think>\n\n\n{}"]),
        (HERMES, ["{}"], ["<think></think>{}"]),
    ],
    ids=["qwen", "r1", "none"],
)
def test_the_form_begins_after_the_thinking(template: str, good: list[str], bad: list[str], special: list[str]) -> None:
    own = engine(template, special)
    prompt = own.encode([{"role": "user", "content": "hi"}])
    schema = {"type": "object", "additionalProperties": False}
    form = JsonSchemaFormat.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    grammar = format_grammar(form, Thinking.of(own.tokenizer, prompt))
    assert grammar is not None
    for text, is_right in [*((text, True) for text in good), *((text, False) for text in bad)]:
        state = own._grammars.start(grammar, 0, {2})
        output = own.tokenizer.encode(text, add_special_tokens=False)
        allowed = state.allowed(output, 128)
        assert (allowed is not None and bool(allowed[2])) == is_right, text


@pytest.mark.parametrize(
    ("template", "variables", "thinks"),
    [
        (QWEN, {}, True),
        (QWEN, {"enable_thinking": True}, True),
        (QWEN, {"enable_thinking": False}, False),
        (R1, {}, True),
        (HERMES, {}, False),
    ],
)
def test_whether_a_model_thinks_is_read_off_template_and_prompt(
    template: str, variables: dict[str, Any], thinks: bool
) -> None:
    own = engine(template)
    text = own.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say </think>"}], add_generation_prompt=True, tokenize=False, **variables
    )
    found = Thinking.of(own.tokenizer, own.tokenizer.encode(text, add_special_tokens=False))
    assert (found is not None) == thinks
    assert found is None or found.is_open == (template == R1)


# --- In the server


def test_the_content_is_of_the_format_whatever_was_thought(served: Served) -> None:
    body = {"response_format": FORMAT, **SHORTLY}
    answer = chat(served, **body)
    found = message(answer)
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(found["content"]))
    assert found["reasoning_content"]
    assert "think>" not in found["reasoning_content"]
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a fox"}], stream=True, **body
    )
    deltas = [each.choices[0].delta for each in stream]
    assert "".join(each.content or "" for each in deltas) == found["content"]
    thought = "".join(getattr(each, "reasoning_content", None) or "" for each in deltas)
    assert thought == found["reasoning_content"]


def test_drafts_change_neither_thinking_nor_content(served: Served) -> None:
    body = {"response_format": FORMAT, "temperature": 0, "max_tokens": 200, "logit_bias": {3: 100, 4: 5}}
    assert message(chat(served, **body)) == message(chat(served, **body, knn_ssd={"plain": True}))


def test_a_call_that_is_demanded_may_follow_thinking(served: Served) -> None:
    body = {"tools": [PAINT], "tool_choice": "required", "parallel_tool_calls": False, **SHORTLY}
    answers = [chat(served, **{**body, "seed": seed}) for seed in range(5, 10)]
    for answer in answers:
        found = message(answer)
        assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
        assert found["content"] is None
        (call,) = found["tool_calls"]
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(call["function"]["arguments"]))
    assert any("reasoning_content" in message(answer) for answer in answers)
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "a fox"}], **body) as stream:
        final = stream.get_final_completion().choices[0].message
    assert final.tool_calls is not None
    assert final.tool_calls[0].function.arguments == message(answers[0])["tool_calls"][0]["function"]["arguments"]


def test_thinking_that_is_cut_off_is_no_content(served: Served) -> None:
    biases = {3: 100, 4: -100}
    answer = chat(served, response_format=FORMAT, temperature=0, max_tokens=9, logit_bias=biases)
    found = message(answer)
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert (found["content"], bool(found["reasoning_content"])) == ("", True)


def test_thinking_that_is_switched_off_is_not_allowed(served: Served) -> None:
    if "enable_thinking" not in str(served.engine.tokenizer.chat_template):
        pytest.skip("this template cannot switch it off")
    body = {"response_format": FORMAT, **SHORTLY, "chat_template_kwargs": {"enable_thinking": False}}
    found = message(chat(served, **body))
    assert "reasoning_content" not in found
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(found["content"]))


def test_free_text_is_not_divided(served: Served) -> None:
    found = message(chat(served, temperature=0, max_tokens=20))
    assert "reasoning_content" not in found
    assert found["content"]


# --- Division


def as_chunk(piece: str, tokens: tuple[int, ...] = (40,)) -> Chunk:
    return Chunk((piece, *[""] * (len(tokens) - 1)), Round(tokens), (0,) * len(tokens))


@pytest.mark.parametrize(
    ("is_open", "text", "reasoning", "content"),
    [
        (False, "<think>\na < b</think>\n\n{}", "\na < b", "{}"),
        (False, "\n<think>a</think>{}", "a", "{}"),
        (False, "<thin {}", "", "<thin {}"),
        (False, "{}", "", "{}"),
        (False, "<think>a</thin", "a</thin", ""),
        (False, "<thi", "", "<thi"),
        (True, "a</think>\n\n{} </think>", "a", "{} </think>"),
        (True, "a<think>b</think>{}", "a<think>b", "{}"),
        (True, "", "", ""),
    ],
)
def test_a_reply_is_divided_whole_and_in_pieces(is_open: bool, text: str, reasoning: str, content: str) -> None:
    thinking = Thinking(is_open, "", "", {})
    for pieces in ([text], list(text)):
        reply = ReplyText(thinking)
        parts = [*(reply.push(as_chunk(piece)) for piece in pieces), reply.finish()]
        assert (reply.reasoning, reply.content) == (reasoning, content)
        assert "".join(part.reasoning for part in parts) == reasoning
        assert "".join(part.content for part in parts) == content


def test_marks_that_are_special_tokens_are_found_by_their_ids() -> None:
    own = with_special_tokens(tiny_tokenizer(), [*MARKS, "[TOOL_CALLS]", "[ARGS]"])
    form = ToolFormat.of(TEMPLATES["mistral, names"])
    thinking = Thinking(False, "<[3]>", "<[4]>", {3: "<think>", 4: "</think>"})
    tools = ToolReply(form, {"paint": SCHEMA}, True)
    reply = ReplyText(thinking, tools, {**thinking.special, **form.special_tokens(own)})
    for piece, token in (("", 3), ("hm", 40), ("", 4), ("", 5), ("paint", 40), ("", 6), ('{"size": 3}', 40)):
        reply.push(as_chunk(piece, (token,)))
    reply.finish()
    assert (reply.reasoning, reply.content) == ("hm", "")
    assert [(call.name, call.arguments) for call in tools.calls] == [("paint", '{"size": 3}')]


def test_an_id_between_name_and_arguments_is_found_by_its_special_token() -> None:
    own = with_special_tokens(tiny_tokenizer(), ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"])  # 3, 4 and 5
    form = ToolFormat.of(TEMPLATES["mistral, names"])
    tools = ToolReply(form, {"paint": SCHEMA}, False)
    reply = ReplyText(None, tools, form.special_tokens(own))
    for piece, token in (("", 3), ("paint", 40), ("", 4), ("abc123XYZ", 41), ("", 5), ('{"size": 3}', 40)):
        reply.push(as_chunk(piece, (token,)))
    reply.finish()
    assert reply.content == ""
    assert [(call.name, call.arguments) for call in tools.calls] == [("paint", '{"size": 3}')]


@pytest.mark.parametrize("stop", ["}\n", "}}", "€"])
@pytest.mark.parametrize("per_round", [1, 2, 100])
def test_a_mark_follows_text_that_is_held_back(stop: str, per_round: int) -> None:
    own = with_special_tokens(tiny_tokenizer(), ["[TOOL_CALLS]", "[ARGS]"])
    form = ToolFormat.of(TEMPLATES["mistral, names"])
    tools = ToolReply(form, {"paint": SCHEMA}, False)
    reply = ReplyText(None, tools, form.special_tokens(own))
    detokenizer = Detokenizer(own, [stop])
    spelled = [own.encode(text, add_special_tokens=False) for text in ("paint", '{"size": 3}')]
    tokens = [3, *spelled[0], 4, *spelled[1]] * 2
    pieces, held = [], []
    for token in tokens:
        detokenizer.push(token)
        pieces.append(detokenizer.take())
        held.append(detokenizer.held)
    pieces[-1], held[-1] = pieces[-1] + detokenizer.finish(), 0
    for place in range(0, len(tokens), per_round):
        part = slice(place, place + per_round)
        reply.push(Chunk(tuple(pieces[part]), Round(tuple(tokens[part])), tuple(held[part])))
    reply.finish()
    assert [(call.name, call.arguments) for call in tools.calls] == [("paint", '{"size": 3}')] * 2


# --- Calls that are not demanded


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "count"),
    [
        (f"<think>I must use <tool_call> here.</think>\n{HERMES_CALL}", "I must use <tool_call> here.", "", 1),
        (f"<think>Maybe {HERMES_CALL}? No.</think>Hello!", f"Maybe {HERMES_CALL}? No.", "Hello!", 0),
        (f"\n<think>hm</think>\n\nYes. {HERMES_CALL}", "hm", "Yes.", 1),
        (HERMES_CALL, "", "", 1),
        ("Hello!", "", "Hello!", 0),
    ],
)
@pytest.mark.parametrize("special", [[], MARKS], ids=["text", "special tokens"])
@pytest.mark.parametrize("is_strict", [True, False])
def test_calls_are_looked_for_after_the_thinking(
    text: str, reasoning: str, content: str, count: int, special: list[str], is_strict: bool
) -> None:
    own = engine(QWEN, special)
    prompt = own.encode([{"role": "user", "content": "hi"}])
    function = {**PAINT["function"], "strict": is_strict}  # type: ignore[dict-item]
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    request = ChatRequest.model_validate({**body, "tools": [{"type": "function", "function": function}]})
    assert request.has_form
    thinking = Thinking.of(own.tokenizer, prompt)
    assert thinking is not None
    use = ToolUse(request.tools, request.tool_choice, True, own.tokenizer)
    tokens = own.tokenizer.encode(text, add_special_tokens=False)
    grammar = use.grammar(thinking)
    assert (grammar is not None) == is_strict
    if grammar is not None:
        allowed = own._grammars.start(grammar, 0, {2}).allowed(tokens, 128)
        assert allowed is not None
        assert allowed[2]
    for pieces in ([text], list(text)):
        tools = use.reply()
        reply = ReplyText(thinking, tools)
        parts = [*(reply.push(as_chunk(piece)) for piece in pieces), reply.finish()]
        assert (reply.reasoning, reply.content, len(tools.calls)) == (reasoning, content, count)
        assert "".join(part.content for part in parts) == content


def test_the_thinking_before_a_call_that_may_come_is_kept_apart(served: Served) -> None:
    function = {**PAINT["function"], "strict": True}  # type: ignore[dict-item]  # whose grammar has one <think> at most
    tools = [{"type": "function", "function": function}]
    answers = [message(chat(served, tools=tools, **{**SHORTLY, "seed": seed})) for seed in range(5, 10)]
    assert any("reasoning_content" in found for found in answers)
    for found in answers:
        assert "think>" not in (found["content"] or "") + found.get("reasoning_content", "")
