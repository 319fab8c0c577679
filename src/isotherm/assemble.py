"""The one file that knows every room: a name becomes a TextGenerator."""

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isotherm.backends.cpu.backend import CpuBackend
from isotherm.backends.cpu.isa import choose_isa
from isotherm.backends.cpu.limits import CpuLimits, fit_context, kv_bytes, work_bytes
from isotherm.backends.cpu.packing import (
    BY_NEURON,
    PackedCache,
    lower_by_neuron,
    open_packed,
    pack_in_memory,
    packed_entries,
    token_bytes,
    token_ops,
)
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.engine.engine import Engine, EngineLimits
from isotherm.engine.kv_pages import pages_for, pages_needed
from isotherm.engine.kv_store import open_store
from isotherm.errors import InsufficientMemory, OptionError
from isotherm.facts import MemoryForecast, ModelFacts
from isotherm.formats.checkpoint import Checkpoint, open_checkpoint
from isotherm.formats.fetching import FetchReporter, SilentReporter, size_text
from isotherm.formats.folders import cache_dir
from isotherm.formats.names import resolve
from isotherm.load_options import check_load_options
from isotherm.models import FAMILIES
from isotherm.probe import available_memory_bytes, physical_cores
from isotherm.program.backend import CompiledProgram
from isotherm.program.lowering import lower
from isotherm.program.recorder import Program
from isotherm.quality.choice import chosen_program
from isotherm.quantization.packed_file import PackedWeights
from isotherm.sparsity.predictor import with_predictors
from isotherm.text import TextGenerator
from isotherm.tokenization.chat import chat_template_for
from isotherm.tokenization.tokenizer import build_tokenizer
from isotherm.types import KvType, LoadOptions

_BATCH_TOKENS = 512
_LEAST_CONTEXT_TOKENS = 512  # a context cut below this for want of memory is of no use
_MEMORY_SHARE = 0.9  # of what is free: the rest is for whatever else runs


def load(name_or_path: str | Path, options: LoadOptions, reporter: FetchReporter | None = None) -> TextGenerator:
    """See `isotherm.load`."""
    check_load_options(options)
    reporter = reporter or SilentReporter()
    started = time.perf_counter()
    path = resolve(str(name_or_path), reporter, offline=options.offline)
    with _collector_off():
        checkpoint = open_checkpoint(path, reporter.notice)
        return _Assembly(checkpoint, options, reporter).build(str(name_or_path), started)


def _budget_bytes() -> int:
    return int(_MEMORY_SHARE * available_memory_bytes())


@contextmanager
def _collector_off() -> Iterator[None]:
    """Loading makes a million objects and no garbage: the collector's passes over them were a sixth of a start."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Assembly:
    """One model on its way from Checkpoint to TextGenerator."""

    def __init__(self, checkpoint: Checkpoint, options: LoadOptions, reporter: FetchReporter) -> None:
        self._checkpoint = checkpoint
        self._options = options
        self._reporter = reporter
        recorded, tensors = FAMILIES[checkpoint.config.family](checkpoint.config), checkpoint.tensors
        chosen = chosen_program(recorded, options.quality, cache_dir(), checkpoint.identity)
        self._program, self._tensors = with_predictors(chosen, tensors, options.predictor, checkpoint.identity)
        self._lowered = self._lower(is_sparse=options.sparse and options.backend == "cpu")
        self._isa = choose_isa()
        self._num_threads = options.threads or physical_cores()
        self._entries = [spec for spec, _ in packed_entries(self._lowered, self._tensors)]
        self._drop_neurons()

    def _lower(self, *, is_sparse: bool) -> Program:
        program, tensors = self._program, self._tensors
        return (lower_by_neuron(program, tensors) if is_sparse else lower(program)).keeping(KvType(self._options.kv))

    def _drop_neurons(self) -> None:
        """Weights by neuron come beside the others: where they would cost context they are left out, and it is told."""
        extra_bytes = sum(spec.num_bytes for spec in self._entries if spec.kind in BY_NEURON)
        most = self._options.context_tokens or self._checkpoint.config.context_tokens
        if not extra_bytes or self._forecast(most).total_bytes <= _budget_bytes():
            return
        self._reporter.notice(
            f"all neurons are computed, those that do not fire too: to skip those takes {size_text(extra_bytes)} more"
        )
        self._lowered = self._lower(is_sparse=False)
        self._entries = [spec for spec, _ in packed_entries(self._lowered, self._tensors)]

    def build(self, name: str, started: float) -> TextGenerator:
        checkpoint, lowered = self._checkpoint, self._lowered
        context_tokens, memory = self._fit_context()
        limits = self._limits(context_tokens)
        compiled: CompiledProgram
        if self._options.backend == "reference":
            isa = "numpy"
            compiled = ReferenceBackend(self._tensors).compile(self._program, num_pages=limits.num_pages)
        else:
            isa = self._isa
            weights = self._packed()
            checkpoint.close()  # what the packed form holds is never read from the source
            compiled = CpuBackend(weights, isa=isa, num_threads=self._num_threads).compile(lowered, limits)
            threading.Thread(target=weights.touch, name="touch weights", daemon=True).start()
        tokenizer = build_tokenizer(checkpoint.tokenizer)
        store = open_store(self._options, checkpoint.identity, lowered, compiled, self._reporter.notice)
        engine_limits = EngineLimits(context_tokens, limits.max_tokens, limits.num_pages, self._options.parallel)
        engine = Engine(compiled, lowered, engine_limits, store)
        facts = ModelFacts(
            name=name,
            path=checkpoint.path,
            config=checkpoint.config,
            quantization=checkpoint.quantization,
            num_parameters=checkpoint.num_parameters,
            file_bytes=checkpoint.num_bytes,
            token_bytes=token_bytes(lowered, self._entries, is_head_tied=checkpoint.config.tied_head),
            token_ops=token_ops(lowered, self._entries),
            backend=self._options.backend,
            isa=isa,
            num_threads=self._num_threads,
            parallel=self._options.parallel,
            wanted_context_tokens=self._options.context_tokens or checkpoint.config.context_tokens,
            memory=memory,
            load_s=time.perf_counter() - started,
        )
        return TextGenerator(engine, tokenizer, chat_template_for(checkpoint.tokenizer), facts)

    def _limits(self, context_tokens: int) -> CpuLimits:
        """Pages for one context at least; what `kv_bytes` has room for beyond that goes to groups without a window."""
        batch_tokens = min(_BATCH_TOKENS, context_tokens)
        states, one = self._lowered.states, pages_for(context_tokens)
        wanted = [self._options.parallel * pages_needed(state, context_tokens, batch_tokens) for state in states]
        least = [min(one, pages) for pages in wanted]
        left_bytes = (self._options.kv_bytes or 0) - sum(s.page_bytes * n for s, n in zip(states, least, strict=True))
        more = max(0, left_bytes) // max(1, sum(state.page_bytes for state in states))
        num_pages = tuple(min(most, pages + more) for most, pages in zip(wanted, least, strict=True))
        return CpuLimits(context_tokens, num_pages, max_tokens=batch_tokens)

    def _forecast(self, context_tokens: int) -> MemoryForecast:
        limits = self._limits(context_tokens)
        weights_bytes = sum(spec.num_bytes for spec in self._entries)
        if self._options.backend == "reference":  # 4 bytes an element, and keys and values as float32
            weights_bytes = 4 * self._checkpoint.num_parameters
            return MemoryForecast(weights_bytes, 2 * kv_bytes(self._program, limits), 0)
        return MemoryForecast(
            weights_bytes,
            kv_bytes(self._lowered, limits),
            work_bytes(self._lowered, limits, self._num_threads),
        )

    def _fit_context(self) -> tuple[int, MemoryForecast]:
        """The context that was asked for, or the model's, cut to what memory holds: told, never silent."""
        config, wanted, budget_bytes = self._checkpoint.config, self._options.context_tokens, _budget_bytes()
        if wanted is not None and wanted > config.context_tokens:
            raise OptionError(f"a context of {wanted} tokens; {config.name} was made for {config.context_tokens}")
        least = wanted or min(_LEAST_CONTEXT_TOKENS, config.context_tokens)
        most = wanted or config.context_tokens
        context_tokens, forecast = fit_context(self._forecast, least, most, budget_bytes)
        if forecast.total_bytes > budget_bytes:
            raise InsufficientMemory(
                f"{config.name} needs {size_text(forecast.total_bytes)} for a context of {context_tokens} tokens: "
                f"{size_text(forecast.weights_bytes)} weights, {size_text(forecast.kv_bytes)} KV pages, "
                f"{size_text(forecast.work_bytes)} work; {size_text(budget_bytes)} may be used here; take a smaller "
                f"context (--ctx), quantisation or model"
            )
        if context_tokens < most:
            self._reporter.notice(
                f"context cut from {most} to {context_tokens} tokens to fit {size_text(budget_bytes)}; --ctx sets it"
            )
        return context_tokens, forecast

    def _packed(self) -> PackedWeights:
        checkpoint, cap_bytes = self._checkpoint, self._options.cache_bytes
        if cap_bytes == 0:
            return pack_in_memory(self._lowered, self._tensors)
        cache = PackedCache(cache_dir() / "packed", cap_bytes, checkpoint.path.stem, checkpoint.identity)
        return open_packed(self._lowered, self._tensors, cache, self._reporter.notice)
