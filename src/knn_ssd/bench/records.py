"""Records of one method on one prompt: the lines of `records.jsonl`, which other programs may write too.

This module knows nothing of engines, so that records of any program can be read, merged and summarised.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from knn_ssd.errors import BenchError
from knn_ssd.io import JsonLines, cut_torn_line


@dataclass(frozen=True, slots=True)
class Record:
    """The result of one run of one method on one prompt.

    Args:
        prompt: the prompt's id.
        domain: the prompt's domain; None where it is unknown.
        method: the method's name.
        repeat: number of the repeat: 0, 1, …
        place: number of prompts before this one in the stream.
        token_ids: the output, up to and including the end-of-sequence token.
        total_sec: seconds from the prompt's token ids to the last output token.
        prefill_sec: seconds until the first token: prefill and routing; None where the program does not report it.
        route_sec: seconds of routing alone.
        rounds: number of rounds, the prefill counted as one.
        drafted, accepted: tokens by drafter; accepted ones reached the output.
        draft_sec, verify_sec: seconds of drafting and of verification; None where the program does not report them.
        by_length: for each draft length, the number of rounds with it, and of tokens accepted in them.
        routed_domain: the domain that the prompt was routed to; None without routing, or for the fallback plan.
        routed: whether the prompt was routed.
        lossless: whether the method claims the output of plain decoding.
        lossy: whether its weights or KV cache are rounded to fewer bits than the model's own.
        peak_memory_bytes: peak memory of the process so far.
    """

    prompt: str
    domain: str | None
    method: str
    repeat: int
    place: int
    token_ids: tuple[int, ...]
    total_sec: float
    prefill_sec: float | None = None
    route_sec: float = 0.0
    rounds: int = 0
    drafted: Mapping[str, int] = field(default_factory=dict)
    accepted: Mapping[str, int] = field(default_factory=dict)
    draft_sec: float | None = None
    verify_sec: float | None = None
    by_length: Mapping[str, Sequence[int]] = field(default_factory=dict)
    routed_domain: str | None = None
    routed: bool = False
    lossless: bool = True
    lossy: bool = False
    peak_memory_bytes: int | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """The fields that identify a record within a run."""
        return (self.method, self.place, self.repeat)

    @property
    def decode_sec(self) -> float | None:
        """Seconds after the first token; None where `prefill_sec` is unknown."""
        return None if self.prefill_sec is None else self.total_sec - self.prefill_sec

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Makes a record of an object that `to_json` or another program made.

        Raises:
            TypeError, ValueError: the object is not a record.
        """
        known = {f.name for f in fields(cls)}
        record = cls(**{name: value for name, value in data.items() if name in known})
        token_ids = tuple(int(token) for token in record.token_ids)
        if not token_ids or record.total_sec <= 0:
            raise ValueError("a record needs tokens and the seconds that they took")
        return cls(**{**asdict(record), "token_ids": token_ids})

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return asdict(self)


def read_records(path: Path, remedy: str = "Start again with another --out.") -> list[Record]:
    """Reads the records of a file. A torn last line, as a killed run leaves it, is left out.

    Args:
        path: the file.
        remedy: the error's advice on a line that is no record.

    Raises:
        BenchError: the file cannot be read, or another line is no record.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"'{path}' cannot be read: {error}", "Check the path.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_json(json.loads(line)))
        except (TypeError, ValueError, AttributeError) as error:
            if number == len(lines):  # every whole line ends with a newline
                break
            raise BenchError(f"'{path}', line {number} is not a record: {error}", remedy) from error
    return records


class RecordFile:
    """A file of records that grows line by line.

    Args:
        path: the file; an existing one is continued, without a torn last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_records(path) if path.exists() else []
        cut_torn_line(path)

    def append(self, records: Iterable[Record]) -> None:
        """Adds all of the records, or none.

        Raises:
            OutputError: the file cannot be written.
        """
        records = list(records)
        JsonLines(self.path).append(record.to_json() for record in records)
        self.records += records
