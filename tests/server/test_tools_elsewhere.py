"""Tools and reasoning through Anthropic's and Ollama's clients."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import ollama
import openai
import pytest
from serving import Serving
from test_tools import HERMES, MESSAGES, SCHEMA, TOOLS
from tiny_models import write_tiny

import isotherm
from isotherm.types import QuantType

TOOL: Any = {"name": "weather", "description": "Tells.", "input_schema": SCHEMA}
FORCED: Any = {"type": "any", "disable_parallel_tool_use": True}
THINKING = """{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}{% endfor %}<assistant>
{%- if enable_thinking is defined and not enable_thinking %}<think></think>{% else %}<think>{% endif %}"""
ALWAYS = THINKING.replace("not enable_thinking", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tools")
    for name, template in (("calls", HERMES), ("thinks", THINKING), ("always", ALWAYS)):
        metadata = {"tokenizer.chat_template": template}
        write_tiny(made / f"{name}.gguf", "llama", QuantType.Q4_0, metadata=metadata, context_tokens=2048)
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Serving]:
    files = [str(folder / f"{name}.gguf") for name in ("calls", "thinks", "always")]
    with Serving([*files, "--kv-gib", "0.05"], folder) as server:
        yield server.wait_healthy()


@pytest.fixture(scope="module")
def claude(served: Serving) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as made:
        yield made


def called(message: anthropic.types.Message) -> anthropic.types.ToolUseBlock:
    assert message.stop_reason == "tool_use"
    block = message.content[-1]
    assert block.type == "tool_use"
    return block


@pytest.mark.parametrize("choice", [FORCED, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}])
def test_anthropic_tools(claude: anthropic.Anthropic, choice: Any) -> None:
    options: Any = {"model": "calls", "max_tokens": 300, "tools": [TOOL]}
    call = called(claude.messages.create(**options, messages=MESSAGES, tool_choice=choice))
    assert call.name == "weather"
    jsonschema.validate(call.input, SCHEMA)
    with claude.messages.stream(**options, messages=MESSAGES, tool_choice=choice) as stream:
        streamed = called(stream.get_final_message())
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "wet"}]}
    turns: Any = [
        *MESSAGES,
        {"role": "assistant", "content": [call.to_dict()]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    after = claude.messages.create(**{**options, "max_tokens": 3}, messages=turns)
    assert after.stop_reason in ("end_turn", "max_tokens")
    counted = claude.messages.count_tokens(model="calls", messages=turns, tools=[TOOL])
    assert counted.input_tokens == after.usage.input_tokens + (after.usage.cache_read_input_tokens or 0)
    assert counted.input_tokens > claude.messages.count_tokens(model="calls", messages=turns).input_tokens


def test_a_call_cut_short_is_left_out(claude: anthropic.Anthropic) -> None:
    got = claude.messages.create(model="calls", max_tokens=5, tools=[TOOL], messages=MESSAGES, tool_choice=FORCED)
    assert got.stop_reason == "max_tokens"
    assert not [block for block in got.content if block.type == "tool_use"]


def test_tools_that_are_wrong(claude: anthropic.Anthropic) -> None:
    for changed in (
        {"tools": [TOOL, TOOL]},
        {"tools": [{**TOOL, "input_schema": {"type": "array"}}]},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sing"}},
        {"tool_choice": {"type": "any"}},
        {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]}]},
    ):
        with pytest.raises(anthropic.BadRequestError):
            claude.messages.create(**{"model": "calls", "max_tokens": 5, "messages": MESSAGES, **changed})


def test_ollama_tools_are_in_the_prompt(served: Serving) -> None:
    """A call cannot be forced there; what becomes of one is in test_ollama_fields."""
    client = ollama.Client(served.url)
    told = client.chat("calls", MESSAGES, tools=TOOLS, options={"num_predict": 2})
    plain = client.chat("calls", MESSAGES, options={"num_predict": 2})
    sent: Any = [ollama.Tool(**tool).model_dump(exclude_none=True) for tool in TOOLS]  # less than the schema says
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none") as other:
        same = other.chat.completions.create(model="calls", messages=MESSAGES, tools=sent, max_tokens=2)
    assert same.usage is not None
    assert told.prompt_eval_count == same.usage.prompt_tokens
    assert plain.prompt_eval_count is not None
    assert told.prompt_eval_count > plain.prompt_eval_count


def test_thinking_is_told_apart(claude: anthropic.Anthropic, served: Serving, folder: Path) -> None:
    """A tiny model closes no block: all that it says is thinking, or content where the prompt closes it."""
    with isotherm.load(folder / "thinks.gguf", cache_bytes=0, context_tokens=512) as model:
        thought = model.generate("<user>the rain<assistant><think>", raw=True, max_tokens=12).text.strip()
        said = model.generate("<user>the rain<assistant><think></think>", raw=True, max_tokens=12).text.strip()
    assert thought != said
    client = ollama.Client(served.url)
    options: Any = {"model": "thinks", "max_tokens": 12, "messages": MESSAGES}
    for thinking, chosen, kind, text in (
        (None, None, "thinking", thought),
        ({"type": "adaptive"}, True, "thinking", thought),
        ({"type": "disabled"}, False, "text", said),
    ):
        more: Any = {} if thinking is None else {"thinking": thinking}
        (block,) = claude.messages.create(**options, **more).content
        assert (block.type, getattr(block, kind).strip()) == (kind, text)
        with claude.messages.stream(**options, **more) as stream:
            (streamed,) = stream.get_final_message().content
        assert getattr(streamed, kind) == getattr(block, kind)
        message = client.chat("thinks", MESSAGES, think=chosen, options={"num_predict": 12}).message
        got = (message.thinking or "", message.content or "")
        assert tuple(map(str.strip, got)) == ((text, "") if kind == "thinking" else ("", text))
        single = client.generate("thinks", "the rain", think=chosen, options={"num_predict": 12})
        assert ((single.thinking or "", single.response or "")) == got
    assert client.show("thinks").capabilities == ["completion", "tools", "thinking"]


def test_thinking_that_cannot_be_switched(claude: anthropic.Anthropic, served: Serving) -> None:
    client = ollama.Client(served.url)
    with pytest.raises(ollama.ResponseError, match="does not think"):
        client.chat("calls", MESSAGES, think=True)
    assert client.chat("calls", MESSAGES, think=False, options={"num_predict": 1}).done
    with pytest.raises(ollama.ResponseError, match="always thinks"):
        client.chat("always", MESSAGES, think=False)
    with pytest.raises(anthropic.BadRequestError, match="always thinks"):
        claude.messages.create(model="always", max_tokens=1, messages=MESSAGES, thinking={"type": "disabled"})


@pytest.mark.slow
def test_a_real_model_calls_a_tool(real_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = real_model("qwen2.5-coder-1.5b")
    question: Any = [{"role": "user", "content": "What is the weather in Oslo for the next 3 days?"}]
    expected = {"city": "oslo", "days": 3}
    with Serving([str(path), "--ctx", "2048"], tmp_path) as server:
        server.wait_healthy()
        with anthropic.Anthropic(base_url=server.url, api_key="none") as claude:
            got = claude.messages.create(model=path.stem, messages=question, tools=[TOOL], max_tokens=100)
        assert called(got).input == expected
        client = ollama.Client(server.url)
        options: Any = {"model": path.stem, "messages": question, "tools": TOOLS, "options": {"num_predict": 100}}
        (call,) = client.chat(**options).message.tool_calls or [None]
        assert call is not None
        assert call.function.arguments == expected
        streamed = [one for part in client.chat(**options, stream=True) for one in part.message.tool_calls or ()]
        assert [one.function.arguments for one in streamed] == [expected]
