"""`python -m bnf_recipes` is `bnf`: what torchrun, accelerate and mlx.launch start."""

from bnf_recipes.cli import main

main()
