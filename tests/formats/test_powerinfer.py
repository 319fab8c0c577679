"""PowerInfer's dialect of GGUF: the same answers as from plain GGUF with the same weights, and what must be refused."""

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats.attacks.raw_gguf import STRING, U32, RawGguf, key, tensor, text, u32
from formats.powerinfer_files import (
    ACTIVATIONS,
    PREDICTOR_WIDTH,
    Array,
    by_type,
    stored,
    values_of,
    write_copy,
    write_pair,
)
from tolerances import REQUANTISED_SHARE

import isotherm
from isotherm.errors import ModelFileError, UnsupportedModel
from isotherm.formats import by_neuron
from isotherm.formats.checkpoint import open_checkpoint
from isotherm.formats.gguf import open_gguf
from isotherm.quantization.layouts import dequantise, quantise_q8_0
from isotherm.types import QuantType

FAMILIES = ("llama", "bamboo", "falcon", "opt")
NOT_USED = "the file's predictors are not used: every neuron that fires is computed"
REQUANTISED = "down is stored by neuron as Q4_0; requantised to Q8_0"


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.mark.parametrize("down_type", [QuantType.F32, QuantType.F16, QuantType.Q4_0], ids=lambda value: value.value)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_plain_gguf(
    family: str, down_type: QuantType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISOTHERM_CACHE", str(tmp_path / "cache"))
    dialect, plain = write_pair(tmp_path, family, down_type)
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 300, 40)]
    with isotherm.load(plain, threads=2) as model:
        expected = np.asarray(model.logits(ids))
    for _ in range(2):  # the second time from the packed file
        with isotherm.load(dialect, threads=2) as model:
            assert model.facts.config.activation is ACTIVATIONS[family]
            assert model.facts.config.context_tokens == 512
            assert np.array_equal(np.asarray(model.logits(ids)), expected)


@pytest.mark.parametrize("slab_bytes", [1, 64 * 4 * 96, 1 << 24])
@pytest.mark.parametrize("down_type", [QuantType.F32, QuantType.BF16, QuantType.Q4_0], ids=lambda value: value.value)
def test_outputs_come_back_as_rows(
    down_type: QuantType, slab_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_neuron, "_SLAB_BYTES", slab_bytes)  # a block of neurons, three, all
    dialect, _ = write_pair(tmp_path, "llama", down_type)
    weights = values_of(*stored(dialect)["blk.1.ffn_down_t.weight"]).T
    with open_checkpoint(dialect) as checkpoint:
        source = checkpoint.tensors["layers.1.down"]
        assert source.shape == (64, 160)
        assert source.quant_type is (QuantType.Q8_0 if down_type is QuantType.Q4_0 else down_type)
        expected, _ = by_type(np.ascontiguousarray(weights), source.quant_type)
        rows = expected.view(np.uint8).reshape(64, -1)
        for start, end in ((0, 64), (0, 1), (31, 33), (5, 60), (32, 64), (63, 64), (7, 7)):
            found = source.read(start, end)
            assert found.shape == (end - start, source.row_bytes)
            assert np.array_equal(found, rows[start:end])
        assert np.array_equal(source.read(), rows)


def test_a_few_rows_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_neuron, "_SLAB_BYTES", 1 << 18)
    dialect, _ = write_pair(tmp_path, "llama", QuantType.F32, ffn_size=1 << 14)
    with open_checkpoint(dialect) as checkpoint:
        source = checkpoint.tensors["layers.0.down"]
        assert source.num_bytes == 4 << 20
        tracemalloc.start()
        source.read(8, 12)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak_bytes < 1 << 20  # a slab, and four rows of 64 KB


def test_rounding_is_that_of_the_gguf_package() -> None:
    random = np.random.default_rng(1)
    values = (random.standard_normal((40, 320)) * np.exp(random.uniform(-30, 10, (40, 1)))).astype(np.float32)
    values[3, 32:64] = 0
    values[4, :32] = np.arange(-16, 16) / 2 * np.float32(127 / 8) / 127  # halves
    values[5] = np.round(values[5])
    expected, _ = by_type(values, QuantType.Q8_0)
    assert np.array_equal(quantise_q8_0(values), expected)


def test_what_is_not_a_number_stays_none() -> None:
    values = np.ones((3, 64), np.float32)
    values[0, 3], values[1, 40] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        decoded = dequantise(quantise_q8_0(values), QuantType.Q8_0, 64)
    assert not np.isfinite(decoded[0, :32]).any()
    assert not np.isfinite(decoded[1, 32:]).any()
    assert np.isfinite(decoded[2]).all()
    assert np.isfinite(decoded[0, 32:]).all()


def test_what_requantising_costs() -> None:
    """docs/models.md states it: root mean square of the change, as a share of that of the weights."""
    random = np.random.default_rng(5)
    neurons = random.standard_normal((2048, 256)).astype(np.float32)
    four_bits = values_of(*by_type(neurons, QuantType.Q4_0))
    outputs = np.ascontiguousarray(four_bits.T)
    rounded = dequantise(quantise_q8_0(outputs), QuantType.Q8_0, 2048)
    share = np.sqrt(np.square(rounded - outputs).mean() / np.square(outputs).mean())
    assert REQUANTISED_SHARE / 2 < share < REQUANTISED_SHARE


@pytest.mark.parametrize(("family", "pre"), [("falcon", "falcon"), ("opt", "gpt-2"), ("llama", "default")])
def test_a_pretokenizer_that_is_not_named_is_that_of_the_family(family: str, pre: str, tmp_path: Path) -> None:
    dialect, plain = write_pair(tmp_path, family, QuantType.F16)
    for path, expected in ((dialect, pre), (plain, "default")):
        magic = path.read_bytes()[:4]
        silent = write_copy(path, tmp_path / "silent.gguf", stored(path), {"tokenizer.ggml.pre": None}, magic)
        with open_checkpoint(silent) as checkpoint:
            assert checkpoint.tokenizer.pre == expected


# what the user is told


def test_notices(tmp_path: Path, heard: list[str]) -> None:
    dialect, plain = write_pair(tmp_path, "llama", QuantType.Q4_0)
    open_checkpoint(dialect, heard.append).close()
    assert heard == [REQUANTISED, NOT_USED]
    open_checkpoint(plain, heard.append).close()
    assert len(heard) == 2
    exact, _ = write_pair(tmp_path, "llama", QuantType.F16)
    open_checkpoint(exact, heard.append).close()
    assert heard[2:] == [NOT_USED]


def test_a_file_that_is_refused_says_nothing(tmp_path: Path, heard: list[str]) -> None:
    path = change(tmp_path, {"powerinfer.sparse_threshold": float("nan")}, {})
    with pytest.raises(ModelFileError):
        open_checkpoint(path, heard.append)
    assert heard == []


def test_loading_passes_the_notices_on(tmp_path: Path) -> None:
    class Heard:
        def __init__(self) -> None:
            self.notices: list[str] = []

        def notice(self, text: str) -> None:
            self.notices.append(text)

        def progress(self, done_bytes: int, total_bytes: int | None) -> None:
            raise AssertionError("nothing is fetched")

    reporter = Heard()
    dialect, _ = write_pair(tmp_path, "opt", QuantType.Q4_0)
    with isotherm.load(dialect, reporter=reporter, cache_bytes=0):
        assert reporter.notices == [REQUANTISED, NOT_USED]


def test_predictors_may_be_absent(tmp_path: Path, heard: list[str]) -> None:
    path = change(tmp_path, {}, {f"blk.{layer}.{part}.weight": None for layer in (0, 1) for part in ("fc1", "fc2")})
    with open_checkpoint(path, heard.append) as checkpoint:
        assert heard == []
        assert not [name for name in checkpoint.tensors if "fc" in name]


def test_the_identity_knows_the_dialect(tmp_path: Path) -> None:
    """What is packed from one reading of the bytes is not taken for the other."""
    dialect, _ = write_pair(tmp_path, "llama", QuantType.F16)
    data = dialect.read_bytes()
    with open_gguf(dialect) as file:
        assert file.is_powerinfer
        digest = file.identity.header_sha256
    dialect.write_bytes(b"GGUF" + data[4:])
    with open_gguf(dialect) as file:
        assert not file.is_powerinfer
        assert file.identity.header_sha256 != digest


# refusals


def change(
    folder: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Array, QuantType] | None],
    family: str = "llama",
    **options: Any,
) -> Path:
    """A file in the dialect with some keys and tensors replaced, added or, by None, left out."""
    dialect, _ = write_pair(folder, family, QuantType.F16, **options)
    found = {name: item for name, item in {**stored(dialect), **tensors}.items() if item is not None}
    return write_copy(dialect, folder / "changed.gguf", found, metadata, b"PWRI")


def halves(*shape: int) -> tuple[Array, QuantType]:
    return np.zeros(shape, np.float16), QuantType.F16


DOWN = "blk.0.ffn_down.weight"
DOWN_T = "blk.0.ffn_down_t.weight"
FC1 = "blk.0.fc1.weight"
FC2 = "blk.1.fc2.weight"


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({}, {DOWN_T: None}, r"blk\.0\.ffn_down_t\.weight is missing"),
        ({}, {DOWN_T: None, DOWN: halves(64, 160)}, r"blk\.0\.ffn_down_t\.weight is missing"),
        ({}, {DOWN_T: halves(64, 160)}, r"ffn_down_t.weight has the dimensions \[160, 64\], expected \[64, 160\]"),
        ({}, {DOWN_T: halves(2, 80, 64)}, r"ffn_down_t.weight has the dimensions \[64, 80, 2\]"),
        ({}, {FC1: None}, "half a predictor: blk.0.fc2.weight"),
        ({}, {FC2: None}, "half a predictor: blk.1.fc1.weight"),
        ({}, {FC1: halves(PREDICTOR_WIDTH, 63)}, r"fc1.weight has the dimensions \[63, 48\], expected \[64, 48\]"),
        (
            {},
            {FC1: halves(PREDICTOR_WIDTH + 1, 64)},
            r"fc2.weight has the dimensions \[48, 160\], expected \[49, 160\]",
        ),
        ({}, {FC2: halves(161, PREDICTOR_WIDTH)}, r"fc2.weight has the dimensions \[48, 161\]"),
        ({}, {FC2: halves(10, 16, PREDICTOR_WIDTH)}, r"fc2.weight has the dimensions \[48, 16, 10\]"),
        ({"powerinfer.sparse_threshold": float("nan")}, {}, "sparse_threshold is nan"),
        ({"powerinfer.sparse_threshold": float("-inf")}, {}, "sparse_threshold is -inf"),
        ({"powerinfer.sparse_threshold": "0"}, {}, "sparse_threshold is '0'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "layer_norm_rms_epsilon is missing"),
    ],
)
def test_contradictions_are_named(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any], says: str, tmp_path: Path
) -> None:
    path = change(tmp_path, metadata, tensors)
    with pytest.raises(ModelFileError, match=says):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        ({}, {DOWN: halves(64, 160)}, "'blk.0.ffn_down.weight' has no place"),
        ({}, {"blk.2.fc1.weight": halves(PREDICTOR_WIDTH, 64)}, "'blk.2.fc1.weight' has no place"),
        ({}, {"blk.0.fc3.weight": halves(8, 64)}, "'blk.0.fc3.weight' has no place"),
        ({}, {DOWN_T: by_type(np.ones((160, 64), np.float32), QuantType.Q8_0)}, "stored by neuron as Q8_0; supported"),
        ({"general.architecture": "qwen2"}, {}, "a file of PowerInfer with the architecture qwen2; known of them are"),
        ({"llama.expert_count": 4}, {}, "llama.expert_count is 4; PowerInfer's files of experts are not supported"),
        ({"isotherm.activation": "silu"}, {}, "isotherm.activation is not relu, which PowerInfer's llama has"),
    ],
)
def test_what_is_not_known_is_unsupported(
    metadata: Mapping[str, Any], tensors: Mapping[str, Any], says: str, tmp_path: Path
) -> None:
    path = change(tmp_path, metadata, tensors)
    with pytest.raises(UnsupportedModel, match=says):
        open_checkpoint(path)


def test_neurons_that_fill_no_block_are_refused(tmp_path: Path) -> None:
    dialect, _ = write_pair(tmp_path, "llama", QuantType.F16, ffn_size=144)
    open_checkpoint(dialect).close()
    tensors = stored(dialect)
    for layer in (0, 1):
        name = f"blk.{layer}.ffn_down_t.weight"
        tensors[name] = by_type(values_of(*tensors[name]), QuantType.Q4_0)
    path = write_copy(dialect, tmp_path / "odd.gguf", tensors, {}, b"PWRI")
    with pytest.raises(UnsupportedModel, match="144 neurons in Q4_0, expected a multiple of 32"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("rows", "context", "says"), [(512, 513, "has 512 rows for a context of 513"), (515, 512, "515 rows for a context")]
)
def test_positions_of_opt_are_counted(rows: int, context: int, says: str, tmp_path: Path) -> None:
    tensors = {"position_embd.weight": halves(rows, 64)}
    path = change(tmp_path, {"opt.context_length": context}, tensors, "opt")
    with pytest.raises(ModelFileError, match=says):
        open_checkpoint(path)


def test_plain_files_have_no_such_tensors(tmp_path: Path) -> None:
    for family in FAMILIES:
        dialect, _ = write_pair(tmp_path, family, QuantType.F16)
        dialect.write_bytes(b"GGUF" + dialect.read_bytes()[4:])
        with pytest.raises(ModelFileError, match="is missing"):
            open_checkpoint(dialect)


@pytest.mark.parametrize("magic", [b"PWRI", b"GGUF"])
def test_the_neurons_of_a_gpu_are_no_model(magic: bytes, tmp_path: Path) -> None:
    """Their tensors are integers, of a type whose number means another one elsewhere."""
    keys = (
        key("general.architecture", STRING, text("generic.gpu_index")),
        key("generic.gpu_index.block_count", U32, u32(1)),
    )
    index = RawGguf(magic=magic, keys=keys, tensors=(tensor("blk.0.gpu_idx", (16,), 18),))
    path = tmp_path / "model.powerinfer.gguf.generated.gpuidx"
    path.write_bytes(index.build())
    with pytest.raises(UnsupportedModel, match=r"neurons that PowerInfer keeps on a GPU \(gpuidx\).*no weights"):
        open_checkpoint(path)


@pytest.mark.parametrize("magic", [b"IRWP", b"PWRJ", b"pwri"])
def test_other_magics_are_none(magic: bytes, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(RawGguf(magic=magic).build())
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        open_gguf(path)
