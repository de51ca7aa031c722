"""``python -m anomalygpt_edge.models.lite.train``: the training of lite's encoder, from the pretrained backbone on.

Generated groups are drawn and encoded, the projections are trained on them, and the encoder is written as one file.
Interrupted, it goes on where it stopped; the same recipe makes the same weights. Figures on validation families, and
on folders of real images that are given (``--evaluate``), are logged; no real image is trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import cv2
import torch

from ...runtime.evaluation.datasets import find_categories
from ...runtime.synthetic.data import validation_families
from .evaluate import figures
from .features import Extractor
from .groups import build_pool, load_pool
from .save import load_encoder, save_encoder
from .sets import encode_category, encode_family, load_set
from .train_vision import Recipe, log_record, new_encoder, train_vision


def train(recipe: Recipe, folder: Path, checkpoint: Path, threads: int = 1) -> None:
    """The whole recipe.

    Args:
        recipe: the numbers.
        folder: features, state and curves; resumed if there.
        checkpoint: the safetensors file to write.
        threads: of the backbone while it encodes.

    Raises:
        ConfigError: the pretrained weights are not installed.
        SystemExit: ``folder`` holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, numbers = folder / "recipe.json", json.loads(json.dumps(dataclasses.asdict(recipe)))
    if note.exists() and json.loads(note.read_text()) != numbers:
        raise SystemExit(f"{folder} holds a run of another recipe: choose another --run, or delete it")
    note.write_text(json.dumps(numbers, indent=2) + "\n")
    vision = recipe.vision
    encoder = new_encoder(vision)
    print("[1/3] generated groups", flush=True)
    extractor = Extractor(encoder.backbone, vision.tap_blocks, vision.image_size, threads)
    build_pool(folder / "pool", recipe.seed, recipe.pool_groups, extractor, vision.grid)
    print("[2/3] projections", flush=True)
    encoder = train_vision(recipe, encoder, load_pool(folder / "pool", recipe.pool_groups, encoder), folder)
    print("[3/3] checkpoint", flush=True)
    save_encoder(encoder, checkpoint)
    print(f"checkpoint written to {checkpoint}", flush=True)


def evaluate(checkpoint: Path, folder: Path, data: Path | None, shots: tuple[int, ...], threads: int = 1) -> None:
    """Log figures on the validation families, or on a folder of real images in MVTec-AD layout.

    Args:
        checkpoint: as ``train`` wrote it.
        folder: where encoded sets are kept, and the figures (``figures.jsonl``).
        data: real images; None: generated validation families.
        shots: numbers of normal images.
        threads: of the backbone while it encodes.
    """
    encoder = load_encoder(checkpoint)
    vision = encoder.config
    extractor = Extractor(encoder.backbone, vision.tap_blocks, vision.image_size, threads)
    paths = []
    if data is None:
        for index, family in enumerate(validation_families()):
            paths.append(folder / "validation" / f"{index:02d}_{family.kind}.npz")
            if not paths[-1].exists():
                encode_family(family, extractor, paths[-1], coarse=index % 2 == 0)
    else:
        for category in find_categories(data):
            paths.append(folder / "real" / f"{category.name}.npz")
            if not paths[-1].exists():
                encode_category(category, extractor, paths[-1])
    sets = (load_set(path, vision.tap_blocks) for path in paths)
    with open(folder / "figures.jsonl", "a", encoding="utf-8") as log:
        for record in figures(sets, encoder, shots):
            log_record(log, {"data": "generated" if data is None else "real", **record})


def main(arguments: list[str] | None = None) -> None:
    """Every number of the recipe is an option of the same name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/lite"), help="state and curves (resumed if there)")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/lite/checkpoint/vision.safetensors"))
    parser.add_argument("--evaluate", type=Path, action="append", default=[], metavar="FOLDER", help="real images")
    parser.add_argument("--only-evaluate", action="store_true", help="do not train: measure the checkpoint")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 12], help="normal images")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the backbone")
    for field in dataclasses.fields(Recipe):
        if field.name != "vision":
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options["threads"])
    cv2.setNumThreads(options["threads"])
    if not options["only_evaluate"]:
        numbers = {f.name: options[f.name] for f in dataclasses.fields(Recipe) if f.name in options}
        train(Recipe(**numbers), options["run"], options["checkpoint"], options["threads"])
    for data in (None, *options["evaluate"]):
        evaluate(options["checkpoint"], options["run"], data, tuple(options["shots"]), options["threads"])


if __name__ == "__main__":
    main()
