"""A small CLIP tokenizer of its own vocabulary, trained on the captions."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

LENGTH = 24
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789,.!?'-"
_END_OF_WORD = "</w>"
_START, _END = "<|startoftext|>", "<|endoftext|>"
_MERGED_VOCABULARY = 2040


def train_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Train byte-pair merges on the captions and save them as a `CLIPTokenizer` of 24 tokens a caption."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=_END_OF_WORD, unk_token=_END))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=_MERGED_VOCABULARY,
        end_of_word_suffix=_END_OF_WORD,
        initial_alphabet=list(_ALPHABET),
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    model = json.loads(bpe.to_str())["model"]
    vocabulary = model["vocab"]
    for token in [t for c in _ALPHABET for t in (c, c + _END_OF_WORD)] + [_START, _END]:
        vocabulary.setdefault(token, len(vocabulary))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
    special = {"bos_token": _START, "eos_token": _END, "pad_token": _END, "unk_token": _END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True, **special}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)
