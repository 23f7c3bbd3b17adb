"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ...attention.method import DECODE, PREFILL
from ..report import Report

_FIRST = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds
_SPEED = (1, 2, 5, 10, 20, 50, 100, 200, 500)  # tokens per second


class Metrics:
    """Counters of one server, in a registry of their own.

    waiting, running: functions that return how many requests wait and run.
    """

    def __init__(self, waiting: Callable[[], float], running: Callable[[], float]) -> None:
        own = {"registry": CollectorRegistry(), "namespace": "farspan"}
        self._registry = own["registry"]
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "requests",
            "Requests by endpoint and HTTP status; 499: the client has gone",
            ["endpoint", "status"],
            **own,
        )
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From the request to its first token",
            ["endpoint"],
            buckets=_FIRST,
            **own,
        )
        self.speed = Histogram(
            "tokens_per_second",
            "Speed of one request after its first token",
            ["endpoint"],
            buckets=_SPEED,
            **own,
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts, reused ones included", **own)
        self.new_tokens = Counter("new_tokens", "Tokens written", **own)
        self.prefix_hits = Counter(
            "prefix_hits", "Prompts that began with a prefix that was read before", **own
        )
        self.prefix_misses = Counter("prefix_misses", "Prompts that did not", **own)
        self.reused_tokens = Counter("reused_tokens", "Tokens of prompts that were not read again", **own)
        self._pairs = Counter(
            "attention_pairs_read", "(query head, key) pairs read, by phase", ["phase"], **own
        )
        self._causal = Counter(
            "attention_pairs_causal", "Pairs that dense attention would have read, by phase", ["phase"], **own
        )
        Gauge("queue_length", "Requests that wait", **own).set_function(waiting)
        Gauge("running", "Requests that run", **own).set_function(running)

    def read(self, report: Report) -> None:
        """Add what the calls of a report have read."""
        for phase in (PREFILL, DECODE):
            done = [layer.phases[phase] for layer in report.layers]
            self._pairs.labels(phase).inc(sum(x.pairs for x in done))
            self._causal.labels(phase).inc(sum(x.causal_pairs for x in done))

    def text(self) -> bytes:
        """All values in Prometheus' text format."""
        return generate_latest(self._registry)
