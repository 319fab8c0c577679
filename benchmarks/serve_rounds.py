"""What serve.py does to one engine in one round: many clients, one stream, a long conversation."""

import argparse
import asyncio
import json
import random
import shlex
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from load import Answer, Window, ask, closed_loop, summary
from servers import Server, ServerFailed, Watch, started

ISOTHERM, LLAMA = "isotherm", "llama.cpp"
PROMPTS = "inspect_evals/writingbench/benchmark_all.jsonl"  # in the package inspect-evals
NUM_STREAMS = 3  # of one round of --one
TURN_TOKENS = 64  # answers of --turns

_SPARE_TOKENS = 152  # of a slot: the chat template, the number of a prompt that comes again
_ASCII_SHARE = 0.9  # of the characters of an English prompt
_STORY = "Write a very long story about a lighthouse, with many chapters. Do not stop early."
_QUESTIONS = (
    "Summarise the text above.",
    "Now say the same in other words, please.",
    "Which of these points matters most, and why?",
)

Sample = dict[str, Any]  # what one engine did in one round


@dataclass
class Run:
    """What is measured, on whom, and what came of it."""

    options: argparse.Namespace
    texts: list[str]  # whole prompts, in the order in which they are asked
    cut_texts: dict[int, list[str]] = field(default_factory=dict)  # by number of tokens: both engines get the same
    probes: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # by engine
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def command(self, engine: str, num_slots: int, slot_tokens: int) -> list[str]:
        """Starts the engine's server; among its facts it is kept without folders."""
        options, threads = self.options, str(self.options.threads)
        if engine == ISOTHERM:
            command = [*shlex.split(options.isotherm), "serve", str(options.model), "--threads", threads]
            command += ["--parallel", str(num_slots)] if num_slots > 1 else []
            command += shlex.split(options.isotherm_flags)
        else:
            command = [str(options.llama_server), "-m", str(options.model), "-t", threads, "-tb", threads]
            command += ["-np", str(num_slots), "-c", str(num_slots * slot_tokens), *shlex.split(options.llama_flags)]
        self.facts[engine]["command"] = [Path(word).name if "/" in word else word for word in command]
        return command

    def cut(self, server: Server, num_tokens: int) -> list[str]:
        """The texts, none longer than so many tokens. The first server asked decides, for all."""
        if num_tokens not in self.cut_texts:
            self.cut_texts[num_tokens] = [_cut(server, text, num_tokens) for text in self.texts]
        return self.cut_texts[num_tokens]


def _cut(server: Server, text: str, num_tokens: int) -> str:
    if len(text.encode()) <= num_tokens:  # a token is at least a byte
        return text
    ids = server.post("/tokenize", {"content": text})["tokens"]
    if len(ids) <= num_tokens:
        return text
    cut: str = server.post("/detokenize", {"tokens": ids[:num_tokens]})["content"]
    return cut.removesuffix("\ufffd")  # of a character that was cut in two


def _body(server: Server, turns: Sequence[str], max_tokens: int) -> bytes:
    """A request: the turns are of user, assistant, user and so on."""
    roles = ("user", "assistant")
    request = {
        "model": server.get("/v1/models")["data"][0]["id"],
        "messages": [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(request).encode()


def _ask(server: Server, turns: Sequence[str], max_tokens: int) -> Answer:
    answer = asyncio.run(ask(server.port, _body(server, turns, max_tokens)))
    if answer.error is not None:
        raise ServerFailed(answer.error)
    if len(answer.chunks_s) < 2:
        raise ServerFailed(f"an answer of {answer.output_tokens} tokens, which is too short to measure")
    return answer


def read_texts(options: argparse.Namespace) -> list[str]:
    """The English prompts of WritingBench, shuffled by the seed; for --turns so many joined that each is too long."""
    try:
        path = options.prompts or distribution("inspect-evals").locate_file(PROMPTS)
        lines = Path(str(path)).read_text(encoding="utf-8").splitlines()
    except (PackageNotFoundError, OSError) as error:
        raise SystemExit(f"no prompts ({error}): pip install --no-deps inspect-evals") from error
    texts = [json.loads(line)["query"] for line in lines]
    texts = [text for text in texts if sum(map(str.isascii, text)) > _ASCII_SHARE * len(text)]
    random.Random(options.seed).shuffle(texts)
    if options.turns:  # a token of English is seldom longer than eight characters
        joined, texts = texts, []
        while joined and len(texts) < options.rounds:
            text = ""
            while joined and len(text) < 8 * options.turn_tokens:
                text += joined.pop() + "\n\n"
            texts.append(text)
    return texts


# --- many clients ---


def load_round(run: Run, engine: str, number: int) -> Sample:
    """Clients that each ask again when they are answered; every round asks the same, in the same order."""
    options = run.options
    slot_tokens = options.prompt_tokens + options.max_tokens + _SPARE_TOKENS
    with started(run.command(engine, options.clients, slot_tokens)) as server:
        bodies = _bodies(server, run.cut(server, options.prompt_tokens), options.max_tokens)
        watch = Watch(server.process.pid, max(1.0, options.duration / 120))
        window = asyncio.run(_watched(watch, server.port, bodies, options))
        sample = {**summary(window), **watch.summary(window.started_s, window.ended_s)}
        if not sample["output_tokens_per_s"]:
            raise ServerFailed(f"no request was answered: {sample['errors']}")
    return {**sample, "start_s": server.start_s, "stop_s": server.stop_s, "was_killed": server.was_killed}


async def _watched(watch: Watch, port: int, bodies: Iterator[bytes], options: argparse.Namespace) -> Window:
    watching = asyncio.create_task(watch.run())
    try:
        return await closed_loop(port, bodies, options.clients, options.duration)
    finally:
        watching.cancel()


def _bodies(server: Server, texts: Sequence[str], max_tokens: int) -> Iterator[bytes]:
    """Without end. A text that comes again starts with its number: nothing is measured of a prompt already computed."""
    marker = "@TEXT@"
    head, tail = _body(server, [marker], max_tokens).split(json.dumps(marker).encode())
    number = 0
    while True:
        again, which = divmod(number, len(texts))
        text = f"Version {again + 1}.\n{texts[which]}" if again else texts[which]
        yield head + json.dumps(text).encode() + tail
        number += 1


# --- one stream ---


def one_round(run: Run, engine: str, number: int) -> Sample:
    """Decode speed that a lone client sees, and of Isotherm what `bench` measures with no server between."""
    options = run.options
    with started(run.command(engine, 1, 2 * options.stream_tokens + _SPARE_TOKENS)) as server:
        _ask(server, [_STORY], 8)  # warm
        answers = [_ask(server, [_STORY], options.stream_tokens) for _ in range(NUM_STREAMS)]
    sample: Sample = {
        "tokens_per_s": statistics.median(answer.decode_tokens_per_s for answer in answers),
        "samples": [answer.decode_tokens_per_s for answer in answers],
        "prompt_tokens": answers[0].prompt_tokens,
        "output_tokens": answers[0].output_tokens,
    }
    if engine == ISOTHERM:
        sample["bench_tokens_per_s"] = _bench(run, answers[0])
        sample["share_of_bench"] = sample["tokens_per_s"] / sample["bench_tokens_per_s"]
    return sample


def _bench(run: Run, like: Answer) -> float:
    """Decode tokens per second by `isotherm bench` of as many tokens, after as many in the context."""
    options = run.options
    command = [*shlex.split(options.isotherm), "bench", str(options.model), "--threads", str(options.threads), "--json"]
    command += ["-p", "0", "-n", str(like.output_tokens), "-d", str(like.prompt_tokens), "-r", str(NUM_STREAMS)]
    bench = subprocess.run(command, capture_output=True, text=True)
    if bench.returncode:
        raise ServerFailed(f"bench: {bench.stderr.strip()[-300:]}")
    samples: list[float] = json.loads(bench.stdout)["tests"][0]["samples"]
    return statistics.median(samples)


# --- a long conversation ---


def turns_round(run: Run, engine: str, number: int) -> Sample:
    """Time to first token of a long first turn, of the second, and of another second one after a restart."""
    options = run.options
    with tempfile.TemporaryDirectory() as folder:
        command = run.command(engine, 1, options.turn_tokens + 4 * TURN_TOKENS + 2 * _SPARE_TOKENS)
        command += ["--kv-dir", folder] if engine == ISOTHERM else []
        with started(command) as server:
            opening = f"{run.cut(server, options.turn_tokens)[number]}\n\n{_QUESTIONS[0]}"
            _ask(server, [_STORY], 8)  # warm
            first = _ask(server, [opening], TURN_TOKENS)
            second = _ask(server, [opening, first.text, _QUESTIONS[1]], TURN_TOKENS)
        sample = _turn("first", first) | _turn("second", second)
        sample["second_share"] = second.ttft_s / first.ttft_s
        if engine == ISOTHERM:
            with started(command) as server:
                _ask(server, [_STORY], 8)
                restarted = _ask(server, [opening, first.text, _QUESTIONS[2]], TURN_TOKENS)
            sample |= _turn("restarted", restarted)
            sample["restarted_share"] = restarted.ttft_s / first.ttft_s
            sample["kv_was_killed"] = server.was_killed
    return sample


def _turn(name: str, answer: Answer) -> Sample:
    return {
        f"{name}_ttft_s": answer.ttft_s,
        f"{name}_prompt_tokens": answer.prompt_tokens,
        f"{name}_cached_tokens": answer.cached_tokens,
    }
