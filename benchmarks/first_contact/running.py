"""Running a stage, once: what it printed, how it ended, how long it took."""

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.first_contact.stages import ROOT, Stage
from bnf_core.storage.files import replace_file


@dataclass(frozen=True)
class Outcome:
    """
    Args:
        code: 0: done; None: not run, `note` says why.
        commands, versions: what was run, and with which versions: an outcome of others does not count.
    """

    name: str
    about: str
    code: int | None
    seconds: float
    note: str
    commands: list[str]
    versions: dict[str, str]


def run(stage: Stage, folder: Path, versions: Mapping[str, str], environment: Mapping[str, str]) -> Outcome:
    """Run a stage whose outcome is not there yet, or was none; what it prints goes to `output.txt`."""
    commands = [" ".join(command) for command in stage.commands]
    known = _known(folder)
    if known is not None and known.code == 0 and (known.commands, known.versions) == (commands, dict(versions)):
        return known
    folder.mkdir(parents=True, exist_ok=True)
    started, code, note = time.monotonic(), None if stage.absent else 0, stage.absent or ""
    with (folder / "output.txt").open("w", encoding="utf-8") as output:
        for command in stage.commands if not stage.absent else ():
            output.write(f"$ {' '.join(command)}\n")
            output.flush()
            left = 60 * stage.minutes - (time.monotonic() - started)
            try:
                code = subprocess.run(
                    command,
                    cwd=ROOT,
                    env=os.environ | dict(environment) | dict(stage.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=max(1.0, left),
                ).returncode
            except subprocess.TimeoutExpired:
                code, note = 124, f"ended after {stage.minutes:g} minutes"
            if code != 0:
                break
    outcome = Outcome(
        stage.name, stage.about, code, time.monotonic() - started, note, commands, dict(versions)
    )  # fmt: skip
    replace_file(folder / "outcome.json", json.dumps(asdict(outcome), indent=1) + "\n")
    return outcome


def _known(folder: Path) -> Outcome | None:
    try:
        held: dict[str, Any] = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        return Outcome(**held)
    except (OSError, ValueError, TypeError):
        return None
