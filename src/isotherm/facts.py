"""What is known before anything is decided."""

from dataclasses import dataclass
from pathlib import Path

from isotherm.types import ModelConfig


@dataclass(frozen=True)
class DeviceFacts:
    """One processor and its memory, as isotherm.probe measured them."""

    cpu_name: str
    num_cores: int  # physical cores that this process may use
    memory_bytes: int  # free for this process, within the limits of its container
    isa: str
    read_bytes_per_s: float  # from memory, one sequential stream per thread
    int8_ops_per_s: float  # a multiply-add is two


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that a loaded model takes once all of its context is in use."""

    weights_bytes: int
    kv_bytes: int
    work_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.work_bytes


@dataclass(frozen=True)
class PlacementFacts:
    """What of a model a GPU computes: its last layers, and the head."""

    device: str  # as --device names it
    name: str
    num_layers: int
    has_embedding: bool
    num_bytes: int  # weights, KV pages and work buffers
    token_bytes: int  # weights that one decoded token reads there

    def text(self, num_layers: int) -> str:
        """num_layers: of the model."""
        layers = (
            f"all {num_layers} layers"
            if self.num_layers == num_layers
            else f"the last {self.num_layers} of {num_layers} layers"
        )
        parts = ["the embedding", layers, "the head"] if self.has_embedding else [layers, "the head"]
        return f"{self.device} ({self.name}): {', '.join(parts[:-1])} and {parts[-1]}"


@dataclass(frozen=True)
class ModelFacts:
    """What a loaded model is and how it runs."""

    name: str
    path: Path
    config: ModelConfig
    quantization: str  # Q4_K_M and the like
    num_parameters: int
    file_bytes: int
    token_bytes: int  # weights that one decoded token reads
    token_ops: int  # integer operations of one token's matmuls, without the head
    backend: str
    isa: str
    num_threads: int
    parallel: int  # answers that are computed together
    wanted_context_tokens: int  # what memory may have cut
    memory: MemoryForecast
    load_s: float
    placement: PlacementFacts | None = None  # None: the CPU computes all
