"""Second half of nano's training: prompt learner, projection and language model, on the frozen encoder's maps.

As in AnomalyGPT, the words must come through the 18 prompt embeddings: the image embedding carries what the product
is, the map what is wrong with it.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor, nn

from ...runtime.bundles.bundle import Augmentation
from ...runtime.synthetic.data import fixed_samples, mirror_defects, normalise, validation_families
from ...runtime.synthetic.defects import Defect
from ...runtime.vision.augment import augment
from ..anomalygpt import AnomalyGPT, assemble_prompt, few_shot_distance, upsample_map
from ..look import LookNet
from ..prompt_learner import NUM_BASE_PROMPTS
from ..prompts import (
    AFFIRMATIVE,
    DEFAULT_QUESTION,
    NEGATIVE,
    PIECE_AFTER_IMAGE,
    PIECE_ASSISTANT,
    PIECE_BEFORE_IMAGE,
    STOP_PIECE,
    STOP_STRING,
    answer,
    place_number,
)
from .config import Recipe
from .gallery import SHARES, Gallery, Sureness, evidence_of, make_bank, map_statistics
from .train_vision import NanoVision, learning_rate, log_record, save_atomically, update_average
from .words import (
    CANNOT_KNOW,
    SIZES,
    UNKNOWABLE_UNSEEN,
    dialogue,
    follow_ups,
    is_line,
    look_answer,
    places,
    shade_of,
    shade_seen,
)

IGNORE = -100
VERDICT_WEIGHT = 4.0  # the first answer token decides, one of some twenty
SHADES = ("dark", "bright", "darker", "brighter")
CELL_WEIGHT = 0.5
FEW_SHOT = ("one", "few")  # the maps of the gallery's ``SHOTS``


class Vocabulary:
    """The fixed prompt pieces as token ids."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.tokenizer = tokenizer
        self.before = [tokenizer.bos_id(), *tokenizer.encode(PIECE_BEFORE_IMAGE)]
        self.after = tokenizer.encode(PIECE_AFTER_IMAGE)
        self.stop = tokenizer.piece_to_id(STOP_PIECE)
        self.affirmative = tokenizer.encode(AFFIRMATIVE)[0]
        self.negative = tokenizer.encode(NEGATIVE)[0]
        self.shades = [tokenizer.encode(f"a {shade}")[-1] for shade in SHADES]

    @property
    def pieces(self) -> list[str]:
        return [self.tokenizer.id_to_piece(i) for i in range(self.tokenizer.vocab_size())]

    def asked(self, question: str, before: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Token ids behind the prompt embeddings, up to where the answer starts."""
        shown = ("Human: " if before else "") + question + PIECE_ASSISTANT
        return self.turns(before)[0] + self.tokenizer.encode(shown)

    def turns(self, dialogue: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids behind the prompt embeddings, and the label of each (IGNORE where nothing is learned).

        A first question follows the embeddings directly; later ones start with "Human: " as the original's history.
        """
        ids: list[int] = []
        labels: list[int] = []
        for number, (question, reply) in enumerate(dialogue):
            asked = self.tokenizer.encode(("Human: " if number else "") + question + PIECE_ASSISTANT)
            told = self.tokenizer.encode(reply + STOP_STRING)
            ids += asked + told
            labels += [IGNORE] * len(asked) + told
        return ids, labels


class Seen(NamedTuple):
    """What the prompt learner and the projection are given of B parts."""

    maps: Tensor  # [B, 224, 224], 0..1
    embedding: Tensor  # [B, E]
    figures: Tensor  # [B, F], the evidence beside the maps
    looks: Tensor  # [B, LOOKS], what the picture says where they are raised

    def at(self, rows: slice | Tensor) -> Seen:
        return Seen(*(x[rows] for x in self))

    def to(self, device: str | torch.device) -> Seen:
        return Seen(*(x.to(device) for x in self))


class Maps:
    """Draws one of a part's maps (one normal sample, few, none) and says what is to be said of it.

    Args:
        looks: ``look_at``'s logits [N, 3, LOOKS].
    """

    SOURCES = (*FEW_SHOT, "zero")

    def __init__(self, gallery: Gallery, looks: np.ndarray) -> None:
        self.gallery, self.looks = gallery, looks
        self.defective = np.array([bool(d) for d in gallery.defects])
        self.sureness = {
            source: Sureness(map_statistics(self.patches(slice(None), source)), self.defective)
            for source in self.SOURCES
        }

    def patches(self, index: int | slice | np.ndarray, source: str) -> np.ndarray:
        """The map in patches, float32 [..., grid²]; the zero-shot one approximately (mean before upsampling)."""
        if source == "zero":
            return (1 / (1 + np.exp(-self.gallery.margins[index].astype(np.float32)))).mean(axis=-2)
        return self.gallery.few_shot[index, FEW_SHOT.index(source)].astype(np.float32)

    def seen(self, index: np.ndarray, source: str) -> Seen:
        """As the runtime sees the parts."""
        number = self.SOURCES.index(source)
        embedding = torch.from_numpy(self.gallery.embedding[index].astype(np.float32))
        figures = torch.from_numpy(self.gallery.figures[index, number])
        looks = torch.from_numpy(self.looks[index, number])
        return Seen(self.gallery.maps(index, number), embedding, figures, looks)

    def draw(self, index: int, rng: Generator) -> tuple[Seen, str, str]:
        """One part, and the words for how sure its map is and for the shade that can be told."""
        source = str(rng.choice(self.SOURCES, p=SHARES))
        seen = self.seen(np.array([index]), source)
        if source != "zero":
            seen = seen._replace(maps=seen.maps * float(rng.uniform(0.96, 1.04)))
        return seen, self.sureness[source].words(self.patches(index, source)), shade_seen(seen.looks[0])


CELL_TRUTHS = ("defect", "line", "over 1 percent")


def cell_truths(defects: list[Defect]) -> np.ndarray:
    """float32 [9, 3]: what is true of each cell's most visible defect (``CELL_TRUTHS``), by the cell of its centre."""
    truths = np.zeros((9, len(CELL_TRUTHS)), np.float32)
    for d in sorted(defects, key=lambda d: d.contrast * d.area**0.5):
        truths[place_number(*d.center)] = (True, is_line(d), d.area > SIZES[0][0])
    return truths


class CellHead(nn.Module):
    """Prompt embeddings → what is in each cell. Not shipped: it only teaches the prompt learner to see.

    Every cell is read from all nine rows: their fields overlap, and which part of its own a cell is differs.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(9 * width, 9 * len(CELL_TRUTHS))
        nn.init.zeros_(self.linear.weight)  # what knows nothing yet would teach the convolutions nonsense

    def forward(self, prompts: Tensor) -> Tensor:
        """[B, 18, D] → logits [B, 9, 3]."""
        return self.linear(prompts[:, NUM_BASE_PROMPTS:].flatten(1)).unflatten(1, (9, -1))


class Batch(NamedTuple):
    seen: Seen
    ids: Tensor  # [B · N, L] token ids of N dialogues about each part
    labels: Tensor  # [B · N, L], IGNORE where nothing is learned
    truths: Tensor  # [B, 9, 3] of ``cell_truths``

    def to(self, device: str) -> Batch:
        return Batch(
            self.seen.to(device), self.ids.to(device), self.labels.to(device), self.truths.to(device)
        )


def look_odds(defects: list[list[Defect]], shades: list[str]) -> np.ndarray:
    """How often to draw each of these parts, of which these shades can be told: those of a rare look more often, by
    the root of how rare it is, or the words learn to say "a spot" of everything."""
    answers = [look_answer(*each) for each in zip(defects, shades, strict=True)]
    looks, number = np.unique(answers, return_inverse=True)
    odds = np.bincount(number, minlength=len(looks))[number] ** -0.5
    return odds / odds.sum()


def draw_batch(
    maps: Maps,
    good: np.ndarray,
    bad: np.ndarray,
    odds: np.ndarray,
    words: Vocabulary,
    rng: Generator,
    size: int,
    dialogues: int,
) -> Batch:
    """``size`` parts, half of them defective (drawn with these odds), mirrored at random."""
    gallery = maps.gallery
    chosen = np.concatenate([rng.choice(good, size - size // 2), rng.choice(bad, size // 2, p=odds)])
    shown, rows, truths = [], [], []
    for index in chosen.tolist():
        left_right, up_down = bool(rng.integers(2)), bool(rng.integers(2))
        flips = [axis for axis, flip in ((-2, up_down), (-1, left_right)) if flip]
        drawn, *told = maps.draw(index, rng)
        shown.append(drawn._replace(maps=drawn.maps.flip(flips)))  # figures and looks have no left and right
        defects = mirror_defects(gallery.defects[index], left_right, up_down)
        truths.append(cell_truths(defects))
        rows += [words.turns(dialogue(rng, defects, gallery.kinds[index], *told)) for _ in range(dialogues)]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in rows])
    labels = torch.tensor([lab + [IGNORE] * (length - len(lab)) for _, lab in rows])
    seen = Seen(*map(torch.cat, zip(*shown, strict=True)))
    return Batch(seen, ids, labels, torch.from_numpy(np.stack(truths)))


def inject(model: AnomalyGPT, seen: Seen) -> tuple[Tensor, Tensor]:
    """Image embeddings [B, D] and prompt embeddings [B, 18, D]."""
    return model.llama_proj(seen.embedding), model.prompt_learner.read(seen.maps, seen.figures, seen.looks)


def language_loss(
    model: AnomalyGPT, words: Vocabulary, cell_head: CellHead, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of the answers' tokens, the verdict's weighted up, and how well the nine cells' prompt
    embeddings say what is in their cells: the words alone teach a convolution to see too slowly."""
    embedding, prompts = inject(model, batch.seen)
    # the prompt learner costs more than the words: it reads a part once for all dialogues about it
    times = len(batch.ids) // len(prompts)
    repeated = (embedding.repeat_interleave(times, dim=0), prompts.repeat_interleave(times, dim=0))
    logits = _logits(model, words, repeated, batch.ids)
    first = logits.shape[1] - batch.ids.shape[1] - 1  # the position that predicts ids[:, 0]
    flat = batch.labels.flatten()
    token_losses = F.cross_entropy(
        logits[:, first:-1].flatten(0, 1), flat, ignore_index=IGNORE, reduction="none"
    )
    shades = torch.isin(flat, torch.tensor(words.shades, device=flat.device))
    decisive = shades | (flat == words.affirmative) | (flat == words.negative)
    weight = torch.where(decisive, VERDICT_WEIGHT, 1.0) * (flat != IGNORE)
    answers = (token_losses * weight).sum() / weight.sum()
    told = cell_head(prompts)
    known = batch.truths[..., :1].expand_as(told).clone()
    known[..., 0] = 1  # of a cell without a defect only that
    losses = F.binary_cross_entropy_with_logits(told, batch.truths, reduction="none") * known
    cells = (losses.sum(dim=(0, 1)) / known.sum(dim=(0, 1)).clamp(min=1)).mean()
    loss = answers + CELL_WEIGHT * cells
    told_shades = token_losses[shades].mean().nan_to_num()
    return loss, {"answers": answers.item(), "cells": cells.item(), "shades": told_shades.item()}


def _logits(model: AnomalyGPT, words: Vocabulary, injected: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
    pieces = (
        torch.tensor(words.before, device=ids.device),
        torch.tensor(words.after, device=ids.device),
        ids,
    )
    return model.llama(assemble_prompt(model.llama, pieces, *injected))


@torch.no_grad()
def generate(
    model: AnomalyGPT,
    words: Vocabulary,
    seen: Seen,
    question: str,
    before: Sequence[tuple[str, str]] = (),
    max_tokens: int = 40,
) -> tuple[list[str], Tensor]:
    """Greedy answers and p(anomaly) [B] of the first answer token; ``before``: what was asked and said already."""
    injected = inject(model, seen)
    asked = words.asked(question, before)
    ids = torch.tensor([asked] * len(seen.maps), device=seen.maps.device)
    start = ids.shape[1]
    p_anomaly = torch.zeros(len(ids))
    for step in range(max_tokens):
        last = _logits(model, words, injected, ids)[:, -1]
        if step == 0:
            p_anomaly = last[:, [words.negative, words.affirmative]].softmax(dim=1)[:, 1]
        ids = torch.cat([ids, last.argmax(dim=1, keepdim=True)], dim=1)
        if bool((ids[:, start:] == words.stop).any(dim=1).all()):
            break
    texts = []
    for row in ids[:, start:].tolist():
        kept = row[: row.index(words.stop)] if words.stop in row else row
        texts.append(words.tokenizer.decode(kept).strip())
    return texts, p_anomaly


@dataclass
class Shown:
    """One family's queries as the language model is given them, and the truth."""

    one_shot: Seen
    zero_shot: Seen
    defects: list[list[Defect]]
    kind: str
    seed: int

    @property
    def defective(self) -> np.ndarray:
        return np.array([bool(d) for d in self.defects])


@torch.no_grad()
def show_validation(
    vision: NanoVision,
    look: LookNet,
    augmentation: Augmentation = "none",
    num_families: int = 35,
    num_queries: int = 4,
) -> list[Shown]:
    """The validation families as the frozen encoder shows them: one normal sample, good and defective queries."""
    text = vision.text_features()[0]
    shown = []
    for family in validation_families(num_families):
        reference, good, bad = fixed_samples(family, 1, num_queries, num_queries)
        pixels = normalise(np.stack([s.pixels for s in reference + good + bad]))
        images = torch.from_numpy(pixels).to(text.device)
        vectors, taps = vision.encoder(images)
        copied = augment(pixels[:1], augmentation, vision.encoder.config.grid)
        known = [vision.encoder(torch.from_numpy(copy).to(text.device))[1] for copy, _ in copied]
        bank = make_bank(known, vision.encoder.config.tokens**2).expand(len(taps) - 1, -1, -1, -1)
        maps = upsample_map(few_shot_distance(taps[1:], bank)), vision.decoder(taps[1:], text)
        one_shot, zero_shot = (
            Seen(each, vectors[1:], evidence_of(each, shots), look(images[1:], each))
            for each, shots in zip(maps, (1, 0), strict=True)
        )
        defects = [s.defects for s in good + bad]
        shown.append(Shown(one_shot, zero_shot, defects, family.kind, family.seed))
    return shown


@torch.no_grad()
def evaluate_language(model: AnomalyGPT, words: Vocabulary, shown: list[Shown]) -> dict[str, float]:
    """Share of right answers on validation products.

    Verdicts with one normal sample, with none and with another part's map; the named place, and behind the verdict
    the answers to every follow-up question, of parts with one defect that it called defective (the shade: how often
    it says one, and how often that is right); refusals of questions that it never saw and that no picture answers.
    """
    figures: dict[str, list[float]] = {}
    for family in shown:
        truth, rng = family.defective, default_rng(family.seed)
        shuffled = family.one_shot.at(torch.from_numpy(rng.permutation(len(truth))))
        sources = {"one_shot": family.one_shot, "zero_shot": family.zero_shot, "shuffled": shuffled}
        for name, seen in sources.items():
            texts, _ = generate(model, words, seen, DEFAULT_QUESTION)
            said = np.array([t.startswith(AFFIRMATIVE) for t in texts])
            figures.setdefault(f"{name}_accuracy", []).append(float((said == truth).mean()))
            if name == "one_shot":
                verdicts, caught = texts, [i for i, d in enumerate(family.defects) if len(d) == 1 and said[i]]
        for i in caught:
            right_place = verdicts[i] == answer(places(family.defects[i]))
            figures.setdefault("verdict_place", []).append(float(right_place))
            asked = follow_ups(rng, family.defects[i], family.kind, "", shade_of(family.defects[i][0]))
            right = {k: asked[k] for k in ("place", "count", "size", "look", "shade", "kind")}
            right["refusal"] = (str(rng.choice(UNKNOWABLE_UNSEEN)), CANNOT_KNOW)
            part, before = family.one_shot.at(slice(i, i + 1)), [(DEFAULT_QUESTION, verdicts[i])]
            for name, (question, reply) in right.items():
                texts, _ = generate(model, words, part, question, before)
                if name == "look":  # the form; the shade is asked on its own
                    texts[0], reply = texts[0].split(" ")[-1], reply.split(" ")[-1]
                if name == "shade":
                    figures.setdefault("shade_said", []).append(float(texts[0] != CANNOT_KNOW))
                    if texts[0] == CANNOT_KNOW:
                        continue
                figures.setdefault(name, []).append(float(texts[0] == reply))
    return {name: float(np.mean(values)) for name, values in figures.items() if values}


@torch.no_grad()
def calibrate(model: AnomalyGPT, words: Vocabulary, maps: Maps, parts: np.ndarray) -> float:
    """Scale the language model's head so that p(anomaly) means what it says; greedy answers stay what they are.

    Args:
        parts: gallery entries of families that the language model was not trained on; their maps with normal samples
            count, as zero-shot ones would make these less sure than they may be.

    Returns:
        The temperature found (Guo et al., ICML 2017): the logits are divided by it.
    """
    asked = words.asked(DEFAULT_QUESTION)
    device = next(model.parameters()).device
    margins = []
    for source in FEW_SHOT:
        for start in range(0, len(parts), 64):
            seen = maps.seen(parts[start : start + 64], source).to(device)
            ids = torch.tensor([asked] * len(seen.maps), device=device)
            last = _logits(model, words, inject(model, seen), ids)[:, -1]
            margins.append((last[:, words.affirmative] - last[:, words.negative]).cpu())
    margin = torch.cat(margins)
    defective = torch.from_numpy(np.tile(maps.defective[parts], len(FEW_SHOT)))
    # good and defective parts count the same, as a line's mix is not known
    weight = torch.where(defective, 0.5 / defective.float().mean(), 0.5 / (~defective).float().mean())
    temperatures = torch.exp(torch.linspace(math.log(0.5), math.log(6), 60))
    losses = [
        F.binary_cross_entropy_with_logits(margin / t, defective.float(), weight).item() for t in temperatures
    ]
    temperature = float(temperatures[int(np.argmin(losses))])
    model.llama.lm_head.weight.div_(temperature)
    return temperature


def train_language(
    recipe: Recipe,
    model: AnomalyGPT,
    vision: NanoVision,
    maps: Maps,
    words: Vocabulary,
    folder: Path,
    device: str,
) -> AnomalyGPT:
    """Train (or resume) and return the averaged model; ``language.pt`` and ``language.jsonl`` as for the vision."""
    gallery = maps.gallery
    state_file = folder / "language.pt"
    torch.manual_seed(recipe.seed + 1)
    model.to(device)
    model.prompt_learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast
    for module in (model.encoder, model.image_decoder, model.prompt_learner.look_net):
        module.requires_grad_(False)
    cell_head = CellHead(model.config.prompt_learner.llm_width).to(device)
    trained = [p for p in [*model.parameters(), *cell_head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.language_lr, weight_decay=0.01, betas=(0.9, 0.98))
    start = 0
    average = copy.deepcopy(model)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        cell_head.load_state_dict(state["cell_head"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    shown = show_validation(vision, model.prompt_learner.look_net, recipe.augmentation)
    kept = gallery.trained  # the others' families are for the calibration
    bad = np.array([i for i, d in enumerate(gallery.defects[:kept]) if d])
    good = np.array([i for i, d in enumerate(gallery.defects[:kept]) if not d])
    told = [shade_seen(torch.from_numpy(maps.looks[i, 0])) for i in bad]
    odds = look_odds([gallery.defects[i] for i in bad], told)
    began = time.monotonic()
    with open(folder / "language.jsonl", "a", encoding="utf-8") as log:
        for step in range(start, recipe.language_steps):
            rng = default_rng([recipe.seed, 3, step])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, recipe.language_steps, recipe.warmup_steps, recipe.language_lr
                )
            batch = draw_batch(maps, good, bad, odds, words, rng, recipe.language_batch, recipe.dialogues)
            loss, parts = language_loss(model, words, cell_head, batch.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            update_average(average, model, min(recipe.ema, (step + 1) / (step + 10)))
            done = step + 1
            if done % recipe.log_every == 0 or done == recipe.language_steps:
                pace = (time.monotonic() - began) / (done - start)
                left = round(pace * (recipe.language_steps - done) / 60, 1)
                log_record(
                    log,
                    {"step": done, **parts, "s_per_step": round(pace, 3), "minutes_left": left},
                )
            if done % recipe.evaluate_every == 0 or done == recipe.language_steps:
                log_record(log, {"step": done, **evaluate_language(average, words, shown)})
                state = {"model": model.state_dict(), "average": average.state_dict()}
                state["cell_head"] = cell_head.state_dict()
                save_atomically({**state, "optimizer": optimizer.state_dict(), "step": done}, state_file)
        temperature = calibrate(average, words, maps, np.arange(kept, len(gallery.defects)))
        log_record(log, {"step": recipe.language_steps, "temperature": temperature})
    return average
