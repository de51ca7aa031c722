"""Rewrites msgspec's validation errors for a user who edits a file or types an option."""

from __future__ import annotations

import re

import msgspec

KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table of names and values",
    "null": "empty",
    "bytes": "bytes",
    "datetime": "a date and time",
    "date": "a date",
    "time": "a time",
}
LIMITS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}


def describe_error(error: msgspec.ValidationError) -> str:
    """ "Expected `int`, got `str` - at `$.rows`" → "rows must be an integer, not a text"."""
    text = str(error)
    found = re.fullmatch(
        r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`(?: in `(?P<outer>[^`]*)`)?)?", text, re.DOTALL
    )
    assert found is not None  # every group may be empty
    what, path = found["what"], found["path"] or "$"
    if found["outer"]:
        return _sentence(what, f"a name in {_place(found['outer'], 'the table')}")
    return _sentence(what, _place(path, "it"))


def _sentence(what: str, place: str) -> str:
    if match := re.fullmatch(r"Object missing required field `(.*)`", what):
        return f"{_inner(place, match[1])} is missing"
    if match := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return f"{_inner(place, match[1])} is not known"
    if match := re.fullmatch(r"Invalid (?:enum )?value (.*)", what, re.DOTALL):
        return f"{place} must not be {match[1]}"
    if match := re.fullmatch(r"Expected `([^`]*)`(.*)", what, re.DOTALL):
        return f"{place} must be {_expected(match[1].split(' | '), match[2])}"
    return what if place == "it" else f"{place}: {what}"  # a message of our own validation code


def _expected(kinds: list[str], rest: str) -> str:
    kind = " or ".join(KINDS.get(kind, kind) for kind in kinds)
    if match := re.fullmatch(r", got `(.*)`", rest):
        return f"{kind}, not {' or '.join(KINDS.get(kind, kind) for kind in match[1].split(' | '))}"
    if match := re.fullmatch(r" (>=|<=|>|<) (.*)", rest):
        return f"{kind}, {LIMITS[match[1]]} {match[2].removesuffix('.0')}"
    if match := re.fullmatch(
        r" (?:of|with) (?:at (?:least|most) )?length (>=|<=|>|<)?\s*(\S+?)(?:, got (.*))?", rest
    ):
        unit = ("character" if kinds[0] == "str" else "item") + ("" if match[2] == "1" else "s")
        limit = f"{LIMITS[match[1]]} " if match[1] else ""
        got = f", not {match[3]}" if match[3] else ""
        return f"{kind} of {limit}{match[2]} {unit}{got}"
    if rest.startswith(" matching regex "):
        return f"{kind} of the required form"
    return f"{kind}{rest}"


def _place(path: str, root: str) -> str:
    """ "$.a.b" → "a.b", "$.a[0]" → "item 1 of a", "$.a[...]" → "an item of a"; ``root`` for "$"."""
    if match := re.fullmatch(r"(.*)\[(\d+|\.\.\.)\]", path):
        item = "an item" if match[2] == "..." else f"item {int(match[2]) + 1}"
        return f"{item} of {_place(match[1], 'the list')}"
    if match := re.fullmatch(r"(.*\])\.([^\]]*)", path):
        return f"{match[2]} in {_place(match[1], 'the list')}"
    return path.removeprefix("$").removeprefix(".") or root


def _inner(place: str, name: str) -> str:
    """The field ``name`` of the table at ``place``."""
    return name if place == "it" else f"{name} in {place}"
