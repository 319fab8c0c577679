"""What a profile has counted of each neuron, and the file that keeps it.

It is one of array_file.py: the meta says what was profiled, and layer i has the arrays `i.NAME` of LayerStats.
"""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import OptionError
from isotherm.sparsity.array_file import reading, write_arrays
from isotherm.types import Activation

_KIND = ("isotherm-neuron-stats", 1)

NUM_BINS = 256
_BINS_PER_OCTAVE = 8
_LOWEST_OCTAVE = -20  # magnitudes below 2 ** -20 share the first bin with zero


def bin_edges() -> NDArray[np.float64]:
    """Lower edges of the bins of a histogram of magnitudes [NUM_BINS]; the last bin has no upper one."""
    octaves = _LOWEST_OCTAVE + np.arange(NUM_BINS) / _BINS_PER_OCTAVE
    edges: NDArray[np.float64] = np.where(np.arange(NUM_BINS) == 0, 0.0, 2.0**octaves)
    return edges


def histogram(x: NDArray[np.float32]) -> NDArray[np.int64]:
    """Counts of the magnitudes of x by `bin_edges`."""
    magnitude = np.abs(x).ravel()
    with np.errstate(divide="ignore"):
        octave = np.log2(magnitude) - _LOWEST_OCTAVE
    index = np.clip(octave * _BINS_PER_OCTAVE, 0, NUM_BINS - 1).astype(np.intp)
    return np.bincount(index, minlength=NUM_BINS).astype(np.int64)


@dataclass
class LayerStats:
    """One FFN. Arrays are by neuron [ffn_size] where nothing else is said.

    A neuron fires for a token where its hidden value is not zero or, of activations that make no zeros, where its int8
    code is not. inputs: histograms [4, NUM_BINS] of what the layer's matmuls read: QKV, O, gate and up, down.
    """

    num_fired: NDArray[np.int64]  # tokens for which the hidden value was not zero
    num_coded: NDArray[np.int64]  # tokens for which its int8 code was not zero
    magnitude: NDArray[np.float64]  # of the hidden value, summed over tokens
    down_norm: NDArray[np.float32]  # L2 norm of the neuron's column of down
    inputs: NDArray[np.int64]
    fired: NDArray[np.uint8]  # [sampled tokens, ffn_size / 8]: bits, the first neuron's the highest of byte 0

    @property
    def contribution(self) -> NDArray[np.float64]:
        """What a neuron adds to the output, summed over tokens: magnitude times the norm of its column of down."""
        return self.magnitude * self.down_norm


@dataclass(frozen=True)
class Profiled:
    """What was profiled, and how much of it so far."""

    identity: str  # of the model file
    model: str
    activation: Activation
    ffn_size: int
    text_sha256: str
    window_tokens: int
    num_windows: int  # done
    sample_stride: int  # every so manieth token is kept in `fired`

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.window_tokens


@dataclass(frozen=True)
class NeuronStats:
    profiled: Profiled
    layers: tuple[LayerStats, ...]

    def frequency(self, layer: int) -> NDArray[np.float64]:
        """Share of tokens for which each neuron of a layer fires."""
        stats, num_tokens = self.layers[layer], max(1, self.profiled.num_tokens)
        return (stats.num_fired if self.profiled.activation.has_zeros else stats.num_coded) / num_tokens

    def save(self, path: Path) -> None:
        """Raises OptionError where it cannot be written."""
        meta = {**asdict(self.profiled), "activation": self.profiled.activation.value}
        arrays: dict[str, NDArray[Any]] = {}
        for index, layer in enumerate(self.layers):
            arrays |= {f"{index}.{name}": values for name, values in vars(layer).items()}
        try:
            write_arrays(path, _KIND, {"num_layers": len(self.layers), **meta}, arrays)
        except OSError as error:
            raise OptionError(f"{path} cannot be written: {error.strerror}; -o names another file") from error


def load_stats(path: Path) -> NeuronStats:
    """Raises StatsFileError for what is no such file, is damaged, or contradicts itself."""
    with reading(path, _KIND, "neuron statistics", "profile again") as (meta, archive):
        return _read(meta, archive)


def _read(meta: dict[str, Any], archive: Any) -> NeuronStats:
    num_layers = meta.pop("num_layers")
    profiled = Profiled(**{**meta, "activation": Activation(meta["activation"])})
    names = [field.name for field in fields(LayerStats)]
    layers = tuple(LayerStats(**{name: archive[f"{i}.{name}"] for name in names}) for i in range(num_layers))
    for layer in layers:
        _check(layer, profiled)
    return NeuronStats(profiled, layers)


def _check(layer: LayerStats, profiled: Profiled) -> None:
    empty = empty_layer(layer.down_norm, profiled.ffn_size)
    for name, values in vars(layer).items():
        expected = getattr(empty, name)
        if values.dtype != expected.dtype or values.shape[-1:] != expected.shape[-1:] or values.ndim != expected.ndim:
            raise ValueError(f"{name} has the shape {values.shape} of {values.dtype}")


def empty_layer(down_norm: NDArray[np.float32], ffn_size: int) -> LayerStats:
    """Nothing counted."""
    return LayerStats(
        num_fired=np.zeros(ffn_size, np.int64),
        num_coded=np.zeros(ffn_size, np.int64),
        magnitude=np.zeros(ffn_size, np.float64),
        down_norm=down_norm,
        inputs=np.zeros((4, NUM_BINS), np.int64),
        fired=np.zeros((0, -(-ffn_size // 8)), np.uint8),
    )
