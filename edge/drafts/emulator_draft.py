"""Drafts by the edge's layers around an emulator, the lossy stand-in for the cloud's layers from a model's owner."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from isthmus.common.errors import PackageError
from isthmus.edge.drafts.length_rule import LengthRule
from isthmus.edge.drafts.model_draft import ModelDraft
from isthmus.edge.drafts.tuned_draft import load_tuned
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.package.package import Package, open_package
from isthmus.emulator.package.verification import check_package_fits
from isthmus.protocol.secure.keys import Fingerprint


class EmulatorDraft(ModelDraft):
    """Drafts what the edge's layers generate around an emulator instead of the cloud; see `ModelDraft`."""

    @classmethod
    def open(
        cls,
        folder: Path,
        model: Any = None,
        *,
        signer: Fingerprint | None = None,
        rule: LengthRule | None = None,
        clock: Callable[[], float] = time.perf_counter,
        tuned: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Make a draft from an emulator package.

        Args:
            folder: The package.
            model: The split model to draft for, or a PEFT model around it. The draft shares the weights of its
                embedding, head, edge layers and their adapters, so it follows their training. Adapters that are added
                later are not in the draft. None for the weights in the package.
            signer: Fingerprint of the root key that must have certified the package's signer; None for any.
            rule: Decides how long a draft is; None for `AdaptiveLength`.
            clock: Returns seconds.
            tuned: File of a tuned draft, whose weights the emulator gets; None for the package's own.
            dtype: Floating-point dtype of the draft; None for the model's. With another one, the draft has its own copy
                of the weights and adapters as they are now. In bf16 a token takes half of the time on a CPU.

        Raises:
            CheckpointError: A file of the package or the tuned draft is damaged.
            PackageError: The folder is no package, was changed, or was made of another model or for another plan; or
                the draft was tuned from another package.
            SignerError: The package is not signed, or by somebody else.
        """
        if model is None:
            package = open_package(folder, signer=signer)
            base = package.load_model()
            # A draft that was tuned was tuned without the data owner's bridge.
            emulator = base.remote_layers.span if tuned is None else package.load_emulator()
        else:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            package = open_package_for(base, folder, signer=signer)
            emulator = package.load_emulator()
        if tuned is not None:
            load_tuned(tuned, emulator, package.id)
        drafting = around_emulator(base, emulator, dtype=dtype)
        return cls(drafting, rule, clock)


def open_package_for(model: Any, folder: Path, *, signer: Fingerprint | None = None) -> Package:
    """Open a package that was made of this split model, for the same plan.

    Args:
        model: The edge's model.
        signer: As for `EmulatorDraft.open`.

    Raises:
        PackageError: The folder is no package, was changed, or was made of another model or for another plan.
        SignerError: The package is not signed, or by somebody else.
    """
    package = open_package(folder, signer=signer)
    check_package_fits(package.manifest, model.isthmus_origin.checkpoint)
    if package.plan != model.split_plan:
        raise PackageError(
            f"the package is for the plan {package.plan}, and the model is cut by {model.split_plan}: open it "
            "without a model, or get one for this plan"
        )
    return package


def around_emulator(model: Any, emulator: Emulator, *, dtype: torch.dtype | None = None, frozen: bool = False) -> Any:
    """A copy of the edge's model with an emulator in place of the cloud, in eval mode.

    It has no adapters inside the cloud's layers, for which an emulator has no places.

    Args:
        model: The edge's model, with PEFT's layers in it or without.
        emulator: Stands for the cloud's layers. It is moved to the model's device and the copy's dtype.
        dtype: Of the copy. None or the model's for one that shares all weights with the model; with another one it has
            its own, adapters as they are now.
        frozen: Whether a copy that shares the model's weights has them frozen: then its parameters are others, over the
            same memory. It sees updates in place, and no `.data` that is replaced.
    """
    memo: dict[int, Any] = {id(each): each for each in model.buffers()}  # not cast: positions are computed in fp32
    dtype = dtype or model.dtype
    for each in model.parameters():
        if dtype != model.dtype:
            memo[id(each)] = nn.Parameter(each.detach().to(dtype), requires_grad=False)
        elif frozen and each.requires_grad:
            memo[id(each)] = nn.Parameter(each.detach(), requires_grad=False)
        else:
            memo[id(each)] = each
    copied = copy.deepcopy(model, memo)
    copied.isthmus_draft = None
    copied.remote_layers.live_sites = frozenset()
    copied.remote_layers.lend_dead = False
    copied.remote_layers.span = emulator.to(device=model.device, dtype=dtype)  # in place: only this draft holds it
    return copied.eval()
