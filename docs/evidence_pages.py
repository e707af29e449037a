"""Pages of docs/evidence from what `bnf experiment` left: python docs/evidence_pages.py runs/experiments"""

import re
import shutil
import sys
from pathlib import Path

from bnf_align.experiments import EXPERIMENTS
from bnf_align.experiments.outcome import NAME, Outcome, read
from bnf_align.experiments.tables import markdown

HERE = Path(__file__).parent / "evidence"
SUMMARY = re.compile(r"(<!-- what was seen -->\n).*?(<!-- end -->)", re.DOTALL)


def write(folder: Path, pages: Path) -> list[Outcome]:
    """A page, pictures and results of each experiment that has any, and the list of them on the first page."""
    found = [read(folder / name / NAME) for name in EXPERIMENTS if (folder / name / NAME).exists()]
    for outcome in found:
        own = folder / outcome.experiment
        shutil.copy(own / NAME, pages / f"{outcome.experiment}.json")
        pictures = sorted(own.glob("*.png"))
        for picture in pictures:
            shutil.copy(picture, pages / f"{outcome.experiment}_{picture.name}")
        (pages / f"{outcome.experiment}.md").write_text(page(outcome, [p.name for p in pictures]), encoding="utf-8")
    index = pages / "index.md"
    text = SUMMARY.sub(lambda match: match[1] + summary(found) + match[2], index.read_text(encoding="utf-8"))
    index.write_text(text, encoding="utf-8")
    return found


def page(outcome: Outcome, pictures: list[str]) -> str:
    facts = outcome.facts
    command = f"bnf experiment {outcome.experiment} --seeds {facts['seeds']} --sweep-seeds {facts['sweep_seeds']}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    shown = "\n\n".join(f"![{outcome.experiment}: {Path(name).stem}]({outcome.experiment}_{name})" for name in pictures)
    return (
        f"# {title(outcome)}\n\n{shown}\n\n{markdown(outcome)}\n"
        f"`{command}`: {facts['cpu_hours']} CPU hours on the {facts['backend']} backend; {versions}. All numbers are "
        f"in [{outcome.experiment}.json]({outcome.experiment}.json).\n"
    )


def summary(found: list[Outcome]) -> str:
    rows = [f"| [{title(x)}]({x.experiment}.md) | {x.claim} | {x.seen} |\n" for x in found]
    return (
        "\n| | claimed | seen |\n|---|---|---|\n" + "".join(rows) + "\n" if rows else "\nNothing has been run yet.\n\n"
    )


def title(outcome: Outcome) -> str:
    return outcome.experiment.replace("_", " ").capitalize()


if __name__ == "__main__":
    print(*(f"{outcome.experiment}: {outcome.seen}" for outcome in write(Path(sys.argv[1]), HERE)), sep="\n")
