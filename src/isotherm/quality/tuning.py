"""From a text and a budget to the choice of a rule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from isotherm.errors import OptionError
from isotherm.evaluation.multiple_choice import Item, multiple_choice
from isotherm.evaluation.windows import cut_windows
from isotherm.load_options import Budget
from isotherm.program.backend import WeightTensor
from isotherm.program.recorder import Program
from isotherm.quality.calibration import (
    SHARES,
    Calibrated,
    Ladder,
    build_ladder,
    calibrate,
    collect,
    neutral_trims,
)
from isotherm.quality.choice import Choice, LayerTrims, Measured, check_tunable
from isotherm.quality.rules import Rule, rules_for
from isotherm.quality.search import Candidate, HeldOut, Load, best_rung, fastest, gains, timed
from isotherm.sparsity.stored_weights import stored_bytes

WINDOW_TOKENS = 512
_CALIBRATION_WINDOWS = 8
_TIMED_TOKENS = 96


@dataclass(frozen=True)
class Plan:
    """What to tune for, and on what."""

    budget: Budget
    rules: tuple[Rule, ...]
    text: str  # to calibrate on
    held_out: str  # to measure on
    num_windows: int  # of the held-out text
    items: tuple[Item, ...] = ()  # of multiple choice, to score what is chosen


@dataclass(frozen=True)
class Tuned:
    """The choice, and what each rule could do within the budget."""

    choice: Choice
    candidates: tuple[Candidate, ...]


def tune(
    plan: Plan, load: Load, recorded: Program, tensors: Mapping[str, WeightTensor], notify: Callable[[str], None]
) -> Tuned:
    """recorded, tensors: of the model's file. `notify` hears of each step.

    Raises OptionError for a mixture of experts and rules of which the model can have none, and what loading and
    evaluating raise.
    """
    check_tunable(recorded, str(plan.budget))
    with load(neutral_trims(recorded)) as model:
        windows = cut_windows(model, plan.text, WINDOW_TOKENS, _CALIBRATION_WINDOWS)
        notify(f"calibrating on {len(windows)} windows of {WINDOW_TOKENS} tokens")
        samples = collect(model, [window.token_ids for window in windows])
        num_layers, rules = len(samples), _possible(plan.rules, rules_for(samples[0]), notify)
        calibrated = calibrate(
            model, tensors, samples, rules, lambda i: notify(f"layer {i + 1} of {num_layers}: errors of all rules")
        )
    timed_ids = windows[0].token_ids[:_TIMED_TOKENS]
    ladders = _ladders(calibrated, load, timed_ids, notify)
    held_out = _held_out(plan, load, notify)
    try:
        candidates = [best_rung(ladder, plan.budget, load, held_out, _telling(notify)) for ladder in ladders]
    finally:
        held_out.close()
    candidates = [with_skipped(candidate, recorded, tensors) for candidate in candidates]
    candidates = timed(candidates, load, timed_ids, lambda rule, rate: notify(f"{_name(rule)}: {rate:.1f} tokens/s"))
    return Tuned(_choice(plan, load, candidates), tuple(candidates))


def _possible(wanted: Sequence[Rule], known: Sequence[Rule], notify: Callable[[str], None]) -> list[Rule]:
    """Those of the wanted rules that the model can have."""
    names = ", ".join(rule.value for rule in wanted if rule not in known)
    if names and not set(wanted) & set(known):
        possible = ", ".join(rule.value for rule in known)
        raise OptionError(f"{names}: the FFNs of this model have no gate; rules for it are {possible}")
    if names:
        notify(f"left out, for the FFNs of this model have no gate: {names}")
    return [rule for rule in wanted if rule in known]


def _ladders(
    calibrated: Sequence[Calibrated], load: Load, timed_ids: Sequence[int], notify: Callable[[str], None]
) -> list[Ladder]:
    """What a share saves is timed once for rules of the gate, and once for those of hidden values."""
    saved: dict[bool, tuple[float, ...]] = {}
    for one in calibrated:
        is_of_gate = one.rule.is_of_gate
        if is_of_gate not in saved:
            saved[is_of_gate] = gains(one, load, timed_ids)
            shown = ", ".join(f"{saved[is_of_gate][i]:.1%} at {SHARES[i]:.0%}" for i in (6, 10, 14, 18))
            notify(f"{'gate' if is_of_gate else 'hidden values'}: leaving neurons out saves {shown}")
    return [build_ladder(one, saved[one.rule.is_of_gate]) for one in calibrated]


def _held_out(plan: Plan, load: Load, notify: Callable[[str], None]) -> HeldOut:
    with load(None) as model:
        windows = cut_windows(model, plan.held_out, WINDOW_TOKENS, plan.num_windows)
        if len(windows) < plan.num_windows:
            notify(f"the held-out text has {len(windows)} windows of {WINDOW_TOKENS} tokens, not {plan.num_windows}")
        held_out = HeldOut(model, windows)
    notify(f"exact: perplexity {held_out.perplexity:.4f} of the held-out text")
    return held_out


def _telling(notify: Callable[[str], None]) -> Callable[[Rule, float, Measured], None]:
    def tell(rule: Rule, share: float, measured: Measured) -> None:
        notify(
            f"{rule.value}, {share:.1%} left out: KL {measured.kl:.4f} ± {measured.kl_error:.4f}, "
            f"perplexity {measured.perplexity:.4f}"
        )

    return tell


def _name(rule: Rule | None) -> str:
    return "exact" if rule is None else rule.value


def _choice(plan: Plan, load: Load, candidates: Sequence[Candidate]) -> Choice:
    best = fastest(candidates)
    if best is None:
        return Choice(str(plan.budget), None, (), None)
    measured = best.measured
    if plan.items:
        measured = replace(
            measured,
            accuracy=_accuracy(load, best.layers, plan.items),
            exact_accuracy=_accuracy(load, None, plan.items),
        )
    return Choice(str(plan.budget), best.rule.value, best.layers, measured)


def _accuracy(load: Load, layers: Sequence[LayerTrims] | None, items: Sequence[Item]) -> float:
    with load(layers) as model:
        return multiple_choice(model, items).acc_norm


def with_skipped(candidate: Candidate, recorded: Program, tensors: Mapping[str, WeightTensor]) -> Candidate:
    """With the share of the model's weight bytes that is left out, as the file stores them."""
    total_bytes = sum(stored_bytes(tensor) for tensor in tensors.values())
    skipped_bytes = 0.0
    for op, share in zip(recorded.ffns, candidate.shares, strict=True):
        weights = (op.up, op.down) if candidate.rule.is_of_gate else (op.down,)
        skipped_bytes += share * sum(stored_bytes(tensors[name]) for name in weights)
    return replace(candidate, measured=replace(candidate.measured, skipped=skipped_bytes / total_bytes))
