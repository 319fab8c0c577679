"""The parts that a model's answer is made of, as they stream."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text of the model's reasoning block, without its markers."""

    text: str


@dataclass(frozen=True)
class ToolCallStart:
    """A call of the tool `name`; index counts the calls of an answer from 0."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolCallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolCallEnd:
    """The pieces of this call's arguments are the JSON text of one object."""

    index: int


Part = Content | Reasoning | ToolCallStart | ToolCallArguments | ToolCallEnd
