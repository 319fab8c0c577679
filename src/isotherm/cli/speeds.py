"""What an answer cost: for a person, in the block that Ollama prints, and for a program."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isotherm.answer import Answer
    from isotherm.text import TextGenerator


@dataclass(frozen=True)
class AnswerFacts:
    """Counts, times and rates of one answer."""

    model: str
    text: str
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_tokens: int
    load_s: float
    prefill_s: float
    decode_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        cached = f" ({self.num_cached_tokens} cached)" if self.num_cached_tokens else ""
        total_s = self.load_s + self.prefill_s + self.decode_s
        rows = (
            ("total duration", _duration(total_s)),
            ("load duration", _duration(self.load_s)),
            ("prompt eval count", f"{self.num_prompt_tokens} token(s){cached}"),
            ("prompt eval duration", _duration(self.prefill_s)),
            ("prompt eval rate", _rate(self.prefill_tokens_per_s)),
            ("eval count", f"{self.num_tokens} token(s)"),
            ("eval duration", _duration(self.decode_s)),
            ("eval rate", _rate(self.decode_tokens_per_s)),
        )
        return [f"{label + ':':<22}{value}" for label, value in rows]


def answer_facts(generator: "TextGenerator", answer: "Answer", *, load_s: float) -> AnswerFacts:
    """The first token comes out of the prefill, so decode's rate counts the others; cached tokens cost nothing.

    load_s: 0 where the model was there already.
    """
    return AnswerFacts(
        model=generator.facts.name,
        text=answer.text,
        finish_reason=answer.finish_reason,
        num_prompt_tokens=answer.num_prompt_tokens,
        num_cached_tokens=answer.num_cached_tokens,
        num_tokens=answer.num_tokens,
        load_s=load_s,
        prefill_s=answer.prefill_s,
        decode_s=answer.decode_s,
        prefill_tokens_per_s=_per_second(answer.num_prompt_tokens - answer.num_cached_tokens, answer.prefill_s),
        decode_tokens_per_s=_per_second(answer.num_tokens - 1, answer.decode_s),
    )


def context_note(generator: "TextGenerator", answer: "Answer", way_out: str) -> str | None:
    """What to tell where the context, not the user's own limit, cut the answer."""
    num_used = answer.num_prompt_tokens + answer.num_tokens
    if answer.finish_reason != "length" or num_used < generator.context_tokens:
        return None
    return f"the answer was cut: the context of {generator.context_tokens} tokens is full; {way_out}"


def _per_second(num_tokens: int, duration_s: float) -> float | None:
    return num_tokens / duration_s if num_tokens > 0 and duration_s > 0 else None


def _duration(duration_s: float) -> str:
    return f"{duration_s:.2f} s" if duration_s >= 1 else f"{duration_s * 1000:.1f} ms"


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.2f} tokens/s"
