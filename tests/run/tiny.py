"""A base of Transformers with a tokenizer, and tables for every kind of task, small enough to train in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTForImageClassification

GOOD, BAD, OTHER = ("fine", "great", "lovely"), ("bad", "poor", "dull"), ("a", "the", "film", "plot", "was", "and")
_SPECIAL = ("[PAD]", "[UNK]")


def write_text_base(folder: Path) -> None:
    """A BERT of two layers, 16 wide, that knows the words above."""
    words = {word: number for number, word in enumerate((*_SPECIAL, *GOOD, *BAD, *OTHER))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.1, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)


def write_image_base(folder: Path) -> None:
    """A ViT of two layers for grey or coloured squares of 8 pixels."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape)).save_pretrained(folder)


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Sentences of 2 to 9 words and whether they praise; the class hangs on the first word."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        words = list(random.choice(OTHER, random.integers(1, 9)))
        words.insert(0, str(random.choice(GOOD if number % 2 else BAD)))
        rows.append((" ".join(words), "praise" if number % 2 else "blame"))
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows as JSON lines; returns the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a text task whose answers follow from the words."""
    pairs = sentences(count, seed)
    if kind == "classification":
        return [{"text": text, "label": label} for text, label in pairs]
    if kind == "regression":
        return [{"text": text, "label": float(label == "praise")} for text, label in pairs]
    if kind == "token-classification":
        split = [text.split() for text, _ in pairs]
        return [{"tokens": words, "label": ["O" if w in OTHER else "X" for w in words]} for words in split]
    return [{"text": text, "text_pair": pairs[0][0], "score": float(label == pairs[0][1])} for text, label in pairs]


def write_images(folder: Path, count: int) -> str:
    """A folder for each of two classes with bright and dark pictures; returns its path as text."""
    random = np.random.default_rng(0)
    for name, centre in (("bright", 200), ("dark", 50)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(random.normal(centre, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)
