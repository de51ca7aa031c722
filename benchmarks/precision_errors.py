"""What errors do fp16 and int8 exports have against float32, over models of several seeds?

The tolerances of the parity check follow from them.

    python benchmarks/precision_errors.py [--seeds 21,22,23,24,25,26] [--precisions fp16,int8] [--results DIR]

Each seed gives a set of generated checkpoints in the original's formats, as deep as the original (32 blocks, four taps)
but a quarter as wide. They are exported as by ``agpt export``, and its parity check measures the errors on its images.
``export/tolerances.py`` and ``export/parity.py`` list the largest errors beside their limits.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tools is never installed

from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import export_bundle
from tools.random_checkpoints import TINY, Tower, write_checkpoints

RESULTS = Path(__file__).parent / "results"
SIZES = replace(
    TINY,
    vision=Tower(320, 32, (0.08, 0.02, 0.04, 0.04)),
    embed_dim=256,
    hidden=1024,
    channels=(4, 16, 64, 64, 64),
)
CLASSES = ("object", "bottle")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="21,22,23,24,25,26", help="of the checkpoints, comma-separated")
    parser.add_argument("--precisions", default="fp16,int8", help="of the networks, comma-separated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results' file")
    options = parser.parse_args()
    worst: dict[str, dict[str, float]] = {}
    for seed in map(int, options.seeds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            files = write_checkpoints(seed, Path(folder) / "checkpoints", SIZES)
            for precision in options.precisions.split(","):
                found = measure(
                    ExportOptions(
                        **vars(files),
                        text_features=None,
                        out=Path(folder) / precision,
                        classes=CLASSES,
                        precision=precision,
                        allow_parity_failure=True,
                    )
                )
                print(f"seed {seed}, {precision}: {found}", flush=True)
                stages = worst.setdefault(precision, {})
                stages |= {stage: max(error, stages.get(stage, 0.0)) for stage, error in found.items()}
    packages = {name: version(name) for name in ("torch", "onnxruntime", "llama-cpp-python")}
    path = options.results / "precision_errors.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"seeds": options.seeds, "worst": worst, "packages": packages}, indent=2) + "\n"
    )
    print(path.read_text())


def measure(options: ExportOptions) -> dict[str, float]:
    """Each stage's error in this precision, measured by the parity check."""
    results = export_bundle(options).parity
    return {
        result.stage.partition(" ")[0]: float(f"{result.error:.2g}")
        for result in results
        if f" {options.precision}" in result.stage
    }


if __name__ == "__main__":
    main()
