"""Hugging Face models in, patched models out."""
