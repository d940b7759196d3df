"""The ledger as one page: an HTML file that asks nobody for anything, and its figures as files beside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from isthmus.common.files import disk_errors
from isthmus.experiments.leak.page.leak_figures import draw_all
from isthmus.experiments.leak.page.ledger_rows import (
    MISSING,
    SPACED,
    TWO_LOSSES,
    LedgerRow,
    Value,
    frontier,
    frontier_sentence,
    ledger_rows,
    measured,
    percent,
    times,
)
from isthmus.experiments.leak.page.themed_svg import standalone_svg, theme_css

COMMAND = "isthmus experiment leak --json"
"""What makes a ledger, where the ledger does not say it more exactly in `settings.command`."""
_FIGURES = {
    "modes": (
        "In each mode",
        "One square is one token of a hundred; red ones are those that the strongest attack of the row names right. "
        "Where nothing is sent, they are what somebody gets who has seen no traffic. With a private front, the "
        "attacker has the base weights alone. A cheap defence is the least exposed one whose loss is at most 3 % above "
        "the undefended run's.",
    ),
    "frontier": (
        "Attack against task quality",
        "One mark a row: to the left the cloud reads less, at the bottom the task is learned better. The line is the "
        "frontier: no other row has both fewer tokens read and a lower loss. A hollow mark is a row that sends no "
        "activations. The attacker knows the front; of undefended rows, the least exposed one is there. Where the "
        "strongest attack gets less than a guess without any traffic, the mark is at that guess. "
        f"{TWO_LOSSES} Above the dashed line it is worse than without training.",
    ),
    "rarity": (
        "All tokens and rare tokens",
        "Frequent tokens can be guessed without any traffic; rare ones are those that carry names and numbers. Each is "
        "the best of all attacks. The prior guesses each token from the right ones before it.",
    ),
    "cuts": (
        "By cut",
        "An undefended edge, and an attacker who knows the front. Bands are 95 % intervals.",
    ),
}
_COLUMNS = (
    "row",
    "tokens",
    "rare tokens",
    "secrets",
    "labels",
    "prior (free)",
    "task loss",
    "step time",
    "bytes a token",
    "\u03b5",
)
_RUN_COLUMNS = ("row", "attack", "tokens", "rare tokens", "secrets", "labels", "ROUGE-L", "coarse recall", "task loss")


def write_page(ledger: Mapping[str, Any], folder: Path) -> Path:
    """Write `index.html` and the figures `modes.svg`, `frontier.svg`, `rarity.svg` and `cuts.svg`.

    Args:
        ledger: As `isthmus experiment leak --json` prints it.
        folder: Made where it is not there.

    Returns:
        The page.

    Raises:
        ConfigError: matplotlib is not installed.
        DiskError: The disk is full or cannot be written.
    """
    figures = draw_all(ledger)
    page = folder / "index.html"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, svg in figures.items():
            (folder / f"{name}.svg").write_text(standalone_svg(svg), encoding="utf-8")
        page.write_text(page_html(ledger, figures), encoding="utf-8")
    return page


def page_html(ledger: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """The page; everything of the ledger in it is escaped.

    Args:
        ledger: As `isthmus experiment leak --json` prints it.
        figures: SVG elements by name, as `draw_all` gives them.
    """
    rows = ledger_rows(ledger)
    script, style = (
        resources.files(__package__).joinpath(f"leak_page.{kind}").read_text("utf-8") for kind in ("js", "css")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    cards = {name: _card(*about, f'<div class="figure">{figures[name]}</div>') for name, about in _FIGURES.items()}
    runs = f"<details><summary>{sum(len(row.runs) for row in rows)} lines</summary>{_runs_table(rows)}</details>"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What a cloud can learn: {escape(_text(ledger.get("model")))}</title>
<style>{theme_css()}
{style}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">Isthmus: the ledger of leaks</p>
<h1>What a cloud can learn of what an edge sends it</h1>
<p class="lead">{escape(frontier_sentence(rows))}</p>
<ul class="facts">{"".join(f"<li>{escape(fact)}</li>" for fact in _facts(ledger, rows))}</ul>
</header>
{cards["modes"]}
{cards["frontier"]}
{_card("Every row", _ROWS_NOTE, _rows_table(rows))}
{cards["rarity"]}
{cards["cuts"]}
{_card("What each attack sees and knows", _ATTACKS_NOTE, _attacks_table(rows))}
{_card("What each defence claims", _CLAIMS_NOTE, _claims_table(rows))}
{_card("Every attack", "", runs)}
{_card("How it was made", "", _made_by(ledger))}
</main>
<script>{script}</script>
</body>
</html>
"""


_ROWS_NOTE = (
    "Each number of a row is that of the strongest attack on it, whatever it knows, with its 95 % interval (bootstrap "
    "over sequences). Task loss and step time are over those of the undefended split run of the same plan and as many "
    f"steps. {TWO_LOSSES} Press a heading to sort."
)
_CLAIMS_NOTE = "A claim is what the mathematics says; the table above has what the attacks got."
_ATTACKS_NOTE = "All attacks know the model's frozen weights, and public texts that are none of those they attack."


def _card(heading: str, note: str, body: str) -> str:
    said = f'\n<p class="note">{escape(note)}</p>' if note else ""
    return f'<section class="card">\n<h2>{escape(heading)}</h2>{said}\n{body}\n</section>'


def _facts(ledger: Mapping[str, Any], rows: Sequence[LedgerRow]) -> Iterable[str]:
    yield f"model {_text(ledger.get('model'))}"
    data = ledger.get("data")
    yield f"data {', '.join(map(str, data)) if isinstance(data, list) else _text(data)}"
    yield f"{_text(ledger.get('sequences'))} sequences attacked"
    yield f"{len(rows)} rows, {sum(len(row.runs) for row in rows)} attacks"
    yield f"{_text(ledger.get('processor'))}, threads: {_text(ledger.get('threads'))}"


def _rows_table(rows: Sequence[LedgerRow]) -> str:
    best = {row.name for row in frontier(rows)}
    lines = []
    for row in rows:
        tag = ' <span class="tag">frontier</span>' if row.name in best else ""
        prior = row.common("prior_accuracy")
        free = row.common("prior_free_accuracy")
        bytes_per_token = row.common("bytes_per_token")
        cells = [
            _cell(row.name, escape(row.name) + tag + _small(_settings_of(row))),
            _share(row.worst("token_accuracy"), "token"),
            _share(row.worst("rare_accuracy"), "rare"),
            _share(row.worst("secret_recall"), "secret"),
            _share(row.worst("label_accuracy"), "label"),
            _cell(prior, percent(prior) + _small(f"({percent(free)})" if free is not None else "")),
            _cell(row.loss_ratio, times(row.loss_ratio) + _small(_loss_of(row))),
            _cell(row.common("step_ratio"), times(row.common("step_ratio"))),
            _cell(bytes_per_token, _number(bytes_per_token, ",.0f")),
            _cell(row.common("epsilon"), _number(row.common("epsilon"), ".3g") + _small(_delta(row))),
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return _table(_COLUMNS, lines)


def _loss_of(row: LedgerRow) -> str:
    """The small print of a row's loss: that with the defence on, where there is one."""
    if row.common("loss_ratio_without_defence") is None:
        return _number(row.common("task_loss"), ".3f")
    return f"defence on: {times(row.common('task_loss_ratio'))}"


def _runs_table(rows: Sequence[LedgerRow]) -> str:
    lines = []
    for row in rows:
        for run in row.runs:
            attack, recall = _text(run.get("attack")), run.get("coarse_recall")
            cells = [
                _cell(row.name, escape(row.name)),
                _cell(attack, escape(attack.translate(SPACED)) + _small(_side(run))),
                _share(measured(run, "token_accuracy"), "token"),
                _share(measured(run, "rare_accuracy"), "rare"),
                _share(measured(run, "secret_recall"), "secret"),
                _share(measured(run, "label_accuracy"), "label"),
                _cell(run.get("rouge_l"), _number(run.get("rouge_l"), ".2f")),
                _cell(recall, percent(recall)),
                _cell(run.get("task_loss"), _number(run.get("task_loss"), ".3f")),
            ]
            lines.append(f"<tr>{''.join(cells)}</tr>")
    return _table(_RUN_COLUMNS, lines)


def _attacks_table(rows: Sequence[LedgerRow]) -> str:
    # The registry loads torch, which whoever only reads this file's types need not.
    from isthmus.privacy.ledger.judged_attacks import LABEL_ATTACKS, TOKEN_ATTACKS

    known: dict[str, Any] = {**TOKEN_ATTACKS, **LABEL_ATTACKS}
    names = dict.fromkeys(_text(run.get("attack")) for row in rows for run in row.runs)
    lines = [
        "<tr>"
        + "".join(
            f"<td>{escape(text)}</td>"
            for text in (name.translate(SPACED), _of(known, name, "sees"), _of(known, name, "knows"))
        )
        + "</tr>"
        for name in names
        if name in known
    ]
    return _plain_table(("attack", "sees", "knows besides"), lines)


def _claims_table(rows: Sequence[LedgerRow]) -> str:
    claims = {
        str(row.common("defence")): (_text(row.common("defence_claim")), _text(row.common("unit")))
        for row in rows
        if (row.common("defence") or "none") != "none"
    }
    lines = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(claim)}</td><td>{escape(unit)}</td></tr>"
        for name, (claim, unit) in claims.items()
    ]
    return _plain_table(("defence", "claim", "of this run"), lines)


def _made_by(ledger: Mapping[str, Any]) -> str:
    settings = dict(ledger.get("settings") or {})
    command = _text(settings.pop("command", None) or COMMAND)
    hours = ledger.get("seconds")
    facts = {
        "processor": ledger.get("processor"),
        "threads": ledger.get("threads"),
        "time": None if hours is None else f"{hours / 3600:.1f} hours",
        **settings,
    }
    listed = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(_text(value))}</dd>" for name, value in facts.items())
    return f"<pre>{escape(command)}</pre>\n<dl>{listed}</dl>"


def _table(columns: Sequence[str], lines: Sequence[str]) -> str:
    """A table that the script sorts."""
    heads = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in columns)
    return _table_of(heads, lines, "numbers")


def _plain_table(columns: Sequence[str], lines: Sequence[str]) -> str:
    return _table_of("".join(f'<th scope="col">{escape(name)}</th>' for name in columns), lines, "words")


def _table_of(heads: str, lines: Sequence[str], kind: str) -> str:
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _cell(value: Any, content: str) -> str:
    """A cell that is sorted by `value`; `content` is HTML."""
    return f'<td data-value="{escape("" if value is None else str(value))}">{content}</td>'


def _share(value: Value | None, kind: str) -> str:
    if value is None:
        return _cell(None, MISSING)
    interval = f"{100 * value.low:.0f} to {100 * (value.high or 0):.0f}" if value.low is not None else ""
    return (
        f'<td class="{kind}" style="--share:{min(max(value.value, 0), 1):.3f}" data-value="{value.value}" '
        f'title="{escape(value.attack.translate(SPACED))}">{percent(value.value)}{_small(interval)}</td>'
    )


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _settings_of(row: LedgerRow) -> str:
    parts = [_text(row.common("mode")), f"plan {_text(row.common('plan'))}", _text(row.common("codec"))]
    if row.common("steps") is not None:
        parts.append(f"{row.common('steps')} steps")
    if (row.common("defence") or "none") != "none":
        parts.append(str(row.common("defence")))
    return ", ".join(parts)


def _side(run: Mapping[str, Any]) -> str:
    """What the attacker knows of the edge."""
    if (run.get("front") or "known") == "known":
        return "knows the front"
    return f"private front, knows {run.get('known_texts') or 'no'} texts"


def _delta(row: LedgerRow) -> str:
    delta = row.common("delta")
    return "" if delta is None else f"\u03b4 = {delta:g}"


def _of(known: Mapping[str, Any], name: str, what: str) -> str:
    return str(getattr(known[name], what))


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _text(value: Any) -> str:
    return MISSING if value is None else str(value)
