"""``python -m anomalygpt_edge.models.lite.train``: trains lite from the pretrained backbone on, and writes its
checkpoint.

Training can be interrupted at any time: every stage saves its state in the run folder, and the next run continues. The
same recipe gives the same weights. Figures on validation families, and of the encoder on folders of real images that
are given (``--evaluate``), are logged; no real image is trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from pathlib import Path

import cv2
import torch

from ...runtime.evaluation.datasets import find_categories
from ...runtime.synthetic.data import validation_families
from ..nano.gallery import region_level
from ..nano.train_vision import CLASSES
from .encoder import LiteEncoder
from .evaluate import figures
from .features import Extractor
from .gallery import Describer, encode_gallery, encode_validation, load_gallery
from .groups import Pool, build_pool, load_pool
from .save import ENCODER_FILE, load_decoder, load_encoder, save_checkpoint, save_encoder
from .sets import encode_category, encode_family, load_set
from .train_decoder import project_pool, train_decoder, zero_shot_figures
from .train_language import TOKENIZER, train_second_half
from .train_vision import Recipe, log_record, new_encoder, train_vision


def train(recipe: Recipe, folder: Path, checkpoint: Path, threads: int = 1) -> None:
    """The whole recipe.

    Args:
        recipe: the numbers.
        folder: features, state and curves; resumed if there.
        checkpoint: folder for the finished checkpoint.
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
    print("[1/6] generated groups", flush=True)
    extractor = Extractor(encoder.backbone, vision.tap_blocks, vision.image_size, threads)
    build_pool(folder / "pool", recipe.seed, recipe.pool_groups, extractor, vision.grid)
    print("[2/6] projections", flush=True)
    pool = load_pool(folder / "pool", recipe.pool_groups, encoder)
    if (folder / ENCODER_FILE).exists():
        encoder = load_encoder(folder / ENCODER_FILE)
    else:
        encoder = train_vision(recipe, encoder, pool, folder)
        save_encoder(encoder, folder / ENCODER_FILE)
    pool.gathered.clear()
    train_rest(recipe, encoder, pool, folder, checkpoint, threads)


def train_rest(
    recipe: Recipe, encoder: LiteEncoder, pool: Pool, folder: Path, checkpoint: Path, threads: int = 1
) -> None:
    """Train everything behind the encoder and write the checkpoint.

    Args:
        recipe: the settings.
        encoder: trained.
        pool: coverage and kinds of the groups in ``folder / "pool"``.
        folder: as of ``train``.
        checkpoint: as of ``train``.
        threads: of the backbone while it encodes.
    """
    vision = encoder.config
    extractor = Extractor(encoder.backbone, vision.tap_blocks, vision.image_size, threads)
    print("[3/6] image decoder, text features", flush=True)
    features = project_pool(folder / "pool", pool.num_groups, encoder, folder / "features.npy")
    zero_shot = train_decoder(recipe, encoder, features, pool, folder).requires_grad_(False)
    print("[4/6] gallery of maps", flush=True)
    describe = Describer(encoder, extractor, zero_shot.decoder, zero_shot.text_features()[0])
    groups = range(pool.num_groups, pool.num_groups + recipe.gallery_groups)  # not those the encoder is trained on
    validation = encode_validation(folder / "language_validation", describe, recipe.validation_families)
    encode_gallery(folder / "gallery", recipe.seed, groups, describe)
    gallery, contrasts = load_gallery(folder / "gallery", groups)
    print("[5/6] picture network, prompt learner, projection, language model", flush=True)
    model = train_second_half(recipe, encoder, zero_shot, gallery, contrasts, validation, folder)
    print("[6/6] checkpoint", flush=True)
    text = dict(zip(CLASSES, zero_shot.text_features().numpy(), strict=True))
    level = {"few_shot": region_level(gallery), "zero_shot": 0.5}
    save_checkpoint(model, encoder, TOKENIZER, text, level, checkpoint)
    print(f"checkpoint written to {checkpoint}", flush=True)


def evaluate(checkpoint: Path, folder: Path, data: Path | None, shots: tuple[int, ...], threads: int = 1) -> None:
    """Log figures of encoder and image decoder on the validation families, or on a folder of real images in MVTec-AD
    layout.

    Args:
        checkpoint: as ``train`` wrote it.
        folder: where encoded sets are kept, and the figures (``figures.jsonl``).
        data: real images; None: generated validation families.
        shots: numbers of normal images.
        threads: of the backbone while it encodes.
    """
    encoder = load_encoder(checkpoint / ENCODER_FILE)
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
    sets, again = ((load_set(path, vision.tap_blocks) for path in paths) for _ in range(2))
    zero_shot = zero_shot_figures(again, encoder, *load_decoder(checkpoint, vision))
    with open(folder / "figures.jsonl", "a", encoding="utf-8") as log:
        for record in itertools.chain(figures(sets, encoder, shots), zero_shot):
            log_record(log, {"data": "generated" if data is None else "real", **record})


def main(arguments: list[str] | None = None) -> None:
    """Every number of the recipe is an option of the same name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/lite"), help="state and curves (resumed if there)")
    parser.add_argument("--checkpoint", type=Path, default=Path("models/lite/checkpoint"))
    parser.add_argument("--evaluate", type=Path, action="append", default=[], metavar="FOLDER", help="real images")
    parser.add_argument("--only-evaluate", action="store_true", help="do not train: measure the checkpoint")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 12], help="normal images")
    parser.add_argument("--threads", type=int, default=1, help="of torch and of the backbone")
    for field in dataclasses.fields(Recipe):
        if field.name not in ("vision", "language"):
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=type(field.default), default=field.default)
    language = Recipe().language
    for field in dataclasses.fields(language):  # --language-look-steps and the like
        value = getattr(language, field.name)
        name = field.name.removeprefix("language_")
        parser.add_argument(f"--language-{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    torch.set_num_threads(options["threads"])
    cv2.setNumThreads(options["threads"])
    if not options["only_evaluate"]:
        numbers = {f.name: options[f.name] for f in dataclasses.fields(Recipe) if f.name in options}
        names = [field.name for field in dataclasses.fields(language)]
        chosen = {name: options[f"language_{name.removeprefix('language_')}"] for name in names}
        numbers["language"] = dataclasses.replace(language, **chosen)
        train(Recipe(**numbers), options["run"], options["checkpoint"], options["threads"])
    for data in (None, *options["evaluate"]):
        evaluate(options["checkpoint"], options["run"], data, tuple(options["shots"]), options["threads"])


if __name__ == "__main__":
    main()
