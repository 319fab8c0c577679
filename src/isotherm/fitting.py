"""What fits where: the context and KV pages that memory holds, and the layers that a GPU takes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isotherm.backends.cpu.limits import CpuLimits, fit_context, kv_bytes, work_bytes
from isotherm.backends.cpu.packing import BY_NEURON, lower_by_neuron, packed_entries
from isotherm.backends.gpu.placement import Placement, Room, cpu_part, place
from isotherm.engine.kv_pages import pages_for, pages_needed
from isotherm.errors import InsufficientMemory, OptionError
from isotherm.facts import MemoryForecast
from isotherm.formats.fetching import size_text
from isotherm.probe import available_memory_bytes
from isotherm.program.backend import WeightTensor
from isotherm.program.lowering import lower
from isotherm.program.recorder import Program
from isotherm.quantization.packed_file import EntrySpec
from isotherm.types import KvType, LoadOptions, ModelConfig

_BATCH_TOKENS = 512
_LEAST_CONTEXT_TOKENS = 512  # a context cut below this for want of memory is of no use
_MEMORY_SHARE = 0.9  # of what is free: the rest is for whatever else runs
_LEAST_GPU_CONTEXT_TOKENS = 8192  # a context is not cut below this for layers on a GPU
_GPU_SPEED = 8  # a layer's on a GPU, of the CPU's: about the ratio of their memories
_WORTH = 1.25  # times as slow a token may be for a longer context


@dataclass(frozen=True)
class Fit:
    """A model as it will run. memory: of the machine, without what a GPU holds."""

    context_tokens: int
    program: Program  # lowered
    entries: tuple[EntrySpec, ...]  # its packed weights
    limits: CpuLimits
    placement: Placement | None
    memory: MemoryForecast


class Fitting:
    """One model, recorded, and what it may take."""

    def __init__(
        self,
        config: ModelConfig,
        program: Program,
        tensors: Mapping[str, WeightTensor],
        options: LoadOptions,
        num_threads: int,
        room: Room | None,
    ) -> None:
        """room: on a GPU."""
        self._config = config
        self._program = program
        self._tensors = tensors
        self._options = options
        self._num_threads = num_threads
        self._room = room
        self._free_bytes = available_memory_bytes()
        self._placed: dict[int, Placement | None] = {}  # by context
        self._lowered: dict[tuple[int | None, bool], tuple[Program, tuple[EntrySpec, ...]]] = {}

    def fit(self, notify: Callable[[str], None]) -> Fit:
        """The context that was asked for, or the model's, cut to what memory holds: told, never silent.

        A context that was not asked for is cut too where a GPU then takes enough layers more to be worth it. Weights
        by neuron come beside the others: where they would cost context they are left out, and it is told.
        Raises OptionError for a context that the model was not made for, InsufficientMemory where nothing fits.
        """
        config, wanted, budget_bytes = self._config, self._options.context_tokens, int(_MEMORY_SHARE * self._free_bytes)
        if wanted is not None and wanted > config.context_tokens:
            raise OptionError(f"a context of {wanted} tokens; {config.name} was made for {config.context_tokens}")
        least = wanted or min(_LEAST_CONTEXT_TOKENS, config.context_tokens)
        most = wanted or config.context_tokens
        is_sparse = self._options.sparse and self._options.backend == "cpu"
        if is_sparse:
            whole = self._try(most, is_sparse=True)
            extra_bytes = sum(spec.num_bytes for spec in whole.entries if spec.kind in BY_NEURON)
            if extra_bytes and whole.memory.total_bytes > budget_bytes:
                is_sparse = False
                notify(
                    "all neurons are computed, those that do not fire too: to skip those takes "
                    f"{size_text(extra_bytes)} more"
                )
        context_tokens, forecast = fit_context(
            lambda tokens: self._try(tokens, is_sparse=is_sparse).memory, least, most, budget_bytes
        )
        if forecast.total_bytes > budget_bytes:
            raise InsufficientMemory(
                f"{config.name} needs {size_text(forecast.total_bytes)} for a context of {context_tokens} tokens: "
                f"{size_text(forecast.weights_bytes)} weights, {size_text(forecast.kv_bytes)} KV pages, "
                f"{size_text(forecast.work_bytes)} work; {size_text(budget_bytes)} may be used here; take a smaller "
                f"context (--ctx), quantisation or model"
            )
        if context_tokens < most:
            notify(
                f"context cut from {most} to {context_tokens} tokens to fit {size_text(budget_bytes)}; --ctx sets it"
            )
        if wanted is None:
            context_tokens = self._cut_for_layers(context_tokens, notify)
        return self._try(context_tokens, is_sparse=is_sparse)

    def _cut_for_layers(self, context_tokens: int, notify: Callable[[str], None]) -> int:
        """The longest of the context, its half and so on whose tokens take little longer than the shortest one's."""
        if self._room is None:
            return context_tokens
        contexts = [context_tokens]
        while contexts[-1] // 2 >= _LEAST_GPU_CONTEXT_TOKENS:
            contexts.append(contexts[-1] // 2)
        counts = [placement.num_layers if (placement := self._place(n)) else 0 for n in contexts]
        times = [self._config.num_layers - count * (1 - 1 / _GPU_SPEED) for count in counts]
        chosen = next(i for i, time in enumerate(times) if time <= _WORTH * times[-1])
        if chosen > 0:
            notify(
                f"context cut from {context_tokens} to {contexts[chosen]} tokens: the GPU takes {counts[chosen]} "
                f"layers instead of {counts[0]}; --ctx sets it"
            )
        return contexts[chosen]

    def _try(self, context_tokens: int, *, is_sparse: bool) -> Fit:
        """As it would run with this context."""
        placement = self._place(context_tokens)
        limits = self._limits(context_tokens, on_gpu=placement is not None)
        program, specs = self._lower(placement.first_layer if placement else None, is_sparse=is_sparse)
        return Fit(context_tokens, program, specs, limits, placement, self._forecast(program, placement, limits))

    def _place(self, context_tokens: int) -> Placement | None:
        if self._room is not None and context_tokens not in self._placed:
            dense, specs = self._lower(None, is_sparse=False)
            entry, limits = {spec.name: spec for spec in specs}.__getitem__, self._limits(context_tokens, on_gpu=True)
            self._placed[context_tokens] = place(dense, entry, limits, self._room)
        return self._placed.get(context_tokens)

    def _lower(self, first_placed: int | None, *, is_sparse: bool) -> tuple[Program, tuple[EntrySpec, ...]]:
        """The lowered Program and its packed weights; by neuron only what the CPU computes."""
        key = first_placed if is_sparse else None, is_sparse
        if key not in self._lowered:
            lowered = lower_by_neuron(self._program, self._tensors, first_placed) if is_sparse else lower(self._program)
            program = lowered.keeping(KvType(self._options.kv))
            self._lowered[key] = program, tuple(spec for spec, _ in packed_entries(program, self._tensors))
        return self._lowered[key]

    def _limits(self, context_tokens: int, *, on_gpu: bool) -> CpuLimits:
        """Pages for one context at least; what is beyond that of `_kv_bytes` goes to groups without a window."""
        batch_tokens = min(_BATCH_TOKENS, context_tokens)
        states = self._program.keeping(KvType(self._options.kv)).states
        one = pages_for(context_tokens)
        wanted = [self._options.parallel * pages_needed(state, context_tokens, batch_tokens) for state in states]
        least = [min(one, pages) for pages in wanted]
        left_bytes = self._kv_bytes(on_gpu=on_gpu) - sum(s.page_bytes * n for s, n in zip(states, least, strict=True))
        more = max(0, left_bytes) // max(1, sum(state.page_bytes for state in states))
        num_pages = tuple(min(most, pages + more) for most, pages in zip(wanted, least, strict=True))
        return CpuLimits(context_tokens, num_pages, max_tokens=batch_tokens)

    def _kv_bytes(self, *, on_gpu: bool) -> int:
        """What was asked for; else a share of what is free, on a GPU that has layers too: there it costs layers."""
        if self._options.kv_bytes is not None:
            return self._options.kv_bytes
        free_bytes = min(self._free_bytes, self._room.num_bytes) if self._room and on_gpu else self._free_bytes
        return int(self._options.kv_share * free_bytes)

    def _forecast(self, program: Program, placement: Placement | None, limits: CpuLimits) -> MemoryForecast:
        if self._options.backend == "reference":  # 4 bytes an element, and keys and values as float32
            num_elements = sum(tensor.shape[0] * tensor.shape[1] for tensor in self._tensors.values())
            return MemoryForecast(4 * num_elements, 2 * kv_bytes(self._program, limits), 0)
        own = cpu_part(program, placement)
        weights_bytes = sum(spec.num_bytes for spec, _ in packed_entries(own, self._tensors))
        return MemoryForecast(weights_bytes, kv_bytes(own, limits), work_bytes(program, limits, self._num_threads))
