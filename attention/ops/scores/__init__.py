"""Logits of queries against keys or their summaries, in float32."""

from .api import scores as scores
