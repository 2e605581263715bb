"""The Kubernetes API as the launcher uses it: Jobs created and deleted, Jobs and pods listed and watched, in one namespace.

Owns the connection and what its errors are in our tree. Objects are the API's JSON, so that a field which the client does not know
yet is no error; what they mean is `evidence`'s.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from finery_common.errors import AlreadyExistsError, FailedPreconditionError, FineryError, PermissionDeniedError, UnavailableError

Kind = Literal["jobs", "pods"]
Json = Mapping[str, Any]

REQUEST_TIMEOUT_S = 10.0
WATCH_S = 60
"""How long one watch lasts. A connection that died in silence is noticed a little later."""
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CREATE_TRIES, _FIRST_RETRY_S = 3, 0.2


class Expired(Exception):
    """A watch's version is older than what the API server remembers (410 Gone): list again."""


class Cluster:
    """One namespace of one cluster. Every method raises UnavailableError where the API server cannot answer for now, PermissionDeniedError
    that names verb and resource where it may not, and FailedPreconditionError where a Job that was to be created can never be.
    """

    def __init__(self, configuration: client.Configuration, *, namespace: str) -> None:
        self.namespace = namespace
        self._api = client.ApiClient(configuration)
        self._batch = client.BatchV1Api(self._api)
        self._core = client.CoreV1Api(self._api)
        # Its bodies are plain JSON; those of BatchV1Api are models, which refuse numbers as quantities and fields newer than they are.
        self._plain = client.CustomObjectsApi(self._api)

    @classmethod
    async def connect(cls, namespace: str) -> Cluster:
        """By `KUBECONFIG` where it is set, else as a pod does. An empty `namespace` is the pod's own. Nothing is sent yet."""
        configuration = client.Configuration()
        try:
            if kubeconfig := os.environ.get("KUBECONFIG"):
                await config.load_kube_config(config_file=kubeconfig, client_configuration=configuration, persist_config=False)
            else:
                config.load_incluster_config(client_configuration=configuration)
        except config.ConfigException as error:
            raise FailedPreconditionError(
                f"FINERY_LAUNCHER is kubernetes, but no API server is known: {error} "
                "Run the trainer in a pod with a service account's token, or set KUBECONFIG."
            ) from error
        return cls(configuration, namespace=namespace or await asyncio.to_thread(_own_namespace))

    async def close(self) -> None:
        """Ends every connection, watches included."""
        await self._api.close()

    async def create_job(self, body: dict[str, Any], *, dry_run: bool = False) -> None:
        """Tries again by itself; a name makes one Job, however often that is. Raises AlreadyExistsError where there is one of that name.

        With `dry_run` the API server checks everything and keeps nothing.
        """
        wait_s = _FIRST_RETRY_S
        for number in range(1, _CREATE_TRIES + 1):
            try:
                await self._create(body, dry_run=dry_run)
            except UnavailableError:
                if number == _CREATE_TRIES:
                    raise
            else:
                return
            await asyncio.sleep(wait_s)
            wait_s *= 3

    async def _create(self, body: dict[str, Any], *, dry_run: bool) -> None:
        try:
            await self._plain.create_namespaced_custom_object(
                "batch",
                "v1",
                self.namespace,
                "jobs",
                body,
                field_validation="Strict",
                _request_timeout=REQUEST_TIMEOUT_S / 2,
                dry_run="All" if dry_run else None,
            )
        except ApiException as error:
            if error.status == 409:
                raise AlreadyExistsError(f"There is a Job {body['metadata']['name']} in namespace {self.namespace} already.") from error
            raise self._translated(error, verb="create", kind="jobs") from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(error) from error

    async def get_job(self, name: str) -> Json | None:
        """None where there is none."""
        try:
            answer = await self._batch.read_namespaced_job_without_preload_content(name, self.namespace, _request_timeout=REQUEST_TIMEOUT_S)
            return None if answer.status == 404 else await self._json(answer, verb="get", kind="jobs")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(error) from error

    async def delete_job(self, name: str) -> None:
        """Removes a Job and has its pod end, within its grace period. A Job that is gone already is no error."""
        try:
            answer = await self._batch.delete_namespaced_job_without_preload_content(
                name, self.namespace, grace_period_seconds=0, propagation_policy="Background", _request_timeout=REQUEST_TIMEOUT_S
            )
            if answer.status != 404:
                await self._json(answer, verb="delete", kind="jobs")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(error) from error

    async def list(self, kind: Kind, *, selector: str) -> tuple[list[Json], str]:
        """The objects that `selector` chooses by their labels, and the version from which a watch goes on."""
        try:
            answer = await self._lister(kind)(self.namespace, label_selector=selector, _request_timeout=REQUEST_TIMEOUT_S)
            found = await self._json(answer, verb="list", kind=kind)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _unreachable(error) from error
        return list(found["items"]), found["metadata"]["resourceVersion"]

    async def watch(self, kind: Kind, *, selector: str, version: str) -> AsyncGenerator[tuple[str, Json], None]:
        """Type and object of every change after `version`, for `WATCH_S` seconds at most. Raises Expired as well."""
        try:
            answer = await self._lister(kind)(
                self.namespace,
                label_selector=selector,
                resource_version=version,
                watch=True,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_S,
                _request_timeout=WATCH_S + REQUEST_TIMEOUT_S,
            )
            try:
                if answer.status != 200:
                    await self._json(answer, verb="watch", kind=kind)
                async for line in answer.content:
                    yield self._event(json.loads(line), kind=kind)
            finally:
                answer.close()
        except (aiohttp.ClientError, TimeoutError, OSError, json.JSONDecodeError) as error:
            raise _unreachable(error) from error

    def _event(self, event: Json, *, kind: Kind) -> tuple[str, Json]:
        if event["type"] == "ERROR":
            status = cast("Json", event["object"])
            raise self._translated(ApiException(status=status.get("code", 500), body=json.dumps(status)), verb="watch", kind=kind)
        return event["type"], event["object"]

    def _lister(self, kind: Kind) -> Any:
        api = self._batch.list_namespaced_job_without_preload_content
        return api if kind == "jobs" else self._core.list_namespaced_pod_without_preload_content

    async def _json(self, answer: aiohttp.ClientResponse, *, verb: str, kind: Kind) -> Json:
        text = await answer.text()
        if answer.status >= 400:
            raise self._translated(ApiException(status=answer.status, reason=answer.reason, body=text), verb=verb, kind=kind)
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UnavailableError(f"What answers as the Kubernetes API server sends no JSON: {text[:100]!r}.") from error

    def _translated(self, error: ApiException, *, verb: str, kind: Kind) -> FineryError | Expired:
        said = _message(error)
        if error.status == 410:
            return Expired(said)
        if error.status in (401, 403):
            return PermissionDeniedError(
                f"The trainer may not {verb} {kind} in namespace {self.namespace}: {said} "
                f"The Role of its service account must grant the verb {verb} on {kind}, and no policy may refuse it."
            )
        # Whatever keeps Jobs and pods from being seen or removed is no fault of the job that is to be started.
        if verb == "create" and error.status in (400, 422):
            return FailedPreconditionError(f"The Kubernetes API server refuses to {verb} {kind} in namespace {self.namespace}: {said}")
        return UnavailableError(f"The Kubernetes API server cannot {verb} {kind} for now ({error.status}): {said}")


def _message(error: ApiException) -> str:
    try:
        text = json.loads(error.body or "")["message"]
    except (ValueError, KeyError, TypeError):
        text = error.body or error.reason or "no reason given"
    return f"{str(text).strip().rstrip('.')}."


def _unreachable(error: Exception) -> UnavailableError:
    return UnavailableError(f"The Kubernetes API server cannot be reached: {str(error) or type(error).__name__}.")


def _own_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError as error:
        raise FailedPreconditionError(
            "FINERY_KUBERNETES_NAMESPACE is not set, and this is no pod whose own could be taken; set it to where workers are to run."
        ) from error
