"""The frozen encoder's results on generated parts, stored on disk: the second half of the training uses these maps."""

from __future__ import annotations

import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ...runtime.bundles.bundle import Augmentation
from ...runtime.synthetic.data import normalise
from ...runtime.synthetic.defects import Defect
from ...runtime.vision.augment import augment
from ...runtime.vision.subsample import cover
from ..anomalygpt import few_shot_distance, upsample_map
from ..evidence import evidence
from ..image_decoder import ImageDecoder
from ..imagebind import VisionEncoder
from .dialogues import CONFIDENCE_ANSWERS
from .pool import GROUP, NORMALS, Pool

ENTRIES = GROUP - NORMALS  # per group: its queries
SHOTS = (1, NORMALS)  # normal samples in the banks
SHARES = (0.4, 0.3, 0.3)  # probabilities in training of a map with one normal sample, with few, with none
ARRAYS = ("embedding", "few_shot", "margins", "figures")  # of a gallery, first axis N


@dataclass
class Gallery:
    """Image embeddings and patch maps of N parts.

    Attributes:
        embedding: float16 [N, E].
        few_shot: float16 [N, 2, grid²], distances to ``SHOTS`` normal samples.
        margins: float16 [N, 4, grid²], zero-shot logit differences of each tap.
        figures: float32 [N, 3, F], features of ``evidence`` of each of these maps, the zero-shot map's last.
        defects: of each part.
        kinds: product kind of each part.
    """

    embedding: NDArray[np.float16]
    few_shot: NDArray[np.float16]
    margins: NDArray[np.float16]
    figures: NDArray[np.float32]
    defects: list[list[Defect]]
    kinds: list[str]
    entries: ClassVar[int] = ENTRIES  # of each product

    @staticmethod
    def as_read(maps: torch.Tensor) -> torch.Tensor:
        """Maps as the prompt learner's networks read them."""
        return maps

    def patches(self, index: int | slice | NDArray[np.intp], source: int) -> NDArray[np.float32]:
        """Patch maps float32 [..., grid²], for ``map_statistics``; the zero-shot map is an approximation (mean before
        upsampling)."""
        if source == len(SHOTS):
            patches = (1 / (1 + np.exp(-self.margins[index].astype(np.float32)))).mean(axis=-2)
        else:
            patches = self.few_shot[index, source].astype(np.float32)
        return self.as_read(torch.from_numpy(patches)).numpy()

    @property
    def trained(self) -> int:
        """Number of entries to train on; the last tenth of the families is for evaluation."""
        return len(self.defects) // self.entries * 9 // 10 * self.entries

    def maps(self, entries: NDArray[np.intp], source: int) -> torch.Tensor:
        """Maps float32 [B, 224, 224] for the prompt learner's networks, computed as in the runtime; ``source`` is an
        index of ``SHOTS``, or ``len(SHOTS)`` for the zero-shot map."""
        if source == len(SHOTS):
            return self.as_read(zero_shot_map(torch.from_numpy(self.margins[entries].astype(np.float32))))
        return self.as_read(upsample_map(torch.from_numpy(self.few_shot[entries, source].astype(np.float32))))

    def save(self, path: Path) -> None:
        notes = json.dumps(
            {
                "kinds": self.kinds,
                "defects": [[asdict(d) for d in ds] for ds in self.defects],
            }
        )
        temporary = path.with_suffix(".tmp.npz")
        np.savez(
            temporary,
            notes=np.frombuffer(notes.encode(), np.uint8),
            **{name: getattr(self, name) for name in ARRAYS},
        )
        temporary.replace(path)

    @classmethod
    def joined(cls, parts: list[Gallery]) -> Gallery:
        """A gallery of all parts' entries, in order."""
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
        defects = list(itertools.chain.from_iterable(part.defects for part in parts))
        kinds = list(itertools.chain.from_iterable(part.kinds for part in parts))
        return cls(**arrays, defects=defects, kinds=kinds)

    @classmethod
    def load(cls, path: Path) -> Gallery:
        with np.load(path, allow_pickle=False) as file:
            notes = json.loads(file["notes"].tobytes())
            defects = [[Defect(**{**d, "center": tuple(d["center"])}) for d in ds] for ds in notes["defects"]]
            arrays = {name: file[name] for name in ARRAYS}
            return cls(**arrays, defects=defects, kinds=notes["kinds"])


def zero_shot_map(margins: torch.Tensor) -> torch.Tensor:
    """Result of ``zero_shot_margins`` [B, 4, P] → the map [B, S, S], computed as in ``ImageDecoder``."""
    return upsample_map(margins.flatten(0, 1)).sigmoid().unflatten(0, margins.shape[:2]).mean(dim=1)


def zero_shot_margins(decoder: ImageDecoder, taps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Patch features [B, 4, P, V] and text features [2, E] → abnormal minus normal logit [B, 4, P]."""
    logits = decoder.patch_logits(taps, text)
    return logits[..., 1] - logits[..., 0]


def make_bank(known: list[torch.Tensor], distinct: int) -> torch.Tensor:
    """A memory bank with the same rows as the runtime's ``MemoryBank``.

    Args:
        known: patch features [K, T, P, V] of K normal samples, and of each of their augmented versions.
        distinct: number of patches of an image that do not overlap.

    Returns:
        Unit-norm rows [T, K · distinct, V].
    """
    taps, width = known[0].shape[1], known[0].shape[-1]
    rows = F.normalize(torch.stack(known, dim=1), dim=-1)  # [K, versions, T, P, V]
    rows = rows.permute(2, 0, 1, 3, 4).reshape(taps, -1, width)
    size = known[0].shape[0] * distinct
    if size == rows.shape[1]:
        return rows
    chosen = torch.from_numpy(cover(rows.cpu().numpy(), size)).long().to(rows.device)
    return rows.gather(1, chosen[..., None].expand(-1, -1, width))


def build_gallery(
    encoder: VisionEncoder,
    decoder: ImageDecoder,
    text: torch.Tensor,
    pool: Pool,
    augmentation: Augmentation = "none",
    workers: int = 1,
) -> Gallery:
    """Encode a pool that the encoder was not trained on; the entries of a group are consecutive.

    Args:
        encoder: frozen.
        decoder: frozen.
        text: [2, E], the text features of class "object".
        pool: the generated parts.
        augmentation: of the normal samples in the banks.
        workers: number of processes; on a GPU only one is used.
    """
    show = partial(_show_groups, encoder, decoder, text, pool.folder, pool.num_groups, augmentation)
    if workers < 2 or text.device.type != "cpu":
        return show(range(pool.num_groups))
    edges = np.linspace(0, pool.num_groups, workers + 1).astype(int).tolist()
    shares = [range(first, end) for first, end in itertools.pairwise(edges)]
    # not forked: torch's threads do not exist in a forked process
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as processes:
        return Gallery.joined(list(processes.map(show, shares)))


@torch.no_grad()
def _show_groups(
    encoder: VisionEncoder,
    decoder: ImageDecoder,
    text: torch.Tensor,
    folder: Path,
    num_groups: int,
    augmentation: Augmentation,
    numbers: range,
) -> Gallery:
    """The gallery of these groups of the pool in ``folder``."""
    pool, device = Pool(folder, num_groups), text.device
    embedding, few_shot, margins, figures = [], [], [], []
    defects: list[list[Defect]] = []
    kinds: list[str] = []
    began = time.monotonic()
    for done, number in enumerate(numbers, 1):
        group = pool[number]
        pixels = normalise(group.pixels)
        vectors, taps = encoder(torch.from_numpy(pixels).to(device))
        vectors, shown = vectors[-ENTRIES:], taps[-ENTRIES:]
        augmented = augment(pixels[:NORMALS], augmentation, encoder.config.grid)[1:]
        known = [
            taps[:NORMALS],
            *(encoder(torch.from_numpy(version).to(device))[1] for version, _ in augmented),
        ]
        banks = (make_bank([each[:count] for each in known], encoder.config.tokens**2) for count in SHOTS)
        distances = [few_shot_distance(shown, bank.expand(ENTRIES, -1, -1, -1)) for bank in banks]
        embedding.append(vectors.half().cpu().numpy())
        few_shot.append(torch.stack(distances, dim=1).half().cpu().numpy())
        margin = zero_shot_margins(decoder, shown, text)
        maps = [*map(upsample_map, distances), zero_shot_map(margin)]
        found = [evidence_of(*each) for each in zip(maps, (*SHOTS, 0), strict=True)]
        figures.append(torch.stack(found, dim=1).cpu().numpy())
        margins.append(margin.half().cpu().numpy())
        defects += group.defects[-ENTRIES:]
        kinds += [group.kind] * ENTRIES
        if done % 250 == 0:
            left = (time.monotonic() - began) / done * (len(numbers) - done) / 60
            print(f"gallery {done}/{len(numbers)} groups, {left:.1f} minutes left", flush=True)
    return Gallery(
        np.concatenate(embedding),
        np.concatenate(few_shot),
        np.concatenate(margins),
        np.concatenate(figures),
        defects,
        kinds,
    )


def evidence_of(maps: torch.Tensor, num_samples: int) -> torch.Tensor:
    """``evidence`` [B, F] of maps [B, S, S] that all have ``num_samples`` normal samples."""
    return evidence(maps, torch.full((len(maps),), float(num_samples), device=maps.device))


class Confidence:
    """How clearly a map separates good from defective parts: a logistic regression on its largest values. It provides
    training answers for the language model; verdicts do not use it.

    Args:
        statistics: of the maps, float [N, 3], see ``map_statistics``.
        defective: bool [N].
    """

    LIMITS = (0.92, 0.75)  # smallest probability of the likelier verdict for "sure" and for "fairly sure"

    def __init__(self, statistics: NDArray[np.float64], defective: NDArray[np.bool_]) -> None:
        self.mean, self.deviation = statistics.mean(axis=0), statistics.std(axis=0) + 1e-6
        x = self._features(statistics)
        self.weights = np.zeros(x.shape[1])
        for _ in range(30):  # Newton's method, slightly regularised
            p = 1 / (1 + np.exp(-x @ self.weights))
            gradient = x.T @ (p - defective) + 1e-3 * self.weights
            curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(x.shape[1])
            self.weights -= np.linalg.solve(curvature, gradient)

    def _features(self, statistics: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = (statistics - self.mean) / self.deviation
        return np.concatenate([scaled, scaled**2, np.ones((*scaled.shape[:-1], 1))], axis=-1)

    def sentence(self, patch_map: NDArray) -> str:
        """The answer to "How sure are you?" for a map [P]."""
        p = 1 / (1 + np.exp(-self._features(map_statistics(patch_map)[None])[0] @ self.weights))
        return CONFIDENCE_ANSWERS[sum(max(p, 1 - p) < limit for limit in self.LIMITS)]


def region_level(gallery: Gallery) -> float:
    """The map level from which on a pixel belongs to a region.

    It is chosen by the peaks of maps with one normal sample: the level with the largest sum of sensitivity and
    specificity (Youden, Cancer 1950), where a region on a good part and no region on a defective part count the same.
    Of the levels within 0.01 of the best sum, the lowest is returned: it gives regions on the most defective parts.
    """
    peaks = gallery.few_shot[:, 0].astype(np.float64).max(axis=-1)
    defective = np.array([bool(d) for d in gallery.defects])
    levels = np.quantile(peaks, np.linspace(0.01, 0.99, 99))
    right = np.array([(peaks[defective] >= x).mean() + (peaks[~defective] < x).mean() for x in levels])
    return float(levels[int(np.argmax(right >= right.max() - 0.01))])


def map_statistics(patch_map: NDArray) -> NDArray[np.float64]:
    """Map [..., P] → its largest value, the mean of its largest three, and its median: [..., 3]."""
    ordered = np.sort(patch_map.astype(np.float64), axis=-1)
    return np.stack([ordered[..., -1], ordered[..., -3:].mean(axis=-1), np.median(ordered, axis=-1)], axis=-1)
