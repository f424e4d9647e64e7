"""The kernels' thread pool, as a C program under two compilers and their sanitisers, and the choice of its size."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import knn_ssd
from knn_ssd.errors import UsageError
from knn_ssd.kernels.threads import ThreadCount, thread_count

CSRC = Path(knn_ssd.__file__).parent / "kernels" / "csrc"
DRIVER = Path(__file__).parent / "c" / "thread_pool_driver.c"
FLAGS = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-g", "-pthread")
CONDITION_VARIABLE = "-DPOOL_CONDITION_VARIABLE"  # what threads sleep on where there is no futex
THREAD_SANITISER = "-fsanitize=thread"
ADDRESS_SANITISER = "-fsanitize=address,undefined"

QUICK_CASES = ("every_item_once", "no_items", "very_many_items", "threads_are_bounded", "signal_reaches_caller")
RACY_CASES = ("stress", "oversubscribed", "resized", "several_callers", "nested", "late_workers")
FORK_CASES = ("forked",)  # not under sanitisers: they refuse or hang in a forked child that starts threads
SLEEPY_CASES = ("held_up", "idle_is_idle")
every_compiler = pytest.mark.parametrize("compiler", ["gcc", "clang"])
every_wait = pytest.mark.parametrize("wait", ["", CONDITION_VARIABLE], ids=["default", "condition_variable"])

Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles the driver, once per compiler and flags."""
    folder = tmp_path_factory.mktemp("driver")

    @cache
    def compile_driver(compiler: str, *flags: str) -> Path:
        if shutil.which(compiler) is None:
            pytest.skip(f"{compiler} is not installed")
        driver = folder / f"{compiler}{len(list(folder.iterdir()))}"
        run(compiler, *FLAGS, *filter(None, flags), f"-I{CSRC}", str(DRIVER), "-o", str(driver))
        return driver

    return compile_driver


@pytest.fixture(scope="module")
def sanitised(compiled: Compile, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles the driver with a sanitiser, where the compiler has its runtime library and it can run here."""
    folder = tmp_path_factory.mktemp("sanitisers")

    @cache
    def obstacle(compiler: str, sanitiser: str) -> str | None:
        source, program = folder / "empty.c", folder / "empty"
        source.write_text("int main(void) { return 0; }\n")
        if shutil.which(compiler) is None:
            return f"{compiler} is not installed"
        for command in ([compiler, sanitiser, str(source), "-o", str(program)], [str(program)]):
            if subprocess.run(command, capture_output=True, check=False).returncode:
                return f"{compiler} {sanitiser} does not give a program that runs here"
        return None

    def compile_driver(compiler: str, sanitiser: str, *flags: str) -> Path:
        if reason := obstacle(compiler, sanitiser):
            pytest.skip(reason)
        return compiled(compiler, sanitiser, "-fno-sanitize-recover=all", "-O1", *flags)

    return compile_driver


def run(*command: str, **environment: str) -> None:
    variables = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, timeout=100)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-3000:]}"


@every_compiler
@pytest.mark.parametrize("standard", ["c11", "gnu11"])
def test_the_source_compiles_without_warnings(compiler: str, standard: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    flags = (*FLAGS, f"-std={standard}", "-Wpedantic", "-O3", "-fPIC", "-c", str(CSRC / "thread_pool.c"))
    run(compiler, *flags, "-o", str(tmp_path / "futex.o"))
    run(compiler, *flags, CONDITION_VARIABLE, "-o", str(tmp_path / "condition.o"))


@every_compiler
@every_wait
@pytest.mark.parametrize("case", [*QUICK_CASES, *RACY_CASES, *FORK_CASES, *SLEEPY_CASES])
def test_the_pool_keeps_its_promises(case: str, compiler: str, wait: str, compiled: Compile) -> None:
    run(str(compiled(compiler, "-O2", wait)), case, "2000")


def test_many_small_jobs(compiled: Compile) -> None:
    run(str(compiled("gcc", "-O2")), "stress", "100000")


def test_threads_that_sleep_at_once(compiled: Compile) -> None:
    run(str(compiled("gcc", "-O2", "-DSPIN_NS=0")), "stress", "10000")


@every_compiler
@every_wait
@pytest.mark.parametrize("case", ["every_item_once", *RACY_CASES])
def test_no_data_race(case: str, compiler: str, wait: str, sanitised: Compile) -> None:
    run(str(sanitised(compiler, THREAD_SANITISER, wait)), case, "1000", TSAN_OPTIONS="halt_on_error=1")


@every_compiler
@pytest.mark.parametrize("case", ["every_item_once", "very_many_items", *RACY_CASES])
def test_no_memory_error(case: str, compiler: str, sanitised: Compile) -> None:
    run(str(sanitised(compiler, ADDRESS_SANITISER)), case, "2000")


@pytest.mark.parametrize("case", ["several_callers", "resized"])
def test_nothing_leaks(case: str, compiled: Compile) -> None:
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    check = ("valgrind", "-q", "--leak-check=full", "--show-leak-kinds=all", "--errors-for-leak-kinds=all")
    run(*check, "--error-exitcode=3", "--fair-sched=yes", str(compiled("gcc", "-O2")), case, "100")


V1_MOUNT = "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2_MOUNT = "41 31 0:38 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V2_BESIDE_V1_MOUNT = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
OTHER_MOUNTS = (
    "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


def machine(root: Path, cgroups: str, mounts: str, files: dict[str, str]) -> Path:
    """A directory with the given files under `sys/fs/cgroup`, and what the kernel says of this process."""
    written = {"proc/self/cgroup": cgroups, "proc/self/mountinfo": OTHER_MOUNTS + mounts}
    for name, text in {**written, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2_machine(root: Path, cgroup: str, files: dict[str, str], mount_root: str = "/") -> Path:
    return machine(root, f"0::{cgroup}\n", V2_MOUNT.format(root=mount_root), files)


def v1_machine(root: Path, cgroup: str, files: dict[str, str], mount_root: str = "/") -> Path:
    cgroups = f"12:memory:/elsewhere\n4:cpu,cpuacct:{cgroup}\n1:name=systemd:/user\n"
    return machine(root, cgroups, V1_MOUNT.format(root=mount_root), files)


def count(root: Path, affinity_cpus: int = 8, **environment: str) -> ThreadCount:
    return thread_count(root, environment, affinity_cpus)


def test_without_quota_affinity_decides(tmp_path: Path) -> None:
    assert str(count(tmp_path, 3)) == "3: CPU affinity"
    assert count(v2_machine(tmp_path, "/a", {"a/cpu.max": "max 100000\n"}), 3) == ThreadCount(3, "CPU affinity")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
def test_affinity_is_that_of_the_process() -> None:
    assert thread_count(Path("/nowhere"), {}).threads == len(os.sched_getaffinity(0))


def test_this_machine() -> None:
    assert 1 <= thread_count().threads <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("50000 100000", ThreadCount(1, "cgroup v2 quota of 0.5 CPUs")),
        ("100000 100000", ThreadCount(1, "cgroup v2 quota of 1 CPU")),
        ("150000 100000", ThreadCount(2, "cgroup v2 quota of 1.5 CPUs")),
        ("20000 10000", ThreadCount(2, "cgroup v2 quota of 2 CPUs")),
        ("300000", ThreadCount(3, "cgroup v2 quota of 3 CPUs")),
        ("900000 100000", ThreadCount(8, "CPU affinity")),
        ("800000 100000", ThreadCount(8, "CPU affinity")),
        ("max 100000", ThreadCount(8, "CPU affinity")),
        ("", ThreadCount(8, "CPU affinity")),
        ("nonsense", ThreadCount(8, "CPU affinity")),
        ("100000 0", ThreadCount(8, "CPU affinity")),
    ],
)
def test_quota_of_version_2(quota: str, expected: ThreadCount, tmp_path: Path) -> None:
    assert count(v2_machine(tmp_path, "/app", {"app/cpu.max": quota})) == expected


def test_the_smallest_quota_of_all_ancestors_decides(tmp_path: Path) -> None:
    files = {
        "slice/cpu.max": "200000 100000",
        "slice/app/cpu.max": "600000 100000",
        "slice/app/leaf/cpu.max": "max 1000",
    }
    assert count(v2_machine(tmp_path, "/slice/app/leaf", files)) == ThreadCount(2, "cgroup v2 quota of 2 CPUs")


def test_quotas_of_other_groups_do_not_count(tmp_path: Path) -> None:
    files = {"other/cpu.max": "100000 100000", "app/below/cpu.max": "100000 100000"}
    assert count(v2_machine(tmp_path, "/app", files)).threads == 8


def test_in_a_container_the_mount_is_the_container_s_own_group(tmp_path: Path) -> None:
    files = {"cpu.max": "300000 100000", "inner/cpu.max": "200000 100000"}
    assert count(v2_machine(tmp_path / "namespace", "/", files)).threads == 3
    assert count(v2_machine(tmp_path / "same", "/docker/abc", files, mount_root="/docker/abc")).threads == 3
    assert count(v2_machine(tmp_path / "inner", "/docker/abc/inner", files, mount_root="/docker/abc")).threads == 2
    assert count(v2_machine(tmp_path / "outside", "/../sibling", files)).threads == 3


def test_quota_of_version_1(tmp_path: Path) -> None:
    folder = "cpu,cpuacct"
    files = {f"{folder}/a/cpu.cfs_quota_us": "250000\n", f"{folder}/a/cpu.cfs_period_us": "100000\n"}
    files |= {f"{folder}/cpu.cfs_quota_us": "-1\n", f"{folder}/cpu.cfs_period_us": "100000\n"}
    expected = ThreadCount(3, "cgroup v1 quota of 2.5 CPUs")
    assert count(v1_machine(tmp_path / "host", "/a", files)) == expected
    assert count(v1_machine(tmp_path / "child", "/a/b", files)) == expected
    assert count(v1_machine(tmp_path / "other", "/b", files)).threads == 8
    own = {name.replace("/a/", "/"): text for name, text in files.items() if "/a/" in name}
    assert count(v1_machine(tmp_path / "container", "/docker/abc", own, mount_root="/docker/abc")) == expected


def test_both_versions_are_read(tmp_path: Path) -> None:
    files = {"unified/a/cpu.max": "max 100000", "cpu,cpuacct/cpu.cfs_quota_us": "100000"}
    files |= {"cpu,cpuacct/cpu.cfs_period_us": "50000"}
    root = machine(tmp_path, "4:cpu,cpuacct:/\n0::/a\n", V1_MOUNT.format(root="/") + V2_BESIDE_V1_MOUNT, files)
    assert count(root) == ThreadCount(2, "cgroup v1 quota of 2 CPUs")


def test_the_environment_can_only_lower_the_number(tmp_path: Path) -> None:
    assert str(count(tmp_path, KNN_SSD_THREADS="2")) == "2: KNN_SSD_THREADS=2"
    assert count(tmp_path, KNN_SSD_THREADS="9") == ThreadCount(8, "CPU affinity")
    assert count(tmp_path, KNN_SSD_THREADS="") == ThreadCount(8, "CPU affinity")


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "²"])
def test_what_is_no_number_of_threads_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"whole number of at least 1, got '.*'\. Set it to"):
        count(tmp_path, KNN_SSD_THREADS=text)
