"""What the command `emulator tune` does: training on a package, with no connection at all.

The emulator stands where the cloud's layers would; everything else is the training of `edge train`. Nothing here
imports what could open a connection.

**Kept outputs.** Where nothing is trained below the emulator's end, and nothing random acts there, the input of the
layers above is the same in each epoch. Then each text passes the layers below and the emulator by itself, without
padding: what comes out depends on the text alone, bit for bit, and not on the texts beside it in a batch. It is kept on
the disk, in the run's folder, until the run has ended; a run without room for it computes it anew, with the same bits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.skeleton import linear_names
from isthmus.common.errors import ConfigError
from isthmus.common.files import remove_folder
from isthmus.common.progress import StepProgress
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.config_text import one_line
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TuneConfig
from isthmus.edge.data.batches import TrainingData, load_data
from isthmus.edge.process_setup import device_of, no_core_files
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.run_report import Report
from isthmus.edge.span_cache.cache_check import dropout_below, edge_model, fingerprint, tuned_below
from isthmus.edge.span_cache.cache_store import KEY_BYTES, SpanStore
from isthmus.edge.training.defended_run import defended_run
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.edge.training.run_listener import RunListener
from isthmus.edge.training.trainer import Trainer
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.package.package import Package, open_package
from isthmus.protocol.limits import GIB
from isthmus.protocol.secure.keys import Fingerprint

KEPT = "kept-outputs"
"""Inside the run's folder."""


def run_tuning(config: TuneConfig, listener: RunListener | None = None) -> Report:
    """Train on a package as the configuration says; the work of `isthmus emulator tune`.

    The adapter's folder says which package it was tuned on, and what dp-sgd guarantees (`isthmus_tuning.json`).

    Raises:
        IsthmusError: of whatever kind fits; what was reached is in the newest checkpoint.
    """
    if config.format == "hub" or any((source or "").startswith("hub:") for source in (config.data, config.validation)):
        raise ConfigError("tuning on a package connects to nothing, so it reads no data from a hub: give a local file")
    no_core_files()
    use_threads(config.threads)
    wanted = config.signer_text()
    package = open_package(config.package, signer=None if wanted is None else Fingerprint.parse(wanted))
    console = Console(stderr=True, highlight=False)
    if wanted is None:
        console.print(f"The package is signed by {package.signer}; --signer insists on it.", soft_wrap=True)
    if package.bridge_file.exists():
        console.print(f"Using your own bridge: {package.bridge_file}", soft_wrap=True, markup=False)
    tokenizer = package.load_tokenizer()
    data = load_data(config, tokenizer)
    model = package.load_model().to(device_of(config.device))
    config, taken = _as_advised(config, package, model)
    if taken:
        console.print(f"Settings advised by the package: {taken}", soft_wrap=True)
    total = total_steps(config, len(data.train))
    tuned = build_peft(model, config, total_steps=total, layers=_trained_layers(config, package.plan))
    _refuse_below(tuned, package)
    hold_frozen_linears(tuned, config)
    progress = StepProgress("step", total, every=config.log_every)
    identity = ModelIdentity(
        package.emulator_name,
        package.digest,
        str(package.plan),
        attn_implementation=package.manifest.attn_implementation,
        package=package.id,
    )
    emulator_parameters = _parameters_run(model.remote_layers.span)
    with defended_run(model, tuned, config, identity, data, tokenizer, progress.message) as defended:
        trainer = Trainer(
            tuned,
            data,
            config,
            identity,
            emulator_parameters=emulator_parameters,
            progress=progress,
            listener=listener,
            defended=defended,
            within=_kept_outputs(tuned, package, data, config, progress.message),
        )
        return trainer.fit().report


def _as_advised(config: TuneConfig, package: Package, model: Any) -> tuple[TuneConfig, str]:
    """What the user did not say, as the package's owner advises it. Rank, modules and rate were chosen for LoRA.

    Returns:
        The configuration, and the flags that say what of it is the owner's.

    Raises:
        ConfigError: What is advised is no setting of a run.
    """
    tuning = package.manifest.tuning
    if tuning is None:
        return config, ""
    advised: dict[str, Any] = {"layers": "above", "steps": tuning.steps, "warmup_steps": tuning.warmup_steps}
    if config.method == "lora":
        layers = model.get_submodule(family_of(model.config).layers_path)[package.plan.cloud.stop :]
        advised |= {"rank": tuning.rank, "target_modules": linear_names(layers)}
        if config.optimizer == "adamw":
            advised["learning_rate"] = tuning.learning_rate
    said = config.model_fields_set | ({"steps"} if config.epochs is not None else set())
    taken = {name: value for name, value in advised.items() if name not in said}
    given = {name: getattr(config, name) for name in config.model_fields_set}
    try:
        config = TuneConfig.model_validate(given | taken)
    except ValidationError as error:
        raise ConfigError(f"the package's advice does not fit this run: {one_line(error, TuneConfig)}") from error
    flags = (
        f"--{name.replace('_', '-')} {','.join(value) if isinstance(value, tuple) else value}"
        for name, value in taken.items()
    )
    return config, " ".join(flags)


def _trained_layers(config: TuneConfig, plan: SplitPlan) -> list[int]:
    if not isinstance(config.layers, tuple):
        return [layer for layer in plan.edge_layers if config.layers != "above" or layer >= plan.cloud.stop]
    strange = sorted(set(config.layers) - set(plan.edge_layers))
    if strange:
        raise ConfigError(
            f"layers has layer {strange[0]}, which is not the edge's: it holds {plan.edge_layers[0]} to "
            f"{plan.edge_layers[-1]} without {plan.cloud.start} to {plan.cloud.stop - 1}"
        )
    return list(config.layers)


def _refuse_below(tuned: Any, package: Package) -> None:
    """Refuse what would learn from the emulator's gradient, where the package's owner says that it is a wrong one."""
    if package.manifest.tuning is None or package.manifest.adapters_below:
        return
    what = tuned_below(tuned)
    if what is not None:
        raise ConfigError(
            f"{what} and lies below the emulator, whose gradient is not the model's, so this package's owner allows "
            f"nothing there: train layers {package.plan.cloud.stop} to {package.plan.n_layers - 1} alone (--layers "
            "above), and neither --method prompt nor --start-from of an adapter below"
        )


@contextmanager
def _kept_outputs(
    tuned: Any, package: Package, data: TrainingData, config: TuneConfig, say: Callable[[str], None]
) -> Iterator[None]:
    """Keep what comes out of the emulator, see the top of the file; deleted unless the block is left by an error.

    The run's folder must be this process's, and hold no other run: another's rows are deleted on entering.
    """
    edge = edge_model(tuned)
    folder = config.out / KEPT
    with ExitStack() as stack:
        if tuned_below(tuned) is None and dropout_below(edge) is None:
            store = None
            if config.keep_outputs_gib:
                of = json.dumps([package.id, data.fingerprint, config.precision, config.device]).encode()
                below = fingerprint(edge, edge.remote_layers.span)
                identity = hashlib.blake2b(of + below, digest_size=KEY_BYTES).digest()
                size = int(config.keep_outputs_gib * GIB)
                store = SpanStore(folder, identity, max_bytes=size, what="folder of kept outputs")
                stack.enter_context(store)
            stack.enter_context(_RowByRow(edge, store, say).in_place())
        yield
    if folder.exists():  # also what the run has kept before it was resumed with room for nothing
        remove_folder(folder)


class _RowByRow:
    """In the emulator's place: what it gives for each row of a batch by itself, looked up or computed.

    Args:
        edge: The edge's model, without PEFT's wrapper.
        store: Where rows are kept; None for nowhere.
        say: Told once when no further row finds room.
    """

    def __init__(self, edge: Any, store: SpanStore | None, say: Callable[[str], None]) -> None:
        family = edge.isthmus_origin.family
        self._base: Any = edge.get_submodule(family.base)
        self._layers: Any = edge.get_submodule(family.layers_path)
        self._plan: SplitPlan = edge.split_plan
        self._remote: Any = edge.remote_layers
        self._emulator: Any = edge.remote_layers.span
        self._store = store
        self._say = say
        self._full = False
        self._below = False  # while one row passes the layers below
        self._rows: list[Tensor] = []
        self._seen: Tensor

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Stand between the model and its emulator while the block runs."""
        layers = [self._layers[index] for index in self._plan.edge_layers]
        # Before the model's own hook, which frames one forward at a time.
        hook = self._base.register_forward_pre_hook(self._look_up, with_kwargs=True, prepend=True)
        for index, layer in zip(self._plan.edge_layers, layers, strict=True):
            layer.forward = partial(self._edge_layer, layer.forward, index < self._plan.cloud.start)
        self._remote.span = self
        try:
            yield
        finally:
            self._remote.span = self._emulator
            for layer in layers:
                del layer.forward
            hook.remove()

    def __call__(self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """See `SpanFn`. Padding gets zeros: no token attends to it, and the loss ignores it."""
        if self._below:
            self._seen = self._emulator(hidden, mask, positions)
            return self._seen
        output = torch.zeros_like(hidden)
        for into, row in zip(output, self._rows, strict=True):
            into[: len(row)] = row
        return output

    def _edge_layer(self, forward: Callable[..., Tensor], is_below: bool, hidden: Tensor, *args: Any, **kw: Any) -> Any:
        return forward(hidden, *args, **kw) if is_below == self._below else hidden

    def _look_up(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._below:
            return
        named = kwargs | dict(zip(inspect.signature(base.forward).parameters, args, strict=False))
        lengths = named["attention_mask"].sum(-1).tolist()  # batches are padded on the right
        self._rows = [self._row(ids[:length]) for ids, length in zip(named["input_ids"], lengths, strict=True)]

    def _row(self, ids: Tensor) -> Tensor:
        key = hashlib.blake2b(ids.cpu().numpy().tobytes(), digest_size=KEY_BYTES).digest()
        kept = None if self._store is None else self._store.get(key, (len(ids), self._base.config.hidden_size))
        if kept is not None:
            return kept
        self._below = True
        try:
            with torch.no_grad():
                self._base(input_ids=ids[None], use_cache=False)
        finally:
            self._below = False
        if self._store is not None and not self._store.put(key, self._seen[0]) and not self._full:
            self._full = self._store.stats().full
            if self._full:
                self._say(
                    "No room for further outputs of the emulator within --keep-outputs-gib: they are computed anew."
                )
        return self._seen[0]


def _parameters_run(emulator: Emulator) -> int:
    """Weights of the matrices that a forward of the emulator goes through; those of a shared layer count each time."""
    layers = getattr(emulator.base, family_of(emulator.config).layers)
    return sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.dim() == 2)
