"""Entry point of ``python -m tools.gpu_kernels``; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from anomalygpt_edge.kernels.cuda.driver import open_device

from . import as_json, cases, check, check_kernels, line

parser = argparse.ArgumentParser(description="check and time the CUDA kernels on this machine's GPU")
parser.add_argument("--json", type=Path, help="write the figures to this file")
parser.add_argument(
    "--small", action="store_true", help="small sizes, one run each, no timing: for compute-sanitizer"
)
arguments = parser.parse_args()
if arguments.small:
    driver = open_device()
    results = [check(driver, case) for case in cases(driver, small=True)]
    print("\n".join(map(line, results)))
    sys.exit(not all(result.passed for result in results))
report = check_kernels()
if arguments.json and not report.skipped:
    arguments.json.write_text(json.dumps(as_json(report), indent=1) + "\n", encoding="utf-8")
sys.exit(not report.passed)
