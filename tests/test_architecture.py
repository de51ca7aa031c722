"""The rooms of the house: imports run one way, and nobody reaches for another file's private names."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.imports import ROOT, circles, import_graph, module_files, private_uses

# A room of runtime/ may import the rooms of lower floors. Rooms of one floor do not know each other.
FLOORS = {
    "common": 0,
    "synthetic": 0,
    "bundles": 1,
    "vision": 2,
    "language": 2,
    "recipes": 3,
    "inspection": 4,
    "enrolment": 5,
    "evaluation": 5,
    "cameras": 6,
    "outputs": 7,
    "station": 8,
    "cli": 9,
    "api": 10,
}
# What a package may import of the others: a package, or a room of runtime/.
ALLOWED = {
    "kernels": set(),
    "models": {
        "kernels", "runtime.common", "runtime.bundles", "runtime.synthetic", "runtime.vision", "runtime.evaluation",
    },
    "export": {
        "kernels", "models", "runtime.common", "runtime.bundles", "runtime.synthetic", "runtime.vision",
        "runtime.language",
    },
    "runtime": {"kernels"},
}  # fmt: skip
COMMAND_LINE_TO_EXPORT = ("runtime.cli", "export")  # lazily, for agpt export and agpt doctor --checkpoints


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph()


def room(module: str) -> str:
    """ "runtime.vision" of "runtime.vision.views"; "kernels" of "kernels.maps"."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "runtime" and len(parts) > 1 else parts[0]


def test_no_files_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == []


def test_no_packages_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    packages: dict[str, set[str]] = {}
    for module, imported in graph.items():
        own = room(module)
        targets = {room(target) for target in imported} - {own}
        packages.setdefault(own, set()).update(targets)
    assert circles(packages) == []


def test_imports_run_downwards(graph: dict[str, set[str]]) -> None:
    wrong = []
    for module, imported in graph.items():
        for target in imported:
            own, other = room(module), room(target)
            if own == other or (own, other) == COMMAND_LINE_TO_EXPORT:
                continue
            top, other_top = own.split(".")[0], other.split(".")[0]
            if top == other_top == "runtime":
                allowed = FLOORS[own.split(".")[1]] > FLOORS[other.split(".")[1]]
            else:
                allowed = other in ALLOWED[top] or other_top in ALLOWED[top]
            if not allowed:
                wrong.append(f"{module} imports {target}")
    assert not wrong, "\n".join(sorted(wrong))


def test_every_room_has_a_floor() -> None:
    rooms = {path.name for path in (ROOT / "runtime").iterdir() if (path / "__init__.py").is_file()}
    assert rooms == set(FLOORS)
    assert {path.name for path in (ROOT / "runtime").glob("*.py")} == {"__init__.py"}


def test_private_names_are_used_in_their_own_file_only() -> None:
    scripts = [path for folder in ("benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in [*module_files().values(), *scripts]
        for line, name in private_uses(path)
    ]
    assert not found, "\n".join(found)


def test_the_readers_find_what_they_look_for(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / "runtime" / name).mkdir(parents=True)
        (tmp_path / "runtime" / name / "__init__.py").touch()
    (tmp_path / "runtime/a/x.py").write_text("def f():\n    from ..b import y\n    y.g._hidden\n")
    (tmp_path / "runtime/b/y.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..c.z import Z\n"
    )
    (tmp_path / "runtime/c/z.py").write_text("import anomalygpt_edge.runtime.a.x\n")
    assert circles(import_graph(tmp_path)) == [["runtime.a.x", "runtime.b.y", "runtime.c.z"]]
    assert private_uses(tmp_path / "runtime/a/x.py") == [(3, "_hidden")]
