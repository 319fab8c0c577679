"""Isotherm against llama.cpp and OpenVINO GenAI on one model: alternating, in one run, medians.

    python benchmarks/peers.py MODEL.gguf --llama-python PEERS/bin/python --openvino-python PEERS/bin/python

Each engine lives in a process of its own, loads the model once and then waits for its turn; two never compute at the
same time. See README.md beside this file for how peers are built and what the numbers leave out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import IO, Any

import engines
from engines import ENGINES, Task

from isotherm.probe import physical_cores

RESULTS = Path(__file__).parent / "results"
IDLE_CPU_SHARE = 0.05  # of the time an engine waits: beyond it the engine spins and slows the others

_SETTLE_S = 0.2  # before a turn: the threads of the engine before may spin for some milliseconds


class PeerFailed(Exception):
    """Says why an engine is left out."""


@dataclass
class Worker:
    """An engine in its process, and what it has measured."""

    name: str
    python: str
    samples: dict[str, list[float]] = field(default_factory=dict)  # tokens per second by test
    facts: dict[str, Any] = field(default_factory=dict)
    idle_cpu_s: float = 0.0
    idle_s: float = 0.0

    def start(self, task: Task) -> None:
        command = [self.python, str(Path(engines.__file__).resolve()), self.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._ask(asdict(task))

    def measure(self, test: str, num_tokens: int) -> float:
        """Tokens per second."""
        time.sleep(_SETTLE_S)
        return num_tokens / float(self._ask("prefill_s" if test.startswith("pp") else "decode_s"))

    def probe(self) -> dict[str, Any]:
        time.sleep(_SETTLE_S)
        return dict(self._ask("probe"))

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: object) -> Any:
        to_worker, from_worker = _pipes(self._process)
        try:
            print(json.dumps(message), file=to_worker, flush=True)
        except BrokenPipeError as error:
            raise PeerFailed("its process ended") from error
        line = from_worker.readline()
        if not line:
            raise PeerFailed(f"its process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerFailed(answer["error"])
        self.idle_cpu_s += answer.get("idle_cpu_s", 0.0)
        self.idle_s += answer.get("idle_s", 0.0)
        return answer["value"]


def _pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


@dataclass
class Run:
    """Engines that take turns, and what happened."""

    task: Task
    workers: list[Worker]
    probes: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def measure(self, repetitions: int) -> None:
        """A warm-up, then the repetitions; who fails is named in `left_out`. Isotherm is first and must not fail."""
        try:
            for worker in list(self.workers):
                self._guard(worker, lambda worker: worker.start(self.task))
            for number in range(repetitions + 1):
                self.probes.append(self.workers[0].probe())
                turn = number % len(self.workers)
                for worker in self.workers[turn:] + self.workers[:turn]:  # nobody always comes after the same one
                    self._guard(worker, self._take_turn)
                if number == 0:
                    for worker in self.workers:
                        worker.samples.clear()
                print(f"repetition {number} of {repetitions}" if number else "warm-up", file=sys.stderr, flush=True)
        finally:
            for worker in self.workers:
                worker.stop()

    def _take_turn(self, worker: Worker) -> None:
        for test, num_tokens in self.task.tests.items():
            worker.samples.setdefault(test, []).append(worker.measure(test, num_tokens))

    def _guard(self, worker: Worker, act: Callable[[Worker], None]) -> None:
        try:
            act(worker)
        except PeerFailed as failure:
            worker.stop()
            self.workers = [other for other in self.workers if other is not worker]
            if worker.name == "isotherm":
                raise SystemExit(f"isotherm: {failure}") from failure
            self.left_out[worker.name] = str(failure)


def report(run: Run) -> str:
    """Markdown: medians with their range, the ratio of Isotherm's median to each peer's, the machine's limits."""
    ours = run.workers[0]
    lines = ["| engine | version | test | t/s (median) | range | Isotherm / engine |", "|---|---|---|--:|--:|--:|"]
    for test in run.task.tests:
        for worker in run.workers:
            samples = worker.samples[test]
            ratio = statistics.median(ours.samples[test]) / statistics.median(samples)
            lines.append(
                f"| {worker.name} | {worker.facts['version']} | {test} | {statistics.median(samples):.2f} | "
                f"{min(samples):.2f}-{max(samples):.2f} | {ratio:.2f} |"
            )
    reads = [probe["read_bytes_per_s"] / 1e9 for probe in run.probes]
    rates = [probe["int8_ops_per_s"] / 1e9 for probe in run.probes]
    lines += [
        "",
        f"machine: reads {max(reads):.1f} GB/s (probes {min(reads):.1f}-{max(reads):.1f}), "
        f"int8 {max(rates):.0f} GOPS ({min(rates):.0f}-{max(rates):.0f})",
    ]
    lines += [f"left out: {name}: {reason}" for name, reason in run.left_out.items()]
    lines += [
        f"warning: {worker.name} used {worker.idle_cpu_s:.1f} s of CPU in {worker.idle_s:.1f} s of waiting"
        for worker in run.workers
        if worker.idle_cpu_s > IDLE_CPU_SHARE * worker.idle_s
    ]
    return "\n".join(lines)


def records(run: Run, what: str) -> list[dict[str, Any]]:
    """One line of the results file for each engine and test."""
    shared = {
        "date": date.today().isoformat(),
        "what": what,
        "commit": commit(),
        "model": Path(run.task.model).name,
        "num_threads": run.task.num_threads,
        "machine": {key: run.probes[0][key] for key in ("cpu_name", "num_cores", "memory_bytes", "isa")},
        "read_bytes_per_s": [probe["read_bytes_per_s"] for probe in run.probes],
        "int8_ops_per_s": [probe["int8_ops_per_s"] for probe in run.probes],
        "left_out": run.left_out,
    }
    return [
        {
            **shared,
            "engine": worker.name,
            "facts": worker.facts,
            "idle_cpu_s": worker.idle_cpu_s,
            "idle_s": worker.idle_s,
            "test": test,
            "tokens_per_second": statistics.median(worker.samples[test]),
            "samples": worker.samples[test],
        }
        for worker in run.workers
        for test in run.task.tests
    ]


def commit() -> str:
    """The commit of this tree; `-dirty` where tracked files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    return (head.stdout.strip() or "unknown") + ("-dirty" if changes.stdout.strip() else "")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("-p", "--n-prompt", type=int, default=512)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("-r", "--repetitions", type=int, default=5)
    parser.add_argument("-d", "--depth", type=int, default=0, help="tokens in the context before decoding")
    parser.add_argument("-t", "--threads", type=int, default=physical_cores(), help="default: %(default)s")
    parser.add_argument("--engines", default=",".join(ENGINES), help="default: %(default)s; isotherm always runs")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--openvino-python", default=sys.executable, help="interpreter that has openvino-genai")
    parser.add_argument("--what", help="name in the results file; default: peers-MODEL")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results file")
    options = parser.parse_args(arguments)
    if unknown := set(options.engines.split(",")) - set(ENGINES):
        parser.error(f"no such engine: {', '.join(sorted(unknown))}; known: {', '.join(ENGINES)}")
    if options.repetitions < 1 or (options.n_prompt < 1 and options.n_gen < 1):
        parser.error("there must be a test (-p, -n) and at least one repetition (-r)")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    pythons: Mapping[str, str] = {"llama.cpp": options.llama_python, "openvino": options.openvino_python}
    wanted = ["isotherm", *(name for name in ENGINES if name in options.engines.split(",") and name != "isotherm")]
    task = Task(str(options.model), options.threads, options.n_prompt, options.n_gen, options.depth)
    run = Run(task, [Worker(name, pythons.get(name, sys.executable)) for name in wanted])
    run.measure(options.repetitions)
    what = options.what or f"peers-{options.model.stem}"
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / f"{date.today().isoformat()}-{what}.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records(run, what))
    print(report(run))


if __name__ == "__main__":
    main()
