"""Fields that OpenAI's endpoints share. What cannot be honoured is refused."""

import math
from typing import Annotated, Any

from pydantic import Field

from isotherm.answer import Answer
from isotherm.engine.sampling import SampledToken
from isotherm.server.errors import bad_request
from isotherm.server.fields import Never, Strict
from isotherm.text import TextGenerator
from isotherm.types import SamplingParams

_MAX_STOPS = 64
_MAX_STOP_CHARS = 1024
_MAX_BIASES = 4096
_MAX_ANSWERS = 16
MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128
# shapes, for the page
HEAD = {"id": str, "object": str, "created": int, "model": str}
LOGPROB = {"token": str, "logprob": float, "bytes": [int]}
USAGE = {
    "prompt_tokens": int,
    "completion_tokens": int,
    "total_tokens": int,
    "prompt_tokens_details": {"cached_tokens": int},
}
TIMINGS = {
    "cache_n": int,
    "prompt_n": int,
    "prompt_ms": float,
    "prompt_per_second": float,
    "predicted_n": int,
    "predicted_ms": float,
    "predicted_per_second": float,
}
MIN_LOGPROB = -9999.0  # OpenAI's, of what cannot be; JSON has no infinity

Stop = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_CHARS)]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: Never | None = None


class SamplingFields(Strict):
    """What all endpoints take, with the extensions of local engines at the end."""

    model: Annotated[str, Field(min_length=1, max_length=512)]
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-100.0, le=100.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-100.0, le=100.0)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MAX_STOPS)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=_MAX_BIASES)] | None = None
    n: Annotated[int, Field(ge=1, le=_MAX_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # a label, for which we have no use
    # extensions
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    exact: bool = False
    return_progress: bool = False

    def streams(self) -> bool:
        """Raises ApiError for what only a stream can tell."""
        if not self.stream and (self.stream_options or self.return_progress):
            field = "stream_options" if self.stream_options else "return_progress"
            raise bad_request(f"{field} needs stream: true", field)
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def sampling(self, defaults: SamplingParams, num_logprobs: int) -> SamplingParams:
        """The params of this request; `defaults` where it is silent."""
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repeat_penalty")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        biases = tuple((_token_id(token), _bias(bias)) for token, bias in (self.logit_bias or {}).items())
        seed = defaults.seed if self.seed is None else self.seed % 2**64
        fields = {**vars(defaults), **given, "logit_bias": biases, "seed": seed, "num_logprobs": num_logprobs}
        return SamplingParams(**fields)


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise bad_request(f"logit_bias: {text!r} is no token id", "logit_bias")
    return int(text)


def _bias(value: float) -> float:
    """OpenAI: -100 bans a token."""
    if not -100.0 <= value <= 100.0:
        raise bad_request(f"logit_bias: {value} is not from -100 to 100", "logit_bias")
    return -math.inf if value == -100.0 else value


def usage(num_prompt_tokens: int, answers: list[Answer]) -> dict[str, Any]:
    num_answer_tokens = sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_answer_tokens,
        "total_tokens": num_prompt_tokens + num_answer_tokens,
        "prompt_tokens_details": {"cached_tokens": max((answer.num_cached_tokens for answer in answers), default=0)},
    }


def timings(answer: Answer) -> dict[str, float]:
    """llama.cpp's: what was computed for this answer, and how fast. Milliseconds."""
    num_new = answer.num_prompt_tokens - answer.num_cached_tokens
    num_decoded = max(0, answer.num_tokens - 1)  # the first token comes with the prompt
    return {
        "cache_n": answer.num_cached_tokens,
        "prompt_n": num_new,
        "prompt_ms": answer.prefill_s * 1e3,
        "prompt_per_second": num_new / answer.prefill_s if answer.prefill_s else 0.0,
        "predicted_n": answer.num_tokens,
        "predicted_ms": answer.decode_s * 1e3,
        "predicted_per_second": num_decoded / answer.decode_s if answer.decode_s else 0.0,
    }


def logprob_entries(model: TextGenerator, tokens: tuple[SampledToken, ...]) -> list[dict[str, Any]]:
    """OpenAI's `logprobs.content`."""
    return [
        {
            **_entry(model, token.token_id, token.logprob),
            "top_logprobs": [_entry(model, token_id, logprob) for token_id, logprob in token.top_logprobs],
        }
        for token in tokens
    ]


def _entry(model: TextGenerator, token_id: int, logprob: float) -> dict[str, Any]:
    data = model.token_bytes(token_id)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(data)}
