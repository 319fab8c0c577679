"""Writes a GGUF of random weights, shaped like a llama, Mixtral, Qwen3-MoE, opt or falcon: right for speed and memory,
never for quality.

    python benchmarks/synthetic.py --shape 7b --type Q4_0 7b.gguf
    python benchmarks/synthetic.py --shape mixtral --type Q4_K --layers 8 mixtral.gguf
    python benchmarks/synthetic.py --shape 7b --type Q4_0 --activation relu --active 0.1 relu-7b.gguf
    python benchmarks/synthetic.py --shape mixtral --layers 4 --activation drelu --active 0.05 turbosparse.gguf

Needs the `gguf` package. Weights are streamed, so that a file may be larger than memory. The tokenizer is byte-level
BPE with a token for each byte, so that it takes any text; SentencePiece is not read by every peer.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from planted import Planted, plant, planted_embedding, planted_vector, put_half

_STEP_BYTES = 64 << 20  # of a tensor made at once


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int = 32000
    context_tokens: int = 4096
    num_experts: int = 0  # ffn_size is that of one of them
    num_experts_used: int = 0
    wide_head_dim: int | None = None  # where heads do not fill the hidden size
    family: str = "llama"  # or qwen3moe, or opt; or falcon, like the 7B: one norm a layer

    @property
    def head_dim(self) -> int:
        return self.wide_head_dim or self.hidden_size // self.num_heads


SHAPES = {
    "tiny": Shape(2, 256, 512, 4, 2, vocab_size=512, context_tokens=512),  # for trying out the benchmarks
    "1b": Shape(16, 2048, 8192, 32, 8),
    "3b": Shape(28, 3072, 8192, 24, 8),
    "7b": Shape(32, 4096, 11008, 32, 32),
    "13b": Shape(40, 5120, 13824, 40, 40),
    "bamboo-7b": Shape(32, 4096, 14336, 32, 8),  # with --activation drelu
    "tiny-mixtral": Shape(2, 256, 512, 4, 2, vocab_size=512, context_tokens=512, num_experts=4, num_experts_used=2),
    "mixtral": Shape(32, 4096, 14336, 32, 8, num_experts=8, num_experts_used=2),  # 8x7B
    "tiny-qwen3moe": Shape(2, 256, 256, 4, 2, 512, 512, 16, 4, wide_head_dim=128, family="qwen3moe"),
    "qwen3-30b-a3b": Shape(48, 2048, 768, 32, 4, 151936, 40960, 128, 8, wide_head_dim=128, family="qwen3moe"),
    "opt-tiny": Shape(2, 256, 1024, 4, 4, vocab_size=512, context_tokens=512, family="opt"),
    "opt-6.7b": Shape(32, 4096, 16384, 32, 32, vocab_size=50272, context_tokens=2048, family="opt"),
    "falcon-tiny": Shape(2, 256, 1024, 4, 1, vocab_size=512, context_tokens=512, family="falcon"),
    "falcon-7b": Shape(32, 4544, 18176, 71, 1, vocab_size=65024, context_tokens=2048, family="falcon"),
}


@dataclass(frozen=True)
class BlockScales:
    """Where a block keeps its float16 scales, and what they are for weights of deviation 1.

    weight = scale * code - minimum, `scale` being further multiplied by a 6-bit integer in K-quants.
    """

    offset: int
    scale: float
    minimum_offset: int | None = None
    minimum: float = 0.0


# Codes are uniform random bits. Their deviation is 2**bits / sqrt(12) and their mean, which the minimum cancels where
# the type has one, (2**bits - 1) / 2. In Q4_K and Q5_K both are multiplied by integers of 0..63, mean square 36.4**2;
# in Q6_K the integers are signed bytes, 73.9.
SCALES = {
    "Q4_0": BlockScales(0, 1 / 4.6),
    "Q4_1": BlockScales(0, 1 / 4.6, 2, -7.5 / 4.6),
    "Q5_0": BlockScales(0, 1 / 9.2),
    "Q5_1": BlockScales(0, 1 / 9.2, 2, -15.5 / 9.2),
    "Q8_0": BlockScales(0, 1 / 73.9),
    "Q4_K": BlockScales(0, 1 / (36.4 * 8.7), 2, 7.5 / (36.4 * 8.7)),
    "Q5_K": BlockScales(0, 1 / (36.4 * 17.9), 2, 15.5 / (36.4 * 17.9)),
    "Q6_K": BlockScales(208, 1 / (73.9 * 18.5)),
}


def write_synthetic(path: Path, shape: Shape, type_name: str, seed: int = 0, planted: Planted | None = None) -> None:
    """Writes the model to `path`, every matrix in `type_name`, a key of SCALES; the same bytes for the same seed.

    planted: in Q4_0 only; embeddings are F16 then, as their constant channel is large.
    """
    assert planted is None or type_name == "Q4_0"
    quant_type = gguf.GGMLQuantizationType[type_name]
    _, block_bytes = gguf.GGML_QUANT_SIZES[quant_type]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, shape.family)
    _add_metadata(writer, shape, type_name)
    if planted and shape.family != "opt":  # whose activation is a ReLU
        writer.add_string("isotherm.activation", planted.activation)
    _add_vocabulary(writer, shape.vocab_size)
    tensors = _tensors(shape)
    for name, dims in tensors.items():
        if len(dims) == 1:
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * dims[0])
        elif _is_router(name):
            writer.add_tensor_info(name, dims, np.dtype(np.float32), 4 * math.prod(dims))
        elif planted and name == "token_embd.weight":
            writer.add_tensor_info(name, dims, np.dtype(np.float16), 2 * dims[0] * dims[1])
        else:
            byte_dims = (*dims[:-1], _row_bytes(quant_type, dims[-1]))  # the writer turns bytes back into elements
            writer.add_tensor_info(name, byte_dims, np.dtype(np.uint8), math.prod(byte_dims), raw_dtype=quant_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    alignment = writer.data_alignment
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % alignment))
        for name, dims in tensors.items():
            if planted and name == "token_embd.weight":
                pieces: Iterator[NDArray[Any]] = planted_embedding(planted, dims, rng, is_gated=shape.family != "opt")
            elif len(dims) == 1:
                plain = np.full(dims[0], 0 if name.endswith(".bias") else 1, np.float32)
                pieces = iter([planted_vector(name, dims[0], planted) if planted else plain])
            elif _is_router(name):
                router = rng.standard_normal(dims, np.float32) / np.float32(math.sqrt(dims[1]))
                router[:, 0] *= planted is None  # the constant channel would choose the same experts for all tokens
                pieces = iter([router])
            else:
                pieces = _matrix(type_name, block_bytes, quant_type, dims, rng)
            for start, piece in _numbered(pieces):
                if planted and piece.dtype == np.uint8:
                    plant(name, dims, piece, start, planted)
                piece.tofile(file)
            file.write(bytes(-file.tell() % alignment))


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """GGUF names with rows and columns, in the order of the file."""
    hidden, q_rows, kv_rows = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (q_rows, hidden),
        "attn_k.weight": (kv_rows, hidden),
        "attn_v.weight": (kv_rows, hidden),
        "attn_output.weight": (hidden, q_rows),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (shape.ffn_size, hidden),
        "ffn_up.weight": (shape.ffn_size, hidden),
        "ffn_down.weight": (hidden, shape.ffn_size),
    }
    last: dict[str, tuple[int, ...]] = {"output_norm.weight": (hidden,), "output.weight": (shape.vocab_size, hidden)}
    if shape.num_experts:
        layer["ffn_gate_inp.weight"] = (shape.num_experts, hidden)
        for part in ("ffn_gate", "ffn_up", "ffn_down"):
            layer[f"{part}_exps.weight"] = (shape.num_experts, *layer.pop(f"{part}.weight"))
    if shape.family == "qwen3moe":
        layer |= {"attn_q_norm.weight": (shape.head_dim,), "attn_k_norm.weight": (shape.head_dim,)}
    if shape.family == "falcon":
        kept = ("attn_norm.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
        layer = {"attn_norm.bias": (hidden,), **{name: layer[name] for name in kept}}
        layer["attn_qkv.weight"] = (q_rows + 2 * kv_rows, hidden)
        last["output_norm.bias"] = (hidden,)
    if shape.family == "opt":
        del layer["ffn_gate.weight"]
        layer |= {name.replace(".weight", ".bias"): dims[:1] for name, dims in layer.items()}
        last["output_norm.bias"] = (hidden,)
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab_size, hidden)}
    if shape.family == "opt":
        tensors["position_embd.weight"] = (shape.context_tokens + 2, hidden)
    for index in range(shape.num_layers):
        tensors |= {f"blk.{index}.{name}": dims for name, dims in layer.items()}
    return tensors | last


def _is_router(name: str) -> bool:
    return name.endswith("ffn_gate_inp.weight")


def _numbered(pieces: Iterator[NDArray[Any]]) -> Iterator[tuple[int, NDArray[Any]]]:
    """Each piece with the number of rows, or blocks, before it."""
    start = 0
    for piece in pieces:
        yield start, piece
        start += len(piece)


def _matrix(
    type_name: str,
    block_bytes: int,
    quant_type: gguf.GGMLQuantizationType,
    dims: tuple[int, ...],
    rng: np.random.Generator,
) -> Iterator[NDArray[np.uint8]]:
    """Blocks of random codes whose weights have a deviation of 1 / sqrt(columns), a piece at a time."""
    *stack, columns = dims
    num_blocks = math.prod(stack) * _row_bytes(quant_type, columns) // block_bytes
    fields, deviation = SCALES[type_name], 1 / math.sqrt(columns)
    step = _STEP_BYTES // block_bytes
    for start in range(0, num_blocks, step):
        count = min(step, num_blocks - start)
        blocks = np.frombuffer(rng.bytes(count * block_bytes), np.uint8).reshape(count, block_bytes).copy()
        put_half(blocks, fields.offset, fields.scale * deviation)
        if fields.minimum_offset is not None:
            put_half(blocks, fields.minimum_offset, fields.minimum * deviation)
        yield blocks


def _row_bytes(quant_type: gguf.GGMLQuantizationType, num_columns: int) -> int:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[quant_type]
    if num_columns % block_elements:
        raise SystemExit(f"rows of {num_columns} columns are no multiple of {block_elements}: take another type")
    return num_columns // block_elements * block_bytes


def _add_metadata(writer: gguf.GGUFWriter, shape: Shape, type_name: str) -> None:
    writer.add_name("synthetic")
    writer.add_file_type(_file_type(type_name))
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.ffn_size)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    if shape.family in ("falcon", "opt"):
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    if shape.wide_head_dim:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
    if shape.num_experts:
        writer.add_expert_count(shape.num_experts)
        writer.add_expert_used_count(shape.num_experts_used)
    if shape.family == "qwen3moe":
        writer.add_expert_feed_forward_length(shape.ffn_size)
    writer.add_vocab_size(shape.vocab_size)


def _file_type(type_name: str) -> int:
    names = (f"MOSTLY_{type_name}", f"MOSTLY_{type_name}_M")
    return next(int(gguf.LlamaFileType[name]) for name in names if name in gguf.LlamaFileType.__members__)


def _add_vocabulary(writer: gguf.GGUFWriter, vocab_size: int) -> None:
    kind = gguf.TokenType
    alphabet = _byte_alphabet()
    tokens = ["<|endoftext|>", *alphabet, alphabet[ord("a")] * 2]
    types = [kind.CONTROL, *[kind.NORMAL] * 257]
    num_words = vocab_size - len(tokens)
    tokens += [f"word{index}" for index in range(num_words)]  # no merge leads there
    types += [kind.NORMAL] * num_words
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["a a"])  # engines want at least one
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)


def _byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE (GPT-2): printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + moved.index(byte)) for byte in range(256)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--type", choices=SCALES, default="Q4_0", dest="type_name")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape has")
    parser.add_argument(
        "--activation", choices=("relu", "relu_squared", "drelu"), help="plants neurons that fire seldom"
    )
    parser.add_argument("--active", type=float, default=0.1, help="mean share of them that fire; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, num_layers=options.layers)
    planted = Planted(options.activation, options.active) if options.activation else None
    if planted and options.type_name != "Q4_0":
        parser.error("--activation is for --type Q4_0")
    if planted and (shape.family not in ("llama", "opt") or (shape.family == "opt" and planted.activation != "relu")):
        parser.error("--activation is for shapes of llamas; relu for those of opt too")
    write_synthetic(options.path, shape, options.type_name, options.seed, planted)
    print(f"{options.path}: {options.path.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
