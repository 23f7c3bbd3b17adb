"""How Triton kernels load rows of keys and values: one file for each storage format; rows.py is what they
share. Imported only by kernels."""
