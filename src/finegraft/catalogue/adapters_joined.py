"""Adapters made of trained adapters."""

from finegraft.catalogue.rows import method

method(
    "adapter-fusion",
    "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
    2021,
    "https://arxiv.org/abs/2005.00247",
    parts=[{"where": {"role": "ffn"}, "what": "adapter-fusion"}],
    control=["identity-penalty"],
    train={"lr": 5e-4},
    note="finegraft.grafting.fusing.fuse(model, grafts) makes it of trained grafts of method pfeiffer; by itself it "
    "attends to random adapters.",
)
method(
    "mera",
    "MerA: Merging Pretrained Adapters For Few-Shot Learning",
    2023,
    "https://arxiv.org/abs/2308.15982",
    parts=[{"where": {"role": "ffn"}, "what": {"kind": "bottleneck", "init": "bert", "width": 24}}],
    train={"lr": 2e-3},
    note="finegraft.grafting.fusing.merge_adapters(model, grafts) makes it of trained grafts of this method, aligned "
    "by transport or not; by itself it is an adapter.",
)
