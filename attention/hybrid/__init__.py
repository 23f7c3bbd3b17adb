"""Mixers: modules with a state of their own that take the place of a layer's attention. Importing the package
registers them. Encoder mixers, without a state, read a whole sequence at once."""

from .a2mamba import A2Mamba as A2Mamba
from .aaren import Aaren as Aaren
from .aff import Aff as Aff
from .channel_attention import ChannelAttention as ChannelAttention
from .ecoformer import EcoFormer as EcoFormer
from .encoder import EncoderMixer as EncoderMixer
from .extractor import Extractor as Extractor
from .fnet import FNet as FNet
from .gated_cnn import GatedCNN as GatedCNN
from .gated_convolution import GatedConvolution as GatedConvolution
from .gated_delta import GatedDelta as GatedDelta
from .gated_linear import GatedLinear as GatedLinear
from .geometry import Geometry as Geometry
from .hydra import Hydra as Hydra
from .lmu import Lmu as Lmu
from .longvq import LongVQ as LongVQ
from .mamba2 import Mamba2 as Mamba2
from .mambamixer import MambaMixer as MambaMixer
from .mixer import Mixer as Mixer
from .ponet import PoNet as PoNet
from .ponet_encoder import PoNetEncoder as PoNetEncoder
from .probsparse import ProbSparse as ProbSparse
from .registry import encoder_mixers as encoder_mixers
from .registry import mixers as mixers
from .registry import parse_encoder_mixer as parse_encoder_mixer
from .registry import parse_mixer as parse_mixer
from .retention import Retention as Retention
from .routing_full import RoutingFull as RoutingFull
from .rwkv4 import Rwkv4 as Rwkv4
from .scout import Scout as Scout
from .sigmoid import Sigmoid as Sigmoid
from .soft import Soft as Soft
from .tsmixer import TSMixer as TSMixer
