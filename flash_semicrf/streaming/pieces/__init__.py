"""Inference in pieces of long sequences, which run at the same time, with a certificate.

See ``docs/long_sequences.md`` for the method.
"""
