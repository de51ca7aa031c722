"""Maps of generated products in units of normal variation: the second half of the training reads these.

The products are encoded once, a file each (``encode_gallery``); the maps are the runtime's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.random import default_rng
from numpy.typing import NDArray
from torch import Tensor

from ...runtime.synthetic.data import draw, num_defects, validation_families
from ...runtime.synthetic.defects import Defect
from ...runtime.vision.augment import vary
from ...runtime.vision.memory_bank import MemoryBank
from ...runtime.vision.variation import measure_variation
from ..anomalygpt import upsample_map
from ..image_decoder import ImageDecoder
from ..look import LookNet, contrast, raised
from ..nano.gallery import Gallery, evidence_of, zero_shot_map, zero_shot_margins
from ..nano.train_language import Seen, ValidationFamily
from ..prompt_learner import compress, shrink
from .encoder import LiteEncoder
from .evaluate import describer
from .features import Extractor, pixels_of, save_whole, tap_name
from .groups import COARSE_SIZE, NORMALS, QUERIES, Group, draw_group, fit

ENTRIES = QUERIES + 1  # of each product: its queries, and its last normal sample as a good query


class UnitGallery(Gallery):
    """Maps in units of normal variation; the prompt learner's networks read them compressed."""

    entries: ClassVar[int] = ENTRIES

    @staticmethod
    def as_read(maps: Tensor) -> Tensor:
        return compress(maps)


@dataclass
class Encoded:
    """One product's queries, and their patch maps.

    Attributes:
        embedding: image embeddings [Q, E].
        few_shot: patch maps in units of normal variation [Q, 2, P]: with the first normal sample, and with all.
        num_normals: number of normal samples.
        margins: zero-shot logit differences [Q, T, P].
        contrasts: ``contrast`` of the queries' pictures, averaged down to the side of the maps: float16
            [Q, surroundings, M/2, M/2].
        defects: of the queries.
        kind: of the product.
    """

    embedding: NDArray[np.float32]
    few_shot: NDArray[np.float32]
    num_normals: int
    margins: NDArray[np.float32]
    contrasts: NDArray[np.float16]
    defects: list[list[Defect]]
    kind: str


class Describer:
    """Encodes the products of a gallery.

    Args:
        encoder: frozen.
        extractor: its backbone.
        decoder: frozen.
        text: text features of class "object" [2, E].
    """

    def __init__(self, encoder: LiteEncoder, extractor: Extractor, decoder: ImageDecoder, text: Tensor) -> None:
        self.encoder, self.extractor, self.decoder, self.text = encoder, extractor, decoder, text
        self._describe = describer(encoder)

    @torch.no_grad()
    def __call__(self, group: Group, num_normals: int = NORMALS) -> Encoded:
        """The parts behind the first ``num_normals`` are the queries; the last normal sample is one more."""
        config = self.encoder.config
        pixels = pixels_of(group.pixels)
        features = self.extractor.run(pixels)
        taps = self._describe(features)
        versions = np.concatenate(list(vary(pixels[:1], config.pixel_mean, config.pixel_std)))
        varied = list(self._describe(self.extractor.run(versions))[:, None].numpy())
        order = [*range(num_normals, len(taps)), num_normals - 1]
        rows = taps.numpy()
        one = self._maps(rows[order], rows[:1], varied)
        few = self._maps(rows[order[:-1]], rows[:num_normals], varied)
        without = self._maps(rows[order[-1:]], rows[: num_normals - 1], varied)
        last = torch.from_numpy(features[tap_name(config.tap_blocks[-1])][order]).float()
        shown = shrink(torch.from_numpy(pixels[order]), config.map_size)
        return Encoded(
            self.encoder.embed(last).numpy(),
            np.stack([one, np.concatenate([few, without])], axis=1),
            num_normals,
            zero_shot_margins(self.decoder, taps[order], self.text).numpy(),
            contrast(shown).half().numpy(),
            [group.defects[index] for index in order],
            group.kind,
        )

    def _maps(
        self, queries: NDArray[np.float32], normals: NDArray[np.float32], varied: list[NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        """Patch maps [Q, P] as the runtime computes them, from patch features [Q, T, P, V], [N, T, P, V] and of the
        augmented versions of the first normal sample."""
        config = self.encoder.config
        samples = list(normals[:, None])
        measured = measure_variation(samples, varied, config.tap_weights, config.map_size)
        bank = MemoryBank.from_features(samples, "", measured=measured, weights=config.tap_weights)
        scaled = bank.match(queries, 1)[2]
        assert scaled is not None
        return scaled


def maps_of(found: Encoded) -> dict[str, NDArray]:
    """Arrays of a ``Gallery`` for these entries."""
    shown = torch.from_numpy(found.few_shot)
    maps = (upsample_map(shown[:, 0]), upsample_map(shown[:, 1]), zero_shot_map(torch.from_numpy(found.margins)))
    counts = (1, found.num_normals, 0)
    figures = [evidence_of(compress(each), count) for each, count in zip(maps, counts, strict=True)]
    return {
        "embedding": found.embedding.astype(np.float16),
        "few_shot": found.few_shot.astype(np.float16),
        "margins": found.margins.astype(np.float16),
        "figures": torch.stack(figures, dim=1).numpy(),
    }


def encode_gallery(folder: Path, seed: int, groups: Iterable[int], describe: Describer) -> None:
    """Draw and encode groups of the pool of this seed into ``folder``, a file each; files that exist are kept."""
    missing = [number for number in groups if not group_file(folder, number).exists()]
    began = time.monotonic()
    for done, number in enumerate(missing, 1):
        save_encoded(group_file(folder, number), describe(draw_group(seed, number, describe.extractor.size)))
        if done % 50 == 0 or done == len(missing):
            left = (time.monotonic() - began) / done * (len(missing) - done) / 60
            print(f"gallery {done}/{len(missing)} groups, {left:.1f} minutes left", flush=True)


def group_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npz"


def save_encoded(path: Path, found: Encoded) -> None:
    """Write an encoded product; maps and margins are rounded to float16."""
    notes = {"kind": found.kind, "num_normals": found.num_normals}
    notes["defects"] = [[asdict(d) for d in each] for each in found.defects]
    save_whole(
        path,
        embedding=found.embedding,
        few_shot=found.few_shot.astype(np.float16),
        margins=found.margins.astype(np.float16),
        contrasts=found.contrasts,
        notes=np.frombuffer(json.dumps(notes).encode(), np.uint8),
    )


def load_encoded(path: Path) -> Encoded:
    """Read a product that ``save_encoded`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        few_shot, margins = (file[name].astype(np.float32) for name in ("few_shot", "margins"))
        notes = json.loads(file["notes"].tobytes())
        defects = [[Defect(**{**d, "center": tuple(d["center"])}) for d in each] for each in notes["defects"]]
        count, kind = notes["num_normals"], notes["kind"]
        return Encoded(file["embedding"], few_shot, count, margins, file["contrasts"], defects, kind)


def load_gallery(folder: Path, groups: Iterable[int]) -> tuple[UnitGallery, NDArray[np.float16]]:
    """The maps of groups that were encoded, and the contrasts of their entries' pictures."""
    arrays: list[dict[str, NDArray]] = []
    contrasts: list[NDArray[np.float16]] = []
    defects: list[list[Defect]] = []
    kinds: list[str] = []
    for number in groups:
        found = load_encoded(group_file(folder, number))
        arrays.append(maps_of(found))
        contrasts.append(found.contrasts)
        defects += found.defects
        kinds += [found.kind] * len(found.defects)
    joined = {name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]}
    return UnitGallery(**joined, defects=defects, kinds=kinds), np.concatenate(contrasts)


@torch.no_grad()
def load_validation(paths: Iterable[Path], look: LookNet) -> list[ValidationFamily]:
    """The language model's inputs for validation families that ``encode_validation`` wrote."""
    families = []
    for number, path in enumerate(paths):
        found = load_encoded(path)
        arrays = {name: rows[:-1] for name, rows in maps_of(found).items()}  # without the normal sample
        gallery = UnitGallery(**arrays, defects=found.defects[:-1], kinds=[found.kind] * (len(found.defects) - 1))
        entries = np.arange(len(gallery.defects))
        contrasts = torch.from_numpy(found.contrasts[:-1]).float()
        sources = {}
        for source, name in enumerate(("one_shot", "few_shot", "zero_shot")):
            maps = gallery.maps(entries, source)
            looks = look.read(contrasts, raised(maps))
            figures = torch.from_numpy(gallery.figures[:, source])
            sources[name] = Seen(maps, torch.from_numpy(gallery.embedding.astype(np.float32)), figures, looks)
        families.append(ValidationFamily(sources, gallery.defects, found.kind, number, name_lines=True))
    return families


def encode_validation(folder: Path, describe: Describer, num_families: int, num_queries: int = 4) -> list[Path]:
    """Draw and encode the validation families, as many good as defective queries each; files that exist are kept."""
    paths = []
    for number, family in enumerate(validation_families(num_families)):
        paths.append(folder / f"{number:02d}_{family.kind}.npz")
        if paths[-1].exists():
            continue
        size = describe.extractor.size
        side = COARSE_SIZE if number % 2 == 0 else size
        rng = default_rng([family.seed, 97])
        counts = [0] * (NORMALS + num_queries) + [num_defects(rng) for _ in range(num_queries)]
        samples = [draw(family, rng, count, (side, side)) for count in counts]
        group = Group(*fit(samples, size), [sample.defects for sample in samples], family.kind)
        save_encoded(paths[-1], describe(group))
    return paths
