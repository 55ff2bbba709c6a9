"""Exact, fast inference and training for semi-Markov conditional random fields in PyTorch."""
