"""Tokenizers of 256 bytes and a few control tokens, for tests that need no model."""

from collections.abc import Sequence

from tokenizer_specs import spec_of

from isotherm.tokenization.tokenizer import Tokenizer, build_tokenizer

NUM_BYTES = 256


def byte_texts() -> list[str]:
    """The characters that byte-level BPE writes for the bytes (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(NUM_BYTES)]


def byte_tokenizer(control: Sequence[str] = (), user_defined: Sequence[str] = ()) -> Tokenizer:
    """Ids 0 to 255 are bytes in order; then "<|end|>", which ends answers, then `control`, then `user_defined`."""
    tokens = (*byte_texts(), "<|end|>", *control, *user_defined)
    types = [1] * NUM_BYTES + [3] * (1 + len(control)) + [4] * len(user_defined)
    spec = spec_of("gpt2", dict(zip(tokens, types, strict=True)), eos_id=NUM_BYTES)
    return build_tokenizer(spec)
