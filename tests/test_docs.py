"""README and docs: short enough, no dead link, generated pages current, and what they tell people to type works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import msgspec
import pytest

from anomalygpt_edge.runtime.common import errors
from anomalygpt_edge.runtime.outputs.records import Record
from anomalygpt_edge.runtime.synthetic.line import FRAME_SIZE, normal_sample, render_line

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "SECURITY.md", "CHANGELOG.md", "models/nano/MODEL_CARD.md")]
PAGES += sorted(DOCS.glob("*.md"))
MAX_README_BYTES = 8192

# Pages whose commands run here, in their order; a page may use what the one before has made.
TRIED = ("README.md", "docs/quickstart.md", "docs/recipes.md", "docs/deployment.md")
# Beginnings of commands that do not run here, and why.
SKIPPED = {
    "sudo apt install": "changes the system",
    "make ": "makes the environment, or runs this suite; tests/test_packaging.py checks the targets",
    "python3 -m venv": "makes an environment",
    "/opt/agpt/bin/": "needs an installation there",
    "build-venv/bin/pip wheel": "builds wheels from the network for minutes",
    "CMAKE_ARGS=": "compiles llama.cpp",
    "rm -rf /opt/agpt": "deletes what other people may have there",
    ".venv/bin/agpt run --source 0": "needs a camera",
    "agpt doctor --checkpoints": "needs the original's checkpoints",
    "agpt export": "needs the original's checkpoints, or a GPU",
    "agpt verify bundle-7b": "needs a bundle of the original",
}
PRODUCT = "tablet tray"
NUM_GOOD, NUM_PARTS = 10, 8  # a false-reject rate of 0.1 needs nine good parts


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language, without the indentation of a list."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.M | re.S)
    return [re.sub(rf"^{indent}", "", code, flags=re.M) for indent, code in found]


def commands(page: str) -> list[str]:
    """The commands of a page's sh blocks, one a line, without comments."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    return [command for line in lines if (command := re.sub(r"\s+#.*", "", line).strip())]


def skipped_by(command: str) -> str | None:
    return next((beginning for beginning in SKIPPED if command.startswith(beginning)), None)


def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a reader has: the environment's programs, pictures of good parts, pictures to inspect, labelled ones."""
    folder = tmp_path_factory.mktemp("reader")
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    main = "from anomalygpt_edge.runtime.cli.main import main; main()"
    for name, arguments in {"python": '"$@"', "agpt": f"-c '{main}' \"$@\""}.items():
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n', encoding="utf-8")
        script.chmod(0o755)
    (folder / "models").symlink_to(ROOT / "models")
    labelled = [folder / "labelled" / name for name in ("train/good", "test/good", "test/scratch")]
    masks = folder / "labelled/ground_truth/scratch"
    for path in (folder / "good", folder / "parts", *labelled, masks):
        path.mkdir(parents=True)
    for index in range(NUM_GOOD):
        cv2.imwrite(str(folder / f"good/{index + 1:02d}.png"), normal_sample(PRODUCT, index))
    parts = [part for part in render_line(60) if part.product == PRODUCT][:NUM_PARTS]
    assert [bool(part.defects) for part in parts] == [False] * 6 + [True] * 2  # as quickstart.md says
    for number, part in enumerate(parts, start=1):
        cv2.imwrite(str(folder / f"parts/{number:02d}.png"), part.frame)
    for index in range(4):
        cv2.imwrite(str(labelled[0] / f"{index}.png"), normal_sample(PRODUCT, index))
    cv2.imwrite(str(labelled[1] / "0.png"), parts[0].frame)
    cv2.imwrite(str(labelled[2] / "0.png"), parts[-1].frame)
    cv2.imwrite(str(masks / "0_mask.png"), 255 * parts[-1].mask.astype("uint8"))
    return folder


def run(folder: Path, command: list[str]) -> str:
    """Standard output of a command that must succeed."""
    environ = {**os.environ, "PATH": f"{folder}/.venv/bin:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


# -- what the pages tell people to do ------------------------------------------------------------------


@pytest.mark.parametrize("page", TRIED)
def test_the_commands_work(folder: Path, page: str) -> None:
    tried = [command for command in commands(page) if skipped_by(command) is None]
    assert tried
    done = folder / "done.txt"  # a command that stands on several pages runs once
    done.touch()
    for command in tried:
        same = command.removeprefix(".venv/bin/")
        if same not in done.read_text(encoding="utf-8").splitlines():
            run(folder, ["bash", "-o", "pipefail", "-c", command])
            with done.open("a", encoding="utf-8") as file:
                file.write(f"{same}\n")


@pytest.mark.parametrize("page", ["README.md", "docs/api.md"])
def test_the_python_example_works(folder: Path, page: str) -> None:
    if not (folder / "tray.toml").exists():
        enrolment = ["--name", "tray", "--normal", "good", "--resize", "crop", "--out", "tray.toml"]
        run(folder, ["agpt", "enroll", *enrolment])
    code = blocks(page, "python")[0]
    assert len(code.splitlines()) <= 10
    assert run(folder, ["python", "-c", code]).startswith("FAIL 0.9")


def test_every_skipped_command_is_still_there() -> None:
    used = {skipped_by(command) for page in TRIED for command in commands(page)}
    assert used - {None} == set(SKIPPED)


def test_frames_are_as_large_as_the_pages_say() -> None:
    height, width = FRAME_SIZE
    assert f"({width} × {height}, four normal samples)" in (ROOT / "README.md").read_text(encoding="utf-8")


# -- the pages -----------------------------------------------------------------------------------------


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= MAX_README_BYTES


def test_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in DOCS.glob("*.md") if f"(docs/{path.name}" not in readme] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{path.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{path.name} links to {target}"


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:runtime|kernels|models|export|tests|tools|benchmarks)/[\w/.]*)`", text))
    for folder, files in re.findall(r"`(runtime/\w+/)`: ((?:`\w+\.py`(?:, )?)+)", text):
        names |= {folder + name for name in re.findall(r"`(\w+\.py)`", files)}
    assert [name for name in sorted(names) if not (ROOT / name).exists()] == []
    assert page == "README.md" or len(names) > 25


def test_the_architecture_page_names_every_package() -> None:
    table = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## Packages of runtime/")[2]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))))
    assert named == {path.parent.name for path in (ROOT / "runtime").glob("*/__init__.py")}


def test_the_example_record_is_one() -> None:
    (example,) = blocks("docs/records.md", "json")
    record = msgspec.json.decode(example.encode(), type=Record)
    assert msgspec.json.decode(example) == msgspec.json.decode(msgspec.json.encode(record))


# -- generated pages -----------------------------------------------------------------------------------


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.docs", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def test_generated_pages_are_current() -> None:
    result = generate("--check")
    assert result.returncode == 0, result.stderr


def test_check_notices_a_page_that_is_not_current(tmp_path: Path) -> None:
    assert generate("--out", tmp_path).returncode == 0
    assert generate("--out", tmp_path, "--check").returncode == 0
    page = tmp_path / "records.md"
    page.write_text(page.read_text(encoding="utf-8").replace("`p_anomaly`", "`probability`"))
    result = generate("--out", tmp_path, "--check")
    assert result.returncode == 1
    assert result.stderr == "records.md not current: run `python -m tools.docs`\n"


def test_every_field_and_every_error_is_explained() -> None:
    records = (DOCS / "records.md").read_text(encoding="utf-8")
    assert [name for name in Record.__struct_fields__ if f"| `{name}` |" not in records] == []
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    raised = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert len(raised) >= 10
    assert [name for name in raised if f"`{name}`" not in api] == []
