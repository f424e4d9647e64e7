"""What all tests share: one fixed Hypothesis profile, one thread, with which tiny models are fastest, and the embedded
model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from knn_ssd.engine import Engine
from knn_ssd.kernels.binding import set_threads
from knn_ssd.loading.resolve import load_model

settings.register_profile(
    "fixed", derandomize=True, deadline=None, print_blob=False, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ  # the other worker needs the other core
if IN_WORKER:
    os.environ["OMP_NUM_THREADS"] = os.environ["KNN_SSD_THREADS"] = "1"  # for the processes that tests start
set_threads(1)
os.environ["KNN_SSD_WEIGHT_CACHE"] = "0"  # nothing is kept but in the tests of the weight cache


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no worker is left alone with them at the end."""
    longest = ["test_embedded", "test_wheel", "test_routing", "test_calibrate"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


@pytest.fixture(scope="session")
def _embedded() -> Engine:
    loaded = load_model(None, dtype="float32", device="cpu")
    return Engine(loaded.model, loaded.tokenizer)


@pytest.fixture(scope="module")
def embedded_engine(_embedded: Engine) -> Iterator[Engine]:
    """The embedded model in float32, on all cores that are this process's."""
    set_threads(1 if IN_WORKER else os.cpu_count() or 1)
    yield _embedded
    set_threads(1)
