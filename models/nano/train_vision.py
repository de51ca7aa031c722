"""First half of nano's training: the encoder, the image decoder and the text features.

Few-shot matching is trained end to end: in every group, each query's patch features are matched with the normal
samples' by the maximum cosine similarity, as in the runtime. Ranking losses push the distances of defective patches
above those of normal ones: over the whole batch, within each image, and between images by their three largest patches.
A small cross-entropy with one global threshold keeps the distances of all products on one scale, so that the language
model can judge without a tuned threshold.
"""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor, nn

from ...runtime.synthetic.data import normalise, patch_coverage
from ...runtime.synthetic.products import TRAINED_KINDS
from ..image_decoder import LOGIT_SCALE, ImageDecoder
from ..imagebind import VisionEncoder
from .config import Recipe
from .evaluate import evaluate_vision
from .initial import construct, load_start
from .pool import GROUP, NORMALS, Pool

POSITIVE_COVERAGE = 0.06  # smallest defective share of a defective patch; smaller shares above 0 are ignored
OBJECT = "object"
CLASSES = (OBJECT, *TRAINED_KINDS)
NUM_NEGATIVES, NUM_POSITIVES = 3000, 400  # patches of a batch in the ranking losses at most, drawn at random


class NanoVision(nn.Module):
    """The parameters that the first half trains."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        config = recipe.vision
        self.encoder = VisionEncoder(config)
        self.decoder = ImageDecoder(config.width, config.embed_dim, len(config.tap_layers))
        self.text = nn.Parameter(torch.randn(len(CLASSES), 2, config.embed_dim))
        self.kind_head = nn.Linear(config.embed_dim, len(CLASSES))  # trains the image embedding; not shipped
        # the global scale and threshold of the distances
        self.sharpness = nn.Parameter(torch.tensor(3.5))
        self.threshold = nn.Parameter(torch.tensor(0.10))

    def text_features(self) -> Tensor:
        """[classes, 2, E], unit norm, row 0 normal and row 1 abnormal."""
        return F.normalize(self.text, dim=-1)


class Batches:
    """Step number → one batch of groups from the pool, mirrored, rotated and recoloured."""

    def __init__(self, recipe: Recipe, pool: Pool) -> None:
        self.recipe, self.pool = recipe, pool

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        count = self.recipe.groups_per_step
        pixels, masks, kinds = [], [], []
        for place in range(step * count, (step + 1) * count):
            epoch, position = divmod(place, self.pool.num_groups)
            order = default_rng([self.recipe.seed, epoch]).permutation(self.pool.num_groups)
            group, rng = self.pool[int(order[position])], default_rng([self.recipe.seed, 1, place])
            shown, mask = vary(np.asarray(group.pixels), group.masks, rng, self.recipe.recolour)
            pixels.append(shown)
            masks.append(mask)
            kinds += [CLASSES.index(group.kind)] * GROUP
        return {
            "pixels": torch.from_numpy(np.concatenate(pixels)),
            "coverage": torch.from_numpy(patch_coverage(np.concatenate(masks))),
            "kind": torch.tensor(kinds),
        }


def vary(
    pixels: np.ndarray, masks: np.ndarray, rng: Generator, recolour: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Rotate, mirror and recolour all parts of a group alike, and shuffle its normal samples."""
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    order = np.concatenate([rng.permutation(NORMALS), np.arange(NORMALS, GROUP)])
    pixels, masks = np.rot90(pixels[order], turns, (1, 2)), np.rot90(masks[order], turns, (1, 2))
    if mirrored:
        pixels, masks = pixels[:, :, ::-1], masks[:, :, ::-1]
    if not recolour:
        return np.ascontiguousarray(pixels), np.ascontiguousarray(masks)
    if rng.random() < 0.25:
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    else:
        pixels = pixels[..., rng.permutation(3)]
    table = 255 * np.linspace(0, 1, 256) ** np.exp(rng.normal(0, 0.25)) * rng.uniform(0.75, 1.1)
    if rng.random() < 0.1:
        table = 255 - table
    return np.clip(np.rint(table), 0, 255).astype(np.uint8)[pixels.astype(np.uint8)], np.ascontiguousarray(
        masks
    )


def _ranking(normal: Tensor, defective: Tensor, sharpness: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean logistic loss over all pairs of a defective and a normal value (of a random subset if there are many): the
    defective one should be larger. ``weight`` weights the defective values."""
    if normal.numel() == 0 or defective.numel() == 0:
        return normal.sum() * 0
    if normal.numel() > NUM_NEGATIVES:
        normal = normal[torch.randint(normal.numel(), (NUM_NEGATIVES,), device=normal.device)]
    if defective.numel() > NUM_POSITIVES:
        chosen = torch.randint(defective.numel(), (NUM_POSITIVES,), device=normal.device)
        defective, weight = defective[chosen], None if weight is None else weight[chosen]
    losses = F.softplus((normal[None, :] - defective[:, None]) * sharpness).mean(dim=1)
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def defective_patches(coverage: Tensor) -> Tensor:
    """Coverage [M, P] → bool [M, P]: patches covered by more than ``POSITIVE_COVERAGE``, and each image's patch with
    the largest coverage above 0, so that small defects count too."""
    largest = (coverage == coverage.amax(dim=1, keepdim=True)) & (coverage > 0)
    return (coverage > POSITIVE_COVERAGE) | largest


def _distance_loss(
    distance: Tensor, coverage: Tensor, sharpness: Tensor, threshold: Tensor, recipe: Recipe
) -> Tensor:
    """Loss of patch distances [M, P] against the defective share of each patch [M, P]."""
    positive, negative = defective_patches(coverage), coverage == 0
    logits = (distance - threshold) * sharpness
    labelled = positive | negative
    balance = torch.where(positive, 4.0, 1.0)[labelled]
    loss = F.binary_cross_entropy_with_logits(logits[labelled], positive[labelled].float(), balance)
    if not recipe.ranking:
        return loss
    # weight 1 / √n for each of an image's n defective patches
    size = positive.sum(dim=1, keepdim=True).clamp(min=1)
    weight = (1 / size.sqrt() if recipe.weigh_small else torch.ones_like(size)).expand_as(coverage)[positive]
    loss = 0.2 * loss + _ranking(distance[negative], distance[positive], sharpness, weight)
    worst = distance.topk(3, dim=1).values.mean(dim=1)
    defective = positive.any(dim=1)
    loss = loss + 0.5 * _ranking(worst[~defective], worst[defective], sharpness)
    within = [
        _ranking(distance[m][negative[m]], distance[m][positive[m]], sharpness)
        for m in defective.nonzero()[:, 0]
    ]
    if within:
        loss = loss + 0.5 * torch.stack(within).mean()
    return loss


def _tap_distances(query: Tensor, bank: Tensor) -> Tensor:
    """1 − max cosine similarity of unit vectors: [G, T, P, V] × [G, T, N, V] → [G, T, P].

    The nearest patches are found without autograd: only the matched pairs have a gradient, so only they are computed
    again with it.
    """
    with torch.no_grad():
        nearest = (query @ bank.transpose(-1, -2)).argmax(dim=-1, keepdim=True)
    matched = bank.gather(2, nearest.expand(-1, -1, -1, bank.shape[-1]))
    return 1 - (query * matched).sum(dim=-1)


def zero_shot_loss(decoder: ImageDecoder, features: Tensor, text: Tensor, coverage: Tensor) -> Tensor:
    """Cross-entropy and ranking loss of each patch's abnormal minus normal logit.

    Args:
        decoder: with a layer for each tap.
        features: patch features [B, T, P, V].
        text: text features of each image's class [B, 2, E], unit norm.
        coverage: defective share of each patch [B, P].
    """
    projected = torch.stack([fc(tap) for fc, tap in zip(decoder.fc, features.unbind(1), strict=True)], dim=1)
    logits = LOGIT_SCALE * torch.einsum("btpe,bce->btpc", F.normalize(projected, dim=-1), text)
    margin = logits[..., 1] - logits[..., 0]
    positive = defective_patches(coverage)
    labelled = positive | (coverage == 0)
    target = positive[:, None].expand_as(margin)
    weight = torch.where(target, 4.0, 1.0) * labelled[:, None]
    loss = F.binary_cross_entropy_with_logits(margin, target.float(), weight)
    mean, one = margin.mean(dim=1), torch.ones((), device=margin.device)
    return loss + 0.5 * _ranking(mean[coverage == 0], mean[positive], one)


def vision_loss(
    model: NanoVision, batch: dict[str, Tensor], recipe: Recipe
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one batch, and its parts for the log."""
    pixels = torch.from_numpy(normalise(batch["pixels"].numpy())).to(model.threshold.device)
    coverage, kind = batch["coverage"].to(pixels.device), batch["kind"].to(pixels.device)
    embedding, taps = model.encoder(pixels)
    parts_of = F.normalize(taps, dim=-1).unflatten(0, (-1, GROUP)).unbind(1)  # six times [G, T, P, V]
    labels = coverage.unflatten(0, (-1, GROUP))
    normals = torch.cat(parts_of[:NORMALS], dim=2)  # [G, T, 3 P, V]
    # each query is matched with one normal sample and with all; normal samples with each other
    pairs = [(query, parts_of[0]) for query in range(NORMALS, GROUP)]
    if recipe.many_normals:
        pairs += [(query, normals) for query in range(NORMALS, GROUP)]
        pairs += [(2, torch.cat(parts_of[:2], dim=2))]
    pairs += [(1, parts_of[0])]
    label = torch.cat([labels[:, query] for query, _ in pairs])
    distances = torch.cat([_tap_distances(parts_of[query], bank) for query, bank in pairs])  # [pairs G, T, P]
    sharpness = model.sharpness.exp()
    few_shot = _distance_loss(distances.mean(dim=1), label, sharpness, model.threshold, recipe)
    auxiliary = torch.stack(
        [
            _distance_loss(distances[:, t], label, sharpness, model.threshold, recipe)
            for t in range(distances.shape[1])
        ]
    ).mean()

    share = recipe.zero_shot_gradient
    features = share * taps + (1 - share) * taps.detach()
    named = torch.where(torch.rand(kind.shape[0] // GROUP, device=kind.device) < 0.5, kind[::GROUP], 0)
    text = model.text_features()[named.repeat_interleave(GROUP)]  # [B, 2, E]
    zero_shot = zero_shot_loss(model.decoder, features, text, coverage)
    naming = F.cross_entropy(model.kind_head(embedding) * 10, kind)
    loss = few_shot + 0.25 * auxiliary + 0.3 * zero_shot + 0.05 * naming
    parts = {"few_shot": few_shot, "zero_shot": zero_shot, "naming": naming, "loss": loss}
    return loss, {name: value.item() for name, value in parts.items()}


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """Linear warm-up, then a half cosine to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def save_atomically(state: dict, path: Path) -> None:
    """torch.save to a temporary file, then rename it, so that an interrupted save keeps the previous file."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train_vision(recipe: Recipe, folder: Path, device: str, pool: Pool) -> NanoVision:
    """Train the first half, or continue its training, and return the averaged model.

    Args:
        recipe: the settings.
        folder: for ``vision.pt`` (state to continue from) and ``vision.jsonl`` (training curve).
        device: "cpu" or "cuda".
        pool: the training set.
    """
    state_file = folder / "vision.pt"
    torch.manual_seed(recipe.seed)
    model = NanoVision(recipe).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.vision_lr, weight_decay=0.01, betas=(0.9, 0.98)
    )
    first = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average = copy.deepcopy(model)
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    else:
        construct(model.encoder.cpu(), recipe.seed, anchored=recipe.anchored)
        if recipe.start:
            load_start(model, CLASSES)
        model.to(device)
        average = copy.deepcopy(model)
    if first >= recipe.vision_steps:
        return average
    batches = Batches(recipe, pool)
    began, seen = time.monotonic(), first
    with open(folder / "vision.jsonl", "a", encoding="utf-8") as log:
        for step in range(first, recipe.vision_steps):
            torch.manual_seed(
                recipe.seed * 1_000_003 + step
            )  # so that a continued training draws the same values
            rate = learning_rate(step, recipe.vision_steps, recipe.warmup_steps, recipe.vision_lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, parts = vision_loss(model, batches[step], recipe)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update_average(average, model, min(recipe.ema, (step + 1) / (step + 10)))
            done = step + 1
            if done % recipe.log_every == 0 or done == recipe.vision_steps:
                pace = (time.monotonic() - began) / (done - seen)
                left = pace * (recipe.vision_steps - done) / 60
                log_record(
                    log, {"step": done, **parts, "s_per_step": round(pace, 3), "minutes_left": round(left, 1)}
                )
            if done % recipe.evaluate_every == 0 or done == recipe.vision_steps:
                figures = evaluate_vision(average.encoder, average.decoder, average.text_features()[0])
                log_record(log, {"step": done, "threshold": average.threshold.item(), **figures})
                save_atomically(
                    {
                        "model": model.state_dict(),
                        "average": average.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": done,
                    },
                    state_file,
                )
    return average


def log_record(file: TextIO, record: dict) -> None:
    """Write a record as one JSON line to the curve file and to the terminal."""
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
    file.write(line + "\n")
    file.flush()
    print(line, flush=True)
