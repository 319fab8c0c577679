"""An open model file as models and packing see it: canonical names, canonical row orders, whatever the format."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from isotherm.errors import ModelFileError
from isotherm.formats import powerinfer
from isotherm.formats.gguf import GgufFile, open_gguf
from isotherm.formats.gguf_tables import FILE_TYPES
from isotherm.formats.model_config import read_config
from isotherm.formats.model_tensors import read_tensors
from isotherm.formats.tensor_source import TensorSource
from isotherm.formats.tokenizer_spec import read_tokenizer
from isotherm.types import ModelConfig, TokenizerSpec

MAX_FILE_TYPE = (1 << 32) - 1


@dataclass(frozen=True)
class Checkpoint:
    """A checked model file, open until `close`; a context manager.

    Tensors go by canonical names: `embed`, `final_norm`, `head` (absent where tied to embed) and, per layer i,
    `layers.{i}.` with attn_norm, q, k, v, q_bias, k_bias, v_bias, o, q_norm, k_norm, post_attn_norm, ffn_norm, gate,
    up, down, post_ffn_norm, as far as the family has them; a mixture of experts also `router`, its gate, up and down
    being those of all experts, one below the other; OPT also has `positions`, and `_bias` behind the name of
    every other vector and matrix, Falcon behind that of every norm. Rotary pairs of q and k stand in halves.
    """

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorSource]
    tokenizer: TokenizerSpec
    identity: str  # hex; differs where any byte of the model may differ
    quantization: str  # Q4_K_M and the like
    num_parameters: int
    metadata: Mapping[str, bool | int | float | str]  # the file's own keys (general.license, ...), for a person to read
    _file: GgufFile = field(repr=False)

    @property
    def num_active_parameters(self) -> int:
        """Those that compute a token: of experts the ones that it uses."""
        experts = self.config.experts
        if experts is None:
            return self.num_parameters
        in_experts = sum(
            tensor.shape[0] * tensor.shape[1]
            for name, tensor in self.tensors.items()
            if name.endswith((".gate", ".up", ".down"))
        )
        return self.num_parameters - in_experts // experts.num_experts * (experts.num_experts - experts.num_used)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, in the types they are read as."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_checkpoint(path: Path | str, notify: Callable[[str], None] = lambda _: None) -> Checkpoint:
    """Open the GGUF model at `path`, any part of it where it is split, and check all but the weights' values.

    notify: hears what of the file is read as something else, and what is not used.
    Raises ModelNotFound, ModelFileError (damaged or contradictory) and UnsupportedModel (sound, but not for us).
    """
    file = open_gguf(path)
    try:
        checkpoint = _read_checkpoint(file)
        for text in powerinfer.notices(file):
            notify(text)
        return checkpoint
    except BaseException:
        file.close()
        raise


def _read_checkpoint(file: GgufFile) -> Checkpoint:
    config = read_config(file)
    tensors = read_tensors(file, config)
    tokenizer = read_tokenizer(file.metadata, powerinfer.default_pretokenizer(file, config.family))
    if len(tokenizer.tokens) != config.vocab_size:
        raise ModelFileError(
            f"{file.path}: the tokenizer has {len(tokenizer.tokens)} tokens and token_embd.weight {config.vocab_size} "
            "rows, which must be equal"
        )
    return Checkpoint(
        path=file.path,
        config=config,
        tensors=MappingProxyType(tensors),
        tokenizer=tokenizer,
        identity=file.identity.hex(),
        quantization=_quantization_label(file, tensors),
        num_parameters=sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors.values()),
        metadata=MappingProxyType(file.metadata.scalars()),
        _file=file,
    )


def _quantization_label(file: GgufFile, tensors: Mapping[str, TensorSource]) -> str:
    """The mix the writer named, or else the type that most bytes are in."""
    key = "general.file_type"
    file_type = file.metadata.integer(key, low=0, high=MAX_FILE_TYPE) if file.metadata.has(key) else None
    if file_type in FILE_TYPES:
        return FILE_TYPES[file_type]
    num_bytes: Counter[str] = Counter()
    for tensor in tensors.values():
        num_bytes[tensor.quant_type.value] += tensor.num_bytes
    return num_bytes.most_common(1)[0][0]
