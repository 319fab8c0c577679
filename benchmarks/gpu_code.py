"""What CUDA's compiler makes of the kernels, read from the machine code; needs no GPU.

    pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm
    python benchmarks/gpu_code.py --architecture sm_86 --types Q4_0 Q4_K --kernels multiply_1 attend_few

Prints registers and spilled bytes of each kernel, and of each straight run of instructions that loads from memory how
many there are, how many load, and how often one waits for what was loaded while more is to be loaded after it. A run
with many such waits takes the time of memory as many times.
"""

import argparse
import ctypes
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from isotherm.backends.gpu.sources import (
    Dot4,
    Source,
    Tiling,
    attention_source,
    choice_source,
    elementwise_source,
    matmul_source,
)
from isotherm.program.ops import AttentionShape
from isotherm.types import KvType, QuantType

NVRTC, _NVDISASM = "cu*/lib/libnvrtc.so.*", "cu*/bin/nvdisasm"
_LOAD = re.compile(r"(?:@!?U?P\d+ )?LDG\S* R(\d+)")
_USED = r"entry function '{}'.*?(\d+) bytes spill stores.*?Used (\d+) registers"


@dataclass(frozen=True)
class Run:
    """Instructions between two places that are jumped to."""

    instructions: int
    loads: int
    waits: int


def find_installed(pattern: str) -> Path | None:
    """A file of NVIDIA's wheels."""
    spec = find_spec("nvidia")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


def compile_source(source: Source, architecture: str, form: str, *options: str) -> tuple[bytes, str]:
    """What NVRTC makes of kernels, and what it tells.

    form: CUBIN, of a real architecture (sm_86), or PTX, of a virtual one (compute_86).

    Raises ValueError for what does not compile.
    """
    path = find_installed(NVRTC)
    assert path is not None, "NVRTC is not installed"
    library, program, size = ctypes.CDLL(str(path)), ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.text.encode(), b"kernels.cu", 0, None, None) == 0

    def output(name: str) -> bytes:
        assert getattr(library, f"nvrtcGet{name}Size")(program, ctypes.byref(size)) == 0
        text = ctypes.create_string_buffer(size.value)
        assert getattr(library, f"nvrtcGet{name}")(program, text) == 0
        return text.raw

    words = [word.encode() for word in (*source.options(architecture).split(), *options)]
    status = library.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
    log = output("ProgramLog").decode()
    if status != 0:
        raise ValueError(log)
    made = output(form)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return made, log


def disassemble(code: bytes) -> str:
    tool = find_installed(_NVDISASM)
    assert tool is not None, "nvdisasm is not installed"
    tool.chmod(0o755)  # as a wheel brings it, it is no program
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def runs(text: str, kernel: str) -> Iterator[Run]:
    """Those that load. text: of all kernels."""
    text = text[text.index(f".text.{kernel}:") :]
    for run in re.split(r"^\.L_x_\d+:", text[: text.find(".section")], flags=re.MULTILINE):
        found = count_waits(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", run, re.MULTILINE))
        if found.loads:
            yield found


def count_waits(instructions: list[str]) -> Run:
    under_way: set[str] = set()
    loads, waits, is_waited_for = 0, 0, True
    for instruction in instructions:
        if match := _LOAD.match(instruction):
            loads += 1
            waits += is_waited_for
            is_waited_for = False
            num_words = 4 if ".128" in instruction else 2 if ".64" in instruction else 1
            under_way |= {f"R{int(match[1]) + i}" for i in range(num_words)}
        elif used := under_way.intersection(re.findall(r"\bR\d+\b", instruction)):
            is_waited_for = True
            under_way -= used
    return Run(len(instructions), loads, waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_86")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
    parser.add_argument("--depth", type=int, default=1, help="Tiling.few_depth")
    parser.add_argument(
        "--kernels", nargs="+", default=["multiply_1", "multiply_many", "attend_few", "quantise_normed"]
    )
    parser.add_argument("--out", type=Path, help="append JSON lines")
    args = parser.parse_args()
    if not find_installed(NVRTC) or not find_installed(_NVDISASM):
        raise SystemExit("to be installed first: pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm")
    tiling = Tiling(few_depth=args.depth, dot4=Dot4.PTX)
    sources = {name: matmul_source(QuantType[name], QuantType[name], tiling) for name in args.types}
    sources["attention"] = attention_source(AttentionShape(32, 8, 128, 0.1, None), KvType.F16)
    sources |= {"elementwise": elementwise_source(), "choice": choice_source()}
    for label, source in sources.items():
        code, log = compile_source(source, args.architecture, "CUBIN", "--ptxas-options=-v")
        text = disassemble(code)
        for kernel in args.kernels:
            if not (told := re.search(_USED.format(kernel), log, re.DOTALL)):
                continue
            found = list(runs(text, kernel))
            print(f"{label} {kernel}: {told[2]} registers, {told[1]} bytes spilled")
            for run in found:
                print(f"    {run.instructions} instructions, {run.loads} loads, {run.waits} waits")
            if args.out:
                facts = {"source": label, "kernel": kernel, "architecture": args.architecture, "depth": args.depth}
                facts |= {"registers": int(told[2]), "spilled_bytes": int(told[1]), "runs": list(map(asdict, found))}
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
