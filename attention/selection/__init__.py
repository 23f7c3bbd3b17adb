"""Which keys each query reads, and all that can be done with it: one file per kind of selection.

A method answers with one of these kinds, or with None, which means every visible key (``EveryKey``). A kind
runs itself, counts the (query, key) pairs that it reads, makes a mask for measuring and says which keys must
be brought to a rank that runs it. A new kind is a new file here.

Positions are absolute places in the key sequence, 0 .. Tk - 1, padding included. Queries are the last Tq
positions. A row b of a left-padded batch begins at ``start[b]``; nothing before it is ever read.
"""

from .bands import Band as Band
from .bands import Bands as Bands
from .base import Index as Index
from .base import Selection as Selection
from .biased import Biased as Biased
from .blocks import BlockIndex as BlockIndex
from .by_head import ByHead as ByHead
from .every import EveryKey as EveryKey
from .every import as_selection as as_selection
from .rescaled import Rescaled as Rescaled
from .spans import Spans as Spans
from .stretches import Stretches as Stretches
from .summarised import Summarised as Summarised
from .tokens import TokenIndex as TokenIndex
from .window import Window as Window
