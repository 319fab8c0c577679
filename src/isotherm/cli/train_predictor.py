"""`isotherm train-predictor`: learns which neurons of a model fire, from what they read."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotherm.cli.console import notice, print_json
from isotherm.cli.flags import JsonOption, ModelArgument, gathers, takes
from isotherm.cli.loading import loaded
from isotherm.cli.perplexity import read_text
from isotherm.cli.settings import Settings

if TYPE_CHECKING:
    from isotherm.sparsity.predictor import PredictorSet
    from isotherm.sparsity.predictor_training import Attempt, LayerCost, PredictorTrainer

_SAVE_S = 20.0  # between two times that what was trained goes to disk


@dataclass(frozen=True)
class Aim:
    """What the predictors are to reach, and on how much of the text."""

    recall: float
    max_rank: int | None
    window_tokens: int
    num_windows: int


def aim_of(
    recall: Annotated[float, typer.Option("--recall", metavar="SHARE", help="Of the firings, to be predicted.")] = 0.95,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", metavar="N", help="Largest rank; by default half of the model's hidden size."),
    ] = None,
    window_tokens: Annotated[int, typer.Option("--ctx", "-c", metavar="TOKENS", help="Tokens of a window.")] = 512,
    num_windows: Annotated[
        int, typer.Option("--chunks", metavar="N", help="Windows, from the start of the text; every fifth is a test.")
    ] = 32,
) -> Aim:
    return Aim(recall, max_rank, window_tokens, num_windows)


@takes("threads", "cache_gib", "offline")
@gathers(aim_of)
def train_predictor(
    settings: Settings,
    aim: Aim,
    model: ModelArgument,
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", help="Text to learn from, UTF-8.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="PREDICTOR", help="File for what is learnt.", show_default=False),
    ],
    as_json: JsonOption = False,
) -> None:
    """Trains predictors of which neurons fire, for --predictor; goes on with PREDICTOR where it was cut short."""
    from isotherm.evaluation.windows import cut_windows
    from isotherm.formats.checkpoint import open_checkpoint
    from isotherm.sparsity.predictor_training import PredictorTrainer, layer_costs

    content = read_text(text)
    window, chunks = aim.window_tokens, aim.num_windows
    alone = replace(settings, ctx=window, quality="exact", predictor=None, device="cpu")
    with loaded(model, alone) as generator, open_checkpoint(generator.facts.path) as checkpoint:
        windows = [cut.token_ids for cut in cut_windows(generator, content, window, chunks)]
        if len(windows) < chunks:
            notice(f"the text holds {len(windows)} windows of {window} tokens, not {chunks}")
        trainer = PredictorTrainer(generator, checkpoint.tensors, checkpoint.identity, windows)
        predictors = _train(trainer, trainer.start(aim.recall, aim.max_rank), out)
        costs = layer_costs(trainer, predictors)
    if as_json:
        training = predictors.training
        shown = {"recall": training.recall, "max_rank": training.max_rank, "layers": [asdict(cost) for cost in costs]}
        print_json({"model": training.model, **shown})
    else:
        _print(predictors, costs)


def _train(trainer: "PredictorTrainer", predictors: "PredictorSet", out: Path) -> "PredictorSet":
    """Saved now and then, and where it is cut short."""
    predictors = _begun(predictors, out)
    predictors.save(out)  # whether it can be written is told before, not after
    newest, saved_s = predictors, time.monotonic()

    def on_window(number: int) -> None:
        if sys.stderr.isatty() or number % 16 == 0:
            notice(f"window {number} of {predictors.training.num_windows}")

    def on_attempt(layer: int, attempt: "Attempt") -> None:
        notice(
            f"layer {layer} (of {predictors.training.num_layers}), rank {attempt.weights.rank}: "
            f"{attempt.measured.recall:.1%} of firings among {attempt.measured.predicted:.1%} of neurons, "
            f"where {attempt.measured.active:.1%} fire; reads {attempt.read:.1%} of the gate"
        )

    def on_layer(so_far: "PredictorSet") -> None:
        nonlocal newest, saved_s
        newest = so_far
        if time.monotonic() - saved_s > _SAVE_S:
            so_far.save(out)
            saved_s = time.monotonic()

    try:
        return trainer.train(predictors, on_window, on_attempt, on_layer)
    finally:
        newest.save(out)


def _begun(predictors: "PredictorSet", out: Path) -> "PredictorSet":
    """What the file `out` has of the same training, or `predictors`."""
    from isotherm.errors import StatsFileError
    from isotherm.sparsity.predictor import load_predictors

    if not out.exists():
        return predictors
    try:
        before = load_predictors(out)
    except StatsFileError as error:
        notice(f"{error}: starting anew")
        return predictors
    if before.training != predictors.training:
        notice(f"{out} is of another model, text or aim, and is written anew")
        return predictors
    notice(f"{out}: going on after {len(before.layers)} of {before.training.num_layers} layers")
    return before


def _print(predictors: "PredictorSet", costs: "Sequence[LayerCost]") -> None:
    training = predictors.training
    print(f"{training.model}, recall {training.recall:.1%} asked for, {training.num_windows} windows\n")
    print("layer  active  recall  predicted  rank  predictor of gate  of FFN  gate read")
    for index, cost in enumerate(costs):
        start = f"{index:5}  {cost.active:6.1%}  {cost.recall:6.1%}  {cost.predicted:9.1%}"
        if cost.rank is None:
            print(f"{start}     -  left out: a predictor would read more than it spares")
            continue
        print(f"{start}  {cost.rank:4}  {cost.of_gate:17.1%}  {cost.of_ffn:6.1%}  {cost.gate_read:9.1%}")
    num_capped = sum(cost.rank == training.max_rank for cost in costs)
    if num_capped:
        notice(f"{num_capped} layers have the largest rank that was allowed, {training.max_rank}: --max-rank sets it")
