"""Kernels for transitions that depend on the duration of the segment arrived in."""
