"""Mixers: modules with a state of their own that take the place of a layer's attention. Importing the package
registers them."""

from .aaren import Aaren as Aaren
from .gated_convolution import GatedConvolution as GatedConvolution
from .gated_delta import GatedDelta as GatedDelta
from .gated_linear import GatedLinear as GatedLinear
from .geometry import Geometry as Geometry
from .mamba2 import Mamba2 as Mamba2
from .mixer import Mixer as Mixer
from .registry import mixers as mixers
from .registry import parse_mixer as parse_mixer
from .retention import Retention as Retention
from .scout import Scout as Scout
from .sigmoid import Sigmoid as Sigmoid
