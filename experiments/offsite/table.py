"""The table of emulators: what a preset of `emulator build`, or a package, gives the data owner, and what a thief.

Public, private and scored texts of a task share no prompt. The table chooses nothing on scored texts: where there are
several learning rates, the first seed's loss on the validation slice chooses; over an emulator the preset's rate and
layers count, or `--rate` and `--layers`, since there the data owner can tell nothing. A package without advice is tuned
as the presets advise. Each result is a cell, kept in `out`; a table that was interrupted goes on with what is missing.
`ROWS` says what the rows are.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Literal

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from torch import Tensor

from isthmus.backbone.checkpoints.sources import Checkpoint, load_tokenizer, resolve
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.span import distinct_layers, load_layers
from isthmus.common.errors import ConfigError
from isthmus.common.figures import plotting
from isthmus.common.files import sha256_of
from isthmus.common.torch_threads import use_threads
from isthmus.edge.bridge_fit import RIDGE
from isthmus.emulator.compress.bridges import Bridge, RidgeSums, add_bridges, fit_bridges
from isthmus.emulator.compress.emulator_files import load_emulator
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.compress.outer_layers import OuterLayers
from isthmus.emulator.compress.public_text import fingerprint, load_blocks
from isthmus.emulator.compress.recipe import EMULATOR_FILE, Recipe
from isthmus.emulator.distill.distillation import distill
from isthmus.emulator.package.build import build_package, pick_device, write_own_text
from isthmus.emulator.package.build_presets import FIDELITY, GUARDED, PRESETS, BuildPreset, top_heavy
from isthmus.emulator.package.manifest import Manifest, Tuning
from isthmus.emulator.package.package import is_package, open_package
from isthmus.experiments.harness.bench_flags import names_of, numbers_of, precision_of
from isthmus.experiments.harness.emulator_settings import TableSettings
from isthmus.experiments.harness.finished_cells import Cells
from isthmus.experiments.harness.prose import write_jsonl
from isthmus.experiments.offsite.table_lab import Lab, Regime, scores_of
from isthmus.experiments.offsite.table_rows import THIEVES, draw_table, row_of
from isthmus.experiments.scoring.likelihood import require_lm_eval
from isthmus.experiments.scoring.tasks import Sizes, Task, default_data_folder, load_task
from isthmus.protocol.secure.certificates import WorkerCertificate
from isthmus.protocol.secure.keys import WorkerIdentity

_LENGTHS = (1, 2)  # of a thief's run, over that of the data owner's
_ALWAYS = ("zero-shot", "reference", "floor")
ROWS: Final[dict[str, Literal["once", "each", "few", "none"]]] = {
    # the full model as it is
    "zero-shot": "once",
    # adapters on all linears of the layers that the package's advice names, over the true middle
    "reference": "each",
    # split training with another plan, adapters on q and v
    "split q and v": "few",
    # the same, on all linears
    "split all": "few",
    # the reference's adapters, trained on the public slice alone
    "public alone": "few",
    # the same adapters, tuned over one early layer and one bridge, and plugged in
    "floor": "each",
    # the same, tuned over the preset's emulator, and plugged in
    "plug-in": "each",
    # the same, with the edge's own bridge at the emulator's end, fitted to the public slice
    "edge bridge": "each",
    # the run of `edge bridge`, scored over the emulator
    "emulator tuned": "none",
    # the same as `edge bridge`, fitted to `--text`, or to the model's own writing
    "other bridge": "few",
    # the package's owner's closing bridge fitted to the public slice, and none of the edge's
    "owner bridge": "few",
    # all weights of the package with the edge's bridge, trained on private and public texts, for as many steps as the
    # owner or twice as many; or the tuned emulator, if the validation says so
    "thief": "few",
    # the same, without that way out, after all weights of the emulator were distilled on the public slice, as presets
    # are: what the cloud answered for the bridge teaches more than a bridge
    "distilled thief": "few",
}
"""The rows in their order, and how many runs each has: one, one for each of `seeds` or of `few_seeds`, or none."""
_DISTILLATION = GUARDED.distillation()
_NEVER = (1 << 62) - 1  # when the certificate of a key ends that nobody keeps

Result = dict[str, Any]
Build = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Built:
    """An emulator on the disk.

    Attributes:
        label: Its recipe.
        keep: Share of the middle's layers that it keeps.
        sha256: Of its weights' file, hex: the row of a table names it, and a package's manifest has the same.
    """

    label: str
    keep: float
    folder: Path
    sha256: str

    def load(self, checkpoint: Checkpoint, device: str) -> Emulator:
        """A fresh copy, frozen."""
        return load_emulator(self.folder, checkpoint.config, device=device)


@dataclass(frozen=True, slots=True)
class Preset:
    """An emulator to be measured, and how its owner would have it tuned."""

    name: str
    built: Built
    tuning: Tuning


def build_preset(
    preset: BuildPreset, folder: Path, checkpoint: Checkpoint, plan: SplitPlan, text: Path, length: int, device: str
) -> None:
    """Write what `isthmus emulator build --preset` writes, unless it is there, under a key that nobody keeps."""
    if is_package(folder):
        return
    key = Ed25519PrivateKey.generate()
    build_package(
        folder,
        checkpoint,
        plan,
        Recipe.parse(preset.method, preset.share(len(plan.cloud))),
        (preset.distillation(), None) if preset.distils else None,
        signer=WorkerIdentity(key, WorkerCertificate.issue(key, key.public_key().public_bytes_raw(), _NEVER)),
        licence="",
        length=length,
        text=text,
        figure=None,
        device=device,
        preset=preset,
    )


def check_preset(text: str, checkpoint: Checkpoint, plan: SplitPlan) -> None:
    """Make sure that a flag names a preset, or the folder of a package of this model and plan.

    Raises:
        ConfigError: It does not, or the package is of another model or plan.
    """
    if text in PRESETS:
        return
    if not is_package(Path(text)):
        raise ConfigError(f"{text!r} is no preset and no package's folder: give {', '.join(PRESETS)} or a package")
    manifest = open_package(Path(text)).manifest
    if (manifest.digest, manifest.plan) != (checkpoint.digest(), str(plan)):
        raise ConfigError(
            f"the package {text} is of {manifest.model} split {manifest.plan}, the table of {checkpoint.name} split "
            f"{plan}: give its --model and --adapter-layers"
        )


def open_preset(folder: Path) -> Preset:
    """A package, with the advice of the presets where it has none of its own."""
    manifest, label = open_package(folder).manifest, folder.resolve().name
    return Preset(manifest.preset or label, _built(folder, manifest), manifest.tuning or FIDELITY.tuning)


def _built(folder: Path, manifest: Manifest) -> Built:
    return Built(manifest.recipe, manifest.keep, folder, sha256_of(folder / EMULATOR_FILE).hex())


def run_table(settings: TableSettings, *, console: Console | None = None) -> dict[str, Any]:
    """Make the table, or go on with it, and draw its figure if that is asked for.

    Returns:
        `runs` (see `row_of`) and `settings`.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the message says how to go on.
        ConfigError: A task, a preset or an option does not make sense, or the package lm-eval is needed and missing.
        DataError: Data are missing or malformed.
    """
    if settings.figure is not None:
        plotting()  # a missing package is reported before the long run, not after it
    try:
        result = _Table(settings, console or Console(stderr=True, highlight=False)).make()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Stopped; what is finished is kept in {settings.out}: repeat the command to go on."
        ) from None
    if settings.figure is not None:
        draw_table(result["runs"], settings.figure, settings.model)
    return result


class _Table:
    """See the module; `make` makes the table, or goes on with it."""

    def __init__(self, settings: TableSettings, console: Console) -> None:
        self.settings, self.device, self._console = settings, pick_device(settings.device), console
        self._presets = settings.preset or list(PRESETS)
        self._adapter_rates = numbers_of(settings.adapter_rates, "adapter-rates")
        self._whole_rates = numbers_of(settings.whole_rates, "whole-rates")
        if settings.rate is not None:
            numbers_of(f"{settings.rate:g}", "rate")
        if settings.layers not in (None, "above", "all"):
            raise ConfigError(f"--layers {settings.layers!r} is not understood: give above or all")
        tried = {"learning_rate": settings.rate, "layers": settings.layers}
        self._tried = {name: value for name, value in tried.items() if value is not None}
        use_threads(settings.threads)
        checkpoint, data = resolve(settings.model), settings.data_folder or default_data_folder()
        n_layers, length = checkpoint.config.num_hidden_layers, settings.text_length
        self.tokenizer = load_tokenizer(checkpoint.folder)
        sizes = Sizes(settings.test, settings.validation, settings.max_length, settings.public, settings.private)
        names = names_of(settings.tasks, "tasks")
        self.tasks = [load_task(name, data, self.tokenizer, sizes) for name in names]
        if any(task.questions for task in self.tasks):
            require_lm_eval()
        plan = SplitPlan.parse(settings.adapter_layers or top_heavy(n_layers), n_layers)
        self._split_plan = SplitPlan.parse(settings.split_layers, n_layers)
        for name in self._presets:
            check_preset(name, checkpoint, plan)
        self.lab = Lab(checkpoint, plan, self.tokenizer, _regime(settings), self.device)
        self.cells = Cells(settings.out / "cells.jsonl", console)
        self._common = {
            "model": checkpoint.digest(),
            "plan": str(plan),
            "score_precision": self.lab.regime.score_precision,
        }
        beside = settings.out / "own"
        self._text = settings.text or write_own_text(beside, checkpoint, self.tokenizer, length, self.device)
        self._blocks = load_blocks(self._text, self.tokenizer, length)
        self._floor, self._public = cache(self._make_floor), cache(self._public_blocks)
        self._few = min(settings.few_seeds, settings.seeds)
        self._rows = {*_ALWAYS, *names_of(settings.rows, "rows", tuple(ROWS))}
        if self._rows & {"emulator tuned", *THIEVES}:
            self._rows.add("edge bridge")  # the run that they are of, or are compared with
        self.cells.expect(len(self.tasks) * len(self._presets) * self._cells_of_a_preset())

    def make(self) -> dict[str, Any]:
        """All cells, then the rows."""
        rows = []
        for name in self._presets:
            preset = self._preset(name)
            advice = preset.tuning.model_copy(update=self._tried)
            regime = replace(self.lab.regime, steps=advice.steps, rank=advice.rank, warmup=advice.warmup_steps)
            lab = self.lab.at(regime)
            for task in self.tasks:
                ways = self._without_emulator(lab, task, advice)
                ways |= self._with_emulator(lab, task, advice, preset.built)
                if "owner bridge" in self._rows - ways.keys():
                    self._console.print(f"{preset.name} has no closing bridge: no row owner bridge")
                results = {name: ways[name]() for name in ROWS if name in self._rows & ways.keys()}
                rows += self._scored(preset.name, preset.built, advice, task, results)
        return {"runs": rows, "settings": self._described()}

    def _preset(self, name: str) -> Preset:
        if name not in PRESETS:
            return open_preset(Path(name))
        preset, plan, length = PRESETS[name], self.lab.plan, self.settings.text_length
        building = replace(preset, gives_not="", advised=())  # those two change no weight
        made_of = f"{self.lab.checkpoint.digest()} {plan} {fingerprint(self._blocks)} {building}"
        folder = self.settings.out / "packages" / f"{name}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
        build_preset(preset, folder, self.lab.checkpoint, plan, self._text, length, self.device)
        # With another plan than the preset's own, the package has neither its name nor its advice.
        return Preset(name, _built(folder, open_package(folder).manifest), preset.tuning)

    # Cells ------------------------------------------------------------------------------------------------------------

    def _cells_of_a_preset(self) -> int:
        """How many cells one task has, at most."""
        runs = {"once": 1, "each": self.settings.seeds, "few": self._few, "none": 0}
        lengths = len(self._rows.intersection(THIEVES)) * (len(_LENGTHS) - 1)
        return sum(runs[ROWS[name]] for name in self._rows) + lengths

    def _without_emulator(self, lab: Lab, task: Task, tuning: Tuning) -> dict[str, Callable[[], list[Result]]]:
        split = self._split_plan
        public = replace(task, train=task.public)
        cells = partial(self._cells_of, lab, task, rates=self._adapter_rates)
        same = partial(cells, of=_of_advice(tuning))
        adapted = lab.advised(tuning, lab.middle)
        text = {"text": fingerprint(self._blocks)}
        return {
            "zero-shot": lambda: [self._zero_shot(lab, task)],
            "reference": lambda: same("reference", adapted, seeds=self.settings.seeds),
            "split q and v": lambda: cells(f"split {split} q,v", lab.split(split, all_linears=False)),
            "split all": lambda: cells(f"split {split} all", lab.split(split, all_linears=True)),
            "public alone": lambda: same("public alone", adapted, trained_on=public),
            "floor": lambda: self._plug_in(lab, task, "floor", tuning, self._floor, text),
        }

    def _with_emulator(
        self, lab: Lab, task: Task, tuning: Tuning, built: Built
    ) -> dict[str, Callable[[], list[Result]]]:
        def fresh() -> Emulator:
            return built.load(lab.checkpoint, self.device)

        @cache
        def bridged(*, public: bool = True, owner: bool = False) -> Emulator:
            emulator = fresh()
            if owner:
                _last_bridge(emulator).reset_parameters()
            emulator.end_with(self._fit(lab, emulator, self._public(task) if public else self._blocks))
            return emulator

        def of(**which: bool) -> dict[str, Any]:
            text = self._public(task) if which.get("public", True) else self._blocks
            return {"emulator": built.sha256, "bridge": fingerprint(text), "ridge": RIDGE, **which}

        @cache
        def distilled() -> Emulator:
            emulator = copy.deepcopy(bridged())
            with tempfile.TemporaryDirectory(prefix="isthmus-thief-") as folder:
                distill(lab.checkpoint, lab.plan, emulator, self._public(task), _DISTILLATION, Path(folder))
            return emulator

        where = f"{built.label} {built.keep:g}"
        plug_in = partial(self._plug_in, lab, task, tuning=tuning)
        bridge = cache(lambda: plug_in(f"{where} edge bridge", span=bridged, of=of(), views={"tuned": None}))

        def with_bridge(name: str, **which: bool) -> list[Result]:
            span = partial(bridged, **which)
            return plug_in(f"{where} {name}", span=span, of=of(**which), seeds=self._few)

        def steals(name: str, emulator: Callable[[], Emulator], about: Mapping[str, Any]) -> list[Result]:
            return self._thief(lab, task, f"{where} {name}", lab.everything(lambda: copy.deepcopy(emulator())), about)

        def thief() -> list[Result]:
            stolen = steals("thief", bridged, of())
            pairs = zip(stolen, bridge(), strict=False)
            return [
                own if own["validation_loss"] < other["validation_loss"] else _as_thief(other) for own, other in pairs
            ]

        ways: dict[str, Callable[[], list[Result]]] = {
            "plug-in": lambda: plug_in(f"{where} plug-in", span=cache(fresh), of={"emulator": built.sha256}),
            "edge bridge": bridge,
            "emulator tuned": bridge,
            "other bridge": lambda: with_bridge("other bridge", public=False),
            "thief": thief,
            "distilled thief": lambda: steals(
                "distilled thief", distilled, of() | {"distilled": _DISTILLATION.stated()}
            ),
        }
        if _last_bridge(fresh()) is not None:
            ways["owner bridge"] = lambda: with_bridge("owner bridge", owner=True)
        return ways

    def _plug_in(
        self,
        lab: Lab,
        task: Task,
        name: str,
        tuning: Tuning,
        span: Callable[[], Emulator],
        of: Mapping[str, Any],
        seeds: int | None = None,
        views: Mapping[str, Any] | None = None,
    ) -> list[Result]:
        """Adapters on what `span` gives, tuned as advised, scored as `views` says and over the true middle."""
        return self._cells_of(
            lab,
            task,
            name,
            lambda config: lab.advised(tuning, span())(config),  # noqa: PLW0108  # made when it is needed
            rates=(tuning.learning_rate,),
            seeds=seeds or self.settings.seeds,
            views={**(views or {}), "plug-in": lab.middle},
            of={**of, **_of_advice(tuning)},
        )

    def _thief(self, lab: Lab, task: Task, who: str, build: Build, of: Mapping[str, Any]) -> list[Result]:
        both = replace(task, train=task.train + task.public)

        def cells(length: int, rates: Sequence[float], seeds: range) -> list[Result]:
            longer = lab.at(replace(lab.regime, steps=length * lab.regime.steps, warmup=None))
            name = f"{who}, {length} x"
            return self._cells_of(longer, task, name, build, rates=rates, seeds=seeds, trained_on=both, of=of)

        first = {length: cells(length, self._whole_rates, range(1))[0] for length in _LENGTHS}
        best = min(first, key=lambda length: first[length]["validation_loss"])
        return [first[best], *cells(best, (first[best]["rate"],), range(1, self._few))]

    def _cells_of(
        self,
        lab: Lab,
        task: Task,
        name: str,
        build: Build,
        *,
        rates: Sequence[float],
        seeds: int | range | None = None,
        trained_on: Task | None = None,
        views: Mapping[str, Any] | None = None,
        of: Mapping[str, Any] | None = None,
    ) -> list[Result]:
        """A run for each of the seeds, `few_seeds` of them by default, of what is made of LoRA or of all weights."""
        regime = lab.regime
        settings = self._common | {
            "task": task.fingerprint,
            "rates": list(rates),
            **{key: getattr(regime, key) for key in ("steps", "batch", "rank", "alpha", "precision", "warmup")},
            **(of or {}),
        }
        views = views or {name: None}
        results: list[Result] = []
        for seed in seeds if isinstance(seeds, range) else range(seeds or self._few):
            own = rates if not results else (results[0]["rate"],)
            run = partial(lab.run, trained_on or task, seed, own, build, views)
            results.append(self.cells.get(f"{task.name} {name} seed {seed}", settings | {"seed": seed}, run))
        return results

    def _zero_shot(self, lab: Lab, task: Task) -> Result:
        score = lambda: {"scores": {"zero-shot": lab.score(lab.edge(lab.middle), task)}}  # noqa: E731
        return self.cells.get(f"{task.name} zero-shot", self._common | {"task": task.fingerprint}, score)

    # Rows -------------------------------------------------------------------------------------------------------------

    def _scored(
        self, preset: str, built: Built, advice: Tuning, task: Task, results: Mapping[str, Sequence[Result]]
    ) -> list[Result]:
        views = {"emulator tuned": "tuned"}
        by_row = {
            name: [scores_of(each, views.get(name, next(reversed(each["scores"])))) for each in found]
            for name, found in results.items()
        }
        split = [name for name in ("split q and v", "split all") if name in results]
        loss = {name: sum(each["validation_loss"] for each in results[name]) for name in split}
        rates = {name: found[0]["rate"] for name, found in results.items() if "rate" in found[0]}
        return [
            row_of(
                {name: [scores[metric] for scores in found] for name, found in by_row.items()},
                best_split=min(loss, key=lambda name: loss[name], default=None),
                preset=preset,
                method=built.label,
                keep=built.keep,
                emulator=built.sha256,
                tuning=advice.model_dump(),
                task=task.name,
                metric=metric,
                texts={"train": len(task.train), "public": len(task.public)},
                rates=rates,
            )
            for metric in task.metrics
        ]

    def _described(self) -> dict[str, Any]:
        """The settings as JSON can say them, without paths of this machine."""
        settings = asdict(self.settings) | {"few_seeds": self._few}
        settings |= {"text": None if self.settings.text is None else self.settings.text.name}
        settings |= {"preset": [Path(name).name for name in self._presets]}
        return {name: value for name, value in settings.items() if name not in ("out", "data_folder", "figure")}

    # What is tuned over -----------------------------------------------------------------------------------------------

    def _public_blocks(self, task: Task) -> Tensor:
        path = self.settings.out / "public" / f"{task.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(path, ({"text": text} for text in task.public_texts))
        return load_blocks(path, self.tokenizer, self.settings.text_length)

    @torch.no_grad()
    def _fit(self, lab: Lab, emulator: Emulator, blocks: Tensor) -> Bridge:
        """What `emulator fit` fits to texts that it does not refuse, with the true middle in the cloud's place."""
        device = self.device
        front = OuterLayers(lab.checkpoint, lab.plan, with_top=False, device=device)
        sums = RidgeSums(lab.checkpoint.config.hidden_size, device)
        for ids in torch.split(blocks, 8):
            entry = front.entry(ids.to(device))
            sums.add(emulator(entry), lab.middle(entry, None, None))
        return sums.bridge(RIDGE)

    def _make_floor(self) -> Emulator:
        """The middle's first layer, and one bridge for all the others."""
        checkpoint, plan = self.lab.checkpoint, self.lab.plan
        layers = (plan.bottom,)
        base = load_layers(checkpoint, layers).to(self.device)
        add_bridges(base, layers, layers)
        fit_bridges(checkpoint, plan, base, layers, layers, self._blocks, ridge=RIDGE, device=self.device)
        recipe = Recipe("uniform", 1 / len(plan.cloud), bridged=True)
        return Emulator(base, layers, recipe, checkpoint.config, bridges=layers)


def _of_advice(tuning: Tuning) -> dict[str, str]:
    """What a cell says of the layers that are advised; nothing where they are those above alone."""
    return {} if tuning.layers == "above" else {"layers": tuning.layers}


def _last_bridge(emulator: Emulator) -> Any:
    """The bridge at the emulator's end; None where there is none."""
    last = emulator.layers[-1]
    return getattr(distinct_layers(emulator.base, emulator.layers)[last], "bridge", None)


def _as_thief(tuned: Result) -> Result:
    """The tuned emulator, as a thief's result."""
    return tuned | {"scores": {"thief": tuned["scores"]["tuned"]}}


def _regime(settings: TableSettings) -> Regime:
    """How a table's settings train and score; a preset says the steps, the rank and the warm-up."""
    return Regime(
        steps=1,
        batch=settings.batch,
        max_length=settings.max_length,
        rank=1,
        precision=precision_of(settings.precision, "precision"),
        score_precision=precision_of(settings.score_precision, "score-precision"),
    )
