"""`python -m finery_serving.follower`: this machine's share of a vLLM that runs on several, where another machine has agent and API.

Owns the command alone: the process becomes vLLM's. It ends with its group, as the agent does, and whoever runs the pods starts all of it
anew.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from finery_common.catalogue import check_folder
from finery_common.errors import FailedPreconditionError
from finery_common.service import run_service
from finery_serving.__main__ import base_entry, vllm_config
from finery_serving.settings import ServingSettings
from finery_serving.vllm_process import VllmConfig, engine_arguments, vllm_environment

_NO_MIDDLEWARE = Path("/nonexistent")


def main() -> int:
    """Returns where vLLM cannot be started only."""
    return run_service("serving-follower", ServingSettings, _become_vllm)


async def _become_vllm(settings: ServingSettings) -> None:
    if not 0 < settings.vllm_node_rank < settings.vllm_nodes:
        raise FailedPreconditionError(
            f"FINERY_VLLM_NODE_RANK: got {settings.vllm_node_rank}, wanted 1 to FINERY_VLLM_NODES - 1 ({settings.vllm_nodes - 1})"
        )
    entry = base_entry(settings)
    if entry.path is None:
        raise FailedPreconditionError(f"{entry.name}: a follower wants the model as a local folder; give it a path in the catalogue.")
    check_folder(entry.path, name=entry.name)
    config = vllm_config(settings, entry=entry, base_dir=entry.path)
    os.execve(config.python, follower_command(config, node_rank=settings.vllm_node_rank), follower_environment(os.environ, config=config))


def follower_command(config: VllmConfig, *, node_rank: int) -> list[str]:
    """The command line of vLLM's processes on a machine that has no API."""
    command = [str(config.python), "-m", "vllm.entrypoints.cli.main", "serve", str(config.base_model_dir), "--headless"]
    return command + engine_arguments(config, node_rank=node_rank)


def follower_environment(inherited: Mapping[str, str], *, config: VllmConfig) -> dict[str, str]:
    """As the leader's vLLM has it; no request comes here that a middleware would see."""
    return vllm_environment(inherited, config=config, middleware_config=_NO_MIDDLEWARE)


if __name__ == "__main__":
    sys.exit(main())
