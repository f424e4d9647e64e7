"""Fits the 4-bit copies to the model's own text, and keeps them if drafts then come nearer to the model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import zip_longest

from knn_ssd.backends.native.backend import NativeBackend
from knn_ssd.backends.native.error_feedback import fitted_copies
from knn_ssd.calibrate.continuations import Observation
from knn_ssd.plan import Plan
from knn_ssd.progress import Progress

logger = logging.getLogger(__name__)

_MAX_TOKENS = 16_384  # of text, prompts included
_RUN_LENGTH = 8  # of the drafts that are compared with the model


def fit_low_bit(backend: NativeBackend, domains: Sequence[Sequence[Observation]], progress: Progress) -> bool:
    """Fits the 4-bit copies to three quarters of the text. Takes minutes.

    They are used, and kept for later starts, if drafts of the rest diverge less from the model than with the copies of
    before.

    Args:
        backend: the backend; no forward pass may be running.
        domains: the observations of each domain.
        progress: receives a stage.

    Returns:
        Whether the new copies are used.
    """
    texts = texts_in_turn(domains)
    count = len(texts) - len(texts) // 4
    fitted, held_out = texts[:count], texts[count:]
    if not held_out:
        return False
    usual = divergence(backend, held_out)
    before = backend.replace_low_bit(
        fitted_copies(backend.model, [(*each.prompt_ids, *each.token_ids) for each in fitted], progress)
    )
    new = divergence(backend, held_out)
    logger.info("drafts of 4-bit copies fitted to text diverge by %.4f nats, of those before by %.4f", new, usual)
    if new < usual:
        backend.low.keep_fitted()
    else:
        backend.replace_low_bit(before)
    return new < usual


def texts_in_turn(domains: Sequence[Sequence[Observation]]) -> list[Observation]:
    """The observations with a continuation, of all domains in turn, as long as they have some 16,384 tokens together.

    Args:
        domains: the observations of each domain.
    """
    texts, total = [], 0
    for turn in zip_longest(*domains):
        for each in turn:
            if each is not None and each.token_ids and total < _MAX_TOKENS:
                texts.append(each)
                total += len(each.prompt_ids) + len(each.token_ids)
    return texts


def divergence(backend: NativeBackend, texts: Sequence[Observation]) -> float:
    """Mean Kullback-Leibler divergence, in nats, of drafts with everything in 4 bits from the model's distribution."""
    total, count = 0.0, 0
    for each in texts:
        session = backend.open(len(each.prompt_ids) + len(each.token_ids))
        try:
            session.prefill(list(each.prompt_ids))
            model = session.forward(list(each.token_ids)).log_softmax(-1)  # (n, V)
            plan = Plan.low(backend.num_layers)
            draft = session.teacher_forced_logits(list(each.token_ids), plan, _RUN_LENGTH).log_softmax(-1)
            total += float((model.exp() * (model - draft)).sum())
            count += len(each.token_ids)
        finally:
            session.close()
    return total / count
