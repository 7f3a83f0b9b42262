"""What every model of the zoo holds, by hand: name, type, role and shape; blocks once per stack.

What follows ``/`` are tied names. Sublayers and attention calls are not listed.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One layer or bare tensor."""

    type: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()


def rows(model: str) -> dict[str, Row]:
    """Expected layers and bare tensors of a model, by name."""
    table: dict[str, Row] = {}
    for prefix, blocks, text in TABLES[model]:
        for block in blocks:
            start = prefix.format(*block) if block else prefix
            layer = block[-1] if block else None
            for line in text.strip().splitlines():
                facts, _, tied = line.partition("/")
                name, type, role, shape = facts.split()
                numbers = () if shape == "scalar" else tuple(map(int, shape.split("x")))
                table[start + name] = Row(type, role, layer, numbers, tuple(tied.split()))
    return table


ONCE = ((),)
TWICE = ((0, 0), (1, 1))

BERT_EMBEDDINGS = """
word_embeddings        embedding embed 64x32
position_embeddings    embedding embed 16x32
token_type_embeddings  embedding embed 2x32
LayerNorm              norm      norm  32
"""
BERT_BLOCK = """
attention.self.query        linear q    32x32
attention.self.key          linear k    32x32
attention.self.value        linear v    32x32
attention.output.dense      linear o    32x32
attention.output.LayerNorm  norm   norm 32
intermediate.dense          linear up   48x32
output.dense                linear down 32x48
output.LayerNorm            norm   norm 32
"""
LLAMA_ATTENTION = """
self_attn.q_proj          linear q    32x32
self_attn.k_proj          linear k    16x32
self_attn.v_proj          linear v    16x32
self_attn.o_proj          linear o    32x32
input_layernorm           norm   norm 32
post_attention_layernorm  norm   norm 32
"""
LLAMA_FFN = """
mlp.gate_proj  linear gate 48x32
mlp.up_proj    linear up   48x32
mlp.down_proj  linear down 32x48
"""
UNTIED = """
model.embed_tokens  embedding embed   64x32
model.norm          norm      norm    32
lm_head             linear    lm_head 64x32
"""
T5_SELF = """
0.SelfAttention.q  linear q    32x32
0.SelfAttention.k  linear k    32x32
0.SelfAttention.v  linear v    32x32
0.SelfAttention.o  linear o    32x32
0.layer_norm       norm   norm 32
"""
T5_CROSS = """
1.EncDecAttention.q  linear q    32x32
1.EncDecAttention.k  linear k    32x32
1.EncDecAttention.v  linear v    32x32
1.EncDecAttention.o  linear o    32x32
1.layer_norm         norm   norm 32
"""
T5_OUTSIDE = """
shared  embedding embed 64x32 / encoder.embed_tokens.weight decoder.embed_tokens.weight lm_head.weight
encoder.final_layer_norm  norm      norm  32
decoder.final_layer_norm  norm      norm  32
"""
T5_POSITIONS = "0.layer.0.SelfAttention.relative_attention_bias  embedding other 8x4"
T5_UNGATED = """
DenseReluDense.wi  linear up   48x32
DenseReluDense.wo  linear down 32x48
layer_norm         norm   norm 32
"""
T5_GATED = """
DenseReluDense.wi_0  linear gate 48x32
DenseReluDense.wi_1  linear up   48x32
DenseReluDense.wo    linear down 32x48
layer_norm           norm   norm 32
"""
VIT_BLOCK = """
attention.q_proj  linear q    32x32
attention.k_proj  linear k    32x32
attention.v_proj  linear v    32x32
attention.o_proj  linear o    32x32
layernorm_before  norm   norm 32
layernorm_after   norm   norm 32
mlp.fc1           linear up   48x32
mlp.fc2           linear down 32x48
"""
CLIP_BLOCK = """
self_attn.q_proj    linear q    32x32
self_attn.k_proj    linear k    32x32
self_attn.v_proj    linear v    32x32
self_attn.out_proj  linear o    32x32
layer_norm1         norm   norm 32
layer_norm2         norm   norm 32
mlp.fc1             linear up   48x32
mlp.fc2             linear down 32x48
"""
WHISPER_BLOCK = """
self_attn.q_proj      linear q    32x32
self_attn.k_proj      linear k    32x32
self_attn.v_proj      linear v    32x32
self_attn.out_proj    linear o    32x32
self_attn_layer_norm  norm   norm 32
fc1                   linear up   48x32
fc2                   linear down 32x48
final_layer_norm      norm   norm 32
"""
WHISPER_CROSS = """
encoder_attn.q_proj      linear q    32x32
encoder_attn.k_proj      linear k    32x32
encoder_attn.v_proj      linear v    32x32
encoder_attn.out_proj    linear o    32x32
encoder_attn_layer_norm  norm   norm 32
"""


def _resnet_block(before: int, width: int) -> str:
    return f"""
conv1  conv conv {width}x{before}x3x3
bn1    norm norm {width}
conv2  conv conv {width}x{width}x3x3
bn2    norm norm {width}
"""


Table = list[tuple[str, tuple[tuple[int, ...], ...], str]]


def _t5(ffn: str) -> Table:
    return [
        ("", ONCE, T5_OUTSIDE),
        ("encoder.block.", ((0,),), T5_POSITIONS),
        ("decoder.block.", ((0,),), T5_POSITIONS),
        ("encoder.block.{}.layer.", TWICE, T5_SELF),
        ("decoder.block.{}.layer.", TWICE, T5_SELF + T5_CROSS.strip()),
        ("encoder.block.{}.layer.1.", TWICE, ffn),
        ("decoder.block.{}.layer.2.", TWICE, ffn),
    ]


TABLES: dict[str, Table] = {
    "mlp": [("", ONCE, "0 linear other 24x12\n2 norm norm 24\n3 linear other 24x24\n5 linear other 5x24")],
    "resnet": [
        ("", ONCE, "conv1 conv conv 8x3x3x3\nbn1 norm norm 8\nlinear linear head 10x16"),
        (
            "layer1.{}.",
            TWICE,
            "conv1 conv conv 8x8x3x3\nbn1 norm norm 8\nconv2 conv conv 8x4x3x3\nbn2 norm norm 8",
        ),
        ("layer2.{}.", ((0, 2),), "conv1 conv conv 16x8x3x3\nbn1 norm norm 16\nconv2 conv conv 16x8x3x3"),
        ("layer2.{}.", ((0, 2),), "bn2 norm norm 16\nshortcut conv conv 16x8x1x1"),
    ],
    "cifar-resnet": [
        ("", ONCE, "conv1 conv conv 16x3x3x3\nbn1 norm norm 16\nlinear linear head 10x64"),
        ("layer1.{}.", ((0, 0), (1, 1)), _resnet_block(16, 16)),
        ("layer2.{}.", ((0, 2),), _resnet_block(16, 32)),
        ("layer2.{}.", ((1, 3),), _resnet_block(32, 32)),
        ("layer3.{}.", ((0, 4),), _resnet_block(32, 64)),
        ("layer3.{}.", ((1, 5),), _resnet_block(64, 64)),
    ],
    "bert": [
        ("bert.embeddings.", ONCE, BERT_EMBEDDINGS),
        ("bert.encoder.layer.{}.", TWICE, BERT_BLOCK),
        ("", ONCE, "bert.pooler.dense linear other 32x32\nclassifier linear head 3x32"),
    ],
    "bert-mlm": [
        (
            "bert.embeddings.",
            ONCE,
            BERT_EMBEDDINGS.replace("64x32", "64x32 / cls.predictions.decoder.weight"),
        ),
        ("bert.encoder.layer.{}.", TWICE, BERT_BLOCK),
        ("cls.predictions.", ONCE, "transform.dense linear other 32x32\ntransform.LayerNorm norm norm 32"),
        ("cls.predictions.", ONCE, "bias tensor other 64 / cls.predictions.decoder.bias"),
    ],
    "roberta": [
        ("roberta.embeddings.", ONCE, BERT_EMBEDDINGS),
        ("roberta.encoder.layer.{}.", TWICE, BERT_BLOCK),
        ("classifier.", ONCE, "dense linear head 32x32\nout_proj linear head 3x32"),
    ],
    "distilbert": [
        ("distilbert.embeddings.", ONCE, "word_embeddings embedding embed 64x32\nLayerNorm norm norm 32"),
        ("distilbert.embeddings.", ONCE, "position_embeddings embedding embed 16x32"),
        (
            "distilbert.transformer.layer.{}.",
            TWICE,
            """
attention.q_lin    linear q    32x32
attention.k_lin    linear k    32x32
attention.v_lin    linear v    32x32
attention.out_lin  linear o    32x32
sa_layer_norm      norm   norm 32
ffn.lin1           linear up   48x32
ffn.lin2           linear down 32x48
output_layer_norm  norm   norm 32
""",
        ),
        ("", ONCE, "pre_classifier linear head 32x32\nclassifier linear head 2x32"),
    ],
    "albert": [
        ("albert.embeddings.", ONCE, BERT_EMBEDDINGS.replace("32", "16")),
        (
            "albert.",
            ONCE,
            "encoder.embedding_hidden_mapping_in linear other 32x16\npooler linear other 32x32",
        ),
        (
            "albert.encoder.albert_layer_groups.{}.albert_layers.0.",
            ((0, 0),),
            """
full_layer_layer_norm  norm   norm 32
attention.query        linear q    32x32
attention.key          linear k    32x32
attention.value        linear v    32x32
attention.dense        linear o    32x32
attention.LayerNorm    norm   norm 32
ffn                    linear up   48x32
ffn_output             linear down 32x48
""",
        ),
        ("", ONCE, "classifier linear head 3x32"),
    ],
    "llama": [("", ONCE, UNTIED), ("model.layers.{}.", TWICE, LLAMA_ATTENTION + LLAMA_FFN.strip())],
    "llama-tied": [
        ("model.", ONCE, "embed_tokens embedding embed 64x32 / lm_head.weight\nnorm norm norm 32"),
        ("model.layers.{}.", TWICE, LLAMA_ATTENTION + LLAMA_FFN.strip()),
    ],
    "gpt2": [
        ("transformer.", ONCE, "wte embedding embed 64x32 / lm_head.weight\nwpe embedding embed 16x32"),
        ("transformer.", ONCE, "ln_f norm norm 32"),
        (
            "transformer.h.{}.",
            TWICE,
            """
ln_1         norm   norm 32
attn.c_attn  linear qkv  32x96
attn.c_proj  linear o    32x32
ln_2         norm   norm 32
mlp.c_fc     linear up   32x48
mlp.c_proj   linear down 48x32
""",
        ),
    ],
    "gpt-neox": [
        ("", ONCE, "gpt_neox.embed_in embedding embed 64x32\ngpt_neox.final_layer_norm norm norm 32"),
        ("", ONCE, "lm_head linear lm_head 64x32"),
        (
            "gpt_neox.layers.{}.",
            TWICE,
            """
input_layernorm            norm   norm 32
post_attention_layernorm   norm   norm 32
attention.query_key_value  linear qkv  96x32
attention.dense            linear o    32x32
mlp.dense_h_to_4h          linear up   48x32
mlp.dense_4h_to_h          linear down 32x48
""",
        ),
    ],
    "phi3": [
        ("", ONCE, UNTIED),
        (
            "model.layers.{}.",
            TWICE,
            """
self_attn.qkv_proj        linear qkv  64x32
self_attn.o_proj          linear o    32x32
mlp.gate_up_proj          linear up   96x32
mlp.down_proj             linear down 32x48
input_layernorm           norm   norm 32
post_attention_layernorm  norm   norm 32
""",
        ),
    ],
    "mixtral": [
        ("", ONCE, UNTIED),
        ("model.layers.{}.", TWICE, LLAMA_ATTENTION),
        ("model.layers.{}.mlp.", TWICE, "gate.weight tensor router 4x32"),
        (
            "model.layers.{}.mlp.experts.",
            TWICE,
            "gate_up_proj tensor up 4x96x32\ndown_proj tensor down 4x32x48",
        ),
    ],
    "qwen2-moe": [
        ("", ONCE, UNTIED),
        ("model.layers.{}.", TWICE, LLAMA_ATTENTION),
        (
            "model.layers.{}.mlp.",
            TWICE,
            "gate.weight tensor router 4x32\nshared_expert_gate linear router 1x32",
        ),
        (
            "model.layers.{}.mlp.experts.",
            TWICE,
            "gate_up_proj tensor up 4x48x32\ndown_proj tensor down 4x32x24",
        ),
        ("model.layers.{}.mlp.shared_expert.", TWICE, "gate_proj linear gate 40x32\nup_proj linear up 40x32"),
        ("model.layers.{}.mlp.shared_expert.", TWICE, "down_proj linear down 32x40"),
    ],
    "t5-ungated": _t5(T5_UNGATED),
    "t5-gated": _t5(T5_GATED),
    "vit": [
        ("vit.embeddings.", ONCE, "cls_token tensor embed 1x1x32\nposition_embeddings tensor embed 1x5x32"),
        ("vit.embeddings.", ONCE, "patch_embeddings.projection conv embed 32x3x8x8"),
        ("vit.layers.{}.", TWICE, VIT_BLOCK),
        ("", ONCE, "vit.layernorm norm norm 32\nclassifier linear head 3x32"),
    ],
    "clip": [
        ("", ONCE, "logit_scale tensor other scalar"),
        ("", ONCE, "visual_projection linear other 24x32\ntext_projection linear other 24x32"),
        ("text_model.embeddings.", ONCE, "token_embedding embedding embed 64x32"),
        ("text_model.embeddings.", ONCE, "position_embedding embedding embed 16x32"),
        ("text_model.encoder.layers.{}.", TWICE, CLIP_BLOCK),
        ("text_model.", ONCE, "final_layer_norm norm norm 32"),
        ("vision_model.embeddings.", ONCE, "class_embedding tensor embed 32"),
        ("vision_model.embeddings.", ONCE, "patch_embedding conv embed 32x3x8x8"),
        ("vision_model.embeddings.", ONCE, "position_embedding embedding embed 5x32"),
        ("vision_model.encoder.layers.{}.", TWICE, CLIP_BLOCK),
        ("vision_model.", ONCE, "pre_layrnorm norm norm 32\npost_layernorm norm norm 32"),
    ],
    "whisper": [
        ("model.encoder.", ONCE, "conv1 conv conv 32x8x3\nconv2 conv conv 32x32x3\nlayer_norm norm norm 32"),
        ("model.encoder.", ONCE, "embed_positions embedding embed 10x32"),
        ("model.encoder.layers.{}.", TWICE, WHISPER_BLOCK),
        ("model.decoder.", ONCE, "embed_tokens embedding embed 64x32 / proj_out.weight"),
        ("model.decoder.", ONCE, "embed_positions.weight tensor embed 16x32\nlayer_norm norm norm 32"),
        ("model.decoder.layers.{}.", TWICE, WHISPER_BLOCK + WHISPER_CROSS.strip()),
    ],
    "ast": [
        ("audio_spectrogram_transformer.embeddings.", ONCE, "cls_token tensor embed 1x1x32"),
        ("audio_spectrogram_transformer.embeddings.", ONCE, "distillation_token tensor embed 1x1x32"),
        ("audio_spectrogram_transformer.embeddings.", ONCE, "position_embeddings tensor embed 1x8x32"),
        (
            "audio_spectrogram_transformer.embeddings.",
            ONCE,
            "patch_embeddings.projection conv embed 32x1x4x4",
        ),
        ("audio_spectrogram_transformer.layers.{}.", TWICE, VIT_BLOCK),
        ("audio_spectrogram_transformer.", ONCE, "layernorm norm norm 32"),
        ("classifier.", ONCE, "layernorm norm head 32\ndense linear head 3x32"),
    ],
    "torch-encoder": [
        (
            "layers.{}.",
            TWICE,
            """
self_attn.in_proj_weight   tensor qkv   96x32
self_attn.in_proj_bias     tensor other 96
self_attn.out_proj.weight  tensor o     32x32
self_attn.out_proj.bias    tensor other 32
linear1                    linear up    48x32
linear2                    linear down  32x48
norm1                      norm   norm  32
norm2                      norm   norm  32
""",
        ),
    ],
}
