"""The documentation is true: its Python runs, its commands parse, its links and paths exist, its lists are complete.

Models and atlases that the pages name are replaced by tiny ones, so nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import transformers

import knn_ssd
from knn_ssd import errors
from knn_ssd.atlas import Atlas, DomainEntry
from knn_ssd.backends.base import Pooling
from knn_ssd.calibrate.settings import MIXTURE, CalibrationSettings
from knn_ssd.cli import _parser
from knn_ssd.cli.results import generation_json
from knn_ssd.engine import Engine
from knn_ssd.loading import resolve
from knn_ssd.loading.fingerprint import Fingerprint, fingerprint
from knn_ssd.loading.resolve import LoadedModel
from knn_ssd.outputs import Generation, Stats
from knn_ssd.plan import Plan, Policy
from knn_ssd.speculation.cost_model import CostProfile
from knn_ssd.testing import FAMILIES, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "knn_ssd"
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
COMPILED_ONLY = "<!-- compiled only: "
MAX_QUICKSTART_LINES = 30

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Args:
        language: the word after the opening fence.
        code: its lines.
        line: the number of the page's line at which the code begins.
        before: the line before the fence.
    """

    language: str
    code: str
    line: int
    before: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in the given languages; all of them where none is given."""
    text = page.read_text("utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        found.append(Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1, before))
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def table_rows(page: Path) -> list[list[str]]:
    lines = [line for line in prose(page).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- Python


@pytest.fixture
def tiny_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """Every model that is loaded is a tiny one; the working folder has its atlas and a file of prompts."""
    loaded = LoadedModel(tiny_model(), tiny_tokenizer(chat=True), "tiny", None)
    auto = {"AutoModelForCausalLM": loaded.model, "AutoTokenizer": loaded.tokenizer}
    for name, result in auto.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, result=result, **__: result)
    monkeypatch.setattr(resolve, "load_model", lambda *_, **__: loaded)
    monkeypatch.chdir(tmp_path)
    tiny_atlas(loaded).save("atlas")
    prompts = [{"prompt": f"{domain} {i}", "domain": domain} for domain in ("math", "story") for i in range(4)]
    Path("prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)), "utf-8")
    return loaded


def tiny_atlas(loaded: LoadedModel) -> Atlas:
    engine = Engine(loaded.model, loaded.tokenizer)
    vectors = []
    for prompt in ("What is 12 + 7?", "Tell me a story about a fox."):
        token_ids = engine.encode(prompt)
        vectors.append(engine.backend.open(len(token_ids)).prefill(token_ids).mean.numpy())
    layers = engine.backend.num_layers
    return Atlas(
        fingerprint=fingerprint(loaded.model, loaded.tokenizer),
        pooling=Pooling.MEAN,
        anchors=np.stack(vectors),
        anchor_domains=("math", "story"),
        domains={
            "math": DomainEntry(Plan.skipping(layers, mlp=[2], policy=Policy(4, 0.0)), 0.5),
            "story": DomainEntry(Plan.skipping(layers, attention=[3], policy=Policy(3, 0.2)), 0.5),
        },
        fallback=Plan.plain(layers),
        cost=CostProfile(0.01, 0.001, 0.002, (0.01, 0.011)),
    )


@every_page
def test_all_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block.code, f"{page.name}:{block.line}", "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_a_page_s_python_runs_from_top_to_bottom(
    page: Path, tiny_world: LoadedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        if not block.before.startswith(COMPILED_ONLY):
            padding = "\n" * (block.line - 1)  # so that a traceback names the page's own line
            exec(compile(padding + block.code, str(page), "exec"), names)
    assert "Error" not in capsys.readouterr().out


def test_quickstart_runs_on_any_model_and_is_short(
    tiny_world: LoadedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quickstart = ROOT / "examples" / "quickstart.py"
    assert len(quickstart.read_text("utf-8").splitlines()) <= MAX_QUICKSTART_LINES
    monkeypatch.setattr("sys.argv", [str(quickstart), "Hello!"])
    runpy.run_path(str(quickstart), run_name="__main__")
    assert "identical to plain decoding: True" in capsys.readouterr().out


# ---- Shell


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page's shell blocks as lists of words: a pipe or redirection ends one, comments are dropped."""
    for block in blocks(page, "sh", "console", "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "|"]:
                if word in {"|", "||", "&&", ";", ">", ">>", "<"}:
                    yield words
                    words = []
                else:
                    words.append(word)


@every_page
def test_every_knn_ssd_line_parses(page: Path) -> None:
    for words in commands(page):
        if words[:1] == ["knn-ssd"] and words[1:2] != ["COMMAND"]:
            _parser(words[1:]).parse_args(words[1:])


def test_a_line_that_does_not_parse_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\nknn-ssd doctor --json | head   # fine\nknn-ssd generate --prompts a --atlsa b > c\n```\n")
    fine, _, wrong, _ = commands(page)
    assert fine == ["knn-ssd", "doctor", "--json"]
    assert _parser(fine[1:]).parse_args(fine[1:]).json
    with pytest.raises(errors.UsageError, match="atlsa"):
        _parser(wrong[1:]).parse_args(wrong[1:])


@every_page
def test_every_make_target_and_script_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for words in commands(page):
        if words[:1] == ["make"]:
            assert set(words[1:]) <= targets
        for word in words:
            assert not word.endswith(".py") or (ROOT / word).is_file(), word


def test_the_page_of_commands_is_what_the_commands_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    page = ROOT / "docs" / "cli.md"
    spec = importlib.util.spec_from_file_location("generate_cli", page.with_name("generate_cli.py"))
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    # Versions of Python break lines at other places, so line breaks are not compared.
    assert page.read_text("utf-8").split() == generator.page().split(), "run `python docs/generate_cli.py`"


# ---- Links and the tree


def slug(heading: str) -> str:
    """The anchor that a heading gets on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(linked), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, link


@every_page
def test_folders_and_files_that_prose_names_exist(page: Path) -> None:
    made_by_users = ("runs/", "ATLAS", "atlas/")
    for name in re.findall(r"`(\w[\w/-]*/(?:[\w-]+\.(?:py|c|html|sh|txt))?)`", prose(page)):
        if not name.startswith(made_by_users):
            assert any((base / name).exists() for base in (ROOT, ROOT / "src", PACKAGE)), name


def tree() -> dict[str, str]:
    """The README's tree: the purpose of each path, in order."""
    (block,) = (block for block in blocks(README, "text") if block.code.startswith("src/knn_ssd/"))
    purposes: dict[str, str] = {}
    folders: list[str] = []
    for line in block.code.splitlines():
        name, purpose = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        purposes["".join(folders)] = purpose
    return purposes


def test_the_tree_names_every_file_of_the_package_and_no_other() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    of_folders = {f"{path}__init__.py" for path in tree() if path.endswith("/")}  # a folder's line stands for it
    named = {path for path in tree() if path.startswith("src/") and not path.endswith("/")}
    assert named | (of_folders & files) == files


def test_what_else_the_tree_names_is_there() -> None:
    for path, purpose in tree().items():
        place = ROOT / path
        assert place.is_dir() if path.endswith("/") else place.is_file(), path
        assert purpose
    for folder, pattern in (("docs", "*.*"), ("examples", "*.py")):
        assert {f"{folder}/{path.name}" for path in (ROOT / folder).glob(pattern)} <= set(tree())


# ---- Tables and lists that have to be whole


def test_the_readme_names_the_families_and_where_measured_output_goes() -> None:
    text = README.read_text("utf-8")
    for family in FAMILIES:
        assert f"`{family}`" in text
    assert "### What make demo shows\n" in text


def test_the_python_page_names_everything_public() -> None:
    text = (ROOT / "docs" / "python.md").read_text("utf-8")
    for name in knn_ssd.__all__:
        assert name in text
    for kind in (Generation, Stats, knn_ssd.Round):
        for field in fields(kind):
            assert re.search(rf"\b{field.name}\b", text), f"{kind.__name__}.{field.name}"
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.KnnSsdError) and value is not errors.KnnSsdError:
            assert f"| `{name}` |" in text


def test_the_format_page_names_every_field_of_an_atlas() -> None:
    page = ROOT / "docs" / "atlas-format.md"
    named = {word for row in table_rows(page) for cell in row for word in re.findall(r"`(\w+)`", cell)}
    manifest = json.loads((ROOT / "tests" / "golden" / "atlas-v1" / "atlas.json").read_text("utf-8"))
    plan = manifest["fallback"]["plan"]
    assert {*manifest, *plan, *plan["policy"], "anchors", "vectors", "plan", "radius"} <= named
    assert {field.name for kind in (Fingerprint, CostProfile) for field in fields(kind)} <= named
    for block in blocks(page, "json"):
        assert Plan.from_json(json.loads(block.code)).to_json() == json.loads(block.code)


def test_the_table_of_settings_has_all_of_them_with_their_defaults() -> None:
    rows = {
        row[1].strip("`"): row
        for row in table_rows(ROOT / "docs" / "calibration.md")
        if row[0].startswith("`--") and len(row) == 4
    }
    options = _parser(["calibrate"]).parse_args(["calibrate", "--out", "atlas"])
    settings = CalibrationSettings()
    assert set(rows) == {field.name for field in fields(CalibrationSettings)}
    for name, (option, _, default, _) in rows.items():
        assert hasattr(options, option.strip("`").removeprefix("--").replace("-", "_"))
        value = getattr(settings, name)
        if value is not None and not isinstance(value, bool):
            assert default.strip("`") == str(value), name
    assert settings.num_trials(5, False, "any") == 6 * 5 + 40
    assert (settings.num_trials(5, True, "any"), settings.num_trials(5, True, MIXTURE)) == (16, 2 * 5 + 16)


def test_the_table_of_clients_has_those_that_are_installed_with_their_versions() -> None:
    wanted: dict[str, list[str]] = {}
    for file in sorted((ROOT / "tests" / "clients").glob("*/requirements.in")):
        asked = re.findall(r"^[a-z-]+", file.read_text("utf-8"), re.M)
        pinned = dict(re.findall(r"^(\S+)==(\S+)$", file.with_suffix(".txt").read_text("utf-8"), re.M))
        for client in set(asked) - {"pytest", "pytest-timeout", "torch"}:
            wanted.setdefault(client, []).append(pinned[client])
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    table = page.partition("## Clients that were tried")[2].partition("\n## ")[0]
    shown = dict(re.findall(r"^\| ([a-z-]+) \| ([\d., ]+) \|", table, re.M))
    assert {client: versions.split(", ") for client, versions in shown.items()} == wanted


def test_the_command_page_names_every_key_of_generate_json() -> None:
    engine = Engine(
        tiny_model(), tiny_tokenizer(), tiny_atlas(LoadedModel(tiny_model(), tiny_tokenizer(), "tiny", None))
    )
    printed = generation_json("id", engine.generate("Hello!", max_new_tokens=2))
    assert isinstance(printed["route"], dict)
    named = {
        word for row in table_rows(ROOT / "docs" / "cli.md") for cell in row for word in re.findall(r"`(\w+)`", cell)
    }
    assert {*printed, *printed["stats"], *printed["route"]} <= named


def test_pages_hold_no_path_of_a_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(home|work|root|Users|tmp)/", page.read_text("utf-8")), page.name
