"""Every address of /openapi.json, asked what the page allows and what it does not, by schemathesis."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import checks
from serving import Serving
from tiny_models import write_tiny

import isotherm
from isotherm.server.app import build_app
from isotherm.server.shelf import Shelf
from isotherm.types import QuantType, SamplingParams

TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"""
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server whose answers are short: 96 tokens fill its context."""
    folder = tmp_path_factory.mktemp("asked")
    metadata = {"tokenizer.chat_template": TEMPLATE}
    path = write_tiny(folder / "tiny.gguf", "llama", QuantType.Q4_0, metadata=metadata, context_tokens=96)
    with Serving([str(path), "--threads", "1"], folder) as running:
        yield running.wait_healthy()


schema = schemathesis.openapi.from_dict(
    build_app(Shelf(isotherm.load, (), max_waiting=0), SamplingParams(), has_page=False).openapi()
)


def make_good(case: Any) -> None:
    """What the page cannot say is made good, so that more than the first refusal is seen: a model that is here,
    messages that are some, and what one field needs of another. What was wrong by the page stays wrong.
    """
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and 0 < len(body["model"]) <= 512:
        body["model"] = "tiny"
    if case.path in ("/v1/chat/completions", "/tokenize"):
        messages = body.get("messages")
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            body["messages"] = [{"role": "user", "content": "the rain"}]
    needed = {
        "/v1/chat/completions": ("logprobs", True),
        "/v1/responses": ("include", ["message.output_text.logprobs"]),
    }
    if case.path in needed and "top_logprobs" in body:
        body.setdefault(*needed[case.path])


@schema.parametrize()
@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_address(case: Any, asked: Serving) -> None:
    make_good(case)
    case.call_and_validate(base_url=asked.url, checks=CHECKS, timeout=60)


MESSAGES = [{"role": "user", "content": "the rain"}]
STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "stream": True, "logprobs": True, "top_logprobs": 1},
    "/v1/completions": {"prompt": ["a", "b"], "stream": True, "logprobs": 1},
    "/v1/responses": {"input": "a", "stream": True},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 4, "stream": True},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "a"},
}


@pytest.mark.parametrize("path", STREAMS)
def test_streams(path: str, asked: Serving) -> None:
    """Schemathesis seldom asks for one that is answered."""
    case = schema[path]["POST"].Case(body={"model": "tiny", **STREAMS[path]}, media_type="application/json")
    got = case.call_and_validate(base_url=asked.url, checks=CHECKS[:4], timeout=60)
    assert got.status_code == 200
    assert got.headers["content-type"][0].startswith(("text/event-stream", "application/x-ndjson"))


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_address_at_length(case: Any, asked: Serving) -> None:
    make_good(case)
    case.call_and_validate(base_url=asked.url, checks=CHECKS, timeout=60)
