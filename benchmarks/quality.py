"""Every lossy rule in every budget: what it may leave out, what that costs in quality, and how fast it then is.

    python benchmarks/quality.py MODEL.gguf --text CALIBRATION --held-out TEXT --items ITEMS.jsonl

Unlike `isotherm tune`, which splits what is left out by time saved, this splits it by share, so that each rule shows
the most neurons that it can leave out; whether that is faster is what `speed` tells: decode of the same text, the exact
model before and after all rules.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from peers import RESULTS, commit

import isotherm
from isotherm.evaluation.multiple_choice import multiple_choice, read_items
from isotherm.evaluation.windows import cut_windows
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.load_options import Budget, parse_budget
from isotherm.models import FAMILIES
from isotherm.probe import measure, physical_cores
from isotherm.quality.calibration import SHARES, Calibrated, build_ladder, calibrate, collect, neutral_trims
from isotherm.quality.choice import Choice, LayerTrims
from isotherm.quality.rules import Rule, rules_for
from isotherm.quality.search import Candidate, HeldOut, best_rung, timed
from isotherm.quality.tuning import WINDOW_TOKENS, with_skipped
from isotherm.text import TextGenerator

_CALIBRATION_WINDOWS, _TIMED_TOKENS = 8, 128


class Subject:
    """One model, loaded with the rules that it is told."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path = path
        self._file = folder / "candidate.npz"

    @contextmanager
    def load(self, layers: Sequence[LayerTrims] | None) -> Iterator[TextGenerator]:
        quality = "exact"
        if layers is not None:
            Choice("candidate", "candidate", tuple(layers), None).save(self._file)
            quality = str(self._file)
        with isotherm.load(self._path, context_tokens=WINDOW_TOKENS, quality=quality) as model:
            yield model

    def calibrated(self, text: str) -> list[Calibrated]:
        with open_checkpoint(self._path) as checkpoint:
            recorded = FAMILIES[checkpoint.config.family](checkpoint.config)
            with self.load(neutral_trims(recorded)) as model:
                windows = cut_windows(model, text, WINDOW_TOKENS, _CALIBRATION_WINDOWS)
                samples = collect(model, [window.token_ids for window in windows])
                return calibrate(model, checkpoint.tensors, samples, rules_for(samples[0]), lambda _: None)

    def with_skipped(self, candidate: Candidate) -> Candidate:
        with open_checkpoint(self._path) as checkpoint:
            recorded = FAMILIES[checkpoint.config.family](checkpoint.config)
            return with_skipped(candidate, recorded, checkpoint.tensors)


def table(subject: Subject, calibrated: Sequence[Calibrated], budgets: Sequence[Budget], options: Any) -> list[Any]:
    with subject.load(None) as model:
        held_out = HeldOut(model, cut_windows(model, options.held_out.read_text(), WINDOW_TOKENS, options.windows))
    items = read_items(options.items, num_items=options.num_items) if options.items else []
    rows: list[Any] = []
    for budget in budgets:
        found = [
            subject.with_skipped(best_rung(build_ladder(one, SHARES), budget, subject.load, held_out, lambda *_: None))
            for one in calibrated
        ]
        for candidate in timed(found, subject.load, held_out.windows[0].token_ids[:_TIMED_TOKENS], lambda *_: None):
            row = {"budget": str(budget), "rule": candidate.rule.value, "share": candidate.share}
            row |= asdict(candidate.measured)
            if items:
                with subject.load(candidate.layers) as model:
                    row["accuracy"] = multiple_choice(model, items).acc_norm
            print(json.dumps(row), flush=True)
            rows.append(row)
    if items:
        with subject.load(None) as model:
            rows.append({"rule": "exact", "accuracy": multiple_choice(model, items).acc_norm, "num_items": len(items)})
        print(json.dumps(rows[-1]), flush=True)
    held_out.close()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="to calibrate on")
    parser.add_argument("--held-out", type=Path, required=True, help="to measure on")
    parser.add_argument("--items", type=Path, help="multiple choice")
    parser.add_argument("--num-items", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=4, help="of the held-out text; default: %(default)s")
    parser.add_argument("--budgets", nargs="+", default=["kl=0.01", "kl=0.05", "ppl=+1%"], help="default: %(default)s")
    parser.add_argument("--rules", nargs="+", choices=[rule.value for rule in Rule], help="by default all")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    budgets = [budget for text in options.budgets if (budget := parse_budget(text))]
    probe = asdict(measure(physical_cores()))
    with tempfile.TemporaryDirectory() as folder:
        subject = Subject(options.model, Path(folder))
        wanted = options.rules or [rule.value for rule in Rule]
        calibrated = [one for one in subject.calibrated(options.text.read_text()) if one.rule.value in wanted]
        rows = table(subject, calibrated, budgets, options)
    record = {
        "date": date.today().isoformat(),
        "what": "quality",
        "commit": commit(),
        "model": options.model.name,
        "num_windows": options.windows,
        "rows": rows,
        "machine": {key: probe[key] for key in ("cpu_name", "num_cores", "memory_bytes", "isa")},
        "read_bytes_per_s": [probe["read_bytes_per_s"], measure(physical_cores()).read_bytes_per_s],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / f"{date.today().isoformat()}-quality.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
