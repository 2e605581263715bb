"""What a deployment asks for before anything is rolled out: whose adapter it is, of which base model, and whether replicas serve that.

Any agent answers for every base model. Owns reading the adapter's manifest for that. Leaves the record to `aliases`, and all checks that
need the base model's weights or the adapter's files to the rollout, which the agents of that base model's replicas carry out.
"""

from __future__ import annotations

import asyncio

from finery_common.artifacts import ArtifactRef
from finery_common.errors import FailedPreconditionError, UnavailableError
from finery_serving.aliases import AliasStore, check_owned, version_of
from finery_serving.records import Alias
from finery_serving.registry import Registry
from finery_serving.staging import Staging
from finery_serving.vllm_client import RETRY_AFTER_S

_MANIFEST_WAIT_S = 5.0


class Deployments:
    """Records deployments, each for the replicas of its adapter's base model."""

    def __init__(self, store: AliasStore, *, registry: Registry, staging: Staging) -> None:
        self._store = store
        self._registry = registry
        self._staging = staging

    async def deploy(
        self, project: str, alias: str, *, adapter: ArtifactRef, request_id: str, etag: str = "", canary_weight: int | None = None
    ) -> Alias:
        """Raises as `AliasStore.deploy` does; NotFoundError and DataLossError where the adapter's manifest is gone or damaged,
        UnavailableError where the object store does not answer and there is more than one base model it may be of.
        """
        check_owned(adapter, project=project)
        version_of(adapter)
        base_model, pools = await self._base_of(adapter), self._registry.pools
        if canary_weight is not None and base_model in pools:
            pools[base_model].check_canary()
        return await self._store.deploy(
            project,
            alias,
            adapter=adapter,
            base_model=base_model,
            served=pools,
            request_id=request_id,
            etag=etag,
            canary_weight=canary_weight,
        )

    async def _base_of(self, adapter: ArtifactRef) -> str:
        try:
            async with asyncio.timeout(_MANIFEST_WAIT_S):
                manifest = await self._staging.manifest(adapter)
        except (TimeoutError, UnavailableError) as error:
            served = list(self._registry.pools)
            if len(served) == 1:
                # Its rollout waits for the store, and refuses an adapter of another.
                return served[0]
            message = "The adapter's manifest, which names its base model, cannot be read: the object store does not answer. Repeat later."
            raise UnavailableError(message, retry_after_s=RETRY_AFTER_S) from error
        base_model = manifest.metadata.get("base_model")
        if not isinstance(base_model, str) or not base_model:
            raise FailedPreconditionError(
                f"{adapter.prefix} cannot be served: its manifest names no base model. Deploy an adapter that a fine-tuning job has made.",
                code="wrong_base_model",
                param="adapter",
            )
        return base_model
