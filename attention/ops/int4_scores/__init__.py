"""Logits estimated from keys kept in four bits."""

from .api import int4_block_max as int4_block_max
from .api import int4_scores as int4_scores
from .api import quantise_int4 as quantise_int4
from .storage import Int4 as Int4
