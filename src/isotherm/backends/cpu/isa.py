"""Which instruction set the kernels use."""

import os

from isotherm import _native
from isotherm.errors import UnsupportedCpu

KNOWN_ISAS = ("scalar", "avx2", "avxvnni", "avx512", "neon", "neon_i8mm")


def choose_isa(forced: str | None = None) -> str:
    """`forced`, else ISOTHERM_ISA, else the fastest that this processor has.

    Raises UnsupportedCpu where the one asked for is unknown or is not to be had here.
    """
    available = _native.available_isas()
    wanted = forced or os.environ.get("ISOTHERM_ISA")
    if not wanted:
        return available[-1]
    if wanted not in KNOWN_ISAS:
        raise UnsupportedCpu(f"ISOTHERM_ISA={wanted}: no such instruction set; known: {', '.join(KNOWN_ISAS)}")
    if wanted not in available:
        raise UnsupportedCpu(f"ISOTHERM_ISA={wanted}: this processor lacks it; it has {', '.join(available)}")
    return wanted
