"""anomalygpt-edge: AnomalyGPT beside a production line."""

import os

# onnxruntime's Linux builds report usage over the network unless this is set before their first import. Every import
# of anomalygpt_edge runs this file first, and child processes inherit the variable.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
