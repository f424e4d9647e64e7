"""knn-ssd: lossless self-speculative decoding whose draft plan is chosen per prompt by nearest-neighbour search.

     offline   calibrate/   prompts ─ target's own continuations ─┬─ prompt vectors ─ k-means ──► anchors ─┐
                                                                  └─ search(plans) ─ acceptance × cost ────┴─► atlas/
     online    engine       prefill ─ vector ─ route ─► plan ─► decode:  draft ─ verify ─ accept ─ rewind ─► tokens

    from knn_ssd import Engine

    engine = Engine.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct", atlas="atlas/")
    print(engine.generate("What is the capital of France?").text)

Importing this package imports neither torch nor transformers: each name below is imported when it is first used.
Calibration is `knn_ssd.calibrate.pipeline.calibrate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from knn_ssd.atlas import Atlas
    from knn_ssd.engine import Engine
    from knn_ssd.errors import KnnSsdError
    from knn_ssd.grammar import Grammar
    from knn_ssd.outputs import Generation, Stream
    from knn_ssd.plan import Mode, Plan, Policy
    from knn_ssd.request_options import RequestOptions
    from knn_ssd.routing.router import Route, Router
    from knn_ssd.sampling import SamplingParams
    from knn_ssd.speculation.decode import Round

    __version__: str

__all__ = [
    "Atlas", "Engine", "Generation", "Grammar", "KnnSsdError", "Mode", "Plan", "Policy", "RequestOptions", "Round",
    "Route", "Router", "SamplingParams", "Stream", "__version__",
]  # fmt: skip

_HOMES = {
    "Atlas": "knn_ssd.atlas",
    "Engine": "knn_ssd.engine",
    "Generation": "knn_ssd.outputs",
    "Grammar": "knn_ssd.grammar",
    "KnnSsdError": "knn_ssd.errors",
    "Mode": "knn_ssd.plan",
    "Plan": "knn_ssd.plan",
    "Policy": "knn_ssd.plan",
    "RequestOptions": "knn_ssd.request_options",
    "Round": "knn_ssd.speculation.decode",
    "Route": "knn_ssd.routing.router",
    "Router": "knn_ssd.routing.router",
    "SamplingParams": "knn_ssd.sampling",
    "Stream": "knn_ssd.outputs",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("knn-ssd")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
