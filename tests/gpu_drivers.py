"""Drivers that run GPU kernels for real on the CPU: PoCL, an OpenCL driver from the wheels of the test extra, and a
fake of CUDA (native/fake_cuda.cpp).

`open_driver` is called before anything asks for devices, in each process.
"""

import atexit
import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_SCRATCH = tempfile.TemporaryDirectory()
atexit.register(_SCRATCH.cleanup)
_OLD_NAME = b"generic"  # what LLVM 14 says of a processor that is newer than itself, and then refuses
_KNOWN_CPU = b"x86-64-v3"  # has what the kernels need: fused multiply-add, float16 conversion
_NATIVE = Path(__file__).parent / "native"


@cache
def open_driver() -> str:
    """Why there is none, or nothing.

    ISOTHERM_TEST_GPU: fake-cuda; cuda, this machine's; a library of OpenCL; unset: PoCL.
    """
    wanted = os.environ.get("ISOTHERM_TEST_GPU", "")
    if wanted == "cuda":
        os.environ["ISOTHERM_OPENCL"] = ""
    elif wanted == "fake-cuda":
        os.environ |= fake_cuda(Path(_SCRATCH.name))
    else:
        os.environ["ISOTHERM_CUDA"] = ""
        if not wanted:
            return _open_pocl()
        os.environ["ISOTHERM_OPENCL"] = wanted
    return ""


def build_driver(name: str, folder: Path) -> Path:
    """One of native/, as a library."""
    library = folder / f"lib{name}.so"
    source = _NATIVE / f"{name}.cpp"
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", "-O1", source, "-o", library], check=True, timeout=120)
    return library


def fake_cuda(folder: Path) -> dict[str, str]:
    """What the environment says where it is the only driver."""
    library = str(build_driver("fake_cuda", folder))
    return {
        "ISOTHERM_OPENCL": "",
        "ISOTHERM_CUDA": library,
        "ISOTHERM_NVRTC": library,
        "FAKE_FOLDER": str(folder),
    }


def _open_pocl() -> str:
    spec = find_spec("pyopencl")
    if spec is None or spec.origin is None:
        return "no PoCL: pip install 'pyopencl[pocl]' brings it"
    home = Path(spec.origin).parent
    drivers, loaders = sorted(home.glob(".libs/libpocl*")), sorted(home.glob(".libs/libOpenCL*"))
    if not drivers or not loaders:
        return f"no PoCL in {home}: pip install 'pyopencl[pocl]' brings it"
    os.environ.setdefault("POCL_CACHE_DIR", _SCRATCH.name)
    os.environ.setdefault("POCL_EXTRA_BUILD_FLAGS", "-cl-opt-disable")  # compiles three times as fast
    os.environ["PYOPENCL_HOME"] = str(home)  # where the driver finds its own files
    os.environ["OCL_ICD_VENDORS"] = str(home / ".libs" / "pocl.icd")  # and no driver of this machine
    os.environ["ISOTHERM_OPENCL"] = str(loaders[0])
    driver = ctypes.CDLL(str(drivers[0]))
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        _name_cpu(driver)
    return ""


def _name_cpu(driver: ctypes.CDLL) -> None:
    """Where the driver's compiler does not know this processor it is told of an older one, by other machine code in
    place of the function that names it: there is no setting for that."""
    function, libc = driver.pocl_get_llvm_cpu_name, ctypes.CDLL(None)
    function.restype = ctypes.c_char_p
    if function() != _OLD_NAME:
        return
    address = ctypes.cast(function, ctypes.c_void_p).value
    strdup = ctypes.cast(libc.strdup, ctypes.c_void_p).value  # the caller frees it
    assert address is not None
    assert strdup is not None
    # mov rdi, name; mov rax, strdup; jmp rax
    name = ctypes.addressof(_NAME)
    code = b"\x48\xbf" + name.to_bytes(8, "little") + b"\x48\xb8" + strdup.to_bytes(8, "little") + b"\xff\xe0"
    page, size = address & -mmap.PAGESIZE, 2 * mmap.PAGESIZE
    assert libc.mprotect(ctypes.c_void_p(page), size, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) == 0
    ctypes.memmove(address, code, len(code))
    assert libc.mprotect(ctypes.c_void_p(page), size, mmap.PROT_READ | mmap.PROT_EXEC) == 0


_NAME = ctypes.create_string_buffer(_KNOWN_CPU)
