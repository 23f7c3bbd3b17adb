"""Methods that read part of the keys. Importing the package registers them."""

from . import a_shape as a_shape
from . import antidiagonal as antidiagonal
from . import block_static as block_static
from . import block_topk as block_topk
from . import dhsa as dhsa
from . import dilated as dilated
from . import double_sparsity as double_sparsity
from . import duo as duo
from . import dynamic_mask as dynamic_mask
from . import h2o as h2o
from . import oracle as oracle
from . import pbs as pbs
from . import quest as quest
from . import routing as routing
from . import sale as sale
from . import seer as seer
from . import seer_decode as seer_decode
from . import snapkv as snapkv
from . import strided as strided
from . import vertical_slash as vertical_slash
from . import window as window
