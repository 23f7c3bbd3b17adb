"""Attention of the newest few queries over single chosen keys."""

from .api import gather_decode as gather_decode
