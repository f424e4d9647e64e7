"""The report of a benchmark: one self-contained HTML file for phone, desktop and print, light and dark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from knn_ssd.atlas import Atlas
from knn_ssd.bench.methods import DESCRIPTIONS
from knn_ssd.bench.peers import APART
from knn_ssd.bench.pictures import Axes, bars, legend, lines, mode_map, scatter, stacked_bars
from knn_ssd.bench.records import Record
from knn_ssd.bench.summary import BASELINE, display_name, formatted_figures, running_speedup
from knn_ssd.routing.projection import Points

_PARTS = {"prompt": "prefill", "drafting": "drafting", "verifying": "verification", "rest": "rest"}
_MIN_ROUNDS = 5  # draft lengths with fewer rounds are not shown

_STYLE = """
:root { --ink: #1c2430; --quiet: #5b6675; --paper: #ffffff; --line: #d9dee5; --soft: #f3f5f8; --bad: #b3261e;
  --c0: #2563a8; --c1: #c2570c; --c2: #2e7d4f; --c3: #8a3ea8; --c4: #8a6d00; --c5: #a8325e; --c6: #0f766e;
  --c7: #57606a; --c8: #6d4c2f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --quiet: #9aa5b4; --paper: #12161c; --line: #303844;
  --soft: #1b2129; --bad: #ff8a80; --c0: #6ea8e8; --c1: #f0985a; --c2: #6fc28e; --c3: #c98be0; --c4: #d9b93b;
  --c5: #ec86ab; --c6: #5cc4ba; --c7: #a9b4c0; --c8: #c9a27e; } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
p { margin: .4rem 0 } .quiet { color: var(--quiet); font-size: .9rem } .bad { color: var(--bad); font-weight: 600 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; width: 100% }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { color: var(--quiet); font-weight: 600 }
tr.best td { background: var(--soft); font-weight: 600 }
code { background: var(--soft); padding: .1rem .3rem; border-radius: .2rem; overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto; max-width: 34rem }
svg text { fill: var(--ink); font-size: 13px; paint-order: stroke; stroke: var(--paper); stroke-width: 3px }
svg .axis { stroke: var(--line) } svg .one { stroke: var(--quiet); stroke-dasharray: 4 3 }
svg .small { fill: var(--quiet) }
svg .m-keep { fill: var(--soft); stroke: var(--line) } svg .m-low { fill: var(--c0); fill-opacity: .55 }
svg .m-skip { fill: var(--ink) }
ul.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .4rem 0 }
ul.key i { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .35rem }
@media print { body { max-width: none } h2 { break-after: avoid } svg, table { break-inside: avoid } }
"""


def report(summary: Mapping[str, Any], records: Sequence[Record], command: str, atlas: Atlas | None = None) -> str:
    """The report as an HTML page.

    Args:
        summary: the contents of `summary.json`.
        records: all records of the run.
        command: the command that made the run.
        atlas: the atlas whose prompts, anchors and plans are shown, if there is one.
    """
    methods: Mapping[str, Any] = summary["methods"]
    colours = {name: f"var(--c{i % 9})" for i, name in enumerate(methods)}
    others = [name for name in methods if name != BASELINE]
    parts = [
        f"<h1>{escape(summary['model'])}</h1>",
        f"<p class=quiet>{escape(summary['dtype'])}, {escape(summary['exactness'])} exactness · "
        f"{escape(summary['machine']['machine'])} · {escape(summary['machine']['created'])}</p>",
        _warnings(summary),
        "<h2>Speed-up over plain decoding</h2>",
        "<p class=quiet>End-to-end tokens per second over those of plain decoding by the same engine on the same "
        "prompts; error bars are 95 % confidence intervals over prompts.</p>",
        bars([_bar(name, methods[name], colours[name]) for name in others]),
        _table(methods),
        _peers(summary),
    ]
    domains = sorted({domain for figures in methods.values() for domain in figures["per_domain"]})
    if len(domains) > 1:
        parts.append("<h2>By domain</h2>")
        by_domain = [own for name in others for own in methods[name]["per_domain"].values()]
        bounds = [own["speedup"] or 0 for own in by_domain]
        bounds += [own["speedup_ci95"][1] for own in by_domain if own["speedup_ci95"]]
        for domain in domains:
            rows = [
                _bar(name, own, colours[name]) for name in others if (own := methods[name]["per_domain"].get(domain))
            ]
            parts += [f"<p><b>{escape(domain)}</b></p>", bars(rows, max(bounds, default=0.0))]
    curves = {
        name: [(i, ratio) for i, ratio in enumerate(curve, start=1)]
        for name in others
        if len(curve := running_speedup(records, name)) > 2
    }
    if curves:
        parts += [
            "<h2>Along the stream</h2>",
            "<p class=quiet>Speed-up over plain decoding on all prompts so far.</p>",
            legend(list(curves), colours),
            lines(curves, colours, Axes("prompts", "x", 1.0, unsteady=1)),
        ]
    parts += [_by_length(methods, colours), _times(summary), _atlas(atlas)]
    parts += [
        "<h2>How to reproduce this</h2>",
        f"<p><code>{escape(command)}</code></p>",
        f"<p class=quiet>{escape(', '.join(f'{k} {v}' for k, v in summary['machine']['versions'].items()))}. A bare "
        f"decode step of the model, without the engine, took {1e3 * summary['step_sec']:.2f} ms.</p>",
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<meta name=color-scheme content='light dark'><title>knn-ssd bench: {escape(summary['model'])}</title>"
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _bar(name: str, own: Mapping[str, Any], colour: str) -> tuple[str, float | None, Sequence[float] | None, str]:
    return (display_name(name, own), own["speedup"], own["speedup_ci95"], colour)


def _by_length(methods: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    curves = {
        name: [
            (int(length), each["accepted"])
            for length, each in own["accepted_by_length"].items()
            if int(length) and each["rounds"] >= _MIN_ROUNDS
        ]
        for name, own in methods.items()
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        return ""
    return (
        "<h2>Accepted tokens by draft length</h2>"
        "<p class=quiet>Mean number of accepted tokens over the rounds with a draft of that length; lengths with fewer "
        f"than {_MIN_ROUNDS} rounds are left out.</p>"
        + legend(list(curves), colours)
        + lines(curves, colours, Axes("draft tokens", dots=True))
    )


def _times(summary: Mapping[str, Any]) -> str:
    rows = {
        name: {_PARTS[part]: 1e3 * sec / own["tokens"] for part, sec in own["seconds"].items()}
        for name, own in summary["methods"].items()
        if own["seconds"]
    }
    if not rows:
        return ""
    colours = {"prefill": "var(--c7)", "drafting": "var(--c1)", "verification": "var(--c0)", "rest": "var(--c4)"}
    return (
        "<h2>Where the time goes</h2>"
        "<p class=quiet>Milliseconds per output token. The floor is the time to read the weights from memory once, at "
        "the measured memory bandwidth of this machine.</p>"
        + legend(list(colours), colours)
        + stacked_bars(rows, colours, "ms", 1e3 * summary["floor_sec"])
    )


def _atlas(atlas: Atlas | None) -> str:
    if atlas is None:
        return ""
    points = Points.of(atlas)
    colours = {name: f"var(--c{i % 9})" for i, name in enumerate(points.names)}
    plans = {**{name: domain.plan for name, domain in atlas.domains.items()}, "fallback": atlas.fallback}
    modes = {"keep": "var(--soft)", "low": "var(--c0)", "skip": "var(--ink)"}
    return (
        f"<h2>{escape(points.title)}</h2><p class=quiet>{escape(points.caption)}.</p>"
        + legend(list(colours), colours)
        + scatter(points, colours)
        + "<h2>Plans of the atlas</h2><p class=quiet>Mode of each sublayer by layer: attention above, MLP below.</p>"
        + legend(list(modes), modes)
        + mode_map(plans)
    )


def _warnings(summary: Mapping[str, Any]) -> str:
    lines = []
    by_method: dict[str, list[str]] = defaultdict(list)
    for each in summary["differing"]:
        by_method[each["method"]].append(each["prompt"])
    for method, prompts in by_method.items():
        lines.append(f"the output of {method} differs from plain decoding on {', '.join(sorted(set(prompts)))}")
    if summary["baseline_slowed"]:
        lines.append(
            "plain decoding was much slower than a bare decode step of the model: do not trust these speed-ups"
        )
    return "".join(f"<p class=bad>{escape(line)}</p>" for line in lines)


def _peers(summary: Mapping[str, Any]) -> str:
    if not summary["peers"]:
        return ""
    lossy = "; lossy: with weights or a KV cache rounded to fewer bits than the model's own"
    any_lossy = any(own["lossy"] for own in summary["methods"].values())
    return f"<p class=quiet>{escape(', '.join(summary['peers']))}: {APART}{lossy if any_lossy else ''}.</p>"


def _table(methods: Mapping[str, Any]) -> str:
    best = max((m for m in methods if methods[m]["lossless"]), key=lambda m: methods[m]["speedup"] or 0, default=None)
    head = (
        "method", "speed-up", "decode speed-up", "tokens/s", "acceptance", "tokens/round", "same as plain",
        "first token",
    )  # fmt: skip
    rows = []
    for name, own in methods.items():
        figures = formatted_figures(own)
        figures["identical_to_plain"] += "" if own["lossless"] else " (not claimed)"
        title = escape(DESCRIPTIONS.get(name, ""), quote=True)
        cells = (f"<span title='{title}'>{escape(display_name(name, own))}</span>", *figures.values())
        rows.append(f"<tr{' class=best' if name == best else ''}>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    heads = "".join(f"<th>{name}</th>" for name in head)
    return f"<div class=scroll><table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
