"""The native runtime among its surroundings: Ctrl-C, fork, a caller's float mode, other Python threads."""

import ctypes
import os
import platform
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sketch import F32, ISAS, Finished, Sketch, StoredTensor, assert_equal, chain, random_inputs
from tiny import TinyModel, make_tiny, run, text_ids

from isotherm import _native
from isotherm.backends.cpu.isa import KNOWN_ISAS, choose_isa
from isotherm.errors import UnsupportedCpu
from isotherm.program import ops
from isotherm.program.ops import Projection
from isotherm.types import QuantType

FLUSH_TO_ZERO, DENORMALS_ARE_ZERO, ROUND_UP = 0x8000, 0x0040, 0x4000  # bits of MXCSR


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    sizes = {"hidden_size": 64, "ffn_size": 128, "num_kv_heads": 2, "head_dim": 16}
    return make_tiny(tmp_path_factory.mktemp("tiny"), "llama", QuantType.Q8_0, **sizes)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("num_threads", [1, 3, 11])
def test_ctrl_c_stops_a_forward_and_leaves_it_usable(tmp_path: Path, num_threads: int) -> None:
    model = make_tiny(tmp_path, "llama", QuantType.F32, num_layers=12)
    compiled = model.native("scalar", num_threads)
    long = model.batch(text_ids(100))
    began = time.perf_counter()
    expected = run(compiled, long)
    whole_s = time.perf_counter() - began
    assert whole_s > 0.3, "too quick to be interrupted: make the model larger"

    signalled_at: list[float] = []

    def interrupt() -> None:
        signalled_at.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    def forward_until_interrupted() -> None:
        timer = threading.Timer(whole_s / 8, interrupt)
        timer.start()
        compiled.forward(long)
        timer.join()

    with pytest.raises(KeyboardInterrupt):
        forward_until_interrupted()
    assert time.perf_counter() - signalled_at[0] < whole_s / 2, "the forward ran to its end"
    assert_equal(run(compiled, long), expected, "after the interrupt")


def test_a_handler_that_raises_nothing_stops_nothing(tiny: TinyModel) -> None:
    compiled = tiny.native(ISAS[0], 2)
    batch = tiny.batch(text_ids(512))
    expected = run(compiled, batch)
    handled: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: handled.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        for _ in range(100):
            assert_equal(run(compiled, batch), expected, "under alarms")
            if len(handled) >= 3:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it is threaded, and forks: that is the test
def test_a_forked_child_gives_the_same_answer(tiny: TinyModel) -> None:
    """The child has none of the pool's threads, and starts its own; the parent's are not disturbed."""
    compiled = tiny.native(ISAS[-1], 3)
    batch = tiny.batch(text_ids(100))
    expected = run(compiled, batch)
    for _ in range(2):
        assert_equal(in_child(lambda: run(compiled, batch)).reshape(expected.shape), expected, "child")
        assert_equal(run(compiled, batch), expected, "parent")


def in_child(answer: Callable[[], F32]) -> F32:
    """What a forked child computes; fails where it does not end by itself within a minute."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer().tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}"
    return np.frombuffer(data, np.float32)


@contextmanager
def float_mode(bits: int) -> Iterator[None]:
    """This thread's MXCSR with `bits` set, by way of the C library's fenv_t: MXCSR is its last word."""
    libm = ctypes.CDLL("libm.so.6")
    saved, changed = ctypes.create_string_buffer(32), ctypes.create_string_buffer(32)
    assert libm.fegetenv(saved) == 0
    assert libm.fegetenv(changed) == 0
    (mxcsr,) = struct.unpack_from("<I", changed, 28)
    struct.pack_into("<I", changed, 28, mxcsr | bits)
    libm.fesetenv(changed)
    try:
        yield
    finally:
        libm.fesetenv(saved)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="reaches for MXCSR through glibc's fenv_t"
)
@pytest.mark.parametrize("bits", [FLUSH_TO_ZERO | DENORMALS_ARE_ZERO, ROUND_UP], ids=["flush", "round-up"])
def test_the_callers_float_mode_does_not_matter(bits: int) -> None:
    """Products of the size of denormals: a caller who flushes them, or rounds up, gets the same bits."""
    sketch = Sketch()
    x = sketch.input(random_inputs(8, 64))
    y = sketch.value(32)
    weight = sketch.floats("w", random_inputs(32, 64) * np.float32(1e-38))
    sketch.add(ops.QuantLinear(x, None, (Projection(y, weight, None),), None))
    finished, batch = sketch.finish(y), chain(8, num_states=0)
    expected = finished.reference(batch)
    assert ((expected != 0) & (np.abs(expected) < np.finfo(np.float32).tiny)).any(), "no denormal to lose"
    for isa in ISAS:
        compiled = finished.compile(isa, 1)
        with float_mode(bits):
            changed = 1.0 + float(np.ldexp(1.0, -60)) > 1.0 or float(np.float32(1e-39) * np.float32(1)) == 0.0
            compiled.forward(batch)
            actual = compiled.logits(0, 8)
        assert changed, "the mode was not set"
        assert_equal(actual, expected, isa)


def test_two_compiled_programs_run_side_by_side(tiny: TinyModel) -> None:
    """Two Python threads, each with its own compiled object: neither waits for the other nor disturbs it."""
    batch = tiny.batch(text_ids(200))
    expected = run(tiny.native(ISAS[-1], 1), batch)
    results: list[F32] = []
    threads = [
        threading.Thread(target=lambda: results.extend(run(tiny.native(ISAS[-1], 2), batch) for _ in range(5)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 10
    for actual in results:
        assert_equal(actual, expected, "side by side")


def test_compiled_programs_come_and_go(tiny: TinyModel) -> None:
    """Pools end with their objects: no threads are left behind."""
    before = len(os.listdir("/proc/self/task"))
    for _ in range(20):
        run(tiny.native(ISAS[-1], 4), tiny.batch(text_ids(3)))
    assert len(os.listdir("/proc/self/task")) <= before + 3


def test_a_batch_outside_the_limits_is_refused(tiny: TinyModel) -> None:
    compiled = tiny.native(ISAS[-1], 1, max_tokens=16, num_pages=2)
    with pytest.raises(ValueError, match="tokens of a batch"):
        compiled.forward(tiny.batch(text_ids(17)))
    with pytest.raises(AssertionError, match="past the context"):
        compiled.forward(tiny.batch(text_ids(1), 2048, np.zeros(33, np.int32)))
    compiled.forward(tiny.batch(text_ids(16)))
    with pytest.raises(ValueError, match="head rows"):
        compiled.logits(10, 7)


def test_choose_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ISOTHERM_ISA", raising=False)
    available = _native.available_isas()
    assert available[0] == "scalar"
    assert choose_isa() == available[-1]
    assert choose_isa("scalar") == "scalar"
    monkeypatch.setenv("ISOTHERM_ISA", "scalar")
    assert choose_isa() == "scalar"
    with pytest.raises(UnsupportedCpu, match=r"sse9.*scalar, avx2, avxvnni, avx512, neon, neon_i8mm"):
        choose_isa("sse9")
    monkeypatch.setattr(_native, "available_isas", lambda: ["scalar"])
    with pytest.raises(UnsupportedCpu, match="avx512: this processor lacks it"):
        choose_isa("avx512")
    assert set(available) <= set(KNOWN_ISAS)


@pytest.mark.parametrize("quant_type", [QuantType.F16, QuantType.Q4_0, QuantType.Q4_K, QuantType.Q6_K])
def test_weights_of_any_bytes_end_a_forward(quant_type: QuantType) -> None:
    """Infinite scales and NaN among them."""
    raw = np.random.default_rng(0).integers(0, 256, (64, quant_type.row_bytes(256)), np.uint8)
    raw[1] = 0xFF
    for isa in ISAS:
        assert two_layers(StoredTensor(quant_type, (64, 256), raw)).native(chain(20, num_states=0), isa).shape == (
            20,
            64,
        )


def test_not_a_number_stays_one() -> None:
    """One weight that is none makes one value of the first layer none, and through it all of the second."""
    values = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float16)
    values[7, 100] = np.nan
    finished = two_layers(StoredTensor(QuantType.F16, (64, 256), values.view(np.uint8)))
    with np.errstate(invalid="ignore"):
        assert np.isnan(finished.reference(chain(20, num_states=0))).all()
    for isa in ISAS:
        assert np.isnan(finished.native(chain(20, num_states=0), isa)).all(), isa


def two_layers(weight: StoredTensor) -> Finished:
    """`weight`, and Q8_0 after it."""
    sketch = Sketch()
    x = sketch.input(random_inputs(20, 256))
    hidden, y = sketch.value(64), sketch.value(64)
    sketch.add(ops.QuantLinear(x, None, (Projection(hidden, sketch.stored("w", weight), None),), None))
    after = sketch.matrix("after", QuantType.Q8_0, 64, 64)
    sketch.add(ops.QuantLinear(hidden, None, (Projection(y, after, None),), None))
    return sketch.finish(y)
