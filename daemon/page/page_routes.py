"""The page at `/` with its files, which need no token, and what the page shows of the traffic."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from isthmus.daemon.page.crossed import Reached, crossed
from isthmus.daemon.page.static_files import HEADERS, INDEX, StaticFile, is_unchanged, read_static_files
from isthmus.daemon.state.tables import Owner
from isthmus.daemon.tokens import CODE_SECONDS, read_token
from isthmus.daemon.web.access import SIGN_IN
from isthmus.daemon.web.api_error import ApiError
from isthmus.daemon.web.bounded_body import BoundedBody
from isthmus.daemon.web.context import Asker, Context, Here


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


def traffic(here: Here, owner: Asker) -> dict[str, Any]:
    """What has crossed to each cloud, today (UTC) and in all, and which parts live where."""
    with here.database.reading() as session:
        return crossed(session, session.get_one(Owner, owner.id), clouds=_clouds(here))


def _clouds(here: Context) -> dict[str, Reached]:
    """The clouds of daemon.toml, as the process that answers has found them."""
    found = {
        cloud["name"]: Reached(cloud["reachable"], cloud["error"]) for cloud in here.noted.answers.get("clouds", ())
    }
    return {name: found.get(name, Reached()) for name in here.settings.clouds}


def _answer(file: StaticFile, request: Request) -> Response:
    headers = {**HEADERS, "etag": file.etag}
    if is_unchanged(file, request.headers.get("if-none-match")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
