"""Dense attention over many queries: causal, windowed, soft-capped, left-padded."""

from .api import flash as flash
