"""Maps of generated products in units of normal variation: the second half of the training reads these.

The products are encoded once (``encode_gallery``). What takes the time is stored, distances and nearest patches, so
that the maps can be computed again (``load_gallery``) without encoding.
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
import torch.nn.functional as F
from numpy.random import default_rng
from numpy.typing import NDArray
from torch import Tensor

from ...runtime.synthetic.data import draw, num_defects, validation_families
from ...runtime.synthetic.defects import Defect
from ..anomalygpt import upsample_map
from ..image_decoder import ImageDecoder
from ..look import LookNet, contrast, raised
from ..nano.gallery import Gallery, evidence_of, zero_shot_map, zero_shot_margins
from ..nano.train_language import Seen, ValidationFamily
from ..prompt_learner import compress, shrink
from .encoder import LiteEncoder
from .evaluate import Matched, Units, describer
from .features import Extractor, pixels_of, save_whole, tap_name
from .groups import COARSE_SIZE, NORMALS, QUERIES, Group, draw_group, fit
from .sets import augment

ENTRIES = QUERIES + 1  # of each product: its queries, and its last normal sample as a good query


class UnitGallery(Gallery):
    """Maps in units of normal variation; the prompt learner's networks read them compressed."""

    entries: ClassVar[int] = ENTRIES

    @staticmethod
    def as_read(maps: Tensor) -> Tensor:
        return compress(maps)


@dataclass
class Encoded:
    """One product's queries, matched with its normal samples.

    Attributes:
        embedding: image embeddings [Q, E].
        matched: distances of the queries.
        margins: zero-shot logit differences [Q, T, P].
        contrasts: ``contrast`` of the queries' pictures, averaged down to the side of the maps: float16
            [Q, surroundings, M/2, M/2].
        defects: of the queries.
        kind: of the product.
    """

    embedding: NDArray[np.float32]
    matched: Matched
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
        features = self.extractor(group.pixels)
        taps = self._describe(features)
        versions = self._describe(self.extractor(augment(group.pixels[0])))
        unit, unit_versions = F.normalize(taps, dim=-1), F.normalize(versions, dim=-1)
        normals = unit[:num_normals]
        distances = [_match(part, normals) for part in unit]
        order = [*range(num_normals, len(unit)), num_normals - 1]
        queries = [distances[index] for index in order]
        own = 1 - (unit_versions @ normals[0].transpose(-1, -2)).amax(dim=-1)
        known = np.full((num_normals, *own.shape), np.nan, np.float32)
        known[0] = own.numpy()
        weights = np.array(config.tap_weights, np.float32)
        matched = Matched(
            np.arange(num_normals)[None],
            np.stack([distance for distance, _ in queries]),
            np.stack([nearest for _, nearest in queries]),
            np.stack([distance for distance, _ in distances[:num_normals]]),
            np.stack([nearest for _, nearest in distances[:num_normals]]),
            known,
            config.map_size,
            weights / weights.sum(),
        )
        last = torch.from_numpy(features[tap_name(config.tap_blocks[-1])][order]).float()
        pixels = shrink(torch.from_numpy(pixels_of(group.pixels[order])), config.map_size)
        return Encoded(
            self.encoder.embed(last).numpy(),
            matched,
            zero_shot_margins(self.decoder, taps[order], self.text).numpy(),
            contrast(pixels).half().numpy(),
            [group.defects[index] for index in order],
            group.kind,
        )


def _match(part: Tensor, normals: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Unit-norm [T, P, V] × [N, T, P, V] → 1 − cosine to the nearest patch of each normal sample, and its number."""
    largest = [(part @ normal.transpose(-1, -2)).max(dim=-1) for normal in normals]
    distance = 1 - torch.stack([found.values for found in largest])
    return distance.numpy(), torch.stack([found.indices for found in largest]).numpy().astype(np.int16)


def unit_maps(matched: Matched, num_normals: int) -> NDArray[np.float32]:
    """Patch maps [Q, 2, P] in units of normal variation: with the first normal sample, and with all; the last query
    is the last normal sample, so its second map is without it."""
    one = Units(matched, [0]).patches()
    few = Units(matched, range(num_normals)).patches()
    few[-1] = Units(matched, range(num_normals - 1)).patches()[-1]
    return np.stack([one, few], axis=1)


def maps_of(found: Encoded) -> dict[str, NDArray]:
    """Arrays of a ``Gallery`` for these entries."""
    count = len(found.matched.normals)
    few_shot = unit_maps(found.matched, count)
    shown = torch.from_numpy(few_shot)
    maps = (upsample_map(shown[:, 0]), upsample_map(shown[:, 1]), zero_shot_map(torch.from_numpy(found.margins)))
    figures = [evidence_of(compress(each), shots) for each, shots in zip(maps, (1, count, 0), strict=True)]
    return {
        "embedding": found.embedding.astype(np.float16),
        "few_shot": few_shot.astype(np.float16),
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
    """Write an encoded product; distances and margins are rounded to float16."""
    matched = found.matched
    notes = json.dumps({"kind": found.kind, "defects": [[asdict(d) for d in each] for each in found.defects]})
    save_whole(
        path,
        embedding=found.embedding,
        queries=matched.queries.astype(np.float16),
        query_nearest=matched.query_nearest,
        normals=matched.normals.astype(np.float16),
        normal_nearest=matched.normal_nearest,
        versions=matched.versions.astype(np.float16),
        weights=matched.weights,
        map_size=np.array(matched.map_size),
        margins=found.margins.astype(np.float16),
        contrasts=found.contrasts,
        notes=np.frombuffer(notes.encode(), np.uint8),
    )


def load_encoded(path: Path) -> Encoded:
    """Read a product that ``save_encoded`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        single = {name: file[name].astype(np.float32) for name in ("queries", "normals", "versions", "margins")}
        notes = json.loads(file["notes"].tobytes())
        matched = Matched(
            np.arange(len(single["normals"]))[None],
            single["queries"],
            file["query_nearest"],
            single["normals"],
            file["normal_nearest"],
            single["versions"],
            int(file["map_size"]),
            file["weights"],
        )
        defects = [[Defect(**{**d, "center": tuple(d["center"])}) for d in each] for each in notes["defects"]]
        return Encoded(
            file["embedding"].astype(np.float32), matched, single["margins"], file["contrasts"], defects, notes["kind"]
        )


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
