"""Generation over long links, with drafts and without: what one round trip that verifies several tokens is worth.

The cloud computes in bf16, and the edge in fp32 with the codec fp32, as `isthmus edge generate` does unless it is told
otherwise. They stand in network namespaces with a relay between them that holds every packet for half of a round trip.
All drafts have their turn at each prompt, so that whatever else the machine does hits all alike. At each link the
drafts begin anew: what the adaptive length loses until it knows the link counts. It learns over all texts of a link, so
a single `edge generate` with one short text knows less of its link, and starts colder. Texts end where the model ends
them: those of E2E after some 20 tokens, so that a few prompts are a few seconds of work. `--link-prompts` asks for
more.

Many a text with drafts is not the one without (`identical`), most often in chats: rows that are verified at once are
multiplied in another order than one row alone, and bf16 keeps 8 bits of a number, so of two tokens that are nearly as
likely the other one may be chosen, and what follows is another text. Where `identical` is below 1, `over_sequential`
compares different texts; `over_sequential_identical` leaves these out. In fp32 other texts are rare; `edge generate
--exact` excludes them.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.common.errors import ConfigError
from isthmus.common.figures import plotting, save_figure
from isthmus.edge.drafts.tuned_draft import tuned_beside
from isthmus.experiments.generation.links_preparation import CLOUD_DTYPE, Prepared, prepare, read_e2e, unseen_prompts
from isthmus.experiments.generation.links_process import COUNTS, FIXED, MODULE, NGRAM, SEQUENTIAL, SMALL, TUNED
from isthmus.experiments.generation.prompts import PROMPTS, chat_ids
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.harness.generation_settings import GenerateSettings
from isthmus.experiments.harness.launch import LocalCloud, stderr_progress
from isthmus.experiments.harness.processes import TaskProcess
from isthmus.experiments.network.delay_relay import Conditions
from isthmus.experiments.network.net_space import ADDRESSES, NetSpace, missing

RTT_MS = (0.0, 20.0, 50.0, 80.0, 150.0)
TEXTS = {"chat": (NGRAM, SMALL, *FIXED), "tuned": (NGRAM, SMALL, TUNED, *FIXED)}
"""The drafts of each text."""
ADAPTIVE = (NGRAM, SMALL, TUNED)
"""Those whose length adapts: what a user has, and what is measured by default."""
WARM_UP_TOKENS = 16
"""Before each link and draft, uncounted: round trips enough for TCP to have seen the new link, and for each draft's
first tokens, which read its weights and make its buffers."""
RESAMPLES = 2000
"""Of the prompts, for an interval: its ends are then known to about a twentieth of its width."""
INTERVAL_PROMPTS = 8
"""From which on there is an interval: drawn from fewer, its ends are those of the least and the most of them."""

Answers = Mapping[str, Sequence[Mapping[str, Any]]]
"""Of each draft, what the edge said about each prompt."""


@dataclass(frozen=True, slots=True)
class Target:
    """What each `over_sequential` of these texts (None for all), drafts and round trips should reach."""

    text: str | None
    drafts: tuple[str, ...]
    from_ms: float
    to_ms: float
    target: float


TARGETS = {
    "chat_small_at_80_ms": Target("chat", (SMALL,), 80, 80, 1.25),
    "chat_ngram_at_80_ms": Target("chat", (NGRAM,), 80, 80, 1.25),
    "tuned_at_80_ms": Target("tuned", (TUNED,), 80, 80, 1.8),
    "tuned_stretch_at_80_ms": Target("tuned", (TUNED,), 80, 80, 2.5),
    "least_at_0_ms": Target(None, ADAPTIVE, 0, 0, 0.9),
    "least_from_50_ms": Target(None, ADAPTIVE, 50, float("inf"), 1.0),
}


def check_links(settings: GenerateSettings) -> None:
    """Make sure that this machine can measure links.

    Raises:
        ConfigError: It cannot, or a text or a draft is not known.
    """
    _texts_of(settings)
    _drafts_of(settings)
    reason = missing()
    if reason is not None:
        raise ConfigError(f"cannot make long links: {reason}; or leave them out with --parts local")
    if settings.figure is not None:
        plotting()  # a missing package is reported before the long run, not after it


def run_links(settings: GenerateSettings, folder: Path) -> dict[str, Any]:
    """Measure, once `check_links` has passed; see the module.

    Returns:
        `links`: for each round trip, text and draft `tokens`, those of a text in the mean; `tokens_per_s`, over all
        prompts and with their prefill; `over_sequential`, that over the one of the draft `none`, with
        `over_sequential_range`, the least and the most of single prompts, and `over_sequential_95`, a bootstrap
        interval over them, null for fewer than 8; `accepted_per_round` and `drafted_per_round`; `judged`, the drafted
        tokens that the cloud has decided about, and `acceptance_rate`, the accepted ones over these; `draft_ms`, the
        mean milliseconds of a drafted token, with what the draft took in of the text first; `draft_share`, what all
        drafting took of the time; `identical`, the share of the prompts whose text is the one without drafts (see the
        module), and `over_sequential_identical`, that of these prompts alone, null where there are none. `targets`:
        what `over_sequential` should reach, and does; see `targets`.

    Raises:
        ConfigError: A draft or an adapter is given, and not the other one, or that has no tuned draft.
        DataError: The data of E2E are missing or malformed.
        IsthmusError: Whatever making a draft raises, or a run.
    """
    texts, drafts = _texts_of(settings), _drafts_of(settings)
    needs_draft = "tuned" in texts or drafts != (NGRAM,)
    prepared = prepare(settings, tuned="tuned" in texts) if needs_draft else None
    model = str(resolve(settings.model).folder)  # the namespaces reach neither a hub nor an index
    names = {text: tuple(name for name in TEXTS[text] if name in drafts) for text in texts}
    needs_tuned = not {TUNED, *FIXED}.isdisjoint(names.get("tuned", ()))
    if needs_tuned and (prepared is None or tuned_beside(prepared.adapter) is None):
        raise ConfigError(f"{settings.adapter} has no tuned draft: give the OUT of a run with `edge train --draft`")
    prompts = {text: _prompts(settings, text) for text in texts}
    cells: list[dict[str, Any]] = []
    with NetSpace(None, Conditions()) as space, ExitStack() as stack:
        options = (*settings.cloud_options(CLOUD_DTYPE), "--listen", f"{ADDRESSES['cloud']}:0")
        with space.inside("cloud"):
            cloud = stack.enter_context(LocalCloud(folder, model, *options))
        with space.inside("edge"):
            edges = {text: _edge(cloud, text, names[text], prepared, settings, stack) for text in texts}
        for edge in edges.values():
            edge.answer()
        round_trips = settings.rtt_ms or RTT_MS
        total = len(round_trips) * settings.link_prompts * sum(1 + len(names[text]) for text in texts)
        with stderr_progress("texts", total) as advance:
            for rtt_ms in round_trips:
                space.change(Conditions(rtt_s=rtt_ms / 1000))
                for text, edge in edges.items():
                    answers: dict[str, list[Any]] = {name: [] for name in (SEQUENTIAL, *names[text])}
                    for name, answer in _turns(edge, prompts[text], tuple(answers), settings.link_tokens):
                        answers[name].append(answer)
                        advance()
                    cells += ({"rtt_ms": rtt_ms, "text": text, **row} for row in figures(answers))
    if settings.figure is not None:
        draw_links(cells, settings.figure)
    return {"links": cells, "targets": targets(cells)}


def _turns(
    edge: TaskProcess, prompts: Sequence[Sequence[int]], names: Sequence[str], tokens: int
) -> Iterator[tuple[str, Any]]:
    """Each prompt with each draft, after a first prompt that warms up the link; what the edge says of each."""
    first, *rest = prompts
    for name in names:
        edge.ask({"begin": False, "ids": first, "tokens": WARM_UP_TOKENS, "draft": name})
    for number, ids in enumerate(rest):
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]  # turn about, so that none always follows the same one
            begin = number == turn == 0
            yield name, edge.ask({"begin": begin, "ids": ids, "tokens": tokens, "draft": name})


def figures(answers: Answers) -> list[dict[str, Any]]:
    """The figures of each draft, at one link and for one text; see `run_links`."""
    sequential = answers[SEQUENTIAL]
    rows = []
    for name, found in answers.items():
        pairs = list(zip(found, sequential, strict=True))
        of_draft = {count: sum(each[count] for each in found) for count in COUNTS}
        rounds, drafted, judged = max(1, of_draft["rounds"]), of_draft["drafted"], of_draft["judged"]
        same = [(one, other) for one, other in pairs if one["tokens"] == other["tokens"]]
        rows.append(
            {
                "draft": name,
                "tokens": statistics.mean(len(each["tokens"]) for each in found),
                "tokens_per_s": _speed(found),
                "over_sequential": _over(pairs),
                "over_sequential_range": _range(pairs),
                "over_sequential_95": _interval(pairs) if len(pairs) >= INTERVAL_PROMPTS else None,
                "accepted_per_round": of_draft["accepted"] / rounds,
                "drafted_per_round": drafted / rounds,
                "judged": judged,
                "acceptance_rate": of_draft["accepted"] / judged if judged else None,
                "draft_ms": 1000 * of_draft["draft_seconds"] / drafted if drafted else None,
                "draft_share": of_draft["draft_seconds"] / sum(each["seconds"] for each in found),
                "identical": len(same) / len(pairs),
                "over_sequential_identical": _over(same) if same else None,
            }
        )
    return rows


def targets(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far each target is reached; only of those that a row says something about.

    Returns:
        Of each target `measured`, the least of its rows, the `target`, whether it is `held`, and `cells`, how many rows
        it was judged by: fewer where drafts, texts or round trips were left out.
    """
    found = {}
    for name, target in TARGETS.items():
        values = [
            cell["over_sequential"]
            for cell in cells
            if target.text in (None, cell["text"])
            and cell["draft"] in target.drafts
            and target.from_ms <= cell["rtt_ms"] <= target.to_ms
        ]
        if values:
            measured = min(values)
            held = measured >= target.target
            found[name] = {"measured": measured, "target": target.target, "held": held, "cells": len(values)}
    return found


def show_links(result: Mapping[str, Any]) -> None:
    """Print `links` and `targets`, a line of at most 80 columns for each.

    Behind `over none` there is its 95 % interval where there are prompts enough, else the range of single prompts; the
    heading says which. `of same` is `over_sequential_identical`.
    """
    rows = result["links"]
    with_interval = all(row["over_sequential_95"] for row in rows)
    spread, heading = ("over_sequential_95", "95 %") if with_interval else ("over_sequential_range", "range")
    line = "{:>4} {:5} {:11} {:>8} {:>9} {:>11} {:>8} {:>4} {:>4} {:>7}".format
    typer.echo(line("rtt", "text", "draft", "tokens/s", "over none", heading, "accepted", "rate", "same", "of same"))
    for row in rows:
        low, high = row[spread]
        typer.echo(
            line(
                f"{row['rtt_ms']:.0f}",
                row["text"],
                row["draft"],
                f"{row['tokens_per_s']:.1f}",
                f"{row['over_sequential']:.2f}",
                f"{low:.2f}-{high:.2f}",
                f"{row['accepted_per_round']:.2f}",
                _cell(row["acceptance_rate"]),
                f"{row['identical']:.2f}",
                _cell(row["over_sequential_identical"]),
            )
        )
    for name, target in result["targets"].items():
        held = "held" if target["held"] else "not held"
        typer.echo(f"{name:23} {target['measured']:.2f} of {target['target']:.2f}, cells {target['cells']}: {held}")


def draw_links(cells: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw tokens per second against round trip: a panel for each text, a line for each draft."""
    texts = list(dict.fromkeys(cell["text"] for cell in cells))
    figure, panels = plotting().subplots(
        1, len(texts), figsize=(4.5 * len(texts) + 1, 4.5), dpi=144, sharey=True, squeeze=False
    )
    for axes, text in zip(panels[0], texts, strict=True):
        for draft in dict.fromkeys(cell["draft"] for cell in cells if cell["text"] == text):
            rows = [cell for cell in cells if (cell["text"], cell["draft"]) == (text, draft)]
            axes.plot([row["rtt_ms"] for row in rows], [row["tokens_per_s"] for row in rows], marker="o", label=draft)
        axes.set(title=text, xlabel="round trip, ms")
        axes.grid(alpha=0.3)
        axes.legend(title="draft")
    panels[0][0].set_ylim(bottom=0)  # of all panels, once all lines are in them: it fixes the top, too
    panels[0][0].set_ylabel("tokens per second")
    save_figure(figure, path)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _speed(found: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(len(each["tokens"]) for each in found) / sum(each["seconds"] for each in found))


def _over(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> float:
    found, sequential = zip(*pairs, strict=True)
    return _speed(found) / _speed(sequential)


def _range(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[float]:
    """The least and the most `over_sequential` of single prompts."""
    ratios = [_over([pair]) for pair in pairs]
    return [min(ratios), max(ratios)]


def _interval(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[float]:
    """The 95 % interval of `over_sequential`, by drawing prompts with replacement (Efron's percentile bootstrap)."""
    source = random.Random(0)  # noqa: S311 - a statistic, no secret
    drawn = sorted(_over(source.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return [drawn[round(0.025 * (RESAMPLES - 1))], drawn[round(0.975 * (RESAMPLES - 1))]]


def _texts_of(settings: GenerateSettings) -> tuple[str, ...]:
    return names_of(settings.texts, "texts", tuple(TEXTS))


def _drafts_of(settings: GenerateSettings) -> tuple[str, ...]:
    return names_of(settings.drafts or ",".join(ADAPTIVE), "drafts", TEXTS["tuned"])


def _prompts(settings: GenerateSettings, text: str) -> list[list[int]]:
    """Token ids of the prompts, and before them of one to warm up with."""
    tokenizer = load_tokenizer(resolve(settings.model).folder)
    count = 1 + settings.link_prompts
    if text != "chat":
        return [tokenizer(prompt)["input_ids"] for prompt in unseen_prompts(read_e2e(settings), count)]
    return chat_ids(tokenizer, PROMPTS[:count])


def _edge(
    cloud: LocalCloud,
    text: str,
    names: Sequence[str],
    prepared: Prepared | None,
    settings: GenerateSettings,
    stack: ExitStack,
) -> TaskProcess:
    """An edge that generates this text."""
    key = cloud.edge_key.parent / text
    if not key.exists():
        cloud.enroll(text, key)
    task = {
        "connection": cloud.connection,
        "key": str(key),
        "threads": settings.threads,
        "drafts": list(names),
        "draft": None if prepared is None else str(prepared.draft),
        "adapter": None if prepared is None or text == "chat" else str(prepared.adapter),
    }
    return stack.enter_context(TaskProcess(f"the edge of {text}", MODULE, task, threads=settings.threads))
