"""What neuron statistics come to: how few neurons do how much of the work."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.sparsity.neuron_stats import NeuronStats

_MAJORITY = 0.8  # of activations, as in PowerInfer (Song et al. 2024), figure 5


@dataclass(frozen=True)
class LayerSummary:
    """Shares from 0 to 1. hot_*: the least share of neurons that make up 80 % of the sum."""

    layer: int
    active: float  # of (token, neuron): the neuron fires
    zero_codes: float  # of int8 codes of hidden values
    hot_firings: float  # of how often neurons fire
    hot_contributions: float  # of what they add to the output
    never: float  # of neurons: never fired


@dataclass(frozen=True)
class Summary:
    layers: tuple[LayerSummary, ...]
    active: float
    hot_firings: float  # over the neurons of all layers
    hot_contributions: float


def summarise(stats: NeuronStats) -> Summary:
    """By layer, and over all neurons."""
    frequencies = [stats.frequency(index) for index in range(len(stats.layers))]
    contributions = [layer.contribution for layer in stats.layers]
    num_tokens = max(1, stats.profiled.num_tokens)
    layers = tuple(
        LayerSummary(
            layer=index,
            active=float(frequency.mean()),
            zero_codes=1.0 - float(layer.num_coded.mean()) / num_tokens,
            hot_firings=hot_share(frequency),
            hot_contributions=hot_share(layer.contribution),
            never=float((frequency == 0).mean()),
        )
        for index, (layer, frequency) in enumerate(zip(stats.layers, frequencies, strict=True))
    )
    return Summary(
        layers=layers,
        active=float(np.mean([layer.active for layer in layers])),
        hot_firings=hot_share(np.concatenate(frequencies)),
        hot_contributions=hot_share(np.concatenate(contributions)),
    )


def hot_share(values: NDArray[np.float64]) -> float:
    """The least share of `values` whose sum is 80 % of all."""
    falling = np.cumsum(np.sort(values)[::-1])
    if falling[-1] == 0:
        return 0.0
    needed = np.searchsorted(falling, _MAJORITY * falling[-1]) + 1
    return min(1.0, float(needed) / len(values))
