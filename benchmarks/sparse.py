"""Decoding with the neurons that fire alone, against decoding with all of them: in turn, in one run, medians.

    python benchmarks/sparse.py relu-7b.gguf -r 5
    python benchmarks/sparse.py relu-7b.gguf -r 5 --predictor relu-7b.predictor --text text.txt

The model is one whose neurons fire seldom: synthetic.py plants them. That both give the same answers is checked first.
With --batch as many answers are decoded together. With a predictor (`isotherm train-predictor`) decoding that asks it
is timed too, and what it predicts of a text that it was not trained on is told.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from peers import RESULTS, commit

import isotherm
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.probe import measure, physical_cores
from isotherm.program import ops
from isotherm.sparsity.predictor import load_predictors
from isotherm.sparsity.predictor_samples import collect
from isotherm.sparsity.predictor_training import measure as measure_predictor
from isotherm.sparsity.profile import Profiler, ffn_layers, profile
from isotherm.sparsity.summary import summarise
from isotherm.text import TextGenerator

_CHECKED_TOKENS = 24
_PROMPT = list(range(1, 65))
_MEASURED_TOKENS = 512  # of a text, that tell what a predictor predicts


def active_share(model: TextGenerator, path: Path) -> float:
    """Mean share of neurons that fire for the prompt's tokens, of experts those that are chosen."""
    gates = {op.gated for op in model.program.ops if isinstance(op, ops.SparseExpertUp)}
    if gates:
        shares: list[float] = []
        model.observe(_PROMPT, gates, lambda _, rows: shares.append(float(np.mean(rows > 0))))
        return statistics.mean(shares)
    with open_checkpoint(path) as checkpoint:
        profiler = Profiler(model, checkpoint.tensors, checkpoint.identity)
        return summarise(profile(profiler, profiler.start([_PROMPT]), [_PROMPT], lambda _: None)).active


def predicted_shares(model: TextGenerator, options: argparse.Namespace) -> dict[str, Any]:
    """Recall and share of predicted neurons by layer and in the mean, over the first tokens of a text."""
    token_ids = _PROMPT if options.text is None else model.tokenize(options.text.read_text())[:_MEASURED_TOKENS]
    layers = ffn_layers(model.program)
    with open_checkpoint(options.model) as checkpoint:
        samples = collect(model, checkpoint.tensors, layers, [token_ids])
    kept = [layer.weights for layer in load_predictors(options.predictor).layers]
    found = [
        measure_predictor(weights, sample) if weights else None for weights, sample in zip(kept, samples, strict=True)
    ]
    asked = [measured for measured in found if measured]
    return {
        "layers": [None if measured is None else asdict(measured) for measured in found],
        "ranks": [None if weights is None else weights.rank for weights in kept],
        **{name: statistics.mean(getattr(one, name) for one in asked) for name in ("active", "recall", "predicted")},
    }


def decode_rate(model: TextGenerator, num_tokens: int, batch: int) -> float:
    """Tokens a second, of all answers together; each of several begins with a prompt of its own."""
    if batch == 1:
        return num_tokens / model.decode_s(num_tokens, depth=16).total_s
    with ExitStack() as stack:
        prompts = [[token + 64 * i for token in _PROMPT[:16]] for i in range(batch)]
        streams = [stack.enter_context(model.start(prompt, max_tokens=num_tokens + 64)) for prompt in prompts]
        waiting = set(range(batch))
        while waiting:
            model.step()
            waiting -= {i for i, stream in enumerate(streams) if stream.poll()}  # and what the others chose meanwhile
        started, num_chosen = time.perf_counter(), 0
        for _ in range(num_tokens):
            model.step()
            num_chosen += sum(len(piece.tokens) for stream in streams if (piece := stream.poll()))
        return num_chosen / (time.perf_counter() - started)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-r", "--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("-n", "--num-tokens", type=int, default=32, help="decoded in each turn; default: %(default)s")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="default: %(default)s")
    parser.add_argument("-b", "--batch", type=int, default=1, help="answers at once; default: %(default)s")
    parser.add_argument("--predictor", type=Path, help="a file of `isotherm train-predictor`: decoding with it too")
    parser.add_argument("--text", type=Path, help="what the predictor is measured on; by default some token ids")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    load: dict[str, Any] = {"threads": options.threads, "context_tokens": 512, "parallel": options.batch}
    with ExitStack() as stack:
        sparse = stack.enter_context(isotherm.load(options.model, sparse=True, **load))
        dense = stack.enter_context(isotherm.load(options.model, sparse=False, **load))
        models = {"sparse": sparse, "dense": dense}
        answers = {
            name: model.generate("a b c d e f", raw=True, max_tokens=_CHECKED_TOKENS) for name, model in models.items()
        }
        assert answers["sparse"].token_ids == answers["dense"].token_ids, "the two do not agree"
        active, predictor = active_share(sparse, options.model), None
        if options.predictor:
            predictor = predicted_shares(sparse, options)
            predicted = isotherm.load(options.model, sparse=True, predictor=options.predictor, **load)
            models["predicted"] = stack.enter_context(predicted)
        rates: dict[str, list[float]] = {name: [] for name in models}
        probes = []
        for number in range(options.rounds):
            probes.append(asdict(measure(options.threads)))
            for name in list(models)[:: -1 if number % 2 else 1]:
                rates[name].append(decode_rate(models[name], options.num_tokens, options.batch))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["sparse"] / medians["dense"]
    print(f"{options.model.name}, {options.batch} at once: {active:.1%} active, tokens/s {medians}, ratio {ratio:.3f}")
    if predictor:
        predictor["ratio"] = medians["predicted"] / medians["dense"]
        print(
            f"with a predictor: {predictor['recall']:.1%} of firings among {predictor['predicted']:.1%} of neurons, "
            f"where {predictor['active']:.1%} fire; ratio {predictor['ratio']:.3f}"
        )
    record = {
        "date": date.today().isoformat(),
        "what": "sparse",
        "commit": commit(),
        "model": options.model.name,
        "num_threads": options.threads,
        "active": active,
        "num_tokens": options.num_tokens,
        "batch": options.batch,
        "tokens_per_s": rates,
        "medians": medians,
        "ratio": ratio,
        "predictor": predictor,
        "machine": {key: probes[0][key] for key in ("cpu_name", "num_cores", "memory_bytes", "isa")},
        "read_bytes_per_s": [probe["read_bytes_per_s"] for probe in probes],
        "int8_ops_per_s": [probe["int8_ops_per_s"] for probe in probes],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / f"{date.today().isoformat()}-sparse.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
