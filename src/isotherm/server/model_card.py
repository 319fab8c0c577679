"""What a model file says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelCard:
    """metadata: the file's own keys with one value each (general.license, ...). digest: differs where the file does."""

    family: str
    num_parameters: int
    quantization: str
    size_bytes: int
    digest: str
    modified_at: float  # seconds since the epoch
    chat_template: str | None
    metadata: Mapping[str, bool | int | float | str]
