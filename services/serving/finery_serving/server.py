"""The gRPC face of serving: translates, calls, translates back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Set
from functools import partial
from typing import cast

import grpc.aio
from google.protobuf import empty_pb2

from finery.serving.v1 import serving_pb2, serving_pb2_grpc
from finery_common.errors import UnavailableError
from finery_common.resource_names import parse_name, parse_parent
from finery_common.rpc.messages import artifact_from_proto, artifact_to_proto, error_to_proto, timestamp
from finery_common.rpc.server import UNARY_DEADLINE_S, Servicer
from finery_common.rpc.tokens import require_project
from finery_serving.aliases import AliasStore
from finery_serving.changes import Changes
from finery_serving.deployments import Deployments
from finery_serving.records import Alias
from finery_serving.registry import Pool, Registry
from finery_serving.releases import Releases
from finery_serving.residency import Residency
from finery_serving.routes import Routes, Target


class ServingServicer(serving_pb2_grpc.ServingServiceServicer):
    """Every method acts inside the project that the caller's credentials name."""

    def __init__(
        self,
        store: AliasStore,
        *,
        deployments: Deployments,
        releases: Releases,
        routes: Routes,
        registry: Registry,
        residency: Residency,
        changes: Changes,
    ) -> None:
        self._store = store
        self._deployments = deployments
        self._releases = releases
        self._routes = routes
        self._registry = registry
        self._residency = residency
        self._changes = changes
        self._ending = False

    def end_watches(self) -> None:
        """Ends every watch with UNAVAILABLE, upon which its client watches anew."""
        self._ending = True
        self._changes.notify()

    async def ListDeployments(
        self, request: serving_pb2.ListDeploymentsRequest, context: grpc.aio.ServicerContext
    ) -> serving_pb2.ListDeploymentsResponse:
        visible = {
            served.version for alias in (await self._store.snapshot()).of_project(require_project()).values() for served in alias.serving
        }
        deployments = [_pool_to_proto(pool, visible=visible) for pool in self._registry.pools.values()]
        return serving_pb2.ListDeploymentsResponse(deployments=deployments)

    async def DeployAdapter(self, request: serving_pb2.DeployAdapterRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Alias:
        alias = await self._deployments.deploy(
            parse_parent(request.parent, project=require_project()),
            request.alias,
            adapter=artifact_from_proto(request.adapter),
            request_id=request.request_id,
            etag=request.etag,
            canary_weight=request.canary_weight if request.HasField("canary_weight") else None,
        )
        return _alias_to_proto(alias)

    async def GetAlias(self, request: serving_pb2.GetAliasRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Alias:
        name = parse_name(request.name, collection="aliases", project=require_project())
        alias = await self._store.get(name.project, name.id)
        await self._refuse_replaced()
        return _alias_to_proto(alias)

    async def ListAliases(
        self, request: serving_pb2.ListAliasesRequest, context: grpc.aio.ServicerContext
    ) -> serving_pb2.ListAliasesResponse:
        project = parse_parent(request.parent, project=require_project())
        found, next_page_token = await self._store.list(project, page_size=request.page_size, page_token=request.page_token)
        await self._refuse_replaced()
        return serving_pb2.ListAliasesResponse(aliases=[_alias_to_proto(alias) for alias in found], next_page_token=next_page_token)

    async def DeleteAlias(self, request: serving_pb2.DeleteAliasRequest, context: grpc.aio.ServicerContext) -> empty_pb2.Empty:
        name = parse_name(request.name, collection="aliases", project=require_project())
        await self._store.delete(name.project, name.id, etag=request.etag)
        await self._refuse_replaced()
        return empty_pb2.Empty()

    async def SetCanaryWeight(self, request: serving_pb2.SetCanaryWeightRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Alias:
        name = parse_name(request.name, collection="aliases", project=require_project())
        return _alias_to_proto(await self._releases.set_weight(name.project, name.id, weight=request.weight, etag=request.etag))

    async def PromoteAlias(self, request: serving_pb2.PromoteAliasRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Alias:
        name = parse_name(request.name, collection="aliases", project=require_project())
        alias = await self._releases.promote(name.project, name.id, request_id=request.request_id, etag=request.etag)
        await self._refuse_replaced()
        return _alias_to_proto(alias)

    async def RollBackAlias(self, request: serving_pb2.RollBackAliasRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Alias:
        name = parse_name(request.name, collection="aliases", project=require_project())
        served = self._registry.pools
        alias = await self._releases.roll_back(name.project, name.id, served=served, request_id=request.request_id, etag=request.etag)
        await self._refuse_replaced()
        return _alias_to_proto(alias)

    async def PinAlias(self, request: serving_pb2.PinAliasRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Alias:
        name = parse_name(request.name, collection="aliases", project=require_project())
        pool = self._registry.pool((await self._store.get(name.project, name.id)).base_model)
        return _alias_to_proto(await self._releases.pin(name.project, name.id, max_pins=pool.max_pins))

    async def UnpinAlias(self, request: serving_pb2.UnpinAliasRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Alias:
        name = parse_name(request.name, collection="aliases", project=require_project())
        return _alias_to_proto(await self._releases.unpin(name.project, name.id))

    async def WatchAliases(
        self, request: serving_pb2.WatchAliasesRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[serving_pb2.AliasEvent]:
        project = parse_parent(request.parent, project=require_project())
        known: dict[str, Alias] = {}
        while not self._ending:
            seen = self._changes.count
            current = (await self._store.snapshot()).of_project(project)
            await self._refuse_replaced()
            for alias in current.values():
                if known.get(alias.alias) != alias:
                    yield serving_pb2.AliasEvent(alias=_alias_to_proto(alias))
            for gone in known.keys() - current.keys():
                yield serving_pb2.AliasEvent(alias=_alias_to_proto(known[gone]), deleted=True)
            known = current
            await self._changes.wait_after(seen)
        raise UnavailableError("Serving is stopping; watch again.", retry_after_s=1)

    async def ResolveModel(self, request: serving_pb2.ResolveModelRequest, context: grpc.aio.ServicerContext) -> serving_pb2.Route:
        project = parse_parent(request.parent, project=require_project())
        # None where the caller set no deadline, whatever the type says.
        left_s = cast("float | None", context.time_remaining())
        timeout_s = UNARY_DEADLINE_S if left_s is None else left_s
        route = await self._routes.resolve(project, model=request.model, after_epoch=request.after_epoch, timeout_s=timeout_s)
        return serving_pb2.Route(
            version=route.version,
            epoch=route.epoch,
            base_model=route.base_model,
            max_model_len=route.max_model_len,
            targets=[_target_to_proto(target) for target in route.targets],
        )

    async def _refuse_replaced(self) -> None:
        """Before somebody hears of an alias: vLLM here refuses what no alias serves any more, so that nobody who has heard is answered by
        it, though a gateway has not.
        """
        now = await self._store.snapshot()
        await self._residency.refuse(version for version in self._residency.versions if not now.wants(version))


def servicer_of(servicer: ServingServicer) -> Servicer:
    """The servicer for an RpcServer."""
    return Servicer("finery.serving.v1.ServingService", partial(serving_pb2_grpc.add_ServingServiceServicer_to_server, servicer))


def _pool_to_proto(pool: Pool, *, visible: Set[str]) -> serving_pb2.Deployment:
    """`visible` are the versions that the caller may know of."""
    replicas = [
        serving_pb2.Replica(
            id=replica.id,
            ready=replica.is_ready,
            start_time=timestamp(replica.started_at),
            loaded_versions=sorted(visible & {version for version, state in replica.versions.items() if state != "failed"}),
        )
        for replica in pool.live
    ]
    return serving_pb2.Deployment(
        base_model=pool.base_model,
        base_model_sha256=pool.base_model_sha256,
        replicas=replicas,
        max_lora_rank=pool.max_lora_rank,
        max_model_len=pool.max_model_len,
    )


def _target_to_proto(target: Target) -> serving_pb2.RouteTarget:
    replicas = [serving_pb2.RouteReplica(address=address, token=token) for address, token in target.replicas]
    return serving_pb2.RouteTarget(version=target.version, weight=target.weight, replicas=replicas)


def _alias_to_proto(alias: Alias) -> serving_pb2.Alias:
    rollout = alias.rollout
    return serving_pb2.Alias(
        name=f"projects/{alias.project}/aliases/{alias.alias}",
        alias=alias.alias,
        base_model=alias.base_model,
        version=alias.version,
        adapter=None if alias.adapter is None else artifact_to_proto(alias.adapter),
        etag=alias.etag,
        epoch=alias.epoch,
        rollout=serving_pb2.Rollout(
            state=f"ROLLOUT_STATE_{rollout.state}",
            version=rollout.version,
            error=error_to_proto(rollout.error),
            swap_seconds=rollout.swap_s or 0.0,
            canary_weight=rollout.canary_weight,
        ),
        job_id=alias.job_id,
        create_time=timestamp(alias.created_at),
        update_time=timestamp(alias.updated_at),
        canary=_canary_to_proto(alias),
        previous=_previous_to_proto(alias),
        pinned=alias.pinned,
    )


def _canary_to_proto(alias: Alias) -> serving_pb2.Canary | None:
    canary = alias.canary
    if canary is None:
        return None
    adapter = artifact_to_proto(canary.adapter)
    return serving_pb2.Canary(version=canary.version, adapter=adapter, job_id=canary.job_id, weight=alias.canary_weight)


def _previous_to_proto(alias: Alias) -> serving_pb2.PreviousVersion | None:
    previous = alias.previous
    if previous is None:
        return None
    return serving_pb2.PreviousVersion(version=previous.version, adapter=artifact_to_proto(previous.adapter), job_id=previous.job_id)
