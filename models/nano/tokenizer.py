"""Nano's vocabulary: sentencepiece BPE with byte fallback and LLaMA's settings, learned from nano's sentences."""

from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

from ..prompts import STOP_PIECE, STOP_STRING
from .config import VOCAB_SIZE
from .dialogues import corpus


def train_tokenizer(path: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write ``tokenizer.model``; the bytes are the same every time.

    Raises:
        ValueError: the stop piece is not a token, so that answers could not end like the original's.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        bos_id=1,
        eos_id=2,
        unk_id=0,
        pad_id=-1,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    tokenizer = load_tokenizer(path)
    if tokenizer.piece_to_id(STOP_PIECE) not in tokenizer.encode("x." + STOP_STRING):
        raise ValueError(f"{STOP_PIECE!r} is not a token of the stop string; change the corpus")


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
