"""The truth, in NumPy: runs any Program, recorded in float32, lowered in the arithmetic of the contract."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.reference import contract, experts, float32
from isotherm.errors import OptionError
from isotherm.program import flow, ops
from isotherm.program.backend import Shortlist, WeightTensor
from isotherm.program.batch import Batch
from isotherm.program.ops import Op, Value
from isotherm.program.recorder import PAGE_TOKENS, Program
from isotherm.program.recording import Recording
from isotherm.program.rope import rope_table
from isotherm.quantization.layouts import Fields, decode, dequantise
from isotherm.types import Activation, Rope

F32 = NDArray[np.float32]
T = TypeVar("T")

_PAGE_LAYOUT = "float32 1"  # [layers, k or v, page positions, kv heads, head_dim]


class ReferenceBackend:
    """Weights stay decoded in memory, 4 bytes an element: meant for tests and small models."""

    def __init__(self, tensors: Mapping[str, WeightTensor]) -> None:
        """tensors: by canonical name."""
        self._tensors = tensors
        self._floats: dict[str, F32] = {}
        self._fields: dict[str, Fields] = {}

    def compile(self, program: Program, *, num_pages: tuple[int, ...]) -> "CompiledReference":
        """num_pages: KV pages to hold per state group."""
        return CompiledReference(program, self, num_pages)

    def is_float(self, name: str) -> bool:
        return self._tensors[name].quant_type.is_float

    def floats(self, name: str) -> F32:
        """Dequantised, [rows, columns]."""
        if name not in self._floats:
            tensor = self._tensors[name]
            self._floats[name] = dequantise(tensor.read(), tensor.quant_type, tensor.shape[1])
        return self._floats[name]

    def vector(self, name: str) -> F32:
        row: F32 = self.floats(name)[0]
        return row

    def fields(self, name: str) -> Fields:
        if name not in self._fields:
            tensor = self._tensors[name]
            self._fields[name] = decode(tensor.read(), tensor.quant_type, tensor.shape[1])
        return self._fields[name]


class CompiledReference:
    """See `program.backend.CompiledProgram`."""

    def __init__(self, program: Program, weights: ReferenceBackend, num_pages: tuple[int, ...]) -> None:
        self._program = program
        self._weights = weights
        self._head = next(i for i, op in enumerate(program.ops) if isinstance(op, ops.SelectRows))
        self._values: dict[Value, F32] = {}
        self.busy_s = 0.0
        self._ropes: dict[Rope, F32] = {}
        # [layers, pages, k or v, page positions, kv heads, head_dim]
        self._kv = [
            np.zeros((s.num_layers, pages, 2, PAGE_TOKENS, s.num_kv_heads, s.head_dim), np.float32)
            for s, pages in zip(program.states, num_pages, strict=True)
        ]

    def forward(self, batch: Batch) -> None:
        started = time.perf_counter()
        self._batch, self._values = batch, {}
        for op in self._program.ops[: self._head]:
            self._step(op, self._values, batch)
        self.busy_s += time.perf_counter() - started

    def logits(self, first: int, count: int, out: F32 | None = None) -> F32:
        batch = replace(self._batch, logit_rows=self._batch.logit_rows[first : first + count])
        started = time.perf_counter()
        values = dict(self._values)
        for op in self._program.ops[self._head :]:
            self._step(op, values, batch)
        self.busy_s += time.perf_counter() - started
        logits = values[self._program.logits]
        if out is None:
            return logits
        out[:] = logits
        return out

    def observe(self, batch: Batch, wanted: Collection[Value], look: Callable[[Value, F32], None]) -> None:
        self._batch, self._values = batch, {}
        shown = [i for i, op in enumerate(self._program.ops) if any(value in wanted for value in flow.outputs(op))]
        for op in self._program.ops[: max([self._head, *(i + 1 for i in shown)])]:
            self._step(op, self._values, batch)
            for value in flow.outputs(op):
                if value in wanted:
                    look(value, self._values[value])

    @property
    def page_bytes(self) -> tuple[int, ...]:
        return tuple(kv[:, 0].nbytes for kv in self._kv)

    @property
    def page_layout(self) -> str:
        return _PAGE_LAYOUT

    def read_page(self, group: int, page: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._kv[group][:, page].tobytes(), np.uint8)

    def write_page(self, group: int, page: int, data: NDArray[np.uint8]) -> None:
        pages = self._kv[group]
        pages[:, page] = data.view(np.float32).reshape(pages[:, page].shape)

    @property
    def most_kept(self) -> int:
        return 0

    def shortlists(self, first: int, kept: Sequence[int]) -> list[Shortlist]:
        raise AssertionError("the reference backend gives no shortlists")

    def read_weights_s(self) -> None:
        return None

    def record(self, run: Callable[[], T], num_batches: int) -> tuple[T, Recording]:
        raise OptionError("the reference backend does not profile; use --backend cpu, or measure without --profile")

    def _step(self, op: Op, values: dict[Value, F32], batch: Batch) -> None:
        w = self._weights
        match op:
            case ops.Embed():
                values[op.out] = w.floats(op.weight)[batch.token_ids] * np.float32(op.scale)
            case ops.EmbedPositions():
                values[op.out] = values[op.x] + w.floats(op.weight)[op.first_row + batch.positions()]
            case ops.Norm():
                x = values[op.x].reshape(-1, op.group)
                values[op.out] = self._norm(float32, x, op.norm).reshape(values[op.x].shape)
            case ops.Linear():
                values[op.out] = values[op.x] @ w.floats(op.weight).T + (w.vector(op.bias) if op.bias else 0)
            case ops.RopeOp():
                heads = values[op.x].reshape(len(values[op.x]), -1, op.head_dim)
                values[op.out] = float32.rotate(heads, self._rope(op.rope, batch)).reshape(values[op.x].shape)
            case ops.Attention():
                values[op.out] = self._attention(op, values, batch, exact=False)
            case ops.Ffn():
                values[op.out] = self._ffn(values[op.x], op, batch)
            case ops.Moe():
                weights = (w.floats(name) for name in (op.router, op.gate, op.up, op.down))
                values[op.out] = experts.moe_float32(values[op.x], op, *weights)
            case ops.Add():
                values[op.out] = values[op.a] + values[op.b]
            case ops.SelectRows():
                values[op.out] = values[op.x][batch.logit_rows]
            case ops.QuantLinear():
                x, quantised = self._quantise(values[op.x], op.norm)
                for p in op.projections:
                    y = self._finished(self._project(x, quantised, p.weight), p.bias, op.activation)
                    values[p.out] = y if op.residual is None else values[op.residual] + y
            case ops.QuantGlu():
                x, quantised = self._quantise(values[op.x], op.norm)
                gate, up = (self._project(x, quantised, name) for name in (op.gate, op.up))
                values[op.out] = contract.glu(gate, up, op.activation)
            case ops.SparseUp():
                up = self._project(*self._quantise(values[op.x], op.norm), op.weight)
                values[op.out] = contract.glu(values[op.gated], up, op.activation)
            case ops.PredictedLinear():
                trimmed = self._trimmed_rows(len(values[op.x]), batch)
                values[op.out] = self._predicted(values[op.x], values[op.scores], op, trimmed)
            case ops.TrimOp():
                x = values[op.x]
                values[op.out] = self._trim(contract, x, op.activation, op.trim, self._trimmed_rows(len(x), batch))
            case ops.SparseDown():
                bias = w.vector(op.bias) if op.bias else 0
                y = self._project(*self._quantise(values[op.x], None), op.weight) + bias
                values[op.out] = y if op.residual is None else values[op.residual] + y
            case ops.Route():
                values[op.out] = experts.route(values[op.logits], op.experts.num_used)
            case ops.ExpertGlu() | ops.ExpertGate() | ops.SparseExpertUp():
                values[op.out] = self._expert_hidden(op, values)
            case ops.ExpertDown():
                y = self._expert_down(values[op.x], values[op.routes], op)
                values[op.out] = y if op.residual is None else values[op.residual] + y
            case ops.RopeAttention():
                values[op.out] = self._attention(op, values, batch, exact=True)
            case ops.AddNorm():
                values[op.out] = values[op.a] + self._norm(contract, values[op.b], op.norm)

    def _norm(self, arithmetic: Any, x: F32, norm: ops.NormWeights) -> F32:
        """arithmetic: of `contract` or of `float32`."""
        weight = self._weights.vector(norm.weight)
        if norm.bias is None:
            normed: F32 = arithmetic.rms_norm(x, weight, norm.eps)
        else:
            normed = arithmetic.layer_norm(x, weight, self._weights.vector(norm.bias), norm.eps)
        return normed

    def _finished(self, y: F32, bias: str | None, activation: Activation | None) -> F32:
        if bias:
            y = y + self._weights.vector(bias)
        return contract.activate(y, activation) if activation else y

    def _predicted(self, x: F32, scores: F32, op: ops.PredictedLinear, trimmed: NDArray[np.bool_]) -> F32:
        y = self._finished(self._project(*self._quantise(x, op.norm), op.weight), op.bias, op.activation)
        keeps = ~trimmed[:, None] | contract.is_predicted(scores, op.threshold)
        return np.where(keeps, y, np.float32(0.0))

    def _trim(
        self, arithmetic: Any, x: F32, activation: Activation | None, trim: ops.Trim | None, trimmed: NDArray[np.bool_]
    ) -> F32:
        """arithmetic: of `contract` or of `float32`; trimmed [tokens]."""
        if trim is None:
            return x
        thresholds = None if trim.thresholds is None else np.frombuffer(trim.thresholds, np.float32)
        return np.where(trimmed[:, None], arithmetic.trim(x, activation, thresholds, trim.deviations), x)

    def _trimmed_rows(self, num_rows: int, batch: Batch) -> NDArray[np.bool_]:
        """Of all tokens, or, behind SelectRows, of those that give logits."""
        trimmed = batch.trimmed_rows()
        return trimmed if len(trimmed) == num_rows else trimmed[batch.logit_rows]

    def _ffn(self, x: F32, op: ops.Ffn, batch: Batch) -> F32:
        w, trimmed = self._weights, self._trimmed_rows(len(x), batch)
        up = x @ w.floats(op.up).T + (w.vector(op.up_bias) if op.up_bias else 0)
        keeps = np.ones(up.shape, np.bool_)
        if op.predictor is not None:
            low = float32.activate(x @ w.floats(op.predictor.first).T, Activation.RELU)
            scores = low @ w.floats(op.predictor.second).T
            keeps = ~trimmed[:, None] | contract.is_predicted(scores, op.predictor.threshold)
        if op.gate is None:
            hidden = np.where(keeps, float32.activate(up, op.activation), np.float32(0.0))
        else:
            gate = np.where(keeps, x @ w.floats(op.gate).T, np.float32(0.0))
            gate = self._trim(float32, gate, op.activation, op.trim_gate, trimmed)
            hidden = float32.glu(gate, up, op.activation)
        hidden = self._trim(float32, hidden, None, op.trim_hidden, trimmed)
        out: F32 = hidden @ w.floats(op.down).T + (w.vector(op.down_bias) if op.down_bias else 0)
        return out

    def _expert_hidden(
        self, op: ops.ExpertGlu | ops.ExpertGate | ops.SparseExpertUp, values: Mapping[Value, F32]
    ) -> F32:
        x = values[op.x] if op.norm is None else self._norm(contract, values[op.x], op.norm)
        chosen = experts.experts_of(values[op.routes], op.experts.num_used)
        inputs = np.repeat(x[:, None], op.experts.num_used, axis=1)

        def times(weight: str) -> F32:
            return experts.matmul(inputs, chosen, self._matrix(weight), op.experts.num_experts).reshape(len(x), -1)

        match op:
            case ops.ExpertGlu():
                return contract.glu(times(op.gate), times(op.up), op.activation)
            case ops.ExpertGate():
                return times(op.weight)
            case ops.SparseExpertUp():
                return contract.glu(values[op.gated], times(op.weight), op.activation)

    def _expert_down(self, hidden: F32, routes: F32, op: ops.ExpertDown) -> F32:
        chosen = experts.experts_of(routes, op.experts.num_used)
        inputs = hidden.reshape(*chosen.shape, -1)
        return experts.mix(experts.matmul(inputs, chosen, self._matrix(op.weight), op.experts.num_experts), routes)

    def _matrix(self, weight: str) -> F32 | Fields:
        return self._weights.floats(weight) if self._weights.is_float(weight) else self._weights.fields(weight)

    def _quantise(self, x: F32, norm: ops.NormWeights | None) -> tuple[F32, tuple[F32, F32]]:
        if norm is not None:
            x = self._norm(contract, x, norm)
        return x, contract.quantise(x)

    def _project(self, x: F32, quantised: tuple[F32, F32], weight: str) -> F32:
        if self._weights.is_float(weight):
            return contract.float_matmul(x, self._weights.floats(weight))
        return contract.quant_matmul(*quantised, self._weights.fields(weight))

    def _rope(self, rope: Rope, batch: Batch) -> F32:
        positions = batch.positions()
        if len(self._ropes.get(rope, ())) <= positions.max():
            self._ropes[rope] = rope_table(rope, 0, 2 * int(positions.max()) + 2)
        return self._ropes[rope][positions]

    def _attention(
        self, op: ops.Attention | ops.RopeAttention, values: dict[Value, F32], batch: Batch, *, exact: bool
    ) -> F32:
        s = op.shape
        q, k, v = (values[x].reshape(len(batch.token_ids), -1, s.head_dim) for x in (op.q, op.k, op.v))
        if isinstance(op, ops.RopeAttention):
            q, k = (self._norm(contract, x, norm) if norm else x for x, norm in ((q, op.q_norm), (k, op.k_norm)))
            if op.rope:
                q, k = (contract.rotate(x, self._rope(op.rope, batch)) for x in (q, k))
            kv_type = self._program.states[op.state].kv_type
            k, v = contract.to_cache(k, kv_type), contract.to_cache(v, kv_type)
        out = np.empty_like(q)
        start = 0
        for sequence in batch.sequences:
            end = start + sequence.num_new
            pages = self._kv[op.state][op.slot]
            table_of_pages = sequence.page_tables[op.state]
            at = np.arange(sequence.num_cached, sequence.num_cached + sequence.num_new)
            pages[table_of_pages[at // PAGE_TOKENS], 0, at % PAGE_TOKENS] = k[start:end]
            pages[table_of_pages[at // PAGE_TOKENS], 1, at % PAGE_TOKENS] = v[start:end]
            seen = np.arange(at[-1] + 1)  # pages that a window has freed are gathered too, and masked
            keys, cached_values = (pages[table_of_pages[seen // PAGE_TOKENS], i, seen % PAGE_TOKENS] for i in (0, 1))
            if exact:
                out[start:end] = self._attend_exactly(q[start:end], keys, cached_values, sequence.num_cached, s)
            else:
                out[start:end] = float32.attend(
                    q[start:end], keys, cached_values, sequence.num_cached, s.scale, s.window
                )
            start = end
        return out.reshape(len(q), -1)

    def _attend_exactly(self, q: F32, keys: F32, values: F32, num_cached: int, s: ops.AttentionShape) -> F32:
        out = np.empty_like(q)
        group = s.num_heads // s.num_kv_heads
        for i in range(len(q)):
            for head in range(s.num_heads):
                k, v = keys[:, head // group], values[:, head // group]
                out[i, head] = contract.attend(q[i, head], k, v, num_cached + i, s.scale, s.window)
        return out
