"""What the server counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from polybit.serve.request import Spent

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class ServerMetrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Any:
            return Counter(f"polybit_{name}", text, labels, registry=self.registry)

        self.requests = counter("requests", "Requests by path and status", ("path", "status"))
        self.answers = counter("answers", "Answers by width and by what chose it", ("width", "chosen_by"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", ("width",))
        self.cached_tokens = counter("prompt_tokens_cached", "Tokens of prompts found in the cache", ("width",))
        self.answer_tokens = counter("tokens_predicted", "Tokens of answers", ("width",))
        self.drafted = counter("spec_decode_num_draft_tokens", "Tokens drafted", ("width",))
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens accepted", ("width",))
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted, by place in the draft", ("position",)
        )
        self.gated = counter("gated_tokens", "Tokens decided anew at the gate's width", ("width",))
        self.first = Histogram(
            "polybit_time_to_first_token_seconds", "From arrival", registry=self.registry, buckets=SECONDS
        )
        self.running = Gauge("polybit_requests_processing", "Answers under way", registry=self.registry)
        self.waiting = Gauge("polybit_requests_deferred", "Requests waiting for a place", registry=self.registry)
        self.steps = Gauge("polybit_decode_steps", "Steps of the model", registry=self.registry)
        self.rows = Gauge("polybit_decode_rows", "Rows read in them", registry=self.registry)

    def note(self, spent: Spent, width: str, by: str) -> None:
        """Count a finished answer."""
        self.answers.labels(width, by).inc()
        self.prompt_tokens.labels(width).inc(spent.prompt)
        self.cached_tokens.labels(width).inc(spent.cached)
        self.answer_tokens.labels(width).inc(spent.answer)
        self.drafted.labels(width).inc(spent.drafted)
        self.accepted.labels(width).inc(sum(spent.accepted))
        self.gated.labels(width).inc(spent.gated)
        for position, count in enumerate(spent.accepted):
            self.accepted_at.labels(str(position)).inc(count)

    def text(self) -> bytes:
        """The page Prometheus reads."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
