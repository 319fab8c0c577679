"""Chat messages to the text a model was trained on, by the Jinja template in its file."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from isotherm.errors import TemplateError
from isotherm.types import TokenizerSpec

if TYPE_CHECKING:
    from jinja2 import Template

_MAX_SOURCE_CHARS = 64 * 1024
_MAX_OUTPUT_CHARS = 16 * 2**20
_MAX_MESSAGE_CHARS = 500


class ChatTemplate:
    """A chat template with the texts of its bos and eos tokens; any thread may render it.

    It runs in a sandbox, and ends in TemplateError once it has used the work and memory a chat can need.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        self.source = source
        self._bos = bos
        self._eos = eos

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, with special tokens spelled out (its bos too where the template writes one).

        messages: `role`, `content` and what else the template knows. tools: JSON schemas of functions.
        variables: further names for the template, such as enable_thinking. Raises TemplateError.
        """
        given: dict[str, Any] = {
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        try:
            return self._generate(given)
        except TemplateError:
            raise
        except Exception as error:  # a template can raise anything
            message = str(error)[:_MAX_MESSAGE_CHARS] or type(error).__name__
            raise TemplateError(f"the chat template failed: {message}") from error

    def _generate(self, given: dict[str, Any]) -> str:
        from isotherm.tokenization.template_budget import TemplateBudget
        from isotherm.tokenization.template_sandbox import BUDGET_KEY

        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate({BUDGET_KEY: TemplateBudget(given), **given}):
            pieces.append(piece)
            num_chars += len(piece)
            if num_chars > _MAX_OUTPUT_CHARS:
                raise TemplateError(f"the chat template wrote more than {_MAX_OUTPUT_CHARS} characters")
        return "".join(pieces)

    @cached_property
    def _template(self) -> "Template":
        from isotherm.tokenization.template_sandbox import MeteredEnvironment

        if len(self.source) > _MAX_SOURCE_CHARS:
            raise TemplateError(
                f"the chat template has more than {_MAX_SOURCE_CHARS} characters; this is no chat template"
            )
        environment = MeteredEnvironment()
        return environment.from_string(environment.metered_tree(self.source))


def chat_template_for(spec: TokenizerSpec) -> ChatTemplate | None:
    """None where the file has no template: a base model, which continues text but does not chat."""
    if spec.chat_template is None:
        return None
    bos, eos = ("" if token is None else spec.tokens[token] for token in (spec.bos_id, spec.eos_id))
    return ChatTemplate(spec.chat_template, bos, eos)
