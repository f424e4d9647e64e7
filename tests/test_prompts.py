"""Prompt files: any text survives, a bad line is named by file and number, and the built-in sets are complete."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knn_ssd.errors import PromptError, UsageError
from knn_ssd.prompts import BUILTIN_DOMAINS, Prompt, builtin_prompts, parse_prompts, read_prompts


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(content: str) -> Path:
        path = tmp_path / "questions.jsonl"
        path.write_text(content, "utf-8")
        return path

    return write_file


def test_all_fields_are_read_and_others_passed_over(write: Callable[[str], Path]) -> None:
    line = {"prompt": "What is 2 + 2?", "domain": "math", "id": "one", "reference": "4", "source": "me"}
    assert read_prompts(write(json.dumps(line))) == [Prompt("What is 2 + 2?", "math", "one", "4")]


def test_a_prompt_is_all_that_a_line_needs(write: Callable[[str], Path]) -> None:
    path = write('{"prompt": "a"}\n\n   \n{"prompt": "b", "domain": null, "id": null}\n')
    assert read_prompts(path) == [Prompt("a", id="questions-1"), Prompt("b", id="questions-4")]


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("prompts") / "any.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), "utf-8", newline="")
    assert [prompt.prompt for prompt in read_prompts(path)] == texts


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_ends_where_json_lines_ends_it(write: Callable[[str], Path], separator: str) -> None:
    text = f"one{separator}two"
    [prompt] = read_prompts(write(json.dumps({"prompt": text}, ensure_ascii=False)))
    assert prompt.prompt == text


def test_a_byte_order_mark_is_passed_over(write: Callable[[str], Path]) -> None:
    assert [p.prompt for p in read_prompts(write('\ufeff{"prompt": "a"}\n'))] == ["a"]


def test_lines_may_end_as_on_windows(write: Callable[[str], Path]) -> None:
    assert [p.prompt for p in read_prompts(write('{"prompt": "a"}\r\n{"prompt": "b"}\r\n'))] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("not json", "is not JSON"),
        ('{"prompt": "cut', "is not JSON"),
        ('"just text"', "has no 'prompt' text"),
        ('{"domain": "math"}', "has no 'prompt' text"),
        ('{"prompt": 7}', "has no 'prompt' text"),
        ('{"prompt": "  "}', "has an empty prompt"),
        ('{"prompt": "a", "domain": 3}', "'domain' must be text, got 3"),
        ('{"prompt": "a", "reference": [7]}', r"'reference' must be text or a list of texts, got \[7\]"),
        ('{"prompt": "a", "id": [7]}', r"'id' must be text or a whole number, got \[7\]"),
        ('{"prompt": "a", "id": true}', "'id' must be text or a whole number, got True"),
        ('{"messages": []}', "has no message of a user in 'messages'"),
        ('{"messages": "hi"}', "has no message of a user in 'messages'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "has no message of a user"),
        ('{"messages": [{"role": "user"}]}', "a message needs the texts 'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a message needs the texts"),
        ('{"messages": [{"role": "user", "content": " "}]}', "has an empty prompt"),
        ('{"conversations": [{"from": "gpt", "value": "a"}]}', "has no message of a person in 'conversations'"),
        ('{"conversations": {}}', "has no message of a person"),
        ('{"turns": []}', "is not a question: its 'turns' are no texts"),
        ('{"turns": [7]}', "is not a question"),
        ('{"turns": [""]}', "has an empty prompt"),
        (
            '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}',
            "is a request of an OpenAI batch",
        ),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(write: Callable[[str], Path], line: str, fact: str) -> None:
    path = write(f'{{"prompt": "good"}}\n\n{line}\n')
    with pytest.raises(PromptError, match=rf"questions.jsonl, line 3:? {fact}"):
        read_prompts(path)


def test_a_file_without_prompts_is_refused(write: Callable[[str], Path]) -> None:
    with pytest.raises(PromptError, match=r"questions\.jsonl' has no prompts. Give one JSON object a line"):
        read_prompts(write("\n \n"))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.jsonl"
    path.write_bytes(b"\x89PNG\xff")
    with pytest.raises(PromptError, match=r"image\.jsonl' is not UTF-8 text"):
        read_prompts(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nowhere\.jsonl' cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.jsonl")
    with pytest.raises(PromptError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)


def test_lines_can_come_from_anywhere() -> None:
    assert parse_prompts(['{"prompt": "a"}'], "<stdin>") == [Prompt("a", id="<stdin>-1")]


# --- The formats of others


def test_conversations_are_read_up_to_the_last_question(write: Callable[[str], Path]) -> None:
    system, user, answer = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    parts = {"role": "user", "content": [{"type": "text", "text": "us"}, {"type": "text", "text": "er"}]}
    lines = [[user], [user, answer], [system, user, answer, user, answer], [parts], [system, parts]]
    found = read_prompts(write("\n".join(json.dumps({"messages": messages, "id": 5}) for messages in lines)))
    assert [each.prompt for each in found] == ["user", "user", [system, user, answer, user], "user", [system, user]]
    assert {each.id for each in found} == {"5"}
    assert found[2].texts == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize("as_array", [True, False])
def test_share_gpt_is_read_as_lines_and_as_the_one_array_it_comes_as(
    write: Callable[[str], Path], as_array: bool
) -> None:
    spoken = [("human", "one"), ("gpt", "1"), ("human", "two")]
    talk = [{"from": who, "value": text} for who, text in spoken]
    items = [{"id": "x_0", "conversations": talk}, {"conversations": [{"from": "system", "value": "short"}, *talk[1:]]}]
    path = write(json.dumps(items, indent=1) if as_array else "\n".join(map(json.dumps, items)))
    found = read_prompts(path)
    assert [each.id for each in found] == ["x_0", "questions-2"]
    assert found[0].prompt == "one"
    assert found[1].prompt == [{"role": "system", "content": "short"}, {"role": "user", "content": "two"}]


def test_questions_of_mt_bench_are_read(write: Callable[[str], Path]) -> None:
    line = {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": ["a", "b"]}
    assert read_prompts(write(json.dumps(line))) == [Prompt("one", "writing", "81", ("a", "b"))]


def test_a_damaged_array_is_refused(write: Callable[[str], Path]) -> None:
    with pytest.raises(PromptError, match=r"questions\.jsonl' is not a JSON array"):
        read_prompts(write('[{"prompt": "a"},'))
    with pytest.raises(PromptError, match=r"questions\.jsonl' is not a JSON array"):
        read_prompts(write("[" * 100_000))
    with pytest.raises(PromptError, match="has no prompts"):
        read_prompts(write("[]"))


FIELDS = (
    "prompt", "messages", "conversations", "turns", "id", "domain", "reference", "role", "content", "from", "value",
    "type", "text", "custom_id", "body", "category", "question_id",
)  # fmt: skip
WORDS = ("user", "assistant", "human", "gpt", "system", "text", "hi", "", " ")
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500)
@given(item=st.dictionaries(st.sampled_from(FIELDS), anything, min_size=1, max_size=4) | anything)
def test_whatever_a_line_has_is_a_prompt_or_a_prompt_error(item: Any) -> None:
    with suppress(PromptError):
        [prompt] = parse_prompts([json.dumps(item)], "any.jsonl")
        assert any(text.strip() for text in prompt.texts)
        assert prompt.id
        assert all(isinstance(text, str) for text in prompt.texts)


def test_a_pipe_is_read_once() -> None:
    reading, writing = os.pipe()
    os.write(writing, b'{"prompt": "a"}\n{"prompt": "b"}\n')
    os.close(writing)
    assert [each.prompt for each in read_prompts(f"/dev/fd/{reading}")] == ["a", "b"]
    os.close(reading)


# --- The built-in sets


@pytest.mark.parametrize("domain", BUILTIN_DOMAINS)
def test_a_built_in_set_has_enough_prompts_of_varied_length(domain: str) -> None:
    prompts = builtin_prompts([domain])
    assert len(prompts) >= 24
    assert {prompt.domain for prompt in prompts} == {domain}
    lengths = [len(prompt.prompt) for prompt in prompts]
    assert max(lengths) > 1.5 * min(lengths)
    assert max(lengths) < 4000
    assert statistics.stdev(lengths) > 10


def test_built_in_prompts_are_all_different() -> None:
    prompts = builtin_prompts()
    assert len(prompts) == sum(len(builtin_prompts([domain])) for domain in BUILTIN_DOMAINS)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts)
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert all(prompt.prompt == prompt.prompt.strip() for prompt in prompts)


def test_an_unknown_built_in_domain_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no built-in domain 'poetry'. Choose from summarization, math, translation"):
        builtin_prompts(["math", "poetry"])
