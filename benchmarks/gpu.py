"""What a GPU makes of a model, beside what it can do at best: in turn with the CPU alone, in one run, medians.

    python benchmarks/synthetic.py --shape 7b --type Q4_0 7b.gguf
    python benchmarks/gpu.py 7b.gguf --device gpu -r 5 --tests --llama-bench llama.cpp/build/bin/llama-bench

Decode is held against the bandwidth of a copy in the device's memory, prefill against its rate of int8 dot products,
launches against an empty kernel's; all probed in the same run. --tests first runs the tests of GPU kernels on this
driver. --llama-bench times llama.cpp's tool on the same file, all layers on the GPU, in turn with the others.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from peers import RESULTS, commit

import isotherm
from isotherm._native import list_gpus
from isotherm.backends.gpu.choice import choose_device
from isotherm.backends.gpu.survey import measure as measure_gpu
from isotherm.backends.gpu.survey import survey
from isotherm.facts import GpuLimits
from isotherm.probe import measure
from isotherm.text import TextGenerator

_CHECKED_TOKENS = 24
_DEPTH = 16
_GPU_TESTS = ("test_gpu_ops.py", "test_gpu_models.py", "test_gpu_placement.py")
_LOADERS = ("libOpenCL.so.1", "libOpenCL.so")


def run_tests(is_cuda: bool) -> dict[str, Any]:
    """The tests of GPU kernels on the driver that is used here, those of all types and shapes too."""
    folder = Path(__file__).parents[1] / "tests" / "backends"
    driver = "cuda" if is_cuda else os.environ.get("ISOTHERM_OPENCL") or _LOADERS[0]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", *(str(folder / name) for name in _GPU_TESTS)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ISOTHERM_TEST_GPU": driver})
    print(run.stdout[-2000:])
    return {"passed": run.returncode == 0, "summary": run.stdout.strip().splitlines()[-1]}


def llama_rates(tool: Path, model: Path, prompt_tokens: int, decode_tokens: int) -> dict[str, float]:
    """Tokens a second of one repetition of llama-bench, with all layers on the GPU."""
    command = [tool, "-m", model, "-p", str(prompt_tokens), "-n", str(decode_tokens), "-ngl", "99", "-r", "1"]
    run = subprocess.run([*map(str, command), "-fa", "1", "-o", "json"], capture_output=True, text=True, check=True)
    return {"prefill" if row["n_prompt"] else "decode": row["avg_ts"] for row in json.loads(run.stdout)}


def rates(model: TextGenerator, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second."""
    return {
        "prefill": options.prompt_tokens / model.prefill_s(options.prompt_tokens),
        "decode": options.decode_tokens / model.decode_s(options.decode_tokens, depth=_DEPTH).total_s,
    }


def shares(model: TextGenerator, medians: dict[str, float], limits: GpuLimits) -> dict[str, float]:
    """Of the limits of the device, where all of the model is there."""
    placed = model.facts.placement
    assert placed is not None
    return {
        "decode_bytes_per_s": placed.token_bytes * medians["decode"],
        "of_copy_bandwidth": placed.token_bytes * medians["decode"] / limits.copy_bytes_per_s,
        "of_int8_rate": placed.token_ops * medians["prefill"] / limits.int8_ops_per_s,
        "launches_per_token": placed.num_launches,
        "launches_of_a_step": placed.num_launches * limits.launch_s * medians["decode"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="gpu", help="as of `isotherm run`; default: %(default)s")
    parser.add_argument("-p", "--prompt-tokens", type=int, default=512, help="default: %(default)s")
    parser.add_argument("-n", "--decode-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("-r", "--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--cpu", action="store_true", help="time the CPU alone too")
    parser.add_argument("--tests", action="store_true", help="run the tests of GPU kernels on this driver first")
    parser.add_argument("--llama-bench", type=Path, help="llama.cpp's tool, built for this GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    chosen = choose_device(options.device)
    assert chosen is not None, "no GPU"
    tests = run_tests(bool(list_gpus()[chosen].architecture)) if options.tests else None
    context = max(options.prompt_tokens, _DEPTH + options.decode_tokens + 1, 256)
    load: dict[str, Any] = {"context_tokens": context, "parallel": 1}
    samples: dict[str, list[dict[str, float]]] = {}
    probes: list[dict[str, Any]] = []
    with ExitStack() as stack:
        gpu = stack.enter_context(isotherm.load(options.model, device=options.device, **load))
        models = {options.device: gpu}
        if options.cpu:
            models["cpu"] = stack.enter_context(isotherm.load(options.model, device="cpu", **load))
            ids = {m.generate("a b c d", raw=True, max_tokens=_CHECKED_TOKENS).token_ids for m in models.values()}
            assert len(ids) == 1, "the two do not agree"
        assert gpu.facts.placement is not None, "nothing of the model is on a GPU"
        number = int(gpu.facts.placement.device.partition(":")[2])
        for model in models.values():
            rates(model, options)  # warm-up
        for turn in range(options.rounds):
            probes.append(asdict(measure(gpu.facts.num_threads)) | {"gpu": asdict(measure_gpu(number))})
            for name in list(models)[:: -1 if turn % 2 else 1]:
                samples.setdefault(name, []).append(rates(models[name], options))
            if options.llama_bench:
                found = llama_rates(options.llama_bench, options.model, options.prompt_tokens, options.decode_tokens)
                samples.setdefault("llama.cpp", []).append(found)
        medians = {
            name: {test: statistics.median(sample[test] for sample in taken) for test in ("prefill", "decode")}
            for name, taken in samples.items()
        }
        best = survey()[number]
        assert best.limits is not None, best.complaint
        record = {
            "date": date.today().isoformat(),
            "what": "gpu",
            "commit": commit(),
            "model": options.model.name,
            "placement": asdict(gpu.facts.placement),
            "prompt_tokens": options.prompt_tokens,
            "decode_tokens": options.decode_tokens,
            "tokens_per_s": samples,
            "medians": medians,
            "shares": shares(gpu, medians[options.device], best.limits),
            "device": asdict(best),
            "tests": tests,
            "probes": probes,
        }
    print(f"{best.name}, {best.driver}: {gpu.facts.placement.text(gpu.facts.config.num_layers)}")
    print(f"tokens/s: {medians}\n{record['shares']}")
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / f"{date.today().isoformat()}-gpu.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
