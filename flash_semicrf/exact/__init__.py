"""Algorithms of the exact engine: each takes a semiring, an edge tensor and lengths."""
