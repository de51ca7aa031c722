"""Training of lite's encoder on the frozen backbone's features: the projection of each tap and the image embedding.

Few-shot matching is trained as it is used: every part of a group is matched with other good parts of the same product
by the largest cosine, and the distances are ranked, defective above normal ones. They are ranked in units of normal
variation: divided by what the group's good parts score among themselves, so that one limit is learned for every
product. The scale of a tap against its constant channel, which training moves too, weighs the taps.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from numpy.random import default_rng
from torch import Tensor, nn

from ...runtime.synthetic.products import TRAINED_KINDS
from ..nano.config import LanguageRecipe
from .backbone import load_pretrained
from .encoder import LiteEncoder, LiteVisionConfig
from .groups import GROUP, NORMALS, Pool

POSITIVE_COVERAGE = 0.06  # share of a patch that must be defective to count; between 0 and this it is ignored
NUM_NEGATIVES, NUM_POSITIVES = 3000, 400  # patches of a batch that are compared pair by pair, drawn at random
HARD_SHARE = 0.1  # of the normal patches: half of the patch loss is against these, the highest
TOP_SHARE = 0.01  # of a part's patches, whose mean is the part's score
NUM_HARD_WITHIN = 80  # normal patches of a defective part that its defective ones are ranked against
FLOOR = 0.05  # units of normal variation: differences below are nothing


@dataclass(frozen=True)
class Recipe:
    """What one training run does. These defaults made the shipped weights; training/ablation.md backs them."""

    seed: int = 1
    pool_groups: int = 600  # seven parts each
    steps: int = 160
    groups_per_step: int = 4
    learning_rate: float = 7e-4
    warmup_steps: int = 20
    ema: float = 0.98
    sharpness: float = 4.0  # of the ranking losses, per unit of a logarithm
    tap_loss: float = 0.25  # share of the losses of single taps beside that of their mean
    kept_share: float = 0.5  # of the start in the weights that are returned: it sees unlike products more evenly
    log_every: int = 20
    save_every: int = 40
    # image decoder and text features, for zero-shot maps
    decoder_steps: int = 3000
    decoder_lr: float = 2e-3
    decoder_ema: float = 0.995
    decoder_log_every: int = 200
    # second half: picture network, prompt learner, projection and language model, on maps of other groups
    gallery_groups: int = 830
    validation_families: int = 35
    language: LanguageRecipe = field(
        default_factory=lambda: LanguageRecipe(
            seed=1, look_steps=1000, language_steps=780, language_lr=4e-4, evaluate_every=390
        )
    )
    vision: LiteVisionConfig = field(default_factory=LiteVisionConfig)


class LiteVision(nn.Module):
    """What is trained: the encoder without its backbone, on features that it made before."""

    def __init__(self, encoder: LiteEncoder) -> None:
        super().__init__()
        self.projections, self.constants, self.head = encoder.projections, encoder.constants, encoder.head
        self.kind_head = nn.Linear(encoder.config.embed_dim, len(TRAINED_KINDS))  # not shipped


def new_encoder(config: LiteVisionConfig) -> LiteEncoder:
    """An encoder with the pretrained backbone.

    Raises:
        ConfigError: the pretrained weights are not installed.
    """
    encoder = LiteEncoder(config)
    load_pretrained(encoder.backbone)
    return encoder.eval()


@torch.no_grad()
def start_projections(encoder: LiteEncoder, gathered: Sequence[Tensor], rows: int = 100_000) -> None:
    """Each projection starts as the principal components of its tap, of unit length in the mean, centred."""
    for projection, tap in zip(encoder.projections, gathered, strict=True):
        sample = tap.flatten(0, 1)
        sample = sample[:: max(1, len(sample) // rows)].float()
        mean = sample.mean(dim=0)
        centred = sample - mean
        components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
        components = components[:, : encoder.config.width - 1]
        weight = (components / (centred @ components).norm(dim=1).mean()).T
        spare = encoder.config.width - 1 - len(weight)  # a tap with fewer channels leaves rows of zeros
        projection.load_state_dict(
            {"weight": F.pad(weight, (0, 0, 0, spare)), "bias": F.pad(-weight @ mean, (0, spare))}
        )
    encoder.constants.fill_(1.0)


class Matching:
    """The parts of some groups matched with the groups' good parts, each with every other.

    The nearest are found outside autograd: only the pairs that matched get a gradient, so only they are computed again.

    Args:
        vectors: unit length [G, GROUP, T, P, V].
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors
        groups, _, taps, patches, _ = vectors.shape
        similarity = torch.empty(groups, taps, GROUP, NORMALS, patches)
        nearest = torch.empty(groups, taps, GROUP, NORMALS, patches, dtype=torch.long)
        with torch.no_grad():
            for group in range(groups):
                for tap in range(taps):
                    bank = vectors[group, :NORMALS, tap].flatten(0, 1).T
                    for part in range(GROUP):
                        found = (vectors[group, part, tap] @ bank).unflatten(1, (NORMALS, patches)).max(dim=-1)
                        similarity[group, tap, part] = found.values.T
                        nearest[group, tap, part] = found.indices.T
        self._similarity, self._nearest = similarity, nearest

    def distance(self, part: int, bank: Sequence[int]) -> Tensor:
        """1 − cosine of a part's patches with the nearest of these good parts, [G, T, P]."""
        normals = torch.tensor(bank)
        best = self._similarity[:, :, part, normals].argmax(dim=2, keepdim=True)  # [G, T, 1, P]
        patch = self._nearest[:, :, part, normals].gather(2, best)[:, :, 0]
        patches = self._vectors.shape[3]
        row = normals[best[:, :, 0]] * patches + patch
        rows = self._vectors[:, :NORMALS].transpose(1, 2).flatten(2, 3)  # [G, T, NORMALS · P, V]
        matched = rows.gather(2, row[..., None].expand(-1, -1, -1, rows.shape[-1]))
        return 1 - (self._vectors[:, part] * matched).sum(dim=-1)


def few_shot_loss(vectors: Tensor, coverage: Tensor, recipe: Recipe) -> Tensor:
    """Ranking losses with one good part in the bank and with all.

    Args:
        vectors: [G, GROUP, T, P, V], not normalised.
        coverage: [G, GROUP, P], defective share of each patch.
        recipe: the numbers.
    """
    matching = Matching(F.normalize(vectors, dim=-1))
    queries = coverage[:, NORMALS:]
    one = int(torch.randint(NORMALS, ()))
    single = [matching.distance(n, [(n + 1) % NORMALS]) for n in range(NORMALS)]
    others = [matching.distance(n, [m for m in range(NORMALS) if m != n]) for n in range(NORMALS)]
    loss = vectors.new_zeros(())
    for bank, among in (([one], single), (list(range(NORMALS)), others)):
        normal = torch.stack(among, dim=1)  # [G, NORMALS, T, P]
        query = torch.stack([matching.distance(part, bank) for part in range(NORMALS, GROUP)], dim=1)
        loss = loss + _unit_loss(normal.mean(dim=2), query.mean(dim=2), queries, recipe.sharpness)
        taps = zip(normal.unbind(2), query.unbind(2), strict=True)
        single_taps = torch.stack([_unit_loss(*pair, queries, recipe.sharpness) for pair in taps])
        loss = loss + recipe.tap_loss * single_taps.mean()
    return loss


def _unit_loss(normal: Tensor, query: Tensor, coverage: Tensor, sharpness: float) -> Tensor:
    """Distances of good parts among themselves [G, NORMALS, P] and of queries [G, QUERIES, P] with their coverage."""
    normal, query = normal.clamp(min=1e-6), query.clamp(min=1e-6)
    count = max(1, int(normal.shape[-1] * TOP_SHARE))
    normal_score, query_score = (d.topk(count, dim=-1).values.mean(dim=-1) for d in (normal, query))
    unit = normal_score.mean(dim=1, keepdim=True)
    normal_patches, patches = ((d / unit[..., None] + FLOOR).log() for d in (normal, query))
    positive, negative = defective_patches(coverage), coverage == 0
    defective = positive.any(dim=-1)
    # a defect of one patch counts as much as a defect of four half as much each
    weight = (1 / positive.sum(dim=-1, keepdim=True).clamp(min=1).sqrt()).expand_as(coverage)[positive]
    normals = torch.cat([patches[negative], normal_patches.flatten()])
    hardest = normals.topk(max(1, int(normals.numel() * HARD_SHARE))).values
    loss = 0.5 * _ranking(normals, patches[positive], sharpness, weight)
    loss = loss + 0.5 * _ranking(hardest, patches[positive], sharpness, weight)
    good = torch.cat([(normal_score / unit).log().flatten(), (query_score / unit).log()[~defective]])
    loss = loss + _ranking(good, (query_score / unit).log()[defective], sharpness)
    within = []
    for group, part in defective.nonzero().tolist():
        around = patches[group, part][negative[group, part]]
        around = around.topk(min(NUM_HARD_WITHIN, len(around))).values
        within.append(_ranking(around, patches[group, part][positive[group, part]], sharpness))
    return loss + 0.5 * torch.stack(within).mean()


def _ranking(normal: Tensor, defective: Tensor, sharpness: float, weight: Tensor | None = None) -> Tensor:
    """Mean logistic loss over all pairs (of a random share, where there are many): every defective value should
    exceed every normal one. ``weight`` is the defective values'."""
    if normal.numel() == 0 or defective.numel() == 0:
        return normal.sum() * 0
    if normal.numel() > NUM_NEGATIVES:
        normal = normal[torch.randint(normal.numel(), (NUM_NEGATIVES,))]
    if defective.numel() > NUM_POSITIVES:
        chosen = torch.randint(defective.numel(), (NUM_POSITIVES,))
        defective, weight = defective[chosen], None if weight is None else weight[chosen]
    losses = F.softplus((normal[None, :] - defective[:, None]) * sharpness).mean(dim=1)
    return losses.mean() if weight is None else (losses * weight).sum() / weight.sum()


def defective_patches(coverage: Tensor) -> Tensor:
    """bool [..., P]: covered enough to count, and of a defect too small for that the patch that holds most of it."""
    largest = (coverage == coverage.amax(dim=-1, keepdim=True)) & (coverage > 0)
    return (coverage > POSITIVE_COVERAGE) | largest


def train_vision(recipe: Recipe, encoder: LiteEncoder, pool: Pool, folder: Path) -> LiteEncoder:
    """Train (or resume) the projections and the head of an encoder; returns it with the averaged weights.

    Args:
        recipe: the numbers.
        encoder: with the backbone that encoded the pool.
        pool: what to train on.
        folder: where ``vision.pt`` (resumable state) and ``vision.jsonl`` (curve) are kept.
    """
    torch.manual_seed(recipe.seed)
    gathered = [torch.from_numpy(column) for column in pool.gathered]
    summaries = torch.from_numpy(pool.summaries).float()
    coverage = torch.from_numpy(pool.coverage)
    kinds = torch.tensor([TRAINED_KINDS.index(str(kind)) for kind in pool.kinds])
    start_projections(encoder, gathered)
    encoder.head.reset_parameters()
    start = [parameter.detach().clone() for parameter in encoder.projections.parameters()]
    model = LiteVision(encoder)
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    state_file, first = folder / "vision.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    began = time.monotonic()
    with open(folder / "vision.jsonl", "a", encoding="utf-8") as log:
        for step in range(first, recipe.steps):
            torch.manual_seed(recipe.seed * 1_000_003 + step)  # the same draws whether resumed or not
            for settings in optimizer.param_groups:
                settings["lr"] = learning_rate(step, recipe)
            groups = _groups_of(step, recipe, pool.num_groups)
            rows = (groups[:, None] * GROUP + torch.arange(GROUP)).flatten()
            vectors = encoder.project([tap[rows].float() for tap in gathered]).unflatten(0, (-1, GROUP))
            few_shot = few_shot_loss(vectors, coverage[rows].float().unflatten(0, (-1, GROUP)), recipe)
            embedding = F.normalize(model.head(summaries[rows]), dim=-1)
            naming = F.cross_entropy(10 * model.kind_head(embedding), kinds[groups].repeat_interleave(GROUP))
            optimizer.zero_grad(set_to_none=True)
            (few_shot + 0.1 * naming).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            _update_average(average, model, min(recipe.ema, (step + 1) / (step + 10)))
            done = step + 1
            if done % recipe.log_every == 0 or done == recipe.steps:
                pace = (time.monotonic() - began) / (done - first)
                parts = {"few_shot": few_shot.item(), "naming": naming.item(), "s_per_step": pace}
                log_record(log, {"step": done, **parts, "minutes_left": pace * (recipe.steps - done) / 60})
            if done % recipe.save_every == 0 or done == recipe.steps:
                state = {"model": model.state_dict(), "average": average.state_dict()}
                state |= {"optimizer": optimizer.state_dict(), "step": done}
                _save_whole(state, state_file)
    with torch.no_grad():
        for trained, before in zip(average.projections.parameters(), start, strict=True):
            trained.lerp_(before, recipe.kept_share)
        average.constants.lerp_(torch.ones_like(average.constants), recipe.kept_share)
    encoder.projections.load_state_dict(average.projections.state_dict())
    encoder.head.load_state_dict(average.head.state_dict())
    encoder.constants.data.copy_(average.constants.data)
    return encoder


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a half cosine to 5 % of the peak."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))


def _groups_of(step: int, recipe: Recipe, num_groups: int) -> Tensor:
    """The groups of a step: each pass over the pool in an order of its own."""
    chosen = []
    for place in range(step * recipe.groups_per_step, (step + 1) * recipe.groups_per_step):
        epoch, position = divmod(place, num_groups)
        chosen.append(int(default_rng([recipe.seed, epoch]).permutation(num_groups)[position]))
    return torch.tensor(chosen)


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    for kept, new in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)


def _save_whole(state: dict[str, object], path: Path) -> None:
    """torch.save to a temporary name, then rename: an interrupted save leaves the last good one."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def log_record(file: TextIO, record: dict[str, object]) -> None:
    """One JSON line to the curve file and to the terminal."""
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()})
    file.write(line + "\n")
    file.flush()
    print(line, flush=True)
