"""How one sequence is computed by several ranks.

layout, order   which positions each rank computes and holds; rows brought into the order of positions
prefill         a call whose tokens are sharded: gather, ring, ulysses, usp and pass_q for dense attention
                (volume says which sends least); selected moves only the keys that a method selects
decode          queries on every rank, keys sharded: one collective merges the partial results
keys, entries   what a method sees of sharded keys; block summaries, whole on every rank
call            what the functions above pass to each other
"""
