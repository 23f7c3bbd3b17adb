"""Methods that read part of the keys. Importing the package registers them."""

from . import act as act
from . import antidiagonal as antidiagonal
from . import block_topk as block_topk
from . import dhsa as dhsa
from . import double_sparsity as double_sparsity
from . import h2o as h2o
from . import oracle as oracle
from . import patterns as patterns
from . import pbs as pbs
from . import quest as quest
from . import routing as routing
from . import sale as sale
from . import snapkv as snapkv
from . import vertical_slash as vertical_slash
