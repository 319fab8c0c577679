"""A small model of random weights, computed by the CPU and by a device: one that rounds otherwise is found out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.cpu.backend import CpuBackend
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pack_in_memory
from isotherm.backends.gpu.device import KernelCache, OpenGpu
from isotherm.backends.gpu.placement import EVERYTHING, Placement, compile_placed
from isotherm.backends.gpu.sources import matmul_source
from isotherm.errors import DeviceFailed
from isotherm.program import ops
from isotherm.program.batch import Batch, Sequence
from isotherm.program.ops import AttentionShape, NormWeights, Projection, Value
from isotherm.program.recorder import Program, StateKind, StateSpec
from isotherm.quantization.layouts import BLOCKS
from isotherm.types import Activation, QuantType, Rope

_WIDTH, _FFN_SIZE, _VOCAB = 256, 512, 96
_SHAPE = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125, window=None)
_LIMITS = CpuLimits(context_tokens=576, num_pages=(9,), max_tokens=530, max_head_rows=16)
_STEPS = (530, 1, 3)  # tokens: past a block of attention, then each a decode of few rows
_BASE_SCALE = 0.001  # of blocks: weights are of the order of 0.1


def check_answers(gpu: OpenGpu, cache: KernelCache, isa: str, notify: Callable[[str], None]) -> None:
    """Once for each device, driver and version of the kernels; not for a CPU that poses as a device.

    Raises DeviceFailed where the logits are not the CPU's, bit for bit.
    """
    if not gpu.facts.is_gpu:
        return
    key = gpu.key(matmul_source(QuantType.Q4_K, QuantType.Q4_K, gpu.tiling)) + "-trial"
    if cache.read(key):
        return
    notify(f"trying {gpu.name} ({gpu.facts.name}) against the CPU, once")
    if not computes_alike(gpu, isa):
        raise DeviceFailed(f"{gpu.name} ({gpu.facts.name}) gives other numbers than the CPU; a newer driver may help")
    cache.write(key, b"alike")


def computes_alike(gpu: OpenGpu, isa: str) -> bool:
    """Whether a prompt and what is decoded after it have the CPU's logits."""
    program = _program()
    weights = pack_in_memory(program, _tensors(program))
    part = compile_placed(gpu, program, Placement(EVERYTHING, 1, 0), weights, _LIMITS)
    backend = CpuBackend(weights, isa=isa, num_threads=1)
    pair, start = (backend.compile(program, _LIMITS), backend.compile(program, _LIMITS, part)), 0
    for count in _STEPS:
        ids = np.arange(start, start + count, dtype=np.int32) % _VOCAB
        rows = np.arange(max(0, count - 9), count, dtype=np.int32)
        batch = Batch(ids, (Sequence(count, start, (np.arange(9, dtype=np.int32),)),), rows)
        for compiled in pair:
            compiled.forward(batch)
        expected, found = (compiled.logits(0, len(rows)) for compiled in pair)
        assert np.isfinite(expected).all()
        if not np.array_equal(expected, found):
            return False
        start += count
    return True


def _program() -> Program:
    """One layer and a head, lowered."""
    widths = (_WIDTH, _WIDTH, 128, 128, _WIDTH, _WIDTH, _WIDTH, _WIDTH, _FFN_SIZE, _WIDTH, _VOCAB)
    x, q, k, v, attended, kept, rest, mixed, hidden, y, logits = (Value(i, width) for i, width in enumerate(widths))
    norm = NormWeights("layers.0.norm", 1e-5)
    qkv = tuple(Projection(out, f"layers.0.{name}", None) for out, name in ((q, "q"), (k, "k"), (v, "v")))
    lowered: tuple[ops.Op, ...] = (
        ops.Embed(x, "embed", 1.0),
        ops.QuantLinear(x, norm, qkv, None),
        ops.RopeAttention(attended, q, k, v, None, None, Rope(10000.0, 64), _SHAPE, 0, 0),
        ops.SelectRows(kept, attended),
        ops.SelectRows(rest, x),
        ops.QuantLinear(kept, None, (Projection(mixed, "layers.0.o", None),), rest),
        ops.QuantGlu(hidden, mixed, norm, "layers.0.gate", "layers.0.up", Activation.SILU),
        ops.QuantLinear(hidden, None, (Projection(y, "layers.0.down", None),), mixed),
        ops.QuantLinear(y, norm, (Projection(logits, "head", None),), None),
    )
    state = StateSpec(StateKind.KV, 1, _SHAPE.num_kv_heads, _SHAPE.head_dim, window=None)
    return Program("trial", lowered, (state,), logits)


@dataclass(frozen=True)
class _Random:
    """A WeightTensor of random blocks."""

    quant_type: QuantType
    shape: tuple[int, int]
    raw: NDArray[np.uint8]

    def read(self, row_start: int = 0, row_end: int | None = None) -> NDArray[np.uint8]:
        return self.raw[row_start:row_end]


def _tensors(program: Program) -> dict[str, _Random]:
    shapes = {"layers.0.norm": (1, _WIDTH), "embed": (_VOCAB, _WIDTH), "head": (_VOCAB, _WIDTH)}
    for name, rows in (("q", _WIDTH), ("k", 128), ("v", 128), ("o", _WIDTH), ("gate", _FFN_SIZE), ("up", _FFN_SIZE)):
        shapes[f"layers.0.{name}"] = rows, _WIDTH
    shapes["layers.0.down"] = _WIDTH, _FFN_SIZE
    rng = np.random.default_rng(0)
    return {name: _random(name, shape, rng) for name, shape in shapes.items()}


def _random(name: str, shape: tuple[int, int], rng: np.random.Generator) -> _Random:
    """The types of a usual file: v and down in more bits than the others."""
    rows, columns = shape
    if rows == 1 or name == "embed":
        quant_type, dtype = (QuantType.F32, np.float32) if rows == 1 else (QuantType.F16, np.float16)
        values = rng.standard_normal(shape).astype(dtype)
        return _Random(quant_type, shape, values.view(np.uint8))
    quant_type = QuantType.Q6_K if name in ("layers.0.v", "layers.0.down") else QuantType.Q4_K
    raw = rng.integers(0, 256, (rows, quant_type.row_bytes(columns)), np.uint8)
    blocks = raw.view(BLOCKS[quant_type])
    for field in {"d", "dmin"} & set(blocks.dtype.names or ()):
        blocks[field] = rng.uniform(_BASE_SCALE / 4, _BASE_SCALE, blocks.shape).astype("<f2").view("<u2")
    return _Random(quant_type, shape, raw)
