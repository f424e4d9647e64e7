"""What one method did with one prompt: the lines of `records.jsonl`, which other programs may write too.

It knows nothing of engines, so that records of any program can be read, merged and summarised.
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
    """One method on one prompt, once.

    Args:
        prompt: its id.
        domain: of the prompt; None if nobody said.
        method: which.
        repeat: 0, 1, …
        place: how many prompts of the stream came before.
        token_ids: the output, up to the end-of-sequence token and no further.
        total_sec: from the prompt's token ids to the last output token's.
        prefill_sec: the part before the first token, the pass over the prompt and the routing; None where the program
            does not say.
        route_sec: the routing alone.
        rounds: passes of the full model after the prompt's, and one.
        drafted, accepted: tokens by source; accepted ones reached the output.
        draft_sec, verify_sec: the parts of the rounds; None where the program does not say.
        by_length: for each length of a draft, how many rounds had it, and how many of their tokens were accepted.
        domain: where the prompt was routed; None without a router, or where it went to the fallback.
        routed: whether a router was asked.
        lossless: whether the method claims to say what plain decoding says.
        lossy: whether the weights or the cache that it ran on are not the model's own, but rounded to fewer bits.
        peak_memory_bytes: of the process so far.
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
        """What makes a record unique within a run."""
        return (self.method, self.place, self.repeat)

    @property
    def decode_sec(self) -> float | None:
        """What comes after the first token."""
        return None if self.prefill_sec is None else self.total_sec - self.prefill_sec

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Reads an object that `to_json` wrote, or another program.

        Raises:
            TypeError, ValueError: not such an object.
        """
        known = {f.name for f in fields(cls)}
        record = cls(**{name: value for name, value in data.items() if name in known})
        token_ids = tuple(int(token) for token in record.token_ids)
        if not token_ids or record.total_sec <= 0:
            raise ValueError("a record needs tokens and the seconds that they took")
        return cls(**{**asdict(record), "token_ids": token_ids})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_records(path: Path, remedy: str = "Start again with another --out.") -> list[Record]:
    """The records of a file; a last line that was cut short is passed over, as a killed run leaves it.

    Args:
        path: of the file.
        remedy: what to do about a line that is no record.

    Raises:
        BenchError: a file that cannot be read, or another line that is no record.
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
        path: of the file; what is there is kept, but for a last line that was cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records = read_records(path) if path.exists() else []
        cut_torn_line(path)

    def append(self, records: Iterable[Record]) -> None:
        """Adds records, all of them or none.

        Raises:
            OutputError: a full disk, or no permission.
        """
        records = list(records)
        JsonLines(self.path).append(record.to_json() for record in records)
        self.records += records
