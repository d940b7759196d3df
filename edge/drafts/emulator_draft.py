"""Drafts by an emulator, the lossy stand-in for the cloud's layers that a model's owner hands out."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from isthmus.common.errors import PackageError
from isthmus.edge.drafts.length_rule import LengthRule
from isthmus.edge.drafts.model_draft import ModelDraft
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.package.package import open_package
from isthmus.emulator.package.verification import check_package_fits
from isthmus.protocol.secure.keys import Fingerprint


class EmulatorDraft(ModelDraft):
    """What the edge's own layers would write around an emulator; see `ModelDraft`."""

    @classmethod
    def open(
        cls,
        folder: Path,
        model: Any = None,
        *,
        signer: Fingerprint | None = None,
        rule: LengthRule | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> Self:
        """A draft of an emulator package.

        Args:
            folder: The package.
            model: The split model to draft for, or a PEFT model around it. The draft shares its weights: embedding,
                head, the edge's layers and adapters on these as they are at any time. Adapters that are added later are
                not in the draft. None for the weights that the package has.
            signer: Fingerprint of the root key that must have certified the package's signer; None for any.
            rule: How long a draft is; None for one that adapts.
            clock: Returns seconds.

        Raises:
            CheckpointError: A file of the package is damaged.
            PackageError: The folder is no package, was changed, or was made of another model or for another plan.
            SignerError: It is not signed, or by somebody else.
        """
        package = open_package(folder, signer=signer)
        if model is None:
            return cls(package.load_model(), rule, clock)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        check_package_fits(package.manifest, base.isthmus_origin.checkpoint)
        if package.plan != base.split_plan:
            raise PackageError(
                f"the package is for the plan {package.plan}, and the model is cut by {base.split_plan}: open it "
                "without a model, or get one for this plan"
            )
        return cls(around_emulator(base, package.load_emulator()), rule, clock)


def around_emulator(model: Any, emulator: Emulator) -> Any:
    """A copy of the edge's model over an emulator, in eval mode; it shares all weights with the model.

    Args:
        model: The edge's model, with PEFT's layers in it or without.
        emulator: Of its middle. It is brought to the model's dtype and device.
    """
    shared: dict[int, Any] = {id(each): each for each in itertools.chain(model.parameters(), model.buffers())}
    copied = copy.deepcopy(model, shared)
    copied.isthmus_draft = None
    copied.remote_layers.span = emulator.to(device=model.device, dtype=model.dtype)
    return copied.eval()
