"""A model's side of a conversation: messages to its prompt, its text to content, reasoning and tool calls."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from isotherm.dialogue.answer_parser import AnswerParser
from isotherm.dialogue.call_grammar import CallGrammar
from isotherm.dialogue.literal_text import Prompt, render_literally
from isotherm.dialogue.messages import ChatMessage, PastCall, read_messages
from isotherm.dialogue.parts import ToolCallArguments
from isotherm.dialogue.reasoning import reasoning_block_of
from isotherm.dialogue.rendering import in_plain_messages, one_call_a_message, template_messages
from isotherm.dialogue.tool_formats import FENCED, TOOL_FORMATS, ToolFormat, tool_format_of
from isotherm.dialogue.tools import AUTO, ChoiceMode, Tool, ToolChoice, read_tools
from isotherm.errors import MessageError, TemplateError
from isotherm.tokenization.chat import ChatTemplate
from isotherm.tokenization.tokenizer import Tokenizer
from isotherm.types import Grammar

_PROBE_SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "description": "Any."}}}
_PROBE = {"name": "probe", "description": "Probes.", "parameters": _PROBE_SCHEMA}
_PROBE_TOOLS = read_tools([{"type": "function", "function": _PROBE}])
_PROBE_CALL = PastCall("probecall", "probe", {"text": "probed"})


class Dialogue:
    """What the text of one chat model means, as its template says; any thread may use it."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self.reasoning = reasoning_block_of(template.source)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """The format of the template's own calls, if it is known and the template writes one that can be read back;
        else "generic", whose `is_native` is false: the tools are then described in the first message.
        """
        candidate = tool_format_of(self._template.source)
        if candidate.is_native and self._reads_back(candidate):
            return candidate
        return TOOL_FORMATS["generic"]

    @cached_property
    def shown_tokens(self) -> frozenset[int]:
        """Control tokens that are markup of answers: a Detokenizer must show these for `parser` to see them."""
        hidden = [token for token in self._marker_ids.values() if self._tokenizer.is_hidden(token)]
        return frozenset(hidden) - frozenset(self._tokenizer.end_ids)

    @cached_property
    def _marker_ids(self) -> dict[str, int]:
        """Markers that are single tokens of the vocabulary."""
        texts = self.tool_format.markers
        if self.reasoning is not None:
            texts += (self.reasoning.opener, self.reasoning.closer)
        found = {text: self._tokenizer.special_id(text) for text in texts}
        return {text: token for text, token in found.items() if token is not None}

    def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Tool] = (),
        tool_choice: ToolChoice = AUTO,
        variables: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt that the model answers.

        messages: as OpenAI's API has them, text only. variables: further names for the template, as enable_thinking.
        Where the messages spell no control token the text is what `transformers` would render; what they do spell
        stays text (Prompt.literal_spans). Raises MessageError, and TemplateError for what the template refuses.
        """
        if tool_choice.mode is ChoiceMode.NONE:
            tools = ()
        read: Sequence[ChatMessage] = read_messages(messages)
        if tools or any(message.calls for message in read):
            read, tools = self._with_tools(read, tools)
        short_ids = any(message.calls for message in read) and self.tool_format.name.startswith("mistral")
        given = {
            "messages": template_messages(read, self._template.source, has_short_ids=short_ids),
            "tools": [tool.declaration for tool in tools] or None,
            "variables": dict(variables or {}),
        }
        return render_literally(lambda given: self._template.render(**given), given, self._tokenizer)

    def _with_tools(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool]
    ) -> tuple[Sequence[ChatMessage], Sequence[Tool]]:
        """What is left for the template to do."""
        tool_format = self.tool_format
        if not tool_format.is_native:
            return in_plain_messages(messages, tools, tool_format, has_system_role=self._has_system_role), ()
        return one_call_a_message(messages) if tool_format.name == "llama3" else messages, tools

    def parser(self, prompt: str, tools: Sequence[Tool] = (), tool_choice: ToolChoice = AUTO) -> AnswerParser:
        """For one answer to `prompt`, the text of a Prompt; its end tells whether a reasoning block is open.

        With a strict tool, a call in a fenced block is content: `grammar` does not hold it to a schema.
        """
        calls = () if tool_choice.mode is ChoiceMode.NONE else tools
        tool_format = self.tool_format
        if any(tool.is_strict for tool in calls):
            blocks = {block: reader for block, reader in tool_format.blocks.items() if block is not FENCED}
            tool_format = replace(tool_format, blocks=blocks)
        return AnswerParser(
            self.reasoning,
            is_reasoning=self._is_reasoning(prompt),
            tool_format=tool_format,
            names=[tool.name for tool in calls],
        )

    def grammar(
        self, prompt: str, tools: Sequence[Tool], tool_choice: ToolChoice, *, is_parallel: bool = True
    ) -> Grammar | None:
        """What the answer to `prompt` must match; None where it may be any text.

        It must call a tool where the choice says so; where it may, calls of strict tools keep to their schema. Raises
        MessageError for strict tools where the model's format is no JSON. is_parallel: several calls are allowed.
        """
        strict = [index for index, tool in enumerate(tools) if tool.is_strict]
        if tool_choice.mode is ChoiceMode.NONE or (tool_choice.mode is ChoiceMode.AUTO and not strict):
            return None
        if strict and self.tool_format.quote is not None:
            field = f"tools[{strict[0]}].function.strict"
            raise MessageError(field, "is not supported: this model writes arguments in a format that is no JSON")
        writer = CallGrammar(self.tool_format, self.reasoning, self._marker_ids)
        is_reasoning = self._is_reasoning(prompt)
        if tool_choice.mode is ChoiceMode.AUTO:
            return writer.of_text_with_calls(tools, is_parallel=is_parallel, is_reasoning=is_reasoning)
        wanted = [tool for tool in tools if tool_choice.name in (None, tool.name)]
        assert wanted, "read_tool_choice has let this through"
        return writer.of_calls(wanted, is_parallel=is_parallel, is_reasoning=is_reasoning)

    def _is_reasoning(self, prompt: str) -> bool:
        return self.reasoning is not None and self.reasoning.is_open(prompt)

    @cached_property
    def _has_system_role(self) -> bool:
        try:
            text = self._template.render(
                [{"role": "system", "content": "probing"}, {"role": "user", "content": "probed"}]
            )
        except TemplateError:
            return False
        return "probing" in text

    def _reads_back(self, tool_format: ToolFormat) -> bool:
        """Whether the template writes a past call so that a parser of this format finds it."""
        question = ChatMessage("user", "probing")
        result = ChatMessage("tool", "probed", answered=_PROBE_CALL)
        answered = [question, ChatMessage("assistant", "", calls=(_PROBE_CALL,)), result]
        declarations = [tool.declaration for tool in _PROBE_TOOLS]
        texts = []
        for messages in ([question], answered):
            given = template_messages(messages, self._template.source)
            try:
                texts.append(self._template.render(given, tools=declarations))
            except TemplateError:
                return False
        prompt, whole = texts
        # bare calls are seen at the start of an answer only; some templates open a block that past answers lack
        for answer in (whole, whole.removeprefix(prompt)):
            parser = AnswerParser(tool_format=tool_format, names=[_PROBE_CALL.name])
            parts = parser.push(answer) + parser.finish()
            arguments = [part.text for part in parts if isinstance(part, ToolCallArguments)]
            if [text.replace(" ", "") for text in arguments] == ['{"text":"probed"}']:
                return True
        return False
