"""Writing the key and value of one new token into buffers of fixed size, with what is kept beside them."""

from .api import Kept as Kept
from .api import Labels as Labels
from .api import Pages as Pages
from .api import append as append
