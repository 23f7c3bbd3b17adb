"""Attention of query blocks over chosen key blocks."""

from .api import block_sparse as block_sparse
