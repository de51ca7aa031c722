"""The command that a hint names works where it is read."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from anomalygpt_edge.runtime.common import install
from anomalygpt_edge.runtime.common.install import how_to_install, how_to_install_package


def test_a_wheel_is_extended_from_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert how_to_install("export") == "pip install 'anomalygpt-edge[export]'"
    assert how_to_install_package("typer") == "pip install typer"


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "a clone"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "setup.py").touch()
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(sys, "prefix", str(root / ".venv"))
    return root


def test_a_clone_is_extended_in_its_own_environment(clone, monkeypatch):
    monkeypatch.chdir(clone)
    assert how_to_install("export") == ".venv/bin/pip install -e '.[export]'"
    assert how_to_install_package("typer") == ".venv/bin/pip install typer"


def test_from_another_folder_the_paths_are_whole(clone, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path.parent)
    words = shlex.split(how_to_install("cuda"))
    pip = Path(words[0])
    assert (tmp_path.parent / pip).parent == clone / ".venv" / "bin"
    assert words[1:3] == ["install", "-e"]
    assert (tmp_path.parent / words[3].removesuffix("[cuda]")) == clone
