"""Watch streams as server-sent events: `id` is the sequence to go on from (`Last-Event-ID`), `data` the resource as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.responses import StreamingResponse

from finery_common.errors import FineryError, InvalidArgumentError
from finery_gateway.errors import envelope
from finery_gateway.resources import AliasEvent, JobEvent

KEEPALIVE_S = 15.0


async def after_sequence_of(request: Request, after_sequence: Annotated[int, Query(ge=0)] = 0) -> int:
    """Where a watch goes on: `after_sequence`, or `Last-Event-ID`, which browsers send when they come back."""
    header = request.headers.get("last-event-id")
    if header is None:
        return after_sequence
    if not header.isdecimal():
        raise InvalidArgumentError(f"Last-Event-ID: got {header!r}, wanted a sequence number")
    return int(header)


AfterSequence = Annotated[int, Depends(after_sequence_of)]


async def event_stream(events: AsyncIterator[JobEvent] | AsyncIterator[AliasEvent]) -> StreamingResponse:
    """The response. What fails before the first event is raised; what fails later is an event called `error`, the last one."""
    first = asyncio.ensure_future(anext(events, None))
    # Nothing new may come for long: headers go out then, and an error becomes an event.
    done, _ = await asyncio.wait((first,), timeout=1)
    if done and (error := first.exception()) is not None:
        raise error
    return StreamingResponse(
        _lines(first, events), media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
    )


async def _lines(
    first: asyncio.Future[JobEvent | AliasEvent | None], events: AsyncIterator[JobEvent] | AsyncIterator[AliasEvent]
) -> AsyncIterator[bytes]:
    upcoming = first
    try:
        while True:
            done, _ = await asyncio.wait((upcoming,), timeout=KEEPALIVE_S)
            if not done:
                yield b": still here\n\n"
                continue
            event = upcoming.result()
            if event is None:
                return
            yield _block(event)
            upcoming = asyncio.ensure_future(anext(events, None))
    except FineryError as error:
        yield f"event: error\ndata: {json.dumps(envelope(error))}\n\n".encode()
    finally:
        upcoming.cancel()
        with contextlib.suppress(asyncio.CancelledError, FineryError):
            await upcoming


def _block(event: JobEvent | AliasEvent) -> bytes:
    if isinstance(event, JobEvent):
        return f"id: {event.sequence}\nevent: {event.type}\ndata: {event.model_dump_json()}\n\n".encode()
    return f"event: {'deleted' if event.deleted else 'alias'}\ndata: {event.alias.model_dump_json()}\n\n".encode()
