"""What Prometheus may ask: vLLM's names where they exist, so that its dashboards and gateways need no other."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from isotherm.answer import Answer
from isotherm.text import TextGenerator

_FIRST_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LABELS = ["model_name"]


class Metrics:
    """The counts of a server; `loaded` names its models that are in memory at this moment."""

    def __init__(self, loaded: Callable[[], Iterable[tuple[str, TextGenerator]]]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_Gauges(loaded))
        self._first_token_s = Histogram(
            "vllm:time_to_first_token_seconds",
            "From the request to its first token.",
            _LABELS,
            buckets=_FIRST_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._between_tokens_s = Histogram(
            "vllm:inter_token_latency_seconds",
            "Between two tokens of an answer.",
            _LABELS,
            buckets=_TOKEN_BUCKETS_S,
            registry=registry,
        )
        self._prompt_tokens = _counter(registry, "vllm:prompt_tokens", "Tokens of prompts.")
        self._answer_tokens = _counter(registry, "vllm:generation_tokens", "Tokens of answers.")
        self._cache_queries = _counter(registry, "vllm:prefix_cache_queries", "Tokens looked for among KV pages.")
        self._cache_hits = _counter(registry, "vllm:prefix_cache_hits", "Tokens found among KV pages.")
        self._answers = _counter(registry, "vllm:request_success", "Answers that ended.", "finished_reason")
        self._requests = Counter("isotherm_http_requests", "Requests answered.", ["path", "status"], registry=registry)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def request(self, path: str, status: int) -> None:
        """One request was answered; `path` as the server has it, never as a client spells it."""
        self._requests.labels(path, str(status)).inc()

    def meters(self, model: str) -> "Meters":
        return Meters(self, model)


class Meters:
    """The counts of one model, told by the thread that computes its answers."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._first_token_s = metrics._first_token_s.labels(model)
        self._between_tokens_s = metrics._between_tokens_s.labels(model)
        self._answer_tokens = metrics._answer_tokens.labels(model)

    def tokens(self, num_tokens: int, started_s: float, last_token_s: float | None) -> float:
        """`num_tokens` came now, which is returned; last_token_s: when the one before them did, if there was one."""
        now_s = time.perf_counter()
        if num_tokens:
            self._answer_tokens.inc(num_tokens)
            if last_token_s is None:
                self._first_token_s.observe(now_s - started_s)
            else:
                self._between_tokens_s.observe((now_s - last_token_s) / num_tokens)
        return now_s

    def answer(self, answer: Answer) -> None:
        metrics = self._metrics
        metrics._prompt_tokens.labels(self._model).inc(answer.num_prompt_tokens)
        metrics._cache_queries.labels(self._model).inc(answer.num_prompt_tokens)
        metrics._cache_hits.labels(self._model).inc(answer.num_cached_tokens)
        metrics._answers.labels(self._model, answer.finish_reason).inc()


def _counter(registry: CollectorRegistry, name: str, documentation: str, *labels: str) -> Counter:
    return Counter(name, documentation, [*_LABELS, *labels], registry=registry)


class _Gauges(Collector):
    """What is true at the moment of the question."""

    def __init__(self, loaded: Callable[[], Iterable[tuple[str, TextGenerator]]]) -> None:
        self._loaded = loaded

    def collect(self) -> Iterable[GaugeMetricFamily]:
        running = GaugeMetricFamily("vllm:num_requests_running", "Answers that are computed.", labels=_LABELS)
        waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Answers that wait for a place.", labels=_LABELS)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Part of the KV pages in use, 0 to 1.", labels=_LABELS)
        preempted = GaugeMetricFamily("vllm:num_preemptions", "Answers put back since the start.", labels=_LABELS)
        weights = GaugeMetricFamily("isotherm_weight_bytes", "Packed weights, by tier.", labels=[*_LABELS, "tier"])
        kv = GaugeMetricFamily("isotherm_kv_bytes", "Memory of KV pages.", labels=_LABELS)
        disk = GaugeMetricFamily("isotherm_kv_disk", "What --kv-dir did so far.", labels=[*_LABELS, "count"])
        for name, model in self._loaded():
            load, memory = model.load(), model.facts.memory
            running.add_metric([name], load.num_running)
            waiting.add_metric([name], load.num_waiting)
            usage.add_metric([name], load.kv_usage)
            preempted.add_metric([name], load.num_preemptions)
            weights.add_metric([name, "ram"], memory.weights_bytes)
            kv.add_metric([name], memory.kv_bytes)
            for name_of_count, count in vars(model.store_counts).items() if model.store_counts else ():
                disk.add_metric([name, name_of_count], count)
        return running, waiting, usage, preempted, weights, kv, disk
