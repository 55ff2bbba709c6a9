"""Registered problems, checked for correctness and then timed: ``python -m benchmarks.run``."""
