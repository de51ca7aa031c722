"""What the frozen encoder makes of generated parts, kept on disk: the second half trains on these maps."""

from __future__ import annotations

import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

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
from .pool import GROUP, NORMALS, Pool
from .words import SURENESS

ENTRIES = GROUP - NORMALS  # of a group: its queries
SHOTS = (1, NORMALS)  # normal samples in the banks
SHARES = (0.4, 0.3, 0.3)  # of the trainings' draws: maps with one normal sample, with few, with none
ARRAYS = ("embedding", "few_shot", "margins", "figures")  # of a gallery, first axis N


@dataclass
class Gallery:
    """N parts: their image embedding and their maps in patches.

    ``embedding`` f16 [N, E]; ``few_shot`` f16 [N, 2, grid²]: distances to as many good parts as ``SHOTS`` says;
    ``margins`` f16 [N, 4, grid²]: zero-shot logit differences per tap; ``figures`` f32 [N, 3, F]: the evidence of
    each of these maps, the zero-shot one's last.
    """

    embedding: NDArray[np.float16]
    few_shot: NDArray[np.float16]
    margins: NDArray[np.float16]
    figures: NDArray[np.float32]
    defects: list[list[Defect]]
    kinds: list[str]

    @property
    def trained(self) -> int:
        """Entries before this one are trained on; the last tenth's families are to measure with."""
        return len(self.defects) // ENTRIES * 9 // 10 * ENTRIES

    def maps(self, entries: NDArray[np.intp], source: int) -> torch.Tensor:
        """Float32 [B, 224, 224] as the runtime makes them; ``source`` counts ``SHOTS``, then the zero-shot one."""
        if source == len(SHOTS):
            return zero_shot_map(torch.from_numpy(self.margins[entries].astype(np.float32)))
        return upsample_map(torch.from_numpy(self.few_shot[entries, source].astype(np.float32)))

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
        """One of the entries of all, in their order."""
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
    """``zero_shot_margins`` → the map [B, S, S] as ``ImageDecoder`` makes it."""
    return upsample_map(margins.flatten(0, 1)).sigmoid().unflatten(0, margins.shape[:2]).mean(dim=1)


def zero_shot_margins(decoder: ImageDecoder, taps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B, 4, P, V] × [2, E] → abnormal minus normal logit, [B, 4, P]."""
    logits = decoder.patch_logits(taps, text)
    return logits[..., 1] - logits[..., 0]


def make_bank(known: list[torch.Tensor], distinct: int) -> torch.Tensor:
    """Bank as the runtime's ``MemoryBank`` has it.

    Args:
        known: taps [K, T, P, V] of K normal samples, and of each of their augmented versions.
        distinct: how many of the P patches do not overlap.

    Returns:
        Unit rows [T, K · distinct, V].
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
    """Encode a pool that the encoder was not trained on; entries of one group follow each other.

    Args:
        text: [2, E], the text features of class "object".
        augmentation: of the normal samples, in the banks.
        workers: processes that share the groups, on a CPU.
    """
    show = partial(_show_groups, encoder, decoder, text, pool.folder, pool.num_groups, augmentation)
    if workers < 2 or text.device.type != "cpu":
        return show(range(pool.num_groups))
    edges = np.linspace(0, pool.num_groups, workers + 1).astype(int).tolist()
    shares = [range(first, end) for first, end in itertools.pairwise(edges)]
    # not forked: threads of torch's that ran before would be missing
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
        copied = augment(pixels[:NORMALS], augmentation, encoder.config.grid)[1:]
        known = [taps[:NORMALS], *(encoder(torch.from_numpy(copy).to(device))[1] for copy, _ in copied)]
        banks = (make_bank([copy[:count] for copy in known], encoder.config.tokens**2) for count in SHOTS)
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
    """``evidence`` of maps [B, S, S] that all come from so many normal samples: [B, F]."""
    return evidence(maps, torch.full((len(maps),), float(num_samples), device=maps.device))


class Sureness:
    """How surely a map tells good from defective: a logistic regression on its largest values (what the language
    model learns to say, not what decides)."""

    LIMITS = (0.92, 0.75)  # p of the likelier verdict from which on it is sure, and fairly sure

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

    def words(self, patch_map: NDArray) -> str:
        p = 1 / (1 + np.exp(-self._features(map_statistics(patch_map)[None])[0] @ self.weights))
        return SURENESS[sum(max(p, 1 - p) < limit for limit in self.LIMITS)]


def region_level(gallery: Gallery) -> float:
    """The level that makes a region: where the peak of a map with one normal sample tells good from defective parts,
    a region on a good part and none on a defective one counting the same (Youden, Cancer 1950); of the levels that
    are within a hundredth of the best the lowest, which shows where on most defective parts."""
    peaks = gallery.few_shot[:, 0].astype(np.float64).max(axis=-1)
    defective = np.array([bool(d) for d in gallery.defects])
    levels = np.quantile(peaks, np.linspace(0.01, 0.99, 99))
    right = np.array([(peaks[defective] >= x).mean() + (peaks[~defective] < x).mean() for x in levels])
    return float(levels[int(np.argmax(right >= right.max() - 0.01))])


def map_statistics(patch_map: NDArray) -> NDArray[np.float64]:
    """[..., P] → largest value, mean of the largest three, median, [..., 3]."""
    ordered = np.sort(patch_map.astype(np.float64), axis=-1)
    return np.stack([ordered[..., -1], ordered[..., -3:].mean(axis=-1), np.median(ordered, axis=-1)], axis=-1)
