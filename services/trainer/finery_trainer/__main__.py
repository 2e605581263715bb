"""The training service's process: `python -m finery_trainer`."""

from __future__ import annotations

import sys

import structlog

from finery_common.service import run_service, until_stopped
from finery_common.telemetry import serve_metrics
from finery_trainer.service import running
from finery_trainer.settings import TrainerSettings

log = structlog.get_logger(__name__)


async def _serve(settings: TrainerSettings) -> None:
    log.info("serving metrics", port=serve_metrics(host=settings.metrics_host, port=settings.metrics_port))
    async with running(settings) as service:
        await until_stopped(service.background)


def main() -> int:
    """Runs the service; answers the exit status."""
    return run_service("trainer", TrainerSettings, _serve)


if __name__ == "__main__":
    sys.exit(main())
