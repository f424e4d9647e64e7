"""Prompts of a given length, and prompts from data sets."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from knn_ssd.bench.workload import lengthened, limit_each, read_workloads
from knn_ssd.cli import main
from knn_ssd.errors import PromptError, UsageError
from knn_ssd.prompts import Prompt
from knn_ssd.testing import tiny_model, tiny_tokenizer
from knn_ssd.tokenization import encode

POOL = [Prompt(f"{name} {number}", name, f"{name}{number}") for name in ("math", "story") for number in range(3)]
TEMPLATE = len("user: \nassistant: ")


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("num_tokens", [TEMPLATE + 1, TEMPLATE + 3, 30, 45])
def test_prompts_get_the_length_that_is_asked_for_and_keep_their_end(num_tokens: int, chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat=True)
    found = lengthened(POOL, POOL, num_tokens, tokenizer, chat)
    for prompt, long in zip(POOL, found, strict=True):
        assert (long.id, long.domain) == (prompt.id, prompt.domain)
        assert long.prompt.endswith(prompt.prompt) or prompt.prompt.endswith(long.prompt)
        assert len(encode(tokenizer, long.prompt, sys.maxsize, chat)) == num_tokens
    assert lengthened(POOL, POOL, num_tokens, tokenizer, chat) == found


def test_context_is_of_the_prompt_s_own_domain_first_the_prompts_before_it_nearest() -> None:
    tokenizer = tiny_tokenizer()
    whole = "\n\n".join(["math 0", "math 1", "math 2", "story 2", "story 0", "story 1"])
    for num_tokens in range(1, len(whole) + 1):
        (long,) = lengthened(POOL[4:5], POOL, num_tokens, tokenizer)
        assert long.prompt == whole[-num_tokens:]
    with pytest.raises(PromptError, match=rf"all 6 prompts together have {len(whole)} tokens, and prompts of 99 are"):
        lengthened(POOL[4:5], POOL, 99, tokenizer)
    with pytest.raises(PromptError, match="no room for a word"):
        lengthened([Prompt("long enough ")], [Prompt("long enough ")], TEMPLATE, tiny_tokenizer(chat=True))
    talk = Prompt([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], id="talk")
    with pytest.raises(PromptError, match="prompt 'talk' is a conversation, and only texts can be lengthened"):
        lengthened([talk], [talk], 99, tiny_tokenizer(chat=True))


def test_the_command_lengthens_prompts_and_refuses_what_the_context_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": "many words " * 9, "id": f"{i}"}) + "\n" for i in range(4)), "utf-8")
    options = ["bench", "--model", str(tmp_path / "model"), "--prompts", str(file), "--limit", "1",
               "--methods", "plain", "--max-new-tokens", "4"]  # fmt: skip
    assert main([*options, "--out", str(tmp_path / "short"), "--prompt-tokens", "200"]) == 0
    assert main([*options, "--out", str(tmp_path / "long"), "--prompt-tokens", "300"]) == 2
    assert "the prompt has 300 tokens, and the model's context is 256. Shorten it" in capsys.readouterr().err
    assert main([*options, "--out", str(tmp_path / "longer"), "--prompt-tokens", "4096"]) == 2
    assert "all 4 prompts together have" in capsys.readouterr().err


def test_prompts_from_a_pipe_are_read_once(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    reading, writing = os.pipe()
    question = {"question_id": 7, "category": "math", "turns": ["one", "two"]}
    os.write(writing, (json.dumps({"prompt": "a"}) + "\n" + json.dumps(question) + "\n").encode())
    os.close(writing)
    options = ["bench", "--model", str(tmp_path / "model"), "--prompts", f"/dev/fd/{reading}", "--methods", "plain"]
    assert main([*options, "--max-new-tokens", "2", "--out", str(tmp_path / "run")]) == 0
    os.close(reading)
    records = (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["domain"] for line in records] == [None, "math"]


def test_a_data_set_that_is_there_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "toy"
    folder.mkdir()
    rows = [{"prompt": "one", "turns": ["a", "b"]}, {"prompt": "two", "domain": "math", "turns": ["c"]}]
    for split in ("train", "test"):
        folder.joinpath(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = read_workloads([f"hf:{folder}"])
    assert found == [Prompt("one", "toy", "toy-1"), Prompt("two", "math", "toy-2")]
    assert limit_each(read_workloads([f"hf:{folder}:test:turns"]), 1)[0].prompt == "a"
    assert [p.prompt for p in read_workloads([f"hf:{folder}:default/test"])] == ["one", "two"]
    with pytest.raises(PromptError, match=r"has no column 'text'. Name one of prompt, turns, domain, as in .*:COLUMN"):
        read_workloads([f"hf:{folder}:test:text"])
    with pytest.raises(PromptError, match="row 1 has no text in 'domain'"):
        read_workloads([f"hf:{folder}:test:domain"])
    with pytest.raises(PromptError, match=r"cannot be read: .*dev.*\. Check its name"):
        read_workloads([f"hf:{folder}:dev"])
    with pytest.raises(PromptError, match="cannot be read"):
        read_workloads([f"hf:{tmp_path}/nothing"])


def test_a_data_set_without_the_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"'hf:owner/name' needs the package datasets"):
        read_workloads(["hf:owner/name"])
    assert main(["bench", "--prompts", "hf:owner/name", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.endswith("Install it with `pip install knn-ssd[datasets]`.\n")
