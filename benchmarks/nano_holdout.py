"""How good is the bundled model on generated products that it never saw, and how small or faint may a defect be?

The fixed held-out families (two of every kind, a few kinds never trained on at all), through the runtime as a line
would: AUROC, the sentence's verdict against the truth, the place it names, p(anomaly) against how often it is right,
what is caught by size and by contrast of the defect, and the share of right answers to each kind of question.

    python benchmarks/nano_holdout.py [--bundle DIR] [--shots 0,1,4] [--unrest 1] [--json FILE]

``--validation`` takes the validation families instead: choices between models are made there. ``--unrest 0.3`` is a
calm line: light, exposure, focus and pose change a third as much from shot to shot, and nothing is soiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import default_rng
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalygpt_edge.models.nano.evaluate import auroc, pixel_auroc
from anomalygpt_edge.models.nano.words import CANNOT_KNOW, UNKNOWABLE_UNSEEN, follow_ups, places, shade_of
from anomalygpt_edge.models.prompts import DEFAULT_QUESTION, answer
from anomalygpt_edge.runtime.evaluation.evaluate import parse_shots
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.inspection.verdict import Status
from anomalygpt_edge.runtime.synthetic.data import (
    Sample,
    fixed_samples,
    held_out_families,
    validation_families,
)
from anomalygpt_edge.runtime.synthetic.products import Family
from anomalygpt_edge.runtime.synthetic.surfaces import SURFACES

NUM_REFERENCES, NUM_PARTS = 4, 10  # of each family; so many good and as many defective queries
AREAS = (0.0, 0.002, 0.005, 0.02, 1.0)  # share of the frame
CONTRASTS = (0.0, 0.05, 0.1, 0.2, 1.0)  # mean change of grey level in the mask, 0..1
PLAIN = {"scratch", "hole", "stain"}  # what can be told without a normal sample, on a regular surface
BINS = 10  # of p(anomaly)
NUM_ASKED = 3  # parts of a family that are asked all questions


@dataclass
class Inspected:
    """One part's truth and what the runtime said."""

    area: float
    contrast: float
    score: float
    said_defective: bool
    p_anomaly: float
    place_right: bool | None  # None: not one defect, or not called defective
    on_surface: bool  # a surface without an outline, not an object
    plain: bool  # all its defects are ``PLAIN``

    @property
    def defective(self) -> bool:
        return self.area > 0


def inspect_family(
    inspector: Inspector, family_samples: tuple[list[Sample], ...], shots: int
) -> tuple[list[Inspected], float]:
    """Every query of one family with ``shots`` normal samples; and the pixel AUROC."""
    references, good, bad = family_samples
    inspector.use(inspector.make_bank([r.pixels for r in references[:shots]]) if shots else None)
    found, maps = [], []
    for part in good + bad:
        verdict = inspector.inspect(part.pixels)
        said = verdict.status == Status.FAIL
        right = verdict.sentence == answer(places(part.defects)) if said and len(part.defects) == 1 else None
        contrast = max((d.contrast for d in part.defects), default=0.0)
        kind = part.kind in SURFACES, {d.name for d in part.defects} <= PLAIN
        found.append(
            Inspected(part.mask.mean(), contrast, verdict.score, said, verdict.p_anomaly, right, *kind)  # type: ignore[arg-type]
        )
        maps.append(verdict.anomaly_map)
    return found, pixel_auroc(np.stack(maps), np.stack([p.mask for p in good + bad]))  # type: ignore[arg-type]


def right_answers(
    inspector: Inspector, families: list[Family], samples: list[tuple[list[Sample], ...]]
) -> dict:
    """Question kind → how many were asked and the share answered word for word right, with one normal sample.

    The first parts of each family that have one defect and are called defective, each asked one question of every
    kind, each in a dialogue of its own behind the verdict; ``refusal`` is a question that training never showed and
    no picture answers. What it looks like counts by its form, and word by word too, where the right answer has that
    word. Whether it is darker or brighter is answered where the model is sure enough: counted are the answers given,
    the right ones of these and the opposite ones (of a defect that is both, or neither, none is right). How sure it is
    has no right answer: the table of p(anomaly) stands for it.
    """
    right: dict[str, list[bool]] = {}
    for family, (references, _, bad) in zip(families, samples, strict=True):
        inspector.use(inspector.make_bank([references[0].pixels]))
        rng, asked = default_rng(family.seed), 0
        for part in (part for part in bad if len(part.defects) == 1):
            if asked == NUM_ASKED or inspector.inspect(part.pixels).status != Status.FAIL:
                continue
            asked += 1
            shade = shade_of(part.defects[0])
            questions = follow_ups(rng, part.defects, family.kind, "", shade)
            wanted = {name: questions[name] for name in ("place", "count", "size", "look", "shade", "kind")}
            wanted["refusal"] = (str(rng.choice(UNKNOWABLE_UNSEEN)), CANNOT_KNOW)
            for name, (question, reply) in wanted.items():
                dialogue = inspector.dialogue(part.pixels)
                dialogue.ask(DEFAULT_QUESTION)
                said = dialogue.ask(question).text
                if name == "shade":
                    right.setdefault("shade: told", []).append(said != CANNOT_KNOW)
                    if said != CANNOT_KNOW:
                        right.setdefault("shade: right where told", []).append(said == reply)
                        opposite = "brighter" if shade == "darker" else "darker"
                        found = shade != "neither" and opposite in said
                        right.setdefault("shade: opposite where told", []).append(found)
                    continue
                if name == "look":
                    form = reply.split(" ")[-1]
                    said, reply = said.split(" ")[-1], form
                    right.setdefault(f"look: {form.rstrip('.')}", []).append(said == form)
                right.setdefault(name, []).append(said == reply)
    return {name: {"asked": len(said), "right": float(np.mean(said))} for name, said in right.items()}


def calibration_error(p: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error over equal-width bins of p (Naeini et al., AAAI 2015)."""
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs(p[bins == b].mean() - truth[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(np.sum(gaps))


def figures(families: list[list[Inspected]], pixels: list[float]) -> dict[str, float | None]:
    parts = list(itertools.chain.from_iterable(families))
    truth = np.array([p.defective for p in parts])
    said = np.array([p.said_defective for p in parts])
    placed = [p.place_right for p in parts if p.place_right is not None]
    image = [
        auroc(np.array([p.score for p in f]), np.array([float(p.defective) for p in f])) for f in families
    ]
    return {
        "image_auroc_top1": float(np.mean(image)),
        "pixel_auroc": float(np.mean(pixels)),
        "verdict_accuracy": float((said == truth).mean()),
        "caught": float(said[truth].mean()),
        "false_alarms": float(said[~truth].mean()),
        "place": float(np.mean(placed)) if placed else None,
        "calibration_error": calibration_error(np.array([p.p_anomaly for p in parts]), truth),
    }


def caught_by(families: list[list[Inspected]], name: str, edges: tuple[float, ...]) -> list[dict]:
    """Share of defective parts called defective, by ``name`` ("area" or "contrast")."""
    bad = [p for f in families for p in f if p.defective]
    rows = []
    for low, high in itertools.pairwise(edges):
        said = [p.said_defective for p in bad if low <= getattr(p, name) < high]
        rows.append(
            {"from": low, "to": high, "parts": len(said), "caught": float(np.mean(said)) if said else None}
        )
    return rows


def caught_by_kind(families: list[list[Inspected]]) -> list[dict]:
    """Scratches, holes and stains, and all other defects, on surfaces and on objects: image AUROC against the good
    parts of the same family (mean over families that have such parts), share caught, and false alarms."""
    rows = []
    for on_surface, plain in itertools.product((True, False), (True, False)):
        aurocs, caught, alarms = [], [], []
        for family in (f for f in families if f[0].on_surface == on_surface):
            good = [p for p in family if not p.defective]
            bad = [p for p in family if p.defective and p.plain == plain]
            alarms += [p.said_defective for p in good]
            caught += [p.said_defective for p in bad]
            if bad:
                scores = np.array([p.score for p in good + bad])
                aurocs.append(auroc(scores, np.repeat([0.0, 1.0], [len(good), len(bad)])))
        rows.append(
            {
                "on": "surfaces" if on_surface else "objects",
                "defects": ", ".join(sorted(PLAIN)) if plain else "all others",
                "parts": len(caught),
                "image_auroc_top1": float(np.mean(aurocs)) if aurocs else None,
                "caught": float(np.mean(caught)) if caught else None,
                "false_alarms": float(np.mean(alarms)) if alarms else None,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="the bundled model by default")
    parser.add_argument("--shots", default="0,1,4")
    parser.add_argument("--families", type=int, default=len(held_out_families()))
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--unrest", type=float, default=1.0, help="1: the line as it is; 0.3: a calm one")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shots = parse_shots(options.shots)
    products = (validation_families if options.validation else held_out_families)(options.families)
    samples = [
        fixed_samples(f, NUM_REFERENCES, NUM_PARTS, NUM_PARTS, options.unrest)
        for f in track(products, "drawing parts", disable=not sys.stderr.isatty())
    ]
    results = {}
    with Inspector.open(options.bundle) as inspector:
        for k in shots:
            inspected = [
                inspect_family(inspector, s, k)
                for s in track(samples, f"{k} normal samples", disable=not sys.stderr.isatty())
            ]
            families, pixels = [i[0] for i in inspected], [i[1] for i in inspected]
            results[k] = {
                **figures(families, pixels),
                "by_area": caught_by(families, "area", AREAS),
                "by_contrast": caught_by(families, "contrast", CONTRASTS),
                "by_kind": caught_by_kind(families),
            }
        answers = right_answers(inspector, products, samples) if 1 in shots else {}
    print_tables(results, "validation products" if options.validation else "held-out generated products")
    print_answers(answers)
    if options.json:
        found = {"nano_holdout": results, "right_answers": answers}
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def print_answers(answers: dict[str, dict]) -> None:
    table = Table(
        "question", "asked", "right", title="1 normal sample, parts called defective", box=box.SIMPLE_HEAD
    )
    for name, row in answers.items():
        table.add_row(name, str(row["asked"]), f"{row['right']:.2f}")
    Console().print(table)


def print_tables(results: dict[int, dict], title: str) -> None:
    console = Console()
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("normal samples")
    names = [name for name in next(iter(results.values())) if not name.startswith("by_")]
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for k, row in results.items():
        table.add_row(str(k), *("–" if row[name] is None else f"{row[name]:.3f}" for name in names))
    console.print(table)
    for k, row in results.items():
        table = Table(
            "on", "defects", "parts", "image auroc top1", "caught", "false alarms", box=box.SIMPLE_HEAD
        )
        table.title = f"{k} normal samples"
        for line in row["by_kind"]:
            figures = (line["image_auroc_top1"], line["caught"], line["false_alarms"])
            cells = ("–" if value is None else f"{value:.3f}" for value in figures)
            table.add_row(line["on"], line["defects"], str(line["parts"]), *cells)
        console.print(table)
        if k == 0:
            continue
        for key, title in (("by_area", "defective share of the frame"), ("by_contrast", "contrast")):
            table = Table(title, "parts", "caught", title=f"{k} normal samples", box=box.SIMPLE_HEAD)
            for line in row[key]:
                caught = "–" if line["caught"] is None else f"{line['caught']:.0%}"
                table.add_row(f"{line['from']:.1%} to {line['to']:.1%}", str(line["parts"]), caught)
            console.print(table)


if __name__ == "__main__":
    main()
