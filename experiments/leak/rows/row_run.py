"""One row of the ledger: its run, the attacks on it, and its task's loss."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.edge.data.batches import pad_id
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.processes import run_isthmus, train_flags
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.harness.single_process import whole
from isthmus.experiments.leak.decoy_texts import write_decoys
from isthmus.experiments.leak.grid import Row
from isthmus.experiments.leak.leak_settings import LeakSettings
from isthmus.experiments.leak.leak_texts import Counts, LeakTexts, Text, load_texts
from isthmus.experiments.leak.rows.attacked_row import Attacker, Found, attack_row, priors_of
from isthmus.experiments.leak.rows.kept_parts import KeptParts
from isthmus.experiments.leak.rows.recorded_run import (
    OUT,
    read_costs,
    read_run,
    record_run,
    train_options,
    write_examples,
)
from isthmus.experiments.leak.rows.trained_edge import TaskScore, score_task, trained_defence, with_adapter
from isthmus.experiments.scoring.tasks import default_data_folder
from isthmus.privacy.attacks.attack import KnownDefence
from isthmus.privacy.attacks.front import Front
from isthmus.privacy.measures.bootstrap import Interval, share_interval
from isthmus.privacy.measures.token_accuracy import Hits
from isthmus.protocol.secure.keys import generate_root, issue_worker

Say = Callable[[str], None]
_METHOD, _KEEP = "importance+bridged", 0.5
"""An emulator's recipe and its share of the middle's layers: the best of those that `make bench-emulators` measures at
this share; with as many steps of distillation as there. A row can name another package."""


class RowLab:
    """Makes rows, one after the other, with one model.

    Args:
        settings: Those of the command.
        shared: What rows with the same texts have in common, so that it is measured once.
    """

    def __init__(self, checkpoint: Checkpoint, tokenizer: Any, settings: LeakSettings, shared: Cells) -> None:
        self._checkpoint, self._tokenizer, self._settings, self._shared = checkpoint, tokenizer, settings, shared

    @cached_property
    def _base(self) -> Any:
        return whole(self._checkpoint).requires_grad_(False)

    def make(self, row: Row, parts: KeptParts, say: Say) -> dict[str, Any]:
        """Train, attack and score.

        Args:
            parts: Those that are done, which are not made again.
            say: Told what is under way.

        Returns:
            `runs`, entries of the ledger without what compares rows; `task`, losses and hits of each held-out text, by
            codec; `task_without_defence`, the same of the adapter in the whole model with the defence off, None where
            there is none; `task_zero_shot`, of the model without training; `step_seconds`, of each step.

        Raises:
            AttackLimitedError: The row is undefended, and an attack's lists limited it.
            DataError: There are too few texts.
            IsthmusError: What cloud and edge raise.
        """
        texts = self._texts(row)
        made = (self._emulator if row.mode == "emulator" else self._split)(row, texts, parts, say)
        zero_shot = self._shared.get(
            "zero-shot",
            self._about(texts.scored),
            lambda: _plain(score_task(self._base, texts.scored, pad_id(self._tokenizer))),
        )
        return {**made, "task_zero_shot": zero_shot}

    def _about(self, *texts: Sequence[Text]) -> dict[str, Any]:
        """What a measurement of the base model on these texts depends on."""
        tokens = json.dumps([[(text.encoded.input_ids, text.encoded.labels) for text in each] for each in texts])
        model = {"model": self._checkpoint.digest(), "threads": self._settings.threads}
        return {**model, "texts": hashlib.sha256(tokens.encode()).hexdigest()}

    def _priors(self, attacker: Attacker, texts: Sequence[Text], *, labels: bool = False) -> dict[str, Interval]:
        """See `priors_of`."""
        made = self._shared.get(
            "priors",
            {**self._about(attacker.texts.public, texts), "labels": labels},
            lambda: {name: [*interval] for name, interval in priors_of(attacker, texts, labels=labels).items()},
        )
        return {name: Interval(*values) for name, values in made.items()}

    def _texts(self, row: Row) -> LeakTexts:
        settings = self._settings
        counts = Counts(
            settings.texts, settings.attacked + row.n_known, settings.public, settings.scored, settings.max_length
        )
        return load_texts(
            row.data, settings.data_folder or default_data_folder(), self._tokenizer, counts, settings.seed
        )

    def _record(self, row: Row, texts: LeakTexts, folder: Path, say: Say) -> None:
        decoys = None
        if row.n_decoys:
            say("writing decoys")
            real = (*texts.train, *texts.sent)
            written = write_decoys(self._base, self._tokenizer, real, texts.public, row.n_decoys, self._settings.seed)
            decoys = folder / "decoys.jsonl"
            write_jsonl(decoys, ({"prompt": each.prompt, "completion": each.completion} for each in written))
        say(f"{row.steps} steps over a cloud that records")
        record_run(row, self._settings, texts, self._base, folder, decoys)

    def _split(self, row: Row, texts: LeakTexts, parts: KeptParts, say: Say) -> dict[str, Any]:
        settings = self._settings
        parts.run(lambda: self._record(row, texts, parts.files, say))
        run = read_run(row, settings, texts, parts.files)
        plan = row.plan(self._checkpoint.config.num_hidden_layers)
        tuned = with_adapter(self._checkpoint, run.out / "adapter")
        defence = trained_defence(
            row.defences(), run.checkpoint, self._base.config.hidden_size,
            lambda: [Front(tuned, plan.bottom).states(text.tokens) for text in texts.public],
        )  # fmt: skip
        say("scoring the task")
        task = parts.part(
            "task",
            dict[str, Any],
            lambda: {
                codec: _plain(
                    score_task(
                        tuned,
                        texts.scored,
                        pad_id(self._tokenizer),
                        plan=plan,
                        codec=codec,
                        defence=defence,
                        seed=settings.seed,
                    )
                )
                for codec in run.sent
            },
        )
        without = None
        if row.defence:
            without = parts.part(
                "task without defence",
                dict[str, Any],
                lambda: _plain(score_task(tuned, texts.scored, pad_id(self._tokenizer))),
            )
        attacker = self._attacker(row, tuned, plan, texts, defence, say)
        found = attack_row(row, run, attacker, parts)
        costs = read_costs(run.out)
        shared: dict[str, Any] = {
            **_measured([("bytes_per_token", share_interval(Hits(costs.bytes, costs.tokens)))]),
            **{name: run.report[name] for name in ("epsilon", "delta")},
            "unit": run.report["guarantee"],
        }
        priors = self._priors(attacker, texts.sent[: settings.attacked])
        learned = [text for batch in run.learned for text in batch.texts]
        of_labels = self._priors(attacker, learned, labels=True) if learned else {}
        return {
            "runs": [
                _entry(row, each, priors if each.judged.label_accuracy is None else of_labels, shared) for each in found
            ],
            "task": task,
            "task_without_defence": without,
            "step_seconds": costs.seconds.tolist(),
        }

    def _tune(self, row: Row, texts: LeakTexts, folder: Path, say: Say) -> None:
        package = row.package or folder / "package"
        if row.package is None:
            say("building an emulator")
            self._build(row, texts, folder, package)
        say(f"{row.steps} steps on the emulator")
        write_examples(folder / "train.jsonl", texts.train)
        plan = row.plan(self._checkpoint.config.num_hidden_layers)
        options = {**train_options(row, self._settings, self._base, plan), "threads": self._settings.threads}
        options |= {"package": package, "data": folder / "train.jsonl", "validation_split": 0.0, "out": folder / OUT}
        run_isthmus("emulator", "tune", *train_flags(options))

    def _emulator(self, row: Row, texts: LeakTexts, parts: KeptParts, say: Say) -> dict[str, Any]:
        settings = self._settings
        parts.run(lambda: self._tune(row, texts, parts.files, say))
        plan = row.plan(self._checkpoint.config.num_hidden_layers)
        tuned = with_adapter(self._checkpoint, parts.files / OUT / "adapter")
        say("scoring the task")
        score = score_task(tuned, texts.scored, pad_id(self._tokenizer))
        priors = self._priors(self._attacker(row, tuned, plan, texts, None, say), texts.sent[: settings.attacked])
        nothing = _measured([("bytes_per_token", Interval(0, 0, 0))])
        return {
            "runs": [_entry(row, None, priors, {**nothing, "epsilon": None, "delta": None, "unit": None})],
            "task": {row.codec: _plain(score)},
            "task_without_defence": None,
            "step_seconds": read_costs(parts.files / OUT).seconds.tolist(),
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
            say=say,
        )

    def _build(self, row: Row, texts: LeakTexts, folder: Path, package: Path) -> None:
        """Build a package, distilled on the public texts."""
        settings, home = self._settings, folder / "home"
        home.mkdir(mode=0o700)
        generate_root(home)
        issue_worker(home)
        public = [f"{text.example.prompt}{text.example.completion}" for text in texts.public]
        random.Random(settings.seed).shuffle(public)  # noqa: S311  # an order, not a secret
        write_jsonl(folder / "public.jsonl", ({"text": text} for text in public))
        options = {
            "model": settings.model,
            "out": package,
            "home": home,
            "adapter_layers": row.edge_layers,
            "method": _METHOD,
            "keep": _KEEP,
            "distill": folder / "public.jsonl",
            "distill_steps": settings.distill_steps,
            "length": settings.max_length,
            "save_every": settings.distill_steps,
            "seed": settings.seed,
            "device": "cpu",
        }
        run_isthmus("emulator", "build", *train_flags(options))


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


def _plain(score: TaskScore) -> dict[str, Any]:
    return {
        name: {"right": hits.right.tolist(), "of": hits.of.tolist()}
        for name, hits in (("losses", score.losses), ("hits", score.hits))
    }
