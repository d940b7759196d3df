"""matplotlib's SVG in the colours of a light and a dark theme.

A figure is drawn in the colours of the light theme. In the SVG each of them becomes a CSS variable of the same name as
the page's (`--text`, `--muted` and so on), so that a figure inside the page follows the page's theme. A figure in a
file of its own brings the variables along.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from isthmus.common.figures import plotting

LIGHT = {
    "surface": "#ffffff",
    "text": "#1b1e20",
    "muted": "#586068",
    "line": "#dfe2e3",
    "accent": "#0b6b68",
    "second": "#9a4a00",
    "third": "#4b3f9e",
    "bad": "#b3261e",
    "faint": "#e9ebea",
}
DARK = {
    "surface": "#171b1d",
    "text": "#e9ecee",
    "muted": "#a5adb4",
    "line": "#2c3236",
    "accent": "#5fcfc6",
    "second": "#f0a862",
    "third": "#b3a8ff",
    "bad": "#ff9a91",
    "faint": "#2a3034",
}
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # wider than what browsers put in its place, so nothing is cut off
    "font.size": 9.5,
    "text.color": LIGHT["text"],
    "axes.labelcolor": LIGHT["text"],
    "axes.edgecolor": LIGHT["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
}


@contextmanager
def drawing(name: str) -> Iterator[Any]:
    """`pyplot` in this style while the block runs. The same drawing under the same name is the same SVG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plot = plotting()
    with plot.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield plot


def inline_svg(figure: Any, title: str, description: str) -> str:
    """The figure as an element for an HTML page that has the variables; the figure is closed."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    plotting().close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]  # without the declaration and the document type, which name other origins
    box = re.search(r'viewBox="([^"]+)"', text)
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\n?", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[a-z0-9_]+_\d+"', "", body)  # groups' names, which would be there once for each figure
    body = body.replace("'DejaVu Sans'", FONTS)
    for colour, value in LIGHT.items():
        body = body.replace(value, f"var(--{colour})")
    label = f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'viewBox="{box.group(1) if box else ""}">{label}{body}'
    ).strip()


def standalone_svg(inline: str) -> str:
    """The same for a file of its own: on a ground, in the theme that the reader's system asks for."""
    opened = inline.index(">") + 1
    style = f"<style>{_variables('svg', LIGHT)}*{{stroke-linejoin:round;stroke-linecap:butt}}"
    style += f"@media (prefers-color-scheme: dark){{{_variables('svg', DARK)}}}</style>"
    ground = '<rect width="100%" height="100%" style="fill: var(--surface)"/>'
    return f"{inline[:opened]}{style}{ground}{inline[opened:]}\n"


def theme_css() -> str:
    """The variables for a page."""
    return f"{_variables(':root', LIGHT)}\n@media (prefers-color-scheme: dark){{{_variables(':root', DARK)}}}"


def _variables(selector: str, colours: dict[str, str]) -> str:
    return selector + "{" + ";".join(f"--{name}:{value}" for name, value in colours.items()) + "}"
