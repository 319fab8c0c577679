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


@pytest.mark.parametrize("api", ["anthropic", "ollama", "openai"])
def test_a_stream_is_told_of_the_end(tiny: Path, tmp_path: Path, api: str) -> None:
    with isotherm.load(tiny, cache_bytes=0) as model:
        assert model.generate(MESSAGES, max_tokens=NUM_TOKENS).num_tokens == NUM_TOKENS, "it must take long"
    with Serving([str(tiny), "--shutdown-s", "0", "--threads", "1"], tmp_path) as server:
        server.wait_healthy()
        parts: Any
        error: type[Exception]
        match api:
            case "anthropic":
                claude = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
                parts = claude.messages.create(model="tiny", messages=MESSAGES, max_tokens=NUM_TOKENS, stream=True)
                error = anthropic.APIStatusError
            case "ollama":
                options = {"num_predict": NUM_TOKENS}
                parts = ollama.Client(server.url).chat("tiny", MESSAGES, stream=True, options=options)
                error = ollama.ResponseError
            case _:
                client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
                parts = client.chat.completions.create(
                    model="tiny", messages=MESSAGES, max_tokens=NUM_TOKENS, stream=True
                )
                error = openai.APIError
        first = next(iter(parts))
        assert first
        server.process.send_signal(signal.SIGINT)
        with pytest.raises(error, match="the server is shutting down"):
            list(parts)
        assert server.process.wait(30) == 0
