"""Decoding with the neurons that fire alone, against decoding with all of them: in turn, in one run, medians.

    python benchmarks/sparse.py relu-7b.gguf -r 5

The model is one whose neurons fire seldom: synthetic.py plants them. That both give the same answers is checked first.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from peers import RESULTS, commit

import isotherm
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.probe import measure, physical_cores
from isotherm.sparsity.profile import Profiler, profile
from isotherm.sparsity.summary import summarise
from isotherm.text import TextGenerator

_CHECKED_TOKENS = 24
_PROMPT = list(range(1, 65))


def active_share(model: TextGenerator, path: Path) -> float:
    """Mean share of neurons that fire for the prompt's tokens."""
    with open_checkpoint(path) as checkpoint:
        profiler = Profiler(model, checkpoint.tensors, checkpoint.identity)
        return summarise(profile(profiler, profiler.start([_PROMPT]), [_PROMPT], lambda _: None)).active


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-r", "--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("-n", "--num-tokens", type=int, default=32, help="decoded in each turn; default: %(default)s")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="default: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    load: dict[str, Any] = {"threads": options.threads, "context_tokens": 512}
    with (
        isotherm.load(options.model, sparse=True, **load) as sparse,
        isotherm.load(options.model, sparse=False, **load) as dense,
    ):
        models = {"sparse": sparse, "dense": dense}
        answers = {
            name: model.generate("a b c d e f", raw=True, max_tokens=_CHECKED_TOKENS) for name, model in models.items()
        }
        assert answers["sparse"].token_ids == answers["dense"].token_ids, "the two do not agree"
        active = active_share(sparse, options.model)
        rates: dict[str, list[float]] = {name: [] for name in models}
        probes = []
        for number in range(options.rounds):
            probes.append(asdict(measure(options.threads)))
            for name in list(models)[:: -1 if number % 2 else 1]:
                rates[name].append(options.num_tokens / models[name].decode_s(options.num_tokens, depth=16).total_s)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratio = medians["sparse"] / medians["dense"]
    print(f"{options.model.name}: {active:.1%} active, tokens/s {medians}, ratio {ratio:.3f}")
    record = {
        "date": date.today().isoformat(),
        "what": "sparse",
        "commit": commit(),
        "model": options.model.name,
        "num_threads": options.threads,
        "active": active,
        "num_tokens": options.num_tokens,
        "tokens_per_s": rates,
        "medians": medians,
        "ratio": ratio,
        "machine": {key: probes[0][key] for key in ("cpu_name", "num_cores", "memory_bytes", "isa")},
        "read_bytes_per_s": [probe["read_bytes_per_s"] for probe in probes],
        "int8_ops_per_s": [probe["int8_ops_per_s"] for probe in probes],
    }
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / f"{date.today().isoformat()}-sparse.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
