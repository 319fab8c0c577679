"""From the bytes of a model file to a Checkpoint; nothing is believed before it is checked."""

from isotherm.formats.checkpoint import Checkpoint, open_checkpoint
from isotherm.formats.tensor_source import TensorSource

__all__ = ["Checkpoint", "TensorSource", "open_checkpoint"]
