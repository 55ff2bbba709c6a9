"""Log Z, marginals, decoding and information of a problem: one module for each question."""
