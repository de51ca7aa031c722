"""A pytest plugin: the kernel tests on an extension built with sanitizers (``make test-sanitize``).

Loaded before anything imports the kernels; ``AGPT_SANITIZED`` is the folder that holds the extension.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

NAME = "anomalygpt_edge.kernels.cpu._native"

(path,) = Path(os.environ["AGPT_SANITIZED"]).rglob("_native.*.so")
spec = importlib.util.spec_from_file_location(NAME, path)
assert spec is not None
assert spec.loader is not None
sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
