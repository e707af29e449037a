"""Pages of docs/evidence from what `bnf experiment` left: python docs/evidence_pages.py runs/experiments

Pages that are there of other experiments, or of the same at another scale, stay.
"""

import re
import shutil
import sys
from pathlib import Path

from bnf_align.experiments import EXPERIMENTS, experiment, gsm8k
from bnf_align.experiments.outcome import NAME, Outcome, read
from bnf_align.experiments.tables import markdown

HERE = Path(__file__).parent / "evidence"
SUMMARY = re.compile(r"(<!-- what was seen -->\n).*?(<!-- end -->)", re.DOTALL)


def write(folder: Path, pages: Path) -> list[Outcome]:
    """A page, pictures and results of each experiment that has any, and the list of all pages on the first one."""
    found = [read(folder / name / NAME) for name in EXPERIMENTS if (folder / name / NAME).exists()]
    for outcome in found:
        own, name = folder / outcome.experiment, page_name(outcome)
        shutil.copy(own / NAME, pages / f"{name}.json")
        pictures = sorted(own.glob("*.png"))
        for picture in pictures:
            shutil.copy(picture, pages / f"{name}_{picture.name}")
        (pages / f"{name}.md").write_text(page(outcome, [p.name for p in pictures]), encoding="utf-8")
    index = pages / "index.md"
    text = SUMMARY.sub(lambda match: match[1] + summary(_all(pages)) + match[2], index.read_text(encoding="utf-8"))
    index.write_text(text, encoding="utf-8")
    return found


def _all(pages: Path) -> list[Outcome]:
    """In the order of the experiments, those of the usual scale first."""
    every = [read(path) for path in pages.glob("*.json")]
    names = list(EXPERIMENTS)
    return sorted(every, key=lambda outcome: (bool(_scale(outcome)), names.index(outcome.experiment), _scale(outcome)))


def _scale(outcome: Outcome) -> str:
    """Where it is not the one that the experiment has by default."""
    scale: str = outcome.facts["scale"]
    return "" if scale == experiment(outcome.experiment).scales[0] else scale


def page_name(outcome: Outcome) -> str:
    return "_".join(filter(None, (outcome.experiment, _scale(outcome))))


def page(outcome: Outcome, pictures: list[str]) -> str:
    facts, name = outcome.facts, page_name(outcome)
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    shown = "\n\n".join(f"![{outcome.experiment}: {Path(p).stem}]({name}_{p})" for p in pictures)
    return (
        f"# {title(outcome)}\n\n{shown}\n\n{markdown(outcome)}\n"
        f"`{command(outcome)}`: {facts['cpu_hours']} CPU hours on the {facts['backend']} backend; {versions}. All "
        f"numbers are in [{name}.json]({name}.json).\n"
    )


def command(outcome: Outcome) -> str:
    facts = outcome.facts
    parts = ["bnf experiment", outcome.experiment]
    parts += [f"--scale {_scale(outcome)}"] if _scale(outcome) else []
    parts += [f"--solutions {Path(gsm8k.SOURCE).name}"] if "solutions" in facts else []
    parts += [f"--methods '{','.join(facts['methods'])}'"] if "methods" in facts else []
    return " ".join([*parts, f"--seeds {facts['seeds']} --sweep-seeds {facts['sweep_seeds']}"])


def summary(found: list[Outcome]) -> str:
    rows = [f"| [{title(x)}]({page_name(x)}.md) | {x.claim} | {x.seen} |\n" for x in found]
    return (
        "\n| | claimed | seen |\n|---|---|---|\n" + "".join(rows) + "\n" if rows else "\nNothing has been run yet.\n\n"
    )


def title(outcome: Outcome) -> str:
    return ", ".join(filter(None, (outcome.experiment.replace("_", " ").capitalize(), _scale(outcome))))


if __name__ == "__main__":
    print(*(f"{outcome.experiment}: {outcome.seen}" for outcome in write(Path(sys.argv[1]), HERE)), sep="\n")
