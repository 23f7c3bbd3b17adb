"""Cutting scores to a budget: a number of entries, a share of their mass, or a threshold."""

from .api import by_mass as by_mass
from .api import by_threshold as by_threshold
from .api import top_k as top_k
