"""`bnf report`: one page of runs or experiments, whole, and readable by people and machines."""

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bnf_align import cli
from bnf_align.experiments.outcome import Interval, Line, Outcome
from bnf_align.reports.charts import svg
from bnf_align.run import row_counts, token_log
from bnf_core.storage.files import lock

VOID = {"meta", "br", "wbr", "link"}


class Page(html.parser.HTMLParser):
    """Every tag is closed; what a page links to."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.ids += [str(found["id"])] if "id" in found else []
        self.links += [str(found[name]) for name in ("href", "src", "xlink:href") if name in found]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(text: str) -> None:
    """A whole page, of which each name is used once, and which needs nothing from elsewhere."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "<script" not in text and "http:" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)


@pytest.fixture(scope="module")
def run_folder(tiny_model: Path, feedback: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    argv = ["train", str(feedback), "--model", str(tiny_model), "--output", str(folder), "--valid-fraction", "0.5"]
    argv += ["--max-steps", "2", "--batch-size", "4", "--sample-every", "1", "--sample-tokens", "4"]
    assert cli.run([*argv, "--hardware.backend", "torch"]) == 0
    return folder


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checkpoints", "adapter"))
    return to


def line(method: str, setting: str) -> Line:
    number = Interval(0.5, 0.4, 0.6)
    names = "accuracy gain beside others tax surprise moved_chosen moved_rejected largest_grad_norm gini".split()
    kinds = {"chosen": [0.1, 0.2], "rejected": [0.3, 0.4]}
    path = {name: [1.0, 2.0] for name in ("step", "log_p_chosen", "log_p_rejected", "perplexity")}
    curves = {"path": path, "grad_norms": [1.0, 2.0], "shift_at": kinds, "gradient_at": {"start": kinds, "end": kinds}}
    return Line(setting, method, 1e-3, 3, method == "DPO", {name: number for name in names}, curves)


def outcome(name: str = "stability") -> Outcome:
    start = {"accuracy": 0.4, "others": 0.9, "perplexity": 3.0, "log_p_chosen": -1.0, "log_p_rejected": -2.0}
    sweep = [{"objective": "bnf", "learning_rate": 1e-3, "accuracy": 0.5, "collapsed": 0, "seeds": 2, "taken": True}]
    lines = [line("BNF", "pairs"), line("DPO", "pairs")]
    return Outcome(name, "A claim <of> ours.", {"scale": "didactic"}, start, sweep, lines, "", "It was seen.")


# What a run keeps


def test_a_run_keeps_its_tokens_and_counts_its_rows(run_folder: Path) -> None:
    lines = token_log.read(run_folder / token_log.NAME)
    assert [found["step"] for found in lines] == [0, 2]
    first, last = lines
    for found in lines:
        shares = found["gradient_at"]
        assert sum(shares["chosen"]) + sum(shares["rejected"]) == pytest.approx(1.0, abs=1e-3)
        tokens = sum(len(row["tokens"]) for row in found["rows"])
        assert sum(sum(counts) for counts in found["target_weight"].values()) == tokens
    assert first["target_weight"]["chosen"][:-1] == [0] * 9  # p = r: t = 1
    assert [row["tokens"] for row in first["rows"]] == [row["tokens"] for row in last["rows"]]
    assert first["rows"] != last["rows"]
    counts = row_counts.read(run_folder)
    assert sum(of["rows"] for of in counts["training"].values()) == 6
    assert counts["held out"]["chosen"]["tokens"] == sorted(counts["held out"]["chosen"]["tokens"])


# Pages


def test_a_run_as_a_page(run_folder: Path, tmp_path: Path) -> None:
    assert cli.run(["report", str(run_folder), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    check(text)
    for words in ("What was trained on what", "preference_accuracy", "Gradient along the sequence"):
        assert words in text
    assert "No idea, sorry.&lt;|end|&gt;" in re.sub(r"<[^>]*>", "", text)  # token by token, with nothing between


@pytest.mark.slow
def test_two_runs_side_by_side(run_folder: Path, tmp_path: Path) -> None:
    other = copied(run_folder, tmp_path / "second")
    assert cli.run(["report", str(run_folder), str(other), "--output", str(tmp_path / "page.html")]) == 0
    text = (tmp_path / "page.html").read_text()
    check(text)
    assert "first" in text and "second" in text


def test_experiments_as_a_page(tmp_path: Path) -> None:
    for name in ("stability", "tax"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(outcome(name).to_json())
    assert (
        cli.run(["report", str(tmp_path / "stability"), str(tmp_path / "tax"), "--output", f"{tmp_path}/a.html"]) == 0
    )
    text = (tmp_path / "a.html").read_text()
    check(text)
    assert "A claim &lt;of&gt; ours." in text and "50% (40% to 60%)" in text


def test_a_chart_has_the_ink_of_the_page() -> None:
    from matplotlib.figure import Figure

    from bnf_align.reports.charts import styled

    with styled():
        figure = Figure()
        figure.subplots().set_title("a title")
        drawn, again = svg(figure, "One"), svg(figure, "One")
    assert drawn == again and "#010203" not in drawn and "currentColor" in drawn
    assert ">a title</text>" in drawn and 'aria-label="One"' in drawn


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run, at: [at / "nothing"], "no such folder"),
        (lambda run, at: [at], "no metrics.jsonl"),
        (lambda run, at: [run, run], "given twice"),
    ],
)
def test_what_cannot_be_reported(
    make: object, message: str, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(make)
    folders = [str(path) for path in make(run_folder, tmp_path)]
    assert cli.run(["report", *folders, "--output", str(tmp_path / "page.html")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "page.html").exists()


def test_runs_that_do_not_go_together(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copied(run_folder, tmp_path / "second")
    config = other / "config.yaml"
    config.write_text(config.read_text().replace("valid_fraction: 0.5", "valid_fraction: 0.25"))
    assert cli.run(["report", str(run_folder), str(other)]) == 2
    assert "valid_fraction is 0.5 and 0.25" in " ".join(capsys.readouterr().err.split())
    (other / "results.json").write_text(outcome().to_json())
    assert cli.run(["report", str(run_folder), str(other)]) == 2
    assert "cannot be compared" in capsys.readouterr().err


def test_results_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"format": 99}))
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "results of version 99" in capsys.readouterr().err
    (tmp_path / "results.json").write_text(outcome("unheard").to_json())
    assert cli.run(["report", str(tmp_path)]) == 2
    assert "unknown experiment" in capsys.readouterr().err
    assert cli.run(["report"]) == 2


def test_a_run_that_is_being_written(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copied(run_folder, tmp_path / "second")
    held = lock(other / ".lock", wait=False)
    try:
        assert cli.run(["report", str(other)]) == 2
    finally:
        held.release()
    assert "a run is writing to it" in capsys.readouterr().err


# As a browser shows it

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# What the page in a frame tells the page around it: headless Chromium makes no window as narrow as a phone.
PROBE = """<script>
addEventListener('load', () => {
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('svg') &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName);
  const scrolls = [...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth && e.tabIndex < 0);
  parent.postMessage(JSON.stringify({page: document.documentElement.scrollWidth, inner: innerWidth, wide,
    unreachable: scrolls.length}), '*');
})
</script></body>"""
FRAME = """<iframe src='page.html' style='width: {width}px; height: 800px; border: 0'></iframe><pre id=found></pre>
<script>addEventListener('message', e => {{ found.textContent = e.data }})</script>"""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_whole(width: int, run_folder: Path, tmp_path: Path) -> None:
    from bnf_align.reports import page
    from bnf_align.reports.runs import read_runs

    assert CHROMIUM is not None
    for text in (page.of_runs(read_runs([run_folder])), page.of_experiments([outcome()])):
        (tmp_path / "page.html").write_text(text.replace("</body>", PROBE))
        (tmp_path / "frame.html").write_text(FRAME.format(width=width))
        shown = subprocess.run(
            [CHROMIUM, *FLAGS, "--virtual-time-budget=8000", "--dump-dom", (tmp_path / "frame.html").as_uri()],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        told = re.search(r'<pre id="found">(.*?)</pre>', shown.stdout)
        assert told is not None
        found = json.loads(told[1])
        assert found["inner"] == width and found["page"] <= width
        assert found["wide"] == [] and found["unreachable"] == 0
        assert "CONSOLE" not in shown.stderr
