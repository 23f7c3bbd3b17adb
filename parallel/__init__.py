"""Context parallelism: the KV cache and the attention over it spread over the ranks of a torch `DeviceMesh`.

This layer stands between `attention` and `runtime`. It knows which keys each rank holds (layouts), how
partial results travel (gather, ring, all-to-all, decode over sharded caches) and that they meet in
`attention.partial.merge`; it knows no model. Nothing is exported yet: one device needs none of it.
"""
