"""`python -m bnf_align` is `bnf`: what torchrun, accelerate and mlx.launch start."""

from bnf_align.cli import main

main()
