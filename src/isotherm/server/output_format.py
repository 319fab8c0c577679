"""What an answer must look like: OpenAI's `response_format`, and the fields that llama.cpp and vLLM have for it."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import Field

from isotherm.server.errors import bad_request
from isotherm.server.fields import Always, JsonObject, Strict
from isotherm.types import Grammar

_MAX_CHOICES = 1000


class TextFormat(Strict):
    type: Literal["text"]


class JsonFormat(Strict):
    type: Literal["json_object"]


class NamedSchema(Strict):
    """strict: it is always kept to."""

    name: str
    description: str | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Strict):
    """vLLM's: one of them."""

    json_: Annotated[JsonObject | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=_MAX_CHOICES)] | None = None
    grammar: str | None = None  # Lark
    json_object: Always | None = None

    def grammars(self) -> list[Grammar]:
        found = []
        if self.json_ is not None:
            found.append(Grammar("json_schema", self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)))
        if self.regex is not None:
            found.append(Grammar("regex", self.regex))
        if self.choice is not None:
            found.append(Grammar("regex", "|".join(map(re.escape, self.choice))))
        if self.grammar is not None:
            found.append(Grammar("lark", self.grammar))
        if self.json_object:
            found.append(Grammar("json_object", ""))
        return found


def schema_grammar(schema: dict[str, Any] | None) -> Grammar:
    return Grammar("json_object", "") if schema is None else Grammar("json_schema", json.dumps(schema))


def grammar_of(
    response_format: TextFormat | JsonFormat | SchemaFormat | None,
    gbnf: str | None,
    structured: StructuredOutputs | None,
) -> Grammar | None:
    """The one grammar that a request asks for. Raises ApiError where it asks for several."""
    found: list[Grammar] = []
    match response_format:
        case JsonFormat():
            found.append(Grammar("json_object", ""))
        case SchemaFormat():
            found.append(schema_grammar(response_format.json_schema.schema_))
    if gbnf is not None:
        found.append(Grammar("gbnf", gbnf))
    if structured is not None:
        found += structured.grammars()
    if len(found) > 1:
        raise bad_request("response_format, grammar and structured_outputs: give one of them", "response_format")
    return found[0] if found else None
