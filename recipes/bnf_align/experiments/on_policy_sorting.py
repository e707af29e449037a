"""As `on_policy`, where digits are to be sorted."""

from bnf_align.experiments.on_policy import of_task

EXPERIMENT = of_task("sort")
