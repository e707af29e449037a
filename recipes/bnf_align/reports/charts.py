"""matplotlib's figures as SVG within a page: text stays text, ink is the page's own colour, in light and in dark."""

import io
import re
from contextlib import AbstractContextManager
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#010203"  # no palette's colour: what is drawn in it becomes the page's own
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bnf",  # the same figure is the same text
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
}


def svg(figure: Figure, name: str) -> str:
    """Trusted markup: all text in it is matplotlib's, which escapes it.

    Args:
        name: what the figure shows, for those who cannot see it.
    """
    FigureCanvasSVG(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_alpha(0)
    written = io.StringIO()
    figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace("#444444", "currentColor")
    # Widths are the page's; what was a number of points is the most that it takes.
    text = re.sub(r'(<svg[^>]*?) height="[\d.]+pt"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt"', r'\1 style="width: 100%; max-width: \2pt"', text, count=1)
    text = re.sub(r"<svg ", f'<svg role="img" aria-label="{escape(name)}" ', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return _with_own_ids(text, name)


def _with_own_ids(text: str, name: str) -> str:
    """No two figures of a page may have one name for different things."""
    prefix = re.sub(r"\W", "", name.title())
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", text)


def styled() -> AbstractContextManager[None]:
    """To be drawn within."""
    return rc_context(STYLE)
