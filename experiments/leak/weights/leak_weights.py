"""The three measurements of weights, one after the other, and their table; see each one's module.

Each result is a cell in `out`, by the settings that it depends on, so an interrupted run goes on.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from isthmus.backbone.checkpoints.sources import resolve
from isthmus.common.errors import ConfigError
from isthmus.emulator.package.package import open_package
from isthmus.experiments.harness.bench_flags import names_of
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.launch import working_folder
from isthmus.experiments.leak.weights.extraction_run import ExtractionSettings, measure_extraction
from isthmus.experiments.leak.weights.leak_weights_settings import PARTS, LeakWeightsSettings
from isthmus.experiments.leak.weights.membership_run import MembershipSettings, measure_membership
from isthmus.experiments.leak.weights.span_theft import TheftSettings, measure_theft
from isthmus.privacy.measures.bootstrap import Interval

N = TypeVar("N", int, float)

_NO_PART_OF_A_RESULT = ("data_folder", "threads", "package")
"""Settings that do not say what was measured, or say it with paths of this machine."""
VERSION = 3
"""Of what a part's result holds, raised where that changes: results that an earlier one has left are made anew."""


def run_leak_weights(settings: LeakWeightsSettings) -> dict[str, Any]:
    """Measure, or go on.

    Returns:
        By measurement what its result class has, and its settings.

    Raises:
        ConfigError: A setting makes no sense.
        DataError: The data are missing or too few.
        IsthmusError: What cloud and edge raise.
    """
    parts = names_of(settings.parts, "parts", PARTS)
    work = _work(settings)
    cells = Cells(settings.out / "cells.jsonl", Console(stderr=True))
    cells.expect(len(parts))
    digest = resolve(settings.model).digest()
    result: dict[str, Any] = {}
    for part in parts:
        own, measure = work[part]
        about = {name: value for name, value in asdict(own).items() if name not in _NO_PART_OF_A_RESULT}
        # Through JSON's lists, so that a result is the same whether it was measured now or is taken from the file.
        about = {name: list(value) if isinstance(value, tuple) else value for name, value in about.items()}
        if isinstance(own, MembershipSettings) and own.package is not None:
            package = open_package(own.package)
            about |= {"package": package.emulator_name, "edge_layers": str(package.plan)}
        key = {**about, "digest": digest, "version": VERSION}
        with working_folder() as folder:
            found = cells.get(part, key, lambda: _plain(asdict(measure(folder))))  # noqa: B023
        result[part] = {**found, "settings": about}
    return result


Work = tuple[Any, Callable[[Path], Any]]
"""The settings of a measurement, and what makes it, given a folder for its files."""


def _work(settings: LeakWeightsSettings) -> dict[str, Work]:
    names = ("model", "edge_layers", "task", "data_folder", "seed", "threads")
    common: dict[str, Any] = {name: getattr(settings, name) for name in names}
    membership = MembershipSettings(
        **common,
        **{name: getattr(settings, name) for name in ("members", "others", "epochs", "batch", "rank")},
        **{name: getattr(settings, name) for name in ("learning_rate", "defence", "defended_rate", "package")},
        epsilons=_numbers("epsilons", settings.epsilons, float) if settings.epsilons else (),
    )
    extraction = ExtractionSettings(
        **common,
        sites=settings.sites,
        steps=settings.site_steps,
        rank=settings.rank,
        codec=settings.site_codec,
    )
    theft = TheftSettings(
        **common, calls=_numbers("calls", settings.calls, int), held_out=settings.held_out, steps=settings.theft_steps
    )
    return {
        "membership": (membership, lambda folder: measure_membership(membership, folder)),
        "extraction": (extraction, lambda folder: measure_extraction(extraction, folder)),
        "theft": (theft, lambda _folder: measure_theft(theft)),
    }


def _numbers(flag: str, text: str, kind: Callable[[str], N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{flag} {text!r} is no list of numbers: write 0,50,300 for example") from None


def _plain(value: Any) -> Any:
    """As JSON would give it back: lists for tuples; an interval is `[value, low, high]`."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def show(result: Mapping[str, Any]) -> None:
    """Print the results as tables of at most 80 columns."""
    for part, found in result.items():
        _SHOWN[part](found)
        print()


def _show_membership(found: Mapping[str, Any]) -> None:
    print(f"members of an adapter's data: {found['members']} members, {found['others']} others, {found['steps']} steps")
    line = "{:28} {:>22} {:>22}".format
    for run in found["runs"]:
        print(f"  {run['defence'] or 'no defence'}: loss {_interval(run['loss'])}")
        if run["epsilon"] is not None:
            promised = f"epsilon {run['epsilon']:.3g} at delta {run['delta']:g}, of {run['guarantee']}"
            print(textwrap.fill(promised, 80, initial_indent="    ", subsequent_indent="    "))
        print(line("", "AUC", "found at 1 % false"))
        for each in run["attacks"]:
            print(line(f"    {each['attack']}", _interval(each["auc"]), _interval(each["true_positive_rate"])))
        if run["most_true_positives"] < 1:
            print(line("    allowed", "", f"{run['most_true_positives']:.3f} at most"))
    print(line("  control: untuned model", _interval(found["control"]), ""))
    print(f"  untuned: loss {_interval(found['untuned_loss'])}; last over first {found['loss_ratio']:.3f}")


def _show_extraction(found: Mapping[str, Any]) -> None:
    print(f"adapters at sites, {found['codec']}: {found['products']} of {found['of']} products extracted")
    print(f"  from {found['positions']} token positions each; relative error, median {found['median_error']:.2g},")
    print(f"  largest {found['largest_error']:.2g}; reckoned by the attack at most {found['largest_own_error']:.2g}")


def _show_theft(found: Mapping[str, Any]) -> None:
    line = "{:>10} {:>10} {:>8} {:>12} {:>16} {:>10}".format
    print(f"the cloud's layers: loss {found['loss']:.3f} with them")
    print(line("queries", "positions", "loss", "divergence", "top-1 agreement", "recovered"))
    rows = [("none", "", found["without"], "-")]
    rows += [(run["calls"], run["tokens"], run["stolen"], f"{100 * run['recovered']:.0f} %") for run in found["runs"]]
    for calls, tokens, model, recovered in rows:
        shown = (f"{model['loss']:.3f}", f"{model['divergence']:.3f}", f"{100 * model['top1_agreement']:.0f} %")
        print(line(calls, tokens, *shown, recovered))
    print("  the first row is the edge's layers alone, without anything trained between")


def _interval(value: Any) -> str:
    middle, low, high = Interval(*value)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


_SHOWN: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "membership": _show_membership,
    "extraction": _show_extraction,
    "theft": _show_theft,
}
