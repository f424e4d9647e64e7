"""Response formats and tools in the server: enforced by grammars, parsed by the model family's format."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer
from openai import OpenAI
from server import MODEL, Served, serving
from test_server_requests import chat, complete
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from knn_ssd.engine import Engine
from knn_ssd.errors import UsageError
from knn_ssd.grammar import Grammar
from knn_ssd.server.app import ServeSettings
from knn_ssd.server.messages import with_arguments_for
from knn_ssd.server.parameters import read_value, value_rules
from knn_ssd.server.reply_text import ReplyText
from knn_ssd.server.structured import FieldError, FunctionDefinition, Tool
from knn_ssd.server.terms import quoted
from knn_ssd.server.thinking import formed
from knn_ssd.server.tool_calls import ToolReply, ToolUse
from knn_ssd.server.tool_formats import ToolFormat
from knn_ssd.testing import tiny_model, tiny_tokenizer

PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITH_TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}" + PLAIN
HERMES = WITH_TOOLS + "{# <tool_call> #}"
LLAMA = WITH_TOOLS + '{# {"name": function name, "parameters": dictionary of arguments} #}'
TEMPLATES = {
    "hermes": HERMES,
    "qwen coder": HERMES + "{# <function=example><parameter=x> #}",
    "seed": WITH_TOOLS + "{# <seed:tool_call><function=example><parameter=x> #}",
    "glm": HERMES + "{# <arg_key> #}",
    "llama": LLAMA,
    "mistral": WITH_TOOLS + "{# [TOOL_CALLS] #}",
    "mistral, names": WITH_TOOLS + "{# [TOOL_CALLS] [ARGS] #}",
    "granite": WITH_TOOLS + "{# <|tool_call|> #}",
    "deepseek": WITH_TOOLS + "{# <｜tool▁sep｜> ```json #}",
    "deepseek 3.1": WITH_TOOLS + "{# <｜tool▁sep｜> #}",
    "no mark": WITH_TOOLS,
    "no tools": PLAIN,
}
DEEPSEEK = [
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
]
SPECIAL = {  # the marks that are special tokens; those of Hermes, Qwen and Seed are plain text
    "mistral": ["[TOOL_CALLS]"],
    "mistral, names": ["[TOOL_CALLS]", "[ARGS]"],
    "granite": ["<|tool_call|>"],
    "deepseek": DEEPSEEK,
    "deepseek 3.1": DEEPSEEK,
}

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "size"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
PAINT = {"type": "function", "function": {"name": "paint", "description": "Paints.", "parameters": SCHEMA}}
STOP = {"type": "function", "function": {"name": "stop"}}
NAMED = {"type": "function", "function": {"name": "paint"}}


def with_special_tokens(tokenizer: PreTrainedTokenizerFast, special: Sequence[str]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with more special tokens, whose ids are 3 and so on."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["model"]["vocab"] |= {text: 3 + place for place, text in enumerate(special)}
    ends = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(settings)), **ends)
    own.add_special_tokens({"additional_special_tokens": list(special)})
    return own


def engine(template: str, special: Sequence[str] = ()) -> Engine:
    tokenizer = with_special_tokens(tiny_tokenizer(chat=True), special)
    tokenizer.chat_template = template
    return Engine(tiny_model(max_position_embeddings=1024, initializer_range=0.4), tokenizer)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    yield from serving(ServeSettings(MODEL), engine(HERMES))


def message(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["choices"][0]["message"]
    return found


# --- Response formats


def test_an_answer_is_valid_by_its_schema_alone_in_company_and_streamed(served: Served) -> None:
    body = {"response_format": FORMAT, "temperature": 0, "max_tokens": 80}
    answer = chat(served, **body)
    text = message(answer)["content"]
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(text))
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert answer.json()["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 10
    assert message(chat(served, **body, knn_ssd={"plain": True}))["content"] == text
    several = chat(served, **body, n=4).json()["choices"]
    assert [each["message"]["content"] for each in several] == [text] * 4
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "a fox"}], stream=True, **body
    )
    assert "".join(each.choices[0].delta.content or "" for each in stream) == text


def test_seeded_answers_are_the_same_alone_and_in_company(served: Served) -> None:
    body = {"response_format": FORMAT, "temperature": 1.2, "max_tokens": 80, "presence_penalty": 0.5}
    together = chat(served, **body, seed=7, n=3).json()["choices"]
    for place, choice in enumerate(together):
        alone = message(chat(served, **body, seed=7 + place))["content"]
        assert choice["message"]["content"] == alone
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(alone))


def test_any_object_and_an_answer_that_is_cut_off(served: Served) -> None:
    answer = chat(served, response_format={"type": "json_object"}, temperature=0, max_tokens=5)
    assert message(answer)["content"].startswith("{")
    assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("form", "param", "words"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}, "schema", 'keys: ["not"]'),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "word"}}}, "schema", "word"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["y" * 120_000]}}},
            "schema",
            "100000",
        ),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema", "required"),
        ({"type": "json_schema"}, "json_schema", "required"),
        ({"type": "yaml"}, "", "'json_schema'"),
    ],
)
def test_a_format_that_cannot_be_used_is_refused_by_the_fields_name(
    served: Served, form: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        refused = chat(served, response_format=form, stream=stream)
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["param"].startswith("response_format")
        assert error["param"].endswith(param)
        assert words in error["message"]


def test_options_that_contradict_a_format_are_refused(served: Served) -> None:
    for options, words in (
        ({"ignore_eos": True}, "ignore_eos cannot be used with structured output"),
        ({"min_tokens": 3}, "min_tokens cannot be used with structured output"),
        ({"tools": [PAINT]}, "response_format cannot be used with tools"),
    ):
        refused = chat(served, response_format=FORMAT, **options)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
    assert message(chat(served, response_format=FORMAT, tools=[PAINT], tool_choice="none"))["content"]
    for name, value in (("response_format", FORMAT), ("tools", [PAINT]), ("tool_choice", "required")):
        refused = complete(served, **{name: value})
        assert refused.json()["error"]["message"] == f"'{name}' is not supported"


# --- Tools


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_call_that_is_demanded_comes_whole_and_streamed(served: Served, choice: Any) -> None:
    tools = [PAINT] if choice == "required" else [STOP, PAINT]
    body = {"tools": tools, "tool_choice": choice, "temperature": 0, "max_tokens": 200, "parallel_tool_calls": False}
    answer = chat(served, **body)
    found = message(answer)
    assert answer.json()["choices"][0]["finish_reason"] == "tool_calls"
    assert found["content"] is None
    (call,) = found["tool_calls"]
    assert (call["type"], call["function"]["name"], call["id"][:5]) == ("function", "paint", "call_")
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(call["function"]["arguments"]))
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    with client.chat.completions.stream(model=MODEL, messages=[{"role": "user", "content": "a fox"}], **body) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert not final.message.content
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.arguments == call["function"]["arguments"]


def test_a_demanded_call_that_is_cut_off_is_text(served: Served) -> None:
    answer = chat(served, tools=[PAINT], tool_choice="required", temperature=0, max_tokens=20)
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    assert message(answer)["content"].startswith("<tool_call>")
    assert "tool_calls" not in message(answer)


def test_tools_that_may_be_called_change_the_prompt_and_those_that_may_not_do_not(served: Served) -> None:
    tokens = [
        chat(served, tools=[PAINT], **choice).json()["usage"]["prompt_tokens"]
        for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"})
    ]
    without = chat(served).json()["usage"]["prompt_tokens"]
    assert tokens[0] == tokens[1] > without == tokens[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": [PAINT], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f', which is not in"),
        ({"tools": [PAINT, PAINT]}, "'paint' twice"),
        ({"tools": [{"type": "function"}]}, "required"),
        (
            {
                "tools": [PAINT, {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            'tools.1.function.parameters: the JSON schema cannot be used: Unimplemented keys: ["not"]',
        ),
    ],
)
def test_tools_that_cannot_be_used_are_refused(served: Served, options: dict[str, Any], words: str) -> None:
    refused = chat(served, **options)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_what_the_grammar_of_each_family_gives_is_parsed_as_calls(
    family: str, choice: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToolFormat, "_free_text", lambda _: "/[a-z ]{0,3}/")  # after which there is a call, or the end
    own = engine(TEMPLATES[family], SPECIAL.get(family, ()))
    strict = {"type": "function", "function": {**PAINT["function"], "strict": True}}  # type: ignore[dict-item]
    stop = {"type": "function", "function": {"name": "stop", "strict": True}}
    use = ToolUse([Tool.model_validate(each) for each in (strict, stop)], choice, choice == "required", own.tokenizer)
    biases = {}
    if choice == "auto":  # a call rather than text
        biases = {"logit_bias": dict.fromkeys(own.tokenizer.encode(use.format.mark or "{")[:1], 60)}
    num_calls = 0
    for seed in range(3):
        options = {"temperature": 1.0, "seed": seed, "max_new_tokens": 400, **biases}
        stream = own.stream("a fox", grammar=use.grammar(None), **options)
        reply = ReplyText(None, use.reply(), use.special_tokens)
        streamed = "".join([*(reply.push(chunk).content for chunk in stream), reply.finish().content])
        output = stream.result
        assert reply.tools is not None
        if choice == "required" and output.finish_reason == "eos":
            assert reply.tools.calls
            assert streamed == ""
        for call in reply.tools.calls:
            schema = SCHEMA if call.name == "paint" else {"type": "object"}
            assert jsonschema_rs.is_valid(schema, json.loads(call.arguments))
        num_calls += len(reply.tools.calls)
    assert num_calls


CALL = '{"name": "paint", "arguments": {"colour": "red", "size": 3}}'
LLAMA_CALL = CALL.replace("arguments", "parameters")
ARGUMENTS = '{"colour": "red", "size": 3}'
CODER_CALL = (
    "<tool_call>\n<function=paint>\n<parameter=colour>\nred\n</parameter>\n<parameter=size>\n3\n</parameter>\n"
    "</function>\n</tool_call>"
)
SEED_CALL = (
    "<seed:tool_call>\n<function=paint>\n<parameter=colour>red</parameter>\n<parameter=size>3</parameter>\n"
    "</function>\n</seed:tool_call>"
)
GLM_CALL = (
    "<tool_call>paint\n<arg_key>colour</arg_key>\n<arg_value>red</arg_value>\n"
    "<arg_key>size</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>paint\n"
    f"```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>"
)
DEEPSEEK_31_CALL = f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>paint<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
REPLIES: list[tuple[str, str, Any, int]] = [  # family, reply, its text (... is all of it), its calls
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
    ("hermes", f"Sure.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "Sure.", 2),
    ("hermes", f"<tool_call>{CALL}", "", 1),
    ("hermes", CALL, "", 1),
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call> and </tool_call>\n", "", 1),
    ("hermes", "a < b and <tool", "a < b and <tool", 0),
    ("hermes", "<tool_call>\n{not json}\n</tool_call>", "<tool_call>\n{not json}\n</tool_call>", 0),
    ("hermes", CALL.replace("paint", "burn"), CALL.replace("paint", "burn"), 0),
    ("hermes", CALL.replace(ARGUMENTS, json.dumps(ARGUMENTS)), "", 1),
    ("hermes", CALL.replace("3", "1e999"), CALL.replace("3", "1e999"), 0),
    ("hermes", f"<tool_call>{CALL}</tool_call><tool_call>{{</tool_call>", ..., 0),
    ("no mark", '{"name": "paint", "colour": "blue"}', '{"name": "paint", "colour": "blue"}', 0),
    ("no mark", CALL.replace(ARGUMENTS, '"red"'), CALL.replace(ARGUMENTS, '"red"'), 0),
    ("mistral", f"[{CALL}, {CALL}]", "", 2),
    ("mistral", f"[TOOL_CALLS] [{CALL}]", "", 1),
    ("mistral, names", f"Sure.[TOOL_CALLS]paint[ARGS]{ARGUMENTS}[TOOL_CALLS]paint[ARGS]{ARGUMENTS}", "Sure.", 2),
    ("mistral, names", f"[TOOL_CALLS]paint{ARGUMENTS}", "", 1),
    ("mistral, names", f"[TOOL_CALLS] paint [CALL_ID]abc123XYZ[ARGS] {ARGUMENTS}", "", 1),
    ("mistral, names", "[TOOL_CALLS]paint[ARGS]{", "[TOOL_CALLS]paint[ARGS]{", 0),
    ("mistral, names", f"[TOOL_CALLS]burn[ARGS]{ARGUMENTS}", f"[TOOL_CALLS]burn[ARGS]{ARGUMENTS}", 0),
    ("granite", f"<|tool_call|>[{CALL}, {CALL}]", "", 2),
    ("granite", f"<|tool_call|> [{CALL}]", "", 1),
    ("qwen coder", CODER_CALL, "", 1),
    ("qwen coder", f"I paint.\n\n{CODER_CALL}\n{CODER_CALL}", "I paint.", 2),
    ("qwen coder", CODER_CALL.replace("\n", ""), "", 1),
    ("qwen coder", CODER_CALL.replace("paint", "burn"), CODER_CALL.replace("paint", "burn"), 0),
    ("qwen coder", CODER_CALL[:60], CODER_CALL[:60], 0),
    ("qwen coder", CODER_CALL.replace("red\n</parameter>", "red"), ..., 0),
    ("qwen coder", CODER_CALL.replace("3\n</parameter>\n", "3\n") + CODER_CALL, ..., 0),
    ("glm", GLM_CALL.replace("red</arg_value>", "red"), ..., 0),
    ("qwen coder", CALL, "", 1),
    ("seed", SEED_CALL, "", 1),
    ("glm", f"{GLM_CALL}\n{GLM_CALL}", "", 2),
    ("glm", GLM_CALL[:90], GLM_CALL[:90], 0),
    ("deepseek", f"Yes. {DEEPSEEK_CALL}<｜tool▁calls▁end｜>", "Yes.", 1),
    ("deepseek", DEEPSEEK_CALL + "\n" + DEEPSEEK_CALL.partition("<｜tool▁calls▁begin｜>")[2], "", 2),
    ("deepseek 3.1", DEEPSEEK_31_CALL, "", 1),
    ("llama", LLAMA_CALL, "", 1),
    ("llama", f"<|python_tag|>{LLAMA_CALL}; {LLAMA_CALL}", "", 2),
    ("no mark", CALL, "", 1),
    ("no tools", f"  {CALL}\n", "", 1),
    ("no tools", '{"answer": 3}', '{"answer": 3}', 0),
    ("no tools", "Red it is.", "Red it is.", 0),
]


@pytest.mark.parametrize(("family", "text", "rest", "count"), REPLIES)
def test_calls_are_found_in_a_familys_format_whole_and_in_pieces(family: str, text: str, rest: Any, count: int) -> None:
    form = ToolFormat.of(TEMPLATES[family])
    whole, pieces = ToolReply(form, {"paint": SCHEMA}, False), ToolReply(form, {"paint": SCHEMA}, False)
    expected = text if rest is ... else rest
    assert whole.whole(text) == expected
    assert "".join([*map(pieces.push, text), pieces.finish()]) == expected
    assert len(whole.calls) == len(pieces.calls) == count
    for call in whole.calls:
        assert (call.name, json.loads(call.arguments)) == ("paint", {"colour": "red", "size": 3})
        assert not family.startswith("mistral") or len(call.id) == 9


def test_marks_within_arguments_are_part_of_them() -> None:
    form = ToolFormat.of(HERMES)
    arguments = json.dumps({"text": "</tool_call> <tool_call>"})
    reply = ToolReply(form, {"write": {}}, False)
    call = '{"name": "write", "arguments": ' + arguments + "}"
    assert reply.whole(f"<tool_call>\n{call}\n</tool_call>") == ""
    assert [each.arguments for each in reply.calls] == [arguments]


@pytest.mark.parametrize("empty", ["null", '""', "{}", '"{}"'])
def test_a_call_without_arguments_has_an_empty_object(empty: str) -> None:
    reply = ToolReply(ToolFormat.of(HERMES), {"stop": {}}, False)
    assert reply.whole('<tool_call>{"name": "stop", "arguments": ' + empty + "}</tool_call>") == ""
    assert [each.arguments for each in reply.calls] == ["{}"]


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("hermes", CALL.replace("red", "\\ud800é")),
        ("hermes", CALL.replace(ARGUMENTS, json.dumps(ARGUMENTS.replace("red", "\\ud800é")))),
        ("qwen coder", CODER_CALL.replace("red", "\ud800é")),
    ],
)
def test_half_a_character_in_arguments_is_an_escape(family: str, call: str) -> None:
    reply = ToolReply(ToolFormat.of(TEMPLATES[family]), {"paint": SCHEMA}, False)
    assert reply.whole(call) == ""
    (found,) = reply.calls
    assert json.loads(found.arguments.encode()) == {"colour": "\ud800é", "size": 3}
    assert "é" in found.arguments


def test_a_reply_of_one_call_has_its_first() -> None:
    call = Tool.model_validate(PAINT)
    for several in (True, False):
        reply = ToolUse([call], "auto", several, engine(HERMES).tokenizer).reply()
        assert reply.whole(WRITTEN["hermes"] * 3) == ""
        assert len(reply.calls) == (3 if several else 1)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["<tool_call>x", "1 ", "<tool_call>{}", "<tool_call>\n<function=paint>"])
@pytest.mark.parametrize("family", ["hermes", "qwen coder", "no mark"])
def test_a_reply_of_many_unreadable_calls_is_read_once(family: str, text: str) -> None:
    reply = ToolReply(ToolFormat.of(TEMPLATES[family]), {"paint": SCHEMA}, True)
    begin = time.process_time()
    assert reply.whole(text * 200_000) == text * 200_000
    assert time.process_time() - begin < 2  # a tenth of that; looked at from each mark, it takes minutes


@pytest.mark.parametrize(
    "template",
    [
        "{# tools #}{% for call in message.tool_calls %}{{ 'tools: ' + call }}{% endfor %} the tools",
        "{% if 'tools' in message and message['tools'] is not none %}{{ message.tools }}{% endif %}",
        "{{ tools_of(my_tools) }}{% generation %}{% endgeneration %}",
        "{{ 'no end",
    ],
)
def test_a_template_that_does_not_read_the_tools_cannot_describe_them(template: str) -> None:
    for marks in ("", "<tool_call>", "<｜tool▁sep｜>"):
        form = ToolFormat.of(template + marks)
        assert form.is_described
        assert form.mark == ""
    assert not ToolFormat.of("{%- if tools -%}" + template.replace("{{ 'no end", "")).is_described


def test_of_several_templates_the_one_for_tools_counts() -> None:
    own = tiny_tokenizer(chat=True)
    own.chat_template = {"default": PLAIN, "tool_use": HERMES}  # type: ignore[assignment]
    use = ToolUse([Tool.model_validate(PAINT)], "auto", True, own)
    assert use.format == ToolFormat.of(HERMES)
    assert not use.format.is_described


def test_a_template_without_tools_gets_calls_as_it_was_asked_for_them() -> None:
    function = {"name": "paint", "arguments": json.loads(ARGUMENTS)}
    said = {"role": "assistant", "content": "Well.", "tool_calls": [{"id": "x", "function": function}] * 2}
    *_, last = ToolFormat.of(PLAIN).messages([said], [Tool.model_validate(PAINT).plain()])
    assert last == {"role": "assistant", "content": f"Well.\n{CALL}\n{CALL}"}


DEEPSEEK_TEMPLATE = (
    "{% for m in messages %}{% if m['tool_calls'] %}{% for tool in m['tool_calls'] %}"
    "{{ '<｜tool▁sep｜>' + tool['function']['name'] + '\n```json\n' + tool['function']['arguments'] + '\n```' }}"
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "as_text"),
    [
        (DEEPSEEK_TEMPLATE, True),
        ("{{ '{' + call.arguments + '}' }}", True),
        ("{{ '<'~arguments~'>' }}", True),
        ("{{ '<' + call.arguments | tojson + '>' }}", False),
        ("{{ '<' + tool['function']['arguments']|tojson }}", False),
        ("{{ '\"arguments\": ' + call | tojson + '\"arguments\": ' }}", False),
        ("{% for name, value in call.arguments | items %}{% endfor %}", False),
    ],
)
def test_arguments_are_text_where_a_template_joins_them_to_text(template: str, as_text: bool) -> None:
    function = {"name": "paint", "arguments": {"colour": "grün"}}
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"function": function}]}]
    user, assistant = with_arguments_for(template, messages)
    assert user == messages[0]
    found = assistant["tool_calls"][0]["function"]["arguments"]
    assert found == ('{"colour": "grün"}' if as_text else {"colour": "grün"})


@pytest.mark.parametrize("offered", [True, False])
def test_a_conversation_with_calls_goes_on_where_the_template_joins_their_arguments(offered: bool) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "paint", "arguments": ARGUMENTS}}
    messages = [
        {"role": "user", "content": "a fox"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "x", "content": "done"},
    ]
    with contextlib.contextmanager(serving)(ServeSettings(MODEL), engine(DEEPSEEK_TEMPLATE)) as own:
        answer = chat(own, messages=messages, max_tokens=2, **({"tools": [PAINT]} if offered else {}))
        assert answer.status_code == 200, answer.text


def test_a_template_without_tools_gets_them_in_a_system_message() -> None:
    tools = [Tool.model_validate(PAINT).plain()]
    form = ToolFormat.of(PLAIN)
    first, second = form.messages([{"role": "user", "content": "hi"}], tools)
    assert (first["role"], second["content"]) == ("system", "hi")
    assert '"name": "paint"' in first["content"]
    merged = form.messages([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}], tools)
    assert [each["role"] for each in merged] == ["system", "user"]
    assert merged[0]["content"].startswith("Be kind.\n\nYou may call")
    assert ToolFormat.of(HERMES).messages([{"role": "user", "content": "hi"}], tools) == [
        {"role": "user", "content": "hi"}
    ]


WRITTEN = {
    "hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "qwen coder": CODER_CALL,
    "seed": SEED_CALL,
    "glm": GLM_CALL,
    "llama": LLAMA_CALL,
    "mistral": f"[TOOL_CALLS][{CALL}]",
    "mistral, names": f"[TOOL_CALLS]paint[ARGS]{ARGUMENTS}",
    "granite": f"<|tool_call|>[{CALL}]",
    "deepseek": f"{DEEPSEEK_CALL}<｜tool▁calls▁end｜>",
    "deepseek 3.1": f"{DEEPSEEK_31_CALL}<｜tool▁calls▁end｜>",
    "no mark": CALL,
    "no tools": CALL,
}


def accepts(grammar: Grammar, text: str) -> bool:
    """Whether a grammar accepts a text, byte by byte."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar.source, log_level=0)
    data = list(text.encode())
    return (not data or matcher.try_consume_tokens(data) == len(data)) and matcher.is_accepting()


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_family_s_own_writing_is_what_the_grammar_demands_and_what_is_read(family: str) -> None:
    form, text, functions = ToolFormat.of(TEMPLATES[family]), WRITTEN[family], {0: Tool.model_validate(PAINT).function}
    demanded = formed(form.rules(functions, quoted, several=False, or_text=False), None)
    assert accepts(demanded, text)
    for wrong in ("", "x" + text, text[:-1], text + text, text.replace("red", "blue"), text.replace("size", "sizes")):
        assert not accepts(demanded, wrong)
    free = formed(form.rules(functions, quoted, several=True, or_text=True), None)
    assert accepts(free, text)
    assert accepts(free, "Hello.")
    assert accepts(free, "")
    assert not accepts(free, text.replace("red", "blue"))
    assert not form.mark or accepts(free, f"Sure.\n{text}")
    reply = ToolReply(form, {"paint": SCHEMA}, True)
    assert reply.whole(text) == ""
    assert [json.loads(call.arguments) for call in reply.calls] == [{"colour": "red", "size": 3}]


@pytest.mark.parametrize("family", TEMPLATES)
def test_text_beside_a_strict_tool_cannot_be_read_as_its_call(family: str) -> None:
    form, own = ToolFormat.of(TEMPLATES[family]), engine(TEMPLATES[family])
    strict = Tool.model_validate({**PAINT, "function": {**PAINT["function"], "strict": True}})  # type: ignore[dict-item]
    free = formed(form.rules({0: strict.function}, quoted, several=True, or_text=True), None)
    wrong = WRITTEN[family].replace("red", "blue")
    bare = CALL.replace("red", "blue")
    several = [f"{begin}{bare}" for begin in ("", " ", "\x1c", "\u2003", "<|python_tag|>", "<|python_tag|> ")]
    for text in (wrong, f"Sure. {wrong}", WRITTEN[family] + wrong, *several, f"[{bare}]", f"{bare}; {bare}"):
        reply = ToolUse([strict], "auto", True, own.tokenizer).reply()
        reply.whole(text)
        good = [call for call in reply.calls if jsonschema_rs.is_valid(SCHEMA, json.loads(call.arguments))]
        assert not accepts(free, text) or len(good) == len(reply.calls)
    loose = ToolUse([Tool.model_validate(PAINT)], "auto", True, own.tokenizer).reply()
    assert loose.whole(bare) == ""
    assert loose.calls


def test_a_mark_that_is_spelled_by_other_tokens_is_no_text_beside_a_strict_tool() -> None:
    own = engine(TEMPLATES["mistral, names"], SPECIAL["mistral, names"])
    strict = {"type": "function", "function": {**PAINT["function"], "strict": True}}  # type: ignore[dict-item]
    grammar = ToolUse([Tool.model_validate(strict)], "auto", True, own.tokenizer).grammar(None)
    assert grammar is not None
    for text, is_right in (("[TOOL_CALL", True), ("[TOOL_CALLS]", False)):
        state = own._grammars.start(grammar, 0, {2})
        spelled = [token for character in text for token in own.tokenizer.encode(character, add_special_tokens=False)]
        allowed = state.allowed(spelled, 128)
        assert (allowed is not None and bool(allowed[2])) == is_right


# --- Arguments that are written one by one


@pytest.mark.timeout(20)
@pytest.mark.parametrize("breadth", [2, 30, 3000])
@pytest.mark.parametrize("shape", ["itself", "a ring"])
def test_a_schema_that_refers_to_itself_is_read_in_no_time(breadth: int, shape: str) -> None:
    names = ["A"] if shape == "itself" else [f"A{place}" for place in range(12)]
    after = dict(zip(names, [*names[1:], names[0]], strict=True))
    definitions = {name: {"anyOf": [{"$ref": f"#/$defs/{after[name]}"}] * breadth} for name in names}
    definitions[names[-1]]["anyOf"].append({"type": "integer"})
    value = {"$ref": f"#/$defs/{names[0]}"}
    begin = time.process_time()
    expected = 5 if shape == "itself" and breadth < 3000 else "5"  # with too many alternatives it is text
    assert read_value("5", value, {"$defs": definitions}) == expected
    parameters = {"type": "object", "properties": {"x": value}, "$defs": definitions}
    with contextlib.suppress(FieldError):  # too many alternatives, or too long a schema
        ToolFormat.of(TEMPLATES["qwen coder"]).rules(
            {0: FunctionDefinition(name="f", parameters=parameters)}, quoted, several=False, or_text=False
        )
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "text", ["</parameter>", "</parameter>\n<parameter=size>\n3\n</parameter>", "<parameter=size>\n"]
)
def test_marks_within_json_are_part_of_it(text: str) -> None:
    parameters = {"type": "object", "properties": {"box": {"type": "object"}, "size": {"type": "integer"}}}
    form, function = ToolFormat.of(TEMPLATES["qwen coder"]), FunctionDefinition(name="f", parameters=parameters)
    arguments = {"box": {"x": text}, "size": 5}
    call = (
        f"<tool_call>\n<function=f>\n<parameter=box>\n{json.dumps(arguments['box'])}\n</parameter>\n"
        "<parameter=size>\n5\n</parameter>\n</function>\n</tool_call>"
    )
    assert accepts(formed(form.rules({0: function}, quoted, several=False, or_text=False), None), call)
    reply = ToolReply(form, {"f": parameters}, True)
    assert reply.whole(call) == ""
    assert [json.loads(each.arguments) for each in reply.calls] == [arguments]


def test_too_many_alternatives_are_refused() -> None:
    many = {"anyOf": [{"type": "string", "pattern": f"x{n}"} for n in range(200)]}
    with pytest.raises(UsageError, match="100 alternatives"):
        value_rules("value", many, {}, "</parameter>")
    assert read_value("x5", many, {}) == "x5"


@pytest.mark.parametrize("reference", ["#", "#/properties/a", "#b"])
def test_a_reference_to_other_than_a_definition_is_refused(reference: str) -> None:
    properties = {"a": {"type": "integer"}, "b": {"$anchor": "b", "type": "array", "items": {"$ref": reference}}}
    function = FunctionDefinition(name="f", parameters={"type": "object", "properties": properties})
    with pytest.raises(FieldError, match="the reference '#"):
        ToolFormat.of(TEMPLATES["qwen coder"]).rules({0: function}, quoted, several=False, or_text=False)


def test_arguments_are_written_in_the_schema_s_order() -> None:
    parameters = {
        "type": "object",
        "properties": {"colour": {"enum": ["red"]}, "size": {"type": "integer"}},
        "required": ["size", "other"],
    }
    function = FunctionDefinition(name="paint", parameters=parameters)
    rules = ToolFormat.of(TEMPLATES["qwen coder"]).rules({0: function}, quoted, several=False, or_text=False)
    other = "<parameter=other>\nx\n</parameter>\n</function>"
    assert accepts(formed(rules, None), CODER_CALL.replace("</function>", other))
    assert not accepts(formed(rules, None), CODER_CALL)
    reversed_order = CODER_CALL.replace("colour", "x").replace("size", "colour").replace("x", "size")
    assert not accepts(formed(rules, None), reversed_order.replace("red", "5").replace("3", "red"))


DEFINED = {"$defs": {"X": {"enum": ["a", "b"]}}}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, {"": "", "a\nb": "a\nb", "</p": "</p", "3": "3", "\n": "\n"}, ["</parameter>"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, {"ab": "ab", "abc": "abc"}, ["a", "abcd"]),
        ({"type": "string", "pattern": "^a/b$"}, {"a/b": "a/b"}, ["xa/b", "a/bx"]),
        ({"type": "string", "pattern": "x|y"}, {"axa": "axa"}, ["aaa"]),
        ({"enum": ["red", 1, None, True]}, {"red": "red", "1": 1, "null": None, "true": True}, ["2", "blue"]),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "null"}]}, {"a": "a", "null": None}, ["abc"]),
        ({"type": ["integer", "null"]}, {"1": 1, "null": None}, ["one"]),
        ({"type": "boolean"}, {"true": True}, ["True"]),
        ({"$ref": "#/$defs/X"}, {"a": "a"}, ["c"]),
        ({"allOf": [{"$ref": "#/$defs/X"}], "description": "x"}, {"a": "a"}, ["c"]),
        ({"type": "array", "items": {"$ref": "#/$defs/X"}}, {'["a"]': ["a"]}, ['["c"]', "a"]),
        ({"type": "object"}, {'{"x": 1}': {"x": 1}}, ["x"]),
        ({"allOf": [{"type": "integer"}, {"minimum": 1}]}, {"5": 5}, ["0", "five"]),
        ({"allOf": [{"type": "string"}, {"maxLength": 2}]}, {"5": "5"}, ["555"]),
        ({"minimum": 1}, {"5": 5}, ["0"]),
        ({}, {"[1]": "[1]"}, []),
    ],
)
def test_a_value_without_quotes_is_valid_by_its_schema_and_read_as_it_was_meant(
    schema: dict[str, Any], good: dict[str, Any], bad: list[str]
) -> None:
    end = "\n</parameter>\n"
    grammar = formed(["form: value", *value_rules("value", schema, DEFINED, end)], None)
    for text, value in good.items():
        assert accepts(grammar, text + end)
        found = read_value(text, schema, DEFINED)
        assert (found, type(found)) == (value, type(value))
        assert jsonschema_rs.is_valid({**schema, **DEFINED}, value)
    for text in bad:
        assert not accepts(grammar, text + end)


def test_what_a_model_writes_beside_its_schema_is_read_as_far_as_it_can_be() -> None:
    assert read_value("True", {"type": "boolean"}, {}) is True
    assert read_value("None", {"type": ["string", "null"]}, {}) is None
    assert read_value("NaN", {"type": "number"}, {}) == "NaN"
    assert read_value("x", {"type": {}, "anyOf": 3, "$ref": 5}, {}) == "x"
    assert read_value("x", {"$ref": "#"}, {"$ref": "#"}) == "x"
    assert read_value("1e999", {"type": "number"}, {}) == "1e999"


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"properties": {"day": {"type": "string", "format": "date"}}}, "'format' cannot be enforced"),
        ({"type": "object", "minProperties": 1}, "'minProperties' cannot be enforced"),
        ({"properties": {"a>b": {"type": "string"}}}, "'a>b' cannot be written"),
        ({"properties": {"a": {"enum": ["b", "<b></parameter>"]}}}, "'<b></parameter>' cannot be written"),
        ({"properties": {"a": {"const": "<parameter=b>"}}}, "'<parameter=b>' cannot be written"),
    ],
)
def test_keywords_that_cannot_be_enforced_without_quotes_are_refused(parameters: dict[str, Any], word: str) -> None:
    function = FunctionDefinition(name="f", parameters=parameters)
    with pytest.raises(FieldError, match=word):
        ToolFormat.of(TEMPLATES["qwen coder"]).rules({0: function}, quoted, several=False, or_text=False)
    ToolFormat.of(HERMES).rules({0: function}, quoted, several=False, or_text=False)
