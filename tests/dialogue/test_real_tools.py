"""A real model calls a tool: freely where its size allows, and forced calls are tested with its own vocabulary."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import isotherm
from isotherm.dialogue import Dialogue, ToolCallArguments, ToolCallStart, read_tools
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_the_weather_tool_is_called(real_model: Callable[[str], Path], name: str) -> None:
    path = real_model(name)
    with open_checkpoint(path) as checkpoint:
        tokenizer = build_tokenizer(checkpoint.tokenizer)
        template = chat_template_for(checkpoint.tokenizer)
    assert template is not None
    dialogue = Dialogue(template, tokenizer)
    assert dialogue.tool_format.name == "hermes"
    tools = read_tools([{"type": "function", "function": WEATHER}])
    prompt = dialogue.render([{"role": "user", "content": "What is the weather in Paris right now?"}], tools)
    parser = dialogue.parser(prompt.text, tools)
    parts = []
    with isotherm.load(path) as model:
        for piece in model.stream(prompt.text, raw=True, max_tokens=80):
            parts += parser.push(piece.text)
    parts += parser.finish()
    calls = [part for part in parts if isinstance(part, ToolCallStart)]
    arguments = [json.loads(part.text) for part in parts if isinstance(part, ToolCallArguments)]
    assert [call.name for call in calls] == ["get_weather"], parts
    assert "Paris" in arguments[0]["city"]
