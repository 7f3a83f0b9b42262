"""What a site does, read off its path: tables of facts, and the one function that looks things up in them."""

from __future__ import annotations

import re
from typing import NamedTuple

ROLES = (
    "q", "k", "v", "o", "qkv", "up", "gate", "down",
    "embed", "norm", "head", "lm_head", "conv", "router", "other",
)  # fmt: skip
"""Roles of layers and bare tensors.

``qkv`` is any fusion of query, key and value; ``up`` also a fused gate and up projection; ``head`` everything
inside a task head, its norms included; ``embed`` every table or tensor that makes up the input sequence
(words, positions, segments, patches, class tokens); ``other`` what the facts below do not know.
"""
SUBLAYER_ROLES = ("attn", "ffn")
ATTENTION_ROLE = "attention"
INPUT_ROLES = ("input", "decoder_input")
BLOCK_ROLE = "block"
NETWORK_ROLES = ("network", "encoder")


class Fact(NamedTuple):
    """A role, where it holds, and the ends of module paths that have it.

    ``scope`` is what encloses the site: ``"attention"`` or ``"ffn"`` when the nearest telling segment of the
    path says so, ``"block"`` when none does but the path lies inside a numbered block, ``"moe"`` when the
    parent module holds experts, ``"top"`` when the pattern must be the whole path, ``"any"`` without
    condition. With scope ``"type"`` the pattern is held against the type of the site instead.
    """

    role: str
    scope: str
    pattern: str


FACTS = (
    Fact("router", "moe", r"gate"),
    Fact("router", "any", r"router(\.classifier)?|shared_expert_gate|gating"),
    Fact("head", "any", r"\w*classifier(\.\w+)?|classification_head(\.\w+)?"),
    Fact("head", "any", r"score|qa_outputs|seq_relationship"),
    Fact("head", "top", r"(fc|linear|heads?)(\.\w+)?|projector"),
    Fact("lm_head", "any", r"lm_head(\.decoder)?|predictions\.decoder|embed_out"),
    Fact("lm_head", "any", r"vocab_projector|output_projection|lm_loss"),
    Fact("lm_head", "top", r"proj_out"),
    Fact("norm", "type", r"norm"),
    Fact("other", "any", r"relative_attention_bias|rel_pos_bias|relative_position_bias_table"),
    Fact("qkv", "any", r"qkv(_proj)?|c_attn|query_key_value|W_?qkv|W_pack|to_qkv"),
    Fact("qkv", "any", r"to_kv|kv_proj|kv_[ab]_proj(_with_mqa)?"),
    Fact("qkv", "attention", r"in_proj|kv|key_value"),
    Fact("q", "any", r"q_proj|query_proj|q_lin|q_attn|wq|to_q|q_[ab]_proj|linear_q"),
    Fact("q", "attention", r"q|query|query_layer"),
    Fact("k", "any", r"k_proj|key_proj|k_lin|wk|to_k|linear_k"),
    Fact("k", "attention", r"k|key|key_layer"),
    Fact("v", "any", r"v_proj|value_proj|v_lin|wv|to_v|linear_v"),
    Fact("v", "attention", r"v|value|value_layer"),
    Fact("o", "any", r"o_proj|out_lin|to_out(\.0)?"),
    Fact("o", "attention", r"o|[wW]o|out_proj|output\.dense|dense|proj|c_proj|linear_out"),
    Fact("gate", "any", r"gate_proj|wi_0"),
    Fact("gate", "ffn", r"gate|w1"),
    Fact("up", "any", r"up_proj|gate_up_proj|c_fc|dense_h_to_4h|wi|wi_1|fc_in|intermediate_dense"),
    Fact("up", "ffn", r"up|w3|w_1|Wi|fc1|lin1|linear_?1|net\.0\.proj|mlp\.0|layer_1"),
    Fact("up", "block", r"fc1|linear_?1|ffn|intermediate\.dense"),
    Fact("down", "any", r"down_proj|dense_4h_to_h|fc_out|output_dense"),
    Fact("down", "ffn", r"down|w2|w_2|[wW]o|fc2|lin2|linear_?2|c_proj|net\.2|mlp\.[23]|layer_2"),
    Fact("down", "block", r"fc2|linear_?2|ffn_output|output\.dense"),
    Fact("embed", "type", r"embedding"),
    Fact("embed", "any", r"(patch|pos|position|positional|class|token)_embed(ding|dings)?"),
    Fact("embed", "any", r"embed_positions|wpe"),
    Fact("embed", "any", r"patch_embed(ding|dings)?\.proj(ection)?"),
    Fact("embed", "any", r"(cls|class|mask|dist|distillation|reg|register)_tokens?"),
    Fact("conv", "type", r"conv"),
)  # fmt: skip
"""Read from the top; the first fact that holds decides."""

ATTENTION_SEGMENT = re.compile(r"attn|attention", re.IGNORECASE)
FFN_SEGMENT = re.compile(r"mlp|ffn|feed_?forward|densereludense|experts?(_|$)|moe|^ff$", re.IGNORECASE)
CROSS_SEGMENT = re.compile(r"cross|encoder_attn|encdec|multihead_attn", re.IGNORECASE)
EXPERTS_SEGMENT = re.compile(r"^experts?$")
NUMBERED_SEGMENT = re.compile(r"\d+|(\w+_)?(layer|block)_\d+")
"""Names of one block among its like: ``layers.3``, torchvision's ``encoder_layer_3``."""

_ENDS = tuple(
    (role, scope, re.compile(("" if scope == "top" else r"(?:.*\.)?") + f"(?:{pattern})$"))
    for role, scope, pattern in FACTS
)


def enclosing(path: str) -> str | None:
    """``"attention"`` or ``"ffn"``: what the nearest telling segment above the last one says, if any does."""
    for segment in reversed(path.split(".")[:-1]):
        if ATTENTION_SEGMENT.search(segment):
            return "attention"
        if FFN_SEGMENT.search(segment):
            return "ffn"
    return None


def role_of(path: str, type: str, *, in_block: bool, beside_experts: bool) -> str:
    """The role of a site.

    Args:
        path: the module's path, or for a bare tensor the path that :func:`telling_path` gives.
        type: the site's type, such as ``"linear"``.
        in_block: whether the site lies inside a numbered block.
        beside_experts: whether the module's parent also holds experts.
    """
    scope = enclosing(path) or ("block" if in_block else None)
    holds = {"any", "top", scope, "moe" if beside_experts else None}
    for role, where, ends in _ENDS:
        subject = type if where == "type" else path
        if (where == "type" or where in holds) and ends.match(subject):
            return role
    return "other"


def telling_path(path: str, tensor: str) -> str:
    """The part of a bare tensor's name that tells its role: ``in_proj_weight`` reads as ``in_proj``.

    Biases keep their ending, so that no fact about matrices holds for them.
    """
    stem = tensor.removesuffix("weight").removesuffix("_")
    return ".".join(part for part in (path, stem) if part)
