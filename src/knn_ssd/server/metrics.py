"""The metrics that Prometheus reads at /metrics."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from knn_ssd.outputs import Generation
from knn_ssd.server.scheduler import PrefillDone, Scheduler

_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # seconds


class Metrics:
    """The metrics of one server.

    Args:
        scheduler: its running and waiting requests are counted.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        registry = self._registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        self.responses = counter("knn_ssd_responses", "Responses by path and status.", ("path", "status"))
        self._tokens = counter("knn_ssd_tokens", "Tokens of finished requests.")
        self._drafted = counter("knn_ssd_drafted_tokens", "Drafted tokens of finished requests.", ("drafter",))
        self._accepted = counter("knn_ssd_accepted_tokens", "Drafted tokens that were accepted.", ("drafter",))
        routes = "Finished requests by the domain that they were routed to."
        self._routes = counter("knn_ssd_routes", routes, ("domain",))
        histogram = partial(Histogram, registry=registry, buckets=_BUCKETS)
        self._queue = histogram("knn_ssd_queue_seconds", "From the arrival of a request until it ran.")
        self._prefill = histogram("knn_ssd_prefill_seconds", "Prefill of a request.")
        self._decode = histogram("knn_ssd_decode_seconds", "Decoding of a request.")
        making = Gauge("knn_ssd_making_copies", "1 while 4-bit copies are being made, else 0.", registry=registry)
        making.set_function(lambda: scheduler.engine.backend.is_preparing)
        for name, read in (("running", lambda: scheduler.running), ("waiting", lambda: scheduler.waiting)):
            Gauge(f"knn_ssd_{name}_requests", f"Number of {name} requests.", registry=registry).set_function(read)

    def started(self, prefill: PrefillDone) -> None:
        """Counts a request that was prefilled."""
        self._queue.observe(prefill.queued_sec)

    def finished(self, result: Generation) -> None:
        """Counts a finished request."""
        self._tokens.inc(len(result.token_ids))
        for drafter, count in result.stats.by_drafter.items():
            self._drafted.labels(drafter).inc(count.drafted)
            self._accepted.labels(drafter).inc(count.accepted)
        self._routes.labels("none" if result.route is None else result.route.plan_name).inc()
        self._prefill.observe(result.stats.prefill_sec)
        self._decode.observe(result.stats.decode_sec)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self._registry)
