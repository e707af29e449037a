"""`bnf report`: one HTML page of a run, of several side by side, or of experiments."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from bnf_align.experiments import EXPERIMENTS
from bnf_align.experiments.outcome import NAME, read
from bnf_align.reports import page
from bnf_align.reports.runs import read_runs
from bnf_align.run.results import result_file
from bnf_core.errors import UserError
from bnf_core.storage.files import replace_file


@dataclass
class ReportConfig:
    """Write one HTML page, which needs no network, of a run, of several side by side, or of experiments."""

    runs: list[str] = field(default_factory=list)
    """Folders of runs, or of experiments."""
    output: str | None = None
    """The file to write; default: report.html in the first folder."""

    def __post_init__(self) -> None:
        if self.output is not None and Path(self.output).suffix != ".html":
            raise ValueError(f"output is {self.output!r}: expected a name that ends in .html")


def report(folders: Sequence[Path], output: Path) -> Path:
    """
    Raises:
        UserError: a folder without results, one that is being written, results of another version, or what cannot be
            compared.
    """
    results = [path for folder in folders if (path := _results(folder)) is not None]
    if results and len(results) < len(folders):
        raise UserError("runs and experiments cannot be compared: expected folders of one kind")
    if results:
        outcomes = [read(path) for path in results]
        unknown = next((x.experiment for x in outcomes if x.experiment not in EXPERIMENTS), None)
        if unknown is not None:
            raise UserError(f"results of an unknown experiment {unknown!r}: expected one of {', '.join(EXPERIMENTS)}")
        text = page.of_experiments(outcomes)
    else:
        text = page.of_runs(read_runs(folders))
    try:
        replace_file(output, text)
    except OSError as error:
        raise UserError(f"output {output}: {error.strerror}") from error
    return output


def _results(folder: Path) -> Path | None:
    """Of an experiment, given by its folder or the file itself."""
    if folder.is_file():
        return folder
    return folder / NAME if (folder / NAME).exists() else None


Config = ReportConfig
POSITIONAL = ("--runs",)


def run(config: ReportConfig, console: Console) -> int:
    if not config.runs:
        raise UserError("missing --runs: expected folders of runs or experiments, as runs/a,runs/b")
    folders = [Path(name) for name in config.runs]
    default = folders[0] if folders[0].is_dir() else folders[0].parent
    output = result_file(config.output or str(default / "report.html"), "output")
    console.print(f"report  {report(folders, output)}", highlight=False, markup=False, soft_wrap=True)
    return 0
