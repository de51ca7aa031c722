"""Safe readers of tensor files that need little memory: they read the shapes first, then one tensor at a time.

Pickles are opened with ``weights_only`` (no code runs) and memory-mapped; safetensors files are always memory-mapped.
So a checkpoint may be larger than the memory.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime.common.errors import AgptError

MAX_INDEX_BYTES = 64 << 20
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

ZIP, PICKLE = b"PK", b"\x80"  # first bytes of files of torch.save: from torch 1.6 on, and before

Shape = tuple[int, ...]


class CheckpointError(AgptError):
    """A checkpoint cannot be read, is not the expected one, or does not fit the others."""


@dataclass(frozen=True)
class Tensors(Mapping[str, Tensor]):
    """The tensors of a file or folder by name; reading one checks that its values are finite."""

    path: Path
    shapes: Mapping[str, Shape]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.read(name).detach()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self.path}: {name} contains NaN or infinite values: the file is damaged or its training "
                "diverged; download it again or use an earlier checkpoint"
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def open_tensors(path: Path) -> Tensors:
    """Open a ``.safetensors`` file or a torch pickle (``.pth``, ``.pt``, ``.bin``).

    Raises:
        CheckpointError: the file is missing, truncated, not a tensor file, or a pickle that contains code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: check the path, or download the checkpoint")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _open_pickle(path)


def open_tensor_folder(folder: Path) -> Tensors:
    """Open a Hugging Face model folder: one file, or shards with their index.

    Raises:
        CheckpointError: the folder contains no weights, or a shard is missing, damaged or lacks a tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the Hugging Face folder of the language model")
    for name in INDEX_FILES:
        if (folder / name).is_file():
            return _open_shards(folder, read_json(folder / name))
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return open_tensors(folder / name)
    raise CheckpointError(
        f"{folder} contains no weights: give the folder of the merged Vicuna, not of its delta or tokenizer, with one "
        f"of {', '.join(INDEX_FILES + SINGLE_FILES)}"
    )


def read_json(path: Path) -> dict:
    """Read a JSON object of at most 64 MiB.

    Raises:
        CheckpointError: the file is missing, too large, or not a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: copy the whole model folder")
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(
            f"{path} is over {MAX_INDEX_BYTES >> 20} MiB, so it is not a model's JSON file: copy the model folder again"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object: download it again")
    return content


def _open_safetensors(path: Path) -> Tensors:
    try:
        file = safe_open(path, framework="pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}): download it again"
        ) from error
    return Tensors(path, shapes, file.get_tensor, metadata)


def _open_pickle(path: Path) -> Tensors:
    content = _load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} contains a {type(content).__name__}, not named tensors: give the model's state dict"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor: give the plain state "
                "dict (of a training checkpoint, only its model part)"
            )
    return Tensors(path, {name: tuple(t.shape) for name, t in content.items()}, content.__getitem__)


def _load_pickle(path: Path) -> object:
    """Read a pickle of tensors and plain containers; memory-mapped when the file has torch's zip layout.

    Raises:
        CheckpointError: the file contains code, is truncated, or is not a torch checkpoint.
    """
    with path.open("rb") as file:
        start = file.read(2)
    if start and start != ZIP and start[:1] != PICKLE:
        raise CheckpointError(
            f"{path} is not a torch checkpoint (it may be a web page or a Git LFS pointer): download the file itself"
        )
    try:
        return torch.load(path, map_location="cpu", mmap=(start == ZIP) or None, weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} contains code besides tensors and was not opened: give a checkpoint of plain tensors, and do "
                "not load this file with other tools"
            ) from error
        raise CheckpointError(f"{path} is truncated or not a torch checkpoint: download it again") from error
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        raise CheckpointError(f"{path} is truncated or not a torch checkpoint: download it again") from error


def _open_shards(folder: Path, index: dict) -> Tensors:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder}: the shard index has no weight_map: download it again")
    shards = {
        shard: open_tensors(_shard_path(folder, shard)) for shard in sorted(map(str, weight_map.values()))
    }
    homes = {name: shards[str(shard)] for name, shard in weight_map.items()}
    for name, home in homes.items():
        if name not in home.shapes:
            raise CheckpointError(
                f"{home.path} lacks {name}, which the shard index lists: the shards belong to different downloads; "
                "download all of them again"
            )
    shapes = {name: home.shapes[name] for name, home in homes.items()}
    return Tensors(folder, shapes, lambda name: homes[name].read(name))


def _shard_path(folder: Path, shard: str) -> Path:
    if Path(shard).name != shard:
        raise CheckpointError(
            f"{folder}: the shard index contains {shard!r}, which is not a plain file name: download it again"
        )
    return folder / shard
