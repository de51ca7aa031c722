"""First half of nano's training: the encoder, the image decoder and the text features.

Few-shot matching is trained end to end: in every group each query's taps are matched with the good parts' taps by
the same max-cosine rule that the runtime uses, and the resulting distances are ranked: defective patches above
normal ones, over the whole batch, within each image, and between images by their three largest patches. A small
cross-entropy with one global threshold keeps the distances on one scale over all products, which is what lets the
language model judge without a tuned threshold.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..image_decoder import LOGIT_SCALE, ImageDecoder
from ..imagebind import VisionEncoder
from .config import Recipe
from .data import normalise, patch_coverage, training_group
from .evaluate import evaluate_vision
from .initial import construct
from .products import TRAINED_KINDS

POSITIVE_COVERAGE = 0.06  # share of a patch that must be defective to count; between 0 and this it is ignored
OBJECT = "object"
CLASSES = (OBJECT, *TRAINED_KINDS)
GROUP = 4  # two references, two queries


class NanoVision(nn.Module):
    """What the first half trains."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        config = recipe.vision
        self.encoder = VisionEncoder(config)
        self.decoder = ImageDecoder(config.width, config.embed_dim, len(config.tap_layers))
        self.text = nn.Parameter(torch.randn(len(CLASSES), 2, config.embed_dim))
        self.kind_head = nn.Linear(config.embed_dim, len(CLASSES))  # gives CLS something to say; not shipped
        # the global scale and threshold of the distances; the threshold ships as the map's operating point
        self.sharpness = nn.Parameter(torch.tensor(3.5))
        self.threshold = nn.Parameter(torch.tensor(0.10))

    def text_features(self) -> Tensor:
        """[classes, 2, E], unit norm, row 0 normal and row 1 abnormal."""
        return F.normalize(self.text, dim=-1)


class Groups(Dataset):
    """Step number → one batch of groups, generated on the fly."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __len__(self) -> int:
        return self.recipe.vision_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        first = step * self.recipe.groups_per_step
        samples = [
            s for i in range(self.recipe.groups_per_step) for s in training_group(self.recipe.seed, first + i)
        ]
        return {
            "pixels": torch.from_numpy(np.stack([s.pixels for s in samples])),
            "coverage": torch.from_numpy(patch_coverage(np.stack([s.mask for s in samples]))),
            "kind": torch.tensor([CLASSES.index(s.kind) for s in samples]),
        }


def _ranking(normal: Tensor, defective: Tensor, sharpness: Tensor) -> Tensor:
    """Mean logistic loss over all pairs: every defective value should exceed every normal one."""
    if normal.numel() == 0 or defective.numel() == 0:
        return normal.sum() * 0
    return F.softplus((normal[None, :] - defective[:, None]) * sharpness).mean()


def _distance_loss(distance: Tensor, coverage: Tensor, sharpness: Tensor, threshold: Tensor) -> Tensor:
    """Loss of patch distances [M, P] against the defective share of each patch [M, P]."""
    positive, negative = coverage > POSITIVE_COVERAGE, coverage == 0
    loss = _ranking(distance[negative], distance[positive], sharpness)
    worst = distance.topk(3, dim=1).values.mean(dim=1)
    defective = positive.any(dim=1)
    loss = loss + 0.5 * _ranking(worst[~defective], worst[defective], sharpness)
    within = [
        _ranking(distance[m][negative[m]], distance[m][positive[m]], sharpness)
        for m in defective.nonzero()[:, 0]
    ]
    if within:
        loss = loss + 0.5 * torch.stack(within).mean()
    logits = (distance - threshold) * sharpness
    labelled = positive | negative
    weight = torch.where(positive, 4.0, 1.0)[labelled]
    return loss + 0.2 * F.binary_cross_entropy_with_logits(
        logits[labelled], positive[labelled].float(), weight
    )


def vision_loss(
    model: NanoVision, batch: dict[str, Tensor], recipe: Recipe
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss of one batch, and its parts for the log."""
    pixels = torch.from_numpy(normalise(batch["pixels"].numpy())).to(model.threshold.device)
    coverage, kind = batch["coverage"].to(pixels.device), batch["kind"].to(pixels.device)
    embedding, taps = model.encoder(pixels)
    groups = taps.unflatten(0, (-1, GROUP))  # [G, 4, T, P, V]
    first, second, query_a, query_b = groups.unbind(1)
    both = torch.cat([first, second], dim=2)
    queries = torch.cat([query_a, query_b, query_a, query_b, second, first])
    banks = [torch.cat([first, first], 0), torch.cat([both, both], 0), torch.cat([first, second], 0)]
    labels = coverage.unflatten(0, (-1, GROUP))
    label = torch.cat([labels[:, i] for i in (2, 3, 2, 3, 1, 0)])
    per_tap = []
    start = 0
    for bank in banks:
        part = queries[start : start + bank.shape[0]]
        start += bank.shape[0]
        similarity = F.normalize(part, dim=-1) @ F.normalize(bank, dim=-1).transpose(-1, -2)
        per_tap.append(1 - similarity.amax(dim=-1))
    distances = torch.cat(per_tap)  # [6 G, T, P]
    sharpness = model.sharpness.exp()
    few_shot = _distance_loss(distances.mean(dim=1), label, sharpness, model.threshold)
    auxiliary = torch.stack(
        [
            _distance_loss(distances[:, t], label, sharpness, model.threshold)
            for t in range(distances.shape[1])
        ]
    ).mean()

    share = recipe.zero_shot_gradient
    features = share * taps + (1 - share) * taps.detach()
    named = torch.where(torch.rand(kind.shape[0] // GROUP, device=kind.device) < 0.5, kind[::GROUP], 0)
    text = model.text_features()[named.repeat_interleave(GROUP)]  # [B, 2, E]
    projected = torch.stack([fc(features[:, t]) for t, fc in enumerate(model.decoder.fc)], dim=1)
    logits = LOGIT_SCALE * torch.einsum("btpe,bce->btpc", F.normalize(projected, dim=-1), text)
    margin = logits[..., 1] - logits[..., 0]
    positive, labelled = coverage > POSITIVE_COVERAGE, (coverage > POSITIVE_COVERAGE) | (coverage == 0)
    target = positive[:, None].expand_as(margin)
    weight = torch.where(target, 4.0, 1.0) * labelled[:, None]
    zero_shot = F.binary_cross_entropy_with_logits(margin, target.float(), weight)
    zero_shot = zero_shot + 0.5 * _ranking(
        margin.mean(dim=1)[coverage == 0], margin.mean(dim=1)[positive], torch.ones_like(sharpness)
    )
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
    """torch.save to a temporary name, then rename: an interrupted save leaves the last good one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def train_vision(recipe: Recipe, folder: Path, device: str, workers: int) -> NanoVision:
    """Train (or resume) and return the averaged model.

    Args:
        recipe: the numbers.
        folder: where ``vision.pt`` (resumable state) and ``vision.jsonl`` (curve) are kept.
        device: "cpu" or "cuda".
        workers: processes that generate images; they do not change the result.
    """
    state_file = folder / "vision.pt"
    torch.manual_seed(recipe.seed)
    model = NanoVision(recipe).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.vision_lr, weight_decay=0.01, betas=(0.9, 0.98)
    )
    start = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average = copy.deepcopy(model)
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    else:
        construct(model.encoder.cpu(), recipe.seed)
        model.to(device)
        average = copy.deepcopy(model)
    if start >= recipe.vision_steps:
        return average
    loader: Iterator[dict[str, Tensor]] = iter(
        DataLoader(
            Groups(recipe), batch_size=None, sampler=range(start, recipe.vision_steps), num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
    )  # fmt: skip
    began, seen = time.monotonic(), start
    with open(folder / "vision.jsonl", "a", encoding="utf-8") as log:
        for step in range(start, recipe.vision_steps):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # the same draws whether resumed or not
            rate = learning_rate(step, recipe.vision_steps, recipe.warmup_steps, recipe.vision_lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, parts = vision_loss(model, next(loader), recipe)
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
    """One JSON line to the curve file and to the terminal."""
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
    file.write(line + "\n")
    file.flush()
    print(line, flush=True)
