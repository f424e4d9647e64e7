"""`knn-ssd doctor`: shows what this machine offers, and how fast a model can run on it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from knn_ssd.cli import options, output
from knn_ssd.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from knn_ssd.tools.doctor import Examination, Machine, ModelReport


def add_parser(subparsers: Any) -> None:
    """Adds the command and its options."""
    parser = subparsers.add_parser(
        "doctor",
        description="Shows what this machine offers (kernels, read bandwidth) and how fast a model can run on it: "
        "whether it is supported, its backend and exactness, and the lower bound of seconds per token. A model that "
        "the native backend runs is run by the transformers backend as well, and eight plain steps of each are timed "
        "in turn.",
    )
    parser.add_argument("--no-model", action="store_true", help="examine the machine only")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options.add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Examines the machine and the model, and shows the result."""
    if args.no_model and (args.model is not None or args.device is not None or args.dtype != "auto"):
        raise UsageError(
            "--no-model leaves out the model, which --model, --dtype and --device are about", "Drop one or the other."
        )
    examination = _examine(args)
    if args.json:
        output.write_json(examination.to_json(), indent=1)
        return 0
    output.write_table(_table("this machine", _machine_rows(examination.machine)))
    if examination.model is not None:
        output.write_table(_table(examination.model.model, _model_rows(examination.model)))
    elif not args.no_model:
        output.note("note: the embedded model is not installed; name another with --model")
    return 0


def _examine(args: argparse.Namespace) -> Examination:
    from knn_ssd.tools import doctor

    if output.stderr_is_terminal():
        output.note("measuring …")
    if args.no_model or (args.model is None and doctor.embedded_source() is None):
        return doctor.Examination(doctor.examine_machine())
    return doctor.examine(args.model, args.dtype, args.device, args.revision)


def _machine_rows(machine: Machine) -> dict[str, str]:
    return {
        "versions": ", ".join(f"{package} {number}" for package, number in machine.versions.items()),
        "cpu": f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads: {machine.threads_because}",
        "cpu flags": _yes_and_no(machine.cpu_flags),
        "devices": ", ".join(machine.devices),
        "kernels": machine.kernels + _unit(machine),
        "read bandwidth": f"{machine.read_bandwidth_bytes_per_sec / 1e9:.1f} GB/s",
        "memory": f"{_gib(machine.memory_bytes)}, {_gib(machine.available_memory_bytes)} available",
        "cache directory": machine.cache_directory,
        "embedded model": machine.embedded_model or "not installed",
    }


def _unit(machine: Machine) -> str:
    """What multiplies bfloat16 weights, if it is not float32 instructions."""
    if machine.tiles:
        return ", with a tile unit (AMX)"
    return ", with bfloat16 instructions (AVX512_BF16)" if machine.rounds_inputs else ""


def _model_rows(report: ModelReport) -> dict[str, str]:
    rows = {
        "supported": "yes" if report.supported else f"no: {report.unsupported_because}",
        "directory": report.model_dir,
        "architecture": report.architecture
        and f"{report.architecture}, {report.num_layers} layers, {(report.parameters or 0) / 1e6:.2f}M parameters",
        "runs in": report.dtype and f"{report.dtype} on {report.device}",
        "weights": report.weight_bytes
        and f"{_megabytes(report.weight_bytes)}; {_megabytes(report.read_bytes_per_token)} are read per token",
        "lower bound": report.floor_sec_per_token and f"{_speed(report.floor_sec_per_token)}, by read bandwidth",
        "backend": report.backend and ": ".join(filter(None, (report.backend, report.why_not_native))),
        "kernels run": report.kernels_run,
        "plain step": report.step_sec and f"{_speed(report.step_sec)}, measured{_share(report)}",
        "backends compared": _comparison(report),
        "draft step": report.draft_step_sec
        and f"{_speed(report.draft_step_sec)}, in 4 bits; the 4-bit copies take {_megabytes(report.low_bit_bytes)}",
        "exactness": report.exactness and report.exactness.value,
        "context": report.context_length and f"{report.context_length} tokens",
    }
    return {name: str(value) for name, value in rows.items() if value}


def _share(report: ModelReport) -> str:
    """The share of the read bandwidth that a plain step uses."""
    if not report.floor_sec_per_token or not report.step_sec:
        return ""
    return f"; uses {report.floor_sec_per_token / report.step_sec:.0%} of the read bandwidth"


def _comparison(report: ModelReport) -> str | None:
    """How fast the transformers backend is beside the native one, and which of the two is taken."""
    if report.not_compared:
        return f"the transformers backend was not measured: {report.not_compared}"
    if not report.transformers_step_sec or not report.step_sec:
        return None
    native, other = report.step_sec, report.transformers_step_sec
    measured = f"transformers with the kernels: {_speed(other)}; native: {_speed(native)}"
    if native <= other:
        return f"{measured}. The native backend is taken: it is the faster one here"
    return f"{measured}. The native backend is taken, as for all models that it supports, though it is slower here"


def _table(title: str, rows: dict[str, str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _yes_and_no(found: dict[str, bool]) -> str:
    present = ", ".join(name for name, is_present in found.items() if is_present) or "none"
    missing = ", ".join(name for name, is_present in found.items() if not is_present)
    return f"{present}; without {missing}" if missing else present


def _gib(size_bytes: int | None) -> str:
    return "unknown" if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"


def _megabytes(size_bytes: int | None) -> str:
    return f"{(size_bytes or 0) / 1e6:.1f} MB"


def _speed(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms per token, {1 / seconds:.1f} tokens/s"
