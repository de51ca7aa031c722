"""``python -m anomalygpt_edge.models.nano.ablate``: measures the effect of each choice of the recipe with few steps.

Every row is the recipe with one choice changed, trained for the same number of steps on the same groups in the same
order and evaluated on the validation families. With one seed and few steps, differences under about 0.02 are noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch

from .config import Recipe
from .evaluate import evaluate_vision
from .pool import Pool, build_pool
from .train_vision import train_vision

STEPS = 150
BASE = Recipe(
    seed=21,
    start=False,  # weights of an earlier, longer run would hide the effect of these few steps
    vision_steps=STEPS,
    vision_lr=4e-4,
    ema=0.98,
    warmup_steps=10,
    log_every=STEPS,
    evaluate_every=STEPS,
)


def variants() -> dict[str, Recipe]:
    """Name → recipe."""

    def changed(**what: object) -> Recipe:
        return dataclasses.replace(BASE, **what)  # type: ignore[arg-type]

    def seeing(**what: object) -> Recipe:
        return changed(vision=dataclasses.replace(BASE.vision, **what))  # type: ignore[arg-type]

    return {
        "recipe, from constructed weights": BASE,
        "another seed": changed(seed=22),
        "constructed weights, before any step": changed(vision_steps=0),
        "the start's weights, before any step": changed(start=True, vision_steps=0),
        "from the start's weights, learning rate 1.5e-4": changed(start=True, vision_lr=1.5e-4),
        "no constant channel": changed(anchored=False),
        "no ranking losses": changed(ranking=False),
        "small defects not weighted up": changed(weigh_small=False),
        "one normal sample in training": changed(many_normals=False),
        "zero-shot loss does not reach the encoder": changed(zero_shot_gradient=0.0),
        "zero-shot loss reaches the encoder whole": changed(zero_shot_gradient=1.0),
        "colours as drawn": changed(recolour=False),
        "last two taps": seeing(tap_layers=(2, 3)),
        "patches not mixed with their neighbours": seeing(neighbourhood=0.0),
        "6 blocks": seeing(depth=6, tap_layers=(0, 2, 3, 5)),
        "learning rate 1e-3": changed(vision_lr=1e-3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pool",
        type=Path,
        default=Path("runs/nano/ablation_pool"),
        help="folder of the generated groups; they are drawn if missing",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("models/nano/training/ablation.jsonl"),
        help="file that the results are appended to, one JSON line per variant",
    )
    parser.add_argument(
        "--only", help="names of the variants to train, separated by semicolons; default: all"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads (0: torch's default)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    build_pool(options.pool, BASE.seed, STEPS * BASE.groups_per_step, calm_share=BASE.calm_share)
    pool = Pool(options.pool, STEPS * BASE.groups_per_step)
    wanted = options.only.split(";") if options.only else list(variants())
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            recipe = variants()[name]
            model = train_vision(recipe, Path(folder), "cpu", pool).eval()
        figures = evaluate_vision(model.encoder, model.decoder, model.text_features()[0])
        row = {"variant": name, "steps": recipe.vision_steps, **{k: round(v, 4) for k, v in figures.items()}}
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
