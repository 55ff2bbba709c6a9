"""Inputs of inference: scores, segmentations and constraints, with their checks."""
