"""The shape of the code: imports point one way, one thing is done in one place, and what should be light is light."""

from __future__ import annotations

import ast
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import knn_ssd

PACKAGE = Path(knn_ssd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())

# From the shell inwards. A part is a file, a folder, or a file in a folder that stands apart from the rest of it. A
# module may import from its own part and from any later row; never from another part of its own row.
ROWS = (
    ("__init__", "__main__"),
    ("cli",),
    ("server", "bench", "vllm_plugin"),
    ("calibrate", "tools"),
    ("engine",),
    ("request_factory",),
    ("request", "request_options"),
    ("outputs", "owner", "scoring", "batching", "speculation.drafter_factory"),
    ("speculation.decode", "speculation.controller"),
    ("speculation.lookup", "speculation.retrieval", "speculation.self_draft", "speculation.acceptance"),
    ("speculation.grammar_draft",),
    ("speculation.drafter", "speculation.suffix_automaton"),
    ("sampling", "routing", "tokenization"),
    ("prompts", "atlas", "data", "grammar_state"),
    ("loading",),
    ("backends.select",),
    ("backends.native.backend", "backends.transformers.kernel_backend"),
    ("backends.transformers.backend",),
    ("backends.native", "backends.transformers"),
    ("backends.exactness", "backends.structure", "backends.native.kv_cache"),
    ("backends.cursor",),
    ("backends",),
    ("weight_cache",),
    ("speculation.cost_model", "loading.fingerprint"),
    ("loading.files", "speculation", "kernels"),
    ("plan", "io", "progress", "stop_strings", "tools.memory", "grammar"),
    ("checks", "cgroups"),
    ("errors",),
)
ROW_OF = {part: number for number, row in enumerate(ROWS) for part in row}
FREE = "testing"  # may import anything, and is imported by nothing

MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = 350


def part_of_name(name: str) -> str:
    """The part that a module belongs to: the longest known beginning of its dotted name within the package."""
    words = name.split(".")
    beginnings = [".".join(words[:count]) for count in range(len(words), 0, -1)]
    return next((each for each in beginnings if each in ROW_OF or each == FREE), words[0])


def part_of(file: Path) -> str:
    """The part of the package that a file belongs to."""
    return part_of_name(".".join(file.relative_to(PACKAGE).with_suffix("").parts))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


def walk_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield from walk_at_run_time(child)


def imported_parts(file: Path) -> set[str]:
    """The parts of this package that a file imports, at its top or within a function."""
    names: set[str] = set()
    for node in walk_at_run_time(tree_of(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno} imports relatively; imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    inner = [name.partition(".")[2] for name in names if name.split(".")[0] == "knn_ssd"]
    known = {each.split(".")[0] for each in (*ROW_OF, FREE)}
    return {part_of_name(name) if name.split(".")[0] in known else "__init__" for name in inner}


@every_file
def test_every_file_has_its_place(file: Path) -> None:
    assert part_of(file) in {*ROW_OF, FREE}, f"give {part_of(file)} a row in ROWS"


@every_file
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(file)
    if part == FREE:
        return
    wrong = {other for other in imported_parts(file) - {part} if other == FREE or ROW_OF[other] <= ROW_OF[part]}
    assert not wrong, f"{part} must not import {', '.join(sorted(wrong))}"


def test_the_rule_can_fail() -> None:
    assert "cli" in imported_parts(PACKAGE / "__main__.py")
    assert "speculation.decode" in imported_parts(PACKAGE / "request.py")
    assert ROW_OF["cli"] < ROW_OF["engine"] < ROW_OF["speculation.decode"] < ROW_OF["backends"] < ROW_OF["errors"]


@every_file
def test_no_file_is_longer_than_one_reads_in_a_sitting(file: Path) -> None:
    assert len(file.read_text("utf-8").splitlines()) <= MAX_FILE_LINES


@every_file
def test_no_function_is_longer_than_a_screen(file: Path) -> None:
    functions = [n for n in ast.walk(tree_of(file)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: n for f in functions if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION_LINES}
    assert not long


@every_file
def test_nothing_is_global_swallowed_or_printed(file: Path) -> None:
    found = []
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Global):
            found.append(f"line {node.lineno}: global")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append(f"line {node.lineno}: a bare except")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and part_of(file) != "cli":
            found.append(f"line {node.lineno}: print")
    assert not found


@every_file
def test_every_module_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(tree_of(file)) or not file.read_text("utf-8").strip()


@cache
def places_of_calls() -> dict[str, set[str]]:
    """Where functions and methods of each name are called: `part.function`."""
    places: dict[str, set[str]] = {}
    for file in FILES:
        for function in ast.walk(tree_of(file)):
            if isinstance(function, ast.FunctionDef):
                place = f"{file.relative_to(PACKAGE).with_suffix('').as_posix()}.{function.name}"
                for call in (node.func for node in ast.walk(function) if isinstance(node, ast.Call)):
                    places.setdefault(getattr(call, "attr", getattr(call, "id", "")), set()).add(place)
    return places


def test_the_acceptance_rule_exists_once() -> None:
    assert places_of_calls()["Verdict"] == {"speculation/decode.accept"}
    assert places_of_calls()["uniform"] == {"speculation/decode.accept"}
    assert places_of_calls()["accept"] == {"speculation/decode.decode"}
    assert places_of_calls()["verify"] == {"speculation/decode.decode"}


def test_no_two_modules_define_the_same_public_name() -> None:
    """Whoever searches for a name finds one thing. The commands of the CLI have one interface, so they are left out."""
    homes: dict[str, list[str]] = {}
    for file in FILES:
        if part_of(file) == "cli":
            continue
        for node in tree_of(file).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(file.relative_to(PACKAGE).as_posix())
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_a_session_does_not_know_its_backend() -> None:
    """It hands plain requests to the function that it was opened with."""
    for kind in ("native", "transformers"):
        source = (PACKAGE / "backends" / kind / "session.py").read_text("utf-8")
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
        assert not {name for name in names if "backend" in name.lower()}


def test_serving_sets_no_attributes_of_the_engine() -> None:
    for file in (PACKAGE / "server").glob("*.py"):
        for node in ast.walk(tree_of(file)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            stored = [ast.unparse(target) for target in targets if isinstance(target, ast.Attribute)]
            assert not [each for each in stored if "engine." in each or "backend." in each or "cost_model." in each]


def test_from_the_shell_to_the_kernels_there_are_seven_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from knn_ssd.backends.native.backend import NativeBackend
    from knn_ssd.cli import main
    from knn_ssd.kernels.binding import kernels_obstacle
    from knn_ssd.testing import tiny_model, tiny_tokenizer

    if kernels_obstacle() is not None:
        pytest.skip("no kernels here")
    tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32).save_pretrained(tmp_path)
    tiny_tokenizer(chat=True).save_pretrained(tmp_path)
    deepest: list[str] = []
    forward_batch = NativeBackend.forward_batch

    def watched(backend: NativeBackend, requests: Sequence[Any]) -> Any:
        frames = traceback.extract_stack()
        if any(frame.name == "verify" for frame in frames):
            own = [frame.filename for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)]
            deepest[:] = list(dict.fromkeys(own))
        return forward_batch(backend, requests)

    monkeypatch.setattr(NativeBackend, "forward_batch", watched)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a fox", "--max-new-tokens", "4"]) == 0
    capsys.readouterr()
    assert deepest, "no verification ran"
    assert len({*deepest, str(PACKAGE / "backends" / "native" / "backend.py")}) <= 7


def _imported_by(code: str, *arguments: str) -> set[str]:
    """Which of the heavy packages are loaded after some code ran in a fresh interpreter."""
    script = f"import sys\nsys.argv = {['knn-ssd', *arguments]!r}\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    script += "sys.stderr.write(' '.join(sorted({'torch', 'transformers', 'sklearn', 'optuna'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("module", ["knn_ssd", "knn_ssd.plan", "knn_ssd.atlas", "knn_ssd.prompts", "knn_ssd.errors"])
def test_importing_what_knows_nothing_of_models_does_not_import_torch(module: str) -> None:
    assert _imported_by(f"import {module}") == set()


def test_asking_the_command_line_for_help_does_not_import_torch() -> None:
    cli = pytest.importorskip("knn_ssd.cli")
    if not hasattr(cli, "main"):
        pytest.skip("knn_ssd.cli has no main yet")
    assert _imported_by("from knn_ssd.cli import main; main()", "--help") == set()
    done = subprocess.run([sys.executable, "-m", "knn_ssd", "--help"], capture_output=True, text=True, check=True)
    assert "calibrate" in done.stdout
