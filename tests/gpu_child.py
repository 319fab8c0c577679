"""A model loaded and asked in a process of its own: a process has one driver."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Prints notices and the answer, or the error.
_CHILD = """
import sys
import weakref
sys.path.insert(0, sys.argv[3])
if sys.argv[4] == "pocl":
    from gpu_drivers import open_driver
    assert not open_driver(), open_driver()
import isotherm
import isotherm.assemble
if sys.argv[5] != "tuned":
    isotherm.assemble.tuned_tiling = lambda gpu, *_: gpu.tiling
if sys.argv[5] == "trusted":  # without a trial of what it computes
    isotherm.assemble.check_answers = lambda *_: None
from isotherm.errors import IsothermError
from isotherm.formats.fetching import SilentReporter
class Reporter(SilentReporter):
    def notice(self, text):
        print("notice:", text)
try:
    options = isotherm.LoadOptions(context_tokens=256, device=sys.argv[2], cache_bytes=0)
    with isotherm.load(sys.argv[1], options=options, reporter=Reporter()) as model:
        print("answer:", list(model.generate("the cat and the hat are in the house", max_tokens=8).token_ids))
except IsothermError as error:
    print(f"{type(error).__name__}: {error}")
"""


def run_child(model: Path, device: str, driver: str, trust: str, environment: Mapping[str, str]) -> str:
    """What it printed.

    driver: "pocl", or one that the environment names. trust: trusted; tried against the CPU; or tuned, and tried.
    """
    values = {**os.environ, "ISOTHERM_CACHE": str(model.parent), **environment}
    arguments = [sys.executable, "-c", _CHILD, str(model), device, str(Path(__file__).parent), driver, trust]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=values)
    assert run.returncode == 0, run.stderr
    return run.stdout
