"""Tokenizers as files describe them, with nothing special."""

from dataclasses import replace

from isotherm.types import TokenizerSpec


def spec_of(model: str, tokens: dict[str, int], **fields: object) -> TokenizerSpec:
    """A spec with these tokens and types, and nothing special but what `fields` says."""
    spec = TokenizerSpec(
        model=model,
        pre="gpt-2",
        tokens=tuple(tokens),
        token_types=tuple(tokens.values()),
        scores=(),
        merges=(),
        bos_id=None,
        eos_id=None,
        eot_id=None,
        unknown_id=None,
        add_bos=False,
        add_eos=False,
        add_space_prefix=False,
        chat_template=None,
    )
    return replace(spec, **fields)  # type: ignore[arg-type]
