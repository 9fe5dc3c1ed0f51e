"""Trains the tiny sentencepiece vocabulary on every prompt there is, and saves it as a T5 tokenizer."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path

import sentencepiece
from transformers import T5Tokenizer

from .. import words

NEGATIVE = "blurry, low quality, still image"


def every_prompt() -> list[str]:
    """The prompts of all 1,280 scenes."""
    return [words.prompt(words.Scene(*names)) for names in itertools.product(*words.CLASSES)]


def train(out: Path) -> None:
    """Writes the tokenizer's files to `out`: pad 0, end of sentence 1, unknown 2, as UMT5 has them."""
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "prompts.txt"
        text.write_text("\n".join([*every_prompt(), NEGATIVE]), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=f"{work}/spiece",
            vocab_size=120,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            hard_vocab_limit=False,
            character_coverage=1.0,
            byte_fallback=False,
        )
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(f"{work}/spiece.model", out / "spiece.model")
    T5Tokenizer.from_pretrained(out, extra_ids=0).save_pretrained(out)
