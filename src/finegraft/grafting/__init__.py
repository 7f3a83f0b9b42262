"""Grafts on models: attaching, switching, merging, routing, loading. The only room that touches the base."""

from finegraft.grafting.graft import Graft
from finegraft.grafting.load import load
from finegraft.grafting.make import graft
from finegraft.grafting.merging import grafts, merge
from finegraft.grafting.route import route

__all__ = ["Graft", "graft", "grafts", "load", "merge", "route"]
