"""What `isotherm doctor` finds: what this machine offers, whether the caches are sound, what slows things down here."""

import os
import platform
import re
import shutil
import socket
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

import isotherm
from isotherm import _native
from isotherm.backends.cpu.isa import choose_isa
from isotherm.backends.gpu.survey import survey
from isotherm.cli.console import notice, printable
from isotherm.cli.settings import choose, unknown_variables
from isotherm.errors import DeviceNotFound, OptionError, UnsupportedCpu
from isotherm.facts import DeviceFacts, GpuDeviceFacts
from isotherm.formats import folders
from isotherm.probe import measure, physical_cores
from isotherm.quantization.packed_cache import list_cache
from isotherm.quantization.packed_file import CacheMiss, PackedFile

DEPENDENCIES = (
    "fastapi",
    "httptools",
    "huggingface-hub",
    "jinja2",
    "llguidance",
    "numpy",
    "prometheus-client",
    "psutil",
    "pydantic",
    "rich",
    "tokenizers",
    "typer",
    "uvicorn",
    "uvloop",
)

_LEAST_FREE_BYTES = 4 * 10**9  # on the disk of a cache: room for one usual model
_SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Folder:
    purpose: str
    path: str
    num_bytes: int
    disk: int  # number of its disk, which folders may share
    free_bytes: int  # on that disk


@dataclass(frozen=True)
class Packed:
    """One packed model in the cache; `complaint` is empty where every byte of it is as it was written."""

    path: str
    num_bytes: int
    complaint: str


@dataclass(frozen=True)
class Diagnosis:
    versions: dict[str, str]
    python: str
    platform: str
    device: DeviceFacts
    num_machine_cores: int
    machine_memory_bytes: int
    available_memory_bytes: int  # of the machine; device.memory_bytes is what our container leaves of it
    isas: tuple[str, ...]
    huge_pages: str | None  # always, madvise or never; None where the system does not tell
    load_average: float | None
    environment: dict[str, str]
    folders: tuple[Folder, ...]
    packed: tuple[Packed, ...]
    gpus: tuple[GpuDeviceFacts, ...]
    no_gpus: str  # why there are none, where there is no driver
    complaints: tuple[str, ...]  # of settings and variables


def examine() -> Diagnosis:
    """Measures and looks; reads every packed model whole, and says so on stderr."""
    complaints = unknown_variables()
    try:
        choose({})
    except OptionError as error:
        complaints.append(str(error))
    isas = tuple(_native.available_isas())
    try:
        isa = choose_isa()
    except UnsupportedCpu as error:
        isa = isas[-1]
        complaints.append(f"{error}; unset ISOTHERM_ISA")
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # before our own work adds to it
    notice("measuring this machine")
    memory = psutil.virtual_memory()
    device = measure(physical_cores(), isa)
    gpus, no_gpus = _gpus()
    return Diagnosis(
        versions=_versions(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=platform.platform(),
        device=device,
        num_machine_cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        machine_memory_bytes=memory.total,
        available_memory_bytes=memory.available,
        isas=isas,
        huge_pages=_huge_pages(),
        load_average=load_average,
        environment=_environment(),
        folders=_folders(),
        packed=_packed(),
        gpus=gpus,
        no_gpus=no_gpus,
        complaints=tuple(complaints),
    )


def warnings(d: Diagnosis) -> list[str]:
    """What costs speed or room here, each with a way out."""
    device, best = d.device, d.isas[-1]
    found = list(d.complaints)
    if device.isa != best:
        found.append(f"the kernels run with {device.isa}, this processor has {best}: unset ISOTHERM_ISA")
    elif device.isa == "scalar":
        found.append(
            "no AVX2 here, nor NEON with dot products: the plain C++ kernels run, many times slower;"
            " use a machine (or guest) with either"
        )
    if d.huge_pages == "never":
        found.append(
            f"huge pages are off, which slows decoding by a tenth or more: echo madvise | sudo tee {_HUGE_PAGES}"
        )
    if device.num_cores < d.num_machine_cores:
        found.append(
            f"{device.num_cores} of {d.num_machine_cores} cores may be used (affinity or CPU quota): "
            "raise the container's CPU limit for more speed"
        )
    if device.memory_bytes < 0.9 * d.available_memory_bytes:
        found.append(
            f"the container leaves {_size(device.memory_bytes)} of {_size(d.available_memory_bytes)} free memory: "
            "raise its memory limit for larger models or contexts"
        )
    if d.load_average is not None and d.load_average > 0.5 * d.num_machine_cores:
        found.append(
            f"other work runs here (load {d.load_average:.1f} on {d.num_machine_cores} cores): "
            "end it before you measure, or expect less"
        )
    for folder in {folder.disk: folder for folder in d.folders}.values():
        if folder.free_bytes < _LEAST_FREE_BYTES:
            found.append(
                f"{_size(folder.free_bytes)} free on the disk of {folder.path}: make room, or point ISOTHERM_CACHE "
                "and HF_HOME to another disk"
            )
    unused = [gpu for gpu in d.gpus if gpu.complaint]
    found += [f"{gpu.device} ({gpu.name}) is not used: {gpu.complaint}; a newer driver may help" for gpu in unused]
    unsound = [packed for packed in d.packed if packed.complaint]
    found += [f"{packed.path} {packed.complaint}: delete it, the next start packs anew" for packed in unsound]
    return found


def to_text(d: Diagnosis, *, with_models: bool) -> str:
    """Lines of `name  value`, then the warnings. with_models: name each packed model."""
    device = d.device
    facts = {
        "versions": ", ".join(f"{name} {number}" for name, number in d.versions.items()),
        "python": d.python,
        "platform": d.platform,
        "cpu": f"{device.cpu_name}, {device.num_cores} of {d.num_machine_cores} cores",
        "instructions": f"{device.isa} (here: {', '.join(d.isas)})",
        "memory": f"{_size(device.memory_bytes)} for us, {_size(d.available_memory_bytes)} free, "
        f"{_size(d.machine_memory_bytes)} in all",
        **({gpu.device: _gpu_text(gpu) for gpu in d.gpus} or {"gpus": d.no_gpus or "no driver offers a device"}),
        "huge pages": d.huge_pages or "unknown",
        "reads memory": f"{device.read_bytes_per_s / 1e9:.1f} GB/s",
        "int8": f"{device.int8_ops_per_s / 1e9:.0f} GOPS",
        "load": "unknown" if d.load_average is None else f"{d.load_average:.1f}",
        "environment": ", ".join(f"{name}={value}" for name, value in d.environment.items())
        or "no ISOTHERM_ variables",
    }
    for folder in d.folders:
        facts[folder.purpose] = f"{folder.path}: {_size(folder.num_bytes)}, {_size(folder.free_bytes)} free on its disk"
    num_sound = sum(not packed.complaint for packed in d.packed)
    facts["packed files"] = f"{num_sound} of {len(d.packed)} verified sound"
    width = max(map(len, facts))
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts.items()]
    if with_models:
        lines += [f"{' ' * width}  {Path(packed.path).name}: {_size(packed.num_bytes)}" for packed in d.packed]
    found = warnings(d)
    lines += ["", *(f"warning: {text}" for text in found)] if found else ["", "nothing to complain of"]
    return "\n".join(printable(line).replace("```", "'''") for line in lines)


def without_names(text: str) -> str:
    """`text` with the home folder as ~, and without the names of user and machine."""
    for home in {str(Path.home()), str(Path.home().resolve())} - {"/"}:
        text = re.sub(re.escape(home) + r"(?![\w-])", "~", text)
    user, host = _user_name(), socket.gethostname()
    names = {user: "<user>", host: "<host>", host.partition(".")[0]: "<host>"}
    for name, mask in sorted(names.items(), key=lambda pair: -len(pair[0])):
        if name and name != "localhost":
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", mask, text)
    return text


def without_names_in(value: Any) -> Any:
    """The same for every text inside plain data."""
    if isinstance(value, dict):
        return {key: without_names_in(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_names_in(part) for part in value]
    return without_names(value) if isinstance(value, str) else value


def _user_name() -> str:
    try:
        return str(psutil.Process().username()).rpartition("\\")[2]
    except (KeyError, psutil.Error):  # a uid that no account has
        return ""


def _versions() -> dict[str, str]:
    versions = {"isotherm": isotherm.__version__}
    for name in DEPENDENCIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


def _gpus() -> tuple[tuple[GpuDeviceFacts, ...], str]:
    try:
        return tuple(survey()), ""
    except DeviceNotFound as error:
        return (), str(error).partition(";")[0]


def _gpu_text(gpu: GpuDeviceFacts) -> str:
    kind = "a CPU that poses as a device" if not gpu.is_gpu else "shares the CPU's memory" if gpu.shares_memory else ""
    parts = [gpu.name, gpu.driver, kind, f"{gpu.num_units} units, {_size(gpu.memory_bytes)}"]
    if best := gpu.limits:
        parts.append(f"copies {best.copy_bytes_per_s / 1e9:.1f} GB/s, int8 {best.int8_ops_per_s / 1e9:.0f} GOPS")
        parts.append(f"launches in {1e6 * best.launch_s:.1f} us")
    return ", ".join(part for part in (*parts, gpu.complaint) if part)


def _huge_pages() -> str | None:
    try:
        chosen = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        return None
    return chosen[1] if chosen else None


def _environment() -> dict[str, str]:
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith("ISOTHERM_")}
    return {
        name: "(set)" if any(word in name for word in _SECRET_WORDS) else value for name, value in variables.items()
    }


def _folders() -> tuple[Folder, ...]:
    places = {
        "packed models": folders.cache_dir() / "packed",
        "fetched models": folders.models_dir(),
        "hub cache": folders.hub_cache_dir(),
    }
    return tuple(_folder(purpose, path) for purpose, path in places.items())


def _folder(purpose: str, path: Path) -> Folder:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    num_bytes = 0
    for entry in path.rglob("*"):
        try:
            status = entry.lstat()  # the hub's snapshots are links to its blobs
        except FileNotFoundError:  # gone meanwhile
            continue
        num_bytes += status.st_size if not entry.is_dir() else 0
    return Folder(purpose, str(path), num_bytes, existing.stat().st_dev, shutil.disk_usage(existing).free)


def _packed() -> tuple[Packed, ...]:
    # Opening marks a file as just used; from the oldest on, that keeps the order of eviction.
    models = list_cache(folders.cache_dir() / "packed")
    results = []
    for number, model in enumerate(models, start=1):
        notice(f"verifying {model.path.name} ({number} of {len(models)}, {_size(model.num_bytes)})")
        results.append(Packed(str(model.path), model.num_bytes, _complaint(model.path, model.key)))
    return tuple(results)


def _complaint(path: Path, key: str | None) -> str:
    opened = PackedFile.open(path, key or "")
    if isinstance(opened, CacheMiss):
        return opened.reason.removeprefix(f"{path} ")
    damaged = opened.verify()
    return f"is damaged in {len(damaged)} of {len(opened.names)} parts" if damaged else ""


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
