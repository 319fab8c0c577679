"""Dialogue on the chat templates of real models: formats found, conversations rendered, answers read."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import NUM_BYTES, byte_tokenizer

from isotherm.dialogue import (
    Content,
    Dialogue,
    Part,
    Reasoning,
    ToolCallArguments,
    ToolCallStart,
    read_tool_choice,
    read_tools,
)
from isotherm.dialogue.rendering import tools_text
from isotherm.dialogue.tool_formats import TOOL_FORMATS
from isotherm.errors import MessageError, TemplateError
from isotherm.tokenization.chat import ChatTemplate
from isotherm.tokenization.tokenizer import Detokenizer

CONTROL = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|python_tag|>", "[TOOL_CALLS]", "[INST]", "<start_of_turn>")
TOKENIZER = byte_tokenizer(control=CONTROL, user_defined=["<tool_call>", "<think>"])

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}},
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
TOOLS = read_tools([WEATHER, NOW])

# templates of llama.cpp's collection, with the format and the opener of reasoning that must be found in each
KNOWN = {
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", None),
    "Qwen-Qwen3-0.6B": ("hermes", "<think>"),
    "Qwen-QwQ-32B": ("hermes", "<think>"),
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", None),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", None),
    "ibm-granite-granite-4.0": ("hermes", None),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3", None),
    "meta-llama-Llama-3.2-3B-Instruct": ("llama3", None),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3", None),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", None),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral_args", None),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral_args", "[THINK]"),
    "google-gemma-4-31B-it": ("gemma4", "<|channel>"),
    "google-gemma-2-2b-it": ("generic", None),
    "microsoft-Phi-3.5-mini-instruct": ("generic", None),
    "HuggingFaceTB-SmolLM3-3B": ("generic", "<think>"),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("generic", "<think>"),
    # these have tools in formats of their own
    "Qwen3-Coder": ("generic", None),
    "MiniMax-M3": ("generic", None),
    "meetkai-functionary-medium-v3.1": ("generic", None),
}


def call(name: str, arguments: Any, call_id: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATION: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Paris and Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            call("get_weather", '{"city": "Paris"}', "call_1"),
            call("get_weather", '{"city": "Rome"}', "c2"),
        ],
    },
    {"role": "tool", "tool_call_id": "c2", "content": "20 degrees"},
    {"role": "tool", "tool_call_id": "call_1", "content": "10 degrees"},
    {"role": "assistant", "content": "10 and 20."},
    {"role": "user", "content": [{"type": "text", "text": "Thanks"}, {"type": "text", "text": "bye"}]},
]


def template_of(folder: Path, name: str) -> ChatTemplate:
    return ChatTemplate((folder / "templates" / f"{name}.jinja").read_text(encoding="utf-8"), "<s>", "</s>")


def dialogue_of(source: str) -> Dialogue:
    return Dialogue(ChatTemplate(source, "<s>", "</s>"), TOKENIZER)


PLAIN_SOURCE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def calls_of(parts: Sequence[Part]) -> list[tuple[str, Any]]:
    names = [part.name for part in parts if isinstance(part, ToolCallStart)]
    arguments = [json.loads(part.text) for part in parts if isinstance(part, ToolCallArguments)]
    return list(zip(names, arguments, strict=True))


@pytest.mark.parametrize("name", KNOWN)
def test_formats_are_found_and_conversations_rendered(llama_models: Path, name: str) -> None:
    template = template_of(llama_models, name)
    dialogue = Dialogue(template, TOKENIZER)
    block = dialogue.reasoning
    assert (dialogue.tool_format.name, block.opener if block else None) == KNOWN[name]
    prompt = dialogue.render(CONVERSATION, TOOLS)
    assert prompt.literal_spans == ()
    for text in ("get_weather", "Weather of a city", "Paris", "Rome", "10 degrees", "20 degrees", "Thanks\nbye"):
        assert text in prompt.text, text
    # what was rendered of the past answer is read as the calls it was, in order
    first = dialogue.render(CONVERSATION[:1], TOOLS).text
    parser = dialogue.parser("", TOOLS)
    past = dialogue.render(
        [CONVERSATION[0], {**CONVERSATION[1], "tool_calls": CONVERSATION[1]["tool_calls"][:1]}], TOOLS
    )
    answer = past.text.removeprefix(first) if past.text.startswith(first) else past.text
    if dialogue.tool_format.is_native:
        assert calls_of(parser.push(answer) + parser.finish()) == [("get_weather", {"city": "Paris"})]


def test_native_prompts_are_those_of_the_template(llama_models: Path) -> None:
    """Byte for byte what the template makes of the messages as `transformers` wants them, arguments as objects."""
    messages = json.loads(json.dumps(CONVERSATION))
    for one in messages[1]["tool_calls"]:
        one["function"]["arguments"] = json.loads(one["function"]["arguments"])
    messages[1]["content"] = ""
    messages[5]["content"] = "Thanks\nbye"
    for name in ("Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "google-gemma-4-31B-it", "ibm-granite-granite-4.0"):
        template = template_of(llama_models, name)
        declared = [tool.declaration for tool in TOOLS]
        prompt = Dialogue(template, TOKENIZER).render(CONVERSATION, TOOLS, variables={"enable_thinking": False})
        assert prompt.text == template.render(messages, tools=declared, variables={"enable_thinking": False})


def test_llama_gets_one_call_a_message(llama_models: Path) -> None:
    dialogue = Dialogue(template_of(llama_models, "meta-llama-Llama-3.1-8B-Instruct"), TOKENIZER)
    text = dialogue.render(CONVERSATION, TOOLS).text
    places = [text.index(part) for part in ('{"city": "Paris"}', "10 degrees", '{"city": "Rome"}', "20 degrees")]
    assert places == sorted(places)


def test_mistral_gets_ids_it_takes(llama_models: Path) -> None:
    dialogue = Dialogue(template_of(llama_models, "mistralai-Mistral-Nemo-Instruct-2407"), TOKENIZER)
    messages = [*CONVERSATION[:2], {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    text = dialogue.render(messages, TOOLS).text
    ids = [piece.partition('"')[0] for piece in text.split('id": "')[1:]]
    assert ids[:2] == ids[2:]
    assert len({*ids}) == 2
    assert all(len(one) == 9 and one.isalnum() for one in ids)


def test_a_template_without_tools_gets_them_in_words() -> None:
    dialogue = dialogue_of(PLAIN_SOURCE)
    assert not dialogue.tool_format.is_native
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    text = dialogue.render(messages, TOOLS).text
    turns = text.split("<|im_start|>")[1:]
    assert [turn.partition("\n")[0] for turn in turns] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert turns[0].startswith("system\nBe brief.\n\nYou can call tools.")
    assert turns[2] == (
        'assistant\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        '{"name": "get_weather", "arguments": {"city": "Rome"}}<|im_end|>\n'
    )
    assert turns[3] == "user\nResult of get_weather: 20 degrees\nResult of get_weather: 10 degrees<|im_end|>\n"
    untouched = dialogue.render(messages[:2], TOOLS, read_tool_choice("none", TOOLS)).text
    assert untouched == dialogue.render(messages[:2]).text
    assert "tools" not in untouched
    parser = dialogue.parser(text, TOOLS)
    parts = parser.push(turns[2].removeprefix("assistant\n").removesuffix("<|im_end|>\n")) + parser.finish()
    assert calls_of(parts) == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]


def test_no_system_role(llama_models: Path) -> None:
    dialogue = Dialogue(template_of(llama_models, "google-gemma-2-2b-it"), TOKENIZER)
    text = dialogue.render(CONVERSATION, TOOLS).text
    assert text.startswith("<s><start_of_turn>user\nYou can call tools.")
    assert "plain text.\n\nWeather in Paris and Rome?<end_of_turn>" in text
    with pytest.raises(TemplateError, match="System role not supported"):
        dialogue.render([{"role": "system", "content": "x"}, *CONVERSATION])


def test_the_prompt_says_whether_reasoning_is_open(llama_models: Path) -> None:
    qwen = Dialogue(template_of(llama_models, "Qwen-Qwen3-0.6B"), TOKENIZER)
    deepseek = Dialogue(template_of(llama_models, "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"), TOKENIZER)
    messages = [{"role": "user", "content": "What does <think> mean? <think>"}]
    for dialogue, variables, answer, expected in [
        (qwen, {}, "<think>a</think>b", [Reasoning("a"), Content("b")]),
        (qwen, {"enable_thinking": False}, "b</think>", [Content("b</think>")]),
        (deepseek, {}, "a</think>b", [Reasoning("a"), Content("b")]),
    ]:
        prompt = dialogue.render(messages, variables=variables)
        parser = dialogue.parser(prompt.text)
        assert parser.push(answer) + parser.finish() == expected


def test_past_reasoning_reaches_templates_that_know_it(llama_models: Path) -> None:
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "reasoning_content": "Look.", "tool_calls": [call("now", "", "x")]},
        {"role": "tool", "content": "noon"},
    ]
    qwen = Dialogue(template_of(llama_models, "Qwen-Qwen3-0.6B"), TOKENIZER)
    assert "<think>\nLook.\n</think>" in qwen.render(messages, TOOLS).text
    assert "Look." not in dialogue_of(PLAIN_SOURCE).render(messages, TOOLS).text


FRAGMENTS = st.sampled_from([*CONTROL, "a", " ", "\n", "<", "|im_end|>", "\ud800", "\ud83d\ude00", "é", "<tool_call>"])


@given(st.lists(st.lists(FRAGMENTS, max_size=6).map("".join), min_size=1, max_size=4))
def test_no_text_of_a_message_becomes_a_control_token(texts: list[str]) -> None:
    dialogue = dialogue_of(PLAIN_SOURCE)
    messages = [{"role": "user", "content": text} for text in texts]
    prompt = dialogue.render(messages)
    ids = TOKENIZER.encode(prompt.text, add_special=False, parse_special=True, literal_spans=prompt.literal_spans)
    start, end = (TOKENIZER.special_id(text) for text in ("<|im_start|>", "<|im_end|>"))
    assert [token for token in ids if TOKENIZER.is_hidden(token)] == [start, end] * len(texts)
    shown = TOKENIZER.decode(ids, show_special=True)
    plain = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
    assert shown == "".join(f"<|im_start|>user\n{text}<|im_end|>\n" for text in plain)
    if not any(text in "".join(texts) for text in CONTROL):
        assert prompt.literal_spans == ()


def test_tools_and_arguments_have_no_such_power_either(llama_models: Path) -> None:
    dialogue = Dialogue(template_of(llama_models, "Qwen-Qwen2.5-7B-Instruct"), TOKENIZER)
    function = {**NOW["function"], "description": "x<|im_end|>y"}  # type: ignore[dict-item]
    tools = read_tools([{"type": "function", "function": function}])
    messages = [
        CONVERSATION[0],
        {"role": "assistant", "tool_calls": [call("now", '{"<|im_end|>": "<|im_end|>"}', "1")]},
    ]
    prompt = dialogue.render(messages, tools)
    assert [prompt.text[start:end] for start, end in prompt.literal_spans] == ["<|im_end|>"] * 3
    template = template_of(llama_models, "Qwen-Qwen2.5-7B-Instruct")
    arguments = {"<|im_end|>": "<|im_end|>"}
    given = [CONVERSATION[0], {"role": "assistant", "content": "", "tool_calls": [call("now", arguments, "1")]}]
    assert prompt.text == template.render(given, tools=[tool.declaration for tool in tools])


def test_a_template_that_looks_for_control_tokens_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content.split('<|im_end|>')[0] }}{% endfor %}"
    with pytest.raises(MessageError, match="cannot quote"):
        dialogue_of(source).render([{"role": "user", "content": "a<|im_end|>b"}])
    assert dialogue_of(source).render([{"role": "user", "content": "ab"}]).text == "ab"


def test_markers_that_are_control_tokens_are_shown(llama_models: Path) -> None:
    llama = Dialogue(template_of(llama_models, "meta-llama-Llama-3.1-8B-Instruct"), TOKENIZER)
    tag = TOKENIZER.special_id("<|python_tag|>")
    assert tag is not None
    assert llama.shown_tokens == {tag}
    answer = '{"name": "now", "parameters": {}}'
    eot = TOKENIZER.special_id("<|eot_id|>")
    assert eot is not None
    ids = [tag, *TOKENIZER.encode(answer, add_special=False, parse_special=False), eot, NUM_BYTES]
    detokenizer = Detokenizer(TOKENIZER, shown=llama.shown_tokens)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert text == "<|python_tag|>" + answer
    assert TOKENIZER.decode(ids) == answer
    parser = llama.parser("", TOOLS)
    assert calls_of(parser.push(text) + parser.finish()) == [("now", {})]
    qwen = Dialogue(template_of(llama_models, "Qwen-Qwen2.5-7B-Instruct"), TOKENIZER)
    assert qwen.shown_tokens == frozenset()  # "<tool_call>" is no control token


FIRST_CALL = "messages[0].tool_calls[0]"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (["Hi"], "messages[0]"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "audio": {"id": 1}}], "messages[0].audio"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name"),
        ([{"role": "tool", "content": "x"}], "messages[0]"),
        ([*CONVERSATION[:3], CONVERSATION[2]], "messages[3].tool_call_id"),
        ([*CONVERSATION[:4], {"role": "tool", "content": "x"}], "messages[4]"),
        ([*CONVERSATION[:2], {"role": "user", "content": "x"}, CONVERSATION[2]], "messages[3]"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], f"{FIRST_CALL}.function.name"),
        ([{"role": "assistant", "tool_calls": ["x"]}], FIRST_CALL),
        ([{"role": "assistant", "tool_calls": [call("now", "{}", "1")] * 257}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [call("now", "{", "1")]}], f"{FIRST_CALL}.function.arguments"),
        ([{"role": "assistant", "tool_calls": [call("now", [1], "1")]}], f"{FIRST_CALL}.function.arguments"),
        ([{"role": "assistant", "tool_calls": [call("now", "{}", "1") | {"id": 1}]}], f"{FIRST_CALL}.id"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(messages: Any, field: str) -> None:
    with pytest.raises(MessageError) as caught:
        dialogue_of(PLAIN_SOURCE).render(messages, TOOLS)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    ("tools", "field"),
    [
        ("now", "tools"),
        ([1], "tools[0]"),
        ([{"type": "web_search"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"function": {"name": "a b"}}], "tools[0].function.name"),
        ([NOW, NOW], "tools[1].function.name"),
        ([{"function": {"name": "a", "description": 1}}], "tools[0].function.description"),
        ([{"function": {"name": "a", "parameters": {"type": "array"}}}], "tools[0].function.parameters"),
        ([{"function": {"name": "a", "strict": 1}}], "tools[0].function.strict"),
    ],
)
def test_wrong_tools_are_named(tools: Any, field: str) -> None:
    with pytest.raises(MessageError) as caught:
        read_tools(tools)
    assert caught.value.field == field


def test_strict_tools_need_json(llama_models: Path) -> None:
    dialogue = Dialogue(template_of(llama_models, "google-gemma-4-31B-it"), TOKENIZER)
    strict = [replace(TOOLS[0], is_strict=True)]
    for choice in ("auto", "required"):
        with pytest.raises(MessageError, match="strict"):
            dialogue.grammar("", strict, read_tool_choice(choice, strict))
    assert dialogue.grammar("", TOOLS, read_tool_choice("required", TOOLS)) is not None


def test_the_page_shows_all_formats_and_our_words() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in TOOL_FORMATS)
    tool = replace(TOOLS[0], description="…", parameters={})
    assert tools_text([tool]).replace("{}", "{…}") in page


def test_choices() -> None:
    dialogue = dialogue_of(PLAIN_SOURCE)
    named = {"type": "function", "function": {"name": "now"}}
    for wrong in ("any", {"type": "function", "function": {"name": "other"}}, {"type": "x"}, 5):
        with pytest.raises(MessageError):
            read_tool_choice(wrong, TOOLS)
    with pytest.raises(MessageError):
        read_tool_choice("required", ())
    assert dialogue.grammar("", TOOLS, read_tool_choice(None, TOOLS)) is None
    assert dialogue.grammar("", TOOLS, read_tool_choice("none", TOOLS)) is None
    forced = dialogue.grammar("", TOOLS, read_tool_choice("required", TOOLS))
    only = dialogue.grammar("", TOOLS, read_tool_choice(named, TOOLS))
    assert forced is not None
    assert only is not None
    assert "get_weather" in forced.source
    assert "get_weather" not in only.source
    strict = read_tools([{"type": "function", "function": {"name": "a", "strict": True}}])
    assert dialogue.grammar("", strict, read_tool_choice("auto", strict)) is not None
    assert dialogue.grammar("", strict, read_tool_choice("required", strict)) is not None
    fenced = '```json\n{"name": "a", "arguments": {}}\n```'
    for tools, num_calls in ((strict, 0), ([replace(strict[0], is_strict=False)], 1)):
        parser = dialogue.parser("", tools)
        assert len(calls_of(parser.push(fenced) + parser.finish())) == num_calls
    parser = dialogue.parser("", TOOLS, read_tool_choice("none", TOOLS))
    assert parser.push('{"name": "now", "arguments": {}}') == [Content('{"name": "now", "arguments": {}}')]
