"""The lossy rule that was chosen for a model and a budget, and the file that keeps it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import OptionError
from isotherm.load_options import EXACT, parse_budget
from isotherm.program import ops
from isotherm.program.ops import Ffn, Trim
from isotherm.program.recorder import Program
from isotherm.sparsity.array_file import reading, write_arrays

_KIND = ("isotherm-quality-choice", 1)
_PLACES = ("gate", "hidden")


@dataclass(frozen=True)
class LayerTrims:
    """What is trimmed of one FFN."""

    gate: Trim | None = None
    hidden: Trim | None = None


@dataclass(frozen=True)
class Measured:
    """What a rule costs and gives, over held-out text, beside the exact model. None: not measured."""

    kl: float  # nats a token
    kl_error: float  # standard error of it
    perplexity: float
    exact_perplexity: float
    skipped: float  # share of a token's weight bytes that the rule lets skip
    speed: float | None = None  # decode, as a ratio over the exact model's
    accuracy: float | None = None  # of multiple choice
    exact_accuracy: float | None = None


@dataclass(frozen=True)
class Choice:
    """rule None: no lossy rule within the budget was faster than the exact model; there are no layers and measures."""

    budget: str
    rule: str | None
    layers: tuple[LayerTrims, ...]
    measured: Measured | None

    def save(self, path: Path) -> None:
        """Raises OptionError where it cannot be written."""
        arrays: dict[str, NDArray[Any]] = {}
        deviations: list[dict[str, float]] = []
        for index, layer in enumerate(self.layers):
            trims = {place: trim for place in _PLACES if (trim := getattr(layer, place)) is not None}
            deviations.append({place: trim.deviations for place, trim in trims.items()})
            arrays |= {
                f"{index}.{place}": np.frombuffer(trim.thresholds, np.float32)
                for place, trim in trims.items()
                if trim.thresholds is not None
            }
        measured = None if self.measured is None else asdict(self.measured)
        meta = {"budget": self.budget, "rule": self.rule, "measured": measured, "deviations": deviations}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(path, _KIND, meta, arrays)
        except OSError as error:
            raise OptionError(f"{path} cannot be written: {error.strerror}; ISOTHERM_CACHE names a folder") from error


def choice_path(cache: Path, identity: str, budget: str) -> Path:
    """identity: of the model file."""
    name = "".join(c if c.isalnum() or c in "=." else "-" for c in budget)
    return cache / "quality" / f"{identity[:32]}-{name}.npz"


def load_choice(path: Path) -> Choice:
    """Raises StatsFileError for what is no such file, is damaged, or contradicts itself."""
    with reading(path, _KIND, "choice of quality", "tune again") as (meta, archive):
        layers = tuple(_layer(archive, i, kept) for i, kept in enumerate(meta["deviations"]))
        measured = None if meta["measured"] is None else Measured(**meta["measured"])
        return Choice(str(meta["budget"]), meta["rule"], layers, measured)


def _layer(archive: Any, index: int, deviations: dict[str, float]) -> LayerTrims:
    trims = {}
    for place, value in deviations.items():
        thresholds = archive.get(f"{index}.{place}")
        if thresholds is not None and (thresholds.dtype != np.float32 or thresholds.ndim != 1):
            raise ValueError(f"thresholds of {thresholds.dtype} in {thresholds.ndim} dimensions")
        trims[place] = Trim(None if thresholds is None else thresholds.tobytes(), float(value))
    return LayerTrims(**trims)


def trimmed_program(program: Program, layers: Sequence[LayerTrims]) -> Program:
    """A recorded Program whose FFNs are trimmed, in their order. Raises OptionError where they are others."""
    ffns = program.ffns
    if len(ffns) != len(layers) or not all(_fits(op, layer) for op, layer in zip(ffns, layers, strict=True)):
        raise OptionError("the choice of quality is of another model; run `isotherm tune` again")
    trims = iter(layers)
    changed = [_trimmed(op, next(trims)) if isinstance(op, Ffn) else op for op in program.ops]
    return replace(program, ops=tuple(changed))


def _fits(op: ops.Ffn, layer: LayerTrims) -> bool:
    sizes = {len(trim.thresholds) for trim in (layer.gate, layer.hidden) if trim and trim.thresholds is not None}
    return sizes <= {4 * op.ffn_size} and (layer.gate is None or op.gate is not None)


def _trimmed(op: ops.Ffn, layer: LayerTrims) -> ops.Ffn:
    return replace(op, trim_gate=layer.gate, trim_hidden=layer.hidden)


def check_tunable(program: Program, quality: str) -> None:
    """Raises OptionError for a recorded Program with experts, which no rule trims."""
    if any(isinstance(op, ops.Moe) for op in program.ops):
        raise OptionError(
            f"quality {quality}: experts are not tuned: lossy rules take models with one FFN a layer; a mixture of "
            f"experts runs with quality {EXACT}"
        )


def chosen_program(program: Program, quality: str, cache: Path, identity: str) -> Program:
    """`program` with the rule that was chosen for this model file and `quality`, or that of the file it names.

    Raises OptionError where none was and for experts, StatsFileError where the file of it is damaged.
    """
    if quality == EXACT:
        return program
    check_tunable(program, quality)
    budget = parse_budget(quality)
    path = Path(quality) if budget is None else choice_path(cache, identity, str(budget))
    if budget is not None and not path.exists():
        raise OptionError(
            f"quality {budget}: no rule was chosen for this model yet; `isotherm tune MODEL --quality {budget} --text "
            "FILE` finds the fastest one"
        )
    choice = load_choice(path)
    return program if choice.rule is None else trimmed_program(program, choice.layers)
