"""The folder to send back: a page, the same as JSON, and what the stages left, without whose machine it was."""

import getpass
import json
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.first_contact.running import Outcome
from benchmarks.first_contact.targets import TARGETS

TEXTS = {".json", ".md", ".html", ".txt"}
LARGEST = 4 * 2**20  # bytes of a file that is sent


def write_report(folder: Path, machine: str, model: str, facts: Mapping[str, str], outcomes: Sequence[Outcome]) -> Path:
    """Write `report/` anew from all outcomes so far; its page."""
    report = folder / "report"
    report.mkdir(parents=True, exist_ok=True)
    measured = [(target, target.measure(folder, model)) for target in TARGETS]
    content = {
        "machine": machine,
        "facts": dict(facts),
        "stages": [asdict(outcome) for outcome in outcomes],
        "targets": [
            {"name": t.name, "limit": f"{t.kind} {t.limit:g} {t.unit}", "measured": value, "verdict": t.verdict(value)}
            for t, value in measured
        ],
    }
    scrub = scrubber(folder)
    kept = {}
    for outcome in outcomes:
        kept[outcome.name] = [path.name for path in sorted((folder / outcome.name).glob("*")) if _is_kept(path)]
        for name in kept[outcome.name]:
            source, target = folder / outcome.name / name, report / outcome.name / name
            target.parent.mkdir(exist_ok=True)
            if source.suffix in TEXTS:
                target.write_text(scrub(source.read_text(encoding="utf-8", errors="replace")), encoding="utf-8")
            else:
                target.write_bytes(source.read_bytes())
    (report / "report.json").write_text(scrub(json.dumps(content, indent=1)) + "\n", encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(**content, kept=kept)
    (report / "index.html").write_text(scrub(page), encoding="utf-8")
    return report / "index.html"


def _is_kept(path: Path) -> bool:
    return path.is_file() and path.suffix in TEXTS | {".png"} and path.stat().st_size <= LARGEST


def scrubber(folder: Path) -> Callable[[str], str]:
    """Replaces names of this machine, its user and the user's folders in a text."""
    places = {str(folder.resolve()): "OUTPUT", str(folder): "OUTPUT", str(Path.home()): "HOME"}
    longest_first = sorted((path for path in places if len(path) > 1), key=len, reverse=True)
    names = {socket.gethostname(), socket.gethostname().partition(".")[0], getpass.getuser()}
    telling = [re.escape(name) for name in names if len(name) > 2 and name != "root"]

    def scrub(text: str) -> str:
        for path in longest_first:
            text = text.replace(path, places[path])
        return re.sub(rf"\b(?:{'|'.join(telling)})\b", "NAME", text) if telling else text

    return scrub
