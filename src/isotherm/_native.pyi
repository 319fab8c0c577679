"""The native core: what native/bindings offers. Arrays are C-contiguous and, where not said otherwise, only read."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

def available_isas() -> list[str]:
    """Instruction sets that this processor can run, slowest first."""

def populate(data: NDArray[np.uint8]) -> bool:
    """Maps every page of `data` [n] now; False where the system cannot."""

def measure_read(isa: str, num_threads: int, buffer_bytes: int, num_rounds: int, round_s: float) -> float:
    """Bytes per second read from memory: the best round."""

def measure_int8(isa: str, num_threads: int, num_rounds: int, round_s: float) -> float:
    """Operations per second of int8 dot products in registers, the best round."""

def read_strings(buffer: bytes, start: int, count: int, max_bytes: int, strings: list[str]) -> int:
    """Appends length-prefixed UTF-8 strings until there are `count`; the offset after the last of them.

    Stops early, a little before one that is not sound.
    """

def find_unpaired(texts: Sequence[str]) -> int | None:
    """Index of the first text that is not two pieces with a space between."""

class TokenIndex:
    """Ids of tokens by text, in the order of the list. Raises UnicodeEncodeError where a text has a lone surrogate."""
    def __init__(self, texts: Sequence[str]) -> None: ...
    @property
    def num_repeats(self) -> int:
        """Tokens whose text an earlier one has, so that `find` does not know them."""

    def find(self, text: str) -> int | None: ...

class MergeTable:
    """Ranked merges of byte-level BPE. Any thread may use it."""
    def __init__(self, tokens: TokenIndex, merges: Sequence[str], byte_texts: Sequence[str], takes_words: bool) -> None:
        """merges: "left right", the first of two equal ones counts. byte_texts [256]: how tokens spell each byte.

        takes_words: a word that is a token is not merged. Raises ValueError for a merge that cannot be.
        """

    def encode(self, words: Sequence[str]) -> list[int]:
        """Ids of all words, one after another. A byte that is no token parts its neighbours and has no id."""

class GpuFacts:
    """One device of a driver."""

    platform: str
    name: str
    vendor: str
    driver: str
    architecture: str  # that CUDA C++ is compiled for; empty: kernels are OpenCL C
    is_gpu: bool
    shares_memory: bool
    has_dot_product: bool
    has_double: bool
    memory_bytes: int
    largest_buffer_bytes: int
    num_units: int
    max_lanes: int
    lacks: str

def list_gpus() -> list[GpuFacts]:
    """Every device of every driver. OpenCL's, then CUDA's. Raises DeviceNotFound where neither is there."""

class GpuBuffer:
    def __init__(self, index: int, /) -> None: ...
    @property
    def index(self) -> int: ...

class GpuDevice:
    """One device. Everything raises DeviceFailed, and what takes memory InsufficientMemory."""
    def __init__(self, index: int) -> None:
        """index: as `list_gpus` has it. Raises DeviceNotFound."""

    @property
    def facts(self) -> GpuFacts: ...
    def allocate(self, num_bytes: int, /) -> GpuBuffer: ...
    def release(self, buffer: GpuBuffer, /) -> None: ...
    def write(self, to: GpuBuffer, offset: int, data: NDArray[np.uint8], /) -> None: ...
    def read(self, source: GpuBuffer, offset: int, data: NDArray[np.uint8], /) -> None: ...
    def copy(self, source: GpuBuffer, to: GpuBuffer, num_bytes: int, /) -> None: ...
    def build(self, source: str, options: str, binary: bytes, /) -> int:
        """binary: what `binary` gave for them on this device and driver, or empty."""

    def binary(self, program: int, /) -> bytes: ...
    def kernel(self, program: int, name: str, arguments: list[int | float | GpuBuffer], /) -> int: ...
    def launch(self, kernel: int, groups: tuple[int, int, int], lanes: int, /) -> None: ...
    def finish(self) -> None: ...

class GpuProgram:
    """Steps for the GPU; native/runtime/gpu_program.h has the forms."""
    def __init__(self, device: GpuDevice, batch: GpuBuffer, head: GpuBuffer, num_states: int, /) -> None: ...
    def rope(self, table: NDArray[np.float32], /) -> None: ...
    def pages(self, state: int, buffer: GpuBuffer, /) -> None: ...
    def choice(self, kernel: int, lanes: int, out: GpuBuffer, row_words: int, most_kept: int, /) -> None: ...
    def step(
        self,
        launches: list[tuple[int, int, int, int, int, int, int]],
        uploads: list[tuple[int, GpuBuffer, int, int, int]],
        outputs: list[tuple[int, GpuBuffer, int, int, int]],
        downloads: list[tuple[int, GpuBuffer, int, int, int]],
        /,
    ) -> int: ...

class NormRef:
    """A norm by the index of its vector, -1 for none; bias: of a layer norm, -1 for an RMS norm."""
    def __init__(self, vector: int, eps: float, bias: int = -1) -> None: ...

class AttentionSpec:
    """Buffers, norms and shape of one attention step."""

    q: int
    k: int
    v: int
    out: int
    q_norm: NormRef
    k_norm: NormRef
    rope_table: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    state: int
    slot: int
    def __init__(self) -> None: ...

class ProgramBuilder:
    """Collects a program. What is added is named by the index that adding it gives; arrays are kept alive."""
    def __init__(self, max_tokens: int, max_head_rows: int) -> None: ...
    def buffer(self, width: int, /) -> int: ...
    def vector(self, values: NDArray[np.float32], /) -> int: ...
    def matrix(self, data: NDArray[np.uint8], types: list[str], rows: int, columns: int, /) -> int:
        """types: one, or two of a pair."""

    def rope_table(self, table: NDArray[np.float32], /) -> int:
        """[positions, dims]; may be filled later, before a position is used."""

    def pool(
        self, is_q8_0: bool, num_layers: int, num_pages: int, num_kv_heads: int, head_dim: int, window: int, /
    ) -> int:
        """window: of every layer's attention; 0: none."""

    def gpu(self, program: object, num_embeddings: int, num_positions: int, /) -> None:
        """program: a GpuProgram, for `device_step`."""

    def device_step(self, index: int, is_select: bool, /) -> None: ...
    def embed(self, matrix: int, scale: float, out: int, /) -> None: ...
    def embed_positions(self, x: int, matrix: int, first_row: int, out: int, /) -> None: ...
    def linear(
        self, x: int, norm: NormRef, projections: list[tuple[int, int, int]], residual: int, activation: str, /
    ) -> None:
        """projections: (matrix, bias vector or -1, out buffer). activation: a value of types.Activation, or ""."""

    def glu(self, x: int, norm: NormRef, matrix: int, activation: str, out: int, /) -> None: ...
    def up(
        self,
        x: int,
        norm: NormRef,
        gate: int,
        matrix: int,
        rows: NDArray[np.uint8],
        activation: str,
        out: int,
        /,
    ) -> None:
        """rows: of the matrix, as quantization/neurons.py has them; empty: all are computed."""

    def predicted(
        self,
        x: int,
        norm: NormRef,
        projection: tuple[int, int, int],
        rows: NDArray[np.uint8],
        activation: str,
        scores: int,
        threshold: float,
        /,
    ) -> None:
        """projection, activation: as of `linear`. rows: as of `up`, of the projection's matrix."""

    def trim(self, x: int, activation: str, thresholds: int, deviations: float, out: int, /) -> None:
        """thresholds: a vector, or -1."""

    def down(
        self,
        x: int,
        projection: tuple[int, int, int],
        residual: int,
        neurons: NDArray[np.uint8],
        form: tuple[bool, bool, bool, bool, int],
        /,
    ) -> None:
        """neurons, form: of quantization/neurons.py."""

    def route(self, logits: int, num_experts: int, num_used: int, out: int, /) -> None: ...
    def expert_glu(self, x: int, norm: NormRef, routes: int, matrix: int, activation: str, out: int, /) -> None:
        """matrix: the pairs of all experts, one after the other."""

    def expert_gate(self, x: int, norm: NormRef, routes: int, matrix: int, out: int, /) -> None: ...
    def expert_up(
        self,
        x: tuple[int, NormRef, int],
        gate: int,
        matrix: int,
        rows: NDArray[np.uint8],
        activation: str,
        out: int,
        /,
    ) -> None:
        """x: with its norm, and the routes. rows: as of `up`, of all experts."""

    def expert_down(
        self,
        x: int,
        routes: int,
        matrix: int,
        residual: int,
        neurons: NDArray[np.uint8],
        form: tuple[bool, bool, bool, bool, int],
        out: int,
        /,
    ) -> None:
        """neurons, form: as of `down`, expert after expert; empty: every neuron is computed."""

    def attention(self, spec: AttentionSpec, /) -> None: ...
    def add_norm(self, a: int, b: int, norm: NormRef, out: int, /) -> None: ...
    def select(self, x: int, out: int, /) -> None: ...

class Executor:
    """Runs a program. Takes the builder's content: the builder is spent."""
    def __init__(self, builder: ProgramBuilder, isa: str, num_threads: int) -> None: ...
    def run(
        self,
        token_ids: NDArray[np.int32],
        sequences: list[tuple[int, int, list[NDArray[np.int32]], bool]],
        logit_rows: NDArray[np.int32],
        /,
    ) -> bool:
        """sequences: (num_new, num_cached, page tables). Raises what a signal handler raised."""

    def head(self, first: int, logits: NDArray[np.float32], /) -> bool:
        """Writes logits [count, vocab_size]."""

    def shortlist(self, first: int, kept: NDArray[np.int32], out: NDArray[np.uint32], /) -> bool:
        """Writes a row of words for each of `kept`, as kernels/choice.cl has them."""

    def observe(
        self,
        token_ids: NDArray[np.int32],
        sequences: list[tuple[int, int, list[NDArray[np.int32]], bool]],
        logit_rows: NDArray[np.int32],
        stops: list[tuple[int, int]],
        look: Callable[[int, NDArray[np.float32]], None],
        /,
    ) -> bool:
        """`run`, and look(i, a copy of the buffer [rows, width]) behind each of the rising `stops` (step, buffer).

        Behind the selection of rows it is called for each block of them; what follows the last stop is not computed.
        """

    def read_page(self, group: int, page: int, out: NDArray[np.uint8], /) -> None:
        """Writes the page's bytes, of all layers, into `out`. Raises ValueError for another length."""

    def write_page(self, group: int, page: int, data: NDArray[np.uint8], /) -> None: ...
    @property
    def few_rows(self) -> int:
        """Rows of a batch of which neurons may be computed alone."""

    def set_most_active(self, step: int, num_rows: int, most_active: int, /) -> None: ...
    def time_neurons(self, step: int, num_rows: int, num_active: int, is_alone: bool, /) -> float:
        """Seconds of a step in which `num_active` neurons fire; no batch is computed meanwhile."""

    def read_weights(self) -> float:
        """Reads what a token needs of the weights and computes nothing; seconds."""

    @property
    def busy_s(self) -> float:
        """Seconds spent computing."""

    def start_log(self, capacity: int) -> None:
        """Threads write down what they do from here on, at most `capacity` marks each."""

    def stop_log(self) -> list[NDArray[np.int64]]:
        """By thread, int64 [marks, 2]: nanoseconds; step (low half) and phase. See runtime/step_log.h."""

class BadLogits(AssertionError): ...

class SamplingRules:
    """SamplingParams, checked."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_tokens: int
    logit_bias: list[tuple[int, float]]
    seed: int
    num_logprobs: int
    def __init__(self) -> None: ...

class Sampler:
    """See isotherm.engine.sampling.Sampler."""
    def __init__(self, rules: SamplingRules, vocab_size: int) -> None: ...
    @property
    def busy_s(self) -> float:
        """Wall time inside `sample` so far."""
    def sample(
        self,
        logits: NDArray[np.float32],
        history: NDArray[np.int32],
        position: int,
        sequence: int,
        allowed: NDArray[np.uint32] | None = None,
    ) -> tuple[int, float, list[tuple[int, float]]] | None:
        """(token id, log-probability, the likeliest); None where every token is banned."""

    @property
    def num_needed(self) -> int:
        """Logits that `sample_short` takes; 0: it cannot be used."""

    def sample_short(
        self,
        logits: NDArray[np.float32],
        ids: NDArray[np.int32],
        peak_and_total: tuple[float, float],
        position: int,
        sequence: int,
    ) -> tuple[int, float]:
        """(token id, log-probability), by the largest logits of a row."""
