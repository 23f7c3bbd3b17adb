"""How Triton kernels load rows of keys and values: one file for each storage format. Imported only by
kernels."""
