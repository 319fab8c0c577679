"""The native backend: compiles a lowered Program to flat steps over packed weights, and runs them on a thread pool."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from isotherm import _native
from isotherm.backends.cpu.break_even import set_break_even
from isotherm.backends.cpu.buffers import plan_buffers
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import neurons_name, pair_name, rows_name
from isotherm.backends.cpu.step_facts import describe_steps, max_marks
from isotherm.errors import UnsupportedModel
from isotherm.program import flow, ops
from isotherm.program.backend import Shortlist
from isotherm.program.batch import Batch
from isotherm.program.ops import NormWeights, Trim, Value
from isotherm.program.recorder import Program
from isotherm.program.recording import MARK, Recording, Walk
from isotherm.program.rope import rope_table
from isotherm.quantization.neurons import neuron_form
from isotherm.quantization.p32 import PANEL_ROWS, TILE_ROWS
from isotherm.quantization.packed_file import PackedWeights
from isotherm.types import KvType, Rope

F32 = NDArray[np.float32]
T = TypeVar("T")

_NOTHING = np.empty(0, np.uint8)
_ROPE_STEP = 1024  # positions of the rope tables that are filled at once
HEAD_DIM_MULTIPLE = 16  # lanes of a vector
_PAGE_LAYOUT = "cpu 1"  # layer after layer, head after head, each as native/kernels/table.h has it


class DevicePart(Protocol):
    """A GPU beside the CPU, on which some ops of a Program run."""

    @property
    def program(self) -> object:
        """A `_native.GpuProgram`."""

    @property
    def num_embeddings(self) -> int:
        """Token ids that its embedding has; 0: it has none."""

    @property
    def rope_tables(self) -> Mapping[Rope, F32]:
        """float32 [context, dims] of each; filled here as positions are reached."""

    def takes(self, index: int) -> bool:
        """Whether it runs the Program's op at this index."""

    def step(self, index: int) -> int:
        """The place of an op in `program`; asked for once each, in the order of the ops."""

    @property
    def most_kept(self) -> int:
        """See CompiledProgram.most_kept."""

    def shortlist_words(self, num_rows: int) -> NDArray[np.uint32]:
        """Where its shortlists of so many rows go, [rows, words]."""

    def shortlist(self, words: NDArray[np.uint32]) -> Shortlist:
        """What it wrote there of one row."""

    def num_layers(self, state: int) -> int:
        """Layers of a state group whose pages it keeps: those with the last slots."""


class CpuBackend:
    """Packed weights and a way to run them."""

    def __init__(self, weights: PackedWeights, *, isa: str, num_threads: int, most_active: float | None = None) -> None:
        """isa: as `choose_isa` gives it. most_active: share of neurons up to which those that fire are computed alone;
        None: as measured here.
        """
        self._weights = weights
        self._isa = isa
        self._num_threads = num_threads
        self._most_active = most_active

    def compile(self, program: Program, limits: CpuLimits, device: DevicePart | None = None) -> "CompiledCpu":
        """`program` is lowered; the ops that `device` takes are its own.

        Raises UnsupportedModel for a head size that the kernels cannot hold.
        """
        builder = _native.ProgramBuilder(limits.max_tokens, limits.max_head_rows)
        compiler = _Compiler(builder, program, self._weights, limits, device)
        compiler.compile()
        executor = _native.Executor(builder, self._isa, self._num_threads)
        set_break_even(executor, program, self._weights.entry, self._most_active)
        return CompiledCpu(executor, program, self._weights, compiler)


class CompiledCpu:
    """See `program.backend.CompiledProgram`. Calls release the GIL and are not thread safe."""

    def __init__(
        self, executor: "_native.Executor", program: Program, weights: PackedWeights, compiler: "_Compiler"
    ) -> None:
        self._device = compiler.device  # kept: its buffers are the executor's
        self._executor = executor
        self._program = program
        self._weights = weights
        self._buffers = compiler.buffers
        self._rope_tables = compiler.rope_tables
        self._num_positions = 0  # that the rope tables hold
        self._walks: list[Walk] | None = None  # what was computed, while it is recorded

    def forward(self, batch: Batch) -> None:
        sequences = self._begin(batch)
        finished = self._executor.run(batch.token_ids, sequences, batch.logit_rows)
        assert finished, "stopped, though nothing was raised"

    def observe(self, batch: Batch, wanted: Collection[Value], look: Callable[[Value, F32], None]) -> None:
        assert self._walks is None, "what is observed is not recorded"
        written = [
            (i, value) for i, op in enumerate(self._program.ops) for value in flow.outputs(op) if value in wanted
        ]
        stops = [(i, self._buffers.at[value]) for i, value in written]
        sequences = self._begin(batch)
        finished = self._executor.observe(
            batch.token_ids, sequences, batch.logit_rows, stops, lambda stop, rows: look(written[stop][1], rows)
        )
        assert finished, "stopped, though nothing was raised"

    def _begin(self, batch: Batch) -> list[tuple[int, int, list[NDArray[np.int32]], bool]]:
        end = max(sequence.num_cached + sequence.num_new for sequence in batch.sequences)
        if end > self._num_positions:
            self._fill_rope_tables(end)
        if self._walks is not None:
            self._walks.append(Walk(len(batch.token_ids), tuple((s.num_new, s.num_cached) for s in batch.sequences)))
        return [(s.num_new, s.num_cached, list(s.page_tables), s.is_trimmed) for s in batch.sequences]

    def logits(self, first: int, count: int, out: F32 | None = None) -> F32:
        if self._walks is not None:
            self._walks.append(Walk(count, ()))
        if out is None:
            out = np.empty((count, self._program.logits.width), np.float32)
        finished = self._executor.head(first, out)
        assert finished, "stopped, though nothing was raised"
        return out

    @property
    def most_kept(self) -> int:
        return self._device.most_kept if self._device else 0

    def shortlists(self, first: int, kept: Sequence[int]) -> list[Shortlist]:
        assert self._device is not None, "the CPU's logits are read as they are"
        if self._walks is not None:
            self._walks.append(Walk(len(kept), ()))
        words = self._device.shortlist_words(len(kept))
        finished = self._executor.shortlist(first, np.array(kept, np.int32), words)
        assert finished, "stopped, though nothing was raised"
        return [self._device.shortlist(row) for row in words]

    @property
    def page_bytes(self) -> tuple[int, ...]:
        return tuple(state.page_bytes for state in self._program.states)

    @property
    def page_layout(self) -> str:
        return _PAGE_LAYOUT

    def read_page(self, group: int, page: int) -> NDArray[np.uint8]:
        data = np.empty(self._program.states[group].page_bytes, np.uint8)
        self._executor.read_page(group, page, data)
        return data

    def write_page(self, group: int, page: int, data: NDArray[np.uint8]) -> None:
        self._executor.write_page(group, page, data)

    @property
    def busy_s(self) -> float:
        return self._executor.busy_s

    def read_weights_s(self) -> float | None:
        return self._executor.read_weights() if self._device is None else None

    def record(self, run: Callable[[], T], num_batches: int) -> tuple[T, Recording]:
        capacity = num_batches * max_marks(self._program) + 1
        walks: list[Walk] = []
        self._executor.start_log(capacity)
        self._walks = walks
        try:
            result = run()
        finally:
            self._walks = None
            marks = tuple(lane.view(MARK)[:, 0] for lane in self._executor.stop_log())
        assert max(map(len, marks)) < capacity, "the log is too small"
        steps = describe_steps(self._program, self._weights.entry)
        return result, Recording(steps, tuple(walks), marks)

    def _fill_rope_tables(self, end: int) -> None:
        start = self._num_positions
        for rope, table in self._rope_tables.items():
            stop = min(len(table), -(-end // _ROPE_STEP) * _ROPE_STEP)
            assert end <= stop, f"position {end - 1} lies past the context"
            table[start:stop] = rope_table(rope, start, stop)
            self._num_positions = stop


class _Compiler:
    """Gives every weight an index and writes the steps."""

    def __init__(
        self,
        builder: "_native.ProgramBuilder",
        program: Program,
        weights: PackedWeights,
        limits: CpuLimits,
        device: DevicePart | None,
    ) -> None:
        self._builder = builder
        self._program = program
        self._weights = weights
        self._limits = limits
        self.device = device
        self.rope_tables: dict[Rope, F32] = dict(device.rope_tables) if device else {}
        self._rope_indices: dict[Rope, int] = {}
        self._matrices: dict[str, int] = {}
        self._vectors: dict[str, int] = {}
        self.buffers = plan_buffers(program)

    def compile(self) -> None:
        for i, (state, num_pages) in enumerate(zip(self._program.states, self._limits.num_pages, strict=True)):
            num_layers = state.num_layers - (self.device.num_layers(i) if self.device else 0)
            is_q8_0 = state.kv_type is KvType.Q8_0
            self._builder.pool(is_q8_0, num_layers, num_pages, state.num_kv_heads, state.head_dim, state.window or 0)
        for width in self.buffers.widths:
            self._builder.buffer(width)
        if self.device:
            self._builder.gpu(self.device.program, self.device.num_embeddings, self._limits.context_tokens)
        for i, op in enumerate(self._program.ops):
            if self.device and self.device.takes(i):
                self._builder.device_step(self.device.step(i), isinstance(op, ops.SelectRows))
            else:
                self._step(op)

    def _step(self, op: ops.Op) -> None:
        b, at = self._builder, self.buffers.at
        match op:
            case ops.Embed():
                b.embed(self._matrix(op.weight), op.scale, at[op.out])
            case ops.EmbedPositions():
                b.embed_positions(at[op.x], self._matrix(op.weight), op.first_row, at[op.out])
            case ops.QuantLinear():
                projections = [
                    (self._matrix(p.weight), self._vector(p.bias) if p.bias else -1, at[p.out]) for p in op.projections
                ]
                residual = at[op.residual] if op.residual else -1
                activation = op.activation.value if op.activation else ""
                b.linear(at[op.x], self._norm(op.norm), projections, residual, activation)
            case ops.QuantGlu():
                pair = self._matrix(pair_name(op.gate, op.up))
                b.glu(at[op.x], self._norm(op.norm), pair, op.activation.value, at[op.out])
            case ops.PredictedLinear():
                self._predicted(op)
            case ops.SparseUp():
                self._sparse_up(op)
            case ops.TrimOp():
                activation = op.activation.value if op.activation else ""
                b.trim(at[op.x], activation, self._thresholds(op.trim), op.trim.deviations, at[op.out])
            case ops.SparseDown():
                self._sparse_down(op)
            case ops.Route():
                b.route(at[op.logits], op.experts.num_experts, op.experts.num_used, at[op.out])
            case ops.ExpertGlu():
                x, norm, routes = at[op.x], self._norm(op.norm), at[op.routes]
                b.expert_glu(x, norm, routes, self._expert_pair(op), op.activation.value, at[op.out])
            case ops.ExpertDown():
                self._expert_down(op)
            case ops.ExpertGate():
                b.expert_gate(at[op.x], self._norm(op.norm), at[op.routes], self._matrix(op.weight), at[op.out])
            case ops.SparseExpertUp():
                read, rows = (at[op.x], self._norm(op.norm), at[op.routes]), self._rows(op.weight)
                b.expert_up(read, at[op.gated], self._matrix(op.weight), rows, op.activation.value, at[op.out])
            case ops.RopeAttention():
                b.attention(self._attention(op))
            case ops.AddNorm():
                b.add_norm(at[op.a], at[op.b], self._norm(op.norm), at[op.out])
            case ops.Add():
                b.add_norm(at[op.a], at[op.b], self._norm(None), at[op.out])
            case ops.SelectRows():
                b.select(at[op.x], at[op.out])
            case _:
                raise AssertionError(f"{type(op).__name__} is not a lowered op")

    def _sparse_up(self, op: ops.SparseUp) -> None:
        at = self.buffers.at
        x, norm, gate, matrix = at[op.x], self._norm(op.norm), at[op.gated], self._matrix(op.weight)
        rows = self._rows(op.weight, is_kept=op.by_rows)
        self._builder.up(x, norm, gate, matrix, rows, op.activation.value, at[op.out])

    def _predicted(self, op: ops.PredictedLinear) -> None:
        at = self.buffers.at
        projection = (self._matrix(op.weight), self._vector(op.bias) if op.bias else -1, at[op.out])
        activation = op.activation.value if op.activation else ""
        scores, x, norm = at[op.scores], at[op.x], self._norm(op.norm)
        rows = self._rows(op.weight, is_kept=op.by_rows)
        self._builder.predicted(x, norm, projection, rows, activation, scores, op.threshold)

    def _rows(self, weight: str, *, is_kept: bool = True) -> NDArray[np.uint8]:
        """Those of a matrix, each in one piece; none where they are not kept so."""
        return self._weights.array(rows_name(weight)).view(np.uint8) if is_kept else _NOTHING

    def _neurons(self, weight: str) -> tuple[NDArray[np.uint8], tuple[bool, bool, bool, bool, int]]:
        """Those of a matrix, and how they are kept."""
        form = neuron_form(self._weights.entry(neurons_name(weight)).types[0])
        assert form is not None
        return self._weights.array(neurons_name(weight)).view(np.uint8), astuple(form)

    def _thresholds(self, trim: Trim) -> int:
        return -1 if trim.thresholds is None else self._builder.vector(np.frombuffer(trim.thresholds, np.float32))

    def _sparse_down(self, op: ops.SparseDown) -> None:
        at = self.buffers.at
        projection = (self._matrix(op.weight), self._vector(op.bias) if op.bias else -1, at[op.out])
        residual = at[op.residual] if op.residual else -1
        self._builder.down(at[op.x], projection, residual, *self._neurons(op.weight))

    def _expert_pair(self, op: ops.ExpertGlu) -> int:
        ffn_size = op.out.width // op.experts.num_used
        if ffn_size % TILE_ROWS:
            raise UnsupportedModel(
                f"experts of {ffn_size} neurons; the native backend needs a multiple of {TILE_ROWS}; take --backend "
                "reference"
            )
        return self._matrix(pair_name(op.gate, op.up))

    def _expert_down(self, op: ops.ExpertDown) -> None:
        at = self.buffers.at
        if op.out.width % PANEL_ROWS:
            raise UnsupportedModel(
                f"experts with {op.out.width} outputs; the native backend needs a multiple of {PANEL_ROWS}; take "
                "--backend reference"
            )
        residual = at[op.residual] if op.residual else -1
        neurons, form = self._neurons(op.weight) if op.by_neuron else (_NOTHING, (False,) * 4 + (0,))
        matrix = self._matrix(op.weight)
        self._builder.expert_down(at[op.x], at[op.routes], matrix, residual, neurons, form, at[op.out])

    def _matrix(self, name: str) -> int:
        if name not in self._matrices:
            entry = self._weights.entry(name)
            types = [quant_type.value for quant_type in entry.types]
            self._matrices[name] = self._builder.matrix(self._weights.array(name).view(np.uint8), types, *entry.shape)
        return self._matrices[name]

    def _vector(self, name: str) -> int:
        if name not in self._vectors:
            self._vectors[name] = self._builder.vector(self._weights.array(name).view(np.float32))
        return self._vectors[name]

    def _norm(self, norm: NormWeights | None) -> "_native.NormRef":
        if norm is None:
            return _native.NormRef(-1, 0.0, -1)
        bias = self._vector(norm.bias) if norm.bias else -1
        return _native.NormRef(self._vector(norm.weight), norm.eps, bias)

    def _rope(self, rope: Rope | None) -> int:
        if rope is None:
            return -1
        if rope not in self._rope_indices:
            if rope not in self.rope_tables:
                self.rope_tables[rope] = np.zeros((self._limits.context_tokens, rope.dims), np.float32)
            self._rope_indices[rope] = self._builder.rope_table(self.rope_tables[rope])
        return self._rope_indices[rope]

    def _attention(self, op: ops.RopeAttention) -> "_native.AttentionSpec":
        if op.shape.head_dim % HEAD_DIM_MULTIPLE:
            raise UnsupportedModel(
                f"heads of {op.shape.head_dim} columns; the native backend needs a multiple of {HEAD_DIM_MULTIPLE}"
            )
        spec = _native.AttentionSpec()
        spec.q, spec.k, spec.v, spec.out = (self.buffers.at[value] for value in (op.q, op.k, op.v, op.out))
        spec.q_norm, spec.k_norm = self._norm(op.q_norm), self._norm(op.k_norm)
        spec.rope_table = self._rope(op.rope)
        spec.num_heads, spec.num_kv_heads = op.shape.num_heads, op.shape.num_kv_heads
        spec.head_dim, spec.scale, spec.window = op.shape.head_dim, op.shape.scale, op.shape.window or 0
        spec.state, spec.slot = op.state, op.slot
        return spec
