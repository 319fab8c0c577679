"""Reasoning blocks: text before the answer, between markers that the model's template knows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReasoningBlock:
    """label: what some models write behind the opener, which is no reasoning."""

    opener: str
    closer: str
    label: str = ""

    def is_open(self, prompt: str) -> bool:
        """Whether the prompt itself ends in the opener, so that the answer begins inside the block."""
        return prompt.rstrip().endswith((self.opener, self.opener + self.label))


REASONING_BLOCKS = (
    ReasoningBlock("<think>", "</think>"),
    ReasoningBlock("[THINK]", "[/THINK]"),
    ReasoningBlock("<|channel>", "<channel|>", "thought"),
)


def reasoning_block_of(template_source: str) -> ReasoningBlock | None:
    """None for a template that has no such block: nothing in its answers is ever split off.

    The closer decides: templates cut the reasoning of earlier turns off by it, also where the model alone opens it.
    """
    for block in REASONING_BLOCKS:
        if block.closer in template_source:
            return block
    return None
