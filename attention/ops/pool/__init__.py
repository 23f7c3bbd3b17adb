"""Pooling of keys over fixed blocks."""

from .api import pool as pool
