"""Context parallelism: one sequence and its KV cache sharded over the ranks of a torch process group.

    group/       the process group, its collectives and its failures
    mechanisms/  how ranks compute one sequence: layouts, prefill, decode
    planner/     memory, bytes and time before anything runs

It knows attention and no model.
"""
