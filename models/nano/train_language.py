"""Second half of nano's training: prompt learner, projection and language model, on the frozen encoder's maps.

As in AnomalyGPT, the language model gets information about defects only through the 18 prompt embeddings; the image
embedding identifies the product.
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
from ...runtime.evaluation.metrics import auroc
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
from .config import LanguageRecipe
from .dialogues import (
    CANNOT_KNOW,
    SIZES,
    UNKNOWABLE_UNSEEN,
    dialogue,
    follow_ups,
    is_line,
    line_seen,
    look_answer,
    places,
    shade_of,
    shade_seen,
)
from .gallery import SHARES, Confidence, Gallery, evidence_of, make_bank, map_statistics
from .train_vision import NanoVision, learning_rate, log_record, save_atomically, update_average

IGNORE = -100
VERDICT_WEIGHT = (
    4.0  # loss weight of the first answer token, which decides the verdict; answers have about 20 tokens
)
SHADES = ("dark", "bright", "darker", "brighter")
CELL_WEIGHT = 0.5
BINS = 10  # of the calibration error
FEW_SHOT = ("one", "few")  # names of the gallery's maps with ``SHOTS`` normal samples


class Vocabulary:
    """The tokenizer, and the fixed prompt pieces as token ids."""

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
        """Token ids between the prompt embeddings and the answer; ``before`` is the dialogue so far."""
        shown = ("Human: " if before else "") + question + PIECE_ASSISTANT
        return self.turns(before)[0] + self.tokenizer.encode(shown)

    def turns(self, dialogue: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids of a dialogue behind the prompt embeddings, and the label of each (IGNORE outside answers).

        The first question follows the embeddings directly; later ones start with "Human: ", as in the original.
        """
        ids: list[int] = []
        labels: list[int] = []
        for number, (question, reply) in enumerate(dialogue):
            asked = self.tokenizer.encode(("Human: " if number else "") + question + PIECE_ASSISTANT)
            answered = self.tokenizer.encode(reply + STOP_STRING)
            ids += asked + answered
            labels += [IGNORE] * len(asked) + answered
        return ids, labels


class Seen(NamedTuple):
    """Inputs of the prompt learner and the projection for B parts."""

    maps: Tensor  # [B, 224, 224], 0..1
    embedding: Tensor  # [B, E]
    figures: Tensor  # [B, F], ``evidence`` of the maps
    looks: Tensor  # [B, LOOKS], logits of the picture network for these maps

    def at(self, rows: slice | Tensor) -> Seen:
        return Seen(*(x[rows] for x in self))

    def to(self, device: str | torch.device) -> Seen:
        return Seen(*(x.to(device) for x in self))


class Maps:
    """The gallery's maps (with one normal sample, few, none), and what the training answers need to know about them.

    Args:
        gallery: of N parts.
        looks: result of ``look_at``, [N, 3, len(LOOKS)].
        name_lines: whether the look answers name a line where the picture network recognises one, and else "a mark"
            (see ``look_answer``).
    """

    SOURCES = (*FEW_SHOT, "zero")

    def __init__(self, gallery: Gallery, looks: np.ndarray, name_lines: bool = False) -> None:
        self.gallery, self.looks, self.name_lines = gallery, looks, name_lines
        self.defective = np.array([bool(d) for d in gallery.defects])
        self.confidence = {
            source: Confidence(map_statistics(gallery.patches(slice(None), number)), self.defective)
            for number, source in enumerate(self.SOURCES)
        }

    def seen(self, index: np.ndarray, source: str) -> Seen:
        """Inputs of these entries with their maps of ``source``, as in the runtime."""
        number = self.SOURCES.index(source)
        embedding = torch.from_numpy(self.gallery.embedding[index].astype(np.float32))
        figures = torch.from_numpy(self.gallery.figures[index, number])
        looks = torch.from_numpy(self.looks[index, number])
        return Seen(self.gallery.maps(index, number), embedding, figures, looks)

    def draw(self, index: int, rng: Generator) -> tuple[Seen, str, str, bool | None]:
        """One part with a random one of its maps, its confidence answer, and the shade and line that the picture
        network recognises."""
        source = str(rng.choice(self.SOURCES, p=SHARES))
        seen = self.seen(np.array([index]), source)
        if source != "zero":
            seen = seen._replace(maps=seen.maps * float(rng.uniform(0.96, 1.04)))
        patches = self.gallery.patches(index, self.SOURCES.index(source))
        looks = seen.looks[0]
        return seen, self.confidence[source].sentence(patches), shade_seen(looks), self.line(looks)

    def line(self, looks: Tensor) -> bool | None:
        """The argument ``line`` of ``look_answer`` for these logits [len(LOOKS)]."""
        return line_seen(looks) if self.name_lines else None


CELL_TRUTHS = ("defect", "line", "over 1 percent")


def cell_truths(defects: list[Defect]) -> np.ndarray:
    """float32 [9, 3]: ``CELL_TRUTHS`` of the most visible defect whose centre lies in each cell; 0 without a defect."""
    truths = np.zeros((9, len(CELL_TRUTHS)), np.float32)
    for d in sorted(defects, key=lambda d: d.contrast * d.area**0.5):
        truths[place_number(*d.center)] = (True, is_line(d), d.area > SIZES[0][0])
    return truths


class CellHead(nn.Module):
    """Predicts the content of each cell from the prompt embeddings. It is not shipped: its loss trains the prompt
    learner's convolutions.

    Every cell is predicted from all nine rows: the receptive fields of the rows overlap, and they do not coincide with
    the cells.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(9 * width, 9 * len(CELL_TRUTHS))
        nn.init.zeros_(
            self.linear.weight
        )  # random weights would give the convolutions meaningless gradients at first

    def forward(self, prompts: Tensor) -> Tensor:
        """[B, 18, D] → logits [B, 9, 3]."""
        return self.linear(prompts[:, NUM_BASE_PROMPTS:].flatten(1)).unflatten(1, (9, -1))


class Batch(NamedTuple):
    seen: Seen
    ids: Tensor  # [B · N, L] token ids of N dialogues about each part
    labels: Tensor  # [B · N, L], IGNORE outside answers
    truths: Tensor  # [B, 9, 3] of ``cell_truths``

    def to(self, device: str) -> Batch:
        return Batch(
            self.seen.to(device), self.ids.to(device), self.labels.to(device), self.truths.to(device)
        )


def look_odds(
    defects: list[list[Defect]], shades: list[str], lines: Sequence[bool | None] | None = None
) -> np.ndarray:
    """Sampling probabilities [N] of parts with these defects, recognised shades and lines, proportional to
    1 / √(number of parts with the same look answer). With equal ones, the language model would learn to answer
    "a spot" always."""
    lines = [None] * len(defects) if lines is None else lines
    answers = [look_answer(*each) for each in zip(defects, shades, lines, strict=True)]
    looks, number = np.unique(answers, return_inverse=True)
    odds = np.bincount(number, minlength=len(looks))[number] ** -0.5
    return odds / odds.sum()


def draw_batch(
    maps: Maps,
    good: np.ndarray,
    bad: np.ndarray,
    odds: np.ndarray,
    vocabulary: Vocabulary,
    rng: Generator,
    size: int,
    dialogues: int,
) -> Batch:
    """``size`` parts, half of them defective (drawn with the probabilities ``odds``), mirrored at random.

    Args:
        maps: the gallery's maps.
        good: entries of good parts.
        bad: entries of defective parts.
        odds: probabilities of ``bad``.
        vocabulary: the tokenizer.
        rng: generator of everything.
        size: number of parts.
        dialogues: number of dialogues about each part.
    """
    gallery = maps.gallery
    chosen = np.concatenate([rng.choice(good, size - size // 2), rng.choice(bad, size // 2, p=odds)])
    shown, rows, truths = [], [], []
    for index in chosen.tolist():
        left_right, up_down = bool(rng.integers(2)), bool(rng.integers(2))
        flips = [axis for axis, flip in ((-2, up_down), (-1, left_right)) if flip]
        drawn, confidence, shade, line = maps.draw(index, rng)
        shown.append(drawn._replace(maps=drawn.maps.flip(flips)))  # figures and looks do not change
        defects = mirror_defects(gallery.defects[index], left_right, up_down)
        truths.append(cell_truths(defects))
        rows += [
            vocabulary.turns(dialogue(rng, defects, gallery.kinds[index], confidence, shade, line))
            for _ in range(dialogues)
        ]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in rows])
    labels = torch.tensor([lab + [IGNORE] * (length - len(lab)) for _, lab in rows])
    seen = Seen(*map(torch.cat, zip(*shown, strict=True)))
    return Batch(seen, ids, labels, torch.from_numpy(np.stack(truths)))


def inject(model: AnomalyGPT, seen: Seen) -> tuple[Tensor, Tensor]:
    """Image embeddings [B, D] and prompt embeddings [B, 18, D] of the language model's prompt."""
    return model.llama_proj(seen.embedding), model.prompt_learner.read(seen.maps, seen.figures, seen.looks)


def language_loss(
    model: AnomalyGPT, vocabulary: Vocabulary, cell_head: CellHead, batch: Batch
) -> tuple[Tensor, dict[str, float]]:
    """Weighted mean cross-entropy of the answers' tokens, with a higher weight for verdicts and shades, plus the loss
    of the cell head: with the answers alone, the convolutions learn too slowly.

    Returns:
        The loss, and its parts for the log.
    """
    embedding, prompts = inject(model, batch.seen)
    # The prompt learner takes longer than the language model, so it runs once per part for all dialogues.
    times = len(batch.ids) // len(prompts)
    repeated = (embedding.repeat_interleave(times, dim=0), prompts.repeat_interleave(times, dim=0))
    logits = _logits(model, vocabulary, repeated, batch.ids)
    first = logits.shape[1] - batch.ids.shape[1] - 1  # the position that predicts ids[:, 0]
    flat = batch.labels.flatten()
    token_losses = F.cross_entropy(
        logits[:, first:-1].flatten(0, 1), flat, ignore_index=IGNORE, reduction="none"
    )
    shades = torch.isin(flat, torch.tensor(vocabulary.shades, device=flat.device))
    decisive = shades | (flat == vocabulary.affirmative) | (flat == vocabulary.negative)
    weight = torch.where(decisive, VERDICT_WEIGHT, 1.0) * (flat != IGNORE)
    answers = (token_losses * weight).sum() / weight.sum()
    predicted = cell_head(prompts)
    known = batch.truths[..., :1].expand_as(predicted).clone()
    known[..., 0] = 1  # a cell without a defect has only the truth "defect"
    losses = F.binary_cross_entropy_with_logits(predicted, batch.truths, reduction="none") * known
    cells = (losses.sum(dim=(0, 1)) / known.sum(dim=(0, 1)).clamp(min=1)).mean()
    loss = answers + CELL_WEIGHT * cells
    shade_loss = token_losses[shades].mean().nan_to_num()
    return loss, {"answers": answers.item(), "cells": cells.item(), "shades": shade_loss.item()}


def _logits(
    model: AnomalyGPT, vocabulary: Vocabulary, injected: tuple[Tensor, Tensor], ids: Tensor
) -> Tensor:
    pieces = (
        torch.tensor(vocabulary.before, device=ids.device),
        torch.tensor(vocabulary.after, device=ids.device),
        ids,
    )
    return model.llama(assemble_prompt(model.llama, pieces, *injected))


@torch.no_grad()
def generate(
    model: AnomalyGPT,
    vocabulary: Vocabulary,
    seen: Seen,
    question: str,
    before: Sequence[tuple[str, str]] = (),
    max_tokens: int = 40,
) -> tuple[list[str], Tensor]:
    """Greedy answers to a question about B parts, and p(anomaly) [B] of the first answer token; ``before`` is the
    dialogue so far."""
    injected = inject(model, seen)
    asked = vocabulary.asked(question, before)
    ids = torch.tensor([asked] * len(seen.maps), device=seen.maps.device)
    start = ids.shape[1]
    p_anomaly = torch.zeros(len(ids))
    for step in range(max_tokens):
        last = _logits(model, vocabulary, injected, ids)[:, -1]
        if step == 0:
            p_anomaly = last[:, [vocabulary.negative, vocabulary.affirmative]].softmax(dim=1)[:, 1]
        ids = torch.cat([ids, last.argmax(dim=1, keepdim=True)], dim=1)
        if bool((ids[:, start:] == vocabulary.stop).any(dim=1).all()):
            break
    texts = []
    for row in ids[:, start:].tolist():
        kept = row[: row.index(vocabulary.stop)] if vocabulary.stop in row else row
        texts.append(vocabulary.tokenizer.decode(kept).strip())
    return texts, p_anomaly


@dataclass
class ValidationFamily:
    """The language model's inputs for one family's queries, and the truth."""

    sources: dict[str, Seen]  # of the maps: "one_shot", "zero_shot", with or without "few_shot"
    defects: list[list[Defect]]
    kind: str
    seed: int
    name_lines: bool = False  # see ``Maps``

    @property
    def defective(self) -> np.ndarray:
        return np.array([bool(d) for d in self.defects])


@torch.no_grad()
def encode_validation(
    vision: NanoVision,
    look: LookNet,
    augmentation: Augmentation = "none",
    num_families: int = 35,
    num_queries: int = 4,
) -> list[ValidationFamily]:
    """Encode the validation families: for each, one normal sample, and good and defective queries."""
    text = vision.text_features()[0]
    shown = []
    for family in validation_families(num_families):
        reference, good, bad = fixed_samples(family, 1, num_queries, num_queries)
        pixels = normalise(np.stack([s.pixels for s in reference + good + bad]))
        images = torch.from_numpy(pixels).to(text.device)
        vectors, taps = vision.encoder(images)
        augmented = augment(pixels[:1], augmentation, vision.encoder.config.grid)
        known = [vision.encoder(torch.from_numpy(version).to(text.device))[1] for version, _ in augmented]
        bank = make_bank(known, vision.encoder.config.tokens**2).expand(len(taps) - 1, -1, -1, -1)
        maps = upsample_map(few_shot_distance(taps[1:], bank)), vision.decoder(taps[1:], text)
        sources = {
            name: Seen(each, vectors[1:], evidence_of(each, shots), look(images[1:], each))
            for name, each, shots in zip(("one_shot", "zero_shot"), maps, (1, 0), strict=True)
        }
        defects = [s.defects for s in good + bad]
        shown.append(ValidationFamily(sources, defects, family.kind, family.seed))
    return shown


@torch.no_grad()
def evaluate_language(
    model: AnomalyGPT, vocabulary: Vocabulary, shown: list[ValidationFamily]
) -> dict[str, float]:
    """Share of right answers on validation products.

    Of all parts: verdicts with one normal sample, with none, with few if there are such maps, and with another part's
    map; the mean over families of the image AUROC of p(anomaly), and the expected calibration error over all. Of parts
    with one defect and verdict FAIL: the place in the verdict's sentence, and with one normal sample the answers to
    follow-up questions of every kind (shade: how often one is named, and how often that is right), and refusals of
    questions that no picture answers and that are not in the training set.
    """
    figures: dict[str, list[float]] = {}
    probabilities: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for family in shown:
        truth, rng = family.defective, default_rng(family.seed)
        one_shot = family.sources["one_shot"]
        shuffled = one_shot.at(torch.from_numpy(rng.permutation(len(truth))))
        for name, seen in {**family.sources, "shuffled": shuffled}.items():
            texts, p = generate(model, vocabulary, seen, DEFAULT_QUESTION)
            failed = np.array([t.startswith(AFFIRMATIVE) for t in texts])
            figures.setdefault(f"{name}_accuracy", []).append(float((failed == truth).mean()))
            if name == "shuffled":
                continue
            probabilities.setdefault(name, []).append((p.cpu().numpy(), truth))
            area = auroc(truth, p.cpu().numpy())
            if area is not None:
                figures.setdefault(f"{name}_auroc", []).append(area)
            found = [i for i, d in enumerate(family.defects) if len(d) == 1 and failed[i]]
            right_places = [float(texts[i] == answer(places(family.defects[i]))) for i in found]
            figures.setdefault(f"{name}_place", []).extend(right_places)
            if name == "one_shot":
                verdicts, caught = texts, found
        for i in caught:
            worst = family.defects[i][0]
            line = is_line(worst) if family.name_lines else None
            asked = follow_ups(rng, family.defects[i], family.kind, "", shade_of(worst), line)
            right = {k: asked[k] for k in ("place", "count", "size", "look", "shade", "kind")}
            right["refusal"] = (str(rng.choice(UNKNOWABLE_UNSEEN)), CANNOT_KNOW)
            part, before = one_shot.at(slice(i, i + 1)), [(DEFAULT_QUESTION, verdicts[i])]
            for name, (question, reply) in right.items():
                texts, _ = generate(model, vocabulary, part, question, before)
                if name == "look":  # only the form counts: another question asks for the shade
                    texts[0], reply = texts[0].split(" ")[-1], reply.split(" ")[-1]
                if name == "shade":
                    figures.setdefault("shade_said", []).append(float(texts[0] != CANNOT_KNOW))
                    if texts[0] == CANNOT_KNOW:
                        continue
                figures.setdefault(name, []).append(float(texts[0] == reply))
    errors = {
        f"{name}_calibration": calibration_error(*map(np.concatenate, zip(*pairs, strict=True)))
        for name, pairs in probabilities.items()
    }
    return {name: float(np.mean(values)) for name, values in figures.items() if values} | errors


def calibration_error(p: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error of p(anomaly) [N] in ``BINS`` bins of equal width (Naeini et al., AAAI 2015)."""
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    members = [bins == number for number in range(BINS) if (bins == number).any()]
    return float(sum(m.mean() * abs(p[m].mean() - truth[m].mean()) for m in members))


@torch.no_grad()
def calibrate(model: AnomalyGPT, vocabulary: Vocabulary, maps: Maps, parts: np.ndarray) -> float:
    """Scale the language model's head so that p(anomaly) is calibrated; greedy answers do not change.

    Args:
        model: changed in place.
        vocabulary: the tokenizer.
        maps: the gallery's maps. Only those with normal samples are used: zero-shot maps are less reliable and would
            make p(anomaly) of the others too cautious.
        parts: gallery entries of families that the language model was not trained on.

    Returns:
        The temperature that the logits are divided by (Guo et al., ICML 2017).
    """
    asked = vocabulary.asked(DEFAULT_QUESTION)
    device = next(model.parameters()).device
    margins = []
    for source in FEW_SHOT:
        for start in range(0, len(parts), 64):
            seen = maps.seen(parts[start : start + 64], source).to(device)
            ids = torch.tensor([asked] * len(seen.maps), device=device)
            last = _logits(model, vocabulary, inject(model, seen), ids)[:, -1]
            margins.append((last[:, vocabulary.affirmative] - last[:, vocabulary.negative]).cpu())
    margin = torch.cat(margins)
    defective = torch.from_numpy(np.tile(maps.defective[parts], len(FEW_SHOT)))
    # good and defective parts have the same total weight, as the defect rate of a line is unknown
    weight = torch.where(defective, 0.5 / defective.float().mean(), 0.5 / (~defective).float().mean())
    temperatures = torch.exp(torch.linspace(math.log(0.5), math.log(6), 60))
    losses = [
        F.binary_cross_entropy_with_logits(margin / t, defective.float(), weight).item() for t in temperatures
    ]
    temperature = float(temperatures[int(np.argmin(losses))])
    model.llama.lm_head.weight.div_(temperature)
    return temperature


def train_language(
    recipe: LanguageRecipe,
    model: AnomalyGPT,
    shown: list[ValidationFamily],
    maps: Maps,
    vocabulary: Vocabulary,
    folder: Path,
    device: str,
) -> AnomalyGPT:
    """Train the second half, or continue its training, and return the averaged model.

    Args:
        recipe: the settings.
        model: the initial model; encoder, image decoder and picture network stay frozen.
        shown: the validation families.
        maps: the gallery's maps.
        vocabulary: the tokenizer.
        folder: for ``language.pt`` (state to continue from) and ``language.jsonl`` (training curve).
        device: "cpu" or "cuda".
    """
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
    kept = gallery.trained  # the families of the other entries are for calibration
    bad = np.array([i for i, d in enumerate(gallery.defects[:kept]) if d])
    good = np.array([i for i, d in enumerate(gallery.defects[:kept]) if not d])
    looks = [torch.from_numpy(maps.looks[i, 0]) for i in bad]
    recognised = [shade_seen(each) for each in looks], [maps.line(each) for each in looks]
    odds = look_odds([gallery.defects[i] for i in bad], *recognised)
    began = time.monotonic()
    with open(folder / "language.jsonl", "a", encoding="utf-8") as log:
        for step in range(start, recipe.language_steps):
            rng = default_rng([recipe.seed, 3, step])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, recipe.language_steps, recipe.warmup_steps, recipe.language_lr
                )
            batch = draw_batch(
                maps, good, bad, odds, vocabulary, rng, recipe.language_batch, recipe.dialogues
            )
            loss, parts = language_loss(model, vocabulary, cell_head, batch.to(device))
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
                log_record(log, {"step": done, **evaluate_language(average, vocabulary, shown)})
                state = {"model": model.state_dict(), "average": average.state_dict()}
                state["cell_head"] = cell_head.state_dict()
                save_atomically({**state, "optimizer": optimizer.state_dict(), "step": done}, state_file)
        temperature = calibrate(average, vocabulary, maps, np.arange(kept, len(gallery.defects)))
        log_record(log, {"step": recipe.language_steps, "temperature": temperature})
    return average
