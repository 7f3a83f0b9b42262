"""Weights kept in fewer bits: formats, tensors that hold them, and how other libraries' are read."""
