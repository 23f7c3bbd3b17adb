"""Methods that read chunks of text, or summaries of chunks. Importing the package registers them."""

from . import chunkllm as chunkllm
from . import combiner as combiner
from . import core_context as core_context
from . import descriptors as descriptors
