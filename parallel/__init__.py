"""Context parallelism: one sequence and its KV cache spread over the ranks of a torch process group.

    mesh      who takes part (ContextParallel, join), watch what happens when a rank fails
    comm      the collectives, counted; autograd those with a gradient
    layout    which positions each rank computes and holds
    prefill   a call whose tokens are shared out: gather, ring, ulysses, usp, pass_q for dense attention
              (volume says which sends least), and for selective methods only what was selected
    entries   block summaries, whole on every rank, so that selection is that of one device
    decode    queries on every rank, keys spread: partial results merged in one collective; keys what a
              method sees of them
    plan      memory, bytes and time before anything runs; simulate the same, event by event

It knows attention and no model.
"""
