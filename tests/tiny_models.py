"""Small random models in GGUF, written by the `gguf` package: same families, same types, nothing to download.

    write_tiny(tmp_path / "tiny.gguf", "llama", QuantType.Q4_K)

The weights are random, so the answers are noise, but the same noise for the same arguments.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from isotherm.quantization.layouts import BLOCKS
from isotherm.types import QuantType

FAMILIES = ("llama", "bamboo", "qwen2", "qwen3", "qwen3moe", "gemma3", "opt", "falcon")

_TEXT_MERGES = "Ġ t|h e|i n|Ġ a|o n|r e|e r|n d|Ġt he|a n|i s|o u|Ġ w|in g|Ġa nd|l l|o r|Ġ s|Ġ o|he r"
_PIECES = "▁t|he|in|▁a|on|re|er|nd|▁the|an|is|ou|▁w|ing|▁and|ll|or|▁s|▁o|▁th|and|▁▁|▁in|▁is"


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny model; every one may be given to `write_tiny` by name."""

    num_layers: int = 2
    hidden_size: int = 256  # a multiple of 256, so that K-quants fit; 64 will do for the others
    ffn_size: int = 512
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64  # heads need not fill the hidden size
    vocab_size: int = 330  # at least 300; not a multiple of 16 on purpose
    context_tokens: int = 512
    sliding_window: int = 16  # gemma3
    tied_head: bool = True
    vocab: str = ""  # "bpe" or "spm"; by default spm for gemma3, bpe for the others
    llama3_rope: bool = False  # adds rope_freqs.weight
    rope_scaling: float = 1.0  # linear
    num_experts: int = 0  # llama: as Mixtral; qwen3moe has 6 where this is 0
    num_experts_used: int = 2
    shared_norm: bool = False  # falcon: one norm a layer, as in the 7B; else two, as in the 40B
    seed: int = 0


def write_tiny(
    path: Path,
    family: str,
    quant_type: QuantType,
    *,
    metadata: Mapping[str, Any] | None = None,
    types: Mapping[str, QuantType] | None = None,
    **sizes: Any,
) -> Path:
    """Write a model of `family` with every matrix in `quant_type`; returns `path`.

    `types`: of the matrices that are to have another one, by the part of the name before `.weight`, "attn_q" say;
    routers of experts are F32 otherwise.
    `sizes` are fields of TinySizes; `metadata` adds keys or replaces those written by default, None leaves one out.
    """
    assert family in FAMILIES
    size = replace(TinySizes(), **sizes)
    if family == "qwen3moe" and not size.num_experts:
        size = replace(size, num_experts=6)
    if not size.vocab:
        size = replace(size, vocab="spm" if family == "gemma3" else "bpe")
    writer = gguf.GGUFWriter(path, family)
    values = {**_model_metadata(family, size, quant_type), **_vocab_metadata(size), **(metadata or {})}
    for key, value in values.items():
        if value is not None:
            add_value(writer, key, value)
    for name, shape in _tensor_shapes(family, size).items():
        stored = {"ffn_gate_inp": QuantType.F32, **(types or {})}.get(name.split(".")[-2], quant_type)
        write_tensor(writer, name, shape, stored, size.seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(quant_type: QuantType, shape: tuple[int, int], seed: object = 0) -> NDArray[np.uint8]:
    """Rows of `quant_type` as bytes [rows, row_bytes], decoding to values of about 1 / sqrt(columns)."""
    rows, columns = shape
    rng = np.random.default_rng(abs(hash_text(repr(seed))))
    if quant_type in (QuantType.Q4_K, QuantType.Q5_K, QuantType.Q6_K):
        blocks = _random_k_blocks(quant_type, rows * columns // 256, columns**-0.5, rng)
        return blocks.reshape(rows, quant_type.row_bytes(columns))
    if quant_type not in _QUANTISED_BY_GGUF:
        return _random_scaled_rows(quant_type, shape, columns**-0.5, rng)
    values = (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float32)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[quant_type.value]).view(np.uint8)


def write_tensor(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], quant_type: QuantType, seed: int = 0
) -> None:
    """Add a random tensor: matrices, or stacks of them, in `quant_type`, vectors (norms, biases, factors) in F32."""
    if len(shape) > 1:
        *stack, columns = shape
        assert columns % quant_type.block_elements == 0, f"{name} {shape} does not fit {quant_type.value}"
        data = random_blocks(quant_type, (math.prod(stack), columns), (name, seed)).reshape(*stack, -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[quant_type.value])
        return
    noise = np.random.default_rng(hash_text(f"{name} {seed}")).standard_normal(shape)
    if name == "rope_freqs.weight":
        values = np.linspace(1.0, 8.0, shape[0])
    elif name.endswith(".bias"):
        values = 0.1 * noise
    else:
        values = 1.0 + 0.1 * noise
    writer.add_tensor(name, values.astype(np.float32))


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata value: bool, int (uint32), float (float32), str, or a list of one of these."""
    kind = gguf.GGUFValueType
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_key_value(key, value, kind.UINT32 if value >= 0 else kind.INT32)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_key_value(key, value, kind.STRING)  # add_string leaves out what is empty
    else:
        writer.add_array(key, list(value))


def hash_text(text: str) -> int:
    """A seed from a text that is the same in every run (`hash` is not)."""
    return int.from_bytes(text.encode()[-64:], "little") % (2**63 - 25)


def byte_alphabet() -> list[str]:
    """The 256 characters of byte-level BPE, by byte: printable bytes as themselves, the others from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) if byte in kept else chr(256 + moved.index(byte)) for byte in range(256)]


def _model_metadata(family: str, size: TinySizes, quant_type: QuantType) -> dict[str, Any]:
    values: dict[str, Any] = {
        "general.name": f"Tiny {family}",
        "general.license": "cc0-1.0",
        "general.file_type": _FILE_TYPES[quant_type],
        f"{family}.context_length": size.context_tokens,
        f"{family}.embedding_length": size.hidden_size,
        f"{family}.block_count": size.num_layers,
        f"{family}.feed_forward_length": size.ffn_size,
        f"{family}.attention.head_count": size.num_heads,
        f"{family}.attention.head_count_kv": size.num_kv_heads,
        f"{family}.attention.key_length": size.head_dim,
        f"{family}.attention.value_length": size.head_dim,
    }
    if family == "opt":
        return values | {"opt.attention.layer_norm_epsilon": 1e-5}
    eps_key = "layer_norm_epsilon" if family == "falcon" else "layer_norm_rms_epsilon"
    values |= {
        f"{family}.attention.{eps_key}": 1e-6,
        f"{family}.rope.dimension_count": size.head_dim,
        f"{family}.rope.freq_base": 10000.0 if family in ("llama", "bamboo", "falcon") else 1000000.0,
    }
    if size.num_experts:
        values |= {f"{family}.expert_count": size.num_experts, f"{family}.expert_used_count": size.num_experts_used}
    if family == "qwen3moe":  # whose FFN size is nobody's
        values |= {"qwen3moe.expert_feed_forward_length": size.ffn_size, "qwen3moe.feed_forward_length": 6144}
    if family == "gemma3":
        values["gemma3.attention.sliding_window"] = size.sliding_window
    if size.rope_scaling != 1.0:
        values[f"{family}.rope.scaling.type"] = "linear"
        values[f"{family}.rope.scaling.factor"] = size.rope_scaling
    return values


def _vocab_metadata(size: TinySizes) -> dict[str, Any]:
    normal, unknown, control, byte, unused = 1, 2, 3, 6, 5
    if size.vocab == "bpe":
        merges = _TEXT_MERGES.split("|")
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        tokens = special + byte_alphabet() + [merge.replace(" ", "") for merge in merges]
        types = [control] * len(special) + [normal] * (len(tokens) - len(special))
        values: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"}
        values |= {"tokenizer.ggml.merges": merges, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 0}
        values |= {"tokenizer.ggml.add_bos_token": False}
    else:
        special = ["<unk>", "<s>", "</s>"]
        letters = ["▁", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
        pieces = _PIECES.split("|")
        tokens = special + [f"<0x{code:02X}>" for code in range(256)] + pieces + letters
        types = [unknown, control, control] + [byte] * 256 + [normal] * (len(pieces) + len(letters))
        values = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
        values |= {"tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True}
    num_unused = size.vocab_size - len(tokens)
    assert num_unused >= 0, f"vocab_size must be at least {len(tokens)}"
    tokens += [f"[PAD{index}]" for index in range(num_unused)]
    types += [unused] * num_unused
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if size.vocab == "spm":
        values["tokenizer.ggml.scores"] = [-float(index) for index in range(len(tokens))]
    return values


def _tensor_shapes(family: str, size: TinySizes) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes [rows, columns] of every tensor the family has."""
    hidden, q_rows, kv_rows = size.hidden_size, size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q_rows, hidden),
        "attn_k.weight": (kv_rows, hidden),
        "attn_v.weight": (kv_rows, hidden),
        "attn_output.weight": (hidden, q_rows),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (size.ffn_size, hidden),
        "ffn_up.weight": (size.ffn_size, hidden),
        "ffn_down.weight": (hidden, size.ffn_size),
    }
    if family == "qwen2":
        layer |= {"attn_q.bias": (q_rows,), "attn_k.bias": (kv_rows,), "attn_v.bias": (kv_rows,)}
    if family in ("gemma3", "qwen3", "qwen3moe"):
        layer |= {"attn_q_norm.weight": (size.head_dim,), "attn_k_norm.weight": (size.head_dim,)}
    if size.num_experts:
        layer |= {"ffn_gate_inp.weight": (size.num_experts, hidden)}
        for part in ("gate", "up", "down"):
            layer[f"ffn_{part}_exps.weight"] = (size.num_experts, *layer.pop(f"ffn_{part}.weight"))
    if family == "gemma3":
        layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    if family == "falcon":
        layer = {name: layer[name] for name in ("attn_output.weight", "ffn_up.weight", "ffn_down.weight")}
        layer |= {"attn_qkv.weight": (q_rows + 2 * kv_rows, hidden)}
        norms = ("attn_norm",) if size.shared_norm else ("attn_norm", "attn_norm_2")
        layer |= {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}
    if family == "opt":
        del layer["ffn_gate.weight"]
        layer |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in layer.items()}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (size.vocab_size, hidden)}
    if family == "opt":
        shapes["position_embd.weight"] = (size.context_tokens + 2, hidden)
    if family in ("opt", "falcon"):
        shapes["output_norm.bias"] = (hidden,)
    for index in range(size.num_layers):
        shapes |= {f"blk.{index}.{name}": shape for name, shape in layer.items()}
    shapes["output_norm.weight"] = (hidden,)
    if not size.tied_head:
        shapes["output.weight"] = (size.vocab_size, hidden)
    if size.llama3_rope:
        shapes["rope_freqs.weight"] = (size.head_dim // 2,)
    return shapes


def _random_k_blocks(
    quant_type: QuantType, num_blocks: int, deviation: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Random bytes with the block's half-precision scales set so that values have about `deviation`."""
    blocks = rng.integers(0, 256, (num_blocks, quant_type.block_bytes), dtype=np.uint8)
    jitter = rng.uniform(0.5, 1.5, num_blocks)
    if quant_type is QuantType.Q6_K:
        # value = d * scale (s8) * (code - 32); d comes last
        blocks[:, 192:208] = rng.integers(-64, 65, (num_blocks, 16)).astype(np.int8).view(np.uint8)
        blocks[:, 208:210] = _half(jitter * deviation / 684)
    else:
        # value = d * scale (0..63) * code - dmin * min (0..63), and their means cancel
        mean_code, factor = (7.5, 250) if quant_type is QuantType.Q4_K else (15.5, 520)
        blocks[:, 0:2] = _half(jitter * deviation / factor)
        blocks[:, 2:4] = _half(jitter * deviation / factor * mean_code)
    return blocks


# The gguf package reads all types, and writes these.
_QUANTISED_BY_GGUF = {
    *(QuantType.F32, QuantType.F16, QuantType.BF16, QuantType.Q4_0, QuantType.Q4_1, QuantType.Q5_0, QuantType.Q5_1),
    *(QuantType.Q8_0, QuantType.TQ1_0, QuantType.TQ2_0, QuantType.MXFP4),
}


def _random_scaled_rows(
    quant_type: QuantType, shape: tuple[int, int], deviation: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Random bytes under float16 scales, set by what the gguf package reads with a scale of 1."""
    raw = rng.integers(0, 256, (shape[0], quant_type.row_bytes(shape[1])), dtype=np.uint8)
    blocks = raw.view(BLOCKS[quant_type])
    if quant_type is QuantType.NVFP4:
        blocks["e4m3"] = rng.integers(1, 0x20, blocks["e4m3"].shape)  # up to 2**-4
        return raw
    _set_scales(blocks, np.ones(blocks.shape))
    values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[quant_type.value])
    _set_scales(blocks, rng.uniform(0.5, 1.5, blocks.shape) * deviation / values.std())
    return raw


def _set_scales(blocks: NDArray[np.void], scales: NDArray[np.float64]) -> None:
    bits = scales.astype("<f2").view("<u2")
    if "d" in (blocks.dtype.names or ()):
        blocks["d"] = bits
    else:  # IQ1_M
        blocks["scales"] = (blocks["scales"] & 0x0FFF) | (bits[..., None] >> np.arange(0, 16, 4) & 15) << 12
    if "dmin" in (blocks.dtype.names or ()):
        blocks["dmin"] = (scales * 1.5).astype("<f2").view("<u2")


def _half(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    return values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _file_types() -> Iterable[tuple[QuantType, int]]:
    for quant_type in QuantType:
        for name in (
            f"MOSTLY_{quant_type.value}",
            f"ALL_{quant_type.value}",
            f"MOSTLY_{quant_type.value}_M",
            f"MOSTLY_{quant_type.value}_MOE",
        ):
            if name in gguf.LlamaFileType.__members__:
                yield quant_type, gguf.LlamaFileType[name].value


_FILE_TYPES = dict(_file_types())
