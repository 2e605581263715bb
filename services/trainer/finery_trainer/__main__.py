"""The training service's process: settings, logs, metrics, and an end on SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog

from finery_common.errors import FineryError
from finery_common.telemetry import configure_logging, serve_metrics
from finery_trainer.service import Service, running
from finery_trainer.settings import TrainerSettings

log = structlog.get_logger(__name__)


def main() -> int:
    """The process; answers its exit status."""
    try:
        settings = TrainerSettings()
        configure_logging("trainer", level=settings.log_level)
        asyncio.run(_serve(settings))
    except FineryError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    return 0


async def _serve(settings: TrainerSettings) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    metrics_port = serve_metrics(host=settings.metrics_host, port=settings.metrics_port)
    log.info("serving metrics", port=metrics_port)
    async with running(settings) as service:
        await _until(stopped, service)


async def _until(stopped: asyncio.Event, service: Service) -> None:
    """A background task never ends by itself: its error ends the process, which its supervisor starts again."""
    waiter = asyncio.create_task(stopped.wait())
    done, _ = await asyncio.wait([waiter, *service.background], return_when=asyncio.FIRST_COMPLETED)
    for task in done - {waiter}:
        task.result()


if __name__ == "__main__":
    sys.exit(main())
