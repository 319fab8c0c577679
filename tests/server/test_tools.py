"""Tool calls through `openai`: forced from a tiny model by grammar, or written by a model that knows how."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from serving import Serving
from tiny_models import write_tiny

from isotherm.types import QuantType

HERMES = """{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>
{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["rome", "oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "description": "Tells.", "parameters": SCHEMA}}]
MESSAGES: Any = [{"role": "user", "content": "the rain"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("tools")
    metadata = {"tokenizer.chat_template": HERMES}
    path = write_tiny(folder / "tiny.gguf", "llama", QuantType.Q4_0, metadata=metadata, context_tokens=2048)
    with Serving([str(path)], folder) as server:
        server.wait_healthy()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
            yield made


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required(client: openai.OpenAI, choice: Any) -> None:
    got = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, max_tokens=300
    )
    (one,) = got.choices
    assert one.finish_reason == "tool_calls"
    (call,) = one.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    results: Any = [
        *MESSAGES,
        one.message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "wet"},
    ]
    after = client.chat.completions.create(model="tiny", messages=results, tools=TOOLS, max_tokens=3)
    assert after.choices[0].message.role == "assistant"


def test_a_call_in_a_stream(client: openai.OpenAI) -> None:
    options: Any = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "max_tokens": 300}
    whole = client.chat.completions.create(**options, parallel_tool_calls=False)
    (call,) = whole.choices[0].message.tool_calls or ()
    name, arguments, ids = "", "", []
    for chunk in client.chat.completions.create(**options, parallel_tool_calls=False, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            assert part.index == 0
            assert part.function is not None
            name += part.function.name or ""
            arguments += part.function.arguments or ""
            ids += [part.id] if part.id else []
        last = chunk.choices[0].finish_reason
    assert (name, arguments, last) == (call.function.name, call.function.arguments, "tool_calls")  # type: ignore[union-attr]
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "sing"}}}, "tool_choice"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages[0]"),
        ({"messages": [{"role": "bard", "content": "y"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ],
)
def test_what_is_wrong_with_tools(client: openai.OpenAI, changed: dict[str, Any], param: str) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, **changed}
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/chat/completions", body=body, cast_to=object)
    assert (raised.value.param or "").startswith(param)


@pytest.mark.slow
def test_a_real_model_calls_a_tool(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = real_model("qwen2.5-coder-1.5b")
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo for the next 3 days?"}]
    with Serving([str(path), "--ctx", "2048"], tmp_path) as server:
        server.wait_healthy()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            got = client.chat.completions.create(model=path.stem, messages=messages, tools=TOOLS, max_tokens=100)
    (call,) = got.choices[0].message.tool_calls or ()
    assert json.loads(call.function.arguments) == {"city": "oslo", "days": 3}  # type: ignore[union-attr]


def test_a_call_through_responses(client: openai.OpenAI) -> None:
    function = TOOLS[0]["function"]
    tools: Any = [{"type": "function", "strict": True, **function}]
    for choice in ("required", {"type": "function", "name": "weather"}):
        options: Any = {"model": "tiny", "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
        got = client.responses.create(input="the rain", max_output_tokens=300, **options)
        assert got.status == "completed"
        (call,) = got.output
        assert call.type == "function_call"
        assert call.name == "weather"
        jsonschema.validate(json.loads(call.arguments), SCHEMA)
    with client.responses.stream(input="the rain", max_output_tokens=300, **options) as stream:
        kinds = [event.type for event in stream]
        assert "response.function_call_arguments.done" in kinds
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    items: Any = [{"role": "user", "content": "the rain"}, call.to_dict()]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "wet"})
    after = client.responses.create(model="tiny", input=items, tools=tools, max_output_tokens=3)
    in_chat: Any = [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [as_in_chat(call)]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "wet"},
    ]
    strict: Any = [{"type": "function", "function": {"strict": True, **function}}]
    chat = client.chat.completions.create(model="tiny", messages=in_chat, tools=strict, max_tokens=3)
    assert after.output_text == chat.choices[0].message.content
    assert after.usage is not None
    assert chat.usage is not None
    with pytest.raises(openai.BadRequestError, match="no call"):
        client.responses.create(model="tiny", input=[*items, items[-1]], tools=tools)


def as_in_chat(call: Any) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
