"""Tiny random models in PowerInfer's dialect of GGUF, each beside a plain file of the same weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tiny_models import add_value, write_tiny

from isotherm.types import Activation, QuantType

Array = NDArray[Any]

ACTIVATIONS = {
    "llama": Activation.RELU,
    "bamboo": Activation.DRELU,
    "falcon": Activation.RELU,
    "opt": Activation.RELU,
}
PREDICTOR_WIDTH = 48
SIZES = {"hidden_size": 64, "ffn_size": 160, "head_dim": 32}


def write_copy(
    base: Path, path: Path, tensors: Mapping[str, tuple[Array, QuantType]], metadata: Mapping[str, Any], magic: bytes
) -> Path:
    """A file of the given tensors with the metadata of `base`, a None of `metadata` leaving a key out."""
    reader = gguf.GGUFReader(as_plain(base))
    values = {name: item.contents() for name, item in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = metadata.get("general.architecture", values["general.architecture"])
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in {**values, **metadata}.items():
        if value is not None and name != "general.architecture":
            add_value(writer, name, value)
    for name, (data, quant_type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[quant_type.value])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    written = path.read_bytes()
    path.write_bytes(magic + written[4:])
    return path


def as_plain(path: Path) -> Path:
    """A copy with the magic of GGUF: the gguf package knows no other."""
    plain = path.with_suffix(".read")
    plain.write_bytes(b"GGUF" + path.read_bytes()[4:])
    return plain


def stored(path: Path) -> dict[str, tuple[Array, QuantType]]:
    tensors = gguf.GGUFReader(as_plain(path)).tensors
    return {tensor.name: (np.array(tensor.data), QuantType[tensor.tensor_type.name]) for tensor in tensors}


def values_of(data: Array, quant_type: QuantType) -> NDArray[np.float32]:
    found: NDArray[np.float32] = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[quant_type.value])
    return found


def by_type(values: NDArray[np.float32], quant_type: QuantType) -> tuple[Array, QuantType]:
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[quant_type.value]), quant_type


def write_pair(folder: Path, family: str, down_type: QuantType, **sizes: Any) -> tuple[Path, Path]:
    """A file in the dialect, as its converters write it, and a plain one with the same weights.

    down_type: as it is stored by neuron. Where that is Q4_0 the plain file has the same values rounded to Q8_0.
    """
    base = write_tiny(folder / "base", family, QuantType.F16, tied_head=family == "opt", **(SIZES | sizes))
    plain, dialect = stored(base), {}
    random = np.random.default_rng(3)
    for name, (data, quant_type) in list(plain.items()):
        if "ffn_down" not in name:
            dialect[name] = plain[name]
            continue
        turned = name.replace("ffn_down", "ffn_down_t")
        if name.endswith("bias"):
            dialect[turned] = plain[name]
            continue
        neurons = np.ascontiguousarray(values_of(data, quant_type).T)
        dialect[turned] = by_type(neurons, down_type)
        kept = values_of(*dialect[turned]).T
        plain[name] = by_type(np.ascontiguousarray(kept), QuantType.Q8_0 if down_type is QuantType.Q4_0 else down_type)
        layer, hidden, ffn = name.split(".")[1], *data.shape[:1], len(neurons)
        for part, shape in (("fc1", (PREDICTOR_WIDTH, hidden)), ("fc2", (ffn, PREDICTOR_WIDTH))):
            weights = random.standard_normal(shape).astype(np.float32)
            dialect[f"blk.{layer}.{part}.weight"] = by_type(weights, QuantType.F16)
    names_activation = {"isotherm.activation": ACTIVATIONS[family].value} if family in ("llama", "falcon") else {}
    says: dict[str, Any] = {"powerinfer.sparse_threshold": 0.25}
    if family == "opt":  # its converter counts the rows of the table, and writes no epsilon
        says |= {"opt.context_length": 514, "opt.attention.layer_norm_epsilon": None}
    if family == "falcon":
        says["falcon.tensor_data_layout"] = "jploski"
    return (
        write_copy(base, folder / "model.powerinfer.gguf", dialect, says, b"PWRI"),
        write_copy(base, folder / "plain.gguf", plain, names_activation, b"GGUF"),
    )
