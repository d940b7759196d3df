"""The page at `/` with its files, which need no token, and what the page shows of the traffic."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Annotated, Any
from zipfile import ZipFile, ZipInfo

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field, ValidationError

from isthmus.common.errors import IsthmusError
from isthmus.daemon.page.crossed import Reached, crossed
from isthmus.daemon.page.static_files import HEADERS, INDEX, StaticFile, is_unchanged, read_static_files
from isthmus.daemon.state.tables import Model, Owner, StoredFile
from isthmus.daemon.tokens import CODE_SECONDS, read_token
from isthmus.daemon.web.access import SIGN_IN
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.bounded_body import BoundedBody
from isthmus.daemon.web.context import Asker, Context, Here
from isthmus.edge.config.config_text import one_line
from isthmus.edge.config.data_config import ExamplesConfig
from isthmus.edge.data.readers import each_example

LOOK_BYTES = 1 << 16
"""Of a file, where one looks at its first examples; and of these, so many at most."""
LOOK_EXAMPLES = 3


def router() -> APIRouter:
    """The routes of the page."""
    files = read_static_files()
    routes = APIRouter()

    @routes.get("/")
    async def page(request: Request) -> Response:
        return _answer(files[INDEX], request)

    @routes.get("/static/{name}")
    async def static(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name!r}", code="not_found")
        return _answer(files[name], request)

    routes.get("/isthmus/v1/traffic")(traffic)
    routes.post(SIGN_IN)(sign_in)
    routes.post("/isthmus/v1/look")(look)
    routes.get("/isthmus/v1/adapters/{name:path}")(adapter)
    return routes


class SignIn(BoundedBody):
    """A code to sign in with."""

    code: Annotated[str, Field(max_length=64)]


async def sign_in(here: Here, wanted: SignIn) -> JSONResponse:
    """The first owner's token, for the code that the start of the daemon has printed."""
    if not here.sign_in.take(wanted.code):
        raise ApiError(
            403,
            f"this link was used already, or is older than {CODE_SECONDS / 60:.0f} minutes: paste the token instead",
            code="used_code",
        )
    return JSONResponse({"token": read_token(here.home.token)}, headers={"cache-control": "no-store"})


class Look(BoundedBody):
    """A file to look at: the id of an uploaded one, or the name and the beginning of another."""

    file: Annotated[str | None, Field(max_length=64)] = None
    name: Annotated[str, Field(max_length=256)] = ""
    text: Annotated[str, Field(max_length=LOOK_BYTES)] = ""
    prompt_template: Annotated[str | None, Field(max_length=LOOK_BYTES)] = None
    completion_template: Annotated[str | None, Field(max_length=LOOK_BYTES)] = None


def look(here: Here, owner: Asker, wanted: Look) -> dict[str, Any]:
    """The first examples of a file, as a job reads them, or why it cannot. Nothing is kept."""
    name, start = wanted.name, wanted.text.encode("utf-8", "replace")
    if wanted.file is not None:
        with here.database.reading() as session:
            stored = session.get(StoredFile, wanted.file)
        if stored is None or stored.owner != owner.id:
            raise ApiError(404, f"there is no file {wanted.file!r}", code="not_found")
        with here.home.file(stored.id).open("rb") as file:
            name, start = stored.filename, file.read(LOOK_BYTES)
        if len(start) < stored.size:
            start = start[: start.rfind(b"\n") + 1]  # whole lines
    templates = wanted.model_dump(include={"prompt_template", "completion_template"})
    with NamedTemporaryFile(dir=here.home.uploads, suffix=Path(name).suffix) as copy:
        copy.write(start)
        copy.flush()
        try:
            config = ExamplesConfig(data=copy.name, **templates)
            found = list(islice(each_example(copy.name, config), LOOK_EXAMPLES))
        except ValidationError as error:
            return {"examples": [], "problem": one_line(error, ExamplesConfig)}
        except IsthmusError as error:
            return {"examples": [], "problem": str(error).replace(copy.name, name)}
    examples = [{"prompt": one.prompt, "completion": one.completion, "messages": one.messages} for one in found]
    return {"examples": examples, "problem": None}


def adapter(here: Here, owner: Asker, name: str) -> StreamingResponse:
    """The folder of an adapter, as a ZIP file."""
    with here.database.reading() as session:
        found = session.get(Model, name)
    if found is None or found.owner != owner.id or found.deleted:
        raise ApiError(404, f"there is no adapter {ascii(name)[:200]}, or it was deleted", code="not_found")
    return StreamingResponse(zipped(here.home.path / found.folder), media_type="application/zip")


def zipped(folder: Path) -> Iterator[bytes]:
    """A folder's files as a ZIP file, uncompressed, of which little is in memory at a time."""
    out = _Pieces()
    with ZipFile(out, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = ZipInfo.from_file(path, str(path.relative_to(folder)))
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                while piece := source.read(1 << 18):
                    target.write(piece)
                    yield out.take()
    yield out.take()


class _Pieces(io.RawIOBase):
    """What is written, until it is taken."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._waiting += data
        return len(data)

    def take(self) -> bytes:
        taken = bytes(self._waiting)
        self._waiting.clear()
        return taken


def traffic(here: Here, owner: Asker) -> dict[str, Any]:
    """What has crossed to each cloud, today (UTC) and in all, and which parts live where."""
    with here.database.reading() as session:
        return crossed(session, session.get_one(Owner, owner.id), clouds=_clouds(here, owner))


def _clouds(here: Context, owner: Owner) -> dict[str, Reached]:
    """The clouds of daemon.toml, as the process that answers has found them."""
    found = {cloud["name"]: Reached(cloud["reachable"], cloud["error"]) for cloud in here.noted.clouds(owner)}
    return {name: found.get(name, Reached()) for name in here.settings.clouds}


def _answer(file: StaticFile, request: Request) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    if is_unchanged(file, request.headers.get("if-none-match")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
