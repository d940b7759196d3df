"""From a model's name to a checkpoint on this disk.

A name is a folder, a `.gguf` file, the identifier of a model on the Hugging Face hub, or the built-in `smollm2-135m`.
What has to be downloaded or converted is done once and kept in a cache: `$ISTHMUS_CACHE`, or `~/.cache/isthmus`.

A model of the hub may be pinned: `OWNER/NAME@REVISION`, a commit, tag or branch. Without that it is the newest, and a
line says which commit that is. Nothing that is fetched is run: the hub gives safetensors, JSON, text and templates, and
the package index one wheel, whose hash pip compares before it does anything else with it.

transformers is imported where it is used, because the command line imports this module.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from isthmus.backbone.checkpoints.built_in import BUILT_IN, fetch_built_in
from isthmus.backbone.checkpoints.gguf import convert_gguf
from isthmus.backbone.checkpoints.hub import COMMIT, is_hub_name, snapshot, split_name
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, ORIGIN_FILE, digest_of, read_json, write_json
from isthmus.backbone.families import family_named
from isthmus.common.errors import CheckpointError, UnknownModelError
from isthmus.common.files import disk_errors, locked, new_folder, sha256_of
from isthmus.common.ownership import check_contents, private_folder
from isthmus.common.readable import did_you_mean

MAX_LAYERS = 1024
"""Most decoder layers of a model; the deepest that are known have some 130."""

PARTS_FILE = "isthmus_parts.json"

_BESIDE_THE_WEIGHTS = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|"
    r"chat_template.*|.*\.jinja"
)

_WEIGHTS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors(\.index\.json)?")

SENSELESS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
"""What transformers and torch may raise of a configuration that makes no sense; they do not check all of it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with `config.json`, safetensors and tokenizer files: a whole model, or what `export_edge_parts` wrote.

    Attributes:
        name: How the model is called; never a path of this machine.
    """

    folder: Path
    name: str

    @property
    def config(self) -> Any:
        """The transformers configuration, read anew at each call.

        Raises:
            CheckpointError: `config.json` is missing or malformed.
            UnsupportedFamilyError: models of this type cannot be cut.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        path = self.folder / "config.json"
        values = read_json(path)
        count = values.get(family_named(values.get("model_type")).count)
        if isinstance(count, int) and count > MAX_LAYERS:  # transformers makes lists of that length
            raise CheckpointError(
                f"{path} names {str(count)[:20]} layers, more than the {MAX_LAYERS} of any model: fetch it again, or "
                "ask its owner"
            )
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except (*SENSELESS, OSError, StrictDataclassError) as error:
            raise CheckpointError(f"{path} does not make sense: {error}; fetch it again") from error

    @property
    def n_layers(self) -> int:
        """Number of decoder layers of the whole model. Loads no torch where `config.json` has it.

        Raises:
            CheckpointError: `config.json` is missing or malformed.
            UnsupportedFamilyError: models of this type cannot be cut.
        """
        values = read_json(self.folder / "config.json")
        count = values.get(family_named(values.get("model_type")).count)
        if type(count) is int and count > 0:
            return count
        n_layers: int = self.config.num_hidden_layers  # transformers knows what is left out, and says what is wrong
        return n_layers

    @property
    def is_edge_parts(self) -> bool:
        """Whether the folder holds an edge's parts rather than a whole model."""
        return (self.folder / EDGE_FILE).is_file()

    @property
    def revision(self) -> str | None:
        """The commit of the hub that the files are of; None where they are not from there, or nobody knows."""
        for name in (PARTS_FILE, ORIGIN_FILE):
            if (self.folder / name).is_file():
                known = read_json(self.folder / name).get("revision")
                return known if isinstance(known, str) and COMMIT.fullmatch(known) else None
        # The hub's library keeps a model's files in a folder with the commit's name.
        is_snapshot = self.folder.parent.name == "snapshots" and COMMIT.fullmatch(self.folder.name)
        return self.folder.name if is_snapshot else None

    def digest(self) -> str:
        """SHA-256 (hex) of the whole model's configuration and tensors. Files are hashed once in a process.

        An edge's parts carry the digest of the model that they were cut from.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        if self.is_edge_parts:
            return str(read_json(self.folder / PARTS_FILE).get("digest", ""))
        return digest_of(self.folder)


def is_part(name: str) -> bool:
    """Whether a file of this name belongs to an edge's parts: weights, configuration, tokenizer, and where from."""
    return name in (EDGE_FILE, PARTS_FILE) or _is_beside_the_weights(name)


def is_model_file(name: str) -> bool:
    """Whether a file of this name belongs to a whole model: weights and their index, configuration, tokenizer."""
    return name == ORIGIN_FILE or _WEIGHTS.fullmatch(name) is not None or _is_beside_the_weights(name)


def _is_beside_the_weights(name: str) -> bool:
    return _BESIDE_THE_WEIGHTS.fullmatch(name) is not None and not name.endswith(".py")  # a folder brings no code


def files_beside_the_weights(folder: Path) -> tuple[Path, ...]:
    """The configuration and the tokenizer's files of a checkpoint, by name."""
    return tuple(file for file in sorted(folder.iterdir()) if file.is_file() and _is_beside_the_weights(file.name))


def default_cache() -> Path:
    """Where converted and downloaded models are kept."""
    configured = os.environ.get("ISTHMUS_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "isthmus"


def resolve(model: str, *, cache_dir: Path | None = None, console: Console | None = None) -> Checkpoint:
    """Find a model's checkpoint; download or convert it where that is needed.

    Args:
        model: A folder, a `.gguf` file, a hub identifier such as `Qwen/Qwen3-0.6B`, one with a revision such as
            `Qwen/Qwen3-0.6B@c1899de2…`, or `smollm2-135m`.

    Raises:
        CheckpointError: the model was found, but is damaged or not in a form that can be used.
        DiskError: the cache cannot be written.
        OwnershipError: another user of the machine may write to the cache.
        UnknownModelError: nothing was found under this name.
    """
    cache = default_cache() if cache_dir is None else cache_dir
    shown = Console(stderr=True) if console is None else console
    if model == BUILT_IN:
        return Checkpoint(_once(cache / BUILT_IN, lambda folder: fetch_built_in(folder, shown)), BUILT_IN)
    check_name(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return Checkpoint(path.resolve(), path.resolve().name)
    if path.is_file():
        return _gguf(path, cache, shown)
    try:
        return _hub(model, shown)
    except UnknownModelError as error:
        meant = _meant(model)
        if meant is None:
            raise
        raise UnknownModelError(f"{error}; {meant}") from error


def check_name(model: str) -> None:
    """Refuse what is no model by its name alone, see `resolve`. Nothing is fetched. Raises UnknownModelError."""
    path = Path(model).expanduser()
    if model == BUILT_IN:
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownModelError(f"{model} has no config.json; name a folder that save_pretrained wrote")
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnknownModelError(f"{model} is neither a folder nor a .gguf file; name the folder of the checkpoint")
    elif (
        not is_hub_name(model)
        or path.suffix.lower() == ".gguf"
        or ("/" not in model and did_you_mean(model, [BUILT_IN]))
    ):
        remedy = _meant(model) or f"name a folder, a .gguf file, a hub model or {BUILT_IN}"
        raise UnknownModelError(f"{model!r} does not exist; {remedy}")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint (a `PreTrainedTokenizerBase`), with a padding token.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(f"{folder} has no tokenizer; copy the model's tokenizer files there")
    try:
        # Without an answer here, transformers asks at the terminal whether to run code that the folder or the hub has.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a stranger's files, and the tokenizers' own errors are of no class of their own
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"cannot read the tokenizer in {folder}: {reason}; fetch the checkpoint again") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _meant(model: str) -> str | None:
    """A question for whoever mistyped a name that is known here."""
    return did_you_mean(model, [BUILT_IN, *_models_beside(Path(model).expanduser())])


def _models_beside(path: Path) -> list[str]:
    """The folders and files of models that lie where this path would."""
    with contextlib.suppress(OSError, ValueError):
        files = [*path.parent.glob("*.gguf"), *(each.parent for each in path.parent.glob("*/config.json"))]
        return [str(path.with_name(each.name)) for each in files]
    return []


def _gguf(file: Path, cache: Path, console: Console) -> Checkpoint:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is no GGUF file; fetch it again")
    with console.status(f"Reading {file.name}"):
        digest = sha256_of(file).hex()

    def fill(folder: Path) -> None:
        convert_gguf(file, folder, console)
        write_json(folder / ORIGIN_FILE, {"model": file.stem, "from": "file", "source": file.name, "sha256": digest})

    return Checkpoint(_once(cache / f"gguf-{digest[:16]}", fill), file.stem)


def _hub(model: str, console: Console) -> Checkpoint:
    folder = snapshot(model, console)
    if not (folder / "config.json").is_file():
        raise UnknownModelError(f"{model} on the hub has no config.json; name a causal language model of transformers")
    checkpoint = Checkpoint(folder, split_name(model)[0])
    commit = checkpoint.revision
    if commit is not None and not model.endswith(f"@{commit}"):
        console.print(
            f"{model} is commit {commit} of the hub; name it {checkpoint.name}@{commit} to have the same again",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    return checkpoint


def _once(target: Path, fill: Callable[[Path], None]) -> Path:
    """`target`, filled by `fill` unless it is there; never half-written, and by one process at a time."""
    with disk_errors(target):
        private_folder(target.parent)
    with locked(target):
        if (target / "config.json").is_file():
            with disk_errors(target):
                check_contents(target)
        else:
            # For this user alone: whatever modes `fill` gives the files, nobody else comes as far as them.
            with new_folder(target, 0o700) as folder:
                fill(folder)
    return target
