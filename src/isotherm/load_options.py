"""What a model may be loaded with."""

import math
import re
from dataclasses import dataclass

from isotherm.errors import OptionError
from isotherm.types import KvType, LoadOptions

BACKENDS = ("cpu", "reference")
KV_TYPES = tuple(kv_type.value for kv_type in KvType)

MAX_PARALLEL = 256


EXACT = "exact"
CHOICE_SUFFIX = ".npz"  # of the file of a choice, which stands for its budget
_BUDGET = re.compile(r"(kl)=([0-9.e-]+)|(ppl)=\+?([0-9.e-]+)%")


@dataclass(frozen=True)
class Budget:
    """How far answers may be from the exact ones: "kl", KL divergence in nats a token; "ppl", growth of perplexity."""

    metric: str
    limit: float

    def __str__(self) -> str:
        return f"kl={self.limit:g}" if self.metric == "kl" else f"ppl=+{100 * self.limit:g}%"


def parse_budget(quality: str) -> Budget | None:
    """None: exact, or the file of a choice. Raises OptionError for what is no quality."""
    if quality == EXACT or quality.endswith(CHOICE_SUFFIX):
        return None
    if match := _BUDGET.fullmatch(quality.strip()):
        try:
            limit = float(match[2] or match[4]) / (1 if match[1] else 100)
        except ValueError:
            limit = math.nan
        if 0 < limit <= 1:
            return Budget(match[1] or match[3], limit)
    raise OptionError(
        f"quality {quality!r}; it must be exact, kl=NATS as in kl=0.01, or ppl=+PERCENT% as in ppl=+1%, "
        "or a file of `isotherm tune`"
    )


_DEVICE = re.compile(r"auto|cpu|gpu(:\d{1,3})?")


def check_load_options(options: LoadOptions) -> None:
    """Raises OptionError for what no model could be loaded with."""
    if options.backend not in BACKENDS:
        raise OptionError(f"backend {options.backend!r}; known: {', '.join(BACKENDS)}")
    if options.kv not in KV_TYPES:
        raise OptionError(f"kv {options.kv!r}; known: {', '.join(KV_TYPES)}")
    if options.backend == "reference" and options.kv != KvType.F16.value:
        raise OptionError(f"kv {options.kv!r}: the reference backend keeps keys and values in float32; leave it out")
    parse_budget(options.quality)
    if not _DEVICE.fullmatch(options.device):
        raise OptionError(
            f"device {options.device!r}; it must be auto, cpu, gpu or gpu:N, N as `isotherm doctor` lists them"
        )
    if options.backend == "reference" and options.device.startswith("gpu"):
        raise OptionError(f"device {options.device!r}: the reference backend runs on the CPU; leave it out")
    if options.vram_bytes is not None and options.vram_bytes < 1:
        raise OptionError(f"vram_bytes is {options.vram_bytes}; it must be at least 1, or None")
    if options.threads is not None and not 1 <= options.threads <= 1024:
        raise OptionError(f"threads is {options.threads}; it must be from 1 to 1024")
    if options.context_tokens is not None and options.context_tokens < 2:
        raise OptionError(f"context_tokens is {options.context_tokens}; it must be at least 2")
    if not 1 <= options.parallel <= MAX_PARALLEL:
        raise OptionError(f"parallel is {options.parallel}; it must be from 1 to {MAX_PARALLEL}")
    if options.kv_bytes is not None and options.kv_bytes < 0:
        raise OptionError(f"kv_bytes is {options.kv_bytes}; it must be at least 0, or None")
    if not 0 <= options.kv_share <= 1:
        raise OptionError(f"kv_share is {options.kv_share}; it must be from 0 to 1")
