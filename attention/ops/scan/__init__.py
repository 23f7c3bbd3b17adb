"""Linear recurrences: SSD, gated linear attention and the gated delta rule."""

from .api import scan as scan
from .api import scan_step as scan_step
