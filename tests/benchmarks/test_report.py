"""docs/benchmarks.md: it shows the figures in benchmarks/results, and nobody forgets to render it again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


def report(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "report.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A copy of the figures, to change."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


def change(path: Path, *keys: str, value: object) -> None:
    """Set one figure of a file."""
    whole = figures = json.loads(path.read_text())
    for key in keys[:-1]:
        figures = figures[key]
    assert figures[keys[-1]] != value
    figures[keys[-1]] = value
    path.write_text(json.dumps(whole))


def test_the_page_is_current():
    result = report("--check")
    assert result.returncode == 0, result.stderr


def test_a_changed_figure_changes_the_page(results, tmp_path):
    page = tmp_path / "page.md"
    assert report("--results", results, "--page", page).returncode == 0
    assert page.read_bytes() == PAGE.read_bytes()
    change(results / "amd-epyc-2-cpu.json", "demo_line", "inspections_per_second", value=31.46)
    check = report("--results", results, "--page", page, "--check")
    assert check.returncode == 1
    assert "run `python benchmarks/report.py`" in check.stderr
    assert page.read_bytes() == PAGE.read_bytes()  # --check writes nothing
    assert report("--results", results, "--page", page).returncode == 0
    before, after = PAGE.read_text().splitlines(), page.read_text().splitlines()
    changed = [line for line, old in zip(after, before, strict=True) if line != old]
    assert len(changed) == 1
    assert changed[0].startswith("**31.5 inspections per second.**")
    assert report("--results", results, "--page", page, "--check").returncode == 0


def test_check_fails_without_a_page(tmp_path):
    check = report("--page", tmp_path / "none.md", "--check")
    assert check.returncode == 1
    assert "none.md" in check.stderr
    assert not (tmp_path / "none.md").exists()


def test_digits_of_small_errors_are_kept(results, tmp_path):
    page = tmp_path / "page.md"
    path = results / "original_parity.json"
    text = path.read_text().replace("2.3e-3", "2.50e-3")
    assert text != path.read_text()
    path.write_text(text)
    assert report("--results", results, "--page", page).returncode == 0
    assert "| answer logits, f16 | 2.50e-3 relative | 1e-2 |" in page.read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("*.json")))
def test_a_file_that_the_page_shows_is_named_when_it_is_missing(results, tmp_path, name):
    if f"({name})" not in PAGE.read_text().replace("../benchmarks/results/", ""):
        pytest.skip("another machine's or an unpublished benchmark's figures")
    (results / name).unlink()
    result = report("--results", results, "--page", tmp_path / "page.md")
    assert result.returncode == 1
    assert f"{name} does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "page.md").exists()


def test_a_broken_file_and_a_missing_figure_are_named(results, tmp_path):
    path = results / "plans.json"
    good = path.read_text()
    path.write_text(good[:-10])
    result = report("--results", results, "--page", tmp_path / "page.md")
    assert result.returncode == 1
    assert "plans.json is not JSON" in result.stderr
    path.write_text(good.replace("plan_mb", "plan_megabytes"))
    result = report("--results", results, "--page", tmp_path / "page.md")
    assert result.returncode == 1
    assert "plan_mb" in result.stderr
    assert "Traceback" not in result.stderr


def test_links_of_the_page_lead_somewhere():
    page = PAGE.read_text()
    targets = set(re.findall(r"\]\(([^)#]+)\)", page))
    assert "calibration.png" in targets
    assert [target for target in targets if not (PAGE.parent / target).exists()] == []
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", page, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


def test_transcribed_files_state_where_their_figures_come_from():
    names = re.findall(r"\[([\w.-]+)\]\([^)]+\) \(transcribed\)", PAGE.read_text())
    assert names
    for name in names:
        stated = json.loads((RESULTS / name).read_text())
        assert {"transcribed", "command", "machine", "measured"} <= stated.keys(), name


def test_make_bench_renders_the_page_last():
    commands = subprocess.run(
        ["make", "-n", "bench"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    scripts = re.findall(r"benchmarks/\w+\.py", commands)
    assert sorted(scripts) == sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py"))
    assert scripts[-1] == "benchmarks/report.py"
