"""CLIP's ids as the original's tokeniser gives them: clip_tokens.json was written by running it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from anomalygpt_edge.models import clip_tokens, prompts
from anomalygpt_edge.models.clip_tokens import CONTEXT_LENGTH, ClipTokenizer, open_tokenizer
from anomalygpt_edge.runtime.common.errors import ConfigError

ORIGINAL = json.loads((Path(__file__).parent / "clip_tokens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return open_tokenizer()


def test_ensembles_of_all_objects(tokenizer):
    assert tuple(ORIGINAL["ensemble"]) == prompts.ENSEMBLE_CLASSES
    assert len(prompts.ENSEMBLE_CLASSES) == 30
    for name, expected in ORIGINAL["ensemble"].items():
        normal, abnormal = prompts.ensemble(name)
        assert (len(normal), len(abnormal)) == (14, 10)
        rows = tokenizer.tokenize(normal + abnormal)
        assert rows.shape == (24, CONTEXT_LENGTH)
        for row, ids in zip(rows.tolist(), expected, strict=True):
            assert row == ids + [0] * (CONTEXT_LENGTH - len(ids))


@pytest.mark.parametrize(("text", "ids"), ORIGINAL["awkward"], ids=lambda value: "")
def test_awkward_texts(tokenizer, text, ids):
    """The file's ids end where the text tower reads: at the largest id, which for a cut text is not its end."""
    row = tokenizer.tokenize([text])[0]
    assert row.tolist()[: len(ids)] == ids
    assert row.argmax() < len(ids)


def test_long_text_is_cut_and_loses_its_end(tokenizer):
    row = tokenizer.tokenize(["word " * 100])[0].tolist()
    assert len(row) == CONTEXT_LENGTH
    assert tokenizer.vocab_size - 1 not in row
    assert tokenizer.vocab_size == 49408


def test_missing_or_foreign_vocabulary_is_one_sentence(monkeypatch, tmp_path):
    file = tmp_path / "vocabulary.txt.gz"
    file.write_bytes(gzip.compress(b"heading\na b\n"))
    monkeypatch.setattr(clip_tokens, "_vocabulary_file", lambda: file)
    with pytest.raises(ConfigError, match=r"another .* than CLIP's"):
        open_tokenizer()
    monkeypatch.undo()
    monkeypatch.setattr(clip_tokens, "PACKAGE", "no_such_package")
    with pytest.raises(ConfigError, match=r"needs open-clip-torch: .*pip install .*--text-features"):
        open_tokenizer()


def test_vocabulary_is_read_without_importing_its_package(tokenizer):
    import sys

    assert "open_clip" not in sys.modules
