"""What a chat model's text means: messages to prompts, answers to content, reasoning and tool calls."""

from isotherm.dialogue.answer_parser import AnswerParser
from isotherm.dialogue.dialogue import Dialogue
from isotherm.dialogue.literal_text import Prompt
from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.dialogue.tools import AUTO, ChoiceMode, Tool, ToolChoice, read_tool_choice, read_tools

__all__ = [
    "AUTO",
    "AnswerParser",
    "ChoiceMode",
    "Content",
    "Dialogue",
    "Part",
    "Prompt",
    "Reasoning",
    "Tool",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "ToolChoice",
    "read_tool_choice",
    "read_tools",
]
