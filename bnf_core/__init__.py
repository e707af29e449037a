"""The backend-agnostic core of bnf-align: NumPy only, never a deep-learning framework."""
