"""Answers in the form that a request asks for."""

import json
from typing import Any

import jsonschema
import openai
import pytest

MESSAGES: Any = [{"role": "user", "content": "the rain"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["rome", "oslo"]}, "wet": {"type": "boolean"}, "days": {"type": "integer"}},
    "required": ["city", "wet"],
    "additionalProperties": False,
}


def ask(client: openai.OpenAI, **fields: Any) -> str:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 200, "temperature": 1.0, "seed": 4, **fields}
    got: Any = client.post("/chat/completions", body=body, cast_to=object)
    (choice,) = got["choices"]
    assert choice["finish_reason"] == "stop"
    return str(choice["message"]["content"])


def test_json_schema(client: openai.OpenAI) -> None:
    named = {"name": "weather", "schema": SCHEMA, "strict": True}
    text = ask(client, response_format={"type": "json_schema", "json_schema": named}, logit_bias={"300": 5})
    jsonschema.validate(json.loads(text), SCHEMA)
    assert ask(client, structured_outputs={"json": SCHEMA}, logit_bias={"300": 5}) == text


def test_choices_regex_and_grammars(client: openai.OpenAI) -> None:
    assert ask(client, structured_outputs={"choice": ["yes.", "no*"]}) in ("yes.", "no*")
    assert ask(client, structured_outputs={"regex": "[ab]{3}"}).strip("ab") == ""
    assert ask(client, grammar='root ::= "left" | "right"') in ("left", "right")
    assert ask(client, structured_outputs={"grammar": 'start: "up" | "down"'}) in ("up", "down")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}},
        {"grammar": "root ::= ("},
        {"grammar": 'root ::= "a"', "structured_outputs": {"regex": "b"}},
        {"structured_outputs": {"regex": "(" * 5000}},
        {"response_format": {"type": "yaml"}},
    ],
)
def test_grammars_that_are_none(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, **fields)
    assert raised.value.type == "invalid_request_error"


def test_a_recursive_schema(client: openai.OpenAI) -> None:
    schema = {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    jsonschema.validate(json.loads(ask(client, response_format=format_, max_tokens=400)), schema)
