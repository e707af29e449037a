"""The page: one HTML file without scripts, that needs no network. *.html.j2 are its text; here is what it shows.

Charts are matplotlib's, as everywhere in the project: SVG within the page takes no library to show, prints sharp, and
is read in light and dark.
"""

from collections.abc import Sequence
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from bnf_align.experiments import experiment, tables
from bnf_align.experiments.outcome import Outcome
from bnf_align.experiments.pictures import panels
from bnf_align.reports.charts import styled, svg
from bnf_align.reports.run_charts import charts
from bnf_align.reports.runs import Run

FULL = 4.0  # nats: a shift that has the whole colour


def of_runs(runs: Sequence[Run]) -> str:
    with styled():
        drawn = [(chart, svg(chart.figure, chart.title)) for chart in charts(runs)]
    return _render("run.html.j2", runs=runs, charts=drawn, colour=_colour, metrics=_metrics(runs))


def of_experiments(outcomes: Sequence[Outcome]) -> str:
    with styled():
        drawn = {outcome.experiment: _pictures(outcome) for outcome in outcomes}
    return _render("experiment.html.j2", outcomes=outcomes, pictures=drawn, tables=tables)


def _pictures(outcome: Outcome) -> list[str]:
    """Each panel by itself, so that a phone's screen is wide enough."""
    draw = [one for of in experiment(outcome.experiment).pictures.values() for one in of]
    return [svg(panels(outcome, one), f"{outcome.experiment}, picture {i}") for i, one in enumerate(draw, 1)]


def _metrics(runs: Sequence[Run]) -> dict[str, list[tuple[str, str]]]:
    """By name, of each run before and after."""
    each = [run.metrics() for run in runs]
    names = dict.fromkeys(name for found in each for name in found)
    return {name: [found.get(name, ("–", "–")) for found in each] for name in names}


def _colour(shift: float) -> str:
    """Of a token: blue where it became likelier, orange where it became less likely, the stronger the farther."""
    strength = min(abs(shift) / FULL, 1.0)
    return f"{'up' if shift > 0 else 'down'} s{round(strength * 5)}"


def _render(template: str, **what: Any) -> str:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("bnf_align", "reports"), PackageLoader("bnf_conformance", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**what)
