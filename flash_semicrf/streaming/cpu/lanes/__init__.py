"""Kernels that run eight sequences at once, one in each lane of a vector."""
