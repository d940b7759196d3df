"""A hub of tokenizers, since Tinker's SDK asks the hub for a model's tokenizer by name.

A client sets `HF_ENDPOINT` to this daemon's address with `/hub` behind it, and `HF_TOKEN` to a token for it alone
(`isthmus.daemon.tokens.HUB`), which the hub's client sends as `Authorization: Bearer`. There is one revision of each
repository: its commit is the hash of its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from isthmus.daemon.state.tables import BaseModel
from isthmus.daemon.web.context import Asker, Context, Here

hub = APIRouter(prefix="/hub")

_LLAMA_3 = "meta-llama/Llama-3"
_LLAMA_3_TOKENIZER = "thinkingmachineslabinc/meta-llama-3-instruct-tokenizer"  # what the SDK asks for instead


@hub.get("/api/models/{repository:path}")
async def model(repository: str, here: Here, _owner: Asker) -> Response:
    """What a repository is, or the files of it (`…/tree/REVISION`)."""
    name, tree, rest = repository.partition("/tree/")
    name, _, revision = name.partition("/revision/")
    files = await _files(here, name)
    if files is None:
        return _missing("RepoNotFound")
    commit = _commit(files)
    if tree:
        folder = rest.partition("/")[2]
        if folder:
            return _missing("EntryNotFound")
        return JSONResponse(
            [{"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in files.items()]
        )
    if revision not in {"", "main", commit}:
        return _missing("RevisionNotFound")
    told: dict[str, Any] = {
        "id": name,
        "sha": commit,
        "private": False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": [{"rfilename": path} for path in files],
    }
    return JSONResponse(told, headers={"X-Repo-Commit": commit})


@hub.api_route("/{place:path}", methods=["GET", "HEAD"])
async def file(place: str, request: Request, here: Here, _owner: Asker) -> Response:
    """A file of a repository: `NAME/resolve/REVISION/PATH`."""
    name, _, rest = place.partition("/resolve/")
    revision, _, path = rest.partition("/")
    files = await _files(here, name)
    if files is None:
        return _missing("RepoNotFound")
    commit = _commit(files)
    if revision not in {"main", commit}:
        return _missing("RevisionNotFound")
    if path not in files:
        return _missing("EntryNotFound", commit)
    data = files[path]
    headers = {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"', "Content-Length": str(len(data))}
    body = b"" if request.method == "HEAD" else data
    return Response(body, media_type="application/octet-stream", headers=headers)


async def _files(here: Context, repository: str) -> Mapping[str, bytes] | None:
    """The files of the tokenizer that is known by a repository's name."""
    base = await run_in_threadpool(_base, here, repository)
    return None if base is None else await here.answers.tokenizer_files(base)


def _base(here: Context, repository: str) -> str | None:
    with here.database.reading() as session:
        names = session.scalars(select(BaseModel.name).order_by(BaseModel.name)).all()
    for name in names:
        if repository == name or repository in _asked_instead(name):
            return name
    return None


def _asked_instead(name: str) -> set[str]:
    """Names that the SDK makes of a model's name where it knows no better."""
    found = {name.split(":", maxsplit=1)[0]}
    if name.count("/") == 2:
        found.add(name.rpartition("/")[0])
    if name.startswith(_LLAMA_3):
        found.add(_LLAMA_3_TOKENIZER)
    return found


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _commit(files: Mapping[str, bytes]) -> str:
    """40 hexadecimal digits."""
    parts = "".join(f"{path}:{_etag(data)};" for path, data in sorted(files.items()))
    return hashlib.sha256(parts.encode()).hexdigest()[:40]


def _missing(code: str, commit: str | None = None) -> Response:
    headers = {"X-Error-Code": code}
    if commit is not None:
        headers["X-Repo-Commit"] = commit
    return Response(status_code=404, headers=headers)
