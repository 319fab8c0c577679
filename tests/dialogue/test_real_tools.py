"""Real models call a tool: of themselves, and under the grammar that forces a call."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import isotherm
from isotherm.dialogue import (
    AnswerParser,
    Content,
    Dialogue,
    ToolCallArguments,
    ToolCallStart,
    read_tool_choice,
    read_tools,
)
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.tokenization import build_tokenizer, chat_template_for

WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city's name"}},
        "required": ["city"],
    },
}


TOOLS = read_tools([{"type": "function", "function": WEATHER}])


def dialogue_of(path: Path) -> Dialogue:
    with open_checkpoint(path) as checkpoint:
        template = chat_template_for(checkpoint.tokenizer)
        assert template is not None
        return Dialogue(template, build_tokenizer(checkpoint.tokenizer))


def calls_of(parser: AnswerParser, pieces: Iterable[str]) -> list[tuple[str, str]]:
    """(tool, city) of each call; there may be nothing beside calls."""
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.finish()
    assert not any(isinstance(part, Content) for part in parts), parts
    names = [part.name for part in parts if isinstance(part, ToolCallStart)]
    arguments = [json.loads(part.text) for part in parts if isinstance(part, ToolCallArguments)]
    return [(name, given["city"]) for name, given in zip(names, arguments, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_the_weather_tool_is_called(real_model: Callable[[str], Path], name: str) -> None:
    path = real_model(name)
    dialogue = dialogue_of(path)
    assert dialogue.tool_format.name == "hermes"
    prompt = dialogue.render([{"role": "user", "content": "What is the weather in Paris right now?"}], TOOLS)
    with isotherm.load(path) as model:
        pieces = [piece.text for piece in model.stream(prompt.text, raw=True, max_tokens=80)]
    assert calls_of(dialogue.parser(prompt.text, TOOLS), pieces) == [("get_weather", "Paris")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tool_format"), [("qwen2.5-coder-0.5b", "hermes"), ("smollm2-135m", "generic")])
def test_a_call_can_be_forced(real_model: Callable[[str], Path], name: str, tool_format: str) -> None:
    """Where nothing speaks for one; in the model's own format, which it does not write of itself."""
    path = real_model(name)
    dialogue = dialogue_of(path)
    assert dialogue.tool_format.name == tool_format
    choice = read_tool_choice("required", TOOLS)
    prompt = dialogue.render([{"role": "user", "content": "Say hello to Berlin."}], TOOLS, choice)
    grammar = dialogue.grammar(prompt.text, TOOLS, choice, is_parallel=False)
    with isotherm.load(path) as model:
        answer = model.generate(prompt.text, raw=True, max_tokens=80, grammar=grammar)
    assert answer.finish_reason == "stop"
    assert answer.text.startswith("<tool_call>" if tool_format == "hermes" else '{"name"')
    assert [tool for tool, _ in calls_of(dialogue.parser(prompt.text, TOOLS), [answer.text])] == ["get_weather"]
