"""Prompts made shorter: passages are scored for a question, and the best ones stay, whole and in order."""

from .prompt import ATTENTION as ATTENTION
from .prompt import KEEP as KEEP
from .prompt import PASSAGE as PASSAGE
from .prompt import Compressed as Compressed
from .prompt import Passage as Passage
from .prompt import check_keep as check_keep
from .prompt import compress as compress
from .prompt import scorer_of as scorer_of
