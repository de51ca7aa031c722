"""How accurate is the bundled model on generated products that it was not trained on, by size and contrast of defects?

The fixed held-out families (two of every kind, including kinds that were not trained on) are inspected by the runtime
as on a line. Reported are AUROC, accuracy of the verdict and of the place that its sentence names, calibration error of
p(anomaly), share of defects found by size and by contrast, and share of right answers to each kind of question.

    python benchmarks/nano_holdout.py [--bundle DIR] [--shots 0,1,4] [--variation 1] [--json FILE]

``--validation`` uses the validation families instead, which are for choices between models. ``--variation 0.3`` gives a
calm line: light, exposure and focus vary 0.3 times as much from shot to shot, and parts are not soiled.
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

from anomalygpt_edge.models.nano.dialogues import CANNOT_KNOW, UNKNOWABLE_UNSEEN, follow_ups, places, shade_of
from anomalygpt_edge.models.nano.evaluate import auroc, pixel_auroc
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

NUM_REFERENCES, NUM_PARTS = (
    4,
    10,
)  # per family: normal samples; good queries and the same number of defective ones
AREAS = (0.0, 0.002, 0.005, 0.02, 1.0)  # share of the frame
CONTRASTS = (0.0, 0.05, 0.1, 0.2, 1.0)  # mean change of grey level in the mask, 0..1
PLAIN = {
    "scratch",
    "hole",
    "stain",
}  # defects that can be recognised on a regular surface without a normal sample
BINS = 10  # of p(anomaly)
NUM_ASKED = 3  # parts of a family that all questions are asked about
NANO = Path(__file__).parents[1] / "models" / "nano" / "bundle"


@dataclass
class Inspected:
    """Truth and result of one part."""

    area: float
    contrast: float
    score: float
    failed: bool  # verdict FAIL
    p_anomaly: float
    place_right: bool | None  # None: not exactly one defect, or verdict PASS
    on_surface: bool  # a surface without an outline, not an object
    plain: bool  # all its defects are ``PLAIN``

    @property
    def defective(self) -> bool:
        return self.area > 0


def inspect_family(
    inspector: Inspector, family_samples: tuple[list[Sample], ...], shots: int
) -> tuple[list[Inspected], float]:
    """Results of all queries of one family with ``shots`` normal samples, and their pixel AUROC."""
    references, good, bad = family_samples
    inspector.use(inspector.make_bank([r.pixels for r in references[:shots]]) if shots else None)
    found, maps = [], []
    for part in good + bad:
        verdict = inspector.inspect(part.pixels)
        failed = verdict.status == Status.FAIL
        right = (
            verdict.sentence == answer(places(part.defects)) if failed and len(part.defects) == 1 else None
        )
        contrast = max((d.contrast for d in part.defects), default=0.0)
        kind = part.kind in SURFACES, {d.name for d in part.defects} <= PLAIN
        found.append(
            Inspected(part.mask.mean(), contrast, verdict.score, failed, verdict.p_anomaly, right, *kind)  # type: ignore[arg-type]
        )
        maps.append(verdict.anomaly_map)
    return found, pixel_auroc(np.stack(maps), np.stack([p.mask for p in good + bad]))  # type: ignore[arg-type]


def right_answers(
    inspector: Inspector, families: list[Family], samples: list[tuple[list[Sample], ...]]
) -> dict:
    """Question kind → number of questions and share of exactly right answers, with one normal sample.

    About the first ``NUM_ASKED`` parts of each family that have one defect and the verdict FAIL, one question of every
    kind is asked, each in a separate dialogue after the verdict. ``refusal`` is a question that no picture answers and
    that is not in the training set. For the look, the form counts, also separately for each form of the right answer.
    For the shade, the model answers only if it is sure enough: the rows are the share of answers that name a shade, and
    the shares of right and of opposite shades among these (for a defect without a shade, none is right). The question
    how sure the model is has no right answer; the calibration error of p(anomaly) covers it.
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
                text = dialogue.ask(question).text
                if name == "shade":
                    right.setdefault("shade: told", []).append(text != CANNOT_KNOW)
                    if text != CANNOT_KNOW:
                        right.setdefault("shade: right where told", []).append(text == reply)
                        opposite = "brighter" if shade == "darker" else "darker"
                        found = shade != "neither" and opposite in text
                        right.setdefault("shade: opposite where told", []).append(found)
                    continue
                if name == "look":
                    form = reply.split(" ")[-1]
                    text, reply = text.split(" ")[-1], form
                    right.setdefault(f"look: {form.rstrip('.')}", []).append(text == form)
                right.setdefault(name, []).append(text == reply)
    return {name: {"asked": len(each), "right": float(np.mean(each))} for name, each in right.items()}


def calibration_error(p: np.ndarray, truth: np.ndarray) -> float:
    """Expected calibration error over equal-width bins of p (Naeini et al., AAAI 2015)."""
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = [abs(p[bins == b].mean() - truth[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(np.sum(gaps))


def figures(families: list[list[Inspected]], pixels: list[float]) -> dict[str, float | None]:
    parts = list(itertools.chain.from_iterable(families))
    truth = np.array([p.defective for p in parts])
    failed = np.array([p.failed for p in parts])
    placed = [p.place_right for p in parts if p.place_right is not None]
    image = [
        auroc(np.array([p.score for p in f]), np.array([float(p.defective) for p in f])) for f in families
    ]
    return {
        "image_auroc_top1": float(np.mean(image)),
        "pixel_auroc": float(np.mean(pixels)),
        "verdict_accuracy": float((failed == truth).mean()),
        "caught": float(failed[truth].mean()),
        "false_alarms": float(failed[~truth].mean()),
        "place": float(np.mean(placed)) if placed else None,
        "calibration_error": calibration_error(np.array([p.p_anomaly for p in parts]), truth),
    }


def caught_by(families: list[list[Inspected]], name: str, edges: tuple[float, ...]) -> list[dict]:
    """Share of defective parts with verdict FAIL, by ``name`` ("area" or "contrast")."""
    bad = [p for f in families for p in f if p.defective]
    rows = []
    for low, high in itertools.pairwise(edges):
        failed = [p.failed for p in bad if low <= getattr(p, name) < high]
        caught = float(np.mean(failed)) if failed else None
        rows.append({"from": low, "to": high, "parts": len(failed), "caught": caught})
    return rows


def caught_by_kind(families: list[list[Inspected]]) -> list[dict]:
    """Figures of plain and of all other defects (see ``PLAIN``), on surfaces and on objects: image AUROC against the
    good parts of the same family (mean over families with such parts), share of FAIL verdicts, and false alarms."""
    rows = []
    for on_surface, plain in itertools.product((True, False), (True, False)):
        aurocs, caught, alarms = [], [], []
        for family in (f for f in families if f[0].on_surface == on_surface):
            good = [p for p in family if not p.defective]
            bad = [p for p in family if p.defective and p.plain == plain]
            alarms += [p.failed for p in good]
            caught += [p.failed for p in bad]
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
    parser.add_argument("--bundle", type=Path, default=NANO, help="bundle folder; by default nano's")
    parser.add_argument("--shots", default="0,1,4", help="numbers of normal samples, comma-separated")
    parser.add_argument("--families", type=int, default=len(held_out_families()), help="number of families")
    parser.add_argument(
        "--validation", action="store_true", help="use the validation families instead of the held-out ones"
    )
    parser.add_argument(
        "--variation",
        type=float,
        default=1.0,
        help="variation from shot to shot: 1 as usual, 0.3 a calm line; below 1 also no soil",
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    shots = parse_shots(options.shots)
    products = (validation_families if options.validation else held_out_families)(options.families)
    samples = [
        fixed_samples(f, NUM_REFERENCES, NUM_PARTS, NUM_PARTS, options.variation)
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
        "question", "asked", "right", title="1 normal sample, parts with verdict FAIL", box=box.SIMPLE_HEAD
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
