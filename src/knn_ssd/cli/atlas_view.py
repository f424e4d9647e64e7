"""Formats atlases as tables and sentences. It reads and writes nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from knn_ssd.plan import Mode

if TYPE_CHECKING:
    from rich.table import Table

    from knn_ssd.atlas import Atlas
    from knn_ssd.plan import Plan

FALLBACK = "fallback"
_LINE_WIDTH, _LONGEST_NAME = 100, 16
_LEFT_OUT = ("model", "settings", "versions")  # shown elsewhere, or too long for a line
_MARKS = {Mode.KEEP: "·", Mode.SKIP: "S", Mode.LOW: "l"}


def headline(atlas: Atlas) -> str:
    """Lines about the model, the anchors, the cost profile, and how the atlas was made."""
    model = atlas.fingerprint
    name = atlas.evidence.get("model")
    lines = [
        f"model    {f'{name}: ' if name else ''}{model.architecture}, {model.num_layers} layers of "
        f"{model.hidden_size}, {model.vocab_size} tokens, in {model.dtype}",
        f"weights  {model.weights_hash}, tokenizer {model.tokenizer_hash or 'none'}",
        f"anchors  {len(atlas.anchor_domains)} for {len(atlas.domains)} domains, by {atlas.pooling.value} pooling",
        f"costs    {1000 * atlas.cost.step_sec:.2f} ms per token, {1000 * atlas.cost.attention_sec:.2f} ms per "
        f"attention, {1000 * atlas.cost.mlp_sec:.2f} ms per MLP",
    ]
    if evidence := _scalars(atlas.evidence):
        lines.append(f"made     {evidence}")
    return "\n".join(textwrap.fill(line, _LINE_WIDTH, subsequent_indent=9 * " ") for line in lines)


def domains_table(atlas: Atlas) -> Table:
    """Each domain: its number of anchors, its radius, its plan, and the calibration's evidence for the plan."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = (
        "vs plain, vs general: speed over plain decoding and over the general plan, on prompts that the search "
        "has not seen; accepted: acceptance rate\n"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("domain", overflow="fold", min_width=min(_LONGEST_NAME, max(map(len, (*atlas.domains, FALLBACK)))))
    for title in ("anchors", "radius"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("plan", overflow="fold")
    for title in ("vs plain", "vs general", "accepted", "trials"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, domain in atlas.domains.items():
        count = str(atlas.anchor_domains.count(name))
        row = (name, count, f"{domain.radius:.4f}", domain.plan.describe(), *_evidence(domain.evidence))
        table.add_row(*map(Text, row))
    table.add_row(*map(Text, (FALLBACK, "", "", atlas.fallback.describe(), *_evidence(atlas.fallback_evidence))))
    return table


def skip_map(atlas: Atlas) -> str:
    """The modes of every plan: a row for attention and one for MLP, with one character per layer."""
    plans = list(_plans(atlas))
    width = max(len(name) for name, _ in plans)
    num_layers = atlas.fingerprint.num_layers
    ruler = "".join(f"{tens:<10}" for tens in range(0, num_layers, 10))[: max(num_layers, 2)].rstrip()
    lines = ["skip map, one character per layer: · keep, S skip, l low (4-bit)", f"{'':{width}}            {ruler}"]
    for name, plan in plans:
        lines.append(f"{name:{width}}  attention {_marks(plan.attention)}")
        lines.append(f"{'':{width}}  MLP       {_marks(plan.mlp)}")
    return "\n".join(lines)


def differences(a: Atlas, b: Atlas) -> list[str]:
    """The differences that make two atlases draft differently, as sentences; costs and evidence are not compared."""
    found = [
        f"model: {name.replace('_', ' ')} is {ours or 'none'} in the first, {theirs or 'none'} in the second"
        for name in a.fingerprint.__slots__
        if (ours := getattr(a.fingerprint, name)) != (theirs := getattr(b.fingerprint, name))
    ]
    if a.pooling is not b.pooling:
        found.append(f"pooling: {a.pooling.value} in the first, {b.pooling.value} in the second")
    found += [f"{name}: only in the first" for name in a.domains if name not in b.domains]
    found += [f"{name}: only in the second" for name in b.domains if name not in a.domains]
    shared = [name for name in a.domains if name in b.domains]
    found += [f"{name}: {line}" for name in shared for line in _domain_differences(a, b, name)]
    return found + [f"{FALLBACK}: {line}" for line in _plan_differences(a.fallback, b.fallback)]


def _domain_differences(a: Atlas, b: Atlas, name: str) -> Iterator[str]:
    yield from _plan_differences(a.domains[name].plan, b.domains[name].plan)
    ours, theirs = a.domains[name].radius, b.domains[name].radius
    if ours != theirs:
        yield f"radius {ours:.4f} in the first, {theirs:.4f} in the second"
    our_anchors, their_anchors = (_anchors(atlas, name) for atlas in (a, b))
    if our_anchors != their_anchors:
        counts = [len(anchors) for anchors in (our_anchors, their_anchors)]
        yield f"other anchors: {counts[0]} in the first, {counts[1]} in the second"


def _plan_differences(a: Plan, b: Plan) -> Iterator[str]:
    for mode in (Mode.SKIP, Mode.LOW):
        ours, theirs = (_sublayers(plan, mode) for plan in (a, b))
        if ours != theirs:
            overlap = len(ours & theirs) / len(ours | theirs)
            yield (
                f"{mode.value} sets of {len(ours)} and {len(theirs)} sublayers overlap with Jaccard index {overlap:.2f}"
            )
    if a.head is not b.head:
        yield f"LM head {a.head.value} in the first, {b.head.value} in the second"
    for name in a.policy.__slots__:
        ours, theirs = getattr(a.policy, name), getattr(b.policy, name)
        if ours != theirs:
            yield f"policy's {name} is {ours} in the first, {theirs} in the second"


def _plans(atlas: Atlas) -> Iterator[tuple[str, Plan]]:
    for name, domain in atlas.domains.items():
        yield name, domain.plan
    yield FALLBACK, atlas.fallback


def _anchors(atlas: Atlas, name: str) -> list[list[float]]:
    """The anchors of a domain, sorted."""
    return sorted(atlas.anchors[index].tolist() for index, domain in enumerate(atlas.anchor_domains) if domain == name)


def _sublayers(plan: Plan, mode: Mode) -> set[int]:
    return {index for index, its_mode in enumerate(plan.modes) if its_mode is mode}


def _marks(modes: tuple[Mode, ...]) -> str:
    return "".join(_MARKS[mode] for mode in modes)


def _evidence(evidence: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """The plan's judged speed over plain decoding and over the general plan, its acceptance rate, number of trials."""
    judging = evidence.get("judging") or {}
    over_plain, over_general = (judging.get(f"speedup_over_{name}") for name in ("plain", "general"))
    agreement, trials = evidence.get("agreement"), evidence.get("trials")
    return (
        "–" if over_plain is None else f"{over_plain:.2f}x",
        "–" if over_general is None else f"{over_general:.2f}x",
        "–" if agreement is None else f"{agreement:.0%}",
        "–" if trials is None else str(trials),
    )


def _scalars(evidence: Mapping[str, Any]) -> str:
    """The strings and numbers in evidence, at its top and one level below, on one line."""
    values: dict[str, Any] = {}
    for name, value in evidence.items():
        if isinstance(value, Mapping) and name not in _LEFT_OUT:
            values |= {f"{name} {inner}": item for inner, item in value.items()}
        elif name not in _LEFT_OUT:
            values[name] = value
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in values.items()
        if isinstance(value, str | int | float)
    )
