"""How one sequence is computed by several ranks.

layout     which positions each rank computes and holds
prefill    a call whose tokens are spread over ranks: gather, ring, ulysses, usp, pass_q for dense attention
(volume says
           which sends least); selected moves only the keys that a selective method reads
decode     queries on every rank, keys sharded: partial results are merged in one collective; keys is what a
method sees entries    block summaries, whole on every rank, so that selection is that of one device
"""
