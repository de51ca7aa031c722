"""Second half of nano's training: prompt learner, projection and language model, on the frozen encoder's maps.

As in AnomalyGPT, the words must come through the 18 prompt embeddings: the image embedding carries what the product
is, the map what is wrong with it.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from numpy.random import Generator, default_rng
from torch import Tensor, nn

from ..anomalygpt import AnomalyGPT, assemble_prompt, few_shot_distance, upsample_map
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
)
from .config import Recipe
from .data import held_out_families, held_out_samples, mirror_defects, normalise
from .gallery import NO_MAP, Gallery
from .train_vision import NanoVision, learning_rate, log_record, save_atomically, update_average
from .words import dialogue, places

IGNORE = -100
VERDICT_WEIGHT = 4.0  # the first answer token decides, one of some twenty


class Vocabulary:
    """The fixed prompt pieces as token ids."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
        self.tokenizer = tokenizer
        self.before = [tokenizer.bos_id(), *tokenizer.encode(PIECE_BEFORE_IMAGE)]
        self.after = tokenizer.encode(PIECE_AFTER_IMAGE)
        self.stop = tokenizer.piece_to_id(STOP_PIECE)
        self.affirmative = tokenizer.encode(AFFIRMATIVE)[0]
        self.negative = tokenizer.encode(NEGATIVE)[0]

    def turns(self, dialogue: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
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


def draw_map(gallery: Gallery, index: int, rng: Generator) -> Tensor:
    """One of the part's maps [224, 224]: two normal samples, one, or none (zero-shot)."""
    source = rng.choice(["two", "one", "zero"], p=[0.35, 0.4, 0.25])
    if source == "zero":
        margins = torch.from_numpy(gallery.margins[index].astype(np.float32))
        return upsample_map(margins).sigmoid().mean(dim=0)
    row = 1 if source == "two" and gallery.few_shot[index, 1, 0] != NO_MAP else 0
    distance = torch.from_numpy(gallery.few_shot[index, row].astype(np.float32)) * float(
        rng.uniform(0.92, 1.08)
    )
    return upsample_map(distance[None])[0]


def draw_batch(
    gallery: Gallery, good: np.ndarray, bad: np.ndarray, words: Vocabulary, rng: Generator, size: int
):
    """Maps [B, 224, 224], image embeddings [B, E], token ids [B, L] and labels [B, L]; half the parts defective."""
    chosen = np.concatenate([rng.choice(good, size - size // 2), rng.choice(bad, size // 2)])
    maps, rows = [], []
    for index in chosen:
        left_right, up_down = bool(rng.integers(2)), bool(rng.integers(2))
        flips = [axis for axis, flip in ((0, up_down), (1, left_right)) if flip]
        maps.append(draw_map(gallery, index, rng).flip(flips))
        defects = mirror_defects(gallery.defects[index], left_right, up_down)
        rows.append(words.turns(dialogue(rng, defects, gallery.kinds[index])))
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([i + [0] * (length - len(i)) for i, _ in rows])
    labels = torch.tensor([lab + [IGNORE] * (length - len(lab)) for _, lab in rows])
    return torch.stack(maps), torch.from_numpy(gallery.embedding[chosen].astype(np.float32)), ids, labels


def language_loss(
    model: AnomalyGPT, words: Vocabulary, maps: Tensor, embedding: Tensor, ids: Tensor, labels: Tensor
) -> Tensor:
    """Mean cross-entropy of the answers' tokens, the verdict's weighted up."""
    logits = _logits(model, words, maps, embedding, ids)
    first = logits.shape[1] - ids.shape[1] - 1  # the position that predicts ids[:, 0]
    predicted = logits[:, first:-1].flatten(0, 1)
    losses = F.cross_entropy(predicted, labels.flatten(), ignore_index=IGNORE, reduction="none")
    flat = labels.flatten()
    verdict = (flat == words.affirmative) | (flat == words.negative)
    weight = torch.where(verdict, VERDICT_WEIGHT, 1.0) * (flat != IGNORE)
    return (losses * weight).sum() / weight.sum()


def _logits(model: AnomalyGPT, words: Vocabulary, maps: Tensor, embedding: Tensor, ids: Tensor) -> Tensor:
    pieces = (
        torch.tensor(words.before, device=ids.device),
        torch.tensor(words.after, device=ids.device),
        ids,
    )
    prompt = assemble_prompt(model.llama, pieces, model.llama_proj(embedding), model.prompt_learner(maps))
    return model.llama(prompt)


@torch.no_grad()
def generate(
    model: AnomalyGPT, words: Vocabulary, maps: Tensor, embedding: Tensor, question: str, max_tokens: int = 40
) -> tuple[list[str], Tensor]:
    """Greedy answers and p(anomaly) [B] of the first answer token."""
    ids = torch.tensor([words.tokenizer.encode(question + PIECE_ASSISTANT)] * len(maps), device=maps.device)
    start = ids.shape[1]
    p_anomaly = torch.zeros(len(maps))
    for step in range(max_tokens):
        last = _logits(model, words, maps, embedding, ids)[:, -1]
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


@torch.no_grad()
def evaluate_language(
    model: AnomalyGPT, vision: NanoVision, words: Vocabulary, num_families: int = 22, num_queries: int = 4
) -> dict[str, float]:
    """Verdict accuracy, named place (one defect, said Yes) and shuffled-prompt accuracy on held-out products."""
    text = vision.text_features()[0]
    figures: dict[str, list[float]] = {"place": []}
    for family in held_out_families(num_families):
        reference, good, bad = held_out_samples(family, 1, num_queries, num_queries)
        pixels = normalise(np.stack([s.pixels for s in reference + good + bad]))
        vectors, taps = vision.encoder(torch.from_numpy(pixels).to(text.device))
        one_shot = upsample_map(few_shot_distance(taps[1:], taps[:1].expand(len(taps) - 1, -1, -1, -1)))
        zero = vision.decoder(taps[1:], text)
        truth = np.array([0] * len(good) + [1] * len(bad))
        shuffled = one_shot[torch.from_numpy(default_rng(family.seed).permutation(len(truth)))]
        for name, maps in (("one_shot", one_shot), ("zero_shot", zero), ("shuffled", shuffled)):
            texts, _ = generate(model, words, maps, vectors[1:], DEFAULT_QUESTION)
            said = np.array([t.startswith(AFFIRMATIVE) for t in texts])
            figures.setdefault(f"{name}_accuracy", []).append(float((said == truth).mean()))
            if name == "one_shot":
                for sample, sentence in zip(bad, texts[len(good) :], strict=True):
                    if len(sample.defects) == 1 and sentence.startswith(AFFIRMATIVE):
                        figures["place"].append(float(sentence == answer(places(sample.defects))))
    return {name: float(np.mean(values)) for name, values in figures.items() if values}


def train_language(
    recipe: Recipe,
    model: AnomalyGPT,
    vision: NanoVision,
    gallery: Gallery,
    words: Vocabulary,
    folder: Path,
    device: str,
) -> AnomalyGPT:
    """Train (or resume) and return the averaged model; ``language.pt`` and ``language.jsonl`` as for the vision."""
    state_file = folder / "language.pt"
    torch.manual_seed(recipe.seed + 1)
    model.to(device)
    for module in (model.encoder, model.image_decoder):
        module.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.language_lr, weight_decay=0.01, betas=(0.9, 0.98))
    start = 0
    average = copy.deepcopy(model)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    bad = np.array([i for i, d in enumerate(gallery.defects) if d])
    good = np.array([i for i, d in enumerate(gallery.defects) if not d])
    began = time.monotonic()
    with open(folder / "language.jsonl", "a", encoding="utf-8") as log:
        for step in range(start, recipe.language_steps):
            rng = default_rng([recipe.seed, 3, step])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, recipe.language_steps, recipe.warmup_steps, recipe.language_lr
                )
            batch = [t.to(device) for t in draw_batch(gallery, good, bad, words, rng, recipe.language_batch)]
            loss = language_loss(model, words, *batch)
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
                    {"step": done, "loss": loss.item(), "s_per_step": round(pace, 3), "minutes_left": left},
                )
            if done % recipe.evaluate_every == 0 or done == recipe.language_steps:
                log_record(log, {"step": done, **evaluate_language(average, vision, words)})
                state = {"model": model.state_dict(), "average": average.state_dict()}
                save_atomically({**state, "optimizer": optimizer.state_dict(), "step": done}, state_file)
    return average
