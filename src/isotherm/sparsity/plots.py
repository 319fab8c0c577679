"""Pictures of neuron statistics, and the numbers in them as JSON. matplotlib is the extra `plot`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import OptionError
from isotherm.sparsity.neuron_stats import NeuronStats, bin_edges
from isotherm.sparsity.summary import summarise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVE_POINTS = 200
_HEAT_COLUMNS = 512
_HIDDEN = 3  # row of LayerStats.inputs


def power_law(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the sum that the hottest neurons make up, at _CURVE_POINTS + 1 even shares of neurons from 0 to 1."""
    falling = np.concatenate([[0.0], np.cumsum(np.sort(values)[::-1])])
    at = np.linspace(0, len(values), _CURVE_POINTS + 1)
    curve: NDArray[np.float64] = np.interp(at, np.arange(len(falling)), falling / max(falling[-1], 1e-300))
    return curve


def threshold_cost(counts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By edge of a histogram of magnitudes: the share of values below it, and the share of their squares' sum."""
    edges = bin_edges()
    middles = np.append(np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * edges[1:]), edges[-1])
    squares = counts * np.square(middles)
    below = np.concatenate([[0.0], np.cumsum(counts)[:-1]]) / max(1, counts.sum())
    lost = np.concatenate([[0.0], np.cumsum(squares)[:-1]]) / max(squares.sum(), 1e-300)
    return below, lost


def numbers(stats: NeuronStats) -> dict[str, Any]:
    """What the pictures show."""
    frequencies = [stats.frequency(index) for index in range(len(stats.layers))]
    costs = [threshold_cost(layer.inputs[_HIDDEN]) for layer in stats.layers]
    return {
        "model": stats.profiled.model,
        "activation": stats.profiled.activation.value,
        "num_tokens": stats.profiled.num_tokens,
        "summary": asdict(summarise(stats)),
        "power_law": {
            "neurons": np.linspace(0, 1, _CURVE_POINTS + 1).tolist(),
            "layers": [power_law(frequency).tolist() for frequency in frequencies],
            "model": power_law(np.concatenate(frequencies)).tolist(),
        },
        "threshold": {
            "magnitude": bin_edges().tolist(),
            "below": [below.tolist() for below, _ in costs],
            "lost": [lost.tolist() for _, lost in costs],
        },
    }


def plot(stats: NeuronStats, folder: Path) -> list[Path]:
    """Writes pictures and numbers.json into the folder. Raises OptionError where they cannot be drawn or written."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError('pictures need matplotlib: pip install "isotherm[plot]"') from error
    shown = numbers(stats)
    drawn = {
        "power-law.png": _draw_power_law(Figure(figsize=(7, 5)), shown),
        "frequency.png": _draw_frequency(Figure(figsize=(9, 5)), stats),
        "threshold.png": _draw_threshold(Figure(figsize=(7, 5)), shown),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in drawn.items():
            figure.savefig(folder / name, dpi=120, bbox_inches="tight")
        (folder / "numbers.json").write_text(json.dumps(shown))
    except OSError as error:
        raise OptionError(f"{folder} cannot be written: {error.strerror}; --plot names another folder") from error
    return [folder / name for name in (*drawn, "numbers.json")]


def _draw_power_law(figure: "Figure", shown: dict[str, Any]) -> "Figure":
    axes = figure.subplots()
    curves = shown["power_law"]
    for curve in curves["layers"]:
        axes.plot(curves["neurons"], curve, color="tab:blue", alpha=0.25, linewidth=1)
    axes.plot(curves["neurons"], curves["model"], color="tab:red", label="whole model")
    axes.plot([], [], color="tab:blue", alpha=0.5, label="a layer")
    axes.axhline(0.8, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="share of neurons, hottest first", ylabel="share of firings", xlim=(0, 1), ylim=(0, 1))
    axes.set_title(f"{shown['model']}: {shown['summary']['hot_firings']:.0%} of the neurons do 80 % of the firing")
    axes.legend()
    return figure


def _draw_frequency(figure: "Figure", stats: NeuronStats) -> "Figure":
    axes = figure.subplots()
    rows = []
    for index in range(len(stats.layers)):
        falling = np.sort(stats.frequency(index))[::-1]
        rows.append(np.interp(np.linspace(0, len(falling) - 1, _HEAT_COLUMNS), np.arange(len(falling)), falling))
    image = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="inferno", extent=(0, 1, len(rows) - 0.5, -0.5))
    axes.set(xlabel="share of neurons, hottest first", ylabel="layer", title=f"{stats.profiled.model}: how often")
    figure.colorbar(image, label="share of tokens for which a neuron fires")
    return figure


def _draw_threshold(figure: "Figure", shown: dict[str, Any]) -> "Figure":
    axes = figure.subplots()
    for below, lost in zip(shown["threshold"]["below"], shown["threshold"]["lost"], strict=True):
        axes.plot(below, np.maximum(lost, 1e-9), color="tab:blue", alpha=0.4, linewidth=1)
    axes.set(
        xlabel="hidden values below the threshold", ylabel="of the sum of squares, lost", xlim=(0, 1), yscale="log"
    )
    axes.set_title(f"{shown['model']}: what a threshold skips, and what it costs; a line a layer")
    return figure
