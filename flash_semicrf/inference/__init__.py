"""Log Z, marginals, decoding and information measures of a problem, one module for each."""
