"""The engines that peers.py measures, each in a process of its own.

    python benchmarks/engines.py NAME

is such a process: a Task as JSON on the first line of stdin, then the name of a method on each line, and one line of
JSON on stdout for each. It needs nothing but the standard library and the engine.
"""

import importlib
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

_UBATCH_TOKENS = 512  # of llama.cpp, as llama-bench has it
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Task:
    model: str
    num_threads: int
    prompt_tokens: int
    decode_tokens: int
    depth: int

    @property
    def context_tokens(self) -> int:
        return max(self.prompt_tokens, self.depth + self.decode_tokens + 1)

    @property
    def tests(self) -> dict[str, int]:
        """Names of the tests, as llama-bench has them, with the number of tokens each computes."""
        depth = f" @ d{self.depth}" if self.depth else ""
        tests = {f"pp{self.prompt_tokens}": self.prompt_tokens, f"tg{self.decode_tokens}{depth}": self.decode_tokens}
        return {name: num_tokens for name, num_tokens in tests.items() if num_tokens}


class Engine(Protocol):
    """Made from a Task, inside its own process. Raises ImportError where it is not installed."""

    def facts(self) -> dict[str, Any]: ...

    def prefill_s(self) -> float:
        """Seconds for a prompt of random tokens in an empty context, logits of the last one included."""

    def decode_s(self) -> float:
        """Seconds for the decode steps alone, after `depth` tokens."""


class Isotherm:
    def __init__(self, task: Task) -> None:
        import isotherm

        self._task = task
        self._version = isotherm.__version__
        self._model = isotherm.load(task.model, context_tokens=task.context_tokens, threads=task.num_threads)

    def facts(self) -> dict[str, Any]:
        facts = self._model.facts
        return {
            "version": self._version,
            "isa": facts.isa,
            "quantization": facts.quantization,
            "token_bytes": facts.token_bytes,
            "token_ops": facts.token_ops,
            "load_s": facts.load_s,
        }

    def prefill_s(self) -> float:
        return self._model.prefill_s(self._task.prompt_tokens)

    def decode_s(self) -> float:
        return self._model.decode_s(self._task.decode_tokens, depth=self._task.depth).total_s

    def probe(self) -> dict[str, Any]:
        from isotherm.probe import measure

        return asdict(measure(self._task.num_threads))


class LlamaCpp:
    """What llama-bench does, through the low-level bindings: random tokens in, logits out, nothing sampled."""

    def __init__(self, task: Task) -> None:
        lib: Any = importlib.import_module("llama_cpp")
        self._lib, self._task = lib, task
        self._log = lib.llama_log_callback(lambda _level, _text, _data: None)  # kept: C holds a pointer to it
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        started = time.perf_counter()
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(task.model), model_params)
        if not self._model:
            raise RuntimeError("llama.cpp cannot open this model")
        params = lib.llama_context_default_params()
        params.n_ctx = task.context_tokens
        params.n_batch, params.n_ubatch = _BATCH_TOKENS, _UBATCH_TOKENS
        params.n_threads = params.n_threads_batch = task.num_threads
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.swa_full = False
        self._repacks = bool(model_params.use_extra_bufts)
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context for this model")
        self._load_s = time.perf_counter() - started
        self._num_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))

    def facts(self) -> dict[str, Any]:
        return {
            "version": self._lib.__version__,
            "system_info": self._lib.llama_print_system_info().decode().strip(),
            "flash_attention": True,
            "use_extra_bufts": self._repacks,  # weights repacked at load for this processor, where it has a form
            "n_ubatch": self._lib.llama_n_ubatch(self._context),
            "load_s": self._load_s,
        }

    def prefill_s(self) -> float:
        self._clear()
        return self._decode(self._task.prompt_tokens, at_once=_BATCH_TOKENS)

    def decode_s(self) -> float:
        self._clear()
        self._decode(self._task.depth, at_once=_BATCH_TOKENS)
        return self._decode(self._task.decode_tokens, at_once=1)

    def _clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def _decode(self, num_tokens: int, at_once: int) -> float:
        ids = [random.randrange(self._num_vocab) for _ in range(num_tokens)]
        started = time.perf_counter()
        for start in range(0, num_tokens, at_once):
            part = ids[start : start + at_once]
            tokens = (self._lib.llama_token * len(part))(*part)  # the batch holds a pointer to it
            batch = self._lib.llama_batch_get_one(tokens, len(part))
            status = self._lib.llama_decode(self._context, batch)
            if status:
                raise RuntimeError(f"llama_decode gives {status}")
            self._lib.llama_synchronize(self._context)
        return time.perf_counter() - started


class OpenVino:
    """By its own metrics: the first token of a prompt, and the mean time between the tokens after it."""

    def __init__(self, task: Task) -> None:
        self._genai: Any = importlib.import_module("openvino_genai")
        self._openvino: Any = importlib.import_module("openvino")
        self._task = task
        started = time.perf_counter()
        self._pipeline = self._genai.LLMPipeline(task.model, "CPU", INFERENCE_NUM_THREADS=task.num_threads)
        self._load_s = time.perf_counter() - started
        self._num_vocab = len(self._pipeline.get_tokenizer().get_vocab())

    def facts(self) -> dict[str, Any]:
        return {"version": self._genai.__version__, "properties": "defaults", "load_s": self._load_s}

    def prefill_s(self) -> float:
        return float(self._metrics(self._task.prompt_tokens, 1).get_ttft().mean) / 1000

    def decode_s(self) -> float:
        num_tokens = self._task.decode_tokens
        return float(self._metrics(max(1, self._task.depth), num_tokens + 1).get_tpot().mean) / 1000 * num_tokens

    def _metrics(self, num_prompt: int, num_new: int) -> Any:
        import numpy as np

        ids = np.array([[random.randrange(self._num_vocab) for _ in range(num_prompt)]], np.int64)
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_new, True, False
        metrics = self._pipeline.generate(self._openvino.Tensor(ids), config).perf_metrics
        if metrics.get_num_generated_tokens() != num_new:
            raise RuntimeError(f"asked for {num_new} tokens, got {metrics.get_num_generated_tokens()}")
        return metrics


ENGINES: dict[str, Callable[[Task], Engine]] = {"isotherm": Isotherm, "llama.cpp": LlamaCpp, "openvino": OpenVino}


def serve(name: str) -> None:
    """Answers until stdin ends; see above."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; the pipe is ours
    started, idle_since = False, (time.process_time(), time.perf_counter())
    engine: Any = None
    for line in sys.stdin:
        idle_cpu_s, idle_s = time.process_time() - idle_since[0], time.perf_counter() - idle_since[1]
        answer: dict[str, Any]
        try:
            if not started:
                engine, started = ENGINES[name](Task(**json.loads(line))), True
                answer = {"value": engine.facts()}
            else:
                answer = {"value": getattr(engine, json.loads(line))(), "idle_cpu_s": idle_cpu_s, "idle_s": idle_s}
        except ImportError as error:
            answer = {"error": f"not installed ({error})"}
        except Exception as error:  # a peer's failure is a result: it is named and left out
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=answers, flush=True)
        idle_since = (time.process_time(), time.perf_counter())


if __name__ == "__main__":
    serve(sys.argv[1])
