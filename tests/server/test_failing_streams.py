"""An answer that fails after its first part says so, in the words of each API."""

import signal
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from serving import Serving
from tiny_models import write_tiny

from isotherm.types import QuantType

MESSAGES: Any = [{"role": "user", "content": "the rain in spain"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NUM_TOKENS = 12_000  # seconds, as the greedy answer of this model ends nowhere


def test_streams_are_told_of_the_end(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template": TEMPLATE}
    path = write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q4_0, metadata=metadata, context_tokens=16384)
    asked: Any = {"model": "tiny", "messages": MESSAGES, "stream": True}
    with Serving([str(path), "--shutdown-s", "0", "--threads", "1"], tmp_path) as server:
        server.wait_healthy()
        claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        streams: list[tuple[Any, type[Exception]]] = [
            (claude.messages.create(**asked, max_tokens=NUM_TOKENS), anthropic.APIStatusError),
            (client.chat.completions.create(**asked, max_tokens=NUM_TOKENS), openai.APIError),
            (ollama.Client(server.url).chat(**asked, options={"num_predict": NUM_TOKENS}), ollama.ResponseError),
        ]
        for parts, _ in streams:
            assert next(iter(parts))
        server.process.send_signal(signal.SIGINT)
        for parts, error in streams:
            with pytest.raises(error, match="the server is shutting down"):
                list(parts)
        assert server.process.wait(30) == 0
