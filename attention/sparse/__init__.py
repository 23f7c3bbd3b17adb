"""Methods that read part of the keys. Importing the package registers them."""

from . import block_topk as block_topk
from . import double_sparsity as double_sparsity
from . import patterns as patterns
from . import quest as quest
