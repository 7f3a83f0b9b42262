"""Prompts and prefixes give PEFT's numbers when they hold PEFT's parameters."""

import peft
import pytest
import torch

from finegraft.control.near_start import NearStart
from finegraft.grafting import graft
from tests.models import zoo

LENGTH = 3


def pair(name, role, what, config):
    """Ours with a fresh graft, theirs under PEFT, and a batch."""
    ours, batch = zoo.build(name)
    theirs, _ = zoo.build(name)
    made = graft(ours, {"parts": [{"where": role, "what": what}], "heads": "none"})
    theirs = peft.get_peft_model(theirs, config).eval()
    return ours, theirs, made, batch


def agree(ours, theirs, batch, **only_ours):
    y, expected = (zoo.output(model(**batch, **given)) for model, given in ((ours, only_ours), (theirs, {})))
    torch.testing.assert_close(y, expected[:, -y.shape[1] :], atol=2e-5, rtol=1e-4)
    return y, expected


def put(parameter, values):
    with torch.no_grad():
        parameter.copy_(values.reshape(parameter.shape))


@pytest.mark.parametrize(
    ("name", "task"), [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("t5-gated", "SEQ_2_SEQ_LM")]
)
def test_prompt_tuning(name, task):
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=LENGTH, num_transformer_submodules=1)
    what = {"kind": "prompt", "length": LENGTH}
    ours, theirs, made, batch = pair(name, {"role": "input"}, what, config)
    table = theirs.prompt_encoder["default"].embedding.weight
    (slot,) = made.all_slots
    put(slot.prompt, table)
    y, expected = agree(ours, theirs, batch)
    y.square().sum().backward()
    expected[:, -y.shape[1] :].square().sum().backward()
    torch.testing.assert_close(slot.prompt.grad, table.grad, atol=1e-4, rtol=1e-4)


def test_p_tuning():
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, encoder_hidden_size=6, num_transformer_submodules=1
    )
    what = {"kind": "prompt", "length": LENGTH, "hidden": 6}
    ours, theirs, made, batch = pair("llama", {"role": "input"}, what, config)
    encoder = theirs.prompt_encoder["default"]
    (slot,) = made.all_slots
    put(slot.prompt, encoder.embedding.weight)
    for number, layer in enumerate(encoder.mlp_head[::2]):
        put(getattr(slot, f"layer_{number}"), layer.weight)
        put(getattr(slot, f"bias_{number}"), layer.bias)
    theirs.train()  # PEFT runs its perceptron in training alone
    agree(ours, theirs, batch)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("hidden", [None, 6])
def test_prefix_tuning(name, hidden):
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        prefix_projection=hidden is not None,
        encoder_hidden_size=hidden,
        num_attention_heads=2 if name == "llama" else 4,
        token_dim=16 if name == "llama" else 32,
    )
    what = {"kind": "prefix", "length": LENGTH, "hidden": hidden}
    ours, theirs, made, batch = pair(name, {"role": "attention"}, what, config)
    encoder = theirs.prompt_encoder["default"]
    width = config.token_dim
    if hidden is None:
        tables = encoder.embedding.weight.view(LENGTH, -1, 2, width)
        for block, slot in enumerate(made.all_slots):
            put(slot.keys, tables[:, block, 0])
            put(slot.values, tables[:, block, 1])
    else:
        first, _, second = encoder.transform
        for block, slot in enumerate(made.all_slots):
            put(slot.prefix, encoder.embedding.weight)
            put(slot.layer_0, first.weight)
            put(slot.bias_0, first.bias)
            put(slot.layer_1, second.weight.view(-1, 2 * width, hidden)[block])
            put(slot.bias_1, second.bias.view(-1, 2 * width)[block])
    places = torch.arange(zoo.TOKENS)[None] + LENGTH  # PEFT's tokens count on from the prefix
    agree(ours, theirs, batch, position_ids=places)


def test_adaption_prompt():
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=LENGTH, adapter_layers=2)
    what = {"kind": "adaption-prompt", "length": LENGTH, "squash": False}
    ours, theirs, made, batch = pair("llama", {"role": "attention"}, what, config)
    adapted = [module for module in theirs.modules() if hasattr(module, "adaption_gate")]
    for slot, module in zip(made.all_slots, adapted, strict=True):
        put(module.adaption_gate, torch.tensor([0.7]))
        put(slot.gate, module.adaption_gate.expand(4))
        put(slot.prompt, module.adaption_prompt)
    agree(ours, theirs, batch)


def test_context_aware_prompt_tuning():
    ids, types = [5, 9, 7, 11], [1, 2, 3, 4]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * 4,
        cpt_tokens_type_mask=types,
        opt_projection_epsilon=0.4,
        opt_projection_format_epsilon=0.2,
        num_transformer_submodules=1,
        num_virtual_tokens=4,
    )
    what = {"kind": "prompt", "length": 4, "start": "text", "tokens": ids}
    ours, theirs, made, batch = pair("llama", {"role": "input"}, what, config)
    agree(ours, theirs, batch)
    encoder = theirs.prompt_encoder["default"]
    put(encoder.delta_embedding.weight, torch.randn(4, 32) * torch.tensor([[1.0], [1.0], [1e-3], [0.0]]))
    moved = NearStart(types=types, radius=0.4, template_radius=0.2).within(encoder.delta_embedding.weight.detach())
    torch.testing.assert_close(moved, encoder.get_projection(), atol=1e-6, rtol=1e-5)
    (slot,) = made.all_slots
    put(slot.prompt, slot.prompt.detach() + moved)
    agree(ours, theirs, batch)
