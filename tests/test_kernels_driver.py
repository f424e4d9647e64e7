"""The kernels without Python, run by a C driver; `make sanitize` and `make test-arm` run it with more cases."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from knn_ssd.kernels import build

DRIVER = Path(__file__).parent / "c" / "kernels_driver.c"


@pytest.fixture(scope="module")
def driver(compiled_kernels: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, with a library of the kernels for this processor."""
    library = compiled_kernels("cc", *build.NATIVE)
    program = tmp_path_factory.mktemp("kernels") / "driver"
    flags = (*build.FLAGS, "-O1", "-Werror", f"-I{build.SOURCE_FOLDER}", "-pthread")
    run("cc", *flags, str(DRIVER), str(library), "-o", str(program), "-lm")
    return program


def run(*command: str) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(command, capture_output=True, check=False, timeout=100)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr.decode()[-3000:]}"
    return done


@pytest.mark.parametrize("mode", ["exact", "outer", "callers", "quantise", "contract"])
def test_the_kernels_pass(mode: str, driver: Path) -> None:
    run(str(driver), mode, "7", {"exact": "14", "outer": "60", "callers": "2"}.get(mode, "20"))


@pytest.mark.parametrize("architecture", ["native", "x86-64", "x86-64-v3", "x86-64-v4", "x86-64-v4-vnni"])
def test_the_attention_of_drafts_is_that_of_the_formula_over_8_bit_keys_and_values(
    architecture: str, tmp_path: Path
) -> None:
    options = build.NATIVE
    if architecture == "x86-64":  # where vectors are the compiler's own, as on ARM
        if platform.machine() != "x86_64":
            pytest.skip("this is another machine")
        options = ("-march=x86-64",)
    elif architecture != "native":
        machine, options, needed = build.INSTRUCTION_SETS[architecture]
        if machine != platform.machine() or set(needed) - build.processor_features():
            pytest.skip(f"this machine does not run {architecture}")
    program = tmp_path / "driver"
    sources = map(str, sorted(build.SOURCE_FOLDER.glob("*.c")))
    flags = (*build.FLAGS, *options, "-O2", "-Werror", f"-I{build.SOURCE_FOLDER}", "-pthread")
    run("cc", *flags, str(DRIVER.with_name("attention_driver.c")), *sources, "-o", str(program), "-lm")
    run(str(program), "7", "300")


def test_a_difference_between_two_builds_is_found(driver: Path, tmp_path: Path) -> None:
    outputs, changed = tmp_path / "outputs", tmp_path / "changed"
    outputs.write_bytes(run(str(driver), "dump", "3").stdout)
    run(str(driver), "compare", str(outputs), str(outputs), "0")
    changed.write_bytes(b"\0\0\0\0" + outputs.read_bytes()[4:])
    with pytest.raises(AssertionError, match=r"1 of .* outputs differ"):
        run(str(driver), "compare", str(outputs), str(changed), "0")
