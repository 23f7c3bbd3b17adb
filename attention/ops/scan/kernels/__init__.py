"""The Triton kernels of ``scan``, for triton.py."""
