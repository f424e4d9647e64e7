"""Prompt files: any text survives, a bad line is named by file and number, and the built-in sets are complete."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
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
        ('{"prompt": "a", "reference": ["b"]}', r"'reference' must be text, got \['b'\]"),
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
