"""The benchmark scripts as they are called: they run and write plausible figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from anomalygpt_edge.runtime.bundles.bundle import default_bundle
from tools.random_gguf import write_random_gguf

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def test_baselines_see_a_plain_defect(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(3):
        good = rng.integers(100, 110, (224, 224, 3), np.uint8)
        write(tmp_path / "tile" / "train" / "good" / f"{index}.png", good)
        write(tmp_path / "tile" / "test" / "good" / f"{index}.png", rng.permutation(good))
        bad = good.copy()
        bad[84:126, 84:126] = 255
        mask = np.zeros((224, 224), np.uint8)
        mask[84:126, 84:126] = 255
        write(tmp_path / "tile" / "test" / "spot" / f"{index}.png", bad)
        write(tmp_path / "tile" / "ground_truth" / "spot" / f"{index}_mask.png", mask)
    result = script("baselines.py", tmp_path, "--shots", "1,2", "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    hog = figures["HOG + mean/std, Euclidean"]["tile"]["1"]
    assert hog["image_auroc_max"] == hog["image_auroc_top1"] == 1
    assert hog["pixel_auroc"] > 0.98
    grey = figures["mean grey level"]["tile"]["2"]
    assert grey["image_auroc_max"] == 1
    assert grey["pixel_auroc"] is None


def test_baselines_without_a_folder_say_so():
    result = script("baselines.py")
    assert result.returncode == 0
    assert "skipped" in result.stdout
    assert "Traceback" not in script("baselines.py", "/nonexistent").stderr


def test_demo_line_accounts_for_its_time(tiny_bundle, tmp_path):
    result = script(
        "demo_line.py", "--bundle", tiny_bundle, "--inspections", 6, "--device", "x", "--results", tmp_path
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "x.json").read_text())["demo_line"]
    stages = figures["stages_ms"]
    whole = stages.pop("whole")
    assert list(stages) == ["preprocess", "encode", "localise", "prompt", "judge", "decide"]
    assert 0 < sum(stage["mean"] for stage in stages.values()) <= whole["mean"] * 1.001
    assert whole["p50"] <= whole["p99"] <= whole["max"]
    assert sum(figures["statuses"].values()) == 6
    assert figures["inspections_per_second"] > 0
    assert "reference" in figures["in_turns_p50_ms"]
    assert all(0 < each["preprocess"] < each["whole"] for each in figures["in_turns_p50_ms"].values())


def test_calibration_draws_what_it_measures(tmp_path):
    files = ("--json", tmp_path / "c.json", "--picture", tmp_path / "c.png")
    result = script("calibration.py", "--families", 2, "--shots", 1, "--rate", 0.25, *files)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "c.json").read_text())
    row = figures["shots"]["1"]
    assert figures["good_parts_to_choose_on"] == 3
    assert figures["expected_rate"] == 0.25
    assert sum(one["parts"] for one in row["bins"]) == row["parts"] == 2 * 20
    filled = [one for one in row["bins"] if one["parts"]]
    weighted = sum(one["parts"] * abs(one["p"] - one["defective"]) for one in filled) / row["parts"]
    assert abs(row["calibration_error"] - weighted) < 1e-9
    assert row["calibration_error_95"][0] <= row["calibration_error_95"][1]
    picture = cv2.imread(str(tmp_path / "c.png"))
    assert picture is not None
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 5, "lines and points, not an empty square"


def test_nano_limits_compare_parts_with_their_twins(tmp_path):
    result = script("nano_limits.py", "--families", 6, "--json", tmp_path / "figures.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "figures.json").read_text())["nano_limits"]
    assert sum(row["parts"] for row in found["by_area"].values()) == 6 * 5
    pixels = found["pixel_auroc"]["pixels with its twin, lighting matched"]
    assert pixels > found["pixel_auroc"]["another good part in the bank"]


def test_one_pass_and_together_count_passes(tiny_bundle, tmp_path):
    gguf = tmp_path / "one.gguf"
    write_random_gguf(gguf, layers=1, vocabulary=2400)
    common = ("--bundle", tiny_bundle, "--layers", 1, "--gguf", gguf, "--device", "x", "--results", tmp_path)
    result = script("one_pass.py", "--parts", 4, "--answers", 2, *common)
    assert result.returncode == 0, result.stderr
    result = script("together.py", "--rounds", 1, *common)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "x.json").read_text())
    large = figures["one_pass"]["1 layers of 7B, generated weights, q4_k_m"]
    assert large["different_answers"] == figures["one_pass"]["demo_line"]["different_answers"] == 0
    # measured costs decide whether all of an answer is drafted; where it is, one pass accepts it all
    whole = large["accepted_tokens"] == large["steps_per_answer"] - 1
    assert whole == (large["one_pass_share"] == 1)
    tiny, seven = (
        figures["together"]["demo_line"],
        figures["together"]["1 layers of 7B, generated weights, q4_k_m"],
    )
    assert tiny["different_answers"] == seven["different_answers"] == 0
    passes = seven["passes_a_part"]["step by step"]
    assert passes["8"] < passes["1"] / 4, (
        "eight parts share their passes, but for ties that are settled alone"
    )
    passes = tiny["passes_a_part"]["step by step"]
    assert passes["8"] == passes["2"] < passes["1"], "a context of 256 positions has room for two"


def test_choose_gguf_says_what_the_files_really_hold(tiny_bundle, tmp_path):
    options = ("--parts", 4, "--types", "q8_0,q4_k_m", "--device", "x", "--results", tmp_path)
    result = script("choose_gguf.py", "--bundle", tiny_bundle, *options)
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "x.json").read_text())["choose_gguf"]["the bundle's model"]
    rows = figures["types"]
    assert set(rows) == {"f16", "q8_0", "q4_k_m"}
    assert rows["f16"]["verdicts_agree"] == 1
    assert set(rows["q8_0"]["types"]) == {"Q8_0", "F32"}
    assert "Q4_K" not in rows["q4_k_m"]["types"], (
        "rows of 64 values hold no block of 256: llama.cpp replaced it"
    )
    assert rows["q4_k_m"]["megabytes"] < rows["q8_0"]["megabytes"] < rows["f16"]["megabytes"]
    assert figures["recommended"] in rows


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
def test_plans_of_real_graphs_are_measured(tmp_path):
    for name in ("encoder", "decoder", "prompt_learner"):
        shutil.copy(default_bundle() / f"{name}.onnx", tmp_path)
    done = script("plans.py", tmp_path, "--name", "nano", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    networks = json.loads((tmp_path / "plans.json").read_text())["nano"]["networks"]
    assert set(networks) == {"encoder", "decoder", "prompt_learner"}
    for figures in networks.values():
        assert figures["plan_mb"] > 0
        assert figures["peak_resident_gb"] > 0.05
    assert networks["encoder"]["graph_mb"] > networks["decoder"]["graph_mb"]
