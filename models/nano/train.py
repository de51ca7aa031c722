"""``python -m anomalygpt_edge.models.nano.train``: trains the nano model and writes its checkpoint.

Training can be interrupted at any time: every stage saves its state in the run folder, and the next run continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import torch

from ..anomalygpt import AnomalyGPT
from .config import NANO_VISION, Recipe, nano_config
from .dialogues import KNOWN_QUESTIONS
from .gallery import Gallery, build_gallery, region_level
from .initial import load_language_start
from .pool import Pool, build_pool
from .save import save_checkpoint
from .tokenizer import load_tokenizer, train_tokenizer
from .train_language import Maps, Vocabulary, encode_validation, train_language
from .train_look import contrasts_of, look_at, train_look
from .train_vision import CLASSES, train_vision

LOOK_STD = 0.35  # standard deviation of the initial weights between picture network and prompt embeddings
GALLERY_SEED_OFFSET = 1000  # so that the gallery has other parts than those the encoder is trained on


def train(recipe: Recipe, folder: Path, checkpoint: Path, device: str, workers: int) -> None:
    """Train both halves, and write the checkpoint in the original's formats.

    Args:
        recipe: the settings; saved as ``recipe.json`` in the run folder. A run can only be continued with the same.
        folder: for state and training curves.
        checkpoint: folder for the finished checkpoint.
        device: "cpu" or "cuda".
        workers: number of processes that generate images.

    Raises:
        SystemExit: the run folder belongs to another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(dataclasses.asdict(recipe), indent=1)
    kept = folder / "recipe.json"
    if kept.exists() and kept.read_text(encoding="utf-8") != numbers:
        raise SystemExit(
            f"{folder} contains a run with another recipe: choose another --run folder, or delete it"
        )
    kept.write_text(numbers, encoding="utf-8")

    print("[1/6] pools of generated parts", flush=True)
    build_pool(folder / "pool", recipe.seed, recipe.pool_groups, workers, recipe.calm_share)
    build_pool(folder / "gallery_pool", recipe.seed + GALLERY_SEED_OFFSET, recipe.gallery_groups, workers)
    pool = Pool(folder / "pool", recipe.pool_groups)
    print("[2/6] encoder, image decoder, text features", flush=True)
    vision = train_vision(recipe, folder, device, pool).eval()
    vision.encoder.config = NANO_VISION  # with overlapping patches from here on
    print("[3/6] vocabulary", flush=True)
    vocabulary_file = folder / "tokenizer.model"
    train_tokenizer(vocabulary_file)
    vocabulary = Vocabulary(load_tokenizer(vocabulary_file))
    print("[4/6] gallery of maps", flush=True)
    gallery_file = folder / "gallery.npz"
    pool = Pool(folder / "gallery_pool", recipe.gallery_groups)
    if not gallery_file.exists():
        text = vision.text_features()[0].detach()
        shown = build_gallery(vision.encoder, vision.decoder, text, pool, recipe.augmentation, workers)
        shown.save(gallery_file)
    gallery = Gallery.load(gallery_file)
    torch.manual_seed(recipe.seed + 2)
    model = AnomalyGPT(nano_config(vocabulary.tokenizer.vocab_size()))
    learner = model.prompt_learner
    for unread in learner.evidence_net[2].parameters():
        torch.nn.init.zeros_(unread)  # without effect at first
    # As large as the rows that it is added to: the language model ignores smaller vectors, and as few answers need
    # them, they would grow slowly.
    torch.nn.init.normal_(learner.get_parameter("look_words.2.weight"), std=LOOK_STD)
    if recipe.start:
        load_language_start(model, vocabulary.pieces)
    model.encoder.load_state_dict(vision.encoder.state_dict())
    model.image_decoder.load_state_dict(vision.decoder.state_dict())
    print("[5/6] picture network", flush=True)
    contrasts = partial(contrasts_of, pool)
    look = train_look(recipe, learner.look_net, gallery, contrasts, folder, device)
    maps = Maps(gallery, look_at(look, gallery, contrasts))
    print("[6/6] prompt learner, projection, language model", flush=True)
    validation = encode_validation(vision, look.to(device), recipe.augmentation)
    model = train_language(recipe, model, validation, maps, vocabulary, folder, device)
    features = vision.text_features().detach().cpu().numpy()
    save_checkpoint(
        model.cpu(),
        vocabulary_file,
        dict(zip(CLASSES, features, strict=True)),
        {"few_shot": region_level(gallery), "zero_shot": 0.5},
        checkpoint,
        augmentation=recipe.augmentation,
        questions=KNOWN_QUESTIONS,
    )
    print(f"checkpoint written to {checkpoint}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line and train; every setting of the recipe is an option of the same name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run",
        type=Path,
        default=Path("runs/nano"),
        help="folder for state and training curves; an interrupted run in it is continued",
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path("models/nano/checkpoint"), help="folder for the checkpoint"
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda"
    )
    parser.add_argument("--workers", type=int, default=1, help="number of processes that generate images")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's default)")
    for field in dataclasses.fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):  # --no-start and the like
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.name != "vision":
            parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    numbers = {f.name: options[f.name] for f in dataclasses.fields(Recipe) if f.name in options}
    train(Recipe(**numbers), options["run"], options["checkpoint"], options["device"], options["workers"])


if __name__ == "__main__":
    main()
