"""Methods that reuse the key set of an earlier step. Importing the package registers them."""

from . import recycled as recycled
