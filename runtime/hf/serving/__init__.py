"""transformers' own server (`transformers.cli.serving`) with farspan's parts put in by subclassing.

`internals.check` comes first: the other files import what it looks for.
"""
