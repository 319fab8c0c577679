"""Splits an answer, as its text comes, into reasoning, content and tool calls."""

from collections.abc import Collection, Iterable

from isotherm.dialogue.json_scan import JsonScan
from isotherm.dialogue.parts import Content, Part, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart
from isotherm.dialogue.reasoning import ReasoningBlock
from isotherm.dialogue.tool_formats import BARE, Block, Cursor, MoreText, NoCall, ToolCall, ToolFormat
from isotherm.tokenization.partial_marker import num_undecided

_SPACE = " \t\r\n"


class AnswerParser:
    """The parts of one answer. However its text is cut, the parts are the same but for where their texts are cut.

    Text is held back only while it may still turn out to be markup, a call, or the space around one. A call is held
    until its JSON is whole, and then comes as start, arguments and end at once: only so can text that turns out to be
    no sound call of one of `names` come out as content, unchanged and in its place. Space around reasoning and calls
    belongs to the markup. Reasoning is split off before anything else only; it has no calls in it.
    """

    def __init__(
        self,
        reasoning: ReasoningBlock | None = None,
        *,
        is_reasoning: bool = False,
        tool_format: ToolFormat | None = None,
        names: Iterable[str] = (),
    ) -> None:
        """is_reasoning: the prompt has opened the block. names: of the tools; without one there are no calls."""
        assert reasoning is not None or not is_reasoning
        self._reasoning = reasoning
        self._names = frozenset(names)
        self._format = tool_format if self._names else None
        self._openers = {block.opener: block for block in self._format.blocks} if self._format else {}
        self._held = ""
        self._is_end = False
        self._num_calls = 0
        self._block: Block | None = None  # in which a call was read
        self._scans: dict[int, JsonScan] = {}
        self._at_start = True  # nothing but space and reasoning so far
        self._after_markup = is_reasoning
        self._stage = self._reason if is_reasoning else self._begin
        self._parts: list[Part] = []

    def push(self, text: str) -> list[Part]:
        """The parts that `text` completes."""
        assert not self._is_end
        self._held += text
        return self._advance()

    def finish(self) -> list[Part]:
        """The rest, once no more text can follow."""
        self._is_end = True
        return self._advance()

    def _advance(self) -> list[Part]:
        while self._held and self._stage():
            pass
        parts, self._parts = self._parts, []
        return parts

    # Each stage reads from the start of what is held; it says whether there may be more to read at once.

    def _begin(self) -> bool:
        """Is there a reasoning block?"""
        if self._reasoning is None:
            self._stage = self._answer
            return True
        text = self._held.lstrip(_SPACE)
        if text.startswith(self._reasoning.opener):
            self._held = text.removeprefix(self._reasoning.opener)
            self._stage = self._label
        elif self._reasoning.opener.startswith(text) and not self._is_end:
            return False
        else:
            self._stage = self._answer
        return True

    def _label(self) -> bool:
        assert self._reasoning is not None
        label = self._reasoning.label
        if label.startswith(self._held) and len(self._held) < len(label) and not self._is_end:
            return False
        self._held = self._held.removeprefix(label)
        self._after_markup = True
        self._stage = self._reason
        return True

    def _reason(self) -> bool:
        assert self._reasoning is not None
        at = self._held.find(self._reasoning.closer)
        if at < 0:
            self._emit(Reasoning, len(self._held) - self._num_undecided([self._reasoning.closer]))
            return False
        self._emit(Reasoning, at, before_markup=True)
        self._held = self._held[len(self._reasoning.closer) :]
        self._after_markup = True
        self._stage = self._answer
        return True

    def _answer(self) -> bool:
        if self._block is not None:
            return self._go_on(self._block)
        found = self._find_opener()
        if found is None:
            self._emit(Content, len(self._held) - self._num_undecided(self._openers))
            return False
        at, block = found
        try:
            call, end = self._read(block, at + len(block.opener))
        except MoreText:
            self._emit(Content, at)
            return False
        except NoCall:
            self._scans = {}
            self._emit(Content, at + max(1, len(block.opener)))
            return True
        self._emit(Content, at, before_markup=True)
        self._give(call, end - at)
        self._block = block
        return True

    def _find_opener(self) -> tuple[int, Block] | None:
        places = [(at, block) for text, block in self._openers.items() if text and (at := self._held.find(text)) >= 0]
        if self._at_start and BARE.opener in self._openers:
            start = len(self._held) - len(self._held.lstrip(_SPACE))
            if self._held[start : start + 1] in ("{", "["):
                places.append((start, BARE))
        return min(places, key=lambda place: place[0], default=None)

    def _go_on(self, block: Block) -> bool:
        """Behind a call: its block may hold another one, or end here."""
        cursor = Cursor(self._held, 0, self._is_end, {})
        cursor.skip(_SPACE + "]")
        try:
            if block.closer and cursor.accept(block.closer):
                self._leave(cursor.position)
                return True
            cursor.skip(_SPACE + ",;")
            if not self._is_end and cursor.position == len(self._held):
                return False
            call, end = self._read(block, cursor.position)
        except MoreText:
            return False
        except NoCall:
            # brackets and commas are content again, unless they end the array of calls or the answer
            rest = self._held.lstrip(_SPACE)
            self._leave(cursor.position if not self._held[cursor.position :] else len(self._held) - len(rest))
            return True
        self._give(call, end)
        return True

    def _leave(self, position: int) -> None:
        self._held = self._held[position:]
        self._block = None
        self._scans = {}
        self._after_markup = True

    def _read(self, block: Block, position: int) -> tuple[ToolCall, int]:
        assert self._format is not None
        cursor = Cursor(self._held, position, self._is_end, self._scans)
        return self._format.blocks[block](cursor, self._names), cursor.position

    def _give(self, call: ToolCall, num_chars: int) -> None:
        index = self._num_calls
        self._num_calls += 1
        self._parts += [ToolCallStart(index, call.name), ToolCallArguments(index, call.arguments), ToolCallEnd(index)]
        self._held = self._held[num_chars:]
        self._scans = {}
        self._at_start = False

    def _emit(self, kind: type[Content] | type[Reasoning], size: int, *, before_markup: bool = False) -> None:
        """Gives `size` characters of what is held, but for space that may belong to markup."""
        text = self._held[:size]
        if self._after_markup:
            text = text.lstrip(_SPACE)
        kept = text.rstrip(_SPACE)
        is_last = self._is_end and size == len(self._held)
        if before_markup:
            text = kept
        elif self._ends_in_markup(kind) and not is_last:
            size -= len(text) - len(kept)
            text = kept
        self._held = self._held[size:]
        if size != 0 and self._scans:
            self._scans = {}
        if text:
            last = self._parts[-1] if self._parts else None
            if isinstance(last, Content | Reasoning) and isinstance(last, kind):
                self._parts[-1] = kind(last.text + text)
            else:
                self._parts.append(kind(text))
            self._after_markup = False
            self._at_start = self._at_start and kind is Reasoning

    def _ends_in_markup(self, kind: type[Content] | type[Reasoning]) -> bool:
        return kind is Reasoning or self._format is not None

    def _num_undecided(self, markers: Collection[str]) -> int:
        """How much of the end of what is held may still become a marker."""
        return 0 if self._is_end else num_undecided(self._held, markers)
