"""What Prometheus reads: names and meanings as other servers of language models have them, under ``llava_``."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llava_pipeline.serving.engine import Engine
from llava_pipeline.serving.versions import Versions

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts and times of one server."""

    def __init__(self, engine: Engine, versions: Versions) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(engine, versions))
        self.time_to_first_token = self._seconds("time_to_first_token", "From a whole request to its first token.")
        self.inter_token = self._seconds("inter_token_latency", "Between two tokens of an answer.")
        self.queue = self._seconds("request_queue_time", "Until a question is begun.")
        self.decode = self._seconds("image_decode", "Of a picture, from its url to pixels.")
        self.answered = self._count("request_success", "Answers, by how they ended.", "finished_reason")
        self.failed = self._count("request_failed", "Questions that got no answer, by the error's code.", "code")
        self.refused = self._count("admission_rejections", "Requests that never reached the model, by code.", "code")
        self.rejected_images = self._count("rejected_images", "Pictures that were not accepted.", "reason")
        self.prompt_tokens = self._count("prompt_tokens", "Tokens read, those of pictures among them.")
        self.generated_tokens = self._count("generation_tokens", "Tokens written.")

    def _seconds(self, name: str, told: str) -> Histogram:
        return Histogram(f"llava_{name}_seconds", told, buckets=SECONDS, registry=self._registry)

    def _count(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"llava_{name}", told, labels, registry=self._registry)

    def written(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Now(Collector):
    """What is so at the moment of asking."""

    def __init__(self, engine: Engine, versions: Versions) -> None:
        self._engine, self._versions = engine, versions

    def collect(self) -> Iterator[Metric]:
        engine, versions = self._engine, self._versions
        yield GaugeMetricFamily("llava_num_requests_running", "Being answered.", value=engine.num_running)
        yield GaugeMetricFamily("llava_num_requests_waiting", "Not begun yet.", value=engine.num_waiting)
        yield CounterMetricFamily("llava_champion_reloads", "Versions put in place.", value=versions.num_swaps)
        yield CounterMetricFamily(
            "llava_champion_reload_failures", "Versions that were refused.", value=versions.num_refused
        )
        labels = ("alias", "version", "digest")
        info = GaugeMetricFamily("llava_model_version_info", "Who answers under an alias.", labels=labels)
        for alias, version in versions.by_alias.items():
            info.add_metric([alias, version.bundle.version, version.bundle.projector_digest[:12]], 1)
        yield info
