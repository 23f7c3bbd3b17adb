"""The process group of a sequence.

- config, mesh: what a user decides (ContextParallel), and the ranks that share one sequence (Mesh).
- join, meeting: how the ranks find each other and make their groups.
- comm, autograd: the collectives, counted; those with a gradient.
- watch, digest: what happens when a rank fails; hashes by which ranks are compared.
- c10d: the private functions of torch.distributed.
"""
