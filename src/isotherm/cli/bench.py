"""`isotherm bench`: tokens per second in llama-bench's columns, and the share of the machine's limits they reach."""

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

import isotherm
from isotherm.evaluation.bench import BenchOptions, BenchResult, Speed
from isotherm.evaluation.bench import bench as run_bench


def bench(
    model: Annotated[str, typer.Argument(help="Name or path of the model.")],
    prompt: Annotated[int, typer.Option("--prompt", "-p", help="Tokens of the prefill test; 0 leaves it out.")] = 512,
    decode: Annotated[int, typer.Option("--decode", "-n", help="Tokens of the decode test; 0 leaves it out.")] = 64,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", help="Repetitions of each test.")] = 3,
    depth: Annotated[int, typer.Option("--depth", "-d", help="Tokens in the context before the decode test.")] = 0,
    threads: Annotated[int | None, typer.Option("--threads", "-t", help="Default: the physical cores.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokens per second of prefill and decode, beside what this machine's memory and arithmetic allow."""
    options = BenchOptions(prompt, decode, repetitions, depth)
    with isotherm.load(model, context_tokens=options.context_tokens, threads=threads) as generator:
        result = run_bench(generator, options, on_step=_tell)
    print(json.dumps(to_json(result)) if as_json else to_text(result))


def to_json(result: BenchResult) -> dict[str, Any]:
    """What `--json` prints; keys are only ever added."""
    facts = result.model
    return {
        "isotherm": isotherm.__version__,
        "model": facts.config.name,
        "family": facts.config.family,
        "quantization": facts.quantization,
        "file_bytes": facts.file_bytes,
        "num_parameters": facts.num_parameters,
        "backend": facts.backend,
        "isa": facts.isa,
        "num_threads": facts.num_threads,
        "load_s": facts.load_s,
        "peak_rss_bytes": result.peak_rss_bytes,
        "token_bytes": facts.token_bytes,
        "token_ops": facts.token_ops,
        "device": asdict(result.device),
        "tests": [
            {
                "test": speed.test,
                "tokens_per_second": speed.tokens_per_second,
                "stddev": speed.stddev,
                "samples": speed.samples,
                "limit": speed.limit,
                "limit_share": speed.limit_share,
                "python_share": speed.python_share,
            }
            for speed in result.tests
        ],
    }


def to_text(result: BenchResult) -> str:
    """A Markdown table in llama-bench's columns, then the limits."""
    facts, device = result.model, result.device
    header = ("model", "size", "params", "backend", "threads", "test", "t/s")
    model = (
        f"{facts.config.family} {facts.quantization}",
        f"{facts.file_bytes / 2**20:.2f} MiB" if facts.file_bytes < 2**30 else f"{facts.file_bytes / 2**30:.2f} GiB",
        f"{facts.num_parameters / 1e6:.2f} M" if facts.num_parameters < 1e9 else f"{facts.num_parameters / 1e9:.2f} B",
        f"{facts.backend} {facts.isa}",
        str(facts.num_threads),
    )
    rows = [(*model, speed.test, f"{speed.tokens_per_second:.2f} ± {speed.stddev:.2f}") for speed in result.tests]
    peak = "unknown" if result.peak_rss_bytes is None else f"{result.peak_rss_bytes / 1e6:.0f} MB"
    return "\n".join(
        [
            *_table(header, rows),
            "",
            f"load {facts.load_s:.2f} s, peak memory {peak}",
            f"machine: reads {device.read_bytes_per_s / 1e9:.1f} GB/s, int8 {device.int8_ops_per_s / 1e9:.0f} GOPS "
            "(best of the probes of this run)",
            *(_limit_line(speed, result) for speed in result.tests),
        ]
    )


def _limit_line(speed: Speed, result: BenchResult) -> str:
    facts = result.model
    if speed.python_share is None:
        return f"{speed.test}: {speed.limit_share:.0%} of the {speed.limit} ({facts.token_ops / 1e9:.3g} GOP a token)"
    return (
        f"{speed.test}: {speed.limit_share:.0%} of the {speed.limit} ({facts.token_bytes / 1e6:.1f} MB a token), "
        f"{speed.python_share:.1%} of a step in Python"
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; the last column is aligned right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)) + " | "
        f"{row[-1].rjust(widths[-1])} |"
        for row in [header, *rows]
    ]
    rule = "| " + " | ".join("-" * width for width in widths[:-1]) + " | " + "-" * (widths[-1] - 1) + ": |"
    return [lines[0], rule, *lines[1:]]


def _tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)
