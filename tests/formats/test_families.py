"""From GGUF names and numbers to canonical ones: the real models, the row orders, and what must be refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_models import FAMILIES, add_value, byte_alphabet, write_tiny

from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats.checkpoint import Checkpoint, open_checkpoint
from isotherm.types import Activation, ModelConfig, QuantType, Rope

Array = NDArray[Any]


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Checkpoint]:
    """Writes a tiny model and opens it: tiny("llama", QuantType.F32, metadata={...}, **sizes)."""

    def open_tiny(family: str, quant_type: QuantType = QuantType.F32, **options: Any) -> Checkpoint:
        return open_checkpoint(write_tiny(tmp_path / "tiny.gguf", family, quant_type, **options))

    return open_tiny


# configs


def test_real_llama(real_model: Callable[[str], Path]) -> None:
    with open_checkpoint(real_model("smollm2-135m")) as checkpoint:
        assert checkpoint.config == ModelConfig(
            family="llama",
            name="Smollm2 135M 8k Lc100K Mix1 Ep2",
            num_layers=30,
            hidden_size=576,
            ffn_size=1536,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            vocab_size=49152,
            context_tokens=8192,
            norm_eps=float(np.float32(1e-5)),
            rope=Rope(base=100000.0, dims=64),
            tied_head=True,
        )
        assert checkpoint.quantization == "Q4_1"
        assert checkpoint.num_parameters == 134_515_008  # as the model card has it
        assert checkpoint.metadata["general.license"] == "apache-2.0"
        assert len(checkpoint.tensors) == 272
        tokenizer = checkpoint.tokenizer
        assert (tokenizer.model, tokenizer.pre, len(tokenizer.merges)) == ("gpt2", "smollm", 48900)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.unknown_id) == (1, 2, 2, 0)
        assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.add_space_prefix) == (False, False, False)
        assert tokenizer.chat_template is not None
        assert tokenizer.chat_template.startswith("{% for message in messages %}")


def test_real_gemma3(real_model: Callable[[str], Path]) -> None:
    with open_checkpoint(real_model("gemma3-270m")) as checkpoint:
        config = checkpoint.config
        assert (config.family, config.num_layers, config.hidden_size, config.head_dim) == ("gemma3", 18, 640, 256)
        assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (4, 1, 262144)
        assert config.rope == Rope(base=1000000.0, dims=256)
        assert config.local_rope == Rope(base=10000.0, dims=256)
        assert (config.sliding_window, config.global_every, config.attention_scale) == (512, 6, None)
        assert config.tied_head
        assert checkpoint.quantization == "Q4_K_M"
        assert checkpoint.num_parameters == 268_098_176
        # gemma3 norms carry their + 1 already
        assert checkpoint.tensors["layers.0.attn_norm"].read().view("<f4").mean() > 1.0
        tokenizer = checkpoint.tokenizer
        assert (tokenizer.model, tokenizer.tokens[:4]) == ("llama", ("<pad>", "<eos>", "<bos>", "<unk>"))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unknown_id) == (2, 1, 3)
        assert tokenizer.tokens[tokenizer.eot_id or 0] == "<end_of_turn>"
        assert (tokenizer.add_bos, tokenizer.add_space_prefix, tokenizer.chat_template) == (True, False, None)
        assert len(tokenizer.scores) == len(tokenizer.token_types) == 262144


def test_real_qwen2(real_model: Callable[[str], Path]) -> None:
    with open_checkpoint(real_model("qwen2.5-coder-0.5b")) as checkpoint:
        config = checkpoint.config
        assert (config.family, config.num_layers, config.hidden_size, config.ffn_size) == ("qwen2", 24, 896, 4864)
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (14, 2, 64)
        assert (config.qkv_bias, config.tied_head, config.sliding_window) == (True, False, None)
        assert config.rope == Rope(base=1000000.0, dims=64)
        assert checkpoint.tensors["head"].shape == checkpoint.tensors["embed"].shape == (151936, 896)
        assert checkpoint.tensors["layers.23.k_bias"].shape == (1, 128)
        assert checkpoint.tokenizer.tokens[checkpoint.tokenizer.eos_id or 0] == "<|im_end|>"
        assert not checkpoint.tokenizer.add_bos


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_its_canonical_name(family: str, tiny: Callable[..., Checkpoint]) -> None:
    layer = ["attn_norm", "q", "k", "v", "o", "ffn_norm", "gate", "up", "down"]
    if family in ("opt", "falcon"):
        layer.remove("gate")
    layer += {
        "llama": [],
        "bamboo": [],
        "qwen2": ["q_bias", "k_bias", "v_bias"],
        "qwen3": ["q_norm", "k_norm"],
        "qwen3moe": ["q_norm", "k_norm", "router"],
        "gemma3": ["q_norm", "k_norm", "post_attn_norm", "post_ffn_norm"],
        "opt": [f"{name}_bias" for name in layer],
        "falcon": ["attn_norm_bias", "ffn_norm_bias"],
    }[family]
    expected = {"embed", "final_norm", "head"} | {f"layers.{i}.{name}" for i in range(2) for name in layer}
    expected |= {"positions"} if family == "opt" else set()
    expected |= {"final_norm_bias"} if family in ("opt", "falcon") else set()
    with tiny(family, QuantType.Q4_K, tied_head=False) as checkpoint:
        assert set(checkpoint.tensors) == expected
        assert checkpoint.config.vocab_size == 330
        assert checkpoint.quantization == "Q4_K_M"
        assert checkpoint.num_bytes == sum(source.read().nbytes for source in checkpoint.tensors.values())
        assert checkpoint.tensors["layers.1.down"].shape == (256 * (6 if family == "qwen3moe" else 1), 512)
        for name, source in checkpoint.tensors.items():
            assert source.name == name
            assert source.read().shape == (source.shape[0], source.row_bytes)
    with tiny(family, tied_head=True) as checkpoint:
        assert set(checkpoint.tensors) == expected - {"head"}
        assert checkpoint.config.tied_head


# row orders

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 64


def write_llama(path: Path, tensors: dict[str, Array], rope_dims: int = HEAD_DIM) -> Path:
    """A tiny llama whose tensors named in `tensors` are the given ones, in F32."""
    tiny_path = write_tiny(
        path.with_suffix(".base"),
        "llama",
        QuantType.F32,
        num_layers=1,
        hidden_size=HIDDEN,
        head_dim=HEAD_DIM,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        ffn_size=64,
        metadata={"llama.rope.dimension_count": rope_dims},
    )
    base = gguf.GGUFReader(tiny_path)
    writer = gguf.GGUFWriter(path, "llama")
    for key, item in base.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            add_value(writer, key, item.contents())
    for name, data in ({tensor.name: tensor.data for tensor in base.tensors} | tensors).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleave(weights: Array, num_heads: int) -> Array:
    """What converters from the halves of Hugging Face to GGUF do with the rows of q and k."""
    halves = weights.reshape(num_heads, 2, HEAD_DIM // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def test_interleaved_rows_come_back_in_halves(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    q, k = (rng.standard_normal((n * HEAD_DIM, HIDDEN)).astype(np.float32) for n in (HEADS, KV_HEADS))
    v = rng.standard_normal((KV_HEADS * HEAD_DIM, HIDDEN)).astype(np.float32)
    matrices = {"q": q, "k": k, "v": v}
    biases = {name: rng.standard_normal(len(rows)).astype(np.float32) for name, rows in matrices.items()}
    stored = {
        "blk.0.attn_q.weight": interleave(q, HEADS),
        "blk.0.attn_k.weight": interleave(k, KV_HEADS),
        "blk.0.attn_v.weight": v,
        "blk.0.attn_q.bias": interleave(biases["q"], HEADS),
        "blk.0.attn_k.bias": interleave(biases["k"], KV_HEADS),
        "blk.0.attn_v.bias": biases["v"],
    }
    with open_checkpoint(write_llama(tmp_path / "llama.gguf", stored)) as checkpoint:
        assert checkpoint.config.qkv_bias
        for name, rows in matrices.items():
            source = checkpoint.tensors[f"layers.0.{name}"]
            assert np.array_equal(source.read().view("<f4"), rows)
            for start, end in ((0, 1), (3, 29), (15, 17), (31, 32), (5, 5)):
                assert np.array_equal(source.read(start, end).view("<f4"), rows[start:end])
            bias = checkpoint.tensors[f"layers.0.{name}_bias"]
            assert bias.shape == (1, len(rows))
            assert np.array_equal(bias.read().view("<f4")[0], biases[name])


@pytest.mark.parametrize("rope_dims", [HEAD_DIM, 8, 2])
def test_turning_halves_of_canonical_rows_is_turning_neighbours_of_stored_rows(rope_dims: int, tmp_path: Path) -> None:
    """Scores q k do not depend on the convention, so this holds for any order of pairs that is the right one."""
    path = write_llama(tmp_path / "llama.gguf", {}, rope_dims)
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    x = np.random.default_rng(2).standard_normal((2, HIDDEN))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.rope.dims == rope_dims
        q, k = (checkpoint.tensors[f"layers.0.{name}"].read().view("<f4") for name in "qk")
    for head in range(KV_HEADS):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        halves = turn_halves(q[rows] @ x[0], 7, rope_dims) @ turn_halves(k[rows] @ x[1], 3, rope_dims)
        stored_q, stored_k = theirs["blk.0.attn_q.weight"][rows] @ x[0], theirs["blk.0.attn_k.weight"][rows] @ x[1]
        neighbours = turn_neighbours(stored_q, 7, rope_dims) @ turn_neighbours(stored_k, 3, rope_dims)
        assert halves == pytest.approx(neighbours, abs=1e-9)


def turn_halves(vector: Array, position: int, dims: int) -> Array:
    turned = vector.astype(np.float64).copy()
    for i in range(dims // 2):
        angle = position * 10000.0 ** (-2 * i / dims)
        a, b = vector[i], vector[i + dims // 2]
        turned[i] = a * np.cos(angle) - b * np.sin(angle)
        turned[i + dims // 2] = a * np.sin(angle) + b * np.cos(angle)
    return turned


def turn_neighbours(vector: Array, position: int, dims: int) -> Array:
    turned = vector.astype(np.float64).copy()
    for i in range(dims // 2):
        angle = position * 10000.0 ** (-2 * i / dims)
        a, b = vector[2 * i], vector[2 * i + 1]
        turned[2 * i] = a * np.cos(angle) - b * np.sin(angle)
        turned[2 * i + 1] = a * np.sin(angle) + b * np.cos(angle)
    return turned


@pytest.mark.parametrize("quant_type", QuantType)
def test_quantized_rows_move_whole(quant_type: QuantType, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "llama", quant_type, num_layers=1)
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        canonical = checkpoint.tensors["layers.0.q"].read()
        for name in ("v", "o", "gate", "down"):
            stored = {"v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "down": "ffn_down"}[name]
            data = checkpoint.tensors[f"layers.0.{name}"].read()
            assert data.tobytes() == theirs[f"blk.0.{stored}.weight"].tobytes()
    stored_q = theirs["blk.0.attn_q.weight"].view(np.uint8)
    for head in range(4):
        for row in range(64):
            stored_row = 2 * row if row < 32 else 2 * (row - 32) + 1
            assert np.array_equal(canonical[head * 64 + row], stored_q[head * 64 + stored_row])


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3moe", "gemma3"])
def test_other_families_are_stored_in_halves(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", family, QuantType.F32, num_layers=1)
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        for name in "qk":
            data = checkpoint.tensors[f"layers.0.{name}"].read()
            assert data.tobytes() == theirs[f"blk.0.attn_{name}.weight"].tobytes()


# falcon


@pytest.mark.parametrize("quant_type", [QuantType.F32, QuantType.Q4_0, QuantType.Q6_K])
def test_q_k_and_v_are_rows_of_one_matrix(quant_type: QuantType, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", "falcon", quant_type, num_layers=1)
    fused = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}["blk.0.attn_qkv.weight"]
    rows = fused.view(np.uint8).reshape((4 + 2 * 2) * 64, -1)
    with open_checkpoint(path) as checkpoint:
        q, k, v = (checkpoint.tensors[f"layers.0.{part}"] for part in "qkv")
        assert (q.shape, k.shape, v.shape) == ((256, 256), (128, 256), (128, 256))
        assert np.array_equal(np.concatenate([part.read() for part in (q, k, v)]), rows)
        assert np.array_equal(k.read(3, 70), rows[256 + 3 : 256 + 70])
        assert np.array_equal(v.read(127), rows[-1:])
        assert v.read(5, 5).shape == (0, v.row_bytes)
        assert checkpoint.num_parameters == sum(
            tensor.n_elements for tensor in gguf.GGUFReader(path).tensors
        )  # none is counted twice


def test_which_norm_of_falcon_is_which(tmp_path: Path) -> None:
    """The converter of llama.cpp names ln_mlp attn_norm and ln_attn attn_norm_2; a norm of both is attn_norm."""
    path = write_tiny(tmp_path / "two.gguf", "falcon", QuantType.F32)
    theirs = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(path) as checkpoint:
        assert not checkpoint.config.shared_norm
        for name, stored in (("attn_norm", "attn_norm_2"), ("ffn_norm", "attn_norm")):
            for suffix, part in (("", "weight"), ("_bias", "bias")):
                data = checkpoint.tensors[f"layers.1.{name}{suffix}"].read()
                assert data.tobytes() == theirs[f"blk.1.{stored}.{part}"].tobytes()
    path = write_tiny(tmp_path / "one.gguf", "falcon", QuantType.F32, shared_norm=True, num_kv_heads=1)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config.shared_norm
        assert checkpoint.config.num_kv_heads == 1
        assert not [name for name in checkpoint.tensors if "ffn_norm" in name]


def test_bamboo_has_the_rows_of_llama_and_an_activation_of_its_own(tmp_path: Path) -> None:
    sources = {}
    for family in ("llama", "bamboo"):
        path = write_tiny(tmp_path / f"{family}.gguf", family, QuantType.F32, num_layers=1)
        with open_checkpoint(path) as checkpoint:
            sources[family] = {name: source.read().tobytes() for name, source in checkpoint.tensors.items()}
            assert checkpoint.config.activation is (Activation.DRELU if family == "bamboo" else Activation.SILU)
    assert sources["llama"] == sources["bamboo"]


def test_what_a_falcon_may_say_of_itself(tiny: Callable[..., Checkpoint]) -> None:
    same = {"falcon.use_parallel_residual": True, "falcon.tensor_data_layout": "jploski"}
    with tiny("falcon", metadata=same) as checkpoint:
        assert checkpoint.config.activation is Activation.GELU_TANH
    with tiny("falcon", metadata={"isotherm.activation": "relu"}) as checkpoint:
        assert checkpoint.config.activation is Activation.RELU


# activations and positions


@pytest.mark.parametrize("activation", list(Activation))
def test_llama_may_name_its_activation(activation: Activation, tiny: Callable[..., Checkpoint]) -> None:
    with tiny("llama", metadata={"isotherm.activation": activation.value}) as checkpoint:
        assert checkpoint.config.activation is activation


@pytest.mark.parametrize(
    ("family", "value"), [("llama", "swish"), ("gemma3", "relu"), ("opt", "silu"), ("falcon", "drelu")]
)
def test_other_activations_are_refused(family: str, value: str, tiny: Callable[..., Checkpoint]) -> None:
    with pytest.raises(UnsupportedModel, match=r"isotherm\.activation is"):
        tiny(family, metadata={"isotherm.activation": value})


def test_positions_may_have_two_rows_before_the_first(tiny: Callable[..., Checkpoint]) -> None:
    with tiny("opt") as checkpoint:
        assert checkpoint.config.rope is None
        assert checkpoint.config.first_position_row == 2
        assert checkpoint.tensors["positions"].shape == (514, 256)
    with tiny("opt", metadata={"opt.context_length": 514}) as checkpoint:
        assert checkpoint.config.first_position_row == 0
    with pytest.raises(ModelFileError, match=r"position_embd\.weight has 514 rows for a context of 513"):
        tiny("opt", metadata={"opt.context_length": 513})


# rope


def test_llama3_factors(tiny: Callable[..., Checkpoint]) -> None:
    with tiny("llama", llama3_rope=True) as checkpoint:
        assert checkpoint.config.rope.factors == pytest.approx(np.linspace(1.0, 8.0, 32).tolist())
        assert "rope_freqs" not in "".join(checkpoint.tensors)


def test_linear_scaling(tiny: Callable[..., Checkpoint]) -> None:
    with tiny("llama", rope_scaling=4.0) as checkpoint:
        assert checkpoint.config.rope.position_scale == 0.25
    with tiny("qwen2", metadata={"qwen2.rope.scale_linear": 2.0}) as checkpoint:
        assert checkpoint.config.rope.position_scale == 0.5
    none = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    with tiny("llama", metadata=none) as checkpoint:
        assert checkpoint.config.rope.position_scale == 1.0


def test_linear_scaling_of_gemma3_is_for_global_layers(tiny: Callable[..., Checkpoint]) -> None:
    with tiny("gemma3", rope_scaling=8.0) as checkpoint:
        assert checkpoint.config.rope == Rope(base=1000000.0, dims=64, position_scale=0.125)
        assert checkpoint.config.local_rope == Rope(base=10000.0, dims=64)


def test_gemma3_says_its_own_local_rope_and_pattern(tiny: Callable[..., Checkpoint]) -> None:
    own = {"gemma3.rope.freq_base_swa": 5000.0, "gemma3.attention.sliding_window_pattern": 3}
    with tiny("gemma3", metadata=own) as checkpoint:
        assert checkpoint.config.local_rope == Rope(base=5000.0, dims=64)
        assert (checkpoint.config.global_every, checkpoint.config.sliding_window) == (3, 16)


@pytest.mark.parametrize("window", [None, 0])
def test_gemma3_without_a_window_is_global(window: int | None, tiny: Callable[..., Checkpoint]) -> None:
    with tiny("gemma3", metadata={"gemma3.attention.sliding_window": window}) as checkpoint:
        config = checkpoint.config
        assert (config.sliding_window, config.local_rope, config.global_every) == (None, None, None)


def test_gemma3_27b_scales_attention_by_its_hidden_size(tiny: Callable[..., Checkpoint]) -> None:
    sizes = {"hidden_size": 32, "head_dim": 4, "ffn_size": 32, "num_heads": 2}
    with tiny("gemma3", num_layers=62, **sizes) as checkpoint:
        assert checkpoint.config.attention_scale == 0.25
    with tiny("gemma3", num_layers=2, **sizes) as checkpoint:
        assert checkpoint.config.attention_scale is None
    with tiny("llama", metadata={"llama.attention.scale": 0.5}) as checkpoint:
        assert checkpoint.config.attention_scale == 0.5


# defaults


def test_defaults_of_absent_numbers(tiny: Callable[..., Checkpoint]) -> None:
    absent = ["attention.head_count_kv", "attention.key_length", "attention.value_length"]
    absent += ["rope.dimension_count", "rope.freq_base"]
    metadata: dict[str, object] = {f"llama.{key}": None for key in absent}
    metadata |= {"general.file_type": None, "general.name": None}
    with tiny("llama", QuantType.Q5_K, num_kv_heads=4, metadata=metadata) as checkpoint:
        config = checkpoint.config
        assert (config.num_kv_heads, config.head_dim, config.name) == (4, 64, "tiny")
        assert config.rope == Rope(base=10000.0, dims=64)
        assert checkpoint.quantization == "Q5_K"


def test_numbers_per_layer_may_repeat_one_number(tiny: Callable[..., Checkpoint]) -> None:
    same = {"llama.feed_forward_length": [512, 512], "llama.attention.head_count_kv": [2, 2]}
    with tiny("llama", metadata=same) as checkpoint:
        assert (checkpoint.config.ffn_size, checkpoint.config.num_kv_heads) == (512, 2)


@pytest.mark.parametrize(
    ("vocab", "pre", "add_bos", "add_space_prefix"),
    [
        ("bpe", "qwen2", False, False),
        ("bpe", "llama-bpe", True, False),
        ("bpe", None, False, False),
        ("spm", None, True, True),
    ],
)
def test_defaults_of_the_tokenizer(
    vocab: str, pre: str | None, add_bos: bool, add_space_prefix: bool, tiny: Callable[..., Checkpoint]
) -> None:
    absent = ("add_bos_token", "add_space_prefix", "bos_token_id", "eos_token_id", "unknown_token_id", "token_type")
    metadata: dict[str, object] = {f"tokenizer.ggml.{key}": None for key in absent}
    with tiny("llama", vocab=vocab, metadata=metadata | {"tokenizer.ggml.pre": pre}) as checkpoint:
        tokenizer = checkpoint.tokenizer
        assert tokenizer.pre == (pre or "default")
        assert (tokenizer.add_bos, tokenizer.add_eos) == (add_bos, False)
        assert tokenizer.add_space_prefix == add_space_prefix
        expected_ids = (1, 2, 0) if vocab == "spm" else (None, None, None)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unknown_id) == expected_ids
        assert set(tokenizer.token_types) == {1}
        assert bool(tokenizer.scores) == (vocab == "spm")
        assert bool(tokenizer.merges) == (vocab == "bpe")


def test_names_cannot_write_to_the_terminal(tiny: Callable[..., Checkpoint]) -> None:
    with tiny("llama", metadata={"general.name": "a\x1b[2Jb\nc" + "d" * 1000}) as checkpoint:
        assert checkpoint.config.name.startswith("a?[2Jb?cd")
        assert checkpoint.config.name.isprintable()
        assert len(checkpoint.config.name) == 200


# refusals


@pytest.mark.parametrize(
    ("family", "metadata", "says"),
    [
        ("llama", {"general.architecture": "mamba"}, "architecture 'mamba' .* known: llama, bamboo, qwen2, qwen3"),
        ("llama", {"general.type": "adapter"}, "holds 'adapter'"),
        ("qwen2", {"qwen2.expert_count": 8}, "qwen2.expert_count is 8"),
        ("llama", {"llama.logit_scale": 0.5}, "logit_scale"),
        ("llama", {"llama.embedding_scale": 12.0}, "embedding_scale"),
        ("llama", {"llama.attention.causal": False}, "causal is False"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn'"),
        ("qwen2", {"qwen2.rope.scaling.type": "longrope"}, "rope scaling 'longrope'"),
        ("llama", {"llama.attention.sliding_window": 100}, "sliding-window attention is not supported in llama"),
        ("gemma3", {"gemma3.final_logit_softcapping": 30.0}, "final_logit_softcapping is 30"),
        ("gemma3", {"gemma3.attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50"),
        ("gemma3", {"gemma3.attention.value_length": 32}, "must be equal"),
        ("llama", {"llama.use_parallel_residual": True}, "use_parallel_residual is True"),
        ("falcon", {"falcon.use_parallel_residual": False}, "use_parallel_residual is False"),
        (
            "falcon",
            {"falcon.tensor_data_layout": "interleaved"},
            "tensor_data_layout is 'interleaved'; known is jploski",
        ),
        ("falcon", {"falcon.tensor_data_layout": 7}, "tensor_data_layout is 7"),
        ("falcon", {"falcon.attention.max_alibi_bias": 8.0}, "max_alibi_bias is 8"),
        ("llama", {"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' is not supported"),
    ],
)
def test_what_this_version_lacks_is_unsupported(
    family: str, metadata: dict[str, Any], says: str, tiny: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        tiny(family, metadata=metadata)


@pytest.mark.parametrize(
    ("family", "metadata", "says"),
    [
        ("llama", {"llama.block_count": None}, "llama.block_count is missing"),
        ("llama", {"llama.block_count": 0}, "llama.block_count is 0"),
        ("llama", {"llama.block_count": 3}, r"blk\.2\.attn_norm\.weight is missing"),
        ("llama", {"llama.block_count": 1}, r"blk\.1\..* has no place in a llama model of 1 layers"),
        ("llama", {"llama.block_count": 2**31}, "from 1 to 1024"),
        ("llama", {"llama.block_count": "2"}, "block_count is '2'"),
        ("llama", {"llama.block_count": True}, "block_count is True"),
        ("llama", {"llama.embedding_length": 128}, r"dimensions \[256, 330\], expected \[128, 330\]"),
        ("llama", {"llama.feed_forward_length": 511}, r"ffn_gate.weight has the dimensions \[256, 512\]"),
        ("llama", {"llama.feed_forward_length": [512, 256]}, "for all layers"),
        ("llama", {"llama.attention.head_count": 8}, "attn_q.weight has the dimensions"),
        ("llama", {"llama.attention.head_count": 0}, "head_count is 0"),
        ("llama", {"llama.attention.head_count_kv": 3}, "does not divide 4 heads"),
        ("llama", {"llama.attention.key_length": None, "llama.attention.head_count": 3}, "3 heads do not divide"),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ("llama", {"llama.attention.layer_norm_rms_epsilon": -1.0}, "layer_norm_rms_epsilon is -1.0"),
        ("llama", {"llama.rope.freq_base": float("inf")}, "freq_base is inf"),
        ("llama", {"llama.rope.freq_base": 0.0}, "freq_base is 0.0"),
        ("llama", {"llama.rope.scaling.factor": -2.0}, "factor is -2.0"),
        ("llama", {"llama.rope.dimension_count": 63}, "dimension_count is 63, expected an even number"),
        ("llama", {"llama.rope.dimension_count": 128}, "dimension_count is 128"),
        ("llama", {"llama.context_length": 0}, "context_length is 0"),
        ("falcon", {"falcon.attention.head_count_kv": 1}, r"attn_qkv.weight has the dimensions \[256, 512\], .* 384\]"),
        ("falcon", {"falcon.attention.head_count_kv": 4}, r"attn_qkv.weight has the dimensions"),
        ("falcon", {"falcon.attention.layer_norm_epsilon": None}, "layer_norm_epsilon is missing"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": 0}, "pattern is 0"),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": [True, False]}, "pattern is array"),
        ("llama", {"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
        ("llama", {"tokenizer.ggml.tokens": ["a", "b"]}, "token_type has 330 values, expected 2"),
        ("llama", {"tokenizer.ggml.tokens": ["a", "b", "a"]}, "has 'a' twice, as ids 0 and 2"),
        ("llama", {"tokenizer.ggml.tokens": [1, 2]}, "expected an array of strings"),
        ("llama", {"tokenizer.ggml.token_type": [1] * 329 + [7]}, "gives token 329 the type 7"),
        ("llama", {"tokenizer.ggml.token_type": [1] * 329}, "has 329 values, expected 330"),
        ("llama", {"tokenizer.ggml.merges": None}, "merges is missing"),
        ("llama", {"tokenizer.ggml.merges": ["a b", "ab"]}, "has 'ab' at 1, expected two pieces"),
        ("llama", {"tokenizer.ggml.merges": ["a b c"]}, "has 'a b c' at 0"),
        ("llama", {"tokenizer.ggml.bos_token_id": 330}, "bos_token_id is 330, expected an integer from 0 to 329"),
        ("llama", {"tokenizer.ggml.eot_token_id": -1}, "eot_token_id is -1"),
        ("llama", {"tokenizer.ggml.add_bos_token": 1}, "add_bos_token is 1, expected true or false"),
        ("llama", {"tokenizer.chat_template": 7}, "chat_template is 7, expected a string"),
        ("gemma3", {"tokenizer.ggml.scores": None}, "scores is missing"),
        ("gemma3", {"tokenizer.ggml.scores": [0.0] * 329 + [float("nan")]}, "expected an array of finite numbers"),
        ("gemma3", {"tokenizer.ggml.scores": [0.0]}, "scores has 1 values, expected 330"),
    ],
)
def test_contradictions_are_named(
    family: str, metadata: dict[str, Any], says: str, tiny: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(ModelFileError, match=says):
        tiny(family, metadata=metadata)


def test_vocabulary_and_embedding_must_agree(tiny: Callable[..., Checkpoint]) -> None:
    tokens = byte_alphabet()
    metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": None}
    with pytest.raises(ModelFileError, match=r"256 tokens and token_embd\.weight 330 rows"):
        tiny("llama", metadata=metadata)


@pytest.mark.parametrize(
    ("family", "tensor", "says"),
    [
        ("llama", "token_embd.weight", "token_embd.weight is missing"),
        ("llama", "output_norm.weight", "output_norm.weight is missing"),
        ("llama", "blk.1.ffn_down.weight", "blk.1.ffn_down.weight is missing"),
        ("qwen2", "blk.1.attn_k.bias", "blk.1.attn_k.bias is missing"),
        ("gemma3", "blk.0.post_ffw_norm.weight", "post_ffw_norm.weight is missing"),
        ("llama", "output.weight", "'xutput.weight' has no place"),
        ("falcon", "blk.1.attn_qkv.weight", "blk.1.attn_qkv.weight is missing"),
        ("falcon", "blk.1.attn_norm_2.weight", "blk.1.attn_norm_2.weight is missing"),
        ("falcon", "blk.0.attn_norm_2.weight", "attn_norm_2.* has no place"),
        ("falcon", "blk.0.attn_norm_2.bias", "blk.0.attn_norm_2.bias is missing"),
        ("llama", "blk.0.ffn_down.weight", "blk.0.ffn_down.weight is missing"),
        ("falcon", "output_norm.bias", "output_norm.bias is missing"),
    ],
)
def test_every_tensor_is_missed(family: str, tensor: str, says: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.gguf", family, QuantType.Q8_0, tied_head=False)
    data = path.read_bytes()
    stored, renamed = (len(name).to_bytes(8, "little") + name.encode() for name in (tensor, f"x{tensor[1:]}"))
    assert data.count(stored) == 1
    path.write_bytes(data.replace(stored, renamed))
    with pytest.raises(ModelFileError, match=says):
        open_checkpoint(path)


def test_rope_factors_are_checked(tmp_path: Path) -> None:
    good = np.ones(HEAD_DIM // 2, np.float32)
    for factors, says in (
        (good[:-1], "rope_freqs.weight has the dimensions"),
        (good * 0, "not positive and finite"),
        (good * np.float32("nan"), "not positive and finite"),
        (good.astype(np.float16), "is F16, expected F32"),
    ):
        with pytest.raises(ModelFileError, match=says):
            open_checkpoint(write_llama(tmp_path / "llama.gguf", {"rope_freqs.weight": factors}))


def test_a_stack_of_matrices_is_no_matrix(tmp_path: Path) -> None:
    stack = np.zeros((8, 8, HIDDEN), np.float32)  # as many rows as ffn_gate has
    with pytest.raises(ModelFileError, match=r"ffn_gate.weight has the dimensions \[64, 8, 8\], expected \[64, 64\]"):
        open_checkpoint(write_llama(tmp_path / "llama.gguf", {"blk.0.ffn_gate.weight": stack}))


def test_variants_with_tensors_of_their_own_are_refused(tmp_path: Path) -> None:
    bias = {"blk.0.attn_output.bias": np.zeros(HIDDEN, np.float32)}
    with pytest.raises(UnsupportedModel, match=r"'blk.0.attn_output.bias' has no place"):
        open_checkpoint(write_llama(tmp_path / "llama.gguf", bias))
