"""Trains the network that reads the picture where the map is raised (``models/look.py``), between the two halves.

Its labels come from the generator. It can only be right if the map is highest at the defect, so its probabilities show
when an answer is reliable, and the language model learns to answer only then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor, nn

from ...runtime.synthetic.data import normalise
from ..look import LOOKS, LookNet, contrast, raised
from .config import LanguageRecipe
from .dialogues import is_line, shade_of, shade_seen
from .gallery import ENTRIES, SHARES, SHOTS, Gallery
from .pool import NORMALS, Pool
from .train_vision import learning_rate, log_record, save_atomically

BATCH = 24  # parts
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
NEGATIVE = torch.tensor([LOOKS.index(look) for look in ("brighter", "darker", "neither")])
CHUNK = 64  # parts per forward pass
Contrasts = Callable[[np.ndarray], Tensor]  # gallery entries → their ``contrast``, float16


def contrasts_of(pool: Pool, entries: np.ndarray) -> Tensor:
    """``contrast`` of the pictures of these gallery entries, float16 [B, surroundings, 112, 112]."""
    found = []
    for entry in entries.tolist():
        number, query = divmod(entry, ENTRIES)
        pixels = normalise(np.asarray(pool[number].pixels)[NORMALS + query : NORMALS + query + 1])
        found.append(contrast(torch.from_numpy(pixels)).half())
    return torch.cat(found)


def train_look(
    recipe: LanguageRecipe, look: LookNet, gallery: Gallery, contrasts_of: Contrasts, folder: Path, device: str
) -> LookNet:
    """Train ``look`` (or load it if it is already trained), and log its accuracy on parts that are not trained on.

    Args:
        recipe: the settings.
        look: network with initial weights; trained in place.
        gallery: maps of the parts.
        contrasts_of: gives the contrast of the parts' pictures.
        folder: for ``look.pt`` and ``look.jsonl``.
        device: "cpu" or "cuda".

    Returns:
        The trained network, in evaluation mode on the CPU.
    """
    finished = folder / "look.pt"
    if finished.exists():
        look.load_state_dict(torch.load(finished, weights_only=True))
        return look.eval()
    single = np.array([i for i, defects in enumerate(gallery.defects) if len(defects) == 1])
    contrasts = contrasts_of(single)
    defects = [gallery.defects[i][0] for i in single]
    shade = torch.tensor([LOOKS.index(shade_of(d)) for d in defects])
    line = torch.tensor([float(is_line(d)) for d in defects])
    trained = np.flatnonzero(single < gallery.trained)
    look.to(device).train()
    optimizer = torch.optim.AdamW(look.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    began = time.monotonic()
    with open(folder / "look.jsonl", "w", encoding="utf-8") as log:
        for step in range(recipe.look_steps):
            rng = default_rng([recipe.seed, 4, step])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe.look_steps, recipe.warmup_steps, LEARNING_RATE)
            rows = rng.choice(trained, BATCH)
            maps = raised(gallery.maps(single[rows], int(rng.choice(len(SHARES), p=SHARES))))
            shown, maps, truth = vary(contrasts[rows].float(), maps, shade[rows], rng)
            logits = look.read(shown.to(device), maps.to(device)).cpu()
            loss = F.cross_entropy(logits[:, :3], truth)
            loss = loss + F.binary_cross_entropy_with_logits(logits[:, 3], line[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(look.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0:
                left = (time.monotonic() - began) / (step + 1) * (recipe.look_steps - step - 1) / 60
                log_record(log, {"step": step + 1, "loss": loss.item(), "minutes_left": round(left, 1)})
        look.eval()
        unseen = np.flatnonzero(single >= gallery.trained)
        if unseen.size:
            log_record(
                log, evaluate_look(look, gallery, single[unseen], contrasts[unseen], shade[unseen], device)
            )
    save_atomically(look.cpu().state_dict(), finished)
    return look


def vary(contrasts: Tensor, maps: Tensor, shade: Tensor, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror, transpose and negate all parts of a batch alike, each at random; in a negative, darker becomes
    brighter."""
    if rng.random() < 0.5:
        contrasts, maps = contrasts.flip(-1), maps.flip(-1)
    if rng.random() < 0.5:
        contrasts, maps = contrasts.transpose(-1, -2), maps.transpose(-1, -2)
    if rng.random() < 0.5:
        contrasts, shade = -contrasts, NEGATIVE[shade]
    return contrasts, maps, shade


@torch.no_grad()
def evaluate_look(
    look: LookNet, gallery: Gallery, entries: np.ndarray, contrasts: Tensor, shade: Tensor, device: str
) -> dict[str, float]:
    """Accuracy with maps of one normal sample: of the most probable of three shades; and how often a shade is named
    (``shade_seen``), and the shares of these that are right or the opposite."""
    logits = look.read(contrasts.float().to(device), raised(gallery.maps(entries, 0)).to(device)).cpu()
    shades = np.array([shade_seen(row) for row in logits])
    named = shades != "neither"
    truth = np.array([LOOKS[each] for each in shade.tolist()])
    opposite = (truth != "neither") & (truth != shades)
    return {
        "shade": float((logits[:, :3].argmax(dim=1) == shade).float().mean()),
        "named": float(named.mean()),
        "named_right": float((truth == shades)[named].mean()) if named.any() else 0.0,
        "named_opposite": float(opposite[named].mean()) if named.any() else 0.0,
    }


@torch.no_grad()
def look_at(look: LookNet, gallery: Gallery, contrasts_of: Contrasts) -> np.ndarray:
    """Logits of ``look`` for the picture of each entry with each of its maps: float32 [N, 3, len(LOOKS)]."""
    found = []
    for start in range(0, len(gallery.defects), CHUNK):
        entries = np.arange(start, min(start + CHUNK, len(gallery.defects)))
        contrasts = contrasts_of(entries).float()
        sources = range(len(SHOTS) + 1)
        found.append(
            torch.stack([look.read(contrasts, raised(gallery.maps(entries, s))) for s in sources], 1)
        )
    return torch.cat(found).numpy()
