"""``scan`` in chunks of tokens."""

from __future__ import annotations

from .reference import scan as scan
