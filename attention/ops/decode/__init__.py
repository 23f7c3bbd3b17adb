"""Dense attention of the newest few queries over everything before them."""

from .api import decode as decode
