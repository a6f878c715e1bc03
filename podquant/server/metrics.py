"""What Prometheus sees: what HTTP requests experience, and the engine's own load, read when a scrape asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from podquant.engine.backend import EngineStats

_TO_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)
_END_TO_END = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one app, in a registry of their own.

    Args:
        stats: the engine's, None while there is no engine.

    Attributes:
        requests: counts sequences by `outcome`: a finish reason, `cancelled` or `refused`.
        first_token, between_tokens, end_to_end: seconds.
    """

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "podquant_requests", "Sequences by outcome.", labelnames=("outcome",), registry=self._registry
        )
        self.first_token = Histogram(
            "podquant_time_to_first_token_seconds",
            "From the request to its first token.",
            buckets=_TO_FIRST_TOKEN,
            registry=self._registry,
        )
        self.between_tokens = Histogram(
            "podquant_inter_token_seconds",
            "Between one token and the next of a sequence.",
            buckets=_BETWEEN_TOKENS,
            registry=self._registry,
        )
        self.end_to_end = Histogram(
            "podquant_request_seconds",
            "From the request to its last token.",
            buckets=_END_TO_END,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(stats))

    def exposition(self) -> bytes:
        """The text of `GET /metrics`."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is None:
            return
        yield GaugeMetricFamily("podquant_requests_running", "Sequences being computed.", stats.num_running)
        yield GaugeMetricFamily("podquant_requests_waiting", "Sequences waiting for their turn.", stats.num_waiting)
        yield GaugeMetricFamily("podquant_kv_pages_used", "Pages of the KV cache in use.", stats.num_pages_used)
        yield GaugeMetricFamily("podquant_kv_pages_total", "Pages of the KV cache.", stats.num_pages_total)
        yield CounterMetricFamily("podquant_prompt_tokens", "Prompt tokens taken in.", stats.num_prompt_tokens)
        yield CounterMetricFamily(
            "podquant_cached_prompt_tokens", "Prompt tokens found in the KV cache.", stats.num_cached_tokens
        )
        yield CounterMetricFamily("podquant_generated_tokens", "Tokens generated.", stats.num_generated_tokens)
        yield CounterMetricFamily(
            "podquant_preemptions", "Sequences put back for lack of pages.", stats.num_preemptions
        )
        yield CounterMetricFamily(
            "podquant_programs_compiled", "Programs compiled, not found from an earlier start.", stats.num_compiled
        )
        yield CounterMetricFamily("podquant_draft_tokens", "Tokens guessed.", stats.num_draft_tokens)
        yield CounterMetricFamily(
            "podquant_accepted_draft_tokens", "Tokens guessed that were right.", stats.num_accepted_tokens
        )
