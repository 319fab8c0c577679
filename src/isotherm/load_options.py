"""What a model may be loaded with."""

from isotherm.errors import OptionError
from isotherm.types import KvType, LoadOptions

BACKENDS = ("cpu", "reference")
KV_TYPES = tuple(kv_type.value for kv_type in KvType)

MAX_PARALLEL = 256


def check_load_options(options: LoadOptions) -> None:
    """Raises OptionError for what no model could be loaded with."""
    if options.backend not in BACKENDS:
        raise OptionError(f"backend {options.backend!r}; known: {', '.join(BACKENDS)}")
    if options.kv not in KV_TYPES:
        raise OptionError(f"kv {options.kv!r}; known: {', '.join(KV_TYPES)}")
    if options.backend == "reference" and options.kv != KvType.F16.value:
        raise OptionError(f"kv {options.kv!r}: the reference backend keeps keys and values in float32; leave it out")
    if options.threads is not None and not 1 <= options.threads <= 1024:
        raise OptionError(f"threads is {options.threads}; it must be from 1 to 1024")
    if options.context_tokens is not None and options.context_tokens < 2:
        raise OptionError(f"context_tokens is {options.context_tokens}; it must be at least 2")
    if not 1 <= options.parallel <= MAX_PARALLEL:
        raise OptionError(f"parallel is {options.parallel}; it must be from 1 to {MAX_PARALLEL}")
    if options.kv_bytes is not None and options.kv_bytes < 0:
        raise OptionError(f"kv_bytes is {options.kv_bytes}; it must be at least 0, or None")
