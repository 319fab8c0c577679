"""`isotherm bench`: tokens per second in llama-bench's columns, and the share of the machine's limits they reach."""

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotherm.cli.console import markdown_table, notice, print_json
from isotherm.cli.flags import JsonOption, ModelArgument, gathers, takes
from isotherm.cli.kernel_times import profile_json, profile_text
from isotherm.cli.loading import loaded
from isotherm.cli.settings import Settings
from isotherm.cli.version import commit, package_version

if TYPE_CHECKING:
    from isotherm.evaluation.bench import BenchOptions, BenchResult, Speed


def bench_options(
    prompt_tokens: Annotated[
        int, typer.Option("--n-prompt", "-p", metavar="N", help="Tokens of the prefill test; 0 leaves it out.")
    ] = 512,
    decode_tokens: Annotated[
        int, typer.Option("--n-gen", "-n", metavar="N", help="Tokens of the decode test; 0 leaves it out.")
    ] = 64,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", metavar="N", help="Of each test.")] = 3,
    depth: Annotated[
        int, typer.Option("--depth", "-d", metavar="N", help="Tokens in the context before the decode test.")
    ] = 0,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show where the time goes, by kernel.", show_default=False)
    ] = False,
) -> "BenchOptions":
    """What these flags ask for. Raises OptionError."""
    from isotherm.evaluation.bench import BenchOptions

    return BenchOptions(prompt_tokens, decode_tokens, repetitions, depth, profile)


@takes("kv", "threads", "backend", "device", "vram", "sparse", "quality", "predictor", "cache_gib", "offline")
@gathers(bench_options)
def bench(
    settings: Settings,
    options: "BenchOptions",
    model: ModelArgument,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write a timeline for ui.perfetto.dev too; implies --profile.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measures tokens per second, beside what this machine's memory and arithmetic allow."""
    from isotherm.evaluation.bench import bench as measure
    from isotherm.evaluation.trace import TraceFile

    options = replace(options, profile=options.profile or trace is not None)
    with ExitStack() as stack:
        trace_file = stack.enter_context(TraceFile(trace)) if trace else None
        generator = stack.enter_context(loaded(model, replace(settings, ctx=options.context_tokens)))
        result = measure(generator, options, on_step=notice)
        if trace_file:
            written = trace_file.write(f"isotherm {result.model.config.name}", result.recorded)
            cut = "" if written.is_whole else ", which is as many as one holds: the last ones are left out"
            notice(f"{trace}: {written.num_events} events{cut}; open it in ui.perfetto.dev")
    if as_json:
        print_json(to_json(result))
    else:
        print(to_text(result))


def to_json(result: "BenchResult") -> dict[str, Any]:
    """What `--json` prints; keys are only ever added."""
    facts = result.model
    return {
        "version": package_version(),
        "commit": commit(),
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
        "placement": asdict(facts.placement) if facts.placement else None,
        "gpu": asdict(result.gpu) if result.gpu else None,
        "weights_bytes_per_s": result.weights_bytes_per_s,
        "tests": [
            {
                "test": speed.test,
                "tokens_per_second": speed.tokens_per_second,
                "stddev": speed.stddev,
                "samples": speed.samples,
                "limit": speed.limit,
                "limit_share": speed.limit_share,
                "python_share": speed.python_share,
                "weights_share": speed.weights_share,
            }
            for speed in result.tests
        ],
        "profile": [profile_json(profile) for profile in result.profiles],
    }


def to_text(result: "BenchResult") -> str:
    """A Markdown table in llama-bench's columns, then the limits."""
    facts, device = result.model, result.device
    header = ("model", "size", "params", "backend", "threads", "test", "t/s")
    model = (
        f"{facts.config.family} {facts.quantization}",
        f"{facts.file_bytes / 2**20:.2f} MiB" if facts.file_bytes < 2**30 else f"{facts.file_bytes / 2**30:.2f} GiB",
        f"{facts.num_parameters / 1e6:.2f} M" if facts.num_parameters < 1e9 else f"{facts.num_parameters / 1e9:.2f} B",
        f"{facts.backend} {facts.isa}" + (f" + {facts.placement.device}" if facts.placement else ""),
        str(facts.num_threads),
    )
    rows = [(*model, speed.test, f"{speed.tokens_per_second:.2f} ± {speed.stddev:.2f}") for speed in result.tests]
    peak = "unknown" if result.peak_rss_bytes is None else f"{result.peak_rss_bytes / 1e6:.0f} MB"
    return "\n".join(
        [
            *markdown_table(header, rows, num_left=len(header) - 1),
            "",
            f"load {facts.load_s:.2f} s, peak memory {peak}",
            f"machine: reads {device.read_bytes_per_s / 1e9:.1f} GB/s, int8 {device.int8_ops_per_s / 1e9:.0f} GOPS "
            "(best of the probes of this run)",
            *_placement_lines(result),
            *_weights_line(result),
            *(_limit_line(speed, result) for speed in result.tests),
            *(f"\n{profile_text(profile)}" for profile in result.profiles),
        ]
    )


def _placement_lines(result: "BenchResult") -> list[str]:
    facts, placed, best = result.model, result.model.placement, result.gpu
    if placed is None:
        return []
    own_bytes = facts.token_bytes - placed.token_bytes
    line = (
        f"{placed.text(facts.config.num_layers)}, {placed.num_bytes / 1e6:.0f} MB; of what a token reads "
        f"{placed.token_bytes / 1e6:.1f} MB lie there and {own_bytes / 1e6:.1f} MB with the CPU"
    )
    if best is None:
        return [line]
    launch = f"launches in {1e6 * best.launch_s:.1f} us"
    rates = f"copies {best.copy_bytes_per_s / 1e9:.1f} GB/s, int8 {best.int8_ops_per_s / 1e9:.0f} GOPS, {launch}"
    launches = f"{placed.num_launches} launches a token take {1e3 * placed.num_launches * best.launch_s:.2f} ms"
    return [line, f"{placed.device}: {rates} (best of the probes of this run); {launches}"]


def _weights_line(result: "BenchResult") -> list[str]:
    rate = result.weights_bytes_per_s
    return [] if rate is None else [f"weights: read at {rate / 1e9:.1f} GB/s where they lie, with nothing computed"]


def _limit_line(speed: "Speed", result: "BenchResult") -> str:
    facts = result.model
    if speed.python_share is None:
        return f"{speed.test}: {speed.limit_share:.0%} of the {speed.limit} ({facts.token_ops / 1e9:.3g} GOP a token)"
    weights = "" if speed.weights_share is None else f"{speed.weights_share:.0%} is reading the weights, "
    return (
        f"{speed.test}: {speed.limit_share:.0%} of the {speed.limit} ({facts.token_bytes / 1e6:.1f} MB a token); "
        f"of a step {weights}{speed.python_share:.1%} is Python"
    )
