"""The report of result folders as one HTML page that needs no network and no other file.

view.py      headlines, tables and sections of the evaluations with scores
samples.py   the prompts on which methods differ most, with all answers
others.py    perplexity, fidelity, lm-eval, and models trained from scratch
costs.py     density by layer, speed by length, break-even
settings.py  commands, settings, machines
charts.py    plots as inline SVG
page.py      all of it through report.html.j2 and report.css
"""
