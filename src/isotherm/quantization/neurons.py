"""Weights of an FFN in the order in which single neurons are read, beside their dense form (p32.py).

    rows     of up, for neurons that fire: a row of each, which is one lane of each P32 tile, units and fields in order
    neurons  columns of down: for each neuron its codes for all outputs; then, group of neurons that share a scale by
             group, the scales by output; then the minima alike, where the type has them

Outputs are padded to a multiple of 128 with zeros. A line of 64 bytes has the codes of 64 outputs or, of types whose
codes have at most four bits, of 128: the first 64 in its low halves. Within 64 outputs byte 16 l + 4 j + i is that of
output 16 j + 4 l + i: interleaving the lines of four neurons within each 16 bytes gives 16 outputs at a time, in order.
Codes are those that are multiplied: of types with VALUES the values, zero point included.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from isotherm.errors import ModelFileError
from isotherm.quantization.layouts import CODE_BITS, F32, U8, VALUES, ZERO_POINTS, decode
from isotherm.quantization.p32 import UNITS, padded_columns, tile_fields
from isotherm.types import QuantType

BLOCK_NEURONS = 32  # that share an activation scale
OUTPUT_ALIGNMENT = 128
_LINE_OUTPUTS = 64
_TOO_LARGE = 2.0**105  # see the contract, 3

_BYTE = np.arange(_LINE_OUTPUTS)
_OUTPUT_OF_BYTE = 16 * (_BYTE // 4 % 4) + 4 * (_BYTE // 16) + _BYTE % 4

# Their groups have 16 columns, so that a block has two scales.
_TWO_SCALES = frozenset(
    {
        *(QuantType.Q6_K, QuantType.Q2_K, QuantType.Q3_K, QuantType.NVFP4),
        *(QuantType.IQ1_M, QuantType.IQ2_XS, QuantType.IQ2_S),
    }
)
_HALF_SCALES = frozenset(
    {QuantType.Q4_0, QuantType.Q4_1, QuantType.Q5_0, QuantType.Q5_1, QuantType.Q8_0, QuantType.IQ4_NL}
)
_MINIMA = frozenset({QuantType.Q4_1, QuantType.Q5_1, QuantType.Q4_K, QuantType.Q5_K, QuantType.Q2_K})


@dataclass(frozen=True)
class NeuronForm:
    """How the codes and scales of a type's `neurons` are kept."""

    is_nibble: bool
    is_half: bool  # scales and minima are float16, else float32
    has_minimum: bool
    is_halved: bool  # scales and minima are of half a block
    zero_point: int


def neuron_form(quant_type: QuantType) -> NeuronForm | None:
    """None for floats, which are not quantised against."""
    if quant_type.is_float:
        return None
    return NeuronForm(
        is_nibble=CODE_BITS[quant_type] <= 4 and quant_type not in VALUES,
        is_half=quant_type in _HALF_SCALES,
        has_minimum=quant_type in _MINIMA,
        is_halved=quant_type in _TWO_SCALES,
        zero_point=ZERO_POINTS.get(quant_type, 0),
    )


def row_bytes(quant_type: QuantType, num_columns: int) -> int:
    """Bytes of one row."""
    unit = UNITS[quant_type]
    return -(-padded_columns(num_columns) // unit.columns) * unit.record.itemsize // 16


def neuron_bytes(quant_type: QuantType, num_outputs: int, num_neurons: int) -> int:
    """Bytes of the neurons of a matrix [num_outputs, num_neurons]."""
    form = neuron_form(quant_type)
    assert form is not None
    outputs = _padded_outputs(num_outputs)
    groups = num_neurons // BLOCK_NEURONS * (2 if form.is_halved else 1)
    planes = (2 if form.is_half else 4) * (1 + form.has_minimum)
    return outputs * num_neurons // (2 if form.is_nibble else 1) + outputs * groups * planes


def pack_rows(raw: U8, quant_type: QuantType, num_columns: int) -> U8:
    """`raw` [rows, row_bytes] of the file as rows [rows, row_bytes of this form]."""
    unit = UNITS[quant_type]
    num_units = -(-padded_columns(num_columns) // unit.columns)
    record = np.dtype(
        [(name, unit.record[name].base, unit.record[name].shape[:-1]) for name in unit.record.names or ()]
    )
    rows = np.zeros((len(raw), num_units), record)
    for name, values in tile_fields(raw, quant_type, num_columns).items():
        flat = rows[name].reshape(len(raw), -1)
        flat[:, : values.shape[1]] = values
        rows[name] = flat.reshape(rows[name].shape)
    return rows.view(np.uint8).reshape(len(raw), -1)


def pack_neurons(raw: U8, quant_type: QuantType, num_neurons: int) -> U8:
    """`raw` [outputs, row_bytes] of down as neurons [neuron_bytes].

    Raises ModelFileError for scales that are no numbers: skipping neurons would hide them.
    """
    form = neuron_form(quant_type)
    assert form is not None
    fields = decode(raw, quant_type, num_neurons)
    if not (np.abs(fields.scale) < _TOO_LARGE).all() or not _is_finite(fields.minimum):
        raise ModelFileError("a weight has scales that are no finite numbers; fetch the model again")
    outputs = _padded_outputs(len(raw))
    codes = np.zeros((num_neurons, outputs), np.uint8)
    codes[:, : len(raw)] = fields.codes.T
    lines = codes.reshape(num_neurons, -1, _LINE_OUTPUTS)[:, :, _OUTPUT_OF_BYTE]
    if form.is_nibble:
        lines = lines[:, 0::2] | np.left_shift(lines[:, 1::2], np.uint8(4))
    planes = [_plane(values, outputs, form) for values in (fields.scale, fields.minimum) if values is not None]
    return np.concatenate([np.ascontiguousarray(lines).reshape(-1), *planes])


def _plane(values: F32, outputs: int, form: NeuronForm) -> U8:
    """Scales [outputs, groups] as bytes, group by group."""
    plane: NDArray[np.floating] = np.zeros((values.shape[1], outputs), np.float16 if form.is_half else np.float32)
    plane[:, : len(values)] = values.T
    return plane.view(np.uint8).reshape(-1)


def _is_finite(minimum: F32 | None) -> bool:
    return minimum is None or bool(np.isfinite(minimum).all())


def _padded_outputs(num_outputs: int) -> int:
    return -(-num_outputs // OUTPUT_ALIGNMENT) * OUTPUT_ALIGNMENT
