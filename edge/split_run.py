"""What the commands `train` and `eval` do: a link, the model, and the library's parts put together."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from isthmus.backbone.families import family_of
from isthmus.backbone.plan import SplitPlan
from isthmus.common.progress import StepProgress
from isthmus.common.torch_threads import use_threads
from isthmus.edge.audit.run_evidence import RunEvidence
from isthmus.edge.budget.leak_watch import BudgetWatch
from isthmus.edge.client.adapted_model import load_adapted
from isthmus.edge.client.link import Link
from isthmus.edge.cloud_link import cache_of, open_link, wire_of
from isthmus.edge.config.client_config import EvalConfig
from isthmus.edge.config.schedule import total_steps
from isthmus.edge.config.training_config import TrainConfig
from isthmus.edge.data.batches import Batches, load_data, load_examples
from isthmus.edge.process_setup import device_of
from isthmus.edge.run_files.run_identity import ModelIdentity
from isthmus.edge.run_report import Report, linear_parameters
from isthmus.edge.sites.live_sites import live_sites
from isthmus.edge.training.defended_run import defended_run
from isthmus.edge.training.draft_tuning import draft_tuning
from isthmus.edge.training.edge_steps import StepObserver
from isthmus.edge.training.evaluation import evaluate
from isthmus.edge.training.methods import build_peft, trained
from isthmus.edge.training.precision import hold_frozen_linears
from isthmus.edge.training.run_listener import RunListener
from isthmus.edge.training.trainer import Trainer


def run_training(config: TrainConfig) -> Report:
    """Train as the configuration says; the work of `isthmus edge train`.

    Raises:
        IsthmusError: of whatever kind fits; what was reached is in the newest checkpoint.
    """
    with open_link(config) as link:
        return train_over(link, config)


def train_over(
    link: Link,
    config: TrainConfig,
    watchers: Sequence[StepObserver] = (),
    listener: RunListener | None = None,
) -> Report:
    """Train over a link that is open already, with `watchers` around every step. Raises what `run_training` raises."""
    use_threads(config.threads)
    info = link.info
    tokenizer = link.load_tokenizer()
    data = load_data(config, tokenizer)
    if config.plugged:
        config = config.model_copy(update={"start_from": link.plugged_adapter()})
    total = total_steps(config, len(data.train))
    progress = StepProgress("step", total, every=config.log_every)
    with wire_of(link, config) as wire:
        model = wire.load_model(config)
        tuned = build_peft(model, config, total_steps=total)
        hold_frozen_linears(tuned, config)
        identity = ModelIdentity(info.model, info.digest, info.plan, info.span_dtype, info.attn_implementation)
        # Sites first: codecs are chosen for those of the coming step.
        observers = (
            live_sites(model, config, total, progress.message),
            wire.auto_codec(config, tuned, list(trained(tuned).values()), data, progress.message),
            *watchers,
        )
        evidence = RunEvidence(wire.links, config, progress.message)
        with (
            cache_of(link, config, tuned),
            contextlib.closing(evidence),
            defended_run(model, tuned, config, identity, data, tokenizer, progress.message) as defended,
        ):
            leak = None
            if config.budgeted:
                leak = BudgetWatch(model, tuned, config, data, tokenizer, defended, progress.message)
            trainer = Trainer(
                tuned,
                data,
                config,
                identity,
                meter=wire.meter,
                codec=config.codec,
                span_parameters=_span_parameters(model, link.plan),
                cloud_peak=link.cloud_peak_bytes,
                progress=progress,
                step_observers=[observer for observer in observers if observer is not None],
                in_flight=wire.in_flight,
                draft=draft_tuning(model, config, link.pin),
                listener=listener,
                defended=defended,
                evidence=evidence,
                leak=leak,
            )
            wire.watch(trainer.check_stop)
            return trainer.fit().report


def run_evaluation(config: EvalConfig, adapter: Path | None) -> dict[str, Any]:
    """The loss on all of the configuration's data; the work of `isthmus edge eval`."""
    with open_link(config) as link:
        return evaluate_over(link, config, adapter)


def evaluate_over(
    link: Link, config: EvalConfig, adapter: Path | None, between: Callable[[int, int], None] = lambda done, all: None
) -> dict[str, Any]:
    """Evaluate over a link that is open already; `between` is called with the batches that are done, and all of them.

    Raises what `run_evaluation` raises.
    """
    use_threads(config.threads)
    data = load_examples(config, link.load_tokenizer())
    model = load_adapted(link, adapter, plugged=config.plugged).to(device_of(config.device))
    batches = Batches(data.train, config.batch, data.pad_id)
    done = itertools.count(1)
    loss = evaluate(model, batches, lambda: between(next(done), len(batches)), precision=config.precision)
    totals = dataclasses.asdict(link.totals())
    return {"loss": loss, "examples": len(data.train), "dropped_examples": data.dropped, "strip": totals}


def _span_parameters(model: Any, plan: SplitPlan) -> int:
    """Weights of linear layers in the cloud's span, by the architecture alone: there are no weights of it here."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(model.config)
    layers: Any = whole.get_submodule(family_of(model.config).layers_path)
    return sum(linear_parameters(layers[index]) for index in plan.cloud)
