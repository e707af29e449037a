"""Proof that a backend computes the BNF loss: shared vectors, checks against the float64 oracle, and a runner.

It knows a backend by `bnf_core.protocol` alone and never imports a deep-learning framework itself.
"""
