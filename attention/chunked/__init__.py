"""Methods that keep chunks of earlier text as summaries. Importing the package registers them."""

from . import combiner as combiner
from . import core_context as core_context
