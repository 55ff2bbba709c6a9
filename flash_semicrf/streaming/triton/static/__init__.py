"""Kernels for transitions that do not depend on the duration."""
