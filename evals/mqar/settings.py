"""The kinds of sequences that small models are trained on: MQAR's and ListOps'."""

from __future__ import annotations

from . import data
from .listops import ListOps

Setting = data.Setting | ListOps
NAMES = {"mqar": "MQAR", "listops": "ListOps"}
"""By suite."""


def parse_setting(text: str) -> Setting:
    """The setting of "64x4" (MQAR) or "16-64x4x5" (ListOps). Raises FarspanError for another text."""
    return ListOps.parse(text) if "-" in text else data.Setting.parse(text)
