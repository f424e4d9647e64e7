"""Figures from records: speed-ups with confidence intervals, acceptance, identity, routing. Pure arithmetic.

A speed-up is the method's tokens per second over the baseline's on the same prompts, total tokens over total time. Its
95 % interval is a percentile bootstrap over prompts, so that prompts and not tokens count as independent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from knn_ssd.bench.records import Record

BASELINE = "plain"
_RESAMPLES = 2000
_FORMS = {  # the format of each figure that tables show, in the order of their columns
    "speedup": "{:.2f}x", "decode_speedup": "{:.2f}x", "tokens_per_sec": "{:.1f}", "acceptance_rate": "{:.0%}",
    "tokens_per_round": "{:.2f}", "identical_to_plain": "{:.0%}", "first_token_sec_mean": "{:.2f} s",
}  # fmt: skip


def summarize(records: Sequence[Record], seed: int = 0) -> dict[str, dict[str, Any]]:
    """The figures of every method by name, each with those of its domains under `per_domain`."""
    by_method: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_method[record.method].append(record)
    baseline = baseline_of(records)
    result = {}
    for method, own in by_method.items():
        domains = sorted({r.domain for r in own if r.domain is not None})
        per_domain = {d: _figures([r for r in own if r.domain == d], baseline, seed) for d in domains}
        result[method] = {**_figures(own, baseline, seed), "per_domain": per_domain}
    return result


def baseline_of(records: Iterable[Record]) -> dict[tuple[int, int], Record]:
    """The records of plain decoding, by place and repeat."""
    return {(r.place, r.repeat): r for r in records if r.method == BASELINE}


def display_name(method: str, figures: Mapping[str, Any]) -> str:
    """A method's name for people, marked where its weights or KV cache are not the model's own."""
    return f"{method} (lossy)" if figures["lossy"] else method


def formatted(value: float | None, form: str) -> str:
    """A figure as text; a dash for None."""
    return "–" if value is None else form.format(value)


def formatted_figures(figures: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a method that tables show, as text."""
    return {name: formatted(figures[name], form) for name, form in _FORMS.items()}


def formatted_interval(figures: Mapping[str, Any]) -> str:
    """The confidence interval of a method's speed-up as text."""
    bounds = figures["speedup_ci95"]
    return f"{bounds[0]:.2f}–{bounds[1]:.2f}" if bounds else "–"


def differing(records: Iterable[Record]) -> list[Record]:
    """The records of lossless methods whose output is not that of plain decoding."""
    records = list(records)
    baseline = baseline_of(records)
    return [
        r
        for r in records
        if r.lossless and (plain := baseline.get((r.place, r.repeat))) is not None and r.token_ids != plain.token_ids
    ]


def _figures(own: Sequence[Record], baseline: dict[tuple[int, int], Record], seed: int) -> dict[str, Any]:
    pairs = [(r, baseline[r.place, r.repeat]) for r in own if (r.place, r.repeat) in baseline]
    drafted, accepted = _by_drafter(r.drafted for r in own), _by_drafter(r.accepted for r in own)
    tokens, rounds = sum(len(r.token_ids) for r in own), sum(r.rounds for r in own)
    routed = [r for r in own if r.routed]
    peaks = [r.peak_memory_bytes for r in own if r.peak_memory_bytes is not None]
    prefills = [r.prefill_sec for r in own if r.prefill_sec is not None]
    return {
        "tokens_per_sec": tokens / sum(r.total_sec for r in own),
        "decode_tokens_per_sec": _decode_speed(own),
        "speedup": _ratio([_total(r, p) for r, p in pairs]),
        "speedup_ci95": _interval(pairs, seed),
        "decode_speedup": _ratio([row for r, p in pairs if (row := _decoding(r, p)) is not None]),
        "acceptance_rate": sum(accepted.values()) / sum(drafted.values()) if drafted else None,
        "tokens_per_round": tokens / rounds if rounds else None,
        "drafted": drafted,
        "accepted": accepted,
        "identical_to_plain": _mean([r.token_ids == p.token_ids for r, p in pairs]),
        "lossless": all(r.lossless for r in own),
        "lossy": any(r.lossy for r in own),
        "prompts": len({r.place for r in own}),
        "tokens": tokens,
        "routing_accuracy": _mean([r.routed_domain == r.domain for r in routed if r.domain is not None]),
        "route_sec_mean": _mean([r.route_sec for r in routed]),
        "first_token_sec_mean": _mean(prefills),
        "peak_memory_bytes": max(peaks, default=None),
        "seconds": _seconds(own),
        "accepted_by_length": _by_length(own),
    }


def _seconds(own: Sequence[Record]) -> dict[str, float] | None:
    """Seconds by part: prefill, drafting, verification, and the rest; None unless every record has them."""
    parts = [
        (r.prefill_sec, r.draft_sec, r.verify_sec, r.total_sec)
        for r in own
        if r.prefill_sec is not None and r.draft_sec is not None and r.verify_sec is not None
    ]
    if len(parts) < len(own):
        return None
    prompt, drafting, verifying, total = (float(part) for part in np.sum(parts, axis=0))
    rest = max(total - prompt - drafting - verifying, 0.0)
    return {"prompt": prompt, "drafting": drafting, "verifying": verifying, "rest": rest}


def _by_length(own: Sequence[Record]) -> dict[str, dict[str, float]]:
    """For each draft length, the number of rounds with it, and the mean of tokens accepted in them."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for record in own:
        for length, (rounds, accepted) in record.by_length.items():
            sums[length][0] += rounds
            sums[length][1] += accepted
    ordered = sorted(sums.items(), key=lambda item: int(item[0]))
    return {length: {"rounds": rounds, "accepted": accepted / rounds} for length, (rounds, accepted) in ordered}


def _total(record: Record, plain: Record) -> tuple[float, float, float, float]:
    """Tokens and seconds of a record, then those of plain decoding."""
    return (len(record.token_ids), record.total_sec, len(plain.token_ids), plain.total_sec)


def _decoding(record: Record, plain: Record) -> tuple[float, float, float, float] | None:
    """The same without the first token, which prefill gives; None where the times are unknown."""
    if record.decode_sec is None or plain.decode_sec is None or min(len(record.token_ids), len(plain.token_ids)) < 2:
        return None
    return (len(record.token_ids) - 1, record.decode_sec, len(plain.token_ids) - 1, plain.decode_sec)


def _ratio(rows: Sequence[tuple[float, float, float, float]]) -> float | None:
    """The method's tokens per second over those of plain decoding."""
    if not rows:
        return None
    tokens, seconds, plain_tokens, plain_seconds = np.sum(rows, axis=0)
    return float(tokens / seconds / (plain_tokens / plain_seconds))


def running_speedup(records: Sequence[Record], method: str) -> list[float]:
    """The method's speed-up on all prompts so far, after each prompt of the stream."""
    plain = baseline_of(records)
    own = sorted((r for r in records if r.method == method), key=lambda r: (r.repeat, r.place))
    rows = [_total(r, base) for r in own if (base := plain.get((r.place, r.repeat))) is not None]
    return [ratio for count in range(1, len(rows) + 1) if (ratio := _ratio(rows[:count])) is not None]


def _interval(pairs: Sequence[tuple[Record, Record]], seed: int) -> list[float] | None:
    """The confidence interval of the end-to-end speed-up; None for a single prompt."""
    by_prompt: dict[int, list[tuple[float, float, float, float]]] = defaultdict(list)
    for record, plain in pairs:
        by_prompt[record.place].append(_total(record, plain))
    if len(by_prompt) < 2:
        return None
    rows = np.array([np.sum(own, axis=0) for own in by_prompt.values()])  # (P, 4)
    chosen = np.random.default_rng(seed).integers(len(rows), size=(_RESAMPLES, len(rows)))
    tokens, seconds, plain_tokens, plain_seconds = rows[chosen].sum(axis=1).T
    ratios = tokens / seconds / (plain_tokens / plain_seconds)
    return [float(bound) for bound in np.percentile(ratios, (2.5, 97.5))]


def _decode_speed(own: Sequence[Record]) -> float | None:
    known = [(len(r.token_ids) - 1, r.decode_sec) for r in own if r.decode_sec is not None and len(r.token_ids) > 1]
    seconds = sum(sec for _, sec in known)
    return sum(count for count, _ in known) / seconds if seconds else None


def _by_drafter(counts: Iterable[Any]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
