"""The one file that knows every room: a name becomes a TextGenerator."""

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isotherm.backends.cpu.backend import CpuBackend
from isotherm.backends.cpu.isa import choose_isa
from isotherm.backends.cpu.packing import (
    PackedCache,
    open_packed,
    pack_in_memory,
    packed_entries,
    token_bytes,
    token_ops,
)
from isotherm.backends.gpu.choice import AUTO, choose_device
from isotherm.backends.gpu.compiler import GpuCompiler
from isotherm.backends.gpu.device import KernelCache, OpenGpu
from isotherm.backends.gpu.placement import compile_placed, cpu_part, room_of
from isotherm.backends.gpu.trial import check_answers
from isotherm.backends.gpu.tuning import tuned_tiling
from isotherm.backends.reference.backend import ReferenceBackend
from isotherm.engine.engine import Engine, EngineLimits
from isotherm.engine.kv_store import open_store
from isotherm.errors import DeviceFailed, InsufficientMemory
from isotherm.facts import ModelFacts, PlacementFacts
from isotherm.fitting import Fitting
from isotherm.formats.checkpoint import Checkpoint, open_checkpoint
from isotherm.formats.fetching import FetchReporter, SilentReporter, size_text
from isotherm.formats.folders import cache_dir
from isotherm.formats.names import resolve
from isotherm.load_options import check_load_options
from isotherm.models import FAMILIES
from isotherm.probe import physical_cores
from isotherm.program.backend import CompiledProgram
from isotherm.quality.choice import chosen_program
from isotherm.quantization.packed_file import PackedWeights
from isotherm.sparsity.predictor import with_predictors
from isotherm.text import TextGenerator
from isotherm.tokenization.chat import chat_template_for
from isotherm.tokenization.tokenizer import build_tokenizer
from isotherm.types import LoadOptions


def load(name_or_path: str | Path, options: LoadOptions, reporter: FetchReporter | None = None) -> TextGenerator:
    """See `isotherm.load`."""
    check_load_options(options)
    reporter = reporter or SilentReporter()
    started = time.perf_counter()
    path = resolve(str(name_or_path), reporter, offline=options.offline)
    device = None if options.backend == "reference" else choose_device(options.device)

    def assemble(device: int | None) -> TextGenerator:
        checkpoint = open_checkpoint(path, reporter.notice)
        return _Assembly(checkpoint, options, reporter, device).build(str(name_or_path), started)

    with _collector_off():
        try:
            return assemble(device)
        except (DeviceFailed, InsufficientMemory) as error:
            if device is None or options.device != AUTO:
                raise
            reporter.notice(f"the CPU computes all: {error}")
        return assemble(None)


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

    def __init__(
        self, checkpoint: Checkpoint, options: LoadOptions, reporter: FetchReporter, device: int | None
    ) -> None:
        """device: the number of the GPU that helps; None: none."""
        self._checkpoint = checkpoint
        self._options = options
        self._reporter = reporter
        recorded, tensors = FAMILIES[checkpoint.config.family](checkpoint.config), checkpoint.tensors
        chosen = chosen_program(recorded, options.quality, cache_dir(), checkpoint.identity)
        self._program, self._tensors = with_predictors(chosen, tensors, options.predictor, checkpoint.identity)
        self._isa = choose_isa()
        self._part: GpuCompiler | None = None
        self._num_threads = options.threads or physical_cores()
        self._gpu = None if device is None else self._open_gpu(device)
        least_layers = 1 if options.device == AUTO else 0
        self._room = room_of(self._gpu, options.vram_bytes, least_layers) if self._gpu else None
        fitting = Fitting(checkpoint.config, self._program, self._tensors, options, self._num_threads, self._room)
        self._fit = fitting.fit(reporter.notice)
        self._drop_gpu()

    def _open_gpu(self, index: int) -> OpenGpu:
        cache = KernelCache(cache_dir() / "kernels")
        gpu = OpenGpu(index, cache)
        gpu.tiling = tuned_tiling(gpu, cache, self._reporter.notice)
        check_answers(gpu, cache, self._isa, self._reporter.notice)
        return gpu

    def _drop_gpu(self) -> None:
        """Where nothing fits a GPU it is let go of, and it is told; not even then silently where it was asked for."""
        if self._gpu is None or self._room is None or self._fit.placement is not None:
            return
        text = f"nothing of {self._checkpoint.config.name} can run on {self._gpu.name} ({self._gpu.facts.name})"
        if self._options.device != AUTO:
            raise InsufficientMemory(
                f"{text} in {size_text(self._room.num_bytes)}: not even its head; give more with --vram, take "
                "a smaller context (--ctx) or quantisation, or --device cpu"
            )
        self._reporter.notice(f"{text}: the CPU computes all")
        self._gpu = None

    def build(self, name: str, started: float) -> TextGenerator:
        checkpoint, fit = self._checkpoint, self._fit
        compiled: CompiledProgram
        if self._options.backend == "reference":
            isa = "numpy"
            compiled = ReferenceBackend(self._tensors).compile(self._program, num_pages=fit.limits.num_pages)
        else:
            isa = self._isa
            weights = self._packed()
            checkpoint.close()  # what the packed form holds is never read from the source
            compiled = self._compile(weights)
            if self._part is None:  # what a GPU has need not stay in memory
                threading.Thread(target=weights.touch, name="touch weights", daemon=True).start()
        tokenizer = build_tokenizer(checkpoint.tokenizer)
        store = open_store(self._options, checkpoint.identity, fit.program, compiled, self._reporter.notice)
        engine_limits = EngineLimits(
            fit.context_tokens, fit.limits.max_tokens, fit.limits.num_pages, self._options.parallel
        )
        engine = Engine(compiled, fit.program, engine_limits, store)
        facts = ModelFacts(
            name=name,
            path=checkpoint.path,
            config=checkpoint.config,
            quantization=checkpoint.quantization,
            num_parameters=checkpoint.num_parameters,
            file_bytes=checkpoint.num_bytes,
            token_bytes=self._token_bytes(),
            token_ops=token_ops(fit.program, fit.entries),
            backend=self._options.backend,
            isa=isa,
            num_threads=self._num_threads,
            parallel=self._options.parallel,
            wanted_context_tokens=self._options.context_tokens or checkpoint.config.context_tokens,
            memory=fit.memory,
            load_s=time.perf_counter() - started,
            placement=self._placement_facts(),
        )
        return TextGenerator(engine, tokenizer, chat_template_for(checkpoint.tokenizer), facts)

    def _compile(self, weights: PackedWeights) -> CompiledProgram:
        fit, part = self._fit, None
        if self._gpu is not None and fit.placement is not None:
            self._part = part = compile_placed(self._gpu, fit.program, fit.placement, weights, fit.limits)
            if fit.placement.first_layer <= 0:
                self._num_threads = 1  # which enqueues: no layer is the CPU's
        return CpuBackend(weights, isa=self._isa, num_threads=self._num_threads).compile(fit.program, fit.limits, part)

    def _placement_facts(self) -> PlacementFacts | None:
        fit, placement = self._fit, self._fit.placement
        if self._gpu is None or placement is None or self._part is None:
            return None
        own = cpu_part(fit.program, placement)
        entries = [spec for spec, _ in packed_entries(own, self._tensors)]
        facts = PlacementFacts(
            device=self._gpu.name,
            name=self._gpu.facts.name,
            num_layers=placement.num_layers,
            has_embedding=placement.first_layer < 0,
            num_bytes=placement.num_bytes,
            token_bytes=self._token_bytes() - token_bytes(own, entries, is_head_tied=False),
            token_ops=token_ops(fit.program, fit.entries) - token_ops(own, entries),
            num_launches=self._part.num_launches,
        )
        self._reporter.notice(facts.text(self._checkpoint.config.num_layers))
        return facts

    def _token_bytes(self) -> int:
        return token_bytes(self._fit.program, self._fit.entries, is_head_tied=self._checkpoint.config.tied_head)

    def _packed(self) -> PackedWeights:
        checkpoint, cap_bytes = self._checkpoint, self._options.cache_bytes
        if cap_bytes == 0:
            return pack_in_memory(self._fit.program, self._tensors)
        cache = PackedCache(cache_dir() / "packed", cap_bytes, checkpoint.path.stem, checkpoint.identity)
        return open_packed(self._fit.program, self._tensors, cache, self._reporter.notice)
