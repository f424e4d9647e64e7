"""Other programs in the same tables: a run writes its prompts for them, and reads the records that they write.

Each program runs in an environment of its own: it reads `prompts.jsonl` and writes `peers/NAME.jsonl`, one record for
each prompt. See `benchmarks/peers/`. This module neither knows nor runs any of the programs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from knn_ssd.bench.records import Record, read_records
from knn_ssd.errors import BenchError
from knn_ssd.io import write_whole
from knn_ssd.prompts import Prompt

APART = "measured apart: another process, not interleaved"
_PROMPTS, _FOLDER = "prompts.jsonl", "peers"


def write_prompts(out: Path, prompts: Sequence[Prompt], encoded: Sequence[Sequence[int]]) -> None:
    """Writes the prompts of a run into its folder, one line each, in the order of the stream."""
    lines = [
        {"place": place, "id": prompt.id, "domain": prompt.domain, "token_ids": list(token_ids)}
        for place, (prompt, token_ids) in enumerate(zip(prompts, encoded, strict=True))
    ]
    write_whole(out / _PROMPTS, "".join(json.dumps(line) + "\n" for line in lines))


def read_peers(out: Path, own: Sequence[Record]) -> list[Record]:
    """Reads the records of other programs in the folder of a run.

    Args:
        out: the folder.
        own: the records of the run itself.

    Raises:
        BenchError: a file cannot be read, or was made for another run.
    """
    stream = {(record.place, record.prompt, record.domain) for record in own}
    taken = {record.method for record in own}
    found: list[Record] = []
    for path in sorted((out / _FOLDER).glob("*.jsonl")):
        records = read_records(path, "Make it again with its script in benchmarks/peers, or delete it.")
        for record in records:
            if record.method != path.stem or record.method in taken:
                raise BenchError(
                    f"'{path}' has records of the method '{record.method}'",
                    "A file holds one method, named like the file and unlike the methods of the run: rename it.",
                )
            if (record.place, record.prompt, record.domain) not in stream:
                raise BenchError(
                    f"'{path}' was made for other prompts: this run has no '{record.prompt}' at place {record.place}",
                    "Make it again for this folder, or delete it.",
                )
        found += records
    return found


def read_run(out: Path) -> list[Record]:
    """Reads all records in the folder of a run: its own, then those of other programs.

    Raises:
        BenchError: a file cannot be read, or was made for another run.
    """
    own = read_records(out / "records.jsonl")
    return own + read_peers(out, own)
