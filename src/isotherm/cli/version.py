"""`isotherm 0.1.0 (commit abc1234, avx512)`: what a bug report needs first."""

import json
import os
import subprocess
from importlib import metadata
from pathlib import Path

_SHORT = 7
_GIT_TIMEOUT_S = 5.0


def version_text() -> str:
    """Raises UnsupportedCpu where ISOTHERM_ISA asks for what is not here."""
    from isotherm.backends.cpu.isa import choose_isa

    return f"isotherm {package_version()} (commit {commit() or 'unknown'}, {choose_isa()})"


def package_version() -> str:
    import isotherm

    return isotherm.__version__


def commit() -> str | None:
    """The commit this package is made of: from its source tree, from the build, or from the installer's record."""
    package = Path(__file__).parents[1]
    return _from_source_tree(package) or _from_build(package) or _from_installer()


def _from_source_tree(package: Path) -> str | None:
    root = package.parents[1]
    if package.parent.name != "src" or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", f"--short={_SHORT}", "HEAD"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # of a hook, say
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, env=environment)
    except (OSError, subprocess.TimeoutExpired):  # no git here
        return None
    return run.stdout.strip() or None


def _from_build(package: Path) -> str | None:
    """commit.txt, which a build from a source tree writes beside the modules."""
    path = package / "commit.txt"
    return path.read_text(encoding="utf-8").strip()[:_SHORT] or None if path.is_file() else None


def _from_installer() -> str | None:
    """PEP 610: what `pip install git+...` noted."""
    try:
        noted = metadata.distribution("isotherm").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    if noted is None:
        return None
    found = json.loads(noted).get("vcs_info", {}).get("commit_id")
    return str(found)[:_SHORT] if found else None
