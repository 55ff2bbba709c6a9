"""Kernels that run eight short sequences at once, one in each lane of a vector."""
