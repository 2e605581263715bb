"""The gateway's parts, opened for one process and closed with it. Every process of an installation has its own, over one database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from prometheus_client import REGISTRY

from finery_common.artifacts import ArtifactStore
from finery_common.database import Database
from finery_common.errors import FailedPreconditionError
from finery_common.rpc.channel import ServiceChannel
from finery_common.rpc.tokens import TokenSigner
from finery_common.tls import Trust
from finery_gateway.client import ConversionClient, DatasetClient, ServingClient, TrainingClient
from finery_gateway.context import Gateway
from finery_gateway.creates import Creates
from finery_gateway.files import Files
from finery_gateway.keys import KeyStore
from finery_gateway.limit_table import LimitTable
from finery_gateway.proxy import Proxy
from finery_gateway.routes import Routes
from finery_gateway.server import CALLER, Targets
from finery_gateway.settings import GatewaySettings
from finery_gateway.tables import migrate


@contextlib.asynccontextmanager
async def open_gateway(settings: GatewaySettings, *, migrates: bool) -> AsyncIterator[Gateway]:
    """The parts. One process of an installation `migrates` the database, before the others open it."""
    secret = settings.token_secret()
    signer = TokenSigner(secret)
    targets = targets_of(settings)
    async with contextlib.AsyncExitStack() as stack:
        limits = LimitTable.open(settings.limits_file)
        stack.callback(limits.close)
        db = await Database.open(settings.service_database_url("gateway"), schema="gateway")
        stack.push_async_callback(db.close)
        if migrates:
            await migrate(db)
        store = await asyncio.to_thread(ArtifactStore.connect, settings.s3())
        channels = {
            area: ServiceChannel(target, signer=signer, caller=CALLER)
            for area, target in (
                ("training", targets.training),
                ("dataset", targets.dataset),
                ("conversion", targets.conversion),
                ("serving", targets.serving),
            )
        }
        for channel in channels.values():
            stack.push_async_callback(channel.close)
        keys, creates = KeyStore(db), Creates(db)
        serving, training = ServingClient(channels["serving"]), TrainingClient(channels["training"])
        routes = Routes(serving, training=training, cold_wait_s=settings.cold_wait_s)
        tls = Trust(settings.vllm_ca_file) if settings.vllm_ca_file else None
        proxy = Proxy(routes, secret=secret, timeout_s=settings.generation_timeout_s, tls=tls)
        stack.push_async_callback(proxy.close)
        REGISTRY.register(proxy.reports)
        stack.callback(REGISTRY.unregister, proxy.reports)
        yield Gateway(
            db=db,
            store=store,
            keys=keys,
            limits=limits,
            creates=creates,
            files=Files(db, store=store, creates=creates, limit_bytes=settings.upload_limit_bytes),
            training=training,
            datasets=DatasetClient(channels["dataset"]),
            conversions=ConversionClient(channels["conversion"]),
            serving=serving,
            proxy=proxy,
        )


def targets_of(settings: GatewaySettings) -> Targets:
    """Raises FailedPreconditionError that names every address that is not set."""
    addresses = {
        "FINERY_DATAPREP_ADDRESS": settings.dataprep_address,
        "FINERY_TRAINER_ADDRESS": settings.trainer_address,
        "FINERY_CONVERTER_ADDRESS": settings.converter_address,
        "FINERY_SERVING_ADDRESS": settings.serving_address,
        "FINERY_S3_ENDPOINT": settings.s3_endpoint,
    }
    if missing := [name for name, value in addresses.items() if not value]:
        raise FailedPreconditionError(f"{', '.join(missing)}: not set; wanted the host:port of each inner service and of the object store.")
    return Targets(
        dataset=settings.dataprep_address,
        training=settings.trainer_address,
        conversion=settings.converter_address,
        serving=settings.serving_address,
    )
