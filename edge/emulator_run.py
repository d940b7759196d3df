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
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pydantic import ValidationError

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.skeleton import linear_names
from isthmus.common.errors import ConfigError
from isthmus.common.files import remove_folder
from isthmus.common.progress import StepProgress, note
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.config_text import one_line
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TuneConfig
from isthmus.edge.data.batches import TrainingData, load_data
from isthmus.edge.process_setup import device_of, no_core_files
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.run_report import Report
from isthmus.edge.span_cache.cache_check import cacheable_edge, fingerprint, tuned_below
from isthmus.edge.span_cache.cache_store import KEY_BYTES, SpanStore
from isthmus.edge.span_cache.kept_outputs import KeptOutputs
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


def run_tuning(config: TuneConfig, listener: RunListener | None = None, say: Callable[[str], None] = note) -> Report:
    """Train on a package as the configuration says; the work of `isthmus emulator tune`.

    The adapter's folder says which package it was tuned on, and what dp-sgd guarantees (`isthmus_tuning.json`).

    Args:
        say: Told what the package decides of the run; by default it is printed.

    Raises:
        IsthmusError: of whatever kind fits; what was reached is in the newest checkpoint.
    """
    if config.format == "hub" or any((source or "").startswith("hub:") for source in (config.data, config.validation)):
        raise ConfigError("tuning on a package connects to nothing, so it reads no data from a hub: give a local file")
    no_core_files()
    use_threads(config.threads)
    wanted = config.signer_text()
    package = open_package(config.package, signer=None if wanted is None else Fingerprint.parse(wanted))
    if wanted is None:
        say(f"The package is signed by {package.signer}; --signer insists on it.")
    tokenizer = package.load_tokenizer()
    _, report = tune(package, load_data(config, tokenizer), config, tokenizer, listener, say)
    return report


def tune(
    package: Package,
    data: TrainingData,
    config: TuneConfig,
    tokenizer: Any,
    listener: RunListener | None = None,
    say: Callable[[str], None] = note,
) -> tuple[Any, Report]:
    """The same on data that are read already.

    Returns:
        The edge's model over the emulator with what was trained, and the report.

    Raises:
        IsthmusError: See `run_tuning`.
    """
    if package.bridge_file.exists():
        say(f"Using your own bridge: {package.bridge_file}")
    model = package.load_model().to(device_of(config.device))
    config, taken = _as_advised(config, package, model)
    if taken:
        say(f"Settings advised by the package: {taken}")
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
        return tuned, trainer.fit().report


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
    advised: dict[str, Any] = {"layers": tuning.layers, "steps": tuning.steps, "warmup_steps": tuning.warmup_steps}
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
    if not package.manifest.refuses_below:
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
    edge = cacheable_edge(tuned)
    folder = config.out / KEPT
    store: SpanStore | None = None
    told = False

    def turned_away() -> None:
        nonlocal told
        if store is not None and not told and store.stats().full:
            told = True
            say("No room for further outputs of the emulator within --keep-outputs-gib: they are computed anew.")

    with ExitStack() as stack:
        if edge is not None:
            if config.keep_outputs_gib:
                of = json.dumps([package.id, data.fingerprint, config.precision, config.device]).encode()
                below = fingerprint(edge, edge.remote_layers.span)
                identity = hashlib.blake2b(of + below, digest_size=KEY_BYTES).digest()
                size = int(config.keep_outputs_gib * GIB)
                store = SpanStore(folder, identity, max_bytes=size, what="folder of kept outputs")
                stack.enter_context(store)
            stack.enter_context(KeptOutputs(edge, store, turned_away).in_place())
        yield
    if folder.exists():  # also what the run has kept before it was resumed with room for nothing
        remove_folder(folder)


def _parameters_run(emulator: Emulator) -> int:
    """Weights of the matrices that a forward of the emulator goes through; those of a shared layer count each time."""
    layers = getattr(emulator.base, family_of(emulator.config).layers)
    return sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.dim() == 2)
