"""Training a graft: the bridge to ``transformers.Trainer``, checkpoints, precision, progress and interruption."""
