"""The command line: what it prints where, every option's effect, and one sentence for every error of a user."""

from __future__ import annotations

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import endless, endless_tokenizer, share_kernels
from processes import afresh, slowly, start

import knn_ssd
from knn_ssd.atlas import ANCHORS, MANIFEST, Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.cli import COMMANDS, main
from knn_ssd.engine import Engine
from knn_ssd.errors import Interrupted, OutputError
from knn_ssd.loading.fingerprint import fingerprint
from knn_ssd.outputs import Stream
from knn_ssd.plan import Mode, Plan, Policy
from knn_ssd.sampling import SamplingParams
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.testing import tiny_model
from knn_ssd.tools import hub

NUM_LAYERS = 4
CONTEXT = 256
PLAN = Plan.skipping(NUM_LAYERS, attention=[2], mlp=[1], policy=Policy(4, threshold=0.0))
MATH, STORY = "What is 12 + 7?", "A dragon and a fox!"

Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that never ends by itself, so that lengths are known."""
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


def save_model(path: Path, chat: bool = True, **overrides: Any) -> Path:
    model = endless(tiny_model("llama", **overrides))
    model.save_pretrained(path)
    endless_tokenizer(chat).save_pretrained(path)
    return path


JUDGED = {"speedup_over_plain": 1.25, "speedup_over_general": 1.08}


@pytest.fixture(scope="session")
def engine(model_dir: Path) -> Engine:
    return Engine.from_pretrained(model_dir)


@pytest.fixture(scope="session")
def atlas(engine: Engine) -> Atlas:
    """Two domains whose anchors are the vectors of one prompt each; STORY lies beyond its domain's radius."""
    vectors = []
    for prompt in (MATH, STORY):
        token_ids = engine.encode(prompt)
        vectors.append(engine.backend.open(len(token_ids)).prefill(token_ids).mean.numpy())
    return Atlas(
        fingerprint=fingerprint(engine.model, engine.tokenizer),
        pooling=Pooling.MEAN,
        anchors=np.stack(vectors),
        anchor_domains=("math", "story"),
        domains={
            "math": DomainEntry(PLAN, 0.5, {"trials": 20, "judging": JUDGED}),
            "story": DomainEntry(Plan.skipping(NUM_LAYERS, mlp=[3], policy=Policy(2, 0.5)), -1.0),
        },
        fallback=Plan.plain(NUM_LAYERS),
        cost=CostProfile(0.01, 0.001, 0.002, (0.01, 0.011)),
        evidence={"model": "tiny", "routing": {"accuracy": 1.0}},
    )


@pytest.fixture(scope="session")
def atlas_dir(atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return atlas.save(tmp_path_factory.mktemp("atlases") / "tiny")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; gives `code`, `out` and `err`."""

    def run(*argv: object) -> SimpleNamespace:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def refused(run: Run) -> Callable[..., str]:
    """Runs a command line that must be refused: exit code 2, nothing on stdout, one sentence, which it gives."""

    def refused(*argv: object) -> str:
        result = run(*argv)
        assert result.code == 2
        assert result.out == ""
        lines = [line for line in result.err.splitlines() if not line.startswith("[transformers]")]
        assert len(lines) == 1, result.err
        assert re.fullmatch(r"knn-ssd: .+[.?]", lines[0])
        return lines[0]

    return refused


@pytest.fixture
def generate(run: Run, model_dir: Path) -> Run:
    return lambda *argv: run("generate", "--model", model_dir, "--max-new-tokens", 12, *argv)


def parsed(result: SimpleNamespace) -> list[dict[str, Any]]:
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def write_prompts(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "id": f"p{i}"}) + "\n" for i, prompt in enumerate(prompts)))
    return path


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


# ---- Light to touch


HEAVY = {"torch", "transformers", "numpy", "optuna", "rich", "sklearn"}


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_and_version_import_nothing_heavy(argv: list[str]) -> None:
    done = python(
        f"import sys, time\nstarted = time.process_time()\nfrom knn_ssd.cli import main\ncode = main({argv!r})\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), code, time.process_time() - started, file=sys.stderr)"
    )
    imported, code, seconds = re.fullmatch(r"(\[.*\]) (\d) ([\d.e-]+)\n", done.stderr).groups()  # type: ignore[union-attr]
    assert (imported, code) == ("[]", "0")
    assert float(seconds) < 1.0  # of the processor; about 0.1
    assert "usage: knn-ssd" in done.stdout or re.fullmatch(r"knn-ssd \d+\.\d+\.\d+\n", done.stdout)


def test_help_lists_every_command(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    for name, line in COMMANDS.items():
        assert name in result.out
        assert line.split()[0] in result.out


def test_no_command_shows_the_help_and_is_an_error(run: Run) -> None:
    result = run()
    assert (result.code, result.out) == (2, "")
    assert "usage: knn-ssd" in result.err


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert python(f"import sys, knn_ssd; print({HEAVY!r} & set(sys.modules))").stdout == "set()\n"


def test_public_names_are_there() -> None:
    for name in knn_ssd.__all__:
        assert getattr(knn_ssd, name) is not None
    assert set(dir(knn_ssd)) >= set(knn_ssd.__all__)
    assert knn_ssd.Engine is Engine
    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        _ = knn_ssd.Engin  # type: ignore[attr-defined]


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "knn_ssd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"knn-ssd {knn_ssd.__version__}\n"


# ---- Command lines that cannot be understood


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["genrate"], "no command 'genrate'. Did you mean generate?"),
        (["frobnicate"], "no command 'frobnicate'. See `knn-ssd --help`."),
        (["--verison"], "no option '--verison'. Did you mean --version?"),
        (["generate", "--promt", "x"], "`knn-ssd generate` has no option '--promt'. Did you mean --prompt?"),
        (["generate", "--prompt", "x", "--neighbors=3"], "no option '--neighbors'. Did you mean --neighbours?"),
        (["generate", "--prompt", "x", "--max-new", "3"], "no option '--max-new'. Did you mean --max-new-tokens?"),
        (["generate", "-p", "x"], "no option '-p'"),
        (["chat", "--temprature", "1"], "Did you mean --temperature?"),
        (["atlas"], "arguments are required: COMMAND"),
        (["atlas", "shwo"], "`knn-ssd atlas` has no command 'shwo'. Did you mean show?"),
        (["atlas", "show", "a", "--jsno"], "`knn-ssd atlas show` has no option '--jsno'. Did you mean --json?"),
        (["plot", "a"], "required: --out"),
        (["generate"], "--prompt --prompts - is required"),
        (["generate", "hello"], "no option before 'hello'. Write --prompt 'hello'."),
        (["generate", "--prompt", "x", "-"], "not allowed with argument --prompt"),
        (["generate", "--prompt", "x", "--prompts", "f"], "not allowed with argument --prompt"),
        (["generate", "--prompt", "x", "--plain", "--atlas", "a"], "not allowed with argument --plain"),
        (["generate", "--prompt", "x", "--limit", "2"], "--limit is for a file of prompts"),
        (["generate", "--prompt", "x", "--out", "f"], "--out is for a file of prompts"),
        (["generate", "--prompt", "x", "--concurrency", "2"], "--concurrency is for a file of prompts"),
        (["generate", "--prompt", "x", "--concurrency", "0"], "whole number of 1 or more, got '0'"),
        (["generate", "--prompt", "x", "--presence-penalty", "3"], "presence_penalty must be in [-2, 2], got 3.0"),
        (["generate", "--prompt", "x", "--frequency-penalty", "x"], "must be a number, got 'x'"),
        (["generate", "--prompt", "x", "--logit-bias", "5"], "must be a token id and a number, such as 42=-5, got '5'"),
        (["generate", "--prompt", "x", "--logit-bias", "5=x"], "must be a number, got 'x'"),
        (["generate", "--prompt", "x", "--logit-bias", "5=200"], "logit_bias of token 5 must be in [-100, 100]"),
        (["generate", "--prompt", "x", "--stop-token-ids", "5,b"], "token ids with commas between them, got '5,b'"),
        (["generate", "--prompt", "x", "--min-tokens", "300"], "min_tokens must be at most max_new_tokens, 256, got"),
        (["chat", "--min-tokens", "3"], "no option '--min-tokens'"),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], "whole number of 1 or more, got '0'"),
        (["generate", "--prompt", "x", "--max-new-tokens", "many"], "whole number of 1 or more, got 'many'"),
        (["generate", "--prompt", "x", "--stop", ""], "at least one character"),
        (["generate", "--prompt", "x", "--temperature", "hot"], "must be a number, got 'hot'"),
        (["generate", "--prompt", "x", "--temperature", "nan"], "must be a number, got 'nan'"),
        (["generate", "--prompt", "x", "--temperature", "-1"], "temperature must be 0 or more, got -1.0"),
        (["generate", "--prompt", "x", "--top-p", "1.5"], "top_p must be in (0, 1], got 1.5"),
        (["generate", "--prompt", "x", "--min-p", "2"], "min_p must be in [0, 1], got 2.0"),
        (["generate", "--prompt", "x", "--repetition-penalty", "0"], "repetition_penalty must be above 0, got 0.0"),
        (["generate", "--prompt", "x", "--seed", "-1"], "whole number of 0 or more, got '-1'"),
        (["generate", "--prompt", "x", "--seed", str(2**64)], "must be 9223372036854775807 or less"),
        (["generate", "--prompt", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["generate", "--prompt", "x", "--domain", "math"], "--domain chooses from an atlas, and there is none"),
        (["generate", "--prompt", "x", "--neighbours", "2"], "--neighbours chooses from an atlas, and there is none"),
        (["doctor", "--no-model", "--model", "m"], "--no-model leaves out"),
        (["generate", "--prompt", "x", "--answers", "a", "--no-answers"], "not allowed with argument --answers"),
        (["generate", "--prompt", "x", "--answers", ""], "at least one character"),
        (["generate", "--prompt", "x", "--answers", __file__], "is a file, and an answer store is a folder"),
        (["chat", "--answers", __file__], "is a file, and an answer store is a folder"),
        (["chat", "--answer", "a"], "no option '--answer'. Did you mean --answers?"),
        (["answers"], "arguments are required: COMMAND"),
        (["answers", "shwo"], "`knn-ssd answers` has no command 'shwo'. Did you mean show?"),
        (["answers", "show", "nowhere"], "there is no answer store in 'nowhere'"),
        (["answers", "show", __file__], "is a file, and an answer store is a folder"),
        (["answers", "clear", "nowhere"], "there is no answer store in 'nowhere'"),
        (["answers", "clear", str(Path(__file__).parent)], "there is no answer store in"),
        (["answers", "show", "a", "--jsno"], "`knn-ssd answers show` has no option '--jsno'. Did you mean --json?"),
    ],
)
def test_a_command_line_that_cannot_be_understood(
    argv: list[str], words: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded before"))
    assert words in refused(*argv)


# ---- Generate


def test_text_goes_to_stdout_and_the_summary_to_stderr(generate: Run, engine: Engine) -> None:
    result = generate("--prompt", MATH)
    expected = engine.generate(MATH, max_new_tokens=12)
    assert result.code == 0
    assert result.out.rstrip("\n") == expected.text.rstrip("\n")
    drafts = r"(nothing drafted|drafted \d+, accepted \d+ \(\d+%\): \w+ \d+ of \d+(, \w+ \d+ of \d+)?)"
    rest = r"12 tokens at [\d.]+/s \| \w+ exactness \| ended by length"
    assert re.fullmatch(rf"\[.*lookup \| {drafts} \| {rest}\]\n", result.err)


def test_the_summary_shows_route_plan_and_drafts(generate: Run, atlas_dir: Path) -> None:
    near = generate("--prompt", MATH, "--atlas", atlas_dir).err
    assert re.match(r"\[near math at distance 0\.000 \| skip attention 2 and MLP 1; drafts up to 4", near)
    assert re.search(r"drafted \d+, accepted \d+ \(\d+%\)|nothing drafted", near), "as the controller finds it pays"
    far = generate("--prompt", STORY, "--atlas", atlas_dir).err
    assert far.startswith("[fallback plan: beyond the radius of the nearest, story at distance 0.000 | plain decoding")
    given = generate("--prompt", STORY, "--atlas", atlas_dir, "--domain", "math").err
    assert given.startswith("[math as requested; nearest story at distance 0.000 | skip attention 2")


def test_json_without_an_atlas(generate: Run, engine: Engine) -> None:
    (answer,) = parsed(generate("--prompt", MATH, "--json"))
    expected = engine.generate(MATH, max_new_tokens=12)
    assert list(answer) == ["id", "text", "token_ids", "route", "plan", "neighbours", "stats", "finish_reason"]
    assert answer["id"] == "prompt"
    assert answer["text"] == expected.text
    assert answer["token_ids"] == list(expected.token_ids)
    assert answer["route"] is None
    assert Plan.from_json(answer["plan"]).policy.lookup, "the general plan"
    assert answer["finish_reason"] == "length"
    stats = answer["stats"]
    assert set(stats) == {
        "drafted", "accepted", "rounds", "tokens", "acceptance_rate", "tokens_per_round", "tokens_per_sec",
        "prefill_sec", "route_sec", "decode_sec", "by_drafter", "exactness",
        "low_bit_bytes", "resident_memory_bytes", "peak_memory_bytes",
    }  # fmt: skip
    assert answer["neighbours"] == []
    for count in ("drafted", "accepted"):
        assert sum(each[count] for each in stats["by_drafter"].values()) == stats[count]
    assert stats["tokens"] == 12
    assert stats["accepted"] == 12 - stats["rounds"], "each round brings one token of the target's own"
    assert 0 <= stats["low_bit_bytes"] < stats["resident_memory_bytes"] <= stats["peak_memory_bytes"]


def test_json_with_an_atlas(generate: Run, atlas_dir: Path, tmp_path: Path, engine: Engine) -> None:
    file = write_prompts(tmp_path / "two.jsonl", MATH, STORY)
    result = generate("--prompts", file, "--atlas", atlas_dir, "--json")
    near, far = parsed(result)
    assert result.err == ""
    assert near["route"] == {"domain": "math", "distance": pytest.approx(0, abs=1e-6), "fallback": False}
    assert far["route"]["domain"] == "story"
    assert far["route"]["fallback"] is True
    assert Plan.from_json(near["plan"]) == PLAN
    assert Plan.from_json(far["plan"]).is_plain
    assert near["stats"]["drafted"] >= near["stats"]["accepted"] >= 0
    for answer, prompt in ((near, MATH), (far, STORY)):
        assert answer["token_ids"] == list(engine.generate(prompt, max_new_tokens=12).token_ids)


def test_answers_are_kept_in_memory_on_disk_or_not_at_all(generate: Run, tmp_path: Path, engine: Engine) -> None:
    twice = write_prompts(tmp_path / "twice.jsonl", MATH, MATH)
    first, second = parsed(generate("--prompts", twice, "--json", "--concurrency", 1))
    assert first["neighbours"] == []
    assert second["neighbours"] == [{"id": 0, "distance": pytest.approx(0, abs=1e-6)}]
    assert not any(
        each["neighbours"]
        for each in parsed(generate("--prompts", twice, "--json", "--concurrency", 1, "--no-answers"))
    )
    store = tmp_path / "store"
    assert generate("--prompt", MATH, "--answers", store).code == 0
    (again,) = parsed(generate("--prompt", MATH, "--answers", store, "--json"))
    assert [near["id"] for near in again["neighbours"]] == [0]
    assert "near requests 0 at distance 0.000 | 12 tokens" in generate("--prompt", MATH, "--answers", store).err
    assert again["token_ids"] == list(engine.generate(MATH, max_new_tokens=12, plain=True).token_ids)


def test_a_store_of_another_model_or_a_damaged_one_is_refused(
    generate: Run, refused: Callable[..., str], tmp_path: Path, model_dir: Path
) -> None:
    store = tmp_path / "store"
    generate("--prompt", MATH, "--answers", store)
    other = save_model(tmp_path / "other", seed=1)
    said = refused("generate", "--model", other, "--prompt", MATH, "--answers", store)
    assert "belongs to another model: weights hash is " in said
    assert "Give each model a folder of its own." in said
    for path in store.iterdir():
        path.write_bytes(b"something else" * 1000)
    for command in (["generate", "--prompt", MATH, "--answers"], ["answers", "show"], ["answers", "clear"]):
        assert "answers.sqlite' cannot be used: file is not a database" in refused(*command, store)


def test_answers_show_and_clear(
    generate: Run, run: Run, refused: Callable[..., str], tmp_path: Path, model_dir: Path
) -> None:
    store = tmp_path / "store"
    for prompt in (MATH, STORY, MATH):
        generate("--prompt", prompt, "--answers", store)
    shown = run("answers", "show", store).out
    assert shown.startswith("2 requests of ")
    assert re.search(r" MB on disk; drafts from [01] of them were accepted\n", shown)
    assert shown.count(" ids ") == 2
    assert MATH[:10] in run("answers", "show", store, "--model", model_dir).out
    latest = json.loads(run("answers", "show", store, "--latest", "--limit", 1, "--json", "--model", model_dir).out)
    assert set(latest) == {"requests", "tokens", "useful", "bytes", "answers"}
    assert latest["requests"] == 2
    (answer,) = latest["answers"]
    assert MATH in answer["prompt"]
    assert answer["last_used"] == 2
    assert len(answer["token_ids"]) == 12
    assert "there is no model at" in refused("answers", "show", store, "--model", tmp_path / "none")
    assert run("answers", "clear", store).out == f"removed 2 requests from '{store}'\n"
    assert run("answers", "show", store).out.startswith("0 requests of 0 tokens, ")


def test_text_of_a_prompt_cannot_control_the_terminal(tmp_path: Path) -> None:
    from knn_ssd.cli.answers import _beginning
    from knn_ssd.routing.answer_file import StoredAnswer

    ids = np.arange(3, dtype=np.int32)
    stored = StoredAnswer(b"", ids, ids, ids, {}, 0.0, 0)
    tokenizer: Any = SimpleNamespace(decode=lambda *_, **__: "a\x1b[2Jb\r\n[red]" + 99 * "c")
    assert _beginning(stored, tokenizer).startswith("a [2Jb [red]ccc")
    assert len(_beginning(stored, tokenizer)) == 60
    assert _beginning(stored, None) == "ids 0 1 2"


def test_several_prompts_have_headings_and_limit_takes_the_first(generate: Run, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "three.jsonl", MATH, STORY, MATH)
    result = generate("--prompts", file, "--limit", 2)
    assert [line for line in result.err.splitlines() if line.startswith("──")] == ["── p0 ──", "── p1 ──"]
    assert [answer["id"] for answer in parsed(generate("--prompts", file, "--json"))] == ["p0", "p1", "p2"]


def test_a_minus_sign_reads_one_prompt_from_stdin(
    generate: Run, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    (answer,) = parsed(generate("--json", "-"))
    assert answer["id"] == "stdin"
    assert answer["token_ids"] == list(engine.generate("two\nlines", max_new_tokens=12).token_ids)


def test_text_comes_as_it_is_made(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[str] = []
    monkeypatch.setattr("knn_ssd.cli.output.write", writes.append)
    generate("--prompt", MATH)
    assert len(writes) > 5


def test_sampling_options_reach_the_engine(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    stream = Engine.stream

    def spy(self: Engine, prompt: Any, **options: Any) -> Stream:
        seen.update(options)
        return stream(self, prompt, **options)

    monkeypatch.setattr(Engine, "stream", spy)
    options = ["--temperature", 0.7, "--top-k", 5, "--top-p", 0.9, "--min-p", 0.1, "--repetition-penalty", 1.2]
    result = generate("--prompt", MATH, *options, "--seed", 3, "--stop", "zz", "--stop", "yy", "--plain")
    assert result.code == 0
    assert "note" not in result.err
    expected = {
        "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 3,
        "max_new_tokens": 12, "stop": ["zz", "yy"], "plain": True, "domain": None,
    }  # fmt: skip
    assert seen == expected
    more = ["--presence-penalty", -1, "--frequency-penalty", 0.5, "--logit-bias", "7=-2", "--logit-bias", "9=1.5"]
    more += ["--ignore-eos", "--min-tokens", 3, "--stop-token-ids", "4, 8"]
    generate("--prompt", MATH, *more)
    assert {name: seen[name] for name in seen if name not in expected} == {
        "presence_penalty": -1.0, "frequency_penalty": 0.5, "logit_bias": {7: -2.0, 9: 1.5}, "ignore_eos": True,
        "min_tokens": 3, "stop_token_ids": [4, 8],
    }  # fmt: skip
    assert set(seen) >= {field.name for field in fields(SamplingParams)}, "generate has every option"


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "2"],
        ["--repetition-penalty", "3"],
        ["--no-chat"],
        ["--max-new-tokens", "5"],
    ],
)
def test_every_option_of_the_output_changes_it(options: list[str], generate: Run) -> None:
    outputs = [
        parsed(generate("--prompt", MATH, "--seed", 1, "--json", *given))[0]["token_ids"] for given in ([], options)
    ]
    assert outputs[0] != outputs[1]


@pytest.mark.parametrize("options", [["--top-k", "1"], ["--top-p", "0.01"], ["--min-p", "1"]])
def test_every_option_of_sampling_can_make_it_greedy(options: list[str], generate: Run) -> None:
    greedy, narrow, wide = (
        parsed(generate("--prompt", MATH, "--json", *given))[0]["token_ids"]
        for given in ([], ["--temperature", "1", *options], ["--temperature", "3", "--seed", "1"])
    )
    assert narrow == greedy != wide


def test_seeds_reproduce(generate: Run) -> None:
    outputs = [
        parsed(generate("--prompt", MATH, "--temperature", 2, "--seed", seed, "--json"))[0]["token_ids"]
        for seed in (1, 1, 2)
    ]
    assert outputs[0] == outputs[1] != outputs[2]


def test_options_without_effect_are_told(generate: Run) -> None:
    result = generate("--prompt", MATH, "--top-k", 5, "--min-p", 0.5)
    assert result.code == 0
    assert result.err.startswith("note: no effect at temperature 0, which is greedy decoding: --top-k")


def test_a_stop_string_ends_the_text_before_it(generate: Run, engine: Engine) -> None:
    text = engine.generate(MATH, max_new_tokens=12).text
    (answer,) = parsed(generate("--prompt", MATH, "--json", "--stop", text[6:8]))
    assert answer["text"] == text[: text.index(text[6:8])]
    assert answer["finish_reason"] == "stop"


def test_plain_decodes_without_drafts(generate: Run) -> None:
    (answer,) = parsed(generate("--prompt", MATH, "--plain", "--json"))
    assert answer["stats"]["drafted"] == 0


def test_domain_chooses_the_plan(generate: Run, atlas_dir: Path) -> None:
    (answer,) = parsed(generate("--prompt", STORY, "--atlas", atlas_dir, "--domain", "math", "--json"))
    assert Plan.from_json(answer["plan"]) == PLAN
    assert answer["route"]["domain"] == "story"


def test_neighbours_vote(generate: Run, atlas: Atlas, tmp_path: Path) -> None:
    anchors = np.concatenate([atlas.anchors, atlas.anchors[1:]])  # two anchors of another domain outvote the nearest
    crowded = replace(atlas, anchors=anchors, anchor_domains=("math", "story", "story"))
    path = crowded.save(tmp_path / "crowded")
    routes = [
        parsed(generate("--prompt", MATH, "--atlas", path, "--neighbours", k, "--json"))[0]["route"] for k in (1, 3)
    ]
    assert [route["domain"] for route in routes] == ["math", "story"]


def test_model_options_reach_the_loader(generate: Run, monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> None:
    seen: dict[str, Any] = {}
    load = Engine.from_pretrained

    def spy(name: str, **options: Any) -> Engine:
        engine = load(name, **options)
        seen.update(name=name, **options, runs_in=engine.model.dtype)
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", spy)
    assert generate("--prompt", MATH, "--dtype", "bfloat16", "--device", "cpu").code == 0
    assert seen == {
        "name": str(model_dir), "atlas": None, "dtype": "bfloat16", "device": "cpu", "revision": None, "neighbours": 1,
        "answers": True, "prefix_cache": 0, "runs_in": torch.bfloat16,
    }  # fmt: skip


def test_without_a_model_the_embedded_one_is_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(name: str | None, **_: Any) -> Engine:
        seen.append(name)
        raise OutputError("enough")

    monkeypatch.setattr(Engine, "from_pretrained", stop)
    assert run("generate", "--prompt", "x").code == 2
    assert run("chat").code == 2
    assert seen == [None, None]


# ---- What cannot be used


def test_a_missing_model(refused: Callable[..., str]) -> None:
    words = refused("generate", "--model", "./nowhere", "--prompt", "x")
    assert "there is no model at './nowhere'" in words


def test_a_directory_that_is_no_model(refused: Callable[..., str], tmp_path: Path) -> None:
    assert f"there is no config.json in '{tmp_path}'" in refused("generate", "--model", tmp_path, "--prompt", "x")


def test_a_corrupt_model(refused: Callable[..., str], model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model_dir, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (["generate", "--prompt", "x"], ["chat"], ["doctor"]):
        assert "is not a complete safetensors file" in refused(*command, "--model", copy)


def test_an_unknown_device(refused: Callable[..., str], model_dir: Path) -> None:
    assert "device 'gpu' cannot be used" in refused(
        "generate", "--model", model_dir, "--device", "gpu", "--prompt", "x"
    )


@pytest.mark.parametrize(
    ("command"), [["generate", "--prompt", MATH, "--atlas"], ["chat", "--atlas"], ["atlas", "verify"]]
)
def test_an_atlas_of_another_model(
    command: list[str], refused: Callable[..., str], atlas_dir: Path, tmp_path: Path
) -> None:
    other = save_model(tmp_path / "other", hidden_size=64, seed=1)
    words = refused(*command, atlas_dir, "--model", other)
    assert re.search("the atlas was calibrated on another model: hidden size is 64.* the atlas has 32", words)
    assert "weights hash is" in words
    assert "tokenizer" not in words


@pytest.fixture
def atlas_copy(atlas_dir: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "atlas"
    shutil.copytree(atlas_dir, copy)
    return copy


def _newer(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "schema": 99}))


def _truncated(path: Path) -> None:
    (path / ANCHORS).write_bytes((path / ANCHORS).read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_newer, "has atlas schema 99, and this version of knn-ssd reads up to 1. Update knn-ssd."),
        (_truncated, f"{ANCHORS}' is missing or damaged"),
        (lambda path: (path / ANCHORS).unlink(), f"{ANCHORS}' is missing or damaged"),
        (lambda path: (path / MANIFEST).unlink(), f"is not an atlas: it has no {MANIFEST}"),
        (lambda path: (path / MANIFEST).write_text("{"), "is not JSON"),
        (shutil.rmtree, "there is no atlas at"),
    ],
)
def test_an_atlas_that_cannot_be_read(
    damage: Callable[[Path], object],
    words: str,
    refused: Callable[..., str],
    atlas_copy: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(atlas_copy)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded before"))
    for command in (
        ["generate", "--prompt", "x", "--atlas"],
        ["chat", "--atlas"],
        ["atlas", "show"],
        ["atlas", "show", "--json"],
        ["atlas", "verify"],
        ["atlas", "diff", atlas_copy],
        ["plot", "--out", "x.png"],
    ):
        assert words in refused(*command, atlas_copy)


def test_an_unknown_domain_and_too_many_neighbours(
    refused: Callable[..., str], atlas_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded before"))
    ask = ["generate", "--prompt", "x", "--atlas", atlas_dir]
    assert "the atlas has no domain 'maths'. It has math, story." in refused(*ask, "--domain", "maths")
    assert "k must be in [1, 2], the number of anchors, got 3" in refused(*ask, "--neighbours", 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "ok"}\n{"prompt": \n', "line 2 is not JSON"),
        (b'{"prompt": "ok"}\n\n{"text": "no"}\n', "line 3 has no 'prompt' text"),
        (b'{"prompt": "ok"}\n{"prompt": "  "}\n', "line 2 has an empty prompt"),
        (b'{"prompt": "ok", "id": [7]}\n', "line 1: 'id' must be text or a whole number, got [7]"),
        (b"\n", "has no prompts"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b'{"prompt": "half \\ud800", "id": "h"}\n', "prompt 'h' is not Unicode text"),
    ],
)
def test_a_prompt_file_with_a_bad_line(
    content: bytes, words: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded before"))
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    sentence = refused("generate", "--prompts", file)
    assert words in sentence
    assert "half" in str(content) or str(file) in sentence


def test_a_missing_prompt_file(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere.jsonl' cannot be read: No such file" in refused("generate", "--prompts", tmp_path / "nowhere.jsonl")
    assert "cannot be read: Is a directory" in refused("generate", "--prompts", tmp_path)


def test_an_empty_prompt(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    for argv in (["--prompt", ""], ["--prompt", " \n"], ["-"]):
        assert "the prompt is empty. Give at least one word." in refused("generate", *argv)


def test_a_prompt_longer_than_the_context(refused: Callable[..., str], model_dir: Path) -> None:
    words = refused("generate", "--model", model_dir, "--prompt", "x" * CONTEXT)
    assert f"the prompt has {CONTEXT + 18} tokens, and the model's context is {CONTEXT}. Shorten" in words


def test_one_bad_prompt_of_many_stops_all_before_the_first(
    refused: Callable[..., str], model_dir: Path, tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "long.jsonl", MATH, "x" * CONTEXT, STORY)
    assert "prompt 'p1' has 274 tokens" in refused("generate", "--model", model_dir, "--prompts", file)


def test_text_without_a_tokenizer(refused: Callable[..., str], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert "came without a tokenizer" in refused("generate", "--model", tmp_path, "--prompt", "x")


# ---- Ends that come early


def test_ctrl_c_is_one_word(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Stream) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "__next__", interrupted)
    result = generate("--prompt", MATH)
    assert (result.code, result.err) == (130, "knn-ssd: interrupted\n")


def test_an_interrupted_calibration_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_args: Any) -> int:
        raise Interrupted("the calibration was interrupted", "Go on with --resume.")

    monkeypatch.setattr("knn_ssd.cli.doctor.run", interrupted)
    result = run("doctor")
    assert (result.code, result.err) == (2, "knn-ssd: the calibration was interrupted. Go on with --resume.\n")


def test_a_real_ctrl_c_leaves_no_traceback(model_dir: Path) -> None:
    code = (
        "import sys, time\nfrom knn_ssd.outputs import Stream\nfrom knn_ssd.cli import main\n"
        "next_ = Stream.__next__\n"
        "def slow(self):\n    print('started', file=sys.stderr, flush=True)\n    time.sleep(0.2)\n"
        "    return next_(self)\n"
        "Stream.__next__ = slow\n"
        f"sys.exit(main(['generate', '--model', {str(model_dir)!r}, '--prompt', 'x', '--max-new-tokens', '200']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "started" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.endswith("knn-ssd: interrupted\n")
    assert "Traceback" not in errors


def test_a_reader_that_goes_away_is_no_error(atlas_dir: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "knn_ssd", "atlas", "show", str(atlas_dir)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_one_sentence(atlas_dir: Path) -> None:
    for argv in (["atlas", "show", str(atlas_dir)], ["--help"]):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "knn_ssd", *argv], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert done.returncode == 2
        assert done.stderr == "knn-ssd: the output cannot be written: No space left on device. Make room for it.\n"


def test_a_terminal_without_the_characters_shows_question_marks(atlas_dir: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ask = [sys.executable, "-m", "knn_ssd", "atlas", "show", str(atlas_dir)]
    done = subprocess.run(ask, capture_output=True, text=True, check=True, env=environment)
    assert "??S?" in done.stdout
    as_json = subprocess.run([*ask, "--json"], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(as_json.stdout)["schema"] == 1


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_args: Any) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr("knn_ssd.cli.doctor.run", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("doctor")


# ---- Chat


@pytest.fixture
def chat(run: Run, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Talks with lines from a pipe."""

    def chat(*lines: str, argv: tuple[object, ...] = ()) -> SimpleNamespace:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--model", model_dir, "--max-new-tokens", 8, *argv)

    return chat


def messages(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]


def test_a_conversation_remembers(chat: Run, engine: Engine) -> None:
    first = engine.generate(messages("hi"), max_new_tokens=8).text
    second = engine.generate(messages("hi", first, "and?"), max_new_tokens=8).text
    result = chat("hi", "", "and?")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"{first}\n{second}\n"


def test_reset_forgets(chat: Run, engine: Engine) -> None:
    answer = engine.generate(messages("hi"), max_new_tokens=8).text
    result = chat("what?", "/reset", "hi")
    assert result.out.endswith(f"\n{answer}\n")
    assert result.err == "(the conversation is forgotten)\n"


def test_quit_leaves(chat: Run) -> None:
    assert chat("/quit", "hi").out == ""


def test_help_and_unknown_commands(chat: Run) -> None:
    assert [line.split()[0] for line in chat("/help").err.splitlines()] == [
        "/stats", "/system", "/reset", "/help", "/quit",
    ]  # fmt: skip
    assert chat("/sttas").err.startswith("There is no /sttas. There are:\n  /stats")


def test_a_system_message_stays(chat: Run, engine: Engine) -> None:
    def answers(system: str, *texts: str) -> str:
        conversation = [{"role": "system", "content": system}]
        written = ""
        for text in texts:
            conversation.append({"role": "user", "content": text})
            answer = engine.generate(conversation, max_new_tokens=8).text
            conversation.append({"role": "assistant", "content": answer})
            written += f"{answer}\n"
        return written

    assert chat("hi", "and?", argv=("--system", "be brief")).out == answers("be brief", "hi", "and?")
    assert chat("/system be brief", "hi").out == answers("be brief", "hi")
    changed = chat("/system", "what?", "/system be rude", "/reset", "hi", "/system", argv=("--system", "be brief"))
    assert changed.out.endswith(f"\n{answers('be rude', 'hi')}")
    assert changed.err.splitlines() == [
        "be brief", "(the system message is set)", "(the conversation is forgotten)", "be rude",
    ]  # fmt: skip
    assert chat("/system").err == "(there is no system message)\n"


def test_a_system_message_that_cannot_be_used_is_refused_and_the_one_before_stays(
    chat: Run, engine: Engine, refused: Callable[..., str], model_dir: Path
) -> None:
    result = chat("/system " + "x" * CONTEXT, "hi")
    assert "the model's context is 256" in result.err
    assert result.out == engine.generate(messages("hi"), max_new_tokens=8).text + "\n"
    assert "the model's context is 256" in refused("chat", "--model", model_dir, "--system", "x" * CONTEXT)


def test_a_system_message_counts_for_the_context(chat: Run) -> None:
    long = "x" * 90
    assert "its oldest turn was dropped" not in chat(long, "end").err
    result = chat(long, "end", argv=("--system", "y" * 110))
    assert "its oldest turn was dropped" in result.err
    assert len(result.out.splitlines()) >= 2


def test_text_that_only_begins_with_a_slash_is_a_message(chat: Run) -> None:
    assert len(chat("/etc/passwd is what?").out) > 1


def test_stats(chat: Run, atlas_dir: Path) -> None:
    lines = chat("/stats", MATH, "more", "/stats", argv=("--atlas", atlas_dir)).err.splitlines()
    assert lines[0] == "(no answer is finished yet)"
    assert "ended by length" in lines[1]
    assert re.fullmatch(r"\[2 answers \| .+ \| 16 tokens at [\d.]+/s\]", lines[2])
    assert re.fullmatch(r"\[memory: weights \d+ MB, 4-bit copies \d+ MB, in all \d+ MB, at most \d+ MB\]", lines[3])


def test_a_conversation_beyond_the_context_loses_its_oldest_turns(chat: Run, engine: Engine) -> None:
    long = "x" * 100
    result = chat(long, long, "end")
    assert "its oldest turn was dropped" in result.err
    answers = result.out.splitlines()
    last = engine.generate(messages("end"), max_new_tokens=8).text
    kept = engine.generate(messages(long, answers[1], "end"), max_new_tokens=8).text
    assert answers[2] == kept.splitlines()[0] != last


def test_a_message_beyond_the_context_is_left_out(chat: Run, engine: Engine) -> None:
    result = chat("x" * CONTEXT, "hi")
    assert "(the prompt has 274 tokens, and the model's context is 256. Shorten it" in result.err
    assert result.out == engine.generate(messages("hi"), max_new_tokens=8).text + "\n"


def test_chat_needs_a_chat_template(refused: Callable[..., str], tmp_path: Path) -> None:
    silent = save_model(tmp_path / "silent", chat=False)
    assert "the model has no chat template" in refused("chat", "--model", silent)


def test_chat_options_reach_the_engine(chat: Run, atlas_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    stream = Engine.stream

    def spy(self: Engine, prompt: Any, **options: Any) -> Stream:
        seen.update(options, atlas=self.atlas is not None)
        return stream(self, prompt, **options)

    monkeypatch.setattr(Engine, "stream", spy)
    chat("hi", argv=("--temperature", 0.5, "--seed", 1, "--atlas", atlas_dir, "--neighbours", 2))
    assert seen.items() >= {"temperature": 0.5, "seed": 1, "max_new_tokens": 8, "atlas": True}.items()


class Terminal:
    """A command on a terminal of its own; `run` is how it runs."""

    def __init__(self, argv: list[str], run: Callable[[list[str]], int] = main) -> None:
        self._fd, self._inner_fd = os.openpty()
        inner = Path(os.ttyname(self._inner_fd))
        self._process = start(inner, inner, argv, run)
        self.seen = ""

    def expect(self, words: str, seconds: float = 60) -> str:
        """Reads on until the words appear, and gives what came before them."""
        end = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < end, f"'{words}' did not appear in: {self.seen}"
            self._read(0.1)
        before, _, self.seen = self.seen.partition(words)
        return before

    def type(self, keys: str) -> None:
        os.write(self._fd, keys.encode())

    def exit_code(self) -> int | None:
        end = time.monotonic() + 30
        while self._process.is_alive() and time.monotonic() < end:
            self._read(0.05)
        while self._read(0):
            pass
        return self._process.exitcode

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        os.close(self._fd)
        os.close(self._inner_fd)

    def _read(self, timeout_sec: float) -> bool:
        """Whether more was there to read."""
        found = bool(select.select([self._fd], [], [], timeout_sec)[0])
        if found:
            self.seen += os.read(self._fd, 4096).decode()
        return found


@pytest.fixture
def terminal(model_dir: Path) -> Iterator[Terminal]:
    """A chat whose answers take a minute."""
    terminal = Terminal(["chat", "--model", str(model_dir), "--max-new-tokens", "200", "--no-history"], slowly)
    yield terminal
    terminal.close()


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(terminal: Terminal, engine: Engine) -> None:
    terminal.expect("/help shows more")
    terminal.expect("> ")
    terminal.type("hi\n")
    terminal.expect("hi\r\n")
    time.sleep(2)
    terminal.type("\x03")
    partial = terminal.expect(" (stopped)").replace("^C", "").replace("\r\n", "\n")
    partial = partial.removeprefix("\x1b[?2004l\r")  # the end of bracketed paste
    whole = engine.generate(messages("hi"), max_new_tokens=200).text
    assert 0 < len(partial) < 50
    assert whole.startswith(partial)
    terminal.expect("> ")
    terminal.type("\x03")
    terminal.expect("(Ctrl-D or /quit leaves)")
    terminal.expect("> ")
    terminal.type("/stats\n")
    terminal.expect("(no answer is finished yet)")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen


PASTE = "\x1b[200~one\rtwo\n\nthree\x1b[201~"


@pytest.fixture
def quick_chat(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Terminal]]:
    """Starts chats on terminals, which keep their history in one folder."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit knows no bracketed paste")
    monkeypatch.setenv("KNN_SSD_CACHE", str(tmp_path / "cache"))
    share_kernels(tmp_path / "cache")
    monkeypatch.setenv("TERM", "xterm")
    opened: list[Terminal] = []

    def begin(*argv: str, run: Callable[[list[str]], int] = main) -> Terminal:
        opened.append(Terminal(["chat", "--model", str(model_dir), "--max-new-tokens", "4", *argv], run))
        opened[-1].expect("/help shows more")
        opened[-1].expect("> ")
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.close()


def history_of(folder: Path) -> list[str]:
    file = folder / "cache" / "chat_history.jsonl"
    return [json.loads(line)["text"] for line in file.read_text().splitlines()] if file.exists() else []


def test_a_paste_of_several_lines_is_one_message(quick_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = quick_chat()
    terminal.type(PASTE)
    terminal.expect("three")
    terminal.type(" four\r")
    terminal.expect("> ")
    terminal.type("/stats\r")
    terminal.expect("[1 answer |")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    assert history_of(tmp_path) == ["one\ntwo\n\nthree four", "/stats"]


def test_the_history_is_kept_between_sessions(quick_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    for keys in (PASTE, "\x1b[A"):  # the second session goes one line up
        terminal = quick_chat()
        terminal.type(keys)
        terminal.expect("three")
        terminal.type("\r")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
    assert history_of(tmp_path) == ["one\ntwo\n\nthree"] * 2
    assert (tmp_path / "cache" / "chat_history.jsonl").stat().st_mode & 0o777 == 0o600


def test_no_history_is_kept_where_none_is_wanted(quick_chat: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = quick_chat("--no-history", run=afresh)
    terminal.type("hi\r")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.exit_code() == 0
    assert history_of(tmp_path) == []


def test_a_history_is_bounded_and_a_damaged_one_is_begun_anew(tmp_path: Path) -> None:
    from knn_ssd.cli.line_editor import MOST_KEPT, History

    path = tmp_path / "sub" / "history.jsonl"
    for number in range(3):
        History(path).add(f"{number}\nmore")
    with path.open("a") as file:
        file.write('{"text": "to')
    assert History(path).texts == ["0\nmore", "1\nmore", "2\nmore"]
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(2 * MOST_KEPT + 1)))
    assert History(path).texts == [str(i) for i in range(MOST_KEPT + 1, 2 * MOST_KEPT + 1)]
    assert len(path.read_text().splitlines()) == MOST_KEPT
    path.write_text("rubbish\n")
    assert History(path).texts == []
    with pytest.raises(OutputError):
        History(tmp_path).add("x")


def test_a_stopped_answer_stays_in_the_conversation(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from knn_ssd.cli import chat

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    next_, calls = Stream.__next__, iter(range(100))

    def stopped(self: Stream) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return next_(self)

    conversation = chat.Conversation(engine, {"max_new_tokens": 20, "plain": True})  # a token a round
    monkeypatch.setattr(Stream, "__next__", stopped)
    chat._reply(conversation, "hi")
    partial = engine.generate(messages("hi"), max_new_tokens=3).text
    assert conversation.messages == messages("hi", partial)
    assert capsys.readouterr().out == partial

    calls = iter([3])  # before the first word
    chat._reply(conversation, "again")
    assert conversation.messages == messages("hi", partial)


# ---- Atlas


def test_atlas_show(run: Run, atlas_dir: Path) -> None:
    result = run("atlas", "show", atlas_dir)
    assert (result.code, result.err) == (0, "")
    assert "LlamaForCausalLM, 4 layers of 32, 128 tokens, in float32" in result.out
    assert "routing accuracy 1" in result.out
    assert re.search(r"domain +anchors +radius +plan +vs plain +vs general +accepted +trials\n", result.out)
    assert re.search(
        r"math +1 +0\.5000 +skip attention 2 and MLP 1; +1\.25x +1\.08x +– +20\n +drafts up to 4 *\n", result.out
    )
    assert max(map(len, result.out.splitlines())) <= 100
    assert re.search(r"fallback +plain decoding", result.out)
    assert "math      attention ··S·\n          MLP       ·S··\nstory     attention ····\n" in result.out


def test_the_skip_map_has_a_mark_for_low(atlas: Atlas) -> None:
    from knn_ssd.cli import atlas_view

    keep, low = (Mode.KEEP,), (Mode.LOW,)
    plan = Plan(keep + low * 3, low + keep * 3, head=Mode.LOW)
    assert "fallback  attention ·lll\n          MLP       l···" in atlas_view.skip_map(replace(atlas, fallback=plan))


def test_a_domain_may_be_called_like_markup(run: Run, atlas: Atlas, tmp_path: Path) -> None:
    odd = replace(atlas, domains={"[red]": atlas.domains["math"]}, anchors=atlas.anchors[:1], anchor_domains=("[red]",))
    assert run("atlas", "show", odd.save(tmp_path / "odd")).out.count("[red]") == 2


def test_atlas_show_json_is_the_manifest(run: Run, atlas_dir: Path) -> None:
    assert json.loads(run("atlas", "show", atlas_dir, "--json").out) == json.loads((atlas_dir / MANIFEST).read_text())


def test_atlas_verify(run: Run, atlas_dir: Path, model_dir: Path) -> None:
    result = run("atlas", "verify", atlas_dir, "--model", model_dir)
    assert (result.code, result.err) == (0, "")
    assert result.out == f"OK: '{atlas_dir}' belongs to {model_dir}\n"


def test_atlas_verify_notes_another_dtype(run: Run, atlas: Atlas, model_dir: Path, tmp_path: Path) -> None:
    other = replace(atlas, fingerprint=replace(atlas.fingerprint, dtype="bfloat16")).save(tmp_path / "bf16")
    result = run("atlas", "verify", other, "--model", model_dir, "--dtype", "float32")
    assert result.code == 0
    assert result.err.startswith("note: the atlas was calibrated in bfloat16, and the model runs in float32")


def test_atlas_diff_of_the_same(run: Run, atlas_dir: Path, atlas_copy: Path) -> None:
    result = run("atlas", "diff", atlas_dir, atlas_copy)
    assert (result.code, result.out, result.err) == (0, "no difference\n", "")


def test_atlas_diff_lists_everything_that_matters(run: Run, atlas: Atlas, atlas_dir: Path, tmp_path: Path) -> None:
    changed = replace(
        atlas,
        fingerprint=replace(atlas.fingerprint, dtype="bfloat16"),
        pooling=Pooling.LAST,
        anchors=np.stack([atlas.anchors[1], atlas.anchors[0]]),
        anchor_domains=("math", "poem"),
        domains={
            "math": DomainEntry(
                Plan.skipping(NUM_LAYERS, attention=[2, 3], mlp=[1], policy=Policy(6, 0.5, True)), 0.25
            ),
            "poem": atlas.domains["story"],
        },
        fallback=Plan(fallback_modes := (Mode.LOW,) * NUM_LAYERS, fallback_modes, Mode.LOW, Policy(0)),
    ).save(tmp_path / "changed")
    result = run("atlas", "diff", atlas_dir, changed)
    assert result.code == 1
    assert (
        result.out.splitlines()
        == [
            "model: dtype is float32 in the first, bfloat16 in the second",
            "pooling: mean in the first, last in the second",
            "story: only in the first",
            "poem: only in the second",
            "math: skip sets of 2 and 3 sublayers overlap with Jaccard index 0.67",
            "math: policy's max_draft is 4 in the first, 6 in the second",
            "math: policy's threshold is 0.0 in the first, 0.5 in the second",
            "math: policy's lookup is False in the first, True in the second",
            "math: radius 0.5000 in the first, 0.2500 in the second",
            "math: other anchors: 1 in the first, 1 in the second",
            "fallback: low sets of 0 and 8 sublayers overlap with Jaccard index 0.00",
            "fallback: LM head keep in the first, low in the second",
            "fallback: policy's threshold is 0.8 in the first, 0.8 in the second",
        ][:-1]
    )


def test_atlas_push_and_pull(run: Run, atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(hub, "push", lambda *a, **k: calls.append((a, k)) or "https://hub/ada/atlas")
    monkeypatch.setattr(hub, "pull", lambda repo, out, **k: calls.append((repo, out, k)) or out)
    pushed = run("atlas", "push", atlas_dir, "ada/atlas", "--private", "--revision", "v1")
    pulled = run("atlas", "pull", "ada/atlas", "--out", tmp_path / "new", "--revision", "v1")
    assert (pushed.code, pushed.out) == (0, "https://hub/ada/atlas\n")
    assert (pulled.code, pulled.out) == (0, f"{tmp_path / 'new'}\n")
    assert calls == [
        ((atlas_dir, "ada/atlas"), {"private": True, "revision": "v1"}),
        ("ada/atlas", tmp_path / "new", {"revision": "v1"}),
    ]


def test_atlas_pull_to_a_place_that_is_taken(refused: Callable[..., str], atlas_dir: Path) -> None:
    assert "there is already something at" in refused("atlas", "pull", "ada/atlas", "--out", atlas_dir)


# ---- Plot


def test_plot(run: Run, atlas_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("plot", atlas_dir, "--out", tmp_path / "atlas.png")
    assert (result.code, result.out) == (0, f"{tmp_path / 'atlas.png'}\n")
    assert (tmp_path / "atlas.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("place", ["a-file/atlas.png", "/proc/atlas.png"])
def test_plot_to_a_place_that_cannot_be_written(
    place: str, refused: Callable[..., str], atlas_dir: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a-file").write_text("")
    assert "cannot be written" in refused("plot", atlas_dir, "--out", tmp_path / place)


def test_plot_without_matplotlib(
    refused: Callable[..., str], atlas_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install knn-ssd[plot]" in refused("plot", atlas_dir, "--out", tmp_path / "atlas.png")


# ---- Doctor


def test_doctor_json(run: Run, model_dir: Path) -> None:
    result = run("doctor", "--model", model_dir, "--dtype", "float32", "--device", "cpu", "--json")
    report = json.loads(result.out)
    assert result.code == 0
    assert report["model_dir"] == str(model_dir)
    assert (report["supported"], report["num_layers"], report["dtype"]) == (True, NUM_LAYERS, "float32")
    assert report["exactness"] in ("bitwise", "numerical")
    assert report["floor_sec_per_token"] == report["read_bytes_per_token"] / report["read_bandwidth_bytes_per_sec"]
    assert report["step_sec"] > 0


def test_doctor_shows_the_same_to_people(run: Run, model_dir: Path) -> None:
    result = run("doctor", "--model", model_dir)
    assert result.code == 0
    for words in ("read bandwidth", "GB/s", "kernels", "backend", "plain step", "supported", "bound", str(model_dir)):
        assert words in result.out


def test_doctor_without_a_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads(run("doctor", "--no-model", "--json").out)
    assert report["model_dir"] is None
    assert report["read_bandwidth_bytes_per_sec"] > 0
    monkeypatch.setattr("knn_ssd.tools.doctor.embedded_source", lambda: None)
    result = run("doctor")
    assert result.code == 0
    assert "name another with --model" in result.err


def test_doctor_of_a_model_that_cannot_draft(run: Run, tmp_path: Path) -> None:
    tiny_model("mamba").save_pretrained(tmp_path)
    result = run("doctor", "--model", tmp_path)
    assert result.code == 0
    assert "no: MambaForCausalLM has recurrent state" in result.out
