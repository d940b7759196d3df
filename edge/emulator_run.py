"""What the command `emulator tune` does: training on a package, with no connection at all.

The emulator stands where the cloud's layers would; everything else is the training of `edge train`. Nothing here
imports what could open a connection.
"""

from __future__ import annotations

from rich.console import Console

from isthmus.backbone.families import family_of
from isthmus.common.errors import ConfigError
from isthmus.common.torch_threads import use_threads
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TuneConfig
from isthmus.edge.data.batches import load_data
from isthmus.edge.process_setup import device_of, no_core_files
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.run_report import Report
from isthmus.edge.training.methods import build_peft
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.edge.training.run_listener import RunListener
from isthmus.edge.training.trainer import Trainer
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.package.package import open_package
from isthmus.protocol.secure.keys import Fingerprint


def run_tuning(config: TuneConfig, listener: RunListener | None = None) -> Report:
    """Train on a package as the configuration says; the work of `isthmus emulator tune`.

    The adapter's folder says which package it was tuned on (`isthmus_tuning.json`).

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
        console = Console(stderr=True, highlight=False)
        console.print(f"The package is signed by {package.signer}; --signer insists on it.", soft_wrap=True)
    data = load_data(config, package.load_tokenizer())
    model = package.load_model().to(device_of(config.device))
    tuned = build_peft(model, config, total_steps=total_steps(config, len(data.train)))
    hold_frozen_linears(tuned, config)
    trainer = Trainer(
        tuned,
        data,
        config,
        ModelIdentity(
            f"{package.model} emulator {package.id[:16]}",
            package.digest,
            str(package.plan),
            attn_implementation=package.manifest.attn_implementation,
            package=package.id,
        ),
        emulator_parameters=_parameters_run(model.remote_layers.span),
        listener=listener,
    )
    return trainer.fit().report


def _parameters_run(emulator: Emulator) -> int:
    """Weights of the matrices that a forward of the emulator goes through; those of a shared layer count each time."""
    layers = getattr(emulator.base, family_of(emulator.config).layers)
    return sum(weight.numel() for layer in layers for weight in layer.parameters() if weight.dim() == 2)
