"""The application (ASGI) of a daemon: routers of the APIs behind `Access`, with one form of errors."""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import APIRouter, FastAPI

from isthmus.daemon.state.owners import Owners
from isthmus.daemon.web import refusals, status_routes
from isthmus.daemon.web.access import Access
from isthmus.daemon.web.context import Context


def application(context: Context, routers: Iterable[APIRouter]) -> FastAPI:
    """The application of some routers.

    Args:
        context: The parts of the daemon.
        routers: Of the APIs; that of the status is always there.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.context = context
    for router in (status_routes.router(), *routers):
        app.include_router(router)
    refusals.install(app)
    app.add_middleware(Access, settings=context.settings, owners=Owners(context.database))
    return app
