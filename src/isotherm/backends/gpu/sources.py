"""Kernels as text: files of the C dialect put together for one weight type, or one shape of attention."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

from isotherm.program.ops import AttentionShape
from isotherm.quantization.layouts import CODE_BITS, VALUES, ZERO_POINTS
from isotherm.quantization.p32 import UNITS
from isotherm.types import KvType, QuantType

_FOLDER = Path(__file__).parent / "kernels"
# Division and square roots as IEEE 754 has them; without this OpenCL may be three units in the last place off.
_OPENCL_OPTIONS = "-cl-fp32-correctly-rounded-divide-sqrt"
# Those of CUDA are so by default, but products and sums would be contracted.
_CUDA_OPTIONS = "--fmad=false --std=c++17 --disable-warnings"
MOST_FEW_ROWS = 8  # of a batch: a slice has one of them each
SLICE_LANES = 32  # a slice of a matmul's group: the rows of a panel
ROW_LANES = 256  # of a group that computes a row, or a head
_FILLING_PANELS = 4  # a unit: its groups hide each other's waiting for memory
_MOST_GROUP_HEADS = 8  # whose scores fit local memory


@dataclass(frozen=True)
class Source:
    """A program of kernels."""

    text: str
    opencl_version: str

    def options(self, architecture: str) -> str:
        """What the compiler is told. architecture: as GpuFacts has it."""
        if architecture:
            return f"--gpu-architecture={architecture} {_CUDA_OPTIONS}"
        return f"-cl-std={self.opencl_version} {_OPENCL_OPTIONS}"


class Dot4(IntEnum):
    """By which means a device multiplies and adds four bytes; numbers as in dialect.cl."""

    PLAIN = 0  # C
    KHRONOS = 1  # the extension cl_khr_integer_dot_product
    PTX = 2  # an instruction of NVIDIA's, whose compiler has no other name for it


@dataclass(frozen=True)
class Tiling:
    """How matmuls are shared out. A slice is 32 lanes: with few rows slices share a sum, with many the weights."""

    few_slices: int = 8  # at least as many as few rows
    few_depth: int = 1  # blocks that a slice takes at a time, with one row
    narrow_slices: int = 8  # few_slices, of a matrix with fewer panels than fill the device
    many_slices: int = 8
    many_tokens: int = 8  # rows of a slice
    dot4: Dot4 = Dot4.PLAIN

    def __post_init__(self) -> None:
        assert min(self.few_slices, self.narrow_slices) >= MOST_FEW_ROWS

    def slices_of(self, num_rows: int) -> int:
        """Of the kernel for so many rows, at most few: as SLICES_OF in matmul.cl."""
        return min(self.few_slices, 64 // num_rows)

    def for_panels(self, num_panels: int, num_units: int) -> "Tiling":
        """That of a matrix with so many panels, on a device with so many units."""
        is_narrow = num_panels < _FILLING_PANELS * num_units
        return replace(self, few_slices=self.narrow_slices) if is_narrow else self


@cache
def matmul_source(type_a: QuantType, type_b: QuantType, tiling: Tiling) -> Source:
    """Panels whose tiles have these types; floats have the same in both."""
    defines = {
        "FEW_SLICES": tiling.few_slices,
        "FEW_DEPTH": tiling.few_depth,
        "MANY_SLICES": tiling.many_slices,
        "MANY_TOKENS": tiling.many_tokens,
        "LANES": ROW_LANES,
        "DOT4": tiling.dot4,
    }
    if type_a.is_float:
        assert type_a is type_b
        defines |= {
            "FLOAT_BYTES": UNITS[type_a].record.itemsize // 16,
            "IS_BRAIN": int(type_a is QuantType.BF16),
        }
        return _source(defines, _text("finish"), _text("float_matmul"))
    is_one = type_a is type_b
    defines["IS_ONE_TYPE"] = int(is_one)
    second = _ALIASES if is_one else _codec(type_b, "b")
    return _source(defines, _codec(type_a, "a"), second, _text("finish"), _text("matmul"))


@cache
def elementwise_source() -> Source:
    return _source({"LANES": ROW_LANES}, _text("elementwise"))


@cache
def attention_source(shape: AttentionShape, kv_type: KvType) -> Source:
    defines = {
        "LANES": ROW_LANES,
        "HEAD_DIM": shape.head_dim,
        "NUM_HEADS": shape.num_heads,
        "NUM_KV_HEADS": shape.num_kv_heads,
        "GROUP_HEADS": group_heads(shape),
        "IS_Q8": int(kv_type is KvType.Q8_0),
    }
    return _source(defines, _text("attention"))


def choice_source() -> Source:
    return _source({"LANES": ROW_LANES}, _text("choice"))


def probe_source(dot4: Dot4) -> Source:
    return _source({"LANES": ROW_LANES, "DOT4": dot4}, _text("probe"))


def group_heads(shape: AttentionShape) -> int:
    """Query heads of one KV head that a group computes: they share what is read of its pages."""
    heads = shape.num_heads // shape.num_kv_heads
    return max(count for count in range(1, _MOST_GROUP_HEADS + 1) if heads % count == 0)


_ALIASES = "".join(f"#define {name}_b {name}_a\n" for name in ("tile_bytes", "read", "dot")) + (
    "#define UNIT_BLOCKS_B UNIT_BLOCKS_A\n#define UNIT_BYTES_B UNIT_BYTES_A\n"
)


def _source(defines: Mapping[str, int], *parts: str) -> Source:
    head = "".join(f"#define {name} {int(value)}\n" for name, value in defines.items())
    version = "CL3.0" if defines.get("DOT4") == Dot4.KHRONOS else "CL1.2"
    return Source("\n".join([head, _text("dialect"), *parts]), version)


@cache
def _text(name: str) -> str:
    return (_FOLDER / f"{name}.cl").read_text(encoding="utf-8")


def _codec(quant_type: QuantType, suffix: str) -> str:
    """Functions that read one weight type, named with the suffix."""
    unit = UNITS[quant_type]
    fields: Mapping[str, Any] = unit.record.fields or {}
    is_signed = quant_type in VALUES or CODE_BITS[quant_type] == 8
    groups = unit.record["factors"].shape[0] if "factors" in fields else 0
    defines = {
        "UNIT_BLOCKS": f"UNIT_BLOCKS_{suffix.upper()}",
        "UNIT_BYTES": f"UNIT_BYTES_{suffix.upper()}",
        "HEADER": fields["lines"][1],
        "BITS": CODE_BITS[quant_type],
        "ZERO_POINT": 0 if is_signed else ZERO_POINTS.get(quant_type, 0),
        "HAS_HALVES": int(groups == 16 or "scales" in fields or "e4m3" in fields),
        "HAS_MINIMUM": int("m" in fields or "dmin" in fields),
        "SCALES": _scales_kind(set(fields)),
    }
    lines = [
        f"#define UNIT_BLOCKS_{suffix.upper()} {unit.columns // 32}",
        f"#define UNIT_BYTES_{suffix.upper()} {unit.record.itemsize}",
        f"#define CODEC(name) name##_{suffix}",
        *(f"#define {name} {value}" for name, value in defines.items()),
    ]
    if quant_type in VALUES:
        lines.append(f"CONSTANT i8 values_{suffix}[16] = {{{', '.join(map(str, VALUES[quant_type]))}}};")
        lines.append(f"#define VALUES values_{suffix}")
    return "\n".join([*lines, _text("codec")])


def _scales_kind(fields: set[str]) -> int:
    """Numbers as in codec.cl."""
    kinds = ("scales_low", "scales", "factors", "d_float", "e8m0", "e4m3")
    return next((i + 1 for i, name in enumerate(kinds) if name in fields), 0)
