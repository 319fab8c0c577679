"""What several tokens in one pass cost beside one: as a chain of one sequence, and as one token each of many.

    python benchmarks/rows.py MODEL.gguf

A chain is what the check of a draft (speculation) computes, many sequences what a server's batch does; each row gets
its logits. Prints medians of alternating rounds and their ratio to one token.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

import isotherm
from isotherm.program.backend import CompiledProgram
from isotherm.program.batch import Batch, Sequence
from isotherm.program.recorder import PAGE_TOKENS

CACHED = 32  # tokens that each sequence holds
CONTEXT_TOKENS = 2048


def tables(num_states: int, first_page: int) -> tuple[np.ndarray, ...]:
    return tuple(np.full(1, first_page, np.int32) for _ in range(num_states))


def chain(num_rows: int, num_states: int) -> Batch:
    assert CACHED + num_rows <= PAGE_TOKENS
    rows = np.arange(num_rows, dtype=np.int32)
    return Batch(rows + 1, (Sequence(num_rows, CACHED, tables(num_states, 0)),), rows)


def crowd(num_rows: int, num_states: int) -> Batch:
    rows = np.arange(num_rows, dtype=np.int32)
    return Batch(rows + 1, tuple(Sequence(1, CACHED, tables(num_states, i)) for i in range(num_rows)), rows)


def pass_s(compiled: CompiledProgram, batch: Batch, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        compiled.forward(batch)
        compiled.logits(0, len(batch.logit_rows))
    return (time.perf_counter() - started) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 12, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="append a JSON line")
    args = parser.parse_args()
    with isotherm.load(args.model, context_tokens=CONTEXT_TOKENS, threads=args.threads) as model:
        engine = model._open_engine()
        compiled, num_states = engine._compiled, len(engine._sequence.page_tables)
        filler = np.arange(1, CACHED + 1, dtype=np.int32)
        for page in range(max(args.rows)):
            one = Sequence(CACHED, 0, tables(num_states, page))
            compiled.forward(Batch(filler, (one,), np.empty(0, np.int32)))
        shapes = {
            (kind, n): make(n, num_states) for kind, make in (("chain", chain), ("crowd", crowd)) for n in args.rows
        }
        repeats = max(1, int(0.15 / pass_s(compiled, shapes["chain", 1], 2)))
        samples: dict[tuple[str, int], list[float]] = {key: [] for key in shapes}
        for _ in range(args.rounds):
            for key, batch in shapes.items():
                samples[key].append(pass_s(compiled, batch, repeats))
        facts = model.facts
    medians = {key: statistics.median(values) for key, values in samples.items()}
    ratios = {
        key: statistics.median([s / one for s, one in zip(samples[key], samples[key[0], args.rows[0]], strict=True)])
        for key in shapes
    }
    print(f"{facts.name}: {facts.isa}, {facts.num_threads} threads; ms a pass, and times one token")
    for n in args.rows:
        print(
            f"{n:4} tokens",
            *(f"{kind} {medians[kind, n] * 1e3:8.2f} ms {ratios[kind, n]:5.2f}x" for kind in ("chain", "crowd")),
        )
    if args.out:
        with args.out.open("a") as file:
            record = {f"{kind} {n}": [medians[kind, n], ratios[kind, n]] for kind, n in shapes}
            file.write(json.dumps({"model": Path(facts.path).name, "isa": facts.isa, "passes": record}) + "\n")


if __name__ == "__main__":
    main()
