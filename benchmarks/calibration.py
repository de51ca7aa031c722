"""Is the bundled model's p(anomaly) calibrated, and does a recipe's operating point keep its false-reject rate?

On the held-out families of ``nano_holdout.py``: p(anomaly) against the share of defective parts, as a reliability
diagram and as expected calibration error; and an operating point for each family, chosen on its good parts as by
``agpt enroll --held-out``, against the greedy answer.

    python benchmarks/calibration.py [--bundle DIR] [--shots 0,1,4] [--rate 0.1] [--json FILE] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from nano_holdout import BINS, NUM_PARTS, NUM_REFERENCES, calibration_error
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from anomalygpt_edge.runtime.common.errors import AgptError
from anomalygpt_edge.runtime.enrolment.operating_point import (
    choose_operating_point,
    num_above,
    num_normals_needed,
)
from anomalygpt_edge.runtime.evaluation.evaluate import parse_shots
from anomalygpt_edge.runtime.inspection.inspector import Inspector
from anomalygpt_edge.runtime.synthetic.data import Sample, draw, fixed_samples, held_out_families
from anomalygpt_edge.runtime.synthetic.products import Family

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "calibration.png"
CHOICE_SEED = 101  # of the good parts that operating points are chosen on
NUM_RESAMPLES = 400

SIDE, MARGIN, BAR_ROOM = 300, 56, 60  # pixels: the unit square, the margin, the histogram below the square
INK, GRID, BLUE, GREY = (40, 40, 40), (225, 225, 225), (160, 90, 20), (170, 170, 170)  # BGR


@dataclass(frozen=True)
class Judged:
    """Results of one family with one number of normal samples."""

    p: np.ndarray  # float [n], p(anomaly) of the queries
    truth: np.ndarray  # bool [n], whether a query is defective
    failed: np.ndarray  # bool [n], whether the greedy answer is FAIL
    limit: float  # the operating point of p(anomaly)


def judge(
    inspector: Inspector, samples: tuple[list[Sample], ...], choice: list[Sample], shots: int, rate: float
) -> Judged:
    references, good, bad = samples
    inspector.use(inspector.make_bank([r.pixels for r in references[:shots]]) if shots else None)
    point = choose_operating_point([inspector.inspect(part.pixels) for part in choice], rate)
    verdicts = [inspector.inspect(part.pixels) for part in good + bad]
    return Judged(
        p=np.array([verdict.p_anomaly for verdict in verdicts]),
        truth=np.arange(len(verdicts)) >= len(good),
        failed=np.array([verdict.status.value == "FAIL" for verdict in verdicts]),
        limit=point.p_anomaly,
    )


def figures(families: list[Judged]) -> dict:
    p = np.concatenate([f.p for f in families])
    truth = np.concatenate([f.truth for f in families])
    failed = np.concatenate([f.failed for f in families])
    above = np.concatenate([f.p > f.limit for f in families])
    number = np.minimum((p * BINS).astype(int), BINS - 1)
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(NUM_RESAMPLES):
        drawn = [families[i] for i in rng.integers(0, len(families), len(families))]
        resampled.append(
            calibration_error(np.concatenate([f.p for f in drawn]), np.concatenate([f.truth for f in drawn]))
        )
    return {
        "parts": len(p),
        "calibration_error": calibration_error(p, truth),
        "calibration_error_95": [float(x) for x in np.percentile(resampled, (2.5, 97.5))],
        "brier_score": float(((p - truth) ** 2).mean()),
        "bins": [
            {
                "parts": int((number == b).sum()),
                "p": float(p[number == b].mean()),
                "defective": float(truth[number == b].mean()),
            }
            if (number == b).any()
            else {"parts": 0, "p": None, "defective": None}
            for b in range(BINS)
        ],
        "greedy": {"false_rejects": float(failed[~truth].mean()), "caught": float(failed[truth].mean())},
        "operating_point": {
            "false_rejects": float(above[~truth].mean()),
            "caught": float(above[truth].mean()),
            "median_limit": float(np.median([f.limit for f in families])),
        },
    }


def interval(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share of ``count`` trials (Wilson, 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def draw_diagram(title: str, row: dict) -> np.ndarray:
    """Reliability diagram, uint8 BGR: share of defective parts by p(anomaly), with 95 % intervals, above a histogram
    of the parts."""
    canvas = np.full((SIDE + 2 * MARGIN + BAR_ROOM, SIDE + 2 * MARGIN, 3), 255, np.uint8)
    left, top, bottom = MARGIN, MARGIN, MARGIN + SIDE

    def at(x: float, y: float) -> tuple[int, int]:
        return left + round(x * SIDE), bottom - round(y * SIDE)

    def write(text: str, x: int, y: int, scale: float = 0.42) -> None:
        cv2.putText(canvas, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, INK, 1, cv2.LINE_AA)

    for tick in range(0, 11, 2):
        cv2.line(canvas, at(tick / 10, 0), at(tick / 10, 1), GRID)
        cv2.line(canvas, at(0, tick / 10), at(1, tick / 10), GRID)
        write(f"{tick / 10:.1f}", at(tick / 10, 0)[0] - 10, bottom + BAR_ROOM + 18, 0.36)
        write(f"{tick / 10:.1f}", left - 28, at(0, tick / 10)[1] + 4, 0.36)
    cv2.line(canvas, at(0, 0), at(1, 1), GREY, 1, cv2.LINE_AA)
    most = max(one["parts"] for one in row["bins"])
    points = []
    for number, one in enumerate(row["bins"]):
        if not one["parts"]:
            continue
        height = max(1, round((BAR_ROOM - 14) * one["parts"] / most))
        x0, x1 = at(number / BINS, 0)[0] + 2, at((number + 1) / BINS, 0)[0] - 2
        cv2.rectangle(canvas, (x0, bottom + BAR_ROOM - height), (x1, bottom + BAR_ROOM), GREY, cv2.FILLED)
        low, high = interval(one["defective"], one["parts"])
        cv2.line(canvas, at(one["p"], low), at(one["p"], high), BLUE, 1, cv2.LINE_AA)
        points.append(at(one["p"], one["defective"]))
    cv2.polylines(canvas, [np.array(points)], False, BLUE, 2, cv2.LINE_AA)
    for point in points:
        cv2.circle(canvas, point, 4, BLUE, cv2.FILLED, cv2.LINE_AA)
    cv2.rectangle(canvas, at(0, 1), at(1, 0), INK)
    write(title, left, 22, 0.5)
    low, high = row["calibration_error_95"]
    write(f"ECE {row['calibration_error']:.3f} ({low:.3f} to {high:.3f})", left, 42)
    write("share that was defective", left + 6, top + 16, 0.36)
    write(f"p(anomaly); grey: parts, at most {most}", left, bottom + BAR_ROOM + 40, 0.42)
    return canvas


def measure(options: argparse.Namespace) -> dict:
    families = held_out_families(options.families)
    quiet = not sys.stderr.isatty()
    num_choice = num_normals_needed(options.rate)

    def parts(family: Family) -> tuple[tuple[list[Sample], ...], list[Sample]]:
        rng = np.random.default_rng([family.seed, CHOICE_SEED])
        choice = [draw(family, rng, 0) for _ in range(num_choice)]
        return fixed_samples(family, NUM_REFERENCES, NUM_PARTS, NUM_PARTS), choice

    drawn = [parts(family) for family in track(families, "drawing parts", disable=quiet)]
    results = {}
    with Inspector.open(options.bundle) as inspector:
        for shots in parse_shots(options.shots):
            steps = track(drawn, f"{shots} normal samples", disable=quiet)
            judged = [judge(inspector, *of_family, shots, options.rate) for of_family in steps]
            results[str(shots)] = figures(judged)
    return {
        "families": len(families),
        "rate": options.rate,
        "good_parts_to_choose_on": num_choice,
        "expected_rate": num_above(options.rate, num_choice) / (num_choice + 1),
        "shots": results,
    }


def print_table(results: dict) -> None:
    table = Table(
        title=f"p(anomaly) on {results['families']} held-out families; operating points for a false-reject rate of "
        f"{results['rate']:g}, each chosen on {results['good_parts_to_choose_on']} good parts",
        box=box.SIMPLE_HEAD,
    )
    for name in (
        "normal samples",
        "ECE",
        "95 %",
        "Brier",
        "greedy: false",
        "caught",
        "point: false",
        "caught",
    ):
        table.add_column(name, justify="right")
    for shots, row in results["shots"].items():
        low, high = row["calibration_error_95"]
        rates = [
            row[who][what] for who in ("greedy", "operating_point") for what in ("false_rejects", "caught")
        ]
        table.add_row(
            shots, f"{row['calibration_error']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['brier_score']:.3f}",
            *(f"{rate:.3f}" for rate in rates),
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="bundle folder; by default the bundled model")
    parser.add_argument("--shots", default="0,1,4", help="numbers of normal samples, comma-separated")
    parser.add_argument("--rate", type=float, default=0.1, help="share of good parts that may be rejected")
    parser.add_argument("--families", type=int, default=len(held_out_families()), help="number of families")
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "calibration.json", help="file for the results"
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, help="file for the diagrams")
    options = parser.parse_args()
    try:
        results = measure(options)
    except AgptError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    print_table(results)
    options.json.write_text(json.dumps(results, indent=2) + "\n")
    diagrams = [
        draw_diagram(f"{shots} normal sample{'' if shots == '1' else 's'}", row)
        for shots, row in results["shots"].items()
    ]
    cv2.imwrite(str(options.picture), np.hstack(diagrams))
    print(f"written to {options.json} and {options.picture}")


if __name__ == "__main__":
    main()
