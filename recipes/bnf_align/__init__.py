"""The jobs, one module each, and the command line `bnf`."""
