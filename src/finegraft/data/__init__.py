"""Reading tasks: tables, label names, batches, metrics, and the base models they are for.

``task`` is light (pydantic only); the other modules import torch, Transformers or datasets.
"""
