"""Adapters for spectrograms, volumes, and inputs of changing quality."""

from finegraft.catalogue.rows import method

_AST = (
    "Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers",
    2024,
    "https://arxiv.org/abs/2312.03694",
)
_CONFORMER = {
    "kind": "bottleneck",
    "norm": True,
    "activation": "glu",
    "convolution": "conformer",
    "kernel": 31,
    "width": 12,
}
_TRAIN = {"lr": 5e-3, "weight_decay": 0.1}
_CONV_NOTE = (
    "Layer normalisation in the place of batch normalisation. Give grid=[rows, columns] and front for a convolution "
    "over both axes of a spectrogram; without, it runs along the tokens."
)

for role in ("attn", "ffn"):
    beside = {"attn": "attention", "ffn": "ffn"}[role]
    method(
        f"ast-conformer-{beside}",
        *_AST,
        parts=[{"where": {"role": role}, "what": {**_CONFORMER, "placement": "parallel"}}],
        train=_TRAIN,
        note=_CONV_NOTE,
    )
    method(
        f"ast-parallel-{beside}",
        *_AST,
        parts=[{"where": {"role": role}, "what": {"kind": "bottleneck", "placement": "parallel", "width": 12}}],
        train=_TRAIN,
    )
method(
    "ast-conformer-sequential",
    *_AST,
    parts=[{"where": {"role": "ffn"}, "what": _CONFORMER}],
    train=_TRAIN,
    note=_CONV_NOTE,
)
method(
    "spatial-adapter",
    "3DSAM-adapter: Holistic adaptation of SAM from 2D to 3D for promptable tumor segmentation",
    2023,
    "https://arxiv.org/abs/2306.13465",
    parts=[
        {
            "where": {"role": ["attn", "ffn"]},
            "what": {"kind": "bottleneck", "activation": "gelu", "width": 32, "convolution": "depthwise"},
        }
    ],
    train={"lr": 1e-3},
    note="Give grid=[depth, rows, columns]; without, the depthwise convolution runs along the tokens. The adapter "
    "alone, without the paper's new depth embedding and decoder.",
)
method(
    "quality-weighted-adapter",
    "PETALface: Parameter Efficient Transfer Learning for Low-resolution Face Recognition",
    2024,
    "https://arxiv.org/abs/2412.07771",
    parts=[
        {
            "where": {"role": ["q?", "v?", "qkv?"], "type": "linear"},
            "what": [
                {"kind": "bottleneck", "placement": "parallel", "activation": "identity", "width": 8},
                {
                    "kind": "bottleneck",
                    "placement": "parallel",
                    "activation": "identity",
                    "width": 8,
                    "gate": "sample",
                },
            ],
        }
    ],
    train={"lr": 1e-3},
    note="Two linear maps, of which a gate for each sample weighs the second; the gate reads the layer's input, where "
    "the paper takes an image quality score.",
)
