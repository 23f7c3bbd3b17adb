"""Writing the key and value of one new token into buffers of fixed size, with what is kept beside them."""

from .api import append as append
from .beside import Kept as Kept
from .beside import Labels as Labels
from .beside import Pages as Pages
