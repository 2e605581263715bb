"""A service's process: settings, logs, one clear line where it cannot start, and when it ends.

Owns what every `__main__` would otherwise repeat. What a service builds and in which order is its own affair.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from pydantic import ValidationError

from finery_common.errors import FineryError
from finery_common.settings import ServiceSettings
from finery_common.spec import invalid_fields
from finery_common.telemetry import configure_logging
from finery_common.tracing import configure_tracing

S = TypeVar("S", bound=ServiceSettings)
_ENDING = (signal.SIGTERM, signal.SIGINT)


def run_service(
    name: str,
    settings_type: type[S],
    serve: Callable[[S], Awaitable[None]],
    *,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Reads settings and runs `serve` until it returns. Answers the exit status: 1, with one line on standard error, for a FineryError.

    Until `serve` reaches `until_stopped`, SIGTERM and SIGINT cancel it; the process ends with status 0 once it has cleaned up.
    """
    try:
        settings = settings_type()
        configure_logging(name, level=settings.log_level)
        configure_tracing(name, endpoint=settings.otlp_endpoint)
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            runner.run(_awaited(serve, settings))
    except ValidationError as error:
        sys.stderr.write(f"finery_{name}: settings (FINERY_…): {invalid_fields(error).message}\n")
        return 1
    except FineryError as error:
        sys.stderr.write(f"finery_{name}: {error.message}\n")
        return 1
    return 0


async def until_stopped(background: Iterable[asyncio.Task[None]] = ()) -> None:
    """Waits for SIGTERM or SIGINT.

    A background task never ends by itself: where one does, its error is raised; the process then ends and its supervisor starts it again.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _ENDING:
        loop.add_signal_handler(number, stopped.set)
    waiter = asyncio.create_task(stopped.wait())
    done, _ = await asyncio.wait([waiter, *background], return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    for task in done - {waiter}:
        task.result()
        raise AssertionError(f"{task.get_name()} ended by itself")


async def _awaited(serve: Callable[[S], Awaitable[None]], settings: S) -> None:
    serving = asyncio.ensure_future(serve(settings))
    signals: list[int] = []

    def stop(number: int) -> None:
        # Once only: a second signal would cut the cleaning up short.
        if not signals:
            serving.cancel()
        signals.append(number)

    for number in _ENDING:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await serving
    except asyncio.CancelledError:
        if not signals:
            raise
        # Threads of the start may still wait for a store or a download, and an ordinary end of the process would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
