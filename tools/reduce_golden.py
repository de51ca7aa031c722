"""Reduces golden vectors to the 8 MB that this repository stores and compares traces with.

    python -m tools.reduce_golden golden_seed11.npz golden_seed11.json inputs/ tests/golden

Pixels are converted back to their uint8 values. Maps are rounded to 1/65535. Every 32nd row of the patch features is
kept. The nine constant rows of the prompt embeddings are stored once, and so are vectors that depend on the image only.
All other values stay float32. The generated images that the cases use are copied.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None, None]
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]
CASE_KEYS = ("id", "image", "normals", "web_demo", "prompt", "class_name", "token_ids", "greedy_ids",
             "greedy_top2_margin", "output_text")  # fmt: skip
MAP_STEPS = 65535


def reduce_case(arrays: np.lib.npyio.NpzFile, case: str) -> dict[str, np.ndarray]:
    """One case's vectors under the names of ``agpt trace``."""
    rows = arrays[f"{case}/tap_rows"][:, 1:]  # rows 32, 64, … of 257: without the CLS row, patches 31, 63, …
    reduced = {
        "pixels": to_bytes(arrays[f"{case}/preproc"]),
        "image_embedding": arrays[f"{case}/llama_proj"],
        "patch_rows": rows,
        "patch_norms": arrays[f"{case}/tap_norms"][:, 1:],
        "text_features": arrays[f"{case}/text_features"],
        "anomaly_map": np.round(arrays[f"{case}/anomaly_map"] * MAP_STEPS).astype(np.uint16),
        "prompt_rows": arrays[f"{case}/prompt_learner"][9:],
        "answer_logits": arrays[f"{case}/logits_last"],
    }
    if f"{case}/preproc_query2" in arrays.files:
        reduced["pixels_of_map"] = to_bytes(arrays[f"{case}/preproc_query2"])
    return reduced


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Normalised pixels float32 [3, S, S] → the uint8 values that they were computed from, exactly."""
    values = (pixels * STD + MEAN) * 255
    grey = np.round(values).astype(np.uint8)
    assert np.abs(values - grey).max() < 1e-2
    return grey


def reduce(vectors: Path, index: Path, inputs: Path, folder: Path) -> None:
    """Write ``golden.npz``, ``golden.json`` and ``inputs/`` into ``folder``."""
    described = json.loads(index.read_text())
    kept: dict[str, np.ndarray] = {}
    homes: dict[str, str] = {}  # digest → name under which an equal array is stored
    aliases: dict[str, str] = {}
    with np.load(vectors) as arrays:
        kept["base_prompts"] = arrays[f"{described['cases'][0]['id']}/prompt_learner"][:9]
        classes = {key: arrays[key] for key in arrays.files if key.startswith("text_features/")}
        for case in described["cases"]:
            for name, array in reduce_case(arrays, case["id"]).items():
                digest = hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()
                key = f"{case['id']}/{name}"
                if homes.setdefault(digest, key) == key:
                    kept[key] = array
                else:
                    aliases[key] = homes[digest]
    content = {
        "seed": described["seed"],
        "versions": described["versions"],
        "cases": [{key: case[key] for key in CASE_KEYS} for case in described["cases"]],
        "aliases": aliases,
    }
    np.savez_compressed(folder / "golden.npz", **kept, **classes)  # type: ignore[arg-type]
    (folder / "golden.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "inputs").mkdir(exist_ok=True)
    for case in described["cases"]:
        for name in (case["image"], *case["normals"]):
            shutil.copyfile(inputs / name, folder / "inputs" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("vectors", "index", "inputs", "folder"):
        parser.add_argument(name, type=Path)
    reduce(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
