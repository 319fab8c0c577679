"""PowerInfer's dialect of GGUF: the magic PWRI, and models whose neurons fire seldom, for an engine that guesses which.

Beside what GGUF has, `blk.N.ffn_down_t` holds down by neuron, its bias goes by that name too, and `blk.N.fc1` and
`blk.N.fc2` are a small network that predicts which neurons fire. No key names the activation: it follows from the
architecture. Source: PowerInfer, convert.py, convert-hf-to-powerinfer-gguf.py and llama.cpp (the loader of sparse
models and the graphs). Rows of q and k have the order of llama.cpp's converters, Bamboo's too.
"""

from pathlib import Path

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.by_neuron import ByNeuron
from isotherm.formats.gguf import GgufFile, GgufTensor
from isotherm.formats.metadata import Metadata
from isotherm.types import Activation, ModelConfig, QuantType

MAX_THRESHOLD = 1e6

ACTIVATIONS = {
    "llama": Activation.RELU,
    "bamboo": Activation.DRELU,
    "falcon": Activation.RELU,
    "opt": Activation.RELU,
}
DEFAULT_EPS = {"opt": 1e-5}  # its converter writes none; torch's, which no OPT changes
_PRETOKENIZERS = {"falcon": "falcon", "opt": "gpt-2"}  # its converters name none
_DOWN_BY_NEURON = {"down": "ffn_down_t.weight", "down_bias": "ffn_down_t.bias"}
_ACTIVATION_KEY = "isotherm.activation"
_THRESHOLD_KEY = "powerinfer.sparse_threshold"


def check_family(metadata: Metadata, name: str) -> None:
    """Raises UnsupportedModel for a family that the dialect does not have, or an activation where it has its own."""
    if name not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{metadata.path}: a file of PowerInfer with the architecture {name}; known of them are "
            f"{', '.join(ACTIVATIONS)}"
        )
    if metadata.string(_ACTIVATION_KEY, default=ACTIVATIONS[name].value) != ACTIVATIONS[name].value:
        raise UnsupportedModel(
            f"{metadata.path}: {_ACTIVATION_KEY} is not {ACTIVATIONS[name].value}, which PowerInfer's {name} has"
        )


def default_pretokenizer(file: GgufFile, family: str) -> str:
    return _PRETOKENIZERS.get(family, "default") if file.is_powerinfer else "default"


def stored_names(names: dict[str, str]) -> dict[str, str]:
    """Canonical names of one layer with the names that the dialect gives them."""
    return names | {name: stored for name, stored in _DOWN_BY_NEURON.items() if name in names}


def down_by_neuron(path: Path, tensor: GgufTensor) -> ByNeuron:
    """Raises UnsupportedModel for a type that cannot be read by output."""
    if not tensor.quant_type.is_float and tensor.quant_type is not QuantType.Q4_0:
        raise UnsupportedModel(
            f"{path}: tensor {tensor.name} is stored by neuron as {tensor.quant_type.value}; supported are F32, F16, "
            "BF16 and Q4_0"
        )
    by_neuron = ByNeuron(tensor)
    if tensor.num_rows % by_neuron.quant_type.block_elements:
        raise UnsupportedModel(
            f"{path}: tensor {tensor.name} has {tensor.num_rows} neurons in {tensor.quant_type.value}, expected "
            f"a multiple of {by_neuron.quant_type.block_elements}"
        )
    return by_neuron


def check_predictors(file: GgufFile, config: ModelConfig) -> set[str]:
    """Names of the predictors' tensors, which are not used. Raises ModelFileError where they contradict the model."""
    file.metadata.number(_THRESHOLD_KEY, low=-MAX_THRESHOLD, high=MAX_THRESHOLD, default=0.0)
    names = set()
    for layer in range(config.num_layers):
        first, second = (f"blk.{layer}.{part}.weight" for part in ("fc1", "fc2"))
        found = {name for name in (first, second) if name in file.tensors}
        if len(found) == 1:
            raise ModelFileError(
                f"{file.path}: half a predictor: {found.pop()} without its other matrix; it is damaged"
            )
        if not found:
            continue
        width = file.tensors[first].num_rows
        expected = {first: [config.hidden_size, width], second: [width, config.ffn_size]}
        for name in (first, second):
            dims = list(file.tensors[name].dims)
            if dims != expected[name]:
                raise ModelFileError(
                    f"{file.path}: tensor {name} has the dimensions {dims}, expected {expected[name]}; "
                    "the file is damaged"
                )
        names |= found
    return names


def notices(file: GgufFile) -> tuple[str, ...]:
    """What the user is told of a file in the dialect that was read."""
    if not file.is_powerinfer:
        return ()
    down_types = {tensor.quant_type for name, tensor in file.tensors.items() if name.endswith(_DOWN_BY_NEURON["down"])}
    texts = []
    if QuantType.Q4_0 in down_types:
        texts.append("down is stored by neuron as Q4_0; requantised to Q8_0")
    if any(name.endswith(".fc1.weight") for name in file.tensors):
        texts.append("the file's predictors are not used: every neuron that fires is computed")
    return tuple(texts)
