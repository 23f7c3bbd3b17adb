"""Methods that read chunks of text, or what they are compressed to. Importing the package registers them."""

from . import chunkllm as chunkllm
