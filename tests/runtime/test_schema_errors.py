"""No word of msgspec reaches the user, whatever is wrong with a value."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from msgspec import Meta

from anomalygpt_edge.runtime.common.schema_errors import describe_error


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Annotated[int, Meta(ge=1, le=9)] = 1
    share: Annotated[float, Meta(gt=0, lt=1)] = 0.5


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=2, max_length=4)]
    mode: Literal["crop", "stretch"] = "crop"
    code: Annotated[str, Meta(pattern="^[a-f]*$")] = ""
    rows: int | None = None
    box: tuple[int, int] = (0, 0)
    mean: Annotated[list[float], Meta(min_length=2, max_length=3)] = []
    inner: Inner = Inner()
    inners: list[Inner] = []
    files: dict[Annotated[str, Meta(max_length=3)], Inner] = {}
    on: bool = False
    one: Annotated[tuple[int, ...], Meta(min_length=1)] = (1,)

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("a name is not bad")


CASES = [
    ({}, "name is missing"),
    ([], "it must be a table of names and values, not a list"),
    ({"name": 3}, "name must be a text, not an integer"),
    ({"name": "a"}, "name must be a text of at least 2 characters"),
    ({"name": "abcde"}, "name must be a text of at most 4 characters"),
    ({"name": "bad"}, "a name is not bad"),
    ({"name": "ab", "rows": "x"}, "rows must be an integer or empty, not a text"),
    ({"name": "ab", "one": []}, "one must be a list of at least 1 item"),
    ({"name": "ab", "mode": "zoom"}, "mode must not be 'zoom'"),
    ({"name": "ab", "code": "xyz"}, "code must be a text of the required form"),
    ({"name": "ab", "on": 1}, "on must be true or false, not an integer"),
    ({"name": "ab", "threshold": 1}, "threshold is not known"),
    ({"name": "ab", "box": [1]}, "box must be a list of 2 items"),
    ({"name": "ab", "box": [1, "x"]}, "item 2 of box must be an integer, not a text"),
    ({"name": "ab", "mean": [1]}, "mean must be a list of at least 2 items"),
    ({"name": "ab", "mean": [1, 2, "x"]}, "item 3 of mean must be a number, not a text"),
    ({"name": "ab", "inner": {"size": 0}}, "inner.size must be an integer, at least 1"),
    ({"name": "ab", "inner": {"size": 10}}, "inner.size must be an integer, at most 9"),
    ({"name": "ab", "inner": {"share": 0}}, "inner.share must be a number, more than 0"),
    ({"name": "ab", "inner": {"share": 1}}, "inner.share must be a number, less than 1"),
    ({"name": "ab", "inner": {"depth": 1}}, "depth in inner is not known"),
    ({"name": "ab", "inners": [{"size": "x"}]}, "size in item 1 of inners must be an integer, not a text"),
    (
        {"name": "ab", "files": {"a": {"size": "x"}}},
        "size in an item of files must be an integer, not a text",
    ),
    ({"name": "ab", "files": {"long": {}}}, "a name in files must be a text of at most 3 characters"),
]


@pytest.mark.parametrize(("value", "said"), CASES, ids=[said for _, said in CASES])
@pytest.mark.parametrize("way", ["convert", "json"])
def test_errors_are_in_plain_words(value: Any, said: str, way: str) -> None:
    read = {
        "convert": lambda: msgspec.convert(value, Outer),
        "json": lambda: msgspec.json.decode(msgspec.json.encode(value), type=Outer),
    }
    with pytest.raises(msgspec.ValidationError) as error:
        read[way]()
    described = describe_error(error.value)
    assert described.removesuffix(", not 1") == said  # the JSON reader does not count
    assert not set("`$") & set(described)
