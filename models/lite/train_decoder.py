"""Trains the image decoder and the text features, which give the zero-shot map, on the frozen encoder's features."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from numpy.typing import NDArray
from torch import Tensor, nn

from ...runtime.evaluation.metrics import auroc
from ..image_decoder import ImageDecoder
from ..nano.train_vision import (
    CLASSES,
    learning_rate,
    log_record,
    save_atomically,
    update_average,
    zero_shot_loss,
)
from .encoder import LiteEncoder, LiteVisionConfig
from .evaluate import describer, pixel_auroc, scores
from .groups import GROUP, SHARD_GROUPS, Pool, load_shard
from .sets import LabelledSet
from .train_vision import Recipe


class ZeroShot(nn.Module):
    """The image decoder, and the text features of every class."""

    def __init__(self, config: LiteVisionConfig) -> None:
        super().__init__()
        self.decoder = ImageDecoder(config.width, config.embed_dim, len(config.tap_blocks))
        pair = F.normalize(torch.randn(2, config.embed_dim), dim=-1)
        self.text = nn.Parameter(pair.repeat(len(CLASSES), 1, 1))

    def text_features(self) -> Tensor:
        """[classes, 2, E], unit norm, row 0 normal and row 1 abnormal."""
        return F.normalize(self.text, dim=-1)


@torch.no_grad()
def project_pool(folder: Path, num_groups: int, encoder: LiteEncoder, path: Path) -> NDArray[np.float16]:
    """Patch features of a pool's first groups, kept in a file that is memory-mapped: [N, T, P, V]."""
    if not path.exists():
        config = encoder.config
        shape = (num_groups * GROUP, len(config.tap_blocks), config.grid**2, config.width)
        temporary = path.with_suffix(".tmp")
        written = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        for shard in range(num_groups // SHARD_GROUPS):
            gathered = [torch.from_numpy(tap).float() for tap in load_shard(folder, shard, encoder).gathered]
            first = shard * SHARD_GROUPS * GROUP
            written[first : first + len(gathered[0])] = encoder.project(gathered).half().numpy()
        written.flush()
        temporary.replace(path)
    return np.load(path, mmap_mode="r")


def train_decoder(
    recipe: Recipe,
    encoder: LiteEncoder,
    features: NDArray[np.float16],
    pool: Pool,
    folder: Path,
) -> ZeroShot:
    """Train decoder and text features, or continue the training, and return the averaged weights.

    In half of the groups the class is the product's kind, in the others "object".

    Args:
        recipe: the settings.
        encoder: frozen.
        features: of the pool, from ``project_pool``.
        pool: coverage and kinds; its taps are not read.
        folder: for ``decoder.pt`` (state to continue from) and ``decoder.jsonl`` (training curve).
    """
    torch.manual_seed(recipe.seed)
    model = ZeroShot(encoder.config)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.decoder_lr, weight_decay=0.01, betas=(0.9, 0.98))
    state_file, first = folder / "decoder.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    kinds = torch.tensor([CLASSES.index(str(kind)) for kind in pool.kinds])
    coverage = torch.from_numpy(pool.coverage)
    began = time.monotonic()
    with open(folder / "decoder.jsonl", "a", encoding="utf-8") as log:
        for step in range(first, recipe.decoder_steps):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # the same draws whether resumed or not
            for settings in optimizer.param_groups:
                settings["lr"] = learning_rate(step, recipe.decoder_steps, recipe.warmup_steps, recipe.decoder_lr)
            rng = default_rng([recipe.seed, 6, step])
            groups = np.sort(rng.choice(len(kinds), recipe.groups_per_step, replace=False))
            rows = (groups[:, None] * GROUP + np.arange(GROUP)).ravel()
            named = torch.where(torch.rand(len(groups)) < 0.5, kinds[groups], 0).repeat_interleave(GROUP)
            loss = zero_shot_loss(
                model.decoder,
                torch.from_numpy(features[rows]).float(),
                model.text_features()[named],
                coverage[rows].float(),
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update_average(average, model, min(recipe.decoder_ema, (step + 1) / (step + 10)))
            done = step + 1
            if done % recipe.decoder_log_every == 0 or done == recipe.decoder_steps:
                pace = (time.monotonic() - began) / (done - first)
                left = pace * (recipe.decoder_steps - done) / 60
                log_record(log, {"step": done, "zero_shot": loss.item(), "minutes_left": round(left, 1)})
                state = {"model": model.state_dict(), "average": average.state_dict()}
                save_atomically({**state, "optimizer": optimizer.state_dict(), "step": done}, state_file)
    return average.eval()


@torch.no_grad()
def zero_shot_figures(
    sets: Iterable[LabelledSet], encoder: LiteEncoder, decoder: ImageDecoder, text: Tensor
) -> Iterator[dict[str, object]]:
    """A record of each set, image AUROC (by the top 1 %) and pixel AUROC of zero-shot maps, then the means.

    Args:
        sets: encoded.
        encoder: that encoded them.
        decoder: trained.
        text: text features of class "object" [2, E].
    """
    describe = describer(encoder)
    areas = []
    for found in sets:
        maps = decoder(describe(found.queries), text, encoder.config.map_size).numpy()
        areas.append((auroc(found.defective, scores(maps)), pixel_auroc(maps, found.masks)))
        yield {"set": found.name, "normals": 0, "image_auroc": areas[-1][0], "pixel_auroc": areas[-1][1]}
    image, pixel = np.mean(np.array(areas, float), axis=0)
    yield {"set": "mean", "normals": 0, "image_auroc": float(image), "pixel_auroc": float(pixel)}
