"""Pooling of keys over fixed blocks, and over segments."""

from .api import pool as pool
from .api import pool_segments as pool_segments
