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
class GpuDeviceFacts:
    """One device of a driver, OpenCL's or CUDA's, as it says itself and as it was measured."""

    device: str  # as --device names it
    name: str
    driver: str  # and its version
    is_gpu: bool  # not a CPU that poses as a device
    shares_memory: bool  # with the CPU
    memory_bytes: int
    num_units: int
    complaint: str  # why it cannot be used; empty: it can
    limits: "GpuLimits | None"  # None: it cannot be used


@dataclass(frozen=True)
class GpuLimits:
    """The best that a GPU has shown."""

    copy_bytes_per_s: float  # in its memory, what is read and what is written both counted
    int8_ops_per_s: float  # dot products of four bytes; a multiply-add is two
    launch_s: float  # of a kernel that does nothing, many in a row


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
    token_ops: int  # integer operations there of one token's matmuls, without the head
    num_launches: int  # of kernels, for one decoded token

    def text(self, num_layers: int) -> str:
        """num_layers: of the model."""
        parts = ["the embedding"] if self.has_embedding else []
        if self.num_layers:
            some = f"the last {self.num_layers} of {num_layers} layers"
            parts.append(f"all {num_layers} layers" if self.num_layers == num_layers else some)
        whole = " and ".join([*([", ".join(parts)] if parts else []), "the head"])
        return f"{self.device} ({self.name}): {whole}"


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
