"""Bytes kept for backward, against the floor: gradient crosses the depth, nothing kept for weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finegraft.grafting import graft
from finegraft.testing.memory import floor_bytes, held_bytes, saved_bytes


def build():
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        vocab_size=1000,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(shape).to(torch.bfloat16).train()
    ids = torch.randint(0, shape.vocab_size, (4, 128))
    return model, {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings", "bound"),
    [
        ("lora", {"rank": 8}, 1.25),
        ("lora", {"rank": 8, "dropout": 0.05}, 1.3),
        ("lora-fa", {"rank": 8}, 1.02),
        ("dora", {"rank": 8}, 1.8),
        ("s2ft", {"density": 0.01}, 1.03),
    ],
)
def test_no_more_is_kept_than_needed(method, settings, bound):
    base, batch = build()
    floor = floor_bytes(base, lambda: base(**batch).loss).total
    model, _ = build()
    graft(model, method, **settings)
    assert saved_bytes(model, lambda: model(**batch).loss).total <= bound * floor
    assert held_bytes(model, lambda: model(**batch).loss).total <= bound * floor
