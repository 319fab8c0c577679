"""Which device a name stands for."""

from isotherm import _native
from isotherm.errors import DeviceNotFound

AUTO, CPU = "auto", "cpu"


def choose_device(name: str) -> int | None:
    """name: auto, cpu, gpu or gpu:N. The number of the device, as `_native.list_gpus` has it; None: the CPU alone.

    auto: a GPU with memory of its own that can run our arithmetic, if there is one; one that shares the CPU's memory
    reads no faster. A GPU that both OpenCL and CUDA offer is OpenCL's, which needs no compiler of its own.

    Raises DeviceNotFound where a GPU was asked for and there is none, or it lacks something.
    """
    if name == CPU:
        return None
    number = name.partition(":")[2]
    try:
        found = list(enumerate(_native.list_gpus()))
    except DeviceNotFound:
        if name == AUTO:
            return None
        raise
    if number:
        return _numbered(int(number), [facts for _, facts in found])
    sound = [(i, facts) for i, facts in found if facts.is_gpu and not facts.lacks]
    opencl_names = {facts.name for _, facts in sound if not facts.architecture}
    usable = [
        (facts.shares_memory, -facts.memory_bytes, i)
        for i, facts in sound
        if not (facts.architecture and facts.name in opencl_names)
    ]
    if name == AUTO:
        usable = [candidate for candidate in usable if not candidate[0]]
    elif not usable:
        raise DeviceNotFound(f"no GPU that can be used here; {_list([facts for _, facts in found])}")
    return min(usable)[2] if usable else None


def _numbered(number: int, found: "list[_native.GpuFacts]") -> int:
    if number >= len(found):
        raise DeviceNotFound(f"there is no gpu:{number}; {_list(found)}")
    if found[number].lacks:
        raise DeviceNotFound(
            f"gpu:{number} ({found[number].name}) lacks {found[number].lacks}; --device cpu needs none"
        )
    return number


def _list(found: "list[_native.GpuFacts]") -> str:
    if not found:
        return "no driver offers any device; --device cpu needs none"
    kinds = ["" if facts.is_gpu else " (a CPU)" for facts in found]
    lacks = [f", which lacks {facts.lacks}" if facts.lacks else "" for facts in found]
    return "; ".join(f"gpu:{i} is {facts.name}{kinds[i]}{lacks[i]}" for i, facts in enumerate(found))
