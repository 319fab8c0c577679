"""Numbers that the GGUF format and ggml give to things. Source: GGUF specification, ggml.h, llama.h."""

import numpy as np

from isotherm.types import QuantType

MAGIC = b"GGUF"
POWERINFER_MAGIC = b"PWRI"  # of PowerInfer's dialect, which is GGUF in all else of the layout
GPU_INDEX = "generic.gpu_index"  # architecture of a file that PowerInfer makes beside a model
VERSIONS = (2, 3)

STRING_KIND = 8
ARRAY_KIND = 9
BOOL_KIND = 7

# value kinds of a fixed size: format of `struct`, NumPy type
SCALAR_KINDS: dict[int, tuple[str, np.dtype[np.generic]]] = {
    0: ("<B", np.dtype("<u1")),
    1: ("<b", np.dtype("<i1")),
    2: ("<H", np.dtype("<u2")),
    3: ("<h", np.dtype("<i2")),
    4: ("<I", np.dtype("<u4")),
    5: ("<i", np.dtype("<i4")),
    6: ("<f", np.dtype("<f4")),
    BOOL_KIND: ("<B", np.dtype("<u1")),
    10: ("<Q", np.dtype("<u8")),
    11: ("<q", np.dtype("<i8")),
    12: ("<d", np.dtype("<f8")),
}

TENSOR_TYPES: dict[int, QuantType] = {
    0: QuantType.F32,
    1: QuantType.F16,
    2: QuantType.Q4_0,
    3: QuantType.Q4_1,
    6: QuantType.Q5_0,
    7: QuantType.Q5_1,
    8: QuantType.Q8_0,
    12: QuantType.Q4_K,
    13: QuantType.Q5_K,
    14: QuantType.Q6_K,
    30: QuantType.BF16,
    10: QuantType.Q2_K,
    11: QuantType.Q3_K,
    16: QuantType.IQ2_XXS,
    17: QuantType.IQ2_XS,
    18: QuantType.IQ3_XXS,
    19: QuantType.IQ1_S,
    20: QuantType.IQ4_NL,
    21: QuantType.IQ3_S,
    22: QuantType.IQ2_S,
    23: QuantType.IQ4_XS,
    29: QuantType.IQ1_M,
    34: QuantType.TQ1_0,
    35: QuantType.TQ2_0,
    39: QuantType.MXFP4,
    40: QuantType.NVFP4,
}

# known by name only, so that the error can say what the file holds
UNSUPPORTED_TENSOR_TYPES: dict[int, str] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    41: "Q1_0",
}

# general.file_type: the mix of types the writer aimed at
FILE_TYPES: dict[int, str] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4_MOE",
    39: "NVFP4",
}

# how files begin that people take for GGUF
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer: fetch the real file with `git lfs pull`"),
    (b"<!doctype", "a web page: the download answered with a page, not with the file"),
    (b"<html", "a web page: the download answered with a page, not with the file"),
    (b"<?xml", "an XML answer: the download was refused"),
    (b"PK\x03\x04", "a zip file, perhaps a PyTorch checkpoint: a GGUF file is needed"),
    (b"\x80\x02", "a Python pickle: it is never opened; a GGUF file is needed"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"(\xb5/\xfd", "a zstd file: unpack it first"),
    (b"lmgg", "a GGML file from before GGUF: convert the model again"),
    (b"fmgg", "a GGMF file from before GGUF: convert the model again"),
    (b"tjgg", "a GGJT file from before GGUF: convert the model again"),
    (b"algg", "a GGLA adapter from before GGUF: convert it again"),
    (b"FUGG", "GGUF with its magic reversed: a big-endian file, which is not supported"),
    (b"{", "JSON text: not a model, perhaps the error message of a download"),
    (bytes(8), "zeros: a download that was reserved on disk and never finished"),
)


def describe_beginning(start: bytes) -> str:
    """What a file that begins with `start` (at least 16 bytes, where it has them) looks like."""
    if not start:
        return "nothing: the file is empty"
    for beginning, meaning in _BEGINNINGS:
        if start.lstrip().lower().startswith(beginning.lower()):
            return meaning
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        return "a safetensors file: a GGUF file is needed"
    return f"{start[:8]!r}, which is no known beginning of a model file"
