"""https by certificate files."""

import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving import START_S, Serving


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Signed by itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    chain, key = folder / "chain.pem", folder / "key.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(chain)]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *files, *name]
    subprocess.run(command, check=True, capture_output=True)
    return chain, key


def test_https(tiny: Path, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    chain, key = map(str, certificate)
    trusting = ssl.create_default_context(cafile=chain)
    with (
        Serving([str(tiny), "--tls-cert", chain, "--tls-key", key], tmp_path) as server,
        httpx.Client(base_url=server.url, verify=trusting) as client,
    ):
        assert server.url.startswith("https://")
        deadline = time.monotonic() + START_S
        while client.get("/health").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "the rain"}], "max_tokens": 4}
        own = {"origin": server.url}
        assert client.post("/v1/chat/completions", json=chat, headers=own).json()["usage"]["completion_tokens"] > 0
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://localhost:{server.port}/health")
        assert client.get("/health").status_code == 200


@pytest.mark.parametrize(("chain", "key"), [(0, 0), (1, 0)], ids=["two chains", "exchanged"])
def test_files_that_are_no_certificate(tiny: Path, certificate: tuple[Path, Path], chain: int, key: int) -> None:
    files = ["--tls-cert", str(certificate[chain]), "--tls-key", str(certificate[key])]
    command = [sys.executable, "-m", "isotherm", "serve", str(tiny), "--port", "0", *files]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {files[0]} {files[1]} and --tls-key")
