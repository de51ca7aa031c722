"""The runtime sends nothing over the network and writes no files that were not requested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

INSPECT = """
import os, sys
import numpy as np
from anomalygpt_edge.runtime.inspection.inspector import Inspector
assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
with Inspector.open(sys.argv[1], threads=1) as inspector:
    print(inspector.inspect(np.full((60, 80, 3), 128, np.uint8)).status)
"""


def test_onnxruntime_keeps_no_telemetry(tiny_bundle: Path, tmp_path: Path) -> None:
    """Without the variable it writes a device id and an event database under the user's cache."""
    home = tmp_path / "home"
    home.mkdir()
    environ = {"HOME": str(home), "PATH": os.environ["PATH"]}  # no CI variable, which would turn it off too
    if "PYTHONPATH" in os.environ:
        environ["PYTHONPATH"] = os.environ["PYTHONPATH"]
    result = subprocess.run(
        [sys.executable, "-c", INSPECT, str(tiny_bundle)],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert not list(home.rglob("*"))
