"""What the frozen encoder makes of generated parts, kept on disk: the second half trains on these maps."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..anomalygpt import few_shot_distance
from ..image_decoder import ImageDecoder
from ..imagebind import VisionEncoder
from .data import Sample, normalise, training_group
from .defects import Defect

GALLERY_SEED_OFFSET = 1000  # other parts than those the encoder was trained on
NO_MAP = -1.0


@dataclass
class Gallery:
    """N parts: their image embedding and their maps in patches.

    ``embedding`` f16 [N, E]; ``few_shot`` f16 [N, 2, 256]: distances to one and to two good parts (the second is
    NO_MAP where there is none); ``margins`` f16 [N, 4, 256]: zero-shot logit differences per tap.
    """

    embedding: NDArray[np.float16]
    few_shot: NDArray[np.float16]
    margins: NDArray[np.float16]
    defects: list[list[Defect]]
    kinds: list[str]

    def save(self, path: Path) -> None:
        notes = json.dumps(
            {
                "kinds": self.kinds,
                "defects": [[[d.name, d.center, d.area] for d in ds] for ds in self.defects],
            }
        )
        temporary = path.with_suffix(".tmp.npz")
        np.savez(
            temporary,
            embedding=self.embedding,
            few_shot=self.few_shot,
            margins=self.margins,
            notes=np.frombuffer(notes.encode(), np.uint8),
        )
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Gallery:
        with np.load(path, allow_pickle=False) as file:
            notes = json.loads(file["notes"].tobytes())
            defects = [[Defect(n, (c[0], c[1]), a) for n, c, a in ds] for ds in notes["defects"]]
            return cls(file["embedding"], file["few_shot"], file["margins"], defects, notes["kinds"])


def zero_shot_margins(decoder: ImageDecoder, taps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[B, 4, 256, V] × [2, E] → abnormal minus normal logit, [B, 4, 256]."""
    logits = decoder.patch_logits(taps, text)
    return logits[..., 1] - logits[..., 0]


class GalleryGroups(Dataset):
    """Group number → its four samples."""

    def __init__(self, seed: int, num_groups: int) -> None:
        self.seed, self.num_groups = seed, num_groups

    def __len__(self) -> int:
        return self.num_groups

    def __getitem__(self, index: int) -> list[Sample]:
        return training_group(self.seed + GALLERY_SEED_OFFSET, index)


@torch.no_grad()
def build_gallery(
    encoder: VisionEncoder,
    decoder: ImageDecoder,
    text: torch.Tensor,
    seed: int,
    num_groups: int,
    workers: int,
) -> Gallery:
    """Generate and encode ``num_groups`` groups; three entries each (a good part and two queries)."""
    device = text.device
    embedding, few_shot, margins = [], [], []
    defects: list[list[Defect]] = []
    kinds: list[str] = []
    began = time.monotonic()
    groups = DataLoader(
        GalleryGroups(seed, num_groups), batch_size=None, num_workers=workers, collate_fn=lambda group: group
    )
    for index, samples in enumerate(groups):
        pixels = torch.from_numpy(normalise(np.stack([s.pixels for s in samples]))).to(device)
        vectors, taps = encoder(pixels)
        one = few_shot_distance(taps[1:], taps[:1].expand(3, -1, -1, -1))
        bank = torch.cat([taps[0], taps[1]], dim=1)[None].expand(2, -1, -1, -1)
        two = torch.full_like(one, NO_MAP)
        two[1:] = few_shot_distance(taps[2:], bank)
        embedding.append(vectors[1:].half().cpu().numpy())
        few_shot.append(torch.stack([one, two], dim=1).half().cpu().numpy())
        margins.append(zero_shot_margins(decoder, taps[1:], text).half().cpu().numpy())
        defects += [s.defects for s in samples[1:]]
        kinds += [s.kind for s in samples[1:]]
        if (index + 1) % 250 == 0:
            left = (time.monotonic() - began) / (index + 1) * (num_groups - index - 1) / 60
            print(f"gallery {index + 1}/{num_groups} groups, {left:.1f} minutes left", flush=True)
    return Gallery(
        np.concatenate(embedding), np.concatenate(few_shot), np.concatenate(margins), defects, kinds
    )
