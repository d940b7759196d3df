"""Models of the Hugging Face hub: their names, their revisions, and where the hub's own cache has their files."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console

from isthmus.common.errors import UnknownModelError

COMMIT = re.compile(r"[0-9a-f]{40}")

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.txt", "*.jinja"]
_TIMEOUT_S = 2.0
_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*|[A-Za-z0-9][\w-]*)(?:@([A-Za-z0-9][\w./-]{0,199}))?")


def is_hub_name(model: str) -> bool:
    """Whether this may be a hub model's name, with or without a revision."""
    return _NAME.fullmatch(model) is not None


def split_name(model: str) -> tuple[str, str | None]:
    """A hub model's name and its revision, None for the newest."""
    parts = _NAME.fullmatch(model)
    return (model, None) if parts is None else (parts[1], parts[2])


def snapshot(model: str, console: Console) -> Path:
    """The folder of a hub model in the hub's own cache.

    Raises:
        UnknownModelError: the hub cannot be reached or does not give the model, and its cache does not hold it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        DisabledRepoError,
        HFValidationError,
        HTTPError,  # of the HTTP client that this version of the library uses
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, wanted = split_name(model)
    unreachable: Exception | None = None
    try:
        # One short look first: the download's own retries would keep a machine without a hub waiting for minutes.
        revision = HfApi().model_info(name, revision=wanted, timeout=_TIMEOUT_S).sha
    except RevisionNotFoundError as error:
        raise UnknownModelError(f"the hub has no revision {wanted} of {name}; name a commit, tag or branch") from error
    except (RepositoryNotFoundError, DisabledRepoError) as error:
        raise UnknownModelError(
            f"the hub does not give {model} ({_first_line(error)}); check the name and the login"
        ) from error
    except HFValidationError as error:
        raise UnknownModelError(f"{model!r} is no name of a hub model; use OWNER/NAME") from error
    except (HTTPError, OSError) as error:
        revision, unreachable = None, error
    try:
        if revision is None:
            return Path(snapshot_download(name, revision=wanted, allow_patterns=_FILES, local_files_only=True))
        with console.status(f"Downloading {model} from the hub"):
            return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except LocalEntryNotFoundError as error:
        raise UnknownModelError(
            f"{model} is neither a folder nor in the hub's cache, and the hub cannot be reached "
            f"({_first_line(unreachable or error)}); "
            "check the name, or connect once"
        ) from error
    except HTTPError as error:
        raise UnknownModelError(f"downloading {model} failed ({_first_line(error)}); try again") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
