"""Attention over chosen keys: tensors in, tensors out. Knows no model and no process group."""
