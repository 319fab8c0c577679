"""Predictors of which neurons fire: one for each FFN of a model, in a file, and a Program that asks them.

The file is one of array_file.py: the meta says what they were trained on and what was measured, and layer i has the
arrays `i.first` and `i.second`, rows of Q8_0 blocks (GGUF specification); layers that are better off without have none.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import OptionError, StatsFileError
from isotherm.program import ops
from isotherm.program.backend import WeightTensor
from isotherm.program.recorder import Program
from isotherm.quantization.layouts import BLOCKS
from isotherm.sparsity.array_file import reading, write_arrays
from isotherm.types import QuantType

U8 = NDArray[np.uint8]

_KIND = ("isotherm-predictor", 1)
PREDICTOR_TYPE = QuantType.Q8_0
RANK_STEP = 64  # to which columns are padded where they are packed


@dataclass(frozen=True)
class Weights:
    """A predictor as it is kept: first [rank, row bytes] and second [ffn_size, row bytes], and the threshold."""

    first: U8
    second: U8
    threshold: float

    @property
    def rank(self) -> int:
        return len(self.first)

    @property
    def num_bytes(self) -> int:
        return self.first.nbytes + self.second.nbytes

    @property
    def digest(self) -> str:
        """Names the content of the two matrices."""
        return sha256(self.first.tobytes() + self.second.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Measured:
    """Of tokens that nothing was trained on: shares from 0 to 1."""

    active: float  # neurons that fire
    recall: float  # of the firings: predicted
    predicted: float  # neurons that are predicted
    rows_read: float  # of the gate: those predicted, but all for a token that has too many of them


@dataclass(frozen=True)
class PredictedLayer:
    """weights None: no predictor was found that spares more than it costs; `measured` is then of the best."""

    weights: Weights | None
    measured: Measured


@dataclass(frozen=True)
class Training:
    """What predictors were trained on, and what was asked of them."""

    identity: str  # of the model file
    model: str
    num_layers: int
    text_sha256: str
    window_tokens: int
    num_windows: int
    recall: float
    max_rank: int


@dataclass(frozen=True)
class PredictorSet:
    """Predictors of the first layers of a model: of all, once training is done."""

    training: Training
    layers: tuple[PredictedLayer, ...]

    def save(self, path: Path) -> None:
        """Raises OptionError where it cannot be written."""
        layers = []
        arrays: dict[str, U8] = {}
        for index, layer in enumerate(self.layers):
            threshold = None if layer.weights is None else layer.weights.threshold
            layers.append({"threshold": threshold, **asdict(layer.measured)})
            if layer.weights is not None:
                arrays |= {f"{index}.first": layer.weights.first, f"{index}.second": layer.weights.second}
        try:
            write_arrays(path, _KIND, {"training": asdict(self.training), "layers": layers}, arrays)
        except OSError as error:
            raise OptionError(f"{path} cannot be written: {error.strerror}; -o names another file") from error


def load_predictors(path: Path) -> PredictorSet:
    """Raises StatsFileError for what is no such file, is damaged, or contradicts itself."""
    with reading(path, _KIND, "predictors", "train them again with `isotherm train-predictor`") as (meta, archive):
        training = Training(**meta["training"])
        layers = tuple(_layer(archive, index, dict(kept)) for index, kept in enumerate(meta["layers"]))
        is_sound = isinstance(training.identity, str) and isinstance(training.model, str)
        if not is_sound or type(training.num_layers) is not int or len(layers) > training.num_layers:
            raise ValueError("what was trained contradicts itself")
        return PredictorSet(training, layers)


def _layer(archive: Any, index: int, kept: dict[str, Any]) -> PredictedLayer:
    threshold = kept.pop("threshold")
    measured = Measured(**{name: _share(value) for name, value in kept.items()})
    if threshold is None:
        return PredictedLayer(None, measured)
    weights = Weights(archive[f"{index}.first"], archive[f"{index}.second"], float(threshold))
    for name, matrix in (("first", weights.first), ("second", weights.second)):
        if matrix.dtype != np.uint8 or matrix.ndim != 2 or not matrix.size:
            raise ValueError(f"{name} of layer {index} has the shape {matrix.shape} of {matrix.dtype}")
        if matrix.shape[1] % PREDICTOR_TYPE.block_bytes:
            raise ValueError(f"rows of {name} of layer {index} have {matrix.shape[1]} bytes")
        scales = np.ascontiguousarray(matrix).view(BLOCKS[PREDICTOR_TYPE])["d"].view(np.float16)
        if not np.isfinite(scales).all():
            raise ValueError(f"{name} of layer {index} has scales that are no finite numbers")
    if weights.rank % RANK_STEP or weights.second.shape[1] != PREDICTOR_TYPE.row_bytes(weights.rank):
        raise ValueError(f"the matrices of layer {index} do not fit each other")
    if not abs(weights.threshold) <= float(np.finfo(np.float32).max):
        raise ValueError(f"the threshold of layer {index} is no finite number")
    return PredictedLayer(weights, measured)


def _share(value: Any) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError(f"a share of {value}")
    return float(value)


# --- asked by a Program ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Matrix:
    """A WeightTensor of a predictor."""

    raw: U8

    @property
    def quant_type(self) -> QuantType:
        return PREDICTOR_TYPE

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.raw), self.raw.shape[1] // PREDICTOR_TYPE.block_bytes * PREDICTOR_TYPE.block_elements

    def read(self, row_start: int = 0, row_end: int | None = None) -> U8:
        return self.raw[row_start:row_end]


def with_predictors(
    program: Program, tensors: Mapping[str, WeightTensor], path: str | Path | None, identity: str
) -> tuple[Program, Mapping[str, WeightTensor]]:
    """A recorded Program whose FFNs ask the predictors of the file `path`, and `tensors` with their weights.

    identity, tensors: of the model file. Raises StatsFileError for a damaged, unfinished or other model's file.
    """
    if path is None:
        return program, tensors
    predictors = load_predictors(Path(path))
    training = predictors.training
    way_out = "`isotherm train-predictor` makes one of this model"
    if training.identity != identity:
        raise StatsFileError(f"{path} is of another model file, {training.model!r}; {way_out}, or leave it out")
    if len(predictors.layers) < training.num_layers:
        raise StatsFileError(
            f"{path} has {len(predictors.layers)} of {training.num_layers} layers; run the `isotherm train-predictor` "
            "that began it once more, which goes on there"
        )
    num_ffns = len(program.ffns)
    if num_ffns != training.num_layers:
        raise StatsFileError(f"{path} has {training.num_layers} layers, the model {num_ffns} FFNs; {way_out}")
    layers = iter(predictors.layers)
    added: dict[str, WeightTensor] = {}
    changed: list[ops.Op] = []
    for op in program.ops:
        weights = next(layers).weights if isinstance(op, ops.Ffn) else None
        if isinstance(op, ops.Ffn) and weights is not None:
            first, second = _Matrix(weights.first), _Matrix(weights.second)
            if not op.activation.has_zeros or (second.shape[0], first.shape[1]) != (op.ffn_size, op.x.width):
                raise StatsFileError(f"{path} does not fit the FFNs of the model; {way_out}")
            prefix = f"{op.up.rpartition('.')[0]}.{weights.digest}"
            names = (f"{prefix}.predictor_first", f"{prefix}.predictor_second")
            added |= zip(names, (first, second), strict=True)
            op = replace(op, predictor=ops.Predictor(*names, weights.rank, weights.threshold))
        changed.append(op)
    return replace(program, ops=tuple(changed)), {**tensors, **added}
