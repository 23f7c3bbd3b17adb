"""The definition of ``decode``: that of ``flash``, for few queries."""

from ..flash.reference import flash as decode

__all__ = ["decode"]
