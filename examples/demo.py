"""Shows drafts from earlier answers, then calibrates a real model on five domains and decodes with routed drafts.

Run by `make demo`. Everything it prints is measured while it runs. It writes to out/demo.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from knn_ssd import Atlas, Engine, Generation, Plan
from knn_ssd.calibrate.pipeline import calibrate
from knn_ssd.calibrate.settings import CalibrationSettings
from knn_ssd.cli import main
from knn_ssd.kernels.binding import set_threads
from knn_ssd.loading.resolve import LoadedModel, load_model
from knn_ssd.prompts import BUILTIN_DOMAINS, Prompt, builtin_prompts
from knn_ssd.routing.answers import DraftCount
from knn_ssd.testing import planted_tiny_model, tiny_tokenizer

OUT = Path("out/demo")
CALIBRATED = 12  # prompts per domain; the prompts decoded below are others
JUDGED = 8  # prompts per domain on which plans are compared
NEW_TOKENS = 48
SEARCH_MINUTES = "1.3"
PLANTED_TRIALS = 50
RELATED = (
    "Write the order as JSON with the keys customer, paid and items; each item has a name, a price and a quantity.\n\n"
)
ORDERS = {
    "Ann's order": RELATED + "Ann Lee bought 2 lamps at 30 dollars each and 1 desk at 120 dollars. She has paid.",
    "Tom's order": RELATED + "Tom Berg bought 3 chairs at 45 dollars each and 2 lamps at 30 dollars each. He has paid.",
    "Ida's order": RELATED + "Ida Voss bought 1 desk at 120 dollars and 4 shelves at 25 dollars each. She has paid.",
    "a haiku": "Write a haiku about the sea.",
}
console = Console() if Console().is_terminal else Console(width=100)


def calibrate_the_real_model() -> Path:
    """Calibrates the embedded model with the command that a user would type."""
    path = OUT / "atlas"
    if path.exists():
        console.print(f"The atlas of an earlier run is at [bold]{path}[/]; remove it to calibrate again.")
        return path
    command = ["calibrate", "--out", str(path), "--vector-prompts", str(CALIBRATED),
               "--search-prompts", "2", "--judging-prompts", str(JUDGED), "--new-tokens", "20",
               "--minutes", SEARCH_MINUTES, "--resume"]  # fmt: skip
    console.print(f"$ knn-ssd {' '.join(command)}")
    if (code := main(command)) != 0:
        sys.exit(code)
    return path


def show_routed_decoding(engine: Engine, prompts: Sequence[Prompt]) -> bool:
    """Decodes one prompt of each domain with the plan of its route; whether all output was that of plain decoding."""
    table = new_table("Routed decoding of one unseen prompt per domain", "domain", "routed to", "plan")
    identical = True
    engine.prepare()
    engine.generate(prompts[0].prompt, max_new_tokens=4)  # the warm-up
    for prompt in prompts:
        plain = engine.generate(prompt.prompt, max_new_tokens=NEW_TOKENS, plain=True)
        routed = engine.generate(prompt.prompt, max_new_tokens=NEW_TOKENS)
        assert routed.route is not None
        identical = identical and routed.token_ids == plain.token_ids
        table.add_row(prompt.domain, routed.route.plan_name, routed.plan.describe(), *comparison(routed, plain))
    console.print(table)
    return identical


def show_forced_drafts(engine: Engine, atlas: Atlas, prompts: Sequence[Prompt]) -> bool:
    """Always drafts with the skipped sublayers of each domain's best skipping plan, whether or not that pays."""
    table = new_table("Skipping alone: the best plan that skips, always drafting", "domain", "plan")
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
        table.add_row(prompt.domain, plan.describe(), *comparison(drafted, plain))
    console.print(table)
    return identical


def show_drafts_from_earlier_answers(loaded: LoadedModel) -> bool:
    """Decodes related requests and one that is not, each with what the nearest earlier ones gave to its drafts."""
    engine = Engine(loaded.model, loaded.tokenizer)
    table = new_table(
        "Related requests: the answers of the nearest earlier ones draft too",
        "request",
        "neighbours (distance)",
        "copied",
    )
    engine.prepare()
    engine.generate("Hello", max_new_tokens=4, store=False)  # the warm-up
    identical, names = True, list(ORDERS)
    for name, prompt in ORDERS.items():
        plain = engine.generate(prompt, max_new_tokens=2 * NEW_TOKENS, plain=True)
        drafted = engine.generate(prompt, max_new_tokens=2 * NEW_TOKENS)
        identical = identical and drafted.token_ids == plain.token_ids
        near = ", ".join(f"{names[each.answer.id]} ({each.distance:.3f})" for each in drafted.neighbours)
        copied = drafted.stats.by_drafter.get("retrieval", DraftCount(0, 0)).accepted
        table.add_row(name, near or "–", str(copied), *comparison(drafted, plain))
    console.print(table)
    return identical


def show_planted_redundancy() -> bool:
    """Shows where skipping pays: a tiny model in which each domain has its own redundant sublayers."""
    set_threads(1)  # more threads only slow down so small a model
    redundant = {"red": (5, 6, 8, 9, 10, 14, 15), "green": (4, 5, 6, 7, 11, 13, 14), "blue": (3, 4, 6, 9, 10, 11, 15)}
    planted = planted_tiny_model(redundant, seed=3)
    loaded = LoadedModel(planted.model, tiny_tokenizer(), "planted", None)
    prompts = [Prompt(planted.prompt(name, 12, i), name, f"{name}-{i}") for name in redundant for i in range(12)]
    with tempfile.TemporaryDirectory() as folder:
        atlas = calibrate(
            loaded,
            prompts,
            Path(folder) / "atlas",
            CalibrationSettings(trials=PLANTED_TRIALS, search_prompts=4, judging_prompts=JUDGED, low=False),
        )
    engine = Engine(loaded.model, loaded.tokenizer, atlas, answers=False)
    title = "A tiny model in which 7 of 16 sublayers have no effect, different ones in each domain"
    table = new_table(title, "domain", "routed to", "plan")
    identical = True
    for name in redundant:
        prompt = planted.prompt(name, 12, 99)
        plain = engine.generate(prompt, max_new_tokens=4 * NEW_TOKENS, plain=True)
        routed = engine.generate(prompt, max_new_tokens=4 * NEW_TOKENS)
        assert routed.route is not None
        identical = identical and routed.token_ids == plain.token_ids
        table.add_row(name, routed.route.plan_name, routed.plan.describe(), *comparison(routed, plain))
    console.print(table)
    return identical


def new_table(title: str, *columns: str) -> Table:
    """A table with some columns for a prompt and its plan, and those of `comparison`."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    for column in ("accepted", "as plain", "speed-up"):
        table.add_column(column, justify="right")
    return table


def comparison(drafted: Generation, plain: Generation) -> tuple[str, str, str]:
    """Accepted and drafted tokens, whether the output is that of plain decoding, and the speed-up over it."""
    same = "yes" if drafted.token_ids == plain.token_ids else "[bold red]NO[/]"
    speedup = plain.stats.decode_sec / drafted.stats.decode_sec
    return f"{drafted.stats.accepted} of {drafted.stats.drafted}", same, f"{speedup:.2f}x"


def run() -> int:
    """Runs the demonstration; 0 if all output was identical to plain decoding."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = calibrate_the_real_model()
    atlas = Atlas.load(path)
    loaded = load_model(None)
    engine = Engine(loaded.model, loaded.tokenizer, atlas, answers=False)
    fresh = [next(p for p in builtin_prompts([name])[CALIBRATED:] if len(p.prompt) < 600) for name in BUILTIN_DOMAINS]
    identical = show_drafts_from_earlier_answers(loaded)
    main(["atlas", "show", str(path)])
    identical = show_routed_decoding(engine, fresh) and identical
    identical = show_forced_drafts(engine, atlas, fresh) and identical
    console.print(
        "On a model this small skipping alone does not pay; 4-bit drafts and lookup may. Where sublayers\n"
        "are redundant, calibration finds them:\n"
    )
    identical = show_planted_redundancy() and identical
    main(["plot", str(path), "--out", str(OUT / "atlas.png")])
    console.print("All output was identical to plain decoding." if identical else "[bold red]Some output differed.[/]")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(run())
