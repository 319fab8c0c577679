"""What predictors are trained on: what each FFN reads for the tokens of a text, and which of its neurons fire."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.backends.reference import contract
from isotherm.errors import ModelFileError
from isotherm.program.backend import WeightTensor
from isotherm.program.ops import NormWeights, Value
from isotherm.sparsity.profile import FfnLayer
from isotherm.sparsity.stored_weights import float_vector
from isotherm.text import TextGenerator

F32 = NDArray[np.float32]
BLOCK = contract.BLOCK_COLUMNS


@dataclass(frozen=True)
class LayerSamples:
    """One FFN over some tokens: its input as matmuls read it, normed and quantised, and who fired."""

    codes: NDArray[np.int8]  # [tokens, hidden_size]
    scales: F32  # [tokens, hidden_size / 32]
    fired: NDArray[np.uint8]  # [tokens, ffn_size / 8]: bits, the first neuron's the highest of byte 0
    ffn_size: int

    def __len__(self) -> int:
        return len(self.codes)

    def inputs(self, rows: NDArray[np.intp] | slice) -> F32:
        """[rows, hidden_size]"""
        return widened(self.codes[rows], self.scales[rows])

    def fires(self, rows: NDArray[np.intp] | slice) -> NDArray[np.bool_]:
        """[rows, ffn_size]"""
        return np.unpackbits(self.fired[rows], axis=1, count=self.ffn_size).view(np.bool_)

    @property
    def num_fired(self) -> NDArray[np.int64]:
        """Tokens for which each neuron fired [ffn_size]."""
        counts = np.zeros(self.ffn_size, np.int64)
        for start in range(0, len(self), 512):
            counts += np.count_nonzero(self.fires(slice(start, start + 512)), axis=0)
        return counts

    def part(self, rows: NDArray[np.intp]) -> "LayerSamples":
        return LayerSamples(self.codes[rows], self.scales[rows], self.fired[rows], self.ffn_size)


def sample_bytes(layer: FfnLayer) -> int:
    """Bytes that a token of one layer takes."""
    return layer.x.width + layer.x.width // BLOCK * 4 + -(-layer.hidden.width // 8)


def quantised(x: F32) -> tuple[NDArray[np.int8], F32]:
    """Codes and scales of rows whose width is a multiple of 32, as the contract has them."""
    codes, scales = contract.quantise(x)
    return codes[:, : x.shape[1]].astype(np.int8), scales[:, : x.shape[1] // BLOCK]


def widened(codes: NDArray[np.int8], scales: F32) -> F32:
    """What codes [rows, columns] and scales [rows, columns / 32] stand for."""
    blocks = codes.reshape(*scales.shape, BLOCK) * scales[..., None]
    values: F32 = blocks.reshape(codes.shape)
    return values


def collect(
    model: TextGenerator,
    tensors: Mapping[str, WeightTensor],
    layers: Sequence[FfnLayer],
    windows: Sequence[Sequence[int]],
    on_window: Callable[[int], None] = lambda _: None,
) -> list[LayerSamples]:
    """Samples of some layers, over all tokens of `windows`, in order. on_window hears how many of those are done.

    Raises ModelFileError for values that are no finite numbers.
    """
    num_tokens = sum(map(len, windows))
    samples = [_empty(layer, num_tokens) for layer in layers]
    readers: dict[Value, list[int]] = {}
    for index, layer in enumerate(layers):
        readers.setdefault(layer.x, []).append(index)
    hidden = {layer.hidden: index for index, layer in enumerate(layers)}
    num_seen: dict[Value, int] = {}
    vectors = {name: float_vector(tensors[name]) for layer in layers for name in _names(layer.norm)}

    def look(value: Value, rows: F32) -> None:
        first = num_seen.get(value, 0)
        num_seen[value] = end = first + len(rows)
        for index in readers.get(value, ()):
            codes, scales = quantised(_normed(rows, layers[index].norm, vectors))
            if not np.isfinite(scales).all():
                raise ModelFileError("an FFN reads what is no finite number: the weights hold NaN or infinity")
            samples[index].codes[first:end], samples[index].scales[first:end] = codes, scales
        if value in hidden:
            samples[hidden[value]].fired[first:end] = np.packbits(rows != 0, axis=1)

    for number, window in enumerate(windows, 1):
        model.observe(window, {*readers, *hidden}, look)
        on_window(number)
    return samples


def _empty(layer: FfnLayer, num_tokens: int) -> LayerSamples:
    width, ffn_size = layer.x.width, layer.hidden.width
    return LayerSamples(
        np.zeros((num_tokens, width), np.int8),
        np.zeros((num_tokens, width // BLOCK), np.float32),
        np.zeros((num_tokens, -(-ffn_size // 8)), np.uint8),
        ffn_size,
    )


def _names(norm: NormWeights | None) -> list[str]:
    return [] if norm is None else [name for name in (norm.weight, norm.bias) if name is not None]


def _normed(rows: F32, norm: NormWeights | None, vectors: Mapping[str, F32]) -> F32:
    if norm is None:
        return rows
    if norm.bias is not None:
        return contract.layer_norm(rows, vectors[norm.weight], vectors[norm.bias], norm.eps)
    return contract.rms_norm(rows, vectors[norm.weight], norm.eps)
