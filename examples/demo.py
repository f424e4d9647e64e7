"""The main job, from nothing: calibrate a real model on five domains, then route, draft, verify and compare.

Run by `make demo`. Everything it prints is measured while it runs; what it leaves is under out/demo.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from knn_ssd import Atlas, Engine, Generation, Plan
from knn_ssd.calibrate.pipeline import calibrate
from knn_ssd.calibrate.settings import CalibrationSettings
from knn_ssd.cli import main
from knn_ssd.loading.resolve import LoadedModel, load_model
from knn_ssd.prompts import BUILTIN_DOMAINS, Prompt, builtin_prompts
from knn_ssd.testing import planted_tiny_model, tiny_tokenizer

OUT = Path("out/demo")
CALIBRATED = 12  # prompts per domain; the ones shown below come after these
NEW_TOKENS = 48
console = Console() if Console().is_terminal else Console(width=140)


def calibrate_the_real_model() -> Path:
    """Calibrates the embedded model with the command that a user would type."""
    path = OUT / "atlas"
    if path.exists():
        console.print(f"The atlas of an earlier run is at [bold]{path}[/]; remove it to calibrate again.")
        return path
    command = ["calibrate", "--out", str(path), "--vector-prompts", str(CALIBRATED),
               "--search-prompts", "2", "--new-tokens", "20", "--minutes", "1.3", "--resume"]  # fmt: skip
    console.print(f"$ knn-ssd {' '.join(command)}")
    if (code := main(command)) != 0:
        sys.exit(code)
    return path


def show_routed_decoding(engine: Engine, prompts: Sequence[Prompt]) -> bool:
    """One prompt of each domain, plain and as the atlas has it; whether all output was identical."""
    table = Table(title="Routed decoding: one prompt per domain that calibration has not seen", title_justify="left")
    for column in ("domain", "routed to", "plan", "drafted", "accepted", "identical to plain", "speed over plain"):
        table.add_column(column, overflow="fold")
    identical = True
    engine.generate(prompts[0].prompt, max_new_tokens=4)  # makes the low-bit copies, once
    for prompt in prompts:
        plain = engine.generate(prompt.prompt, max_new_tokens=NEW_TOKENS, plain=True)
        routed = engine.generate(prompt.prompt, max_new_tokens=NEW_TOKENS)
        assert routed.route is not None
        identical = identical and routed.token_ids == plain.token_ids
        domain = routed.route.domain + (" (far: fallback)" if routed.route.fallback else "")
        speed = plain.stats.decode_sec / routed.stats.decode_sec
        table.add_row(prompt.domain, domain, routed.plan.describe(), *counts(routed, plain), f"{speed:.2f}x")
    console.print(table)
    return identical


def show_forced_drafts(engine: Engine, atlas: Atlas, prompts: Sequence[Prompt]) -> bool:
    """The best set of sublayers to skip with everything else as it is, made to draft whether or not that pays."""
    table = Table(
        title="The same with skipping alone: the skip set of the best plan that skips anything, made to draft",
        title_justify="left",
    )
    for column in ("domain", "skip set", "drafted", "accepted", "identical to plain", "speed over plain"):
        table.add_column(column, overflow="fold")
    identical = True
    for prompt in prompts:
        found = atlas.domains[str(prompt.domain)].evidence["best_skipping"]
        if not found:
            continue
        best = Plan.from_json(found["plan"])
        plan = Plan.skipping(best.num_layers, best.skipped_attention, best.skipped_mlp, best.policy)
        plain = engine.generate(prompt.prompt, max_new_tokens=NEW_TOKENS, plain=True)
        drafted = engine.generate(prompt.prompt, max_new_tokens=NEW_TOKENS, plan=plan)
        identical = identical and drafted.token_ids == plain.token_ids
        speed = plain.stats.decode_sec / drafted.stats.decode_sec
        table.add_row(prompt.domain, plan.describe(), *counts(drafted, plain), f"{speed:.2f}x")
    console.print(table)
    return identical


def show_planted_redundancy() -> bool:
    """The paper's effect where skipping does pay: a tiny model with other redundant sublayers in each domain."""
    torch.set_num_threads(1)  # more of them only wait for each other in so small a model
    redundant = {"red": (5, 6, 8, 9, 10, 14, 15), "green": (4, 5, 6, 7, 11, 13, 14), "blue": (3, 4, 6, 9, 10, 11, 15)}
    planted = planted_tiny_model(redundant, seed=3)
    loaded = LoadedModel(planted.model, tiny_tokenizer(), "planted", None)
    prompts = [Prompt(planted.prompt(name, 12, i), name, f"{name}-{i}") for name in redundant for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        atlas = calibrate(loaded, prompts, Path(folder) / "atlas", CalibrationSettings(trials=50, search_prompts=4))
    engine = Engine(loaded.model, loaded.tokenizer, atlas)
    table = Table(
        title="A tiny model in which 7 of 16 sublayers, others in each domain, were made to do nothing",
        title_justify="left",
    )
    for column in ("domain", "routed to", "plan", "drafted", "accepted", "identical to plain", "speed over plain"):
        table.add_column(column, overflow="fold")
    identical = True
    for name in redundant:
        prompt = planted.prompt(name, 12, 99)
        plain = engine.generate(prompt, max_new_tokens=200, plain=True)
        routed = engine.generate(prompt, max_new_tokens=200)
        assert routed.route is not None
        identical = identical and routed.token_ids == plain.token_ids
        speed = plain.stats.decode_sec / routed.stats.decode_sec
        table.add_row(name, routed.route.domain, routed.plan.describe(), *counts(routed, plain), f"{speed:.2f}x")
    console.print(table)
    return identical


def counts(drafted: Generation, plain: Generation) -> tuple[str, str, str]:
    """Drafted, accepted, and whether the output is that of plain decoding, for a row."""
    same = "yes" if drafted.token_ids == plain.token_ids else "[bold red]NO[/]"
    return str(drafted.stats.drafted), str(drafted.stats.accepted), same


def run() -> int:
    """The whole demonstration; 0 if all output was identical to plain decoding."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = calibrate_the_real_model()
    atlas = Atlas.load(path)
    loaded = load_model(None)
    engine = Engine(loaded.model, loaded.tokenizer, atlas)
    fresh = [next(p for p in builtin_prompts([name])[CALIBRATED:] if len(p.prompt) < 600) for name in BUILTIN_DOMAINS]
    main(["atlas", "show", str(path)])
    identical = show_routed_decoding(engine, fresh)
    identical = show_forced_drafts(engine, atlas, fresh) and identical
    console.print(
        "On a model this small skipping alone does not pay; low-bit drafts and look-up may. Where sublayers are\n"
        "redundant, calibration finds them:\n"
    )
    identical = show_planted_redundancy() and identical
    main(["plot", str(path), "--out", str(OUT / "atlas.png")])
    console.print("All output was identical to plain decoding." if identical else "[bold red]Some output differed.[/]")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(run())
