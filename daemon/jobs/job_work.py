"""What the process of a job does, by the job's kind, and what it tells of it."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from isthmus.common.errors import (
    ConnectionLostError,
    LimitError,
    PackageError,
    SignerError,
    UnknownModelError,
    UnreachableError,
)
from isthmus.common.files import locked, new_folder, write_atomic
from isthmus.common.progress import StepProgress
from isthmus.daemon.jobs.job_names import checkpoint_id, result_id
from isthmus.daemon.jobs.kinds import KINDS, RESULTS, RUN, TRAINING, Work
from isthmus.daemon.jobs.reports import Reporter, Ticker, read_reports
from isthmus.edge.client.link import Link
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.client_config import ClientConfig, EvalConfig, FitConfig, GenerateConfig
from isthmus.edge.config.training_config import TrainConfig, TuneConfig
from isthmus.edge.run_report import WireMeter, WireTotals
from isthmus.edge.training.run_listener import SaveAdapter
from isthmus.edge.training.trainer import LOG_FILE
from isthmus.protocol.enrolment import ConnectionString

if TYPE_CHECKING:
    from isthmus.emulator.package.package import Package

METRICS = 1000
"""Steps of a job that are told as events; those of a longer one are thinned out evenly."""
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def do(work: Work, folder: Path, reporter: Reporter) -> None:
    """Do a job to its end, or from where an earlier process has left it.

    Raises:
        KeyboardInterrupt: It was asked to stop.
        IsthmusError: Of whatever kind fits.
    """
    config = KINDS[work.kind].model_validate(work.config)
    follower = Follower(work, config, reporter)
    with Ticker(follower.tick):
        if work.kind == "tune":
            from isthmus.edge.emulator_run import run_tuning

            tuning = cast(TuneConfig, config)
            if work.offers is not None:
                _take_package(work, *work.offers, tuning.package, follower)
            follower.link, follower.alone = None, True
            run_tuning(tuning, follower, follower.say)
        else:
            with open_link(cast(ClientConfig, config)) as link:
                _check_model(link, work.model)
                follower.meter = follower.link = link
                _do_over(link, work, config, folder, follower)
        if work.kind in TRAINING:
            _keep_adapter(folder / RUN / "adapter", Path(work.models) / result_id(work.job))
            write_atomic(folder / RESULTS[work.kind][0], _step_metrics(folder).encode())


def _take_package(
    work: Work, asked: Mapping[str, Any], name: str | None, kept: str, package: Path, follower: Follower
) -> None:
    """Have the package that a cloud offers in the job's folder, with the bridge to it that the job wants.

    What crosses for these is all that crosses for the job. What is kept from before is not fetched again, and stands in
    for a cloud that does not answer, but for a bridge the cloud must answer.
    """
    from isthmus.edge.bridge_fit import run_fit
    from isthmus.emulator.package.package import open_package

    place, config, fit = Path(kept), ClientConfig.model_validate(asked), work.fit
    if package.exists() and (fit is None or open_package(package).bridge_file.exists()):
        return
    try:
        with open_link(config) as link:
            follower.meter = follower.link = link
            _check_model(link, work.model)
            if not package.exists():
                with locked(place):
                    _hand_over(_fetch(link, place, name), package)
            if fit is not None:
                run_fit(FitConfig.model_validate({**asked, **fit, "package": package}), link, follower.say)
    except (UnreachableError, ConnectionLostError) as error:
        if fit is not None:
            raise
        with locked(place):
            try:
                found = open_package(place, signer=ConnectionString.parse(config.connection_text()).pin)
            except (PackageError, SignerError):
                raise error from None
            if found.model != work.model:
                raise
            follower.say("The cloud does not answer: the job tunes on the package that was fetched before")
            _hand_over(found, package)
    found = open_package(package)
    follower.say(
        f"The package {found.id[:16]} is here (split {found.plan}, {found.manifest.recipe}); the cloud is asked for "
        "nothing else"
    )


def _fetch(link: Link, place: Path, name: str | None) -> Package:
    try:
        return link.fetch_package(place, name)
    except LimitError as error:
        raise LimitError(f"{error} (the daemon takes what is left of disk_gib, too)") from None


def _hand_over(package: Package, folder: Path) -> None:
    """Link what is kept for all jobs into a job's folder."""
    with new_folder(folder, 0o700) as temporary:
        shutil.copytree(package.folder, temporary, copy_function=os.link, dirs_exist_ok=True)


def _check_model(link: Link, wanted: str) -> None:
    if link.info.model != wanted:
        raise UnknownModelError(
            f"the cloud serves {link.info.model!r} now, and the job is of {wanted!r}: wait until it serves that again, "
            "and retry the job"
        )


def _do_over(link: Link, work: Work, config: Any, folder: Path, follower: Follower) -> None:
    adapter = None if work.adapter is None else Path(work.adapter)
    result = folder / RESULTS[work.kind][0]
    match config:
        case TrainConfig():
            from isthmus.edge.split_run import train_over

            report = train_over(link, config, listener=follower)
            if report.leak is not None:
                follower.say(f"Leak: {report.leak}")
        case EvalConfig():
            from isthmus.edge.split_run import evaluate_over

            found = evaluate_over(link, config, adapter, follower.count_even)
            write_atomic(result, json.dumps(found).encode())
        case GenerateConfig():
            from isthmus.edge.generation.batch_file import Answers, read_texts
            from isthmus.edge.generation.generation_run import answer_all
            from isthmus.edge.generation.text_generator import text_generator

            texts = read_texts(Path(work.prompts or ""))
            answers = Answers.find(result, texts)
            with text_generator(link, config, adapter) as generator:
                answer_all(generator, texts, answers, sys.stderr, _TextProgress(len(texts), follower))


class Follower:
    """Tells how a job goes on; an `isthmus.edge.training.run_listener.RunListener`.

    Attributes:
        meter: Says what has crossed; None where nothing does, or not yet.
        link: Says whether the cloud is waited for; None where there is no cloud, or not yet.
        alone: Whether the job needs no cloud from now on, and so waits for none.
    """

    go_on = "retry the job to go on"

    def __init__(self, work: Work, config: Any, reporter: Reporter) -> None:
        self.meter: WireMeter | None = None
        self.link: Link | None = None
        self.alone = False
        self._waited: float | None = 0.0  # since when, as it was told last; a process before this one may have waited
        self._work = work
        self._save_every: int = getattr(config, "save_every", 1)
        self._reporter = reporter
        self._step, self._total, self._every = 0, 0, 1
        self._seconds: deque[float] = deque(maxlen=20)
        self._speed: float | None = None
        self._first: tuple[int, float] | None = None
        self._told: tuple[int, int] = (-1, -1)
        self._crossed = WireTotals()
        self._metrics: dict[str, Any] = {}

    def began(self, step: int, total: int, save: SaveAdapter, meter: WireMeter | None) -> None:
        """See `RunListener`. The adapter of a checkpoint is saved now if a crash came before it was."""
        self.meter = meter or self.meter  # what was fetched before counts
        self._every = -(-total // METRICS)
        self.count(step, total)
        if 0 < step < total and step % self._save_every == 0:
            self.saved(step, save)

    def stepped(self, line: Mapping[str, Any], seconds: float) -> None:
        """See `RunListener`."""
        step = int(line["step"])
        self._seconds.append(seconds)
        self._speed = sum(self._seconds) / len(self._seconds)
        self._metrics = {"step": step, "train_loss": line["loss"]}
        if "accuracy" in line:
            self._metrics["train_mean_token_accuracy"] = line["accuracy"]
        self.count(step, self._total)
        if step % self._every == 0 or step in (1, self._total):
            message = f"Step {step}/{self._total}: training loss={line['loss']:.4f}"
            self._reporter.tell("metrics", message=message, data={**self._metrics, "total_steps": self._total})

    def say(self, message: str) -> None:
        """Report something that the job's owner should know."""
        self._reporter.tell("message", message=message)

    def evaluated(self, step: int, loss: float) -> None:
        """See `RunListener`. The loss is over all held-out examples, which OpenAI's API calls full."""
        found = {"step": step, "valid_loss": loss, "full_valid_loss": loss}
        self._metrics |= found
        message = f"Step {step}/{self._total}: validation loss={loss:.4f}"
        self._reporter.tell("metrics", message=message, data={**found, "total_steps": self._total})

    def saved(self, step: int, save: SaveAdapter) -> None:
        """See `RunListener`."""
        own = checkpoint_id(self._work.job, step)
        save(Path(self._work.models) / own)
        metrics = self._metrics if self._metrics.get("step") == step else {"step": step}
        self._reporter.tell("checkpoint", id=own, step=step, metrics=metrics)

    def count(self, done: int, total: int) -> None:
        """So much of all is done."""
        self._step, self._total = done, total

    def count_even(self, done: int, total: int) -> None:
        """So much of all is done, and what is left takes as long, piece by piece."""
        now = time.monotonic()
        self._first = self._first or (done, now)
        if done > self._first[0]:
            self._speed = (now - self._first[1]) / (done - self._first[0])
        self.count(done, total)

    def tick(self) -> None:
        """Report progress, what has crossed since the last report, and whether the cloud is waited for."""
        link = self.link  # which another thread may take away
        if link is not None or self.alone:
            wait = None if link is None else link.wait
            none = (None, None, "The job needs its cloud no more" if self.alone else None)
            since, until, reason = none if wait is None else (wait.since, wait.until, wait.reason[:500])
            if since != self._waited:
                self._waited = since
                self._reporter.tell("waiting", since=since, until=until, reason=reason)
        totals = self._crossed if self.meter is None else self.meter.totals()
        crossed, place = totals - self._crossed, (self._step, self._total)
        if place == self._told and not crossed.calls and not crossed.bytes_up:
            return
        self._crossed, self._told = totals, place
        self._reporter.tell(
            "progress",
            step=place[0],
            total=place[1] or None,
            speed=self._speed,
            bytes_up=crossed.bytes_up,
            bytes_down=crossed.bytes_down,
            calls=crossed.calls,
            retries=crossed.retries,
        )


class _TextProgress(StepProgress):
    """Progress of texts that are answered."""

    def __init__(self, total: int, follower: Follower) -> None:
        super().__init__("text", total)
        self._follower, self._all = follower, total

    def start(self, step: int) -> None:
        super().start(step)
        self._follower.count_even(step, self._all)

    def show(self, step: int, figures: str) -> None:
        super().show(step, figures)
        self._follower.count_even(step, self._all)


def _keep_adapter(source: Path, target: Path) -> None:
    """Copy what a run has made to where it can be talked to."""
    with new_folder(target, 0o700) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)


def _step_metrics(folder: Path) -> str:
    """The lines of a run's log as OpenAI's result file has them, with the evaluations of all its processes."""
    losses: dict[int, float] = {}
    start, more = 0, True
    while more:
        reports, end = read_reports(folder, start)
        start, more = end, end > start
        for report in reports:
            data = report.get("data", {})
            if "valid_loss" in data:
                losses[data["step"]] = data["valid_loss"]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for line in (folder / RUN / LOG_FILE).read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step = values["step"]
        rows.writerow([step, values["loss"], values.get("accuracy", ""), losses.get(step, ""), ""])
    return text.getvalue()
