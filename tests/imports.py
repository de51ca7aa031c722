"""The imports of the project's own code, read from its source: which file imports which."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("export", "kernels", "models", "runtime")
PREFIX = "anomalygpt_edge."
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, whatever they begin with


def module_files(root: Path = ROOT) -> dict[str, Path]:
    """Module name ("runtime.vision.views") → file."""
    files = {}
    for path in (path for package in PACKAGES for path in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        files[name.removesuffix(".__init__")] = path
    return files


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Module → the modules that it imports, inside functions and for type checkers too."""
    files = module_files(root)
    return {name: imports_of(name, path, files) for name, path in files.items()}


def imports_of(name: str, path: Path, known: Iterable[str]) -> set[str]:
    """The known modules that a file imports."""
    known = set(known)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.removeprefix(PREFIX) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (node.module or "").removeprefix(PREFIX)
            if node.level:
                parents = package[: len(package) - node.level + 1]
                base = ".".join([*parents, node.module] if node.module else parents)
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in known else base)
    return (found & known) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of two nodes and more)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def private_uses(path: Path) -> list[tuple[int, str]]:
    """(line, name) of each private attribute or import that belongs to another file's object.

    A file may use the private names that it defines itself; ``self`` and ``cls`` are its own.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    used = [
        (node.lineno, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not _is_self(node.value)
    ]
    used += [
        (node.lineno, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    return [
        (line, name)
        for line, name in used
        if name.startswith("_") and not name.startswith("__") and name not in own | NAMED_TUPLE
    ]


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
