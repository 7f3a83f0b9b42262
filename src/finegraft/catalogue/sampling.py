"""Methods that train some blocks, matrices or modules at a time, or some of them differently."""

from finegraft.catalogue.rows import method

ALL = {"role": "!head?"}
BLURB = (
    "Fine-tuning large neural language models for biomedical natural language processing",
    2023,
    "https://arxiv.org/abs/2112.07869",
)

method(
    "lisa",
    "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning",
    2024,
    "https://arxiv.org/abs/2403.17919",
    parts=[{"where": ALL, "what": "full"}],
    control=[{"kind": "sample-blocks", "count": 2, "every": 20}],
    train={"lr": 3e-4},
    note="Two blocks at a time, drawn every 20 steps, and always the embeddings, the output layer and all else outside "
    "of blocks. A block drawn twice in a row keeps its moments; the authors' code starts them afresh.",
)
method(
    "hft",
    "HFT: Half Fine-Tuning for Large Language Models",
    2024,
    "https://arxiv.org/abs/2404.18466",
    parts=[{"where": ALL, "what": "full"}],
    control=[{"kind": "sample-blocks", "unit": "matrix", "share": 0.5, "rounds": 3}],
    train={"lr": 1e-4},
    note="In each third of the training another half of each block's attention matrices, FFN matrices and norms; "
    "embeddings and the output layer always train. The paper draws once per stage (rounds=1); no official code says "
    "what it does about norms and embeddings.",
)
method(
    "ist",
    "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of Large "
    "Language Models",
    2024,
    "https://arxiv.org/abs/2410.11772",
    parts=[
        {
            "where": {"role": ["q?", "k?", "v?", "qkv?", "up?", "down?"], "type": "linear"},
            "what": {"kind": "low-rank", "rank": 32, "alpha": 64},
        }
    ],
    control=["importance-sampling"],
    train={"lr": 3e-3},
    note="LoRA with a quarter of the blocks in training at a time; any other kind in the blocks will do. Blocks are "
    "tried out on a batch of the training, after its backward pass.",
)
method(
    "fpf",
    "Does Continual Learning Equally Forget All Parameters?",
    2023,
    "https://arxiv.org/abs/2304.04158",
    parts=[
        {"where": {"role": "!head?", "type": "!norm?"}, "what": "full"},
        {"where": {"role": "!head?", "type": "norm"}, "what": "full"},
    ],
    control=[{"kind": "phases", "phases": [{"share": 0.9}, {"share": 0.1, "parts": [1]}]}],
    train={"lr": 1e-4},
    note="Everything, then in the last tenth of the steps the norms and the head alone, on the same data. The paper "
    "takes a replay buffer for that, after each of several tasks, and adds the first convolution where the domain "
    "changes: give these batches in a loop of your own.",
)
method(
    "k-fpf",
    "Does Continual Learning Equally Forget All Parameters?",
    2023,
    "https://arxiv.org/abs/2304.04158",
    parts=[
        {"where": {"role": "!head?", "type": "!norm?"}, "what": "full"},
        {"where": {"role": "!head?", "type": "norm"}, "what": "full"},
    ],
    control=[{"kind": "phases", "phases": [{"share": 0.9}, {"share": 0.1, "parts": [1]}], "times": 3}],
    train={"lr": 1e-4},
    note="As fpf, at the end of each third of the training.",
)
method(
    "layerwise-decay",
    *BLURB,
    parts=[{"where": ALL, "what": "full"}],
    train={"lr": 1e-4, "layer_decay": 0.8},
    note="Each block at 0.8 times the rate of the one above; the paper tries several factors.",
)
method(
    "freeze-lower",
    *BLURB,
    parts=[{"where": {"role": "!head?", "layer": "!first:50%", "name": "!*embed*?"}, "what": "full"}],
    train={"lr": 5e-5},
    note="Embeddings and the lower half of the blocks stay; the paper tries several numbers of them.",
)
method(
    "top-reinit",
    *BLURB,
    parts=[
        {"where": {"role": "!head?", "layer": "!last:1", "name": "!*pooler*?"}, "what": "full"},
        {"where": {"role": "!head?", "layer": "last:1"}, "what": {"kind": "full", "start": "fresh"}},
        {"where": {"name": "*pooler*"}, "what": {"kind": "full", "start": "fresh"}, "optional": True},
    ],
    train={"lr": 5e-5},
    note="The highest block and the pooler start afresh, so that the model is another one before it is trained. Change "
    "layer in the recipe for more blocks.",
)
