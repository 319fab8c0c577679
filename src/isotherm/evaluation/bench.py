"""Speed of a loaded model, beside the limits of the machine it runs on."""

import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from isotherm.backends.gpu.survey import measure as measure_gpu
from isotherm.engine.solo import RecordedRun
from isotherm.errors import InsufficientMemory, OptionError
from isotherm.evaluation.profile import Profile, profile
from isotherm.facts import DeviceFacts, GpuLimits, ModelFacts
from isotherm.probe import measure
from isotherm.text import TextGenerator

MAX_PROFILED_STEPS = 128  # of decode: what is recorded stays in memory
_NUM_READS = 3  # of the weights, after each repetition


@dataclass(frozen=True)
class BenchOptions:
    """What to time; 0 tokens leave a test out."""

    prompt_tokens: int = 512
    decode_tokens: int = 64
    repetitions: int = 3
    depth: int = 0  # tokens in the context before the decode test
    profile: bool = False  # as many repetitions more, recorded; decode of at most MAX_PROFILED_STEPS

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.decode_tokens, self.depth) < 0 or self.repetitions < 1:
            raise OptionError("numbers of tokens cannot be negative, and there must be at least one repetition")
        if not self.prompt_tokens and not self.decode_tokens:
            raise OptionError("nothing to measure: ask for prompt tokens (-p) or decoded tokens (-n)")

    @property
    def context_tokens(self) -> int:
        """Positions that a model needs for these tests."""
        return max(self.prompt_tokens, self.depth + self.decode_tokens + 1)


@dataclass(frozen=True)
class Speed:
    """One test: its rate in each repetition, and the median as a share of what the machine allows.

    Decode is held against the bandwidth of reading memory, all weights once a token; prefill against the rate of
    8-bit integer arithmetic, all matrices but the head.
    """

    test: str  # pp512, tg64, tg64 @ d1024: as llama-bench names them
    samples: tuple[float, ...]  # tokens per second
    limit: str
    limit_share: float
    python_share: float | None  # of the time of a decode step: what Python takes, beside backend and sampler
    weights_share: float | None = None  # of a decode step's median: what reading the weights alone takes at best

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(self.samples)

    @property
    def stddev(self) -> float:
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0


@dataclass(frozen=True)
class BenchResult:
    model: ModelFacts
    device: DeviceFacts  # the best of several probes between the repetitions
    tests: tuple[Speed, ...]
    peak_rss_bytes: int | None  # of this process up to the first repetition; None where the system does not tell
    weights_bytes_per_s: float | None  # at best, of reading the weights where they lie; None: the backend cannot tell
    profiles: tuple[Profile, ...] = ()  # of the tests, where asked for
    recorded: tuple[RecordedRun, ...] = ()  # the last run of each profile
    gpu: GpuLimits | None = None  # of the GPU that has a part of the model, at best


def bench(model: TextGenerator, options: BenchOptions, on_step: Callable[[str], None] | None = None) -> BenchResult:
    """Times prefill and decode in turns, after one warm-up of each; probes the machine between the repetitions.

    `on_step` hears what comes next. Raises OptionError where the tests do not fit the model's context, and where the
    backend cannot tell what is to be profiled.
    """
    if options.context_tokens > model.context_tokens:
        raise OptionError(
            f"the tests need a context of {options.context_tokens} tokens, the model was loaded with "
            f"{model.context_tokens}; load it with more context_tokens or measure less"
        )
    tell = on_step or (lambda _: None)
    if options.profile:
        model.record_prefill(1)  # a backend that cannot says so before anything is measured
    timer = _Timer(model, options)
    tell("warm-up")
    timer.repeat()
    timer.forget()
    peak_rss_bytes = _peak_rss_bytes()  # before the probes allocate
    limits = _Limits(model)
    for number in range(1, options.repetitions + 1):
        tell(f"repetition {number} of {options.repetitions}")
        timer.repeat()
        limits.probe()
    recorder = _Recorder(model, options)
    for number in range(1, options.repetitions + 1) if options.profile else ():
        tell(f"profile {number} of {options.repetitions}")
        recorder.repeat()
        limits.probe()
    return BenchResult(
        model.facts,
        limits.device,
        timer.results(limits),
        peak_rss_bytes,
        limits.weights_bytes_per_s,
        recorder.profiles(limits.device),
        recorder.last_runs(),
        limits.gpu,
    )


class _Limits:
    """The best that the machine has shown: to the probes, and where the weights are read and nothing is computed."""

    def __init__(self, model: TextGenerator) -> None:
        self._model = model
        self.device = self._probed()
        self.gpu = self._probed_gpu()
        self.weights_s = self._read_s()

    def probe(self) -> None:
        found, read_s = self._probed(), self._read_s()
        self.device = replace(
            self.device,
            read_bytes_per_s=max(self.device.read_bytes_per_s, found.read_bytes_per_s),
            int8_ops_per_s=max(self.device.int8_ops_per_s, found.int8_ops_per_s),
        )
        if self.weights_s is not None and read_s is not None:
            self.weights_s = min(self.weights_s, read_s)
        if (gpu := self._probed_gpu()) and self.gpu:
            self.gpu = GpuLimits(
                copy_bytes_per_s=max(self.gpu.copy_bytes_per_s, gpu.copy_bytes_per_s),
                int8_ops_per_s=max(self.gpu.int8_ops_per_s, gpu.int8_ops_per_s),
                launch_s=min(self.gpu.launch_s, gpu.launch_s),
            )

    def prefill_limit(self) -> tuple[str, float]:
        """What it is called, and seconds of a token at it."""
        facts, placed = self._model.facts, self._model.facts.placement
        if placed is None or self.gpu is None:
            return "int8 rate", facts.token_ops / self.device.int8_ops_per_s
        own_s = (facts.token_ops - placed.token_ops) / self.device.int8_ops_per_s
        return "int8 rates", own_s + placed.token_ops / self.gpu.int8_ops_per_s

    def decode_limit(self) -> tuple[str, float]:
        """As `prefill_limit`."""
        facts, placed = self._model.facts, self._model.facts.placement
        if placed is None or self.gpu is None:
            return "read bandwidth", facts.token_bytes / self.device.read_bytes_per_s
        own_s = (facts.token_bytes - placed.token_bytes) / self.device.read_bytes_per_s
        return "bandwidths", own_s + placed.token_bytes / self.gpu.copy_bytes_per_s

    @property
    def weights_bytes_per_s(self) -> float | None:
        return self._model.facts.token_bytes / self.weights_s if self.weights_s else None

    def _probed(self) -> DeviceFacts:
        facts = self._model.facts
        return measure(facts.num_threads, facts.isa if facts.backend == "cpu" else None)

    def _probed_gpu(self) -> GpuLimits | None:
        placed = self._model.facts.placement
        if placed is None:
            return None
        try:
            return measure_gpu(int(placed.device.partition(":")[2]))
        except InsufficientMemory:  # the model has all of it
            return None

    def _read_s(self) -> float | None:
        return min((s for _ in range(_NUM_READS) if (s := self._model.read_weights_s()) is not None), default=None)


class _Timer:
    """Runs the tests and keeps their rates."""

    def __init__(self, model: TextGenerator, options: BenchOptions) -> None:
        self._model = model
        self._options = options
        self.forget()

    def forget(self) -> None:
        self._prefill: list[float] = []
        self._decode: list[float] = []
        self._total_s = self._busy_s = 0.0

    def repeat(self) -> None:
        options = self._options
        if options.prompt_tokens:
            self._prefill.append(options.prompt_tokens / self._model.prefill_s(options.prompt_tokens))
        if options.decode_tokens:
            timing = self._model.decode_s(options.decode_tokens, depth=options.depth)
            self._decode.append(options.decode_tokens / timing.total_s)
            self._total_s += timing.total_s
            self._busy_s += timing.busy_s

    def results(self, limits: _Limits) -> tuple[Speed, ...]:
        options, results = self._options, []
        if self._prefill:
            limit, limit_s = limits.prefill_limit()
            share = limit_s * statistics.median(self._prefill)
            results.append(Speed(f"pp{options.prompt_tokens}", tuple(self._prefill), limit, share, None))
        if self._decode:
            median = statistics.median(self._decode)
            limit, limit_s = limits.decode_limit()
            weights_share = limits.weights_s and limits.weights_s * median
            name = _decode_name(options.decode_tokens, options.depth)
            python_share = 1 - self._busy_s / self._total_s
            results.append(Speed(name, tuple(self._decode), limit, limit_s * median, python_share, weights_share))
        return tuple(results)


class _Recorder:
    """Runs the tests once more and keeps what every thread did."""

    def __init__(self, model: TextGenerator, options: BenchOptions) -> None:
        self._model = model
        self._options = options
        self._decode_tokens = min(options.decode_tokens, MAX_PROFILED_STEPS)
        self._prefill: list[RecordedRun] = []
        self._decode: list[RecordedRun] = []

    def repeat(self) -> None:
        if self._options.prompt_tokens:
            self._prefill.append(self._model.record_prefill(self._options.prompt_tokens))
        if self._decode_tokens:
            self._decode.append(self._model.record_decode(self._decode_tokens, depth=self._options.depth))

    def profiles(self, device: DeviceFacts) -> tuple[Profile, ...]:
        results = []
        if self._prefill:
            results.append(profile(f"pp{self._options.prompt_tokens}", self._prefill, device, is_decode=False))
        if self._decode:
            name = _decode_name(self._decode_tokens, self._options.depth)
            results.append(profile(name, self._decode, device, is_decode=True))
        return tuple(results)

    def last_runs(self) -> tuple[RecordedRun, ...]:
        return tuple(runs[-1] for runs in (self._prefill, self._decode) if runs)


def _decode_name(num_tokens: int, depth: int) -> str:
    return f"tg{num_tokens}" + (f" @ d{depth}" if depth else "")


def _peak_rss_bytes() -> int | None:
    # Not getrusage: its maximum also covers the process that started this one, before exec.
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
