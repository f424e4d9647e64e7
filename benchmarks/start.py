"""Times starts: from the command to two tokens, with an empty weight cache and with what that start left there.

    python benchmarks/start.py [--model M] [--repeats N]

Medians of whole commands in seconds. Kernels are compiled, and a GGUF file is converted, before the first one is timed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path


def seconds(command: list[str], environment: Mapping[str, str]) -> float:
    """Time of a command, which must succeed."""
    started = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    generate = [sys.executable, "-m", "knn_ssd", "generate", "--prompt", "The sky is", "--max-new-tokens", "2"]
    command = generate + (["--model", args.model] if args.model else [])
    taken: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KNN_SSD_CACHE": folder}
        seconds(command, environment)
        for _ in range(args.repeats):
            shutil.rmtree(Path(folder) / "weights", ignore_errors=True)
            for name in ("empty weight cache", "second start"):
                taken.setdefault(name, []).append(seconds(command, environment))
            imports = [sys.executable, "-c", "import torch, transformers.models.auto.modeling_auto"]
            taken.setdefault("importing torch and transformers", []).append(seconds(imports, environment))
    for name, each in taken.items():
        print(f"{name:36} {statistics.median(each):7.2f} s")


if __name__ == "__main__":
    main()
