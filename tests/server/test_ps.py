"""`isotherm ps` and `isotherm stop` ask a server that runs."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from serving import Serving

from isotherm.cli import main

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for what is near


@pytest.fixture(scope="module")
def kept(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with Serving([str(tiny), "--api-key", "sesame"], tmp_path_factory.mktemp("kept")) as server:
        yield server.wait_healthy()


def test_ps_and_stop(kept: Serving, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOTHERM_API_KEY", "sesame")
    port = ["--port", str(kept.port)]
    assert main(["ps", *port]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"]
    assert row.split()[0] == "tiny"
    assert "100% CPU" in row
    assert " 512 " in row
    assert main(["ps", "--json", *port]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["size_bytes"] > 1 << 20
    assert entry == {
        "name": "tiny",
        "size_bytes": entry["size_bytes"],
        "gpu_bytes": 0,
        "context_tokens": 512,
        "until": None,
    }
    assert main(["stop", "tiny", *port]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["ps", *port]) == 0
    assert capsys.readouterr() == ("", "no model is loaded; a request loads the one it names\n")
    assert main(["stop", "tiny", *port]) == 0
    assert capsys.readouterr().err == "tiny was not loaded\n"
    assert main(["stop", "nothing", *port]) == 1
    assert "served: tiny" in capsys.readouterr().err


def test_a_wrong_key(kept: Serving, capsys: Capture) -> None:
    assert main(["ps", "--port", str(kept.port), "--api-key", "wrong"]) == 2
    assert "the API key is wrong" in capsys.readouterr().err


def test_no_server(capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
    assert main(["ps", "--port", port]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: no server answers at http://127.0.0.1:{port}")
    assert "isotherm serve" in told


def test_another_server(capsys: Capture) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the library's name
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert main(["ps", "--port", str(server.server_port)]) == 1
    assert "is not `isotherm serve`" in capsys.readouterr().err
