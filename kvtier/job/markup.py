"""The report's markup: tables, figures with captions, and figures as SVG that can stand inside HTML. Text is escaped here."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from kvtier.job.plots import VARIABLES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def html_card(term: str, value: str, note: str) -> str:
    """One figure in words: what it is, its value, and a note to it."""
    return f"<div><dt>{escape(term)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str] = ()) -> str:
    """A table whose first column names the rows; columns in `text` are set left, the others right; rows "ok" and "FAILED" are marked."""

    def kind(name: str) -> str:
        return ' class="text"' if name in text else ""

    lines = [f'<p class="note">{escape(caption)}</p>' if caption else "", '<div class="scroll" tabindex="0">', "<table>"]
    lines += ["<thead><tr>", *(f'<th scope="col"{kind(name)}>{escape(name)}</th>' for name in head), "</tr></thead>"]
    lines.append("<tbody>")
    for first, *others in rows:
        mark = {"ok": "good", "FAILED": "bad"}.get(first, "")
        cells = "".join(f"<td{kind(name)}>{escape(value)}</td>" for name, value in zip(head[1:], others, strict=True))
        lines.append(f'<tr><th scope="row" class="{mark}">{escape(first)}</th>{cells}</tr>')
    return "\n".join([*filter(None, lines), "</tbody>", "</table>", "</div>"])


def html_figure(name: str, figure: Figure, title: str, caption: str) -> str:
    """A figure with its caption. `name` begins its ids: no other figure of the page has it."""
    return (
        f'<figure><div class="scroll" tabindex="0">{_svg(name, figure, title, caption)}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _svg(name: str, figure: Figure, title: str, caption: str) -> str:
    """The figure as SVG to stand inside HTML: ids its own, colours the page's, a title for those who cannot see it."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # text stays text: the reader's fonts count, not matplotlib's
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Creator": None, "Date": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    label = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(caption)}</desc>'
    return f'{opening} role="img" aria-labelledby="{name}-title {name}-desc">{label}{rest}'
