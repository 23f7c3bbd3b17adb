"""A patched model behind a server: the thread that runs it, its queue, reused prefixes and metrics.

Nothing here speaks HTTP; `runtime/hf/serving` is transformers' own server with these parts put in.
"""
