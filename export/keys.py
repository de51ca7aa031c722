"""Compares the keys and shapes of a checkpoint with those of a network; errors name the differences and the cause."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .tensor_files import CheckpointError, Shape, Tensors

MAX_NAMED = 3  # keys listed in an error


def module_shapes(kind: Callable[..., nn.Module], *args: object) -> dict[str, Shape]:
    """Parameter names and shapes of a module, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in kind(*args).state_dict().items()}


def check_keys(path: Path, present: Mapping[str, Shape], expected: Mapping[str, Shape], cause: str) -> None:
    """Check that a file has exactly the expected keys and shapes.

    Raises:
        CheckpointError: names missing, unexpected and mis-shaped keys, and ``cause``.
    """
    wrong = [key for key in expected if key in present and present[key] != expected[key]]
    findings = []
    if missing := [key for key in expected if key not in present]:
        findings.append(f"lacks {name_some(missing)}")
    if extra := [key for key in present if key not in expected]:
        findings.append(f"has unexpected {name_some(extra)}")
    if wrong:
        key = wrong[0]
        findings.append(
            f"has {name_some(wrong)} of another shape ({present[key]} instead of {expected[key]})"
        )
    if findings:
        raise CheckpointError(f"{path} {' and '.join(findings)}: {cause}")


def name_some(keys: Iterable[str]) -> str:
    """The first keys, and the number of the others."""
    names = list(keys)
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def shape_of(tensors: Tensors, key: str, dims: int) -> Shape:
    """Shape of a tensor that must exist and have ``dims`` axes.

    Raises:
        CheckpointError: it does not.
    """
    if key not in tensors.shapes:
        raise CheckpointError(
            f"{tensors.path} lacks {key}: the file is incomplete, its keys were renamed, or it belongs to another "
            "model; download it again"
        )
    shape = tensors.shapes[key]
    if len(shape) != dims or min(shape) < 1:
        raise CheckpointError(f"{tensors.path}: {key} has shape {shape} instead of {dims} axes")
    return shape


def count_layers(tensors: Tensors, prefix: str) -> int:
    """1 + the highest block index under a prefix (``check_keys`` reports a gap as missing keys)."""
    pattern = re.compile(prefix + r"(\d+)\.")
    return 1 + max((int(match[1]) for key in tensors if (match := pattern.match(key))), default=-1)


def read_metadata(tensors: Tensors, key: str, default: Any) -> Any:
    """A JSON value of the file's metadata.

    Raises:
        CheckpointError: the value is not JSON.
    """
    if key not in tensors.metadata:
        return default
    try:
        return json.loads(tensors.metadata[key])
    except ValueError as error:
        raise CheckpointError(
            f"{tensors.path}: metadata {key!r} is not JSON: save the checkpoint again"
        ) from error
