"""Processes that die and disks that fill, in every stage: the next run goes on, and ends with the same bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from anomalygpt_edge.export import pipeline
from anomalygpt_edge.export.options import ExportOptions
from anomalygpt_edge.export.pipeline import export_bundle
from anomalygpt_edge.runtime.bundles.bundle import open_bundle
from anomalygpt_edge.runtime.common.errors import ConfigError

ROLES = ("imagebind", "vicuna", "pandagpt", "anomalygpt", "text-features")
# In their order; those of the journal, and between them what makes no files.
STAGES = (
    "Check the checkpoints",
    "Digest the checkpoints",
    "text features",
    "networks",
    "language model",
    "Parity with the checkpoints",
    "networks fp16",
    "quantised language model",
    "Answers as published",
    "Seal and publish",
    "publish",
)


@pytest.fixture(scope="module")
def undisturbed(small, exported, tmp_path_factory) -> dict[str, object]:
    """Name → record of every file that an export in one piece publishes, fp16 and q8_0."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "export_networks", dying().copy_graphs(exported.bundle))
        out = tmp_path_factory.mktemp("undisturbed") / "bundle"
        export_bundle(ExportOptions(*small.paths, out=out, precision="fp16", llm_quant="q8_0"))
    return open_bundle(out).manifest.files


def dying() -> ModuleType:
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location(
        "dying_exports", Path(__file__).with_name("dying_exports.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def export_and_die(small, exported, out: Path, stages: tuple[str, ...], how: str) -> list[list]:
    """Run the script; [stage, wait status, standard error] of each process, the undisturbed one last."""
    options = [word for pair in zip(ROLES, small.paths, strict=True) for word in (f"--{pair[0]}", pair[1])]
    script = Path(__file__).with_name("dying_exports.py")
    command = [sys.executable, script, exported.bundle, ",".join(stages), how, *options, "--out", out]
    command += ["--precision", "fp16", "--llm-quant", "q8_0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_export_killed_in_every_stage_goes_on(small, exported, undisturbed, tmp_path):
    out = tmp_path / "bundle"
    *deaths, (_, last, words) = export_and_die(small, exported, out, STAGES, "SIGKILL")
    assert [stage for stage, _, _ in deaths] == list(STAGES)
    assert all(os.WTERMSIG(status) == signal.SIGKILL for _, status, _ in deaths), deaths
    assert last == 0, words
    assert open_bundle(out).manifest.files == undisturbed
    assert list(tmp_path.iterdir()) == [out]


def test_interrupted_export_says_how_to_go_on(small, exported, undisturbed, tmp_path):
    """Ctrl-C: nothing half written stays, and only where something is finished there is anything to go on from."""
    out = tmp_path / "bundle"
    stages = ("Check the checkpoints", "text features", "quantised language model")
    *stopped, (_, last, words) = export_and_die(small, exported, out, stages, "SIGINT")
    assert [os.WEXITSTATUS(status) for _, status, _ in stopped] == [130] * 3
    nothing = "agpt: interrupted\n"
    going_on = "agpt: interrupted: the same command goes on from the last finished stage\n"
    assert [said for _, _, said in stopped] == [nothing, nothing, going_on]
    assert last == 0, words
    assert open_bundle(out).manifest.files == undisturbed
    assert list(tmp_path.iterdir()) == [out]


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of its own whose size a test can change."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # mapped files may wait for the garbage collector


def test_disk_full_in_every_stage(small, exported, undisturbed, disk, monkeypatch):
    """The disk holds what is finished, the next stage and half of the one after it; then it grows."""
    monkeypatch.setattr(pipeline, "export_networks", dying().copy_graphs(exported.bundle))
    monkeypatch.setattr(pipeline, "check_disk", lambda *given: None)  # others took the space since it looked
    options = ExportOptions(*small.paths, out=disk / "bundle", precision="fp16", llm_quant="q8_0")
    graphs = sum((exported.bundle / f"{name}.onnx").stat().st_size for name in pipeline.NETWORKS)
    whole = (exported.bundle / "llm.gguf").stat().st_size
    stages = {
        "text features": 4096,
        "networks": graphs,
        "language model": whole,
        "networks fp16": graphs // 2,
        "quantised language model": whole // 2,
    }
    before = 0
    for index, (stage, size) in enumerate(stages.items()):
        grow(disk, before + size // 2)
        with pytest.raises(ConfigError, match=r"(No space left|not written whole).*same command again"):
            export_bundle(options)
        journal = disk / ".bundle.partial.json"
        finished = json.loads(journal.read_text())["stages"] if journal.exists() else {}
        assert list(finished) == list(stages)[:index], stage
        before = size + 16384  # and the journal
    grow(disk, 1 << 24)
    export_bundle(options)
    assert open_bundle(options.out).manifest.files == undisturbed
    assert list(disk.iterdir()) == [options.out]


def grow(disk: Path, num_bytes: int) -> None:
    """Make room for so many bytes more than lie there."""
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())
    size = max(used + num_bytes, 4096)
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
