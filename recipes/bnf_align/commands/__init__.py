"""The commands of `bnf`, a module each, looked up when they are called.

A module has `Config`, a dataclass whose fields are the command's settings, and `run(config, console)`, which returns
the exit code; where it has them, `POSITIONAL`, flags whose names may be left out, and `backends(config)`, those that
it loads: default, that of `config.hardware`.
"""

# By name, with dashes for the module's underscores: one line of help.
COMMANDS = {
    "train": "align a model on chosen and rejected completions",
    "online": "align a model on its own samples, as a judge sees them",
    "plan": "say what a run would take: memory, largest batch, steps, time",
    "evaluate": "score labelled completions under a model",
    "reference": "compute the reference of feedback once, for any number of runs",
    "generate": "complete a prompt",
    "chat": "talk to the base model and the aligned one, side by side",
    "push": "push what a run has trained to the Hub",
    "export": "what a run has trained, as other programs read it: GGUF, Ollama, MLX, PEFT, transformers",
    "objectives": "list what training can minimise, and what each objective needs",
    "data-check": "check every row of feedback before it is trained on",
    "data-convert": "write feedback of any shape as .jsonl",
    "data-cache": "list the tokens that are kept on this machine, or remove them",
    "experiment": "run an experiment of the paper's claims, with seeds, intervals and pictures",
    "report": "make one HTML page of runs or experiments",
    "demo": "align a small model on its own answers to word problems, show before and after",
    "import-gguf": "turn a GGUF file into safetensors",
    "convert-adapter": "turn an adapter of PEFT into one of mlx-lm, or back",
    "fuse": "make one model of a model and its adapter",
    "doctor": "what is installed and what works here",
    "check-model": "compare one model between two backends",
    "check-run": "compare two finished runs, of either backend",
    "conformance": "check a backend against the float64 oracle",
}
