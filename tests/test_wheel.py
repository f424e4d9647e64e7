"""The wheel brings compiled kernels: it runs where there is no compiler, no home and a CPU quota."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from zipfile import ZipFile

import pytest

from knn_ssd.kernels import build

ROOT = Path(__file__).parents[1]
CGROUPS = Path("/sys/fs/cgroup/cpu")  # of version 1, where this machine has it

pytestmark = pytest.mark.skipif(build.best_instruction_set() is None, reason="no wheel has kernels for this processor")


@pytest.fixture(scope="module")
def wheel(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet"]
        subprocess.run([*command, "--wheel-dir", str(folder)], cwd=ROOT, check=True)

    return next(made_once("wheel", make).glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, as an installer unpacks it."""
    folder = tmp_path_factory.mktemp("installed")
    with ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def quota() -> Iterator[Path | None]:
    """A control group with a quota of two CPUs; None where none can be made."""
    group = CGROUPS / f"knn-ssd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("200000")
    except OSError:
        yield None
        return
    yield group
    group.rmdir()


def bare_environment(package: Path, work: Path) -> dict[str, str]:
    """Variables with which a process finds the package, and neither a compiler, a home nor a cache."""
    return {"PATH": str(work / "nothing"), "PYTHONPATH": str(package), "TMPDIR": str(work), "HOME": "/dev/null/home"}


def run_bare(code: str, installed: Path, work: Path, quota: Path | None = None) -> str:
    """What a script prints that runs on the installed package without a compiler, a home or a cache."""
    enter = f"open({str(quota / 'cgroup.procs')!r}, 'w').write('0')\n" if quota is not None else ""
    done = subprocess.run(
        [sys.executable, "-c", enter + textwrap.dedent(code)],
        env=bare_environment(installed, work),
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_wheel_has_a_library_for_each_instruction_set(wheel: Path) -> None:
    libraries = {Path(name).stem for name in ZipFile(wheel).namelist() if name.endswith(".so")}
    assert libraries == set(build.own_instruction_sets())
    platform = sysconfig.get_platform() if sys.platform == "linux" else r"macosx-\d+.0-arm64"
    assert re.fullmatch(rf"knn_ssd-[\d.]+-py3-none-{re.sub('[-.]', '_', platform)}.whl", wheel.name)


def test_the_test_of_released_wheels_passes_without_any_dependency(installed: Path, tmp_path: Path) -> None:
    command = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["cibuildwheel"]["test-command"]
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without site-packages
    python.chmod(0o755)

    def tested(package: Path) -> int:
        variables = {"PATH": str(python.parent), "PYTHONPATH": str(package)}
        return subprocess.run(["/bin/sh", "-c", command], env=variables, check=False).returncode

    assert tested(installed) == 0
    assert tested(ROOT / "src") != 0, "a checkout has no libraries"


def test_the_best_library_of_a_wheel_runs_without_a_compiler_and_a_home(installed: Path, tmp_path: Path) -> None:
    printed = run_bare(
        """
        import knn_ssd
        from knn_ssd import Engine
        from knn_ssd.kernels import binding, build
        from knn_ssd.testing import tiny_model
        assert binding.kernels_obstacle() is None, binding.kernels_obstacle()
        engine = Engine(tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32))
        assert engine.generate([5, 6, 7], max_new_tokens=4).token_ids
        print(type(engine.backend).__name__, build.library_path(), knn_ssd.__file__)
        """,
        installed,
        tmp_path,
    )
    assert "NativeBackend" in printed
    assert str(installed / "knn_ssd" / "kernels" / "lib" / f"{build.best_instruction_set()}.so") in printed


def test_without_a_compiler_and_a_wheel_one_line_says_what_is_missing(tmp_path: Path) -> None:
    printed = run_bare(
        """
        from knn_ssd import Engine
        from knn_ssd.testing import tiny_model
        Engine(tiny_model("llama", hidden_size=96, intermediate_size=160, head_dim=32))
        """,
        ROOT / "src",
        tmp_path,
    )
    reported = [line for line in printed.splitlines() if "transformers backend" in line]
    assert len(reported) == 1
    assert "no C compiler was found" in reported[0]
    assert "Install gcc" in reported[0]


ONE_THREAD = {"KNN_SSD_THREADS": "1", "OMP_NUM_THREADS": "1"}


class TimedProcess:
    """A process that has loaded the default model and times forward passes of one row whenever it is asked to.

    Args:
        environment: its environment variables, of which PYTHONPATH says which package it runs.
        work: its current directory.
    """

    CODE = """
    import sys
    from knn_ssd import Engine, Mode, Plan
    from knn_ssd.tools.step_times import measure_step
    backend = Engine.from_pretrained().backend
    plans = [None, Plan.low(backend.num_layers)] if Mode.LOW in backend.modes else [None]
    print(type(backend).__name__, flush=True)
    for _ in sys.stdin:
        print(sum(measure_step(backend, plan) for plan in plans), flush=True)
    """

    def __init__(self, environment: dict[str, str], work: Path) -> None:
        command = [sys.executable, "-c", textwrap.dedent(self.CODE)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, env=environment, cwd=work, text=True, **pipes)
        self.fastest_sec = float("inf")

    def __enter__(self) -> TimedProcess:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._process.kill()
        self._process.communicate()

    def answer(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def time(self) -> None:
        """Times a full step and, where there are 4-bit weights, a draft step; keeps the smallest sum so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.fastest_sec = min(self.fastest_sec, float(self.answer()))


@pytest.mark.clock
@pytest.mark.real
def test_a_wheel_is_as_fast_as_kernels_compiled_for_this_processor(installed: Path, tmp_path: Path) -> None:
    """On one thread, in turns, as many as a busy machine needs."""
    environments = (
        bare_environment(installed, tmp_path),
        {**os.environ, "PYTHONPATH": str(ROOT / "src")},
        bare_environment(ROOT / "src", tmp_path),  # a checkout where there is no compiler
    )
    with ExitStack() as stack:
        processes = [stack.enter_context(TimedProcess(each | ONE_THREAD, tmp_path)) for each in environments]
        assert [each.answer() for each in processes] == ["NativeBackend", "NativeBackend", "TransformersBackend"]
        wheel, checkout, slow = processes
        for turn in range(30):
            for process in processes if turn < 3 else (wheel, checkout):
                process.time()
            if turn >= 2 and wheel.fastest_sec < 1.15 * checkout.fastest_sec:
                break
    assert wheel.fastest_sec < 1.15 * checkout.fastest_sec
    assert wheel.fastest_sec < slow.fastest_sec / 2


@pytest.mark.real
@pytest.mark.timeout(1200)  # it times plans, which takes long beside other tests
def test_the_demo_runs_in_a_container(installed: Path, tmp_path: Path, quota: Path | None) -> None:
    """No compiler, no home, two CPUs of a quota; fewer prompts and less search than `make demo` has."""
    printed = run_bare(
        f"""
        import os
        import runpy
        os.environ["KNN_SSD_WEIGHT_CACHE"] = "0"  # copies that could not be kept are not fitted, which takes minutes
        from knn_ssd.kernels.threads import thread_count
        print(thread_count())
        demo = runpy.run_path({str(ROOT / "examples" / "demo.py")!r})
        demo["run"].__globals__.update(
            CALIBRATED=3, JUDGED=2, NEW_TOKENS=12, SEARCH_MINUTES="0.1", PLANTED_TRIALS=12
        )
        assert demo["run"]() == 0
        """,
        installed,
        tmp_path,
        quota,
    )
    assert "All output was identical to plain decoding." in printed
    assert "is used. Set KNN_SSD_CACHE" in printed
    assert (tmp_path / "out" / "demo" / "atlas.png").is_file()
