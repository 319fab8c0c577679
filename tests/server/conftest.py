"""One server for all tests that only ask it something."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import Serving
from tiny_models import write_tiny

import isotherm
from isotherm.text import TextGenerator
from isotherm.types import QuantType

# Answers in words, whatever the weights: enough of a chat for shapes and counts.
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor -%}
{% if add_generation_prompt %}<assistant>{% endif %}"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny.gguf"
    return write_tiny(path, "llama", QuantType.Q4_0, metadata={"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="session")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving([str(tiny), "--threads", "2"], tmp_path_factory.mktemp("home")) as running:
        yield running.wait_healthy()


@pytest.fixture(scope="session")
def client(server: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def model(tiny: Path) -> Iterator[TextGenerator]:
    """The model of `server`, without one: what answers are held against."""
    with isotherm.load(tiny, cache_bytes=0) as loaded:
        yield loaded
