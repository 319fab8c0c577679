"""An answer that fails after its first part says so, in the words of each API."""

import signal
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from serving import Serving

import isotherm

MESSAGES: Any = [{"role": "user", "content": "the rain in spain"}]
NUM_TOKENS = 450


def test_streams_are_told_of_the_end(tiny: Path, tmp_path: Path) -> None:
    with isotherm.load(tiny, cache_bytes=0) as model:
        assert model.generate(MESSAGES, max_tokens=NUM_TOKENS).num_tokens == NUM_TOKENS, "it must take long"
    asked: Any = {"model": "tiny", "messages": MESSAGES, "stream": True}
    with Serving([str(tiny), "--shutdown-s", "0", "--threads", "1"], tmp_path) as server:
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
