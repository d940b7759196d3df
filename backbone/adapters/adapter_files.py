"""Adapters on disk: what training leaves in a folder, and how it gets into a model, split or whole.

A folder is one of three kinds. The file that describes it says which:

    adapter_config.json     a standard PEFT folder; weights in adapter_model.safetensors
    isthmus_adapter.json    bottleneck adapters or tuned biases, which PEFT has not; weights under the same name
    isthmus_edge.json       the edge's own layers, tuned; weights in model.safetensors

All name what they hold as the whole model does, so an adapter made on the edge's part of a model, or on an emulator of
the rest, loads into the full model key for key. `isthmus_tuning.json` beside them says in which run it was made.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from isthmus.backbone.adapters.custom_adapters import (
    ADAPTER_WEIGHTS,
    CUSTOM_INFO,
    check_names,
    load_custom,
    read_custom,
    require_files,
    save_custom,
)
from isthmus.backbone.adapters.layer_adapters import decoder_layers
from isthmus.backbone.checkpoints.tensor_reader import TensorReader, read_json, write_json
from isthmus.backbone.split.edge_weights import EDGE_WEIGHTS_INFO, load_edge_weights
from isthmus.common.errors import CheckpointError
from isthmus.common.files import new_folder, sha256_of

if TYPE_CHECKING:
    from isthmus.backbone.split.edge_weights import EdgeOrigin

PEFT_INFO = "adapter_config.json"
TUNING_INFO = "isthmus_tuning.json"

_PEFT_METHODS = {"LORA": "lora", "IA3": "ia3", "VERA": "vera", "ADALORA": "adalora", "PROMPT_TUNING": "prompt"}


def unfreeze_layers(model: Any, layers: Sequence[int]) -> None:
    """Make whole decoder layers trainable, and nothing else.

    Raises:
        ConfigError: The model has no list of decoder layers.
    """
    _, stack = decoder_layers(model)
    model.requires_grad_(False)
    for index in layers:
        stack[index].requires_grad_(True)


# Saving ---------------------------------------------------------------------------------------------------------------


def save_adapter(model: Any, folder: Path, *, record: Mapping[str, Any] | None = None) -> None:
    """Write what was trained as one of the three kinds of folder, whole or not at all.

    A split model's adapter names the model as the cloud serves it, not the folder that the edge's parts lie in. A whole
    model whose layers were tuned plainly is saved as transformers does.

    Args:
        model: What `isthmus.edge.training.methods.build_peft` or `load_adapter` returned.
        folder: Where to write; an older one is replaced.
        record: What `isthmus_tuning.json` shall say; without it there is none.

    Raises:
        DiskError: The disk is full or cannot be written.
    """
    with new_folder(folder) as temporary:
        if _is_peft(model):
            _save_peft(model, temporary)
        elif hasattr(model, "isthmus_adapter"):
            save_custom(model, temporary, digest=_digest_of(model))
        else:
            model.save_pretrained(str(temporary))
        if record is not None:
            write_json(temporary / TUNING_INFO, dict(record))


def _is_peft(model: Any) -> bool:
    import peft

    return isinstance(model, peft.PeftModel)


def _save_peft(model: Any, folder: Path) -> None:
    origin: EdgeOrigin | None = getattr(model.get_base_model(), "isthmus_origin", None)
    if origin is not None:
        for settings in model.peft_config.values():
            settings.base_model_name_or_path = origin.checkpoint.name
            settings.revision = origin.checkpoint.revision
    with without_known_warnings(), _without_dead_sites(model) as state:
        # PEFT would otherwise ask the hub whether the base model's embedding has grown.
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=state)


@contextmanager
def _without_dead_sites(model: Any) -> Iterator[dict[str, Any] | None]:
    """The state to save where some sites are switched off: what they have learned is no part of the model.

    Meanwhile PEFT's configurations name the modules that are left. None where all of it is to be saved.
    """
    base = model.get_base_model()
    remote = None if getattr(base, "isthmus_origin", None) is None else base.remote_layers
    live = None if remote is None or remote.lend_dead else remote.live_sites
    dead = () if live is None else tuple(site.name for site in base.find_sites() if site.name not in live)
    if not dead:
        yield None
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    left = {
        name for name, module in base.named_modules() if isinstance(module, BaseTunerLayer) and name not in set(dead)
    }
    before = {adapter: settings.target_modules for adapter, settings in model.peft_config.items()}
    try:
        for settings in model.peft_config.values():
            settings.target_modules = left
        yield {
            name: value
            for name, value in model.state_dict().items()
            if not any(f".{site}." in f".{name}" for site in dead)
        }
    finally:
        for adapter, settings in model.peft_config.items():
            settings.target_modules = before[adapter]


def _digest_of(model: Any) -> str | None:
    """The digest of the model that a split one was cut from; None for a whole model, or if its checkpoint is gone."""
    origin: EdgeOrigin | None = getattr(model, "isthmus_origin", None)
    try:
        return None if origin is None else origin.checkpoint.digest()
    except CheckpointError:
        return None  # what was learned must not be lost with it


# Loading --------------------------------------------------------------------------------------------------------------


def load_adapter(model: Any, folder: Path, *, trainable: bool = False, digest: str | None = None) -> Any:
    """Put what `save_adapter` wrote into a model, to evaluate it, to generate, or to train on.

    Names, shapes, and the digest of the model that it was made on, where both are known, must fit. Afterwards the
    adapter is the one thing in the model that is trainable, or, without `trainable`, nothing is.

    Args:
        digest: The model's digest (`Checkpoint.digest`); a split model knows its own.

    Returns:
        A `PeftModel`, in eval mode unless it is trainable, or `model` itself, changed in place.

    Raises:
        CheckpointError: The folder is of no such kind, is damaged, or holds something that has no place in this model.
    """
    _check_same_model(model, folder, digest)
    if (folder / EDGE_WEIGHTS_INFO).is_file():
        load_edge_weights(model, folder)
        model.requires_grad_(False)
        if trainable:
            unfreeze_layers(model, _layers_in(model, folder))
        return model
    if (folder / CUSTOM_INFO).is_file():
        return load_custom(model, folder, trainable=trainable)
    return _load_peft(model, folder, trainable=trainable)


def adapter_method(folder: Path) -> str:
    """The method that the adapter in `folder` was made with, as `--method` names it.

    Raises:
        CheckpointError: The folder holds no adapter, or its description is damaged.
    """
    if (folder / EDGE_WEIGHTS_INFO).is_file():
        return "full"
    if (folder / CUSTOM_INFO).is_file():
        return read_custom(folder).method
    require_files(folder, PEFT_INFO)
    settings = read_json(folder / PEFT_INFO)
    kind = str(settings.get("peft_type"))
    method = _PEFT_METHODS.get(kind, kind.lower())
    return "dora" if method == "lora" and settings.get("use_dora") else method


def adapter_digest(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of an adapter's files.

    Raises:
        CheckpointError: A file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            if path.suffix in {".json", ".safetensors"}:
                digest.update(f"{path.name} {sha256_of(path).hex()}\n".encode())
    except OSError as error:
        raise CheckpointError(f"cannot read {folder} ({error.strerror}): give a folder that training wrote.") from error
    return digest.hexdigest()


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Without warnings of PEFT's own making, which the user can do nothing about."""
    from peft.utils.warning import PeftWarning

    with warnings.catch_warnings():
        # It asks transformers under a name that transformers is about to drop.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # It writes AdaLoRA's ranks under the names of parameters and looks for modules when it reads them.
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
        # AdaLoRA may leave a module without any rank, which PEFT takes for weights that were not gathered.
        warnings.filterwarnings("ignore", ".*LoRA tensor.s. have invalid shape", PeftWarning)
        yield


def _check_same_model(model: Any, folder: Path, digest: str | None) -> None:
    """Names and shapes fit any model of the architecture, so an adapter is also held to the model it was made on."""
    ours = digest or _digest_of(model)
    for name in (EDGE_WEIGHTS_INFO, CUSTOM_INFO, TUNING_INFO):
        theirs = str(read_json(folder / name).get("digest", "")) if (folder / name).is_file() else ""
        if ours and theirs and theirs != ours:
            raise CheckpointError(
                f"{folder} was tuned on a model with the digest {theirs[:16]}, but this model's is {ours[:16]}: "
                "load it into the model that it was tuned on."
            )


def _layers_in(model: Any, folder: Path) -> list[int]:
    """The decoder layers that a folder of tuned layers holds."""
    path, _ = decoder_layers(model)
    place = re.compile(rf"{re.escape(path)}\.(\d+)\.")
    return sorted({int(match[1]) for name in TensorReader(folder) if (match := place.match(name))})


def _load_peft(model: Any, folder: Path, *, trainable: bool) -> Any:
    import peft

    # PEFT would look on the hub for what is not here, and read a pickle where there are no safetensors.
    require_files(folder, PEFT_INFO, ADAPTER_WEIGHTS)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as stored:
            names = set(stored.keys())
        with without_known_warnings():
            is_prompt = read_json(folder / PEFT_INFO).get("peft_type") == "PROMPT_TUNING"
            loaded = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable and not is_prompt)
            places = set(peft.get_peft_model_state_dict(loaded, save_embedding_layers=False))
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} does not fit this model, or is damaged ({reason[:300]}).") from error
    # PEFT passes over what it finds no place for, and leaves at its start what it does not find.
    check_names(folder, names, places)
    if trainable and is_prompt:  # PEFT loads a learned prompt for reading only
        loaded.prompt_encoder.requires_grad_(True)
        loaded.active_peft_config.inference_mode = False
    return loaded
