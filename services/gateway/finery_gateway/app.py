"""The HTTP application: routes, error handlers, middleware, health."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import sqlalchemy as sa
import structlog
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from finery_common.errors import FineryError
from finery_common.tracing import is_tracing
from finery_gateway import docs_page
from finery_gateway.context import Gateway
from finery_gateway.errors import install_error_handlers
from finery_gateway.middleware import BodyLimit, RequestMetrics, RequestSpans
from finery_gateway.native_api import artifacts, conversions, datasets, deployments, installation
from finery_gateway.openai_api import files, inference, jobs, models
from finery_gateway.request_log import RequestLog

SETTLE_INTERVAL_S = 300.0
SWEEP_INTERVAL_S = 3600.0
_DESCRIPTION = "OpenAI-compatible under /v1, Finery's own under /api/v1."

log = structlog.get_logger(__name__)


def create_app(gateway: Gateway, *, body_limit_bytes: int, log_content: bool = False) -> FastAPI:
    """The app over `gateway`'s parts. `body_limit_bytes` holds for every body but an upload's; `log_content` as in the settings."""
    # No docs from a script on the internet: /docs is our own page.
    app = FastAPI(title="Finery", version="1", description=_DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.gateway = gateway
    install_error_handlers(app)
    # In this order they are tried: what is asked most comes first.
    for module in (inference, files, jobs, models, datasets, conversions, artifacts, deployments, installation, docs_page):
        app.include_router(module.router)
    _add_health(app, gateway)
    app.add_middleware(BodyLimit, body_limit_bytes=body_limit_bytes, upload_limit_bytes=gateway.files.limit_bytes)
    app.add_middleware(RequestLog, log_content=log_content)
    app.add_middleware(RequestMetrics)
    if is_tracing():
        app.add_middleware(RequestSpans)
    return app


def _add_health(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, bool]:
        """The process runs."""
        return {"ok": True}

    @app.get("/readyz", tags=["health"])
    async def readyz() -> JSONResponse:
        """The process can answer: its database does. An inner service that is gone costs only what it does, with a 503."""
        try:
            async with gateway.db.read() as session:
                await session.execute(sa.text("SELECT 1"))
        except FineryError as error:
            return JSONResponse({"ready": False, "reason": error.message}, status_code=503)
        return JSONResponse({"ready": True})


@contextlib.asynccontextmanager
async def doing_chores(gateway: Gateway) -> AsyncIterator[None]:
    """Settles files and sweeps the store now and then, until it is left. One process of an installation does."""
    chores = [asyncio.create_task(chore(gateway)) for chore in (_settle_files, _sweep_store)]
    try:
        yield
    finally:
        for task in chores:
            task.cancel()
        await asyncio.gather(*chores, return_exceptions=True)


async def _sweep_store(gateway: Gateway) -> None:
    """Removes what killed uploads and attempts of every service left in the store a day ago or longer."""
    while True:
        try:
            if removed := await asyncio.to_thread(gateway.store.sweep):
                log.info("swept the store", folders=len(removed))
        except FineryError as error:
            log.warning("the store could not be swept; trying again later", error=error.message)
        await asyncio.sleep(SWEEP_INTERVAL_S)


async def _settle_files(gateway: Gateway) -> None:
    while True:
        try:
            await gateway.files.settle()
        except FineryError as error:
            log.warning("files could not be settled; trying again later", error=error.message)
        await asyncio.sleep(SETTLE_INTERVAL_S)
