"""How fast the kernels take each weight type, on random matrices: one row from memory, and many rows.

    python benchmarks/weight_types.py --types Q4_0,IQ4_XS

`read` is one row times a matrix larger than the caches, as decode has it: packed bytes per second. `rows` is 512 rows
times a matrix, as a prompt has it: operations per second, two to a weight and row. See README.md beside this file.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peers import RESULTS, commit

from isotherm.backends.cpu.backend import CompiledCpu, CpuBackend
from isotherm.backends.cpu.isa import choose_isa
from isotherm.backends.cpu.limits import CpuLimits
from isotherm.probe import measure, physical_cores
from isotherm.program import ops
from isotherm.program.batch import Batch
from isotherm.program.batch import Sequence as BatchSequence
from isotherm.program.ops import Projection, Value
from isotherm.program.recorder import Program
from isotherm.quantization.layouts import BLOCKS
from isotherm.quantization.p32 import PANEL_ROWS, pack_matrix, panel_bytes
from isotherm.quantization.packed_file import EntryKind, EntrySpec, PackedMemory
from isotherm.types import QuantType

QUANTISED = tuple(quant_type.value for quant_type in QuantType if not quant_type.is_float)
_DIFFERENT_PANELS = 8  # then they repeat: nothing is read twice, and packing takes no time


@dataclass(frozen=True)
class Rates:
    """Of every repetition."""

    bits_per_weight: float
    read_bytes_per_s: list[float]
    ops_per_s: list[float]


class Product:
    """Some rows times a matrix of one type, by the native backend: the head of a Program that has nothing else."""

    def __init__(
        self, quant_type: QuantType, shape: tuple[int, int], num_rows: int, isa: str, num_threads: int
    ) -> None:
        rng = np.random.default_rng(0)
        matrix_rows, columns = shape
        x, selected, logits = Value(0, columns), Value(1, columns), Value(2, matrix_rows)
        program = Program(
            "weight-types",
            (
                ops.Embed(x, "inputs", 1.0),
                ops.SelectRows(selected, x),
                ops.QuantLinear(selected, None, (Projection(logits, "weight", None),), None),
            ),
            (),
            logits,
        )
        weights = PackedMemory()
        inputs = rng.standard_normal((PANEL_ROWS, columns)).astype(np.float32).view(np.uint8)
        inputs_spec = EntrySpec("inputs", EntryKind.MATRIX, (QuantType.F32,), (PANEL_ROWS, columns))
        weights.add(inputs_spec, [pack_matrix(inputs, QuantType.F32, columns)])
        panels = pack_matrix(_random_rows(quant_type, columns, rng), quant_type, columns)
        spec = EntrySpec("weight", EntryKind.MATRIX, (quant_type,), shape)
        whole, rest = divmod(spec.num_bytes, panels.nbytes)
        weights.add(spec, [*([panels] * whole), panels[:rest]])
        self.num_bytes, self._num_rows = spec.num_bytes, num_rows
        limits = CpuLimits(num_rows, (), max_tokens=num_rows, max_head_rows=num_rows)
        self._compiled: CompiledCpu = CpuBackend(weights, isa=isa, num_threads=num_threads).compile(program, limits)
        ids = np.arange(num_rows, dtype=np.int32)
        self._compiled.forward(Batch(ids % PANEL_ROWS, (BatchSequence(num_rows, 0, ()),), ids))

    def run_s(self) -> float:
        before = self._compiled.busy_s
        self._compiled.logits(0, self._num_rows)
        return self._compiled.busy_s - before


def _random_rows(quant_type: QuantType, columns: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random codes under scales that are finite and not subnormal."""
    num_rows = _DIFFERENT_PANELS * PANEL_ROWS
    raw = rng.integers(0, 256, (num_rows, quant_type.row_bytes(columns)), np.uint8)
    if quant_type.is_float:
        return raw & 0x3F
    blocks = raw.view(BLOCKS[quant_type])
    names = blocks.dtype.names or ()
    for name in {"d", "dmin", "m"} & set(names):
        blocks[name] = np.float16(0.01).view("<u2")
    if "d" not in names and "scales" in names:  # IQ1_M: its float16 lies above the scales
        blocks["scales"] = (blocks["scales"] & 0x0FFF) | np.array([0, 0, 0, 0x2000], "<u2")
    for name in {"e8m0", "e4m3"} & set(names):
        blocks[name] = {"e8m0": 120, "e4m3": 0x20}[name]
    return raw


def measure_type(quant_type: QuantType, options: argparse.Namespace) -> Rates:
    columns, isa = options.columns, choose_isa()
    types = quant_type, quant_type
    num_panels = max(1, (options.megabytes << 20) // panel_bytes(types, columns))
    read = Product(quant_type, (num_panels * PANEL_ROWS, columns), 1, isa, options.threads)
    many = Product(quant_type, (options.matrix_rows, columns), options.rows, isa, options.threads)
    for product in (read, many):
        product.run_s()  # a warm-up: pages, caches
    operations = 2 * options.matrix_rows * columns * options.rows
    return Rates(
        bits_per_weight=8 * panel_bytes(types, columns) / (PANEL_ROWS * columns),
        read_bytes_per_s=[read.num_bytes / read.run_s() for _ in range(options.repetitions)],
        ops_per_s=[operations / many.run_s() for _ in range(options.repetitions)],
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(QUANTISED), help="default: all that are quantised")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="default: %(default)s")
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=384, help="of the matrix that is read; default: %(default)s")
    parser.add_argument("--rows", type=int, default=512, help="that are multiplied at once; default: %(default)s")
    parser.add_argument("--matrix-rows", type=int, default=4096, help="of the other matrix; default: %(default)s")
    parser.add_argument("--columns", type=int, default=4096, help="a multiple of 256; default: %(default)s")
    parser.add_argument("--results", type=Path, help=f"folder of a results file; {RESULTS.name}/ beside this file, say")
    options = parser.parse_args(arguments)
    known = [quant_type.value for quant_type in QuantType]
    if unknown := set(options.types.split(",")) - set(known):
        parser.error(f"no such type: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if min(options.repetitions, options.megabytes, options.rows, options.threads) < 1 or options.matrix_rows < 2:
        parser.error("sizes and repetitions must be positive")
    if options.columns < 256 or options.columns % 256:
        parser.error("--columns must be a multiple of 256")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    print(f"{'type':8} {'bits':>6} {'read GB/s':>10} {'of probe':>9} {'rows GOPS':>10} {'of probe':>9}")
    for name in options.types.split(","):
        probe = measure(options.threads)
        rates = measure_type(QuantType(name), options)
        read, rate = (statistics.median(samples) for samples in (rates.read_bytes_per_s, rates.ops_per_s))
        print(
            f"{name:8} {rates.bits_per_weight:6.3f} {read / 1e9:10.1f} {read / probe.read_bytes_per_s:9.0%} "
            f"{rate / 1e9:10.0f} {rate / probe.int8_ops_per_s:9.0%}",
            flush=True,
        )
        if options.results:
            record: dict[str, Any] = {
                "date": date.today().isoformat(),
                "what": "weight-types",
                "commit": commit(),
                "probe": asdict(probe),
                "isa": choose_isa(),
                "type": name,
                **{key: getattr(options, key) for key in ("threads", "megabytes", "rows", "matrix_rows", "columns")},
                **asdict(rates),
            }
            options.results.mkdir(parents=True, exist_ok=True)
            with (options.results / f"{record['date']}-weight-types.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
