"""How one sequence is computed by several ranks.

- layout, order: which positions each rank computes and holds; rows brought into the order of positions.
- prefill: a call whose tokens are divided among ranks. Dense attention by gather, ring, ulysses, usp or
pass_q
  (volume says which sends least); selected moves only the keys that a method selects.
- decode: queries on every rank, sharded keys; one collective merges the partial results.
- keys, entries: what a method sees of sharded keys; block summaries, whole on every rank.
- call: the values that these functions pass to each other.
"""
