"""One row of the ledger: its run, the attacks on it, and its task's loss."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.edge.budget.text_overlap import RUN
from isthmus.edge.data.batches import fingerprint, pad_id
from isthmus.emulator.package.build_presets import top_heavy
from isthmus.emulator.package.package import open_package
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.leak.decoy_texts import write_decoys
from isthmus.experiments.leak.grid import Row
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.experiments.leak.leak_texts import Counts, LeakTexts, Text, load_texts
from isthmus.experiments.leak.rows.attacked_row import Attacker, Found, attack_row, priors_of
from isthmus.experiments.leak.rows.recorded_rows import traffic_of
from isthmus.experiments.leak.rows.recorded_run import (
    PUBLIC,
    TRAINED,
    read_costs,
    read_fit,
    read_run,
    record_fit,
    record_run,
    train_options,
    write_examples,
)
from isthmus.experiments.leak.rows.row_checkpoint import RowCheckpoint, stored
from isthmus.experiments.leak.rows.trained_edge import TaskScore, score_task, trained_defence, with_adapter
from isthmus.experiments.scoring.tasks import default_data_folder
from isthmus.privacy.attacks.attack import Knowledge, KnownDefence
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.attacks.vocabulary_matching import VocabularyMatching
from isthmus.privacy.ledger.judged_attacks import guess_of
from isthmus.privacy.measures.bootstrap import Interval, share_interval
from isthmus.privacy.measures.token_accuracy import Hits, token_hits
from isthmus.protocol.secure.keys import generate_root, issue_worker

Say = Callable[[str], None]
_T = TypeVar("_T")
_Score = dict[str, dict[str, list[float]]]
"""A `TaskScore` as JSON has it."""
_BASE_RESULTS = "base-model.jsonl"
_PRESET = "fidelity"
"""Of an emulator, unless a row names another package."""


class RowLab:
    """Makes rows, one after the other, with one model.

    Args:
        settings: Those of the command.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, settings: LeakSettings) -> None:
        self._checkpoint, self._tokenizer, self._settings = checkpoint, tokenizer, settings

    @cached_property
    def _base(self) -> Any:
        return whole(self._checkpoint).requires_grad_(False)

    @cached_property
    def _base_results(self) -> Cells:
        """What is measured of the base model, once for all rows with the same texts."""
        return Cells(self._settings.out / _BASE_RESULTS, Console(quiet=True))

    def make(self, row: Row, folder: Path, say: Say) -> dict[str, Any]:
        """Train, attack and score.

        Args:
            folder: Of the row's checkpoint; what it has is not made again.
            say: Told what is under way.

        Returns:
            `seconds`, of the run, the task's scores and the attacks; `runs`, entries of the ledger without what
            compares rows; `task`, losses and hits of each held-out text, by codec; `task_without_defence`, the same of
            the adapter in the whole model with the defence off, None where there is none; `task_zero_shot`, of the
            model without training; `step_seconds`, of each step.

        Raises:
            AttackLimitedError: The row is undefended, and an attack's lists limited it.
            DataError: There are too few texts.
            IsthmusError: What cloud and edge raise.
        """
        texts = self._texts(row)
        checkpoint = RowCheckpoint(folder, _fingerprint(texts.train, texts.sent, texts.public, texts.scored))
        made = (self._emulator if row.mode == "emulator" else self._split)(row, texts, checkpoint, say)
        zero_shot = self._of_base("zero-shot", [texts.scored], _Score, lambda: self._score(self._base, texts))
        return {"seconds": round(checkpoint.seconds, 1), **made, "task_zero_shot": zero_shot}

    def _of_base(self, name: str, texts: Sequence[Sequence[Text]], kind: type[_T], make: Callable[[], _T]) -> _T:
        """What is measured of the base model on texts."""
        model = {"model": self._checkpoint.digest(), "threads": self._settings.threads}
        return stored(self._base_results, name, {**model, "texts": _fingerprint(*texts)}, kind, make)

    def _priors(self, public: Sequence[Text], texts: Sequence[Text], *, labels: bool = False) -> dict[str, Interval]:
        """The priors of texts, or of their labels."""
        name = "priors of labels" if labels else "priors"
        make = partial(priors_of, self._base, public, texts, labels=labels)
        return self._of_base(name, [public, texts], dict[str, Interval], make)

    def _score(self, model: Any, texts: LeakTexts, **sent: Any) -> _Score:
        """See `score_task`."""
        return _plain(score_task(model, texts.scored, pad_id(self._tokenizer), **sent))

    def _texts(self, row: Row) -> LeakTexts:
        settings = self._settings
        counts = Counts(
            settings.texts, settings.attacked + row.n_known, settings.public, settings.scored, settings.max_length
        )
        return load_texts(
            row.data, settings.data_folder or default_data_folder(), self._tokenizer, counts, settings.seed
        )

    def _record(self, row: Row, texts: LeakTexts, say: Say, folder: Path) -> Iterable[Path]:
        decoys = None
        if row.n_decoys:
            say("writing decoys")
            real = (*texts.train, *texts.sent)
            written = write_decoys(self._base, self._tokenizer, real, texts.public, row.n_decoys, self._settings.seed)
            decoys = folder / "decoys.jsonl"
            write_jsonl(decoys, ({"prompt": each.prompt, "completion": each.completion} for each in written))
        say(f"{row.steps} steps over a cloud that records")
        return record_run(row, self._settings, texts, self._base, folder, decoys)

    def _split(self, row: Row, texts: LeakTexts, checkpoint: RowCheckpoint, say: Say) -> dict[str, Any]:
        settings = self._settings
        run = read_run(row, settings, texts, checkpoint.run(partial(self._record, row, texts, say)))
        plan = row.plan(self._checkpoint.config.num_hidden_layers)
        tuned = with_adapter(self._checkpoint, run.out / "adapter")
        defence = trained_defence(
            row.defences(), run.checkpoint, self._base.config.hidden_size,
            lambda: [Front(tuned, plan.bottom).states(text.tokens) for text in texts.public],
        )  # fmt: skip

        def scored(codec: str) -> _Score:
            say(f"scoring the task over {codec}")
            return self._score(tuned, texts, plan=plan, codec=codec, defence=defence, seed=settings.seed)

        task = {
            codec: checkpoint.result("task", {"codec": codec}, _Score, partial(scored, codec)) for codec in run.sent
        }
        without = None
        if row.defence:
            without = checkpoint.result("task without defence", {}, _Score, lambda: self._score(tuned, texts))
        attacker = self._attacker(row, tuned, plan, texts, defence, say)
        found = attack_row(row, run, attacker, checkpoint)
        costs = read_costs(run.out)
        shared: dict[str, Any] = {
            **_measured([("bytes_per_token", share_interval(Hits(costs.bytes, costs.tokens)))]),
            **{name: run.report[name] for name in ("epsilon", "delta")},
            "unit": run.report["guarantee"],
        }
        say("guessing without what was sent")
        priors = self._priors(texts.public, texts.sent[: settings.attacked])
        learned = [text for batch in run.learned for text in batch.texts]
        of_labels = self._priors(texts.public, learned, labels=True) if learned else {}
        return {
            "runs": [
                _entry(row, each, priors if each.judged.label_accuracy is None else of_labels, shared) for each in found
            ],
            "task": task,
            "task_without_defence": without,
            "step_seconds": costs.seconds.tolist(),
        }

    def _tune(self, row: Row, texts: LeakTexts, say: Say, folder: Path) -> Iterable[Path]:
        package, kept = folder / "package", [folder / TRAINED]
        write_examples(folder / "train.jsonl", texts.train)
        plan = row.plan(self._checkpoint.config.num_hidden_layers)
        options = {**train_options(row, self._settings, self._base, plan), "threads": self._settings.threads}
        if row.package is None:
            say("building an emulator")
            self._build(folder, package)
        else:
            shutil.copytree(row.package, package)  # a bridge lies beside it, and not beside the user's
        if _is_advised(row):
            say("fitting a bridge over a cloud that records")
            write_examples(folder / "sent.jsonl", texts.sent)
            public = (f"{text.example.prompt}{text.example.completion}" for text in texts.public[::2])
            write_jsonl(folder / PUBLIC, ({"text": text} for text in public))
            recording = record_fit(self._settings, str(open_package(package).plan), folder)
            kept += [recording, *(folder / name for name in ("train.jsonl", "sent.jsonl", PUBLIC))]
            # The owner's advice says the rate, the rank and what is trained; steps, batch and length are the row's.
            del options["learning_rate"], options["alpha"]
        say(f"{row.steps} steps on the emulator")
        options |= {
            "package": package,
            "data": folder / "train.jsonl",
            "validation_split": 0.0,
            "out": folder / TRAINED,
        }
        run_isthmus("emulator", "tune", *train_flags(options))
        return kept

    def _attack_fit(self, row: Row, texts: LeakTexts, folder: Path) -> dict[str, Interval]:
        """What a cloud reads of what `emulator fit` sent: of these public texts, and of the private ones.

        The first sequences are attacked. Of the others all is taken to be read. A private token counts as read where
        it stands in a run of `RUN` tokens that was read: a check that none was sent, as `emulator fit` leaves out texts
        that share such a run, and no measure of what shorter runs tell.
        """
        n_layers = self._checkpoint.config.num_hidden_layers
        plan = SplitPlan.parse(top_heavy(n_layers), n_layers) if row.package is None else open_package(row.package).plan
        front = Front(self._base, plan.bottom)
        traffic, crossed = read_fit(folder, self._settings, self._tokenizer, front)
        attacked, others = crossed[: self._settings.attacked], crossed[self._settings.attacked :]
        public = tuple(text.tokens for text in texts.public[1::2])  # the attacker's own: none of those that were sent
        knowledge = Knowledge(self._base, self._tokenizer, plan, front, public, seed=self._settings.seed)
        guess = guess_of(VocabularyMatching, knowledge, traffic_of(traffic, attacked))
        sent = [each.text.tokens for each in attacked if each.text is not None]
        read = [*guess.tokens, *(each.text.tokens for each in others if each.text is not None)]
        return {
            "fit_public_accuracy": share_interval(token_hits(guess.tokens, sent)),
            "fit_private_accuracy": share_interval(
                run_hits([each.tokens for each in (*texts.train, *texts.sent)], read)
            ),
        }

    def _emulator(self, row: Row, texts: LeakTexts, checkpoint: RowCheckpoint, say: Say) -> dict[str, Any]:
        run = checkpoint.run(partial(self._tune, row, texts, say))
        out, of_fit = run / TRAINED, dict[str, Interval]()
        if _is_advised(row):
            say("attacking what the fit sent")
            of_fit = checkpoint.result("fit", {}, dict[str, Interval], lambda: self._attack_fit(row, texts, run))
        say("scoring the task")
        tuned = with_adapter(self._checkpoint, out / "adapter")
        task = checkpoint.result("task", {"codec": row.codec}, _Score, lambda: self._score(tuned, texts))
        priors = self._priors(texts.public, texts.sent[: self._settings.attacked])
        nothing = _measured([("bytes_per_token", Interval(0, 0, 0)), *of_fit.items()])
        return {
            "runs": [_entry(row, None, priors, {**nothing, "epsilon": None, "delta": None, "unit": None})],
            "task": {row.codec: task},
            "task_without_defence": None,
            "step_seconds": read_costs(out).seconds.tolist(),
        }

    def _attacker(
        self, row: Row, tuned: Any, plan: SplitPlan, texts: LeakTexts, defence: KnownDefence | None, say: Say
    ) -> Attacker:
        settings = self._settings
        return Attacker(
            base=self._base,
            tuned=tuned,
            tokenizer=self._tokenizer,
            plan=plan,
            texts=texts,
            n_attacked=settings.attacked,
            passes=-(-row.steps * settings.batch // settings.texts),
            defence=defence,
            inverter_steps=settings.inverter_steps,
            seed=settings.seed,
            quick=settings.quick,
            say=say,
        )

    def _build(self, folder: Path, package: Path) -> None:
        """Build a package of the preset, whose text the model writes itself."""
        home = folder / "home"
        home.mkdir(mode=0o700)
        generate_root(home)
        issue_worker(home)
        options = {
            "model": self._settings.model,
            "out": package,
            "home": home,
            "preset": _PRESET,
            "length": self._settings.max_length,
            "device": "cpu",
        }
        run_isthmus("emulator", "build", *train_flags(options))


def _is_advised(row: Row) -> bool:
    """Whether the row's package says how to tune on it."""
    return row.package is None or open_package(row.package).manifest.tuning is not None


def run_hits(texts: Sequence[Tensor], read: Iterable[Tensor]) -> Hits:
    """Of each text, the tokens that stand in a run of `RUN` tokens of what was read."""

    def runs(tokens: Sequence[int]) -> list[tuple[int, ...]]:
        return [tuple(tokens[at : at + RUN]) for at in range(len(tokens) - RUN + 1)]

    known = {run for tokens in read for run in runs(tokens.tolist())}
    right = []
    for tokens in texts:
        places = [at for at, run in enumerate(runs(tokens.tolist())) if run in known]
        right.append(float(len({place for at in places for place in range(at, at + RUN)})))
    of = [float(len(tokens)) for tokens in texts]
    return Hits(torch.tensor(right, dtype=torch.float64), torch.tensor(of, dtype=torch.float64))


MEASURED = ("token_accuracy", "rare_accuracy", "secret_recall", "rouge_l", "label_accuracy", "coarse_recall")
"""What is measured of an attack."""


def _entry(row: Row, found: Found | None, priors: Mapping[str, Interval], shared: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the ledger, without what compares rows; of no attack where nothing was sent."""
    judged = None if found is None else found.judged
    front = "known" if judged is None else judged.front
    codec = row.codec if found is None else found.codec
    known = 0 if found is None else found.known_texts
    return {
        "row": _title(row, codec, front, known),
        "attack": None if judged is None else judged.attack,
        "cut": int(row.edge_layers.partition(":")[0]),
        "plan": row.edge_layers,
        "mode": row.mode,
        "codec": "none" if found is None else codec,
        "defence": row.defence_text,
        "defence_claim": "; ".join(each.claim for each in row.defences()) or "none",
        "front": front,
        "data": row.data,
        "known_texts": known,
        "steps": row.steps,
        **_measured((name, None if judged is None else getattr(judged, name)) for name in MEASURED),
        **_measured(priors.items()),
        **_measured([("real_row_found", None if found is None else found.real_row_found)]),
        **shared,
        # What was measured of the run's own codec is not said of another.
        **({} if codec == row.codec else _measured([("bytes_per_token", None)])),
    }


def _title(row: Row, codec: str, front: str, known: int) -> str:
    """The row's name, with the side that it is attacked from where it is another than the usual one."""
    parts = [row.name]
    if codec != row.codec:
        parts.append(codec)
    if front == "tuned":
        parts.append(f"private front, {known} known texts" if known else "private front")
    return ", ".join(parts)


def _measured(values: Iterable[tuple[str, Interval | None]]) -> dict[str, Any]:
    """Each value, and its interval."""
    entry: dict[str, Any] = {}
    for name, interval in values:
        entry[name] = None if interval is None else interval.value
        entry[f"{name}_interval"] = None if interval is None else [interval.low, interval.high]
    return entry


def _plain(score: TaskScore) -> _Score:
    return {
        name: {"right": hits.right.tolist(), "of": hits.of.tolist()}
        for name, hits in (("losses", score.losses), ("hits", score.hits))
    }


def _fingerprint(*sets: Sequence[Text]) -> str:
    return fingerprint(*([text.encoded for text in texts] for texts in sets))
