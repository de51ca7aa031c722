"""Write docs/records.md and docs/api.md: text from the templates beside this script, the rest from the code.

Run it after a change to the fields of a record, to a public name or to its docstring; a test compares the pages with
the code.

    python -m tools.docs [--check]
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import msgspec
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import anomalygpt_edge as agpt
from anomalygpt_edge.runtime.common import errors
from anomalygpt_edge.runtime.outputs.records import Record

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PAGES = ("records.md", "api.md")
LINE_LENGTH = 100

# The order of docs/api.md. Public names that are missing here come last, errors in a table of their own.
GROUPS = {
    "Inspect": ("Inspector", "Product"),
    "Results": ("Verdict", "Result", "Status", "Region", "ViewResult", "NearestNormal", "Record"),
    "Enrol": ("enroll", "Recipe", "load_recipe", "save_recipe", "MemoryBank"),
    "Bundles and images": ("open_bundle", "Bundle", "read_image"),
    "Stages": ("VisionPipeline", "LanguageModel", "Dialogue", "Answer"),
}

SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises):\s*(.*)")
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \w+)*): (.*)")
SECTION_TITLES = {"Args": "Arguments", "Yields": "Gives"}


class DocsError(Exception):
    """A page cannot be made; the message names what the code lacks."""


# -- records -----------------------------------------------------------------------------------------


def field_tables() -> dict[str, str]:
    """Struct name → Markdown table of its fields, for ``Record`` and every struct that it contains.

    Raises:
        DocsError: a field of a record has no description.
    """
    schema = msgspec.json.schema(Record)["$defs"]
    return {name: field_table(name, entry, schema) for name, entry in schema.items() if "properties" in entry}


def field_table(name: str, entry: dict[str, Any], schema: dict[str, Any]) -> str:
    """Field, type and description, from a struct's JSON schema."""
    rows = ["| field | type | meaning |", "|---|---|---|"]
    for field, value in entry["properties"].items():
        description = value.get("description")
        if description is None and name == "Record":
            raise DocsError(f"{name}.{field} has no description: give it a Meta(description=...)")
        rows.append(f"| `{field}` | {type_name(value, schema)} | {cell(description or '')} |")
    return "\n".join(rows)


def type_name(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """A JSON schema's type in words: "number or null", "list of [Region](#region)"."""
    if "anyOf" in value:
        return " or ".join(type_name(option, schema) for option in value["anyOf"])
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        target = schema[name]
        return f"[{name}](#{name.lower()})" if "properties" in target else type_name(target, schema)
    if "enum" in value:
        return " or ".join("null" if option is None else f'`"{option}"`' for option in value["enum"])
    if value.get("type") == "array":
        if "prefixItems" in value:
            return f"list of {len(value['prefixItems'])} numbers"
        return f"list of {type_name(value['items'], schema)}"
    if value.get("type") == "object":
        return f"object of {type_name(value['additionalProperties'], schema)}s"
    return value["type"]


# -- the Python interface ----------------------------------------------------------------------------


def groups() -> dict[str, list[str]]:
    """Title → public names, without the errors."""
    public = [name for name in agpt.PUBLIC if not is_error(getattr(agpt, name))]
    grouped = {title: [name for name in names if name in public] for title, names in GROUPS.items()}
    others = [name for name in public if not any(name in names for names in GROUPS.values())]
    return {title: names for title, names in {**grouped, "Other names": others}.items() if names}


def is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, BaseException)


def error_table() -> str:
    """Every error of the package, with its docstring; public ones in bold."""
    rows = ["| error | raised when |", "|---|---|"]
    for name, value in vars(errors).items():
        if is_error(value):
            shown = f"**`{name}`**" if name in agpt.PUBLIC else f"`{name}`"
            rows.append(f"| {shown} | {cell(markup(docstring(name, value)))} |")
    return "\n".join(rows)


def entry(name: str) -> str:
    """One public name: its signature or fields, docstring, and public methods."""
    value = getattr(agpt, name)
    if isinstance(value, FunctionType):
        return f"{code(signature(name, value))}\n\n{markdown(docstring(name, value))}"
    parts = [markdown(docstring(name, value)), fields_of(value)]
    for member, kind, function in members(value):
        qualified = f"{name}.{member}" if kind == "classmethod" else member
        text = markdown(docstring(f"{name}.{member}", function))
        if kind == "property":
            result = function.__annotations__["return"]
            parts.append(f"**`{member}`** → `{result}`\n\n{text}")
        else:
            parts.append(f"{code(signature(qualified, function))}\n\n{text}")
    return "\n\n".join(filter(None, parts))


def docstring(name: str, value: Any) -> str:
    """
    Raises:
        DocsError: there is none.
    """
    text = value.__doc__
    if not text:
        raise DocsError(f"{name} has no docstring: write one, or make the name private")
    return inspect.cleandoc(text)


def members(owner: type) -> Iterator[tuple[str, str, Any]]:
    """Public methods and properties that a class defines itself: name, kind, function."""
    for name, value in vars(owner).items():
        if name.startswith("_"):
            continue
        if isinstance(value, (classmethod, staticmethod)):
            yield name, "classmethod", value.__func__
        elif isinstance(value, FunctionType):
            yield name, "method", value
        elif isinstance(value, property) or hasattr(value, "func"):  # cached_property
            yield name, "property", value.fget if isinstance(value, property) else value.func


def fields_of(owner: type) -> str:
    """Fields of a struct whose docstring lists no attributes; those of a record are on its own page."""
    if not issubclass(owner, msgspec.Struct) or "Attributes:" in (owner.__doc__ or ""):
        return ""
    if any("description" in value for value in schema_fields(owner).values()):
        return f"Fields: see [records](records.md{anchor(owner)})."
    rows = ["| field | type | default |", "|---|---|---|"]
    for field in msgspec.structs.fields(owner):
        kind = owner.__annotations__[field.name]
        default = "" if field.default is msgspec.NODEFAULT else f"`{field.default!r}`"
        rows.append(f"| `{field.name}` | `{cell(kind)}` | {default} |")
    return "\n".join(rows)


def schema_fields(owner: type) -> dict[str, Any]:
    """Field → its JSON schema; empty for a struct that JSON cannot hold (a verdict with its maps)."""
    try:
        return msgspec.json.schema(owner)["$defs"][owner.__name__]["properties"]
    except TypeError:
        return {}


def anchor(owner: type) -> str:
    """Where docs/records.md has the fields: a record repeats those of a result."""
    own = {"Result": "record"}.get(owner.__name__, owner.__name__.lower())
    return f"#{own}"


def signature(name: str, function: Any) -> str:
    """As in the source, without self and cls; one parameter a line where it is long."""
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    shown: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        text = f"{parameter.name}: {parameter.annotation}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            called = getattr(default, "__name__", None)
            text += f" = {'...' if called == '<lambda>' else called or repr(default)}"
        shown.append(text)
    result = function.__annotations__.get("return")
    tail = f" -> {result}" if result not in (None, "None") else ""
    line = f"{name}({', '.join(shown)}){tail}"
    if len(line) <= LINE_LENGTH:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in shown) + f"){tail}"


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def markdown(text: str) -> str:
    """A docstring with its sections (Args, Attributes, Returns, Raises) as lists."""
    paragraphs: list[str] = []
    plain: list[str] = []
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        found = SECTION.fullmatch(line)
        if not found:
            plain.append(line)
            continue
        body = [found[2]] if found[2] else []
        indented = bool(lines) and lines[0].startswith(" ")
        while lines and not SECTION.fullmatch(lines[0]):
            if not lines[0].strip():
                following = next(filter(str.strip, lines), "")
                if indented and not following.startswith(" "):
                    break
            body.append(lines.pop(0))
        paragraphs += ["\n".join(plain).strip(), section(found[1], body)]
        plain = []
    paragraphs.append("\n".join(plain).strip())
    return markup("\n\n".join(filter(None, paragraphs)))


def section(name: str, body: list[str]) -> str:
    """One section of a docstring; its entries, "name: text" each, as a list."""
    body = inspect.cleandoc("\n" + "\n".join(body)).splitlines()
    title = SECTION_TITLES.get(name, name)
    if name in ("Returns", "Yields"):
        return f"{title}: {' '.join(body)}"
    entries: list[str] = []
    for line in body:
        found = None if line.startswith(" ") else ENTRY.fullmatch(line)
        if found:
            names = ", ".join(f"`{each}`" for each in found[1].split(", "))
            entries.append(f"- {names}: {found[2]}")
        elif line.strip():
            entries[-1] += f" {line.strip()}"
    return f"{title}:\n\n" + "\n".join(entries)


def markup(text: str) -> str:
    """reStructuredText's code marks as Markdown's."""
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


# -- pages -------------------------------------------------------------------------------------------


def render(page: str) -> str:
    """A page as Markdown.

    Raises:
        DocsError: the code lacks a description or docstring.
    """
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(fields=field_tables, groups=groups, entry=entry, errors=error_table)
    return environment.get_template(f"{page}.jinja").render()


def main() -> int:
    """Exit status: 0 if the pages are written or current, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not current")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pages")
    options = parser.parse_args()
    stale = []
    for page in PAGES:
        path = options.out / page
        try:
            text = render(page)
        except DocsError as error:
            print(f"tools.docs: {error}", file=sys.stderr)
            return 1
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            stale.append(page)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    if stale:
        print(f"{', '.join(stale)} not current: run `python -m tools.docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
