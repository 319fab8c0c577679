"""Trains the predictor of one FFN: two low-rank matrices, sized so that a token reads the fewest bytes.

The loss is logistic, by neuron and token, firings weighted more as they are the fewer; steps are Adam's (Kingma and Ba,
2015). Inputs are those that the kernels see, in int8 codes; what is measured is the matrices in Q8_0, as they are kept.
Any rank reaches any recall, by a threshold that is low enough: a better one has more neurons below it. So a rank is
judged by what a token reads with it, of the predictor itself and of the rows that it lets through.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import OptionError, UnsupportedModel
from isotherm.program.backend import WeightTensor
from isotherm.quantization.layouts import dequantise, quantise_q8_0
from isotherm.quantization.neurons import neuron_form
from isotherm.sparsity.predictor import (
    PREDICTOR_TYPE,
    RANK_STEP,
    Measured,
    PredictedLayer,
    PredictorSet,
    Training,
    Weights,
)
from isotherm.sparsity.predictor_samples import LayerSamples, collect, quantised, sample_bytes, widened
from isotherm.sparsity.profile import FfnLayer, ffn_layers
from isotherm.sparsity.stored_weights import stored_bytes
from isotherm.sparsity.summary import hot_share
from isotherm.text import TextGenerator

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

_BATCH_TOKENS = 128
_NUM_STEPS = 400  # of a rank, at least
_MIN_EPOCHS = 2
_RATE = 6e-3  # of Adam, falling to 0 as half a cosine
_WARM_STEPS = 50  # in which it rises: at the full rate from the start units die
_MOMENTS = (0.9, 0.99)
_MEASURED_TOKENS = 512  # at once
_HELD_OUT = 5  # every so manieth window
_SAMPLE_BYTES = 1 << 30  # of the layers whose samples are in memory at once
_MOST_ALONE = 0.5  # share of a token's neurons up to which rows are taken to be read alone: machines differ a little
_MOST_RANK = 1 << 14


def scores(first: U8, second: U8, samples: LayerSamples, rows: slice) -> F32:
    """[rows, ffn_size], as the kernels compute them but for the order of sums."""
    rank, hidden_size = len(first), samples.codes.shape[1]
    low = np.maximum(samples.inputs(rows) @ dequantise(first, PREDICTOR_TYPE, hidden_size).T, np.float32(0))
    found: F32 = widened(*quantised(low)) @ dequantise(second, PREDICTOR_TYPE, rank).T
    return found


def measure(weights: Weights, samples: LayerSamples) -> Measured:
    """What the held-out tokens `samples` say of a predictor."""
    num_fired = num_found = num_predicted = num_read = 0
    for rows in _spans(len(samples), _MEASURED_TOKENS):
        predicted = ~(scores(weights.first, weights.second, samples, rows) < np.float32(weights.threshold))
        fires = samples.fires(rows)
        num_fired += int(np.count_nonzero(fires))
        num_found += int(np.count_nonzero(fires & predicted))
        by_token = np.count_nonzero(predicted, axis=1)
        num_predicted += int(by_token.sum())
        num_read += int(np.where(by_token <= _MOST_ALONE * samples.ffn_size, by_token, samples.ffn_size).sum())
    size = len(samples) * samples.ffn_size
    return Measured(num_fired / size, num_found / max(1, num_fired), num_predicted / size, num_read / size)


def threshold_for(recall: float, first: U8, second: U8, samples: LayerSamples) -> float:
    """The highest one with which at least `recall` of the firings of `samples` are predicted."""
    found = np.concatenate(
        [scores(first, second, samples, rows)[samples.fires(rows)] for rows in _spans(len(samples), _MEASURED_TOKENS)]
    )
    kept = math.ceil(recall * len(found))
    return float(np.partition(found, len(found) - kept)[len(found) - kept])


@dataclass(frozen=True)
class Wanted:
    """recall: least share of firings to predict; max_rank: a multiple of 64."""

    recall: float
    max_rank: int


@dataclass(frozen=True)
class Attempt:
    """One rank of one layer. read: bytes that a token reads with it, as a share of all rows of the gate."""

    weights: Weights
    measured: Measured
    read: float


def train_layer(
    samples: LayerSamples,
    held_out: NDArray[np.bool_],
    gate_bytes: int,
    wanted: Wanted,
    on_attempt: Callable[[Attempt], None],
) -> PredictedLayer:
    """The predictor with which a token reads least, among ranks that double from one to the next.

    held_out [tokens]: those that nothing is trained on. gate_bytes: of the weight whose rows it spares. The rank that
    is tried first follows from how many neurons fire, and how evenly: it then grows, or else shrinks, while less is
    read. Ranks that could not read less are left out.
    """
    training, testing = samples.part(np.flatnonzero(~held_out)), samples.part(np.flatnonzero(held_out))
    active = float(testing.num_fired.mean()) / len(testing)
    if not training.num_fired.any() or not testing.num_fired.any():
        return PredictedLayer(None, Measured(active, 0.0, 0.0, 0.0))

    def attempt(rank: int) -> Attempt:
        weights = train_rank(training, testing, rank, wanted.recall)
        measured = measure(weights, testing)
        found = Attempt(weights, measured, weights.num_bytes / gate_bytes + measured.rows_read)
        on_attempt(found)
        return found

    def least_read(rank: int) -> float:
        """Of a predictor that predicts nothing in vain."""
        num_weights = rank * (samples.codes.shape[1] + samples.ffn_size)
        return PREDICTOR_TYPE.row_bytes(num_weights) / gate_bytes + wanted.recall * active

    ranks = ranks_to(wanted.max_rank)
    at = first_rank(ranks, samples)
    best = attempt(ranks[at])
    for step in (1, -1):
        place = at
        while 0 <= (place := place + step) < len(ranks) and least_read(ranks[place]) < best.read:
            if (other := attempt(ranks[place])).read >= best.read:
                break
            best = other
        if best.weights.rank > ranks[at]:
            break
    return PredictedLayer(best.weights if best.read < 1 else None, best.measured)


def ranks_to(max_rank: int) -> list[int]:
    """64, 128, 256, ..., the last one `max_rank`."""
    doubled = [RANK_STEP << i for i in range(max_rank.bit_length()) if RANK_STEP << i < max_rank]
    return [*doubled, max_rank]


def first_rank(ranks: Sequence[int], samples: LayerSamples) -> int:
    """Index of the rank to try first: small where few neurons fire, and where those are mostly the same."""
    fired = samples.num_fired.astype(np.float64)
    skewed = float(fired.mean()) / len(samples) * hot_share(fired)
    wanted = samples.codes.shape[1] / 2 * math.sqrt(skewed)
    return int(np.abs(np.log(np.array(ranks) / max(1.0, wanted))).argmin())


def train_rank(training: LayerSamples, held_out: LayerSamples, rank: int, recall: float) -> Weights:
    """A predictor of one rank, whose threshold is chosen on `held_out`; the same for the same samples."""
    rng = np.random.default_rng(rank)
    network = _Network(training, rank, rng)
    num_batches = -(-len(training) // _BATCH_TOKENS)
    num_epochs = max(_MIN_EPOCHS, -(-_NUM_STEPS // num_batches))
    step, num_steps = 0, num_epochs * num_batches
    for _ in range(num_epochs):
        for rows in np.array_split(rng.permutation(len(training)), num_batches):
            rate = _RATE * min(1.0, (step + 1) / _WARM_STEPS) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
            network.learn(training.inputs(rows), training.fires(rows), rate)
            step += 1
    first, second = network.packed()
    return Weights(first, second, threshold_for(recall, first, second, held_out))


class _Network:
    """What is trained: columns of first as multiples of what their input usually is, so that one rate fits them all."""

    def __init__(self, samples: LayerSamples, rank: int, rng: np.random.Generator) -> None:
        hidden_size = samples.codes.shape[1]
        usual = np.sqrt(np.square(samples.inputs(slice(0, 4096))).mean(axis=0))
        self._usual = np.maximum(usual, np.float32(0.1) * usual.mean() + np.float32(1e-20))
        active = samples.num_fired.mean() / len(samples)
        self._weight = np.float32(math.sqrt(min(100.0, 1 / max(active, 1e-6))))  # of a firing
        self._first = (rng.standard_normal((rank, hidden_size)) * math.sqrt(2 / hidden_size)).astype(np.float32)
        self._second = (rng.standard_normal((samples.ffn_size, rank)) * math.sqrt(1 / rank)).astype(np.float32)
        self._steps = (_Adam(self._first), _Adam(self._second))

    def learn(self, x: F32, fires: NDArray[np.bool_], rate: float) -> None:
        x = x / self._usual
        low = np.maximum(x @ self._first.T, np.float32(0))
        error = low @ self._second.T
        np.clip(error, -30, 30, out=error)
        np.negative(error, out=error)
        np.exp(error, out=error)
        error += np.float32(1)
        np.reciprocal(error, out=error)  # the probability that it fires
        error -= fires
        np.multiply(error, self._weight, out=error, where=fires)
        error /= np.float32(len(x))
        back = error @ self._second
        back[low == 0] = 0
        self._steps[0].step(back.T @ x, rate)
        self._steps[1].step(error.T @ low, rate)

    def packed(self) -> tuple[U8, U8]:
        return quantise_q8_0(self._first / self._usual), quantise_q8_0(self._second)


class _Adam:
    """Moves a matrix against its gradients."""

    def __init__(self, matrix: F32) -> None:
        self._matrix = matrix
        self._mean, self._square = np.zeros_like(matrix), np.zeros_like(matrix)
        self._num_steps = 0

    def step(self, gradient: F32, rate: float) -> None:
        self._num_steps += 1
        slow, slower = _MOMENTS
        self._mean *= np.float32(slow)
        self._mean += np.float32(1 - slow) * gradient
        np.square(gradient, out=gradient)
        gradient *= np.float32(1 - slower)
        self._square *= np.float32(slower)
        self._square += gradient
        np.sqrt(self._square, out=gradient)
        gradient *= np.float32(1 / math.sqrt(1 - slower**self._num_steps))
        gradient += np.float32(1e-8)
        np.divide(self._mean, gradient, out=gradient)
        gradient *= np.float32(rate / (1 - slow**self._num_steps))
        self._matrix -= gradient


def _spans(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(count, start + size)) for start in range(0, count, size))


# --- a whole model --------------------------------------------------------------------------------------------------


class PredictorTrainer:
    """Trains the predictors of one model, layer by layer."""

    def __init__(
        self, model: TextGenerator, tensors: Mapping[str, WeightTensor], identity: str, windows: Sequence[Sequence[int]]
    ) -> None:
        """tensors and identity: of the model's file. windows: of one length; every fifth, or the last, is held out.

        Raises OptionError for a model whose activation makes no zeros, the reference backend, and a text that is too
        short; UnsupportedModel for sizes that Q8_0 cannot hold.
        """
        if model.facts.backend != "cpu":
            raise OptionError(f"the {model.facts.backend} backend trains no predictors; leave --backend out")
        self._model, self._tensors, self._identity, self._windows = model, tensors, identity, windows
        self.layers = ffn_layers(model.program)
        if not self.layers or not all(layer.activation.has_zeros for layer in self.layers):
            raise OptionError(
                f"{model.facts.name}: no neuron of it is ever exactly 0; predictors are for models with ReLU, its "
                "square or dReLU"
            )
        if any(neuron_form(tensors[layer.down].quant_type) is None for layer in self.layers):
            raise UnsupportedModel("weights of down that are floats are read whole: a predictor spares nothing")
        if any(layer.x.width % PREDICTOR_TYPE.block_elements for layer in self.layers):
            raise UnsupportedModel(f"a hidden size of {self.layers[0].x.width}; predictors need a multiple of 32")
        if len(windows) < 2:
            raise OptionError("the text holds one window alone; it takes two, to train and to test; take a longer text")
        held_out = [index % _HELD_OUT == _HELD_OUT - 1 for index in range(len(windows))]
        held_out[-1] |= len(windows) < _HELD_OUT
        self._held_out = np.repeat(held_out, len(windows[0]))

    def start(self, recall: float, max_rank: int | None) -> PredictorSet:
        """Nothing trained. max_rank: by default half of the hidden size. Raises OptionError."""
        if not 0 < recall <= 1:
            raise OptionError(f"a recall of {recall}; it must lie above 0 and be at most 1")
        hidden_size = self.layers[0].x.width
        max_rank = max(RANK_STEP, hidden_size // 2) if max_rank is None else max_rank
        if not RANK_STEP <= max_rank <= _MOST_RANK:
            raise OptionError(f"a rank of {max_rank}; it must be from {RANK_STEP} to {_MOST_RANK}")
        training = Training(
            identity=self._identity,
            model=self._model.facts.name,
            num_layers=len(self.layers),
            text_sha256=hashlib.sha256(np.array(self._windows, np.int32).tobytes()).hexdigest(),
            window_tokens=len(self._windows[0]),
            num_windows=len(self._windows),
            recall=recall,
            max_rank=max_rank // RANK_STEP * RANK_STEP,
        )
        return PredictorSet(training, ())

    def train(
        self,
        predictors: PredictorSet,
        on_window: Callable[[int], None],
        on_attempt: Callable[[int, Attempt], None],
        on_layer: Callable[[PredictorSet], None],
    ) -> PredictorSet:
        """Goes on from `predictors` to the last layer.

        on_window hears how many windows of the text are done, on_attempt of each rank that is tried for a layer,
        on_layer of all layers so far, after each.
        The text is run once for as many layers as their samples fit the memory for them.
        """
        wanted = Wanted(predictors.training.recall, predictors.training.max_rank)
        num_tokens = len(self._held_out)
        while left := self.layers[len(predictors.layers) :]:
            group = left[: max(1, _SAMPLE_BYTES // (num_tokens * sample_bytes(left[0])))]
            samples = collect(self._model, self._tensors, group, self._windows, on_window)
            for layer in group:
                heard = partial(on_attempt, len(predictors.layers))
                trained = train_layer(samples.pop(0), self._held_out, self.gate_bytes(layer), wanted, heard)
                predictors = PredictorSet(predictors.training, (*predictors.layers, trained))
                on_layer(predictors)
        return predictors

    def gate_bytes(self, layer: FfnLayer) -> int:
        """Of the weight whose rows a predictor spares: the gate's, or up's where there is none."""
        return self._bytes(layer, "gate") or self._bytes(layer, "up")

    def ffn_bytes(self, layer: FfnLayer) -> int:
        return sum(self._bytes(layer, name) for name in ("gate", "up", "down"))

    def _bytes(self, layer: FfnLayer, name: str) -> int:
        tensor = self._tensors.get(f"{layer.down.rpartition('.')[0]}.{name}")
        return 0 if tensor is None else stored_bytes(tensor)


@dataclass(frozen=True)
class LayerCost:
    """What the predictor of a layer does, and takes: shares from 0 to 1. rank and shares None: it has none."""

    active: float
    recall: float
    predicted: float
    rows_read: float
    rank: int | None
    of_gate: float | None  # bytes of the predictor, in those of the gate
    of_ffn: float | None  # in those of gate, up and down
    gate_read: float | None  # bytes of the predictor and of the rows that it lets through, in those of the gate


def layer_costs(trainer: PredictorTrainer, predictors: PredictorSet) -> list[LayerCost]:
    """Of the layers that are trained."""
    costs = []
    for layer, trained in zip(trainer.layers, predictors.layers, strict=False):
        measured, weights = trained.measured, trained.weights
        of_gate = None if weights is None else weights.num_bytes / trainer.gate_bytes(layer)
        of_ffn = None if weights is None else weights.num_bytes / trainer.ffn_bytes(layer)
        costs.append(
            LayerCost(
                **asdict(measured),
                rank=None if weights is None else weights.rank,
                of_gate=of_gate,
                of_ffn=of_ffn,
                gate_read=None if of_gate is None else of_gate + measured.rows_read,
            )
        )
    return costs
