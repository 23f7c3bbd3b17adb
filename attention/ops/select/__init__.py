"""Cutting scores to a budget."""

from .api import top_k as top_k
