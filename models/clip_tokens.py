"""CLIP's byte-pair tokeniser, for the text tower's sentences.

The vocabulary is not part of this project: it is read from the package open-clip-torch (extra "export"), whose
code is not imported, and checked by its digest. Source of the algorithm: Radford et al., "Learning
Transferable Visual Models From Natural Language Supervision", ICML 2021, and Sennrich et al., ACL 2016.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.util
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.common.errors import ConfigError
from ..runtime.common.install import how_to_install

PACKAGE, FILE = "open_clip", "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY_SHA256 = (
    "67603cfda2e032ad77b5f8808af37789d590db664b26df8705d2bf8b3c553fc8"  # of the decompressed text
)
NUM_MERGES = 49152 - 256 - 2
CONTEXT_LENGTH = 77

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Converts text to CLIP's token ids.

    Args:
        merges: pairs of pieces to merge, the most frequent first.

    Raises:
        ConfigError: a package that it needs is not installed.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]) -> None:
        try:
            import ftfy
            import regex
        except ImportError as error:
            raise ConfigError(_missing(str(error.name))) from error
        self._fix_text = ftfy.fix_text
        self._words = regex.compile(WORDS, regex.IGNORECASE)
        self._byte_letters = byte_letters()
        letters = list(self._byte_letters.values())
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        pieces = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
        self._ids = {piece: index for index, piece in enumerate(pieces)}
        self._pieces_of: dict[str, list[str]] = {START: [START], END: [END]}

    @property
    def vocab_size(self) -> int:
        return len(self._ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without start and end tokens, after repairing mojibake and HTML escapes, collapsing
        white space and lowering the case."""
        repaired = html.unescape(html.unescape(self._fix_text(text)))
        folded = " ".join(repaired.split()).lower()
        return [self._ids[piece] for word in self._words.findall(folded) for piece in self._pieces(word)]

    def tokenize(self, texts: Iterable[str], length: int = CONTEXT_LENGTH) -> Tensor:
        """int64 [B, length]: start token, text, end token, zeros. A longer text is truncated and loses its end token,
        as in CLIP's first version and in the original."""
        rows = [[self._ids[START], *self.encode(text), self._ids[END]][:length] for text in texts]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.long)

    def _pieces(self, word: str) -> list[str]:
        if word not in self._pieces_of:
            letters = [self._byte_letters[byte] for byte in word.encode("utf-8")]
            self._pieces_of[word] = self._merge([*letters[:-1], letters[-1] + WORD_END])
        return self._pieces_of[word]

    def _merge(self, pieces: list[str]) -> list[str]:
        """Merge the most frequent pair of neighbours, at all its places, until no known pair is left."""
        while len(pieces) > 1:
            pairs = set(pairwise(pieces))
            pair = min(pairs, key=lambda candidate: self._ranks.get(candidate, len(self._ranks)))
            if pair not in self._ranks:
                break
            pieces = _join(pieces, pair)
        return pieces


def open_tokenizer() -> ClipTokenizer:
    """The tokeniser with CLIP's own vocabulary.

    Raises:
        ConfigError: the package that contains the vocabulary is not installed, or its file differs from CLIP's.
    """
    text = gzip.decompress(_vocabulary_file().read_bytes())
    if hashlib.sha256(text).hexdigest() != VOCABULARY_SHA256:
        raise ConfigError(
            f"the package open-clip-torch contains another {FILE} than CLIP's: "
            "reinstall it, or give --text-features"
        )
    lines = text.decode("utf-8").splitlines()[1 : 1 + NUM_MERGES]  # the first line is a heading
    merges = [(left, right) for left, right in map(str.split, lines)]
    return ClipTokenizer(merges)


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in the order of the ids: a printable byte stands for itself."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    skip = False
    for left, right in zip(pieces, [*pieces[1:], ""], strict=True):
        if skip:
            skip = False
        elif (left, right) == pair:
            joined.append(left + right)
            skip = True
        else:
            joined.append(left)
    return joined


def _vocabulary_file() -> Path:
    """Path of the vocabulary, found without importing the package, whose imports take long.

    Raises:
        ConfigError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    path = Path(spec.origin).with_name(FILE) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(_missing("open-clip-torch"))
    return path


def _missing(package: str) -> str:
    return f"computing text features needs {package}: {how_to_install('export')}, or give --text-features"
