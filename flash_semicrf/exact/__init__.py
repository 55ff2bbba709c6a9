"""Algorithms of the exact engine, each a function of a semiring, an edge tensor and lengths."""
