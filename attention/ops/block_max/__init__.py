"""Ground-truth attention, max-pooled over blocks."""

from .api import block_max as block_max
