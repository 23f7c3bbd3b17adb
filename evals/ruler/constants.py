"""RULER's published wording and parameters: data only.

Source: NVIDIA/RULER (Apache-2.0, Copyright NVIDIA CORPORATION), `scripts/data/synthetic/constants.py`,
`niah.py`, `variable_tracking.py`, `common_words_extraction.py`, `freq_words_extraction.py`, `qa.py` and
`scripts/synthetic.yaml`; paper: arXiv 2404.06654. The strings are kept to the letter, with their leading and
trailing spaces, because a prompt with other words is not RULER.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A task's wording. `text` is the user message; `answer_prefix` follows the assistant's header."""

    text: str
    answer_prefix: str
    tokens_to_generate: int


NIAH = Template(
    text=(
        "Some special magic {type_needle_v} are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the {type_needle_v} afterwards.\n{context}\nWhat are all the special magic "
        "{type_needle_v} for {query} mentioned in the provided text?"
    ),
    answer_prefix=" The special magic {type_needle_v} for {query} mentioned in the provided text are",
    tokens_to_generate=128,
)
VARIABLE_TRACKING = Template(
    text=(
        "Memorize and track the chain(s) of variable assignment hidden in the following "
        "text.\n\n{context}\nQuestion: Find all variables that are assigned the value {query} in the text "
        "above."
    ),
    answer_prefix=(
        " Answer: According to the chain(s) of variable assignment in the text above, {num_v} variables are "
        "assigned the value {query}, they are: "
    ),
    tokens_to_generate=30,
)
COMMON_WORDS = Template(
    text=(
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize "
        "the ones that appear most often.\n{context}\nQuestion: What are the 10 most common words in the "
        "above list?"
    ),
    answer_prefix=" Answer: The top 10 words that appear most often in the list are:",
    tokens_to_generate=120,
)
FREQUENT_WORDS = Template(
    text=(
        "Read the following coded text and track the frequency of each coded word. Find the three most "
        "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
        "ignore the dots '....'. What are the three most frequently appeared words in the above coded text?"
    ),
    answer_prefix=" Answer: According to the coded text above, the three most frequently appeared words are:",
    tokens_to_generate=50,
)

QUESTION_ANSWERING = Template(
    text=(
        "Answer the question based on the given documents. Only give me the answer and do not output any "
        "other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on "
        "the given documents. Only give me the answer and do not output any other words.\n\nQuestion: {query}"
    ),
    answer_prefix=" Answer:",
    tokens_to_generate=32,
)

SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("answers", "answer"))
"""Replacements in NIAH's wording, in this order, if one value is asked for; "numbers" also loses its s."""

NEEDLE = "One of the special magic {type_needle_v} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NUMBER_DIGITS = 7
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the essay's sentences: 40 evenly spaced depths, rounded, 0 and 100 among them."""

VT_HOPS = 4
VT_VALUES = (10_000, 99_999)
"""The value at the head of a chain: at least the first number, below the second."""
VT_LETTERS, VT_EXAMPLE_LETTERS = 5, 3
VT_EXAMPLE_TOKENS = 500
"""The one-shot example is filled with noise up to this many tokens."""


@dataclass(frozen=True, kw_only=True)
class WordCounts:
    """How often words of cwe's list appear, and the number of words and the counts in its one-shot
    example."""

    common: int
    uncommon: int
    example_words: int
    example_common: int
    example_uncommon: int


CWE_COMMON_WORDS = 10
CWE_SHORT = 4096
"""Below this length the counts are `CWE_COUNTS_SHORT`, from it on `CWE_COUNTS`."""
CWE_COUNTS = WordCounts(common=30, uncommon=3, example_words=40, example_common=10, example_uncommon=3)
CWE_COUNTS_SHORT = WordCounts(common=6, uncommon=1, example_words=20, example_common=3, example_uncommon=1)

FWE_ALPHA = 2.0
FWE_WORD_LETTERS = 6
FWE_VOCABULARY_SHARE = 50
"""The vocabulary has one word per this many tokens of the length."""
FWE_NOISE = "..."
FWE_ANSWERS = 3


QA_DOCUMENT = "Document {number}:\n{document}"
QA_BETWEEN = "\n\n"
"""What stands between two documents."""

COMPAT_STEPS = {"essay": 500, "noise": 25, "needle": 25, "words": 10, "documents": 10}
"""Units by which the published generator fills a prompt: words of an essay, lines, words of a list,
documents. vt has steps of 10 lines, and fwe of 1/32 of the length."""
COMPAT_SHORT = (4096, 5)
"""Below this length, the needle tasks with lines of noise or needles have steps of 5."""
COMPAT_VT, COMPAT_FWE_SHARE = 10, 32


@dataclass(frozen=True, kw_only=True)
class Task:
    """A row of RULER's task table. `haystack` is what fills the prompt; `metric` is how an answer is scored:
    "all" is the mean over the references of whether the answer contains them, "part" is their maximum."""

    name: str
    haystack: Literal["noise", "essay", "needle", "words", "coded words", "documents"]
    template: Template
    metric: Literal["all", "part"] = "all"


@dataclass(frozen=True, kw_only=True)
class NiahTask(Task):
    """A needle task: `keys` keys with `values` values each; the question asks for `queries` of the keys."""

    template: Template = NIAH
    type_k: Kind = "words"
    type_v: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        NiahTask(name="niah_single_1", haystack="noise"),
        NiahTask(name="niah_single_2", haystack="essay"),
        NiahTask(name="niah_single_3", haystack="essay", type_v="uuids"),
        NiahTask(name="niah_multikey_1", haystack="essay", keys=4),
        NiahTask(name="niah_multikey_2", haystack="needle"),
        NiahTask(name="niah_multikey_3", haystack="needle", type_k="uuids", type_v="uuids"),
        NiahTask(name="niah_multivalue", haystack="essay", values=4),
        NiahTask(name="niah_multiquery", haystack="essay", keys=4, queries=4),
        Task(name="vt", haystack="noise", template=VARIABLE_TRACKING),
        Task(name="cwe", haystack="words", template=COMMON_WORDS),
        Task(name="fwe", haystack="coded words", template=FREQUENT_WORDS),
        Task(name="qa_1", haystack="documents", template=QUESTION_ANSWERING, metric="part"),
        Task(name="qa_2", haystack="documents", template=QUESTION_ANSWERING, metric="part"),
    )
}
SYNTHETIC = tuple(name for name, task in TASKS.items() if task.haystack != "documents")
"""The 11 tasks that need no data set."""
