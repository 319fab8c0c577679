"""`isotherm doctor`: the report gives nobody away, damage is found, each complaint has a way out."""

import json
import os
import socket
import tomllib
from dataclasses import replace
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
import pytest
from gpu_drivers import open_driver
from tiny_models import write_tiny

import isotherm
from isotherm.cli import diagnosis, main
from isotherm.cli.diagnosis import DEPENDENCIES, Diagnosis, Folder, Packed, to_text, warnings, without_names
from isotherm.facts import DeviceFacts, GpuDeviceFacts, GpuLimits
from isotherm.types import QuantType

ROOT = Path(__file__).parents[2]
USER, HOST = "berta", "bertas-laptop"
GPU = GpuDeviceFacts(
    device="gpu:0",
    name="Some GPU",
    driver="Maker 1.2",
    is_gpu=True,
    shares_memory=False,
    memory_bytes=24 * 10**9,
    num_units=80,
    complaint="",
    limits=GpuLimits(copy_bytes_per_s=900e9, int8_ops_per_s=80e12, launch_s=2.5e-6),
)
SOUND = Diagnosis(
    versions={"isotherm": "0.1.0"},
    python="CPython 3.12.1",
    platform="Linux",
    device=DeviceFacts("Some CPU", 8, 16 * 10**9, "avx512", 40e9, 900e9),
    num_machine_cores=8,
    machine_memory_bytes=32 * 10**9,
    available_memory_bytes=16 * 10**9,
    isas=("scalar", "avx2", "avx512"),
    huge_pages="madvise",
    load_average=0.1,
    environment={},
    folders=(Folder("packed models", "/cache/packed", 10**9, 1, 10**11),),
    packed=(Packed("/cache/packed/a.p32", 10**9, ""),),
    gpus=(GPU,),
    no_gpus="",
    complaints=(),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder of a user on a machine with names; a packed model lies in its cache."""
    home = tmp_path / USER
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("ISOTHERM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("ISOTHERM_CACHE", str(home / "cache"))
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.example")
    monkeypatch.setattr(psutil.Process, "username", lambda _self: USER)
    with isotherm.load(write_tiny(home / "secret-project.gguf", "llama", QuantType.Q4_0), threads=1):
        pass
    return home


def packed_file(home: Path) -> Path:
    (path,) = (home / "cache" / "packed").glob("*.p32")
    return path


def test_everything_is_told(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    streams = capsys.readouterr()
    for expected in (isotherm.__version__, "GB/s", "GOPS", str(home / "cache" / "packed"), "1 of 1 verified sound"):
        assert expected in streams.out
    assert packed_file(home).name in streams.out
    assert "verifying secret-project" in streams.err


@pytest.mark.parametrize("arguments", [["--report"], ["--report", "--json"]])
def test_a_report_names_neither_user_nor_machine(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setenv("ISOTHERM_SCRATCH", f"/data/{USER}/x on {HOST}")
    monkeypatch.setenv("ISOTHERM_API_KEY", "hunter2")
    assert main(["doctor", *arguments]) == 0
    text = capsys.readouterr().out
    for private in (USER, HOST, str(home), "hunter2"):
        assert private not in text
    assert "~/cache/packed" in text
    assert "/data/<user>/x on <host>" in text
    assert "(set)" in text


def test_a_report_is_one_markdown_block_and_keeps_model_names_to_itself(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISOTHERM_NOTE", "a ``` b\x1b[2J")
    assert main(["doctor", "--report"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("### isotherm doctor\n\n```text\n")
    assert text.endswith("\n```\n")
    assert text.count("```") == 2
    assert "\x1b" not in text
    assert "secret-project" not in text
    assert home.exists()


def test_json_has_facts_and_warnings(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed_file(home).write_bytes(b"torn")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["read_bytes_per_s"] > 0
    assert found["packed"][0]["complaint"] == "is not a packed model"
    assert any("is not a packed model: delete it" in warning for warning in found["warnings"])


def test_a_flipped_bit_in_a_packed_model_is_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed_file(home)
    data = bytearray(path.read_bytes())
    data[4096 + 100] ^= 4  # inside the first entry
    path.write_bytes(data)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "0 of 1 verified sound" in text
    assert f"warning: {path} is damaged in 1 of " in text


def test_wrong_settings_are_told_and_stop_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ISOTHERM_THREADS", "many")
    monkeypatch.setenv("ISOTHERM_ISA", "sse9")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "warning: ISOTHERM_THREADS is 'many'" in text
    assert "sse9" in text
    assert "unset ISOTHERM_ISA" in text
    assert home.exists()


def test_a_sound_machine_has_no_warnings() -> None:
    assert warnings(SOUND) == []
    assert to_text(SOUND, with_models=True).endswith("nothing to complain of")


@pytest.mark.parametrize(
    ("changed", "message", "way_out"),
    [
        (replace(SOUND, huge_pages="never"), "huge pages are off", "echo madvise"),
        (replace(SOUND, isas=("scalar",), device=replace(SOUND.device, isa="scalar")), "no AVX2", "AVX2"),
        (replace(SOUND, device=replace(SOUND.device, isa="avx2")), "this processor has avx512", "unset ISOTHERM_ISA"),
        (replace(SOUND, num_machine_cores=16), "8 of 16 cores", "raise the container's CPU limit"),
        (
            replace(SOUND, device=replace(SOUND.device, memory_bytes=4 * 10**9)),
            "leaves 4.0 GB of 16.0 GB free memory",
            "raise its memory limit",
        ),
        (replace(SOUND, load_average=7.5), "load 7.5 on 8 cores", "end it before you measure"),
        (
            replace(SOUND, folders=(replace(SOUND.folders[0], free_bytes=10**8),) * 3),  # three folders, one disk
            "100.0 MB free on the disk of /cache/packed",
            "ISOTHERM_CACHE",
        ),
        (
            replace(SOUND, packed=(Packed("/cache/packed/a.p32", 10**9, "is not complete"),)),
            "a.p32 is not complete",
            "delete it",
        ),
        (
            replace(SOUND, gpus=(replace(GPU, complaint="it lacks exact division", limits=None),)),
            "gpu:0 (Some GPU) is not used: it lacks exact division",
            "a newer driver",
        ),
        (replace(SOUND, complaints=("ISOTHERM_X is wrong; mend it",)), "ISOTHERM_X", "mend it"),
    ],
)
def test_each_warning_has_a_way_out(changed: Diagnosis, message: str, way_out: str) -> None:
    (warning,) = warnings(changed)
    assert message in warning
    assert way_out in warning


def test_devices_are_listed() -> None:
    line = next(line for line in to_text(SOUND, with_models=False).splitlines() if line.startswith("gpu:0"))
    assert line.split(maxsplit=1)[1] == (
        "Some GPU, Maker 1.2, 80 units, 24.0 GB, copies 900.0 GB/s, int8 80000 GOPS, launches in 2.5 us"
    )
    poor = replace(GPU, complaint="it lacks exact division", limits=None, shares_memory=True)
    text = to_text(replace(SOUND, gpus=(poor,)), with_models=False)
    assert "Some GPU, Maker 1.2, shares the CPU's memory, 80 units, 24.0 GB, it lacks exact division" in text
    text = to_text(replace(SOUND, gpus=(), no_gpus="no OpenCL on this machine"), with_models=False)
    assert ["gpus", "no OpenCL on this machine"] in [line.split(maxsplit=1) for line in text.splitlines()]


def test_a_device_is_measured(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if reason := open_driver():
        pytest.skip(reason)
    assert main(["doctor", "--json"]) == 0
    (gpu,) = json.loads(capsys.readouterr().out)["gpus"]
    assert not gpu["is_gpu"]
    assert gpu["complaint"] == ""
    assert gpu["limits"]["copy_bytes_per_s"] > 1e8
    assert gpu["limits"]["int8_ops_per_s"] > 1e8
    assert 0 < gpu["limits"]["launch_s"] < 0.1


def test_names_are_masked_as_whole_words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/al")
    monkeypatch.setattr(socket, "gethostname", lambda: "pc")
    monkeypatch.setattr(diagnosis, "_user_name", lambda: "al")
    masked = without_names("/home/al/x /home/alice /home/al al pc. optional pcie")
    assert masked == "~/x /home/alice ~ <user> <host>. optional pcie"


def test_the_versions_are_those_of_the_dependencies() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert sorted(DEPENDENCIES) == sorted(line.partition(">")[0] for line in declared)
