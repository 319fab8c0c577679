"""Isotherm's server against llama.cpp's own on one model: alternating, in one run, medians.

    python benchmarks/serve.py MODEL.gguf --llama-server PATH -d 600          many clients at once
    python benchmarks/serve.py MODEL.gguf --one --llama-server PATH           one stream, against `isotherm bench`
    python benchmarks/serve.py MODEL.gguf --turns --llama-server PATH         a long conversation's second turn

One server runs at a time, started afresh for each round. See README.md beside this file for how llama-server is built
and what the numbers leave out.
"""

import argparse
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from peers import RESULTS, commit
from serve_rounds import ISOTHERM, LLAMA, Run, Sample, load_round, one_round, read_texts, turns_round
from servers import ServerFailed

import isotherm
from isotherm.probe import measure, physical_cores

MIN_DURATION_S = 5.0  # memory is looked at once a second

# --- tables ---


@dataclass(frozen=True)
class Mode:
    """A round of one engine, and what the table shows of it: nan where an engine has no such number."""

    what: str
    round: Callable[[Run, str, int], Sample]
    columns: Mapping[str, Callable[[Sample], float]]


LOAD = Mode(
    "serve",
    load_round,
    {
        "output tokens/s": lambda sample: sample["output_tokens_per_s"],
        "prompt tokens/s": lambda sample: sample["prompt_tokens_per_s"],
        "time to first token p50, s": lambda sample: sample["ttft_s"]["p50"],
        "time to first token p95, s": lambda sample: sample["ttft_s"]["p95"],
        "between tokens p50, ms": lambda sample: sample["inter_token_s"]["p50"] * 1e3,
        "between tokens p95, ms": lambda sample: sample["inter_token_s"]["p95"] * 1e3,
        "between tokens p99, ms": lambda sample: sample["inter_token_s"]["p99"] * 1e3,
        "requests in the window": lambda sample: sample["requests_in_window"],
        "errors": lambda sample: sum(sample["errors"].values()),
        "prompt tokens p50": lambda sample: sample["prompt_tokens"]["p50"],
        "prompt tokens found cached, %": lambda sample: sample["cached_tokens_share"] * 100,
        "RSS at most, MB": lambda sample: sample["rss_max_bytes"] / 1e6,
        "RSS growth, MB/min": lambda sample: sample["rss_bytes_per_minute"] / 1e6,
        "CPUs of the server": lambda sample: sample["server_cpu_s"] / sample["duration_s"],
        "CPUs of the clients": lambda sample: sample["client_cpu_s"] / sample["duration_s"],
        "until every client had an answer, s": lambda sample: sample["warmup_s"],
    },
)
ONE = Mode(
    "serve-one",
    one_round,
    {
        "tokens/s of one stream": lambda sample: sample["tokens_per_s"],
        "tokens/s of bench": lambda sample: sample.get("bench_tokens_per_s", math.nan),
        "stream / bench, %": lambda sample: sample.get("share_of_bench", math.nan) * 100,
        "tokens of an answer": lambda sample: sample["output_tokens"],
    },
)
TURNS = Mode(
    "serve-turns",
    turns_round,
    {
        "time to first token, first turn, s": lambda sample: sample["first_ttft_s"],
        "second turn, s": lambda sample: sample["second_ttft_s"],
        "second / first, %": lambda sample: sample["second_share"] * 100,
        "second turn after a restart, s": lambda sample: sample.get("restarted_ttft_s", math.nan),
        "after a restart / first, %": lambda sample: sample.get("restarted_share", math.nan) * 100,
        "prompt tokens of the first turn": lambda sample: sample["first_prompt_tokens"],
        "cached tokens of the second": lambda sample: sample["second_cached_tokens"],
        "cached tokens after a restart": lambda sample: sample.get("restarted_cached_tokens", math.nan),
    },
)


def report(run: Run, mode: Mode) -> str:
    """Markdown: medians over the rounds with their range, the ratio of medians, the machine, errors."""
    engines = list(run.samples)
    has_ratio = len(engines) == 2
    lines = [f"| | {' | '.join(engines)} |{f' {engines[0]} / {engines[1]} |' if has_ratio else ''}"]
    lines += ["|---|" + "--:|" * (len(engines) + has_ratio)]
    for name, of in mode.columns.items():
        values = {engine: [of(sample) for sample in run.samples[engine]] for engine in engines}
        medians = [statistics.median(values[engine]) for engine in engines]
        cells = [_cell(values[engine]) for engine in engines]
        if has_ratio:
            ratio = medians[0] / medians[1] if medians[1] else math.nan
            cells += ["" if math.isnan(ratio) else f"{ratio:.2f}"]
        lines += [f"| {name} | {' | '.join(cells)} |"]
    reads = [probe["read_bytes_per_s"] / 1e9 for probe in run.probes]
    rates = [probe["int8_ops_per_s"] / 1e9 for probe in run.probes]
    lines += [
        "",
        f"machine: probes read {min(reads):.1f}-{max(reads):.1f} GB/s, int8 {min(rates):.0f}-{max(rates):.0f} GOPS",
    ]
    lines += [f"left out: {name}: {reason}" for name, reason in run.left_out.items()]
    for engine in engines:
        for number, sample in enumerate(run.samples[engine], 1):
            lines += [f"{engine}, round {number}: {n} x {text}" for text, n in sample.get("errors", {}).items()]
            if sample.get("was_killed"):
                lines += [f"{engine}, round {number}: did not end by itself"]
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    middle = statistics.median(values)
    if math.isnan(middle):
        return ""
    text = f"{middle:.4g}"
    return text if len(values) == 1 else f"{text} ({min(values):.4g}-{max(values):.4g})"


def records(run: Run, mode: Mode) -> list[dict[str, Any]]:
    """One line of the results file for each engine."""
    options = run.options
    shared = {
        "date": date.today().isoformat(),
        "what": mode.what,
        "commit": commit(),
        "model": options.model.name,
        "num_threads": options.threads,
        "machine": {key: run.probes[0][key] for key in ("cpu_name", "num_cores", "memory_bytes", "isa")},
        "read_bytes_per_s": [probe["read_bytes_per_s"] for probe in run.probes],
        "int8_ops_per_s": [probe["int8_ops_per_s"] for probe in run.probes],
        "left_out": run.left_out,
        "num_texts": len(run.texts),
    }
    names = ("duration", "clients", "max_tokens", "prompt_tokens", "seed") if mode is LOAD else ()
    shared |= {name: getattr(options, name) for name in names}
    return [
        {
            **shared,
            "engine": engine,
            "facts": run.facts[engine],
            "medians": {
                name: None if math.isnan(value) else value
                for name, of in mode.columns.items()
                for value in [statistics.median(of(sample) for sample in samples)]
            },
            "rounds": samples,
        }
        for engine, samples in run.samples.items()
    ]


# --- the run ---


def measure_rounds(run: Run, mode: Mode) -> None:
    """The engines in turn, another one first each round. Who fails is named in `left_out`; Isotherm must not fail."""
    for number in range(run.options.rounds):
        for engine in list(run.facts)[:: -1 if number % 2 else 1]:
            if engine in run.left_out:
                continue
            run.probes.append(asdict(measure(run.options.threads)))
            try:
                sample = mode.round(run, engine, number)
            except ServerFailed as failure:
                if engine == ISOTHERM:
                    raise SystemExit(f"isotherm: {failure}") from failure
                run.left_out[engine] = str(failure)
                run.samples.pop(engine, None)
                continue
            run.samples.setdefault(engine, []).append(sample)
            print(f"round {number + 1} of {run.options.rounds}: {engine}", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--one", action="store_true", help="one stream instead of many clients")
    modes.add_argument("--turns", action="store_true", help="a long conversation instead of many clients")
    parser.add_argument("-d", "--duration", type=float, default=60.0, help="seconds of a round; default: %(default)s")
    parser.add_argument("-r", "--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("-c", "--clients", type=int, default=32, help="and slots; default: %(default)s")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=128, help="of an answer; default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=1000, help="prompts are cut to it; default: %(default)s")
    parser.add_argument("--stream-tokens", type=int, default=256, help="of --one; default: %(default)s")
    parser.add_argument("--turn-tokens", type=int, default=4000, help="first turn of --turns; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the order of prompts; default: %(default)s")
    parser.add_argument("--prompts", type=Path, help="lines of JSON with a `query`; default: those of inspect-evals")
    parser.add_argument(
        "--isotherm", default=f"{shlex.quote(sys.executable)} -m isotherm", help="command; '': left out"
    )
    parser.add_argument("--isotherm-flags", default="", help="more flags of its serve")
    parser.add_argument("--llama-server", type=Path, help="program; left out without")
    parser.add_argument("--llama-flags", default="", help="more flags of llama-server")
    parser.add_argument(
        "--most-growth", type=float, help="fail where Isotherm's memory grows by more MB a minute in a half of a round"
    )
    parser.add_argument("--what", help="name in the results file; default: serve-MODEL, serve-one-MODEL and so on")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.clients, options.threads) < 1 or options.duration < MIN_DURATION_S:
        parser.error(f"there must be a round, a client, a thread and {MIN_DURATION_S:.0f} seconds")
    if min(options.max_tokens, options.stream_tokens) < 2:
        parser.error("answers must have two tokens at least")
    if not options.isotherm and not options.llama_server:
        parser.error("no engine")
    if options.llama_server and not shutil.which(options.llama_server):
        parser.error(f"no program {options.llama_server}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    mode = ONE if options.one else TURNS if options.turns else LOAD
    run = Run(options, read_texts(options))
    if options.isotherm:
        run.facts[ISOTHERM] = {"version": isotherm.__version__}
    if options.llama_server:
        version = subprocess.run([options.llama_server, "--version"], capture_output=True, text=True)
        run.facts[LLAMA] = {"version": " ".join((version.stdout + version.stderr).split())}
    measure_rounds(run, mode)
    if not run.samples:
        raise SystemExit("".join(f"{name}: {reason}" for name, reason in run.left_out.items()))
    what = options.what or f"{mode.what}-{options.model.stem}"
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / f"{date.today().isoformat()}-{what}.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(run, mode))
    print(report(run, mode))
    if any(sample.get("errors") for sample in run.samples.get(ISOTHERM, [])):
        raise SystemExit("isotherm: requests failed, see above")
    growths = [sample["rss_bytes_per_minute"] / 1e6 for sample in run.samples.get(ISOTHERM, []) if mode is LOAD]
    if options.most_growth is not None and any(growth > options.most_growth for growth in growths):
        raise SystemExit(f"isotherm: memory grows by {max(growths):.1f} MB a minute")


if __name__ == "__main__":
    main()
