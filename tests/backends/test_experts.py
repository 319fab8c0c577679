"""Ops of experts, native against the contract in NumPy and against dense ops: equal, on every instruction set."""

import numpy as np
import pytest
from sketch import (
    ISAS,
    MAX_TOKENS,
    TOKEN_COUNTS,
    Finished,
    Sketch,
    StoredTensor,
    assert_equal,
    assert_equal_on_every_isa,
    chain,
    random_inputs,
)
from tolerances import ROUTE_RELATIVE

from isotherm import _native
from isotherm.backends.reference import experts as twin
from isotherm.errors import UnsupportedModel
from isotherm.program import ops
from isotherm.program.ops import NormWeights, Projection, Value
from isotherm.types import Activation, Experts, QuantType

F32 = twin.F32
ROUTES = [(2, 1), (2, 2), (5, 3), (8, 2), (16, 16), (17, 16), (60, 4), (128, 8), (300, 64)]
MIXES = [
    (QuantType.Q4_K, QuantType.Q4_K, QuantType.Q6_K),  # as Q4_K_M has them
    (QuantType.Q4_K, QuantType.Q6_K, QuantType.Q4_K),
    (QuantType.F16, QuantType.Q8_0, QuantType.BF16),
]


def router_logits(num_rows: int, num_experts: int) -> F32:
    """Random ones, many of them equal, all equal, far apart, and tiny."""
    rng = np.random.default_rng(num_experts)
    logits = rng.standard_normal((num_rows, num_experts)).astype(np.float32)
    logits[1::5] = np.rint(logits[1::5])
    logits[2] = 0.5
    logits[3] *= 100
    logits[4] *= 1e-30
    return logits


def sketch_route(logits: F32, num_used: int) -> Finished:
    sketch = Sketch()
    x = sketch.input(logits)
    out = sketch.value(2 * num_used)
    sketch.add(ops.Route(out, x, Experts(logits.shape[1], num_used)))
    return sketch.finish(out)


@pytest.mark.parametrize(("num_experts", "num_used"), ROUTES)
def test_route(num_experts: int, num_used: int) -> None:
    logits = router_logits(MAX_TOKENS, num_experts)
    finished = sketch_route(logits, num_used)
    assert_equal_on_every_isa(finished)
    routes = finished.reference(chain(MAX_TOKENS, num_states=0))
    for row, route in zip(logits.astype(np.float64), routes, strict=True):
        chosen = sorted(range(num_experts), key=lambda e, row=row: (-row[e], e))[:num_used]
        assert route[:num_used].tolist() == chosen
        shares = np.exp(np.maximum(row[chosen] - row[chosen[0]], -87.0))
        assert route[num_used:] == pytest.approx(shares / shares.sum(), rel=ROUTE_RELATIVE, abs=0.0)


def test_of_equal_logits_the_first_are_chosen() -> None:
    logits = np.array([[1, 3, 3, 3, 0], [2, 2, 2, 2, 2], [-1, -1, 5, 5, -1]], np.float32)
    for isa in ISAS:
        routes = sketch_route(logits, 3).native(chain(3, num_states=0), isa)
        assert routes[:, :3].tolist() == [[1, 2, 3], [0, 1, 2], [2, 3, 0]]
        assert routes[1, 3:].tolist() == [np.float32(1) / np.float32(3)] * 3


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 4, 8])
def test_a_logit_that_is_no_number_is_seen(fault: float, place: int) -> None:
    """Experts that are there, with weights that are no numbers."""
    logits = router_logits(6, 9)
    logits[::2, place] = fault
    with np.errstate(invalid="ignore"):
        expected = twin.route(logits, 3)
    assert expected[::2, :3].tolist() == [[0, 1, 2]] * 3
    assert np.isnan(expected[::2, 3:]).all()
    assert np.isfinite(expected[1::2]).all()
    for isa in ISAS:
        compiled = sketch_route(logits, 3).compile(isa)
        routes: list[F32] = []
        (value,) = (op.out for op in sketch_route(logits, 3).program.ops if isinstance(op, ops.Route))
        compiled.observe(chain(6, num_states=0), [value], lambda _, rows, routes=routes: routes.append(rows))
        np.testing.assert_array_equal(routes[0], expected)


class Layer:
    """An FFN of experts, of a router's logits that are the input of the sketch themselves."""

    def __init__(self, logits: F32, types: tuple[QuantType, ...], experts: Experts, sizes: tuple[int, int]) -> None:
        """types: of gate, up and down. sizes: hidden size, FFN size of an expert."""
        self.sketch = Sketch()
        self.experts = experts
        self.width, self.ffn_size = sizes
        self.x = self.sketch.input(random_inputs(len(logits), self.width))
        self.residual = self.sketch.input(random_inputs(len(logits), self.width, seed=1))
        self.logits = self.sketch.input(logits)
        gate, up, down = types
        rows = experts.num_experts * self.ffn_size
        self.gate, self.up = (self.sketch.matrix(name, t, rows, self.width) for name, t in (("gate", gate), ("up", up)))
        self.down = self.sketch.matrix("down", down, experts.num_experts * self.width, self.ffn_size)
        self.norm = NormWeights(self.sketch.vector("norm", self.width), 1e-5)

    def routed(self) -> Value:
        routes = self.sketch.value(2 * self.experts.num_used)
        self.sketch.add(ops.Route(routes, self.logits, self.experts))
        return routes

    def hidden(self, routes: Value, activation: Activation = Activation.SILU) -> Value:
        hidden = self.sketch.value(self.experts.num_used * self.ffn_size)
        weights = (self.gate, self.up)
        self.sketch.add(ops.ExpertGlu(hidden, self.x, self.norm, routes, *weights, self.experts, activation))
        return hidden

    def finish(self, *, with_residual: bool = True, activation: Activation = Activation.SILU) -> Finished:
        routes = self.routed()
        hidden, y = self.hidden(routes, activation), self.sketch.value(self.width)
        residual = self.residual if with_residual else None
        self.sketch.add(ops.ExpertDown(y, hidden, routes, self.down, self.experts, residual))
        return self.sketch.finish(y)


def layer(types: tuple[QuantType, ...], experts: Experts, sizes: tuple[int, int] | None = None) -> Layer:
    is_large = any(t.block_elements == 256 for t in types)
    return Layer(
        router_logits(MAX_TOKENS, experts.num_experts), types, experts, sizes or ((256, 256) if is_large else (64, 192))
    )


@pytest.mark.parametrize("quant_type", list(QuantType))
def test_every_type(quant_type: QuantType) -> None:
    assert_equal_on_every_isa(layer((quant_type,) * 3, Experts(5, 2)).finish())


@pytest.mark.parametrize("types", MIXES, ids=lambda types: "-".join(t.value for t in types))
def test_mixed_types(types: tuple[QuantType, ...]) -> None:
    assert_equal_on_every_isa(layer(types, Experts(4, 3)).finish())


@pytest.mark.parametrize(("num_experts", "num_used"), ROUTES)
def test_any_number_of_experts(num_experts: int, num_used: int) -> None:
    """From all rows at one expert to a row for each, and experts that nobody chooses."""
    assert_equal_on_every_isa(layer((QuantType.Q4_0,) * 3, Experts(num_experts, num_used), (32, 32)).finish())


@pytest.mark.parametrize("sizes", [(32, 16), (96, 48), (64, 80), (288, 272)])
def test_sizes_that_are_no_multiple_of_64(sizes: tuple[int, int]) -> None:
    """What stands behind one rank's hidden values is the next rank's, and no padding."""
    for quant_type in (QuantType.F16, QuantType.F32):
        assert_equal_on_every_isa(layer((quant_type,) * 3, Experts(4, 2), sizes).finish())
    types = (QuantType.Q8_0, QuantType.Q4_1, QuantType.BF16)
    assert_equal_on_every_isa(layer(types, Experts(4, 2), sizes).finish())


@pytest.mark.parametrize("activation", list(Activation))
def test_every_activation(activation: Activation) -> None:
    assert_equal_on_every_isa(layer((QuantType.Q5_0,) * 3, Experts(4, 2)).finish(activation=activation), 17)


def test_without_a_residual() -> None:
    assert_equal_on_every_isa(layer((QuantType.Q4_K,) * 3, Experts(4, 2)).finish(with_residual=False), 17)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_any_number_of_threads(num_threads: int) -> None:
    finished = layer((QuantType.Q5_1,) * 3, Experts(7, 3)).finish()
    expected = finished.reference(chain(MAX_TOKENS, num_states=0))
    for isa in ISAS:
        compiled = finished.compile(isa, num_threads)
        for num_tokens in TOKEN_COUNTS:
            compiled.forward(chain(num_tokens, num_states=0))
            assert_equal(compiled.logits(0, num_tokens), expected[:num_tokens], f"{isa}, {num_tokens} tokens")


def test_each_expert_is_the_dense_ffn_of_its_rows() -> None:
    """Against QuantGlu and QuantLinear over the slices of the weights, added up by hand."""
    experts, width, ffn_size = Experts(4, 2), 256, 256
    made = layer((QuantType.Q4_K, QuantType.Q5_K, QuantType.Q6_K), experts)
    routes = twin.route(router_logits(MAX_TOKENS, 4), 2)
    said = np.stack([_dense(made, expert, width, ffn_size) for expert in range(4)])
    residual = random_inputs(MAX_TOKENS, width, seed=1)
    ids = routes[:, :2].astype(int)
    expected = residual + twin.mix(np.take_along_axis(said, ids.T[..., None], axis=0).swapaxes(0, 1), routes)
    finished = made.finish()
    for isa in ISAS:
        assert_equal(finished.native(chain(MAX_TOKENS, num_states=0), isa), expected, isa)


def _dense(made: Layer, expert: int, width: int, ffn_size: int) -> F32:
    """What one expert says of every row, by the dense ops of the native backend."""
    sketch = Sketch()
    x = sketch.input(random_inputs(MAX_TOKENS, width))
    for name, rows in (("gate", ffn_size), ("up", ffn_size), ("down", width)):
        whole = made.sketch.tensors[name]
        raw = whole.raw[expert * rows : (expert + 1) * rows]
        sketch.stored(name, StoredTensor(whole.quant_type, (rows, whole.shape[1]), raw))
    hidden, y = sketch.value(ffn_size), sketch.value(width)
    norm = NormWeights(sketch.vector("norm", width), 1e-5)
    sketch.add(ops.QuantGlu(hidden, x, norm, "gate", "up", Activation.SILU))
    sketch.add(ops.QuantLinear(hidden, None, (Projection(y, "down", None),), None))
    return sketch.finish(y).native(chain(MAX_TOKENS, num_states=0), ISAS[-1])


@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_row_that_is_no_number_stays_so_and_alone(fault: float) -> None:
    logits = router_logits(MAX_TOKENS, 5)
    made = Layer(logits, (QuantType.Q4_0,) * 3, Experts(5, 2), (64, 64))
    sound = made.finish().reference(chain(MAX_TOKENS, num_states=0))
    logits[7, 3] = fault
    finished = Layer(logits, (QuantType.Q4_0,) * 3, Experts(5, 2), (64, 64)).finish()
    others = np.arange(MAX_TOKENS) != 7
    for isa in ISAS:
        for num_tokens in (8, MAX_TOKENS):
            with np.errstate(invalid="ignore"):
                actual = _observed(finished, isa, num_tokens)
            assert np.isnan(actual[7]).all()
            assert_equal(actual[others[:num_tokens]], sound[:num_tokens][others[:num_tokens]], isa)


def _observed(finished: Finished, isa: str, num_tokens: int) -> F32:
    """What ExpertDown wrote: the identity behind a sketch makes numbers of infinities, and no numbers of rows."""
    (value,) = (op.out for op in finished.program.ops if isinstance(op, ops.ExpertDown))
    rows: list[F32] = []
    finished.compile(isa).observe(chain(num_tokens, num_states=0), [value], lambda _, seen: rows.append(seen))
    return rows[0]


@pytest.mark.parametrize(
    ("sizes", "says"),
    [((64, 24), "experts of 24 neurons; .* a multiple of 16"), ((48, 64), "experts with 48 outputs; .* of 32")],
)
def test_experts_that_end_inside_a_panel_are_for_the_reference(sizes: tuple[int, int], says: str) -> None:
    finished = layer((QuantType.F16,) * 3, Experts(4, 2), sizes).finish()
    assert np.isfinite(finished.reference(chain(3, num_states=0))).all()
    with pytest.raises(UnsupportedModel, match=says):
        finished.compile(ISAS[0])


def test_the_builder_takes_no_ids_of_unknown_origin() -> None:
    def builder() -> "tuple[_native.ProgramBuilder, int]":
        b = _native.ProgramBuilder(4, 4)
        for width in (32, 4, 4, 32, 3):  # x, routes, logits, out, other
            b.buffer(width)
        pair = b.matrix(np.zeros(4 * 2 * 32 * 16 * 4 * 2, np.uint8), ["F32", "F32"], 4 * 16, 32)
        return b, pair

    none = _native.NormRef(-1, 0.0)
    b, pair = builder()
    with pytest.raises(ValueError, match="experts: routes"):
        b.expert_glu(0, none, 1, pair, "silu", 3)
    for num_experts, num_used, out in ((4, 0, 1), (4, 5, 1), (3, 2, 1), (4, 2, 4)):
        with pytest.raises(ValueError, match="route"):
            b.route(2, num_experts, num_used, out)
    b.route(2, 4, 2, 1)
    b.expert_glu(0, none, 1, pair, "silu", 3)
    with pytest.raises(ValueError, match="expert_glu: shapes"):
        b.expert_glu(3, none, 1, pair, "silu", 2)
    with pytest.raises(ValueError, match="expert_down: shapes"):
        b.expert_down(3, 1, pair, -1, np.empty(0, np.uint8), (False, False, False, False, 0), 0)
    b.add_norm(2, 2, none, 1)  # another value in the same buffer
    with pytest.raises(ValueError, match="experts: routes"):
        b.expert_glu(0, none, 1, pair, "silu", 3)
