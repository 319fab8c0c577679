"""Tiny whole models, lowered and packed once, for tests of the native backend."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tiny_models import write_tiny

from isotherm.backends.cpu.backend import CompiledCpu, CpuBackend
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.backends.cpu.packing import pack_program
from isotherm.backends.reference.backend import CompiledReference, ReferenceBackend
from isotherm.formats.checkpoint import Checkpoint, open_checkpoint
from isotherm.models import FAMILIES
from isotherm.program.batch import FREED_PAGE, Batch, Sequence
from isotherm.program.lowering import lower
from isotherm.program.recorder import PAGE_TOKENS, Program
from isotherm.quantization.packed_file import PackedMemory
from isotherm.types import QuantType

F32 = NDArray[np.float32]
Ints = NDArray[np.int32]
MAX_POSITIONS = 2048


@dataclass(frozen=True)
class TinyModel:
    """A tiny model on any backend."""

    checkpoint: Checkpoint
    recorded: Program
    lowered: Program
    packed: PackedMemory

    def native(self, isa: str, num_threads: int = 2, *, num_pages: int = 32, max_tokens: int = 2048) -> CompiledCpu:
        backend = CpuBackend(self.packed, isa=isa, num_threads=num_threads, most_active=1.0)
        limits = CpuLimits(MAX_POSITIONS, (num_pages,) * len(self.lowered.states), max_tokens, max_head_rows=max_tokens)
        return backend.compile(self.lowered, limits)

    def by_neurons(self) -> "TinyModel":
        """The same model, its FFNs computed by neurons."""
        lowered, packed = lower(self.recorded, lambda _: True), PackedMemory()
        pack_program(lowered, self.checkpoint.tensors, packed)
        return replace(self, lowered=lowered, packed=packed)

    def reference(self, *, lowered: bool = True, num_pages: int = 8) -> CompiledReference:
        program = self.lowered if lowered else self.recorded
        return ReferenceBackend(self.checkpoint.tensors).compile(program, num_pages=(num_pages,) * len(program.states))

    def sequence(self, num_new: int, num_cached: int, pages: Ints) -> Sequence:
        """`pages` in each state group in another order; those that a window has passed are freed."""
        tables = []
        for group, state in enumerate(self.lowered.states):
            table = (pages[::-1] if group % 2 else pages).copy()
            if state.window is not None:
                table[: max(0, num_cached + 1 - state.window) // PAGE_TOKENS] = FREED_PAGE
            tables.append(table)
        return Sequence(num_new, num_cached, tuple(tables))

    def batch(self, ids: Ints, num_cached: int = 0, pages: Ints | None = None) -> Batch:
        """One sequence, all rows wanted."""
        if pages is None:
            pages = np.arange(-(-(num_cached + len(ids)) // PAGE_TOKENS), dtype=np.int32)
        rows = np.arange(len(ids), dtype=np.int32)
        return Batch(ids, (self.sequence(len(ids), num_cached, pages),), rows)


def make_tiny(folder: Path, family: str, quant_type: QuantType, activation: str = "", **sizes: Any) -> TinyModel:
    """activation: where it is not the one of the family. `sizes`: see tiny_models.TinySizes.

    Every second layer of gemma3 is a global one.
    """
    metadata = {"gemma3.attention.sliding_window_pattern": 2} if family == "gemma3" else {}
    metadata |= {"isotherm.activation": activation} if activation else {}
    path = write_tiny(folder / f"{family}-{quant_type.value}.gguf", family, quant_type, metadata=metadata, **sizes)
    checkpoint = open_checkpoint(path)
    recorded = FAMILIES[family](checkpoint.config)
    lowered = lower(recorded)
    packed = PackedMemory()
    pack_program(lowered, checkpoint.tensors, packed)
    return TinyModel(checkpoint, recorded, lowered, packed)


@cache
def text_ids(num_tokens: int, seed: int = 0) -> Ints:
    """Token ids that every tiny model has."""
    return np.random.default_rng(seed).integers(0, 300, num_tokens).astype(np.int32)


def run(compiled: CompiledCpu | CompiledReference, batch: Batch) -> F32:
    compiled.forward(batch)
    return compiled.logits(0, len(batch.logit_rows))
