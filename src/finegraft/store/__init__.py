"""Grafts on disk and on the Hub: tensors and JSON in a folder, whole or not at all.

A graft is a folder of ``graft.safetensors`` (tensors, integers packed), ``graft.json`` (the manifest) and
``README.md`` (the model card). Nothing is ever pickled or executed. This room knows tensors and JSON only;
what they mean is the business of `finegraft.grafting`.
"""

from finegraft.store.fingerprints import Fingerprint, check, fingerprint
from finegraft.store.folder import FILES
from finegraft.store.hub import pull, push
from finegraft.store.manifest import FORMAT_VERSION, Manifest
from finegraft.store.model_card import card
from finegraft.store.reading import read, read_manifest, size
from finegraft.store.writing import write

__all__ = [
    "FILES",
    "FORMAT_VERSION",
    "Fingerprint",
    "Manifest",
    "card",
    "check",
    "fingerprint",
    "pull",
    "push",
    "read",
    "read_manifest",
    "size",
    "write",
]
