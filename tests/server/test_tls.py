"""Files that are to be a certificate and its key; what they are for is in test_faults.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import trustme


@pytest.mark.parametrize("names", [("chain", "chain"), ("key", "chain"), ("chain", "absent")], ids="-".join)
def test_files_that_are_no_certificate(tiny: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "chain"))
    cert, key = (str(tmp_path / name) for name in names)
    command = [
        sys.executable,
        "-m",
        "isotherm",
        "serve",
        str(tiny),
        "--port",
        "0",
        "--tls-cert",
        cert,
        "--tls-key",
        key,
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: --tls-cert {cert} and --tls-key {key} cannot be used: ")
