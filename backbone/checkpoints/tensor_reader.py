"""The tensors of a checkpoint on disk: read one by one by name, from one safetensors file or many."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from isthmus.common.errors import CheckpointError
from isthmus.common.files import sha256_of

if TYPE_CHECKING:
    import torch

EDGE_FILE = "edge.safetensors"
ORIGIN_FILE = "isthmus_origin.json"
"""Where a model came from that was downloaded or converted."""
SPAN_FILE = "span.safetensors"
WHOLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch the checkpoint again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` to `path`, indented, keys in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def tensor_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the checkpoint in `folder`: a whole model's, an edge's parts', or a span's.

    Raises:
        CheckpointError: there is none, or the index names a file outside the folder.
    """
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map; fetch the checkpoint again")
        names = sorted({str(name) for name in weight_map.values()})
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{folder / INDEX_FILE} names files outside its folder; fetch the checkpoint again")
        return tuple(folder / name for name in names)
    for name in (WHOLE_FILE, EDGE_FILE, SPAN_FILE):
        if (folder / name).is_file():
            return (folder / name,)
    raise CheckpointError(f"{folder} has no {WHOLE_FILE}; save the model as safetensors (save_pretrained does)")


class TensorReader:
    """Reads single tensors by name; nothing else of the files reaches memory.

    A name may lack the prefix of the base model (old GPT-2 and OPT checkpoints have `h.0…` for `transformer.h.0…`).

    Args:
        prefix: The prefix that may be missing, such as `"transformer."`.

    Raises:
        CheckpointError: a file is missing, truncated, or no safetensors.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        self._folder = folder
        self._prefix = prefix
        self._handles: dict[str, Any] = {}
        for path in tensor_files(folder):
            try:
                handle: Any = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged ({error}); fetch the checkpoint again") from error
            self._handles.update(dict.fromkeys(handle.keys(), handle))

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def _stored_name(self, name: str) -> str | None:
        for candidate in (name, name.removeprefix(self._prefix)):
            if candidate in self._handles:
                return candidate
        return None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._stored_name(name) is not None

    def view(self, name: str) -> torch.Tensor:
        """The stored tensor, in its stored dtype; its memory may be the mapped file.

        Raises:
            CheckpointError: there is no such tensor.
        """
        stored = self._stored_name(name)
        if stored is None:
            raise CheckpointError(
                f"{self._folder} has no tensor {name}; the checkpoint is incomplete or of another model"
            )
        tensor: torch.Tensor = self._handles[stored].get_tensor(stored)
        return tensor

    def read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A copy of the stored tensor in memory of its own.

        Raises:
            CheckpointError: there is no such tensor, or it has another shape.
        """
        view = self.view(name)
        if view.shape != shape:
            raise CheckpointError(
                f"tensor {name} in {self._folder} has shape {list(view.shape)}, but config.json asks for "
                f"{list(shape)}; the two belong to different models"
            )
        return view.to(dtype if view.is_floating_point() else view.dtype, copy=True)


def digest_of(folder: Path) -> str:
    """SHA-256 (hex) over a checkpoint's configuration and the contents of its tensor files.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    config = read_json(folder / "config.json")
    for volatile in ("transformers_version", "_name_or_path"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in tensor_files(folder):
        try:
            stat = path.stat()
            content = _file_digest(path, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}; fetch the checkpoint again") from error
        digest.update(f"\n{path.name} {content}".encode())
    return digest.hexdigest()


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, _size: int, _mtime_ns: int) -> str:
    """Size and time are in the key, so that a file is hashed once and again after a change."""
    return sha256_of(path).hex()
