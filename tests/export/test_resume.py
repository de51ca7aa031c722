"""Which files of an interrupted export the next run reuses."""

from __future__ import annotations

import pytest

from anomalygpt_edge.export.resume import FinishedStages


@pytest.fixture
def folder(tmp_path):
    return tmp_path / ".bundle.partial"


def write(folder, name, content=b"content"):
    """A stage that writes one file and says so."""

    def make() -> str:
        (folder / name).write_bytes(content)
        return name.upper()

    return make


def never() -> str:
    raise AssertionError("the stage was finished")


def test_finished_stages_are_not_made_again(folder):
    FinishedStages(folder, {"seed": 1}).run("a", write(folder, "a"), str)
    again = FinishedStages(folder, {"seed": 1})
    assert again.run("a", never, str) == "A"
    assert again.run("b", write(folder, "b"), str) == "B"
    assert set(FinishedStages(folder, {"seed": 1}).stages) == {"a", "b"}


def test_other_inputs_start_anew(folder):
    FinishedStages(folder, {"seed": 1}).run("a", write(folder, "a"), str)
    assert not FinishedStages(folder, {"seed": 2}).stages
    assert not list(folder.iterdir())


@pytest.mark.parametrize("damage", ["altered", "missing", "link", "list cut", "list of another kind"])
def test_damage_is_seen(folder, tmp_path, damage):
    finished = FinishedStages(folder, {})
    finished.run("a", write(folder, "a"), str)
    if damage == "altered":
        (folder / "a").write_bytes(b"c0ntent")
    elif damage in ("missing", "link"):
        (folder / "a").rename(tmp_path / "elsewhere")
        if damage == "link":
            (folder / "a").symlink_to(tmp_path / "elsewhere")
    else:
        content = finished.path.read_bytes()
        finished.path.write_bytes(content[: len(content) // 2] if damage == "list cut" else b"[1, 2]")
    assert not FinishedStages(folder, {}).stages
    assert not list(folder.iterdir())


def test_half_written_files_go(folder):
    finished = FinishedStages(folder, {})
    finished.run("a", write(folder, "a"), str)
    (folder / "half").write_bytes(b"h")
    (folder / "sub").mkdir()
    with pytest.raises(KeyError):
        finished.run("b", lambda: {}["stop"], str)
    assert [entry.name for entry in folder.iterdir() if entry.name == "a"] == ["a"]
    FinishedStages(folder, {})
    assert [entry.name for entry in folder.iterdir()] == ["a"]


def test_a_path_outside_the_folder_is_ignored(folder, tmp_path):
    (tmp_path / "secret").write_bytes(b"content")
    finished = FinishedStages(folder, {})
    finished.run("a", write(folder, "a"), str)
    finished.path.write_bytes(finished.path.read_bytes().replace(b'{"a":', b'{"../secret":'))
    assert not FinishedStages(folder, {}).stages
    assert (tmp_path / "secret").exists()


def test_nothing_finished_leaves_nothing(folder):
    FinishedStages(folder, {}).close()
    assert not list(folder.parent.iterdir())
