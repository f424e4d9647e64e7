"""A file of prompts on the command line: shared forward passes, answers in order, resumed runs, OpenAI's batches."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers import endless
from hypothesis import given, settings
from hypothesis import strategies as st
from test_native import wide_model

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.cli import main, openai_batch
from knn_ssd.engine import Engine
from knn_ssd.errors import PromptError
from knn_ssd.kernels import binding
from knn_ssd.request_options import RequestOptions
from knn_ssd.testing import tiny_tokenizer

pytestmark = pytest.mark.skipif(binding.kernels_obstacle() is not None, reason="no kernels here")

PROMPTS = ["What is 12 + 7?", "A fox!", "Once upon a time there was", "x", "SELECT * FROM t", "Hello", "one two three"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    endless(wide_model("llama")).save_pretrained(path)
    tiny_tokenizer(chat=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Engine:
    return Engine.from_pretrained(model_dir, answers=False)


@pytest.fixture
def generate(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `generate` on the model; gives the exit code, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["generate", "--model", str(model_dir), *map(str, argv)])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": i}) + "\n" for i, text in enumerate(PROMPTS)), "utf-8")
    return path


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many requests each forward pass had, from the last batch on."""
    sizes: list[int] = []
    run, stream_batch = NativeBackend.forward_batch, Engine.stream_batch

    def counted(self: NativeBackend, requests: Any) -> Any:
        sizes.append(len(requests))
        return run(self, requests)

    def cleared(self: Engine, *arguments: Any) -> Any:
        sizes.clear()  # of the probes that loading a model makes
        return stream_batch(self, *arguments)

    monkeypatch.setattr(NativeBackend, "forward_batch", counted)
    monkeypatch.setattr(Engine, "stream_batch", cleared)
    return sizes


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def expected(engine: Engine, **options: Any) -> list[list[int]]:
    return [list(engine.generate(text, max_new_tokens=16, **options).token_ids) for text in PROMPTS]


SAMPLED = ["--temperature", 1, "--seed", 3, "--presence-penalty", 0.5]


@pytest.mark.parametrize("concurrency", [[], ["--concurrency", 1], ["--concurrency", 3]])
@pytest.mark.parametrize(
    ("argv", "options"), [([], {}), (SAMPLED, {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5})]
)
def test_answers_are_those_of_one_by_one_in_order(
    generate: Run,
    prompts: Path,
    engine: Engine,
    passes: list[int],
    argv: list[Any],
    options: Any,
    concurrency: list[Any],
) -> None:
    code, out, err = generate("--prompts", prompts, "--max-new-tokens", 16, "--json", *argv, *concurrency)
    answers = [json.loads(line) for line in out.splitlines()]
    most = max(passes)
    assert code == 0
    assert all("making 4-bit copies" in line for line in err.splitlines())
    assert [answer["id"] for answer in answers] == [str(i) for i in range(len(PROMPTS))]
    assert [answer["token_ids"] for answer in answers] == expected(engine, **options)
    assert "request" not in answers[0]
    limit = concurrency[1] if concurrency else 8
    assert min(limit, 2) <= most <= limit


def test_texts_come_in_order_with_their_headings(generate: Run, prompts: Path, engine: Engine) -> None:
    code, out, err = generate("--prompts", prompts, "--max-new-tokens", 8, "--limit", 3)
    texts = [engine.generate(text, max_new_tokens=8).text for text in PROMPTS[:3]]
    assert code == 0
    assert out == "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)
    assert [line for line in err.splitlines() if line.startswith("──")] == ["── 0 ──", "── 1 ──", "── 2 ──"]


def test_a_pipe_of_prompts_is_read_once(generate: Run, prompts: Path, tmp_path: Path) -> None:

    reading, writing = os.pipe()
    os.write(writing, prompts.read_bytes())
    os.close(writing)
    code, out, _ = generate("--prompts", f"/dev/fd/{reading}", "--max-new-tokens", 2, "--json")
    os.close(reading)
    assert (code, len(out.splitlines())) == (0, len(PROMPTS))


# --- A file of answers


def test_a_file_of_answers_is_in_order(generate: Run, prompts: Path, engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    code, stdout, err = generate("--prompts", prompts, "--max-new-tokens", 16, "--out", out)
    assert (code, stdout) == (0, "")
    assert "answering" in err
    assert err.splitlines()[-1].startswith("[7 answers | ")
    assert [line["id"] for line in lines_of(out)] == [str(i) for i in range(len(PROMPTS))]
    assert [line["token_ids"] for line in lines_of(out)] == expected(engine)
    assert len({line["request"] for line in lines_of(out)}) == len(PROMPTS)


@pytest.fixture
def ends_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has every later run be interrupted after so many answers."""
    stream_batch = Engine.stream_batch

    def set_end(count: int) -> None:
        def interrupted(self: Engine, requests: Any, concurrency: int) -> Iterator[Any]:
            for number, each in enumerate(stream_batch(self, requests, concurrency)):
                if number == count:
                    raise KeyboardInterrupt
                yield each

        monkeypatch.setattr(Engine, "stream_batch", interrupted)

    return set_end


def cut_whole_line(path: Path) -> int:
    """Nothing is torn."""
    return 0


def cut_middle(path: Path) -> int:
    path.write_bytes(path.read_bytes()[:-40])
    return 1


def cut_newline(path: Path) -> int:
    path.write_bytes(path.read_bytes()[:-1])
    return 0


def cut_character(path: Path) -> int:
    with path.open("ab") as file:
        file.write('{"id": "9", "text": "é'.encode()[:-1])
    return 0


@pytest.mark.parametrize("tear", [cut_whole_line, cut_middle, cut_newline, cut_character])
def test_a_run_that_was_killed_is_resumed(
    generate: Run,
    prompts: Path,
    engine: Engine,
    tmp_path: Path,
    ends_after: Any,
    monkeypatch: pytest.MonkeyPatch,
    tear: Callable[[Path], int],
) -> None:
    out = tmp_path / "answers.jsonl"
    argv = ("--prompts", prompts, "--max-new-tokens", 16, "--out", out, "--concurrency", 3)
    with monkeypatch.context():
        ends_after(4)
        code, _, err = generate(*argv)
    assert (code, err.splitlines()[-1]) == (130, "knn-ssd: interrupted")
    assert len(lines_of(out)) == 4
    done = 4 - tear(out)
    asked: list[int] = []
    stream_batch = Engine.stream_batch

    def counting(self: Engine, requests: Any, concurrency: int) -> Any:
        asked.append(len(requests))
        return stream_batch(self, requests, concurrency)

    monkeypatch.undo()
    monkeypatch.setattr(Engine, "stream_batch", counting)
    code, _, err = generate(*argv)
    assert code == 0
    assert f"{done} of 7 answers are in '{out}' already" in err
    assert asked == [7 - done]
    assert [line["token_ids"] for line in lines_of(out)] == expected(engine)
    before = out.read_bytes()
    assert generate(*argv)[0] == 0
    assert asked == [7 - done, 0]
    assert out.read_bytes() == before


def test_more_prompts_can_follow(generate: Run, prompts: Path, engine: Engine, tmp_path: Path) -> None:
    argv = ("--prompts", prompts, "--max-new-tokens", 16, "--out", tmp_path / "answers.jsonl")
    assert generate(*argv, "--limit", 2)[0] == 0
    assert "2 of 7 answers are in" in generate(*argv)[2]
    assert [line["token_ids"] for line in lines_of(tmp_path / "answers.jsonl")] == expected(engine)


@pytest.mark.parametrize("changed", [["--max-new-tokens", 5], ["--seed", 2, "--temperature", 1], ["--limit", 1]])
def test_a_file_of_another_run_is_refused_and_left(
    generate: Run, prompts: Path, tmp_path: Path, changed: list[Any]
) -> None:
    out = tmp_path / "answers.jsonl"
    argv = ("--prompts", prompts, "--max-new-tokens", 4, "--out", out)
    assert generate(*argv, "--limit", 2)[0] == 0
    before = out.read_bytes()
    code, _, err = generate(*argv, "--limit", 2, *changed)
    assert code == 2
    assert "has a line that answers none of these prompts under these options" in err
    assert out.read_bytes() == before


@pytest.mark.parametrize("options", [["--plain"], ["--no-answers"], ["--concurrency", 2], ["--json"]])
def test_what_changes_no_output_may_change(generate: Run, prompts: Path, tmp_path: Path, options: list[Any]) -> None:
    argv = ("--prompts", prompts, "--max-new-tokens", 4, "--out", tmp_path / "answers.jsonl")
    assert generate(*argv)[0] == 0
    assert "7 of 7 answers are in" in generate(*argv, *options)[2]


@pytest.mark.parametrize("content", [b"notes", b"notes\n", b'{"id": "a", "prompt": "b"}', b'{"a": 1}\n{"id', b"\xff\n"])
def test_a_file_of_something_else_is_refused_and_left(
    generate: Run, prompts: Path, tmp_path: Path, content: bytes
) -> None:
    out = tmp_path / "notes.txt"
    out.write_bytes(content)
    code, _, err = generate("--prompts", prompts, "--max-new-tokens", 4, "--out", out)
    assert code == 2, err
    assert "has a line that answers none of these prompts" in err
    assert out.read_bytes() == content
    before = prompts.read_bytes()
    code, _, err = generate("--prompts", prompts, "--out", prompts)
    assert (code, prompts.read_bytes()) == (2, before)
    assert "is the file of prompts" in err


def test_a_file_that_cannot_be_written_and_names_given_twice_are_refused(
    generate: Run, prompts: Path, tmp_path: Path
) -> None:
    code, _, err = generate("--prompts", prompts, "--max-new-tokens", 2, "--out", tmp_path)
    assert code == 2
    assert "cannot be written" in err
    assert "not a regular file" in generate("--prompts", prompts, "--max-new-tokens", 2, "--out", "/dev/null")[2]
    prompts.write_text('{"prompt": "a", "id": "x"}\n{"prompt": "b", "id": "x"}\n')
    code, _, err = generate("--prompts", prompts, "--out", tmp_path / "out.jsonl")
    assert code == 2
    assert "2 prompts have the id 'x'" in err


def test_answers_are_json_by_the_schema_of_a_file(generate: Run, tmp_path: Path) -> None:
    prompts, schema = tmp_path / "prompts.jsonl", tmp_path / "schema.json"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    schema.write_text('{"enum": ["red", "green"]}')
    out = tmp_path / "out.jsonl"
    assert generate("--prompts", prompts, "--json-schema", schema, "--out", out)[0] == 0
    first = out.read_text()
    assert {json.loads(each)["text"] for each in first.splitlines()} <= {'"red"', '"green"'}
    assert generate("--prompts", prompts, "--json-schema", schema, "--out", out)[0] == 0
    assert out.read_text() == first, "nothing is answered again"
    schema.write_text('{"not": {}}')
    code, _, err = generate("--prompts", prompts, "--json-schema", schema)
    assert code == 2
    assert 'the JSON schema cannot be used: Unimplemented keys: ["not"]' in err
    assert "cannot be read" in generate("--prompts", prompts, "--json-schema", tmp_path / "none")[2]


# --- OpenAI's batch files


def test_a_response_format_of_a_batch_is_kept_and_tools_are_refused(generate: Run, tmp_path: Path) -> None:
    path = tmp_path / "formats.jsonl"
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": {"enum": ["red", "green"]}}}
    path.write_text(line("a", {**CHAT, "max_tokens": 20, "response_format": form}))
    code, out, _ = generate("--prompts", path)
    assert code == 0
    assert json.loads(out)["response"]["body"]["choices"][0]["message"]["content"] in ('"red"', '"green"')
    form["json_schema"]["schema"] = {"not": {}}  # type: ignore[index]
    path.write_text(line("a", {**CHAT, "response_format": form}))
    assert (
        "line 1: response_format.json_schema.schema: the JSON schema cannot be used" in generate("--prompts", path)[2]
    )
    path.write_text(line("a", {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}))
    assert "line 1 offers tools" in generate("--prompts", path)[2]


def test_thinking_before_a_response_format_of_a_batch_is_no_content(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinker, path = tmp_path / "thinker", tmp_path / "formats.jsonl"
    shutil.copytree(model_dir, thinker)
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = (
        f"{tokenizer.chat_template}{{% if add_generation_prompt %}}<think>{{% endif %}}{{# </think> #}}"
    )
    tokenizer.save_pretrained(thinker)
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": {"enum": ["red", "green"]}}}
    path.write_text(line("a", {**CHAT, "max_tokens": 20, "response_format": form}))
    capsys.readouterr()
    assert main(["generate", "--model", str(thinker), "--prompts", str(path)]) == 0
    [choice] = json.loads(capsys.readouterr().out)["response"]["body"]["choices"]
    assert choice["finish_reason"] == "length"
    assert (choice["message"]["content"], len(choice["message"]["reasoning_content"])) == ("", 20)


USER = {"role": "user", "content": "What is 12 + 7?"}
CHAT = {"model": "tiny", "messages": [USER], "max_tokens": 9, "temperature": 0}
TEXT = {"model": "tiny", "prompt": "Once upon", "max_tokens": 8, "temperature": 1, "seed": 5, "logprobs": 2}


def line(name: str, body: dict[str, Any], url: str = "/v1/chat/completions", **more: Any) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body, **more}) + "\n"


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "batch.jsonl"
    logged = {**CHAT, "logprobs": True, "top_logprobs": 1}
    path.write_text(line("a", CHAT) + line("b", TEXT, "/v1/completions") + line("c", logged))
    return path


@pytest.mark.parametrize("to_file", [True, False])
def test_a_batch_is_answered_in_its_own_format(
    generate: Run, batch: Path, engine: Engine, tmp_path: Path, to_file: bool
) -> None:
    out = tmp_path / "results.jsonl"
    code, stdout, _ = generate("--prompts", batch, *(["--out", out] if to_file else []))
    results = lines_of(out) if to_file else [json.loads(each) for each in stdout.splitlines()]
    assert code == 0
    assert [each["custom_id"] for each in results] == ["a", "b", "c"]
    assert all(each["error"] is None and each["id"].startswith("batch_req_") for each in results)
    assert [each["response"]["status_code"] for each in results] == [200] * 3
    chat, text, logged = (each["response"]["body"] for each in results)
    whole = engine.generate([USER], max_new_tokens=9)
    assert chat["object"] == "chat.completion"
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": whole.text}
    assert chat["choices"][0]["finish_reason"] == "length"
    assert (chat["usage"]["prompt_tokens"], chat["usage"]["completion_tokens"]) == (33, 9)
    drawn = engine.generate("Once upon", chat=False, max_new_tokens=8, temperature=1.0, seed=5, logprobs=2)
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"] == drawn.text
    assert text["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx([each.logprob for each in drawn.logprobs])
    assert text["choices"][0]["logprobs"]["text_offset"][0] == 0
    assert len(logged["choices"][0]["logprobs"]["content"]) == 9
    assert logged["choices"][0]["message"] == chat["choices"][0]["message"]


def test_the_client_of_openai_reads_the_results(generate: Run, batch: Path) -> None:
    from openai.types import Completion
    from openai.types.chat import ChatCompletion

    results = [json.loads(each)["response"]["body"] for each in generate("--prompts", batch)[1].splitlines()]
    assert ChatCompletion.model_validate(results[0]).choices[0].message.role == "assistant"
    assert Completion.model_validate(results[1]).choices[0].finish_reason == "length"


def test_a_batch_is_resumed(generate: Run, batch: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    assert generate("--prompts", batch, "--out", out, "--limit", 2)[0] == 0
    code, _, err = generate("--prompts", batch, "--out", out)
    assert code == 0
    assert "2 of 3 answers are in" in err
    assert [each["custom_id"] for each in lines_of(out)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("bad", "fact"),
    [
        (line("x", CHAT, "/v1/embeddings"), "asks for POST /v1/embeddings. POST to /v1/chat/completions or"),
        (line("x", CHAT, method="GET"), "asks for GET /v1/chat/completions"),
        (line("", CHAT), "has no 'custom_id'"),
        (line("x", {**CHAT, "temperature": 9}), "'body.temperature': Input should be less than or equal to 2"),
        (line("x", {**CHAT, "tastiness": 9}), "'body.tastiness' is not supported"),
        (
            line("x", {**CHAT, "n": 2}),
            "a request of a batch has one answer, which is neither streamed nor echoed, got n=2",
        ),
        (line("x", {**CHAT, "stream": True}), "got stream=true"),
        (
            line("x", {**CHAT, "ignore_eos": True, "response_format": {"type": "json_object"}}),
            "ignore_eos cannot be used with structured output",
        ),
        (line("x", {}), "'body.model': Field required"),
        ('{"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": 5}\n', "'body"),
        ("{\n", "is not JSON"),
    ],
)
def test_a_request_that_cannot_be_used_is_named_before_the_model_is_loaded(
    generate: Run, batch: Path, bad: str, fact: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded before"))
    with batch.open("a") as file:
        file.write(bad)
    code, out, err = generate("--prompts", batch)
    assert (code, out) == (2, "")
    assert f"{batch}, line 4" in err
    assert fact in err


NAMES = (
    "model",
    "messages",
    "role",
    "content",
    "temperature",
    "n",
    "stream",
    "stop",
    "seed",
    "logprobs",
    "prompt",
    "x",
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["user", "tiny", "hi"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200)
@given(body=st.dictionaries(st.sampled_from(NAMES), values, max_size=6) | values, is_chat=st.booleans())
def test_whatever_a_body_has_is_a_request_or_a_prompt_error(body: Any, is_chat: bool) -> None:
    url = "/v1/chat/completions" if is_chat else "/v1/completions"
    for each in (body, {**(CHAT if is_chat else TEXT), **(body if isinstance(body, dict) else {})}):
        with suppress(PromptError):
            [request] = openai_batch.parse_requests([line("a", each, url)], "any.jsonl")
            assert request.prompt
            RequestOptions.of(request.options)


@pytest.mark.parametrize("option", [["--temperature", 1], ["--stop", "a"], ["--no-chat"], ["--min-tokens", 2]])
def test_options_of_the_output_belong_to_the_requests(generate: Run, batch: Path, option: list[Any]) -> None:
    code, _, err = generate("--prompts", batch, *option)
    assert code == 2
    assert f"{option[0]} has no effect: every request of an OpenAI batch says itself" in err


def test_other_commands_name_the_one_that_answers_batches(
    batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--prompts", str(batch), "--out", str(tmp_path / "run")]) == 2
    assert "is a request of an OpenAI batch. `knn-ssd generate --prompts` answers these." in capsys.readouterr().err
