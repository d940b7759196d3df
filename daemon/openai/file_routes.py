"""`/v1/files`.

followed    file, purpose ("fine-tune", "batch" or "user_data"); of lists after, limit, order, purpose
refused     other purposes, and expires_after: files stay until they are deleted

A file for fine-tuning is checked before it is taken (`isthmus.daemon.openai.training_files`), and an error names its
line. One that a job needs which has not ended cannot be deleted. The document calls a file's content a string in JSON;
it is sent as bytes, which the SDK asks for.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.concurrency import contextmanager_in_threadpool, run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import Field
from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session
from starlette.requests import ClientDisconnect

from isthmus.common.bounded_values import shown
from isthmus.common.errors import DataError
from isthmus.common.files import disk_errors, sync
from isthmus.daemon.home import Home
from isthmus.daemon.jobs.job_specs import FILES
from isthmus.daemon.openai.job_objects import jobs_under_way
from isthmus.daemon.openai.request_fields import Fields, NoQuery, query
from isthmus.daemon.openai.training_files import LONGEST_LINE, TrainingFile, read_training_file
from isthmus.daemon.openai.upload_stream import UploadStream
from isthmus.daemon.state.tables import StoredFile
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.context import Asker, Context, Here

routes = APIRouter(prefix="/files")
PURPOSES = ("fine-tune", "batch", "user_data")
"""Of uploads."""


class FilePage(Fields, strict=False):
    """Which files are wanted."""

    after: str | None = None
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


@routes.post("")
async def upload(request: Request, here: Here, asker: Asker, _: NoQuery) -> Any:
    """Take a file, which is on the disk when this is answered."""
    file_id = f"file-{secrets.token_hex(12)}"
    most = here.settings.upload_mib * 2**20
    said = request.headers.get("content-length", "")
    size = min(int(said), most) if said.isdecimal() else 0
    here.home.uploads.mkdir(mode=0o700, exist_ok=True)
    temporary = here.home.uploads / file_id
    # The room may look through the whole home.
    await run_in_threadpool(here.room.room_for, size)  # what cannot fit is refused before it comes
    async with contextmanager_in_threadpool(here.room.growing()) as take:
        try:
            with disk_errors(temporary), temporary.open("xb") as file:
                received = UploadStream(request.headers.get("content-type", ""), file, most)

                def write(chunk: bytes) -> None:
                    take(len(chunk))
                    received.write(chunk)

                async for chunk in request.stream():
                    await run_in_threadpool(write, chunk)
                received.finish()
            return await run_in_threadpool(_keep, here, asker.id, file_id, temporary, received)
        except ClientDisconnect as error:
            raise ApiError(400, "the client has closed its connection", code="client_gone") from error
        finally:
            temporary.unlink(missing_ok=True)


@routes.get("")
def list_files(here: Here, asker: Asker, page: Annotated[FilePage, Depends(query(FilePage))]) -> Any:
    """The owner's files; the newest first, or the oldest."""
    place = tuple_(StoredFile.created_at, StoredFile.id)
    wanted = select(StoredFile).where(StoredFile.owner == asker.id)
    if page.purpose is not None:
        wanted = wanted.where(StoredFile.purpose == page.purpose)
    with here.database.reading() as session:
        if page.after is not None:
            last = session.get(StoredFile, page.after)
            if last is None or last.owner != asker.id:
                raise ApiError(400, f"after = {shown(page.after)} is no file", param="after")
            mark = tuple_(last.created_at, last.id)
            wanted = wanted.where(place < mark if page.order == "desc" else place > mark)
        columns = (StoredFile.created_at, StoredFile.id)
        ordered = [column.desc() if page.order == "desc" else column.asc() for column in columns]
        files = session.scalars(wanted.order_by(*ordered).limit(page.limit + 1)).all()
    data = [_file_object(file) for file in files[: page.limit]]
    ends = {"first_id": data[0]["id"] if data else "", "last_id": data[-1]["id"] if data else ""}
    return {"object": "list", "data": data, **ends, "has_more": len(files) > page.limit}


@routes.get("/{file_id}")
def retrieve_file(here: Here, asker: Asker, file_id: str, _: NoQuery) -> Any:
    """What is known of a file."""
    with here.database.reading() as session:
        return _file_object(_file(session, asker.id, file_id))


@routes.get("/{file_id}/content")
def file_content(here: Here, asker: Asker, file_id: str, _: NoQuery) -> Any:
    """A file's bytes."""
    with here.database.reading() as session:
        file = _file(session, asker.id, file_id)
    path = here.home.file(file.id)
    if not path.is_file():
        raise ApiError(404, f"the bytes of {file.id!r} are not on the disk any more", code="file_not_found")
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


@routes.delete("/{file_id}")
def delete_file(here: Here, asker: Asker, file_id: str, _: NoQuery) -> Any:
    """Remove a file."""
    with here.database.session() as session:
        file = _file(session, asker.id, file_id)
        path = here.home.file(file.id)
        for job in jobs_under_way(session):
            if file.id in {job.spec.get(name) for name in FILES}:
                raise ApiError(
                    400,
                    f"the job {job.id} needs {file.id!r}: cancel it, or wait for its end",
                    param="file_id",
                    code="file_in_use",
                )
        session.delete(file)
    path.unlink(missing_ok=True)
    return {"id": file_id, "object": "file", "deleted": True}


def _keep(here: Context, owner: str, file_id: str, temporary: Path, received: UploadStream) -> dict[str, Any]:
    """Check a file that has come, and take it."""
    purpose = _purpose(received.fields)
    assert received.filename is not None  # noqa: S101  # `finish` has seen to it
    known = _check_training(temporary, received) if purpose == "fine-tune" else None
    file = StoredFile(
        id=file_id,
        owner=owner,
        filename=received.filename,
        purpose=purpose,
        size=received.size,
        sha256=received.sha256,
        created_at=time.time(),
        examples=None if known is None else known.examples,
        chats=None if known is None else known.chats,
    )
    _place(here.home, file_id, temporary)
    with here.database.session() as session:
        session.add(file)
    return _file_object(file)


def _purpose(fields: dict[str, str]) -> str:
    for name in fields:
        if name.partition("[")[0] == "expires_after":
            raise ApiError(400, "expires_after: files stay until they are deleted: leave it out", param="expires_after")
        if name != "purpose":
            raise ApiError(
                400, f"unknown field {shown(name)}: leave it out", param=name[:200], code="unknown_parameter"
            )
    if "purpose" not in fields:
        raise ApiError(400, "'purpose' is missing: give it", param="purpose", code="missing_required_parameter")
    if fields["purpose"] not in PURPOSES:
        raise ApiError(
            400,
            f"purpose = {shown(fields['purpose'])} is not taken here: give {', '.join(PURPOSES)}",
            param="purpose",
            code="invalid_value",
        )
    return fields["purpose"]


def _check_training(path: Path, received: UploadStream) -> TrainingFile:
    if received.longest_line > LONGEST_LINE:
        raise ApiError(400, f"a line has more than {LONGEST_LINE} bytes: split it", param="file", code="invalid_file")
    try:
        return read_training_file(path, received.filename or "")
    except DataError as error:
        raise ApiError(400, str(error), param="file", code="invalid_file") from error


def _place(home: Home, file_id: str, temporary: Path) -> None:
    path = home.file(file_id)
    with disk_errors(path):
        sync(temporary)
        temporary.rename(path)
        sync(path.parent)


def _file(session: Session, owner: str, file_id: str) -> StoredFile:
    file = session.get(StoredFile, file_id)
    if file is None or file.owner != owner:
        raise ApiError(404, f"there is no file {shown(file_id)}", param="file_id", code="file_not_found")
    return file


def _file_object(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
    }
