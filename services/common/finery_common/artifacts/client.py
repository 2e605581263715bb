"""Requests to S3 with retries and our errors.

Owns the connection, the retry policy and the translation of failures. It knows keys and bytes, not artifacts.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Self
from xml.sax.saxutils import escape

import structlog
import urllib3
from minio import Minio
from minio.deleteobjects import DeleteObject
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from pydantic import BaseModel, ConfigDict, Field
from urllib3.connectionpool import ConnectionPool
from urllib3.exceptions import HTTPError, MaxRetryError
from urllib3.response import BaseHTTPResponse
from urllib3.util import Retry, Timeout

from finery_common.artifacts.metrics import ARTIFACT_BYTES, ARTIFACT_FAILURES, STORE_UNAVAILABLE
from finery_common.errors import (
    DataLossError,
    FailedPreconditionError,
    FineryError,
    NotFoundError,
    ResourceExhaustedError,
    UnavailableError,
)
from finery_common.text_forms import text_form

log = structlog.get_logger(__name__)

_URL_LIFETIME = timedelta(hours=1)
_READ_BYTES = 1 << 20
_MISSING = {"NoSuchKey", "NoSuchObject", "ResourceNotFound", "NoSuchUpload"}
_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AuthorizationHeaderMalformed", "RequestTimeTooSkewed"}
# MinIO's disk and bucket quota, Ceph's quota, and 507 of whatever says no more.
_FULL = {"XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "QuotaExceeded", "InsufficientStorage", "507"}


PUBLIC_ENDPOINT = text_form(r"^(https?://[A-Za-z0-9.\-\[\]:]+)?$", "http:// or https:// and a host, with its port where it has one")
"""A scheme, a host and maybe a port: a path would be part of what is signed."""


class S3Settings(BaseModel):
    """Where the store is and how to sign for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    endpoint: str = Field(min_length=1)
    """host:port, without a scheme."""
    access_key: str = Field(min_length=1)
    secret_key: str = Field(min_length=1, repr=False)
    bucket: str = "finery"
    region: str = "us-east-1"
    secure: bool = False
    """HTTPS."""
    public_endpoint: str = Field(default="", pattern=PUBLIC_ENDPOINT)
    """`https://host[:port]` by which clients reach the store; empty where they reach `endpoint`. It only stands in URLs made for them."""
    retry_deadline_s: float = Field(default=60.0, gt=0)
    """How long one request is repeated while the store is gone."""


@dataclass(frozen=True)
class StoredObject:
    """One listed key."""

    key: str
    size_bytes: int
    modified_at: datetime


class _DeadlineRetry(Retry):
    """Repeats while `deadline_s` since the first failure has not passed; answers of 5xx at most `status` times."""

    def __init__(self, *args: object, deadline_s: float = 60.0, first_failure_s: float | None = None, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # pyright: ignore[reportArgumentType]
        self.deadline_s = deadline_s
        self.first_failure_s = first_failure_s

    def new(self, **kw: object) -> Self:
        started_s = time.monotonic() if self.first_failure_s is None else self.first_failure_s
        return super().new(deadline_s=self.deadline_s, first_failure_s=started_s, **kw)

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: BaseHTTPResponse | None = None,
        error: Exception | None = None,
        _pool: ConnectionPool | None = None,
        _stacktrace: TracebackType | None = None,
    ) -> Self:
        if self.first_failure_s is None:
            # A redirect comes here as well.
            if response is None or response.status >= 500:
                reason = type(error).__name__ if response is None else f"HTTP {response.status}"
                log.warning(
                    "the object store does not answer; trying again", host=_pool and _pool.host, reason=reason, for_s=self.deadline_s
                )
        elif time.monotonic() - self.first_failure_s > self.deadline_s:
            return super(_DeadlineRetry, self.new(total=0)).increment(method, url, response, error, _pool, _stacktrace)
        return super().increment(method, url, response, error, _pool, _stacktrace)


class S3Client:
    """One bucket of one store. Safe to share between threads."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self.bucket = settings.bucket
        retries = _DeadlineRetry(
            total=None,
            status=8,
            allowed_methods=None,
            status_forcelist=(500, 502, 503, 504),
            backoff_factor=0.25,
            backoff_max=5.0,
            backoff_jitter=0.25,
            raise_on_status=False,
            deadline_s=settings.retry_deadline_s,
        )
        timeout = Timeout(connect=5.0, read=min(settings.retry_deadline_s, 60.0))
        self._http = urllib3.PoolManager(maxsize=16, retries=retries, timeout=timeout)
        self._minio = Minio(
            settings.endpoint,
            access_key=settings.access_key,
            secret_key=settings.secret_key,
            secure=settings.secure,
            region=settings.region,
            http_client=self._http,
        )
        self._public = self._minio if not settings.public_endpoint else self._signer_for(settings.public_endpoint)

    def _signer_for(self, url: str) -> Minio:
        """Signs for the store under another address; sends nothing, since the region is given."""
        scheme, _, endpoint = url.partition("://")
        return Minio(
            endpoint,
            access_key=self.settings.access_key,
            secret_key=self.settings.secret_key,
            secure=scheme == "https",
            region=self.settings.region,
        )

    def ensure_bucket(self) -> None:
        """Makes the bucket unless it is there."""
        with self.translated("connect"):
            if self._minio.bucket_exists(self.bucket):
                return
            try:
                self._minio.make_bucket(self.bucket, self.settings.region)
            except S3Error as error:
                if error.code not in {"BucketAlreadyOwnedByYou", "BucketAlreadyExists"}:
                    raise

    def put(self, key: str, data: bytes) -> None:
        """Writes one object in one request."""
        with self.translated("put"):
            self._signed("PUT", key, body=data)
        ARTIFACT_BYTES.labels("out").inc(len(data))

    def put_new(self, key: str, data: bytes) -> bool:
        """Writes one object unless the key is taken. False if it is, be it by this very
        request, whose answer was lost and which was then repeated."""
        with self.translated("publish"):
            response = self._signed("PUT", key, body=data, headers={"If-None-Match": "*"}, accept=(412, 409))
        return response.status < 300

    def get(self, key: str, *, max_bytes: int) -> bytes:
        """A small object's bytes, as they are stored. Raises NotFoundError, and DataLossError past `max_bytes`."""
        data = bytearray()
        with self.translated("get"):
            response = self._minio.get_object(self.bucket, key)
            try:
                # An object may claim to be compressed: what it would unpack to knows no bound.
                while chunk := response.read(_READ_BYTES, decode_content=False):
                    data += chunk
                    if len(data) > max_bytes:
                        raise DataLossError(f"{key} is no manifest: it has more than {max_bytes} bytes. Restore it or delete the artifact.")
            finally:
                response.close()
                response.release_conn()
        ARTIFACT_BYTES.labels("in").inc(len(data))
        return bytes(data)

    def open(self, key: str, *, offset: int = 0) -> BaseHTTPResponse:
        """A response to read an object from, from `offset` bytes on. The caller closes it and handles errors of reading."""
        with self.translated("get"):
            return self._minio.get_object(self.bucket, key, offset=offset)

    def download_url(self, key: str, *, lifetime: timedelta, disposition: str) -> str:
        """A URL by which anybody gets the object for `lifetime`, as an attachment. It is as good as a key: never log it."""
        answer: dict[str, str | list[str] | tuple[str]] = {
            "response-content-disposition": disposition,
            "response-content-type": "application/octet-stream",
        }
        return self._public.get_presigned_url("GET", self.bucket, key, expires=lifetime, response_headers=answer)

    def size_bytes(self, key: str) -> int:
        """An object's size. Raises NotFoundError."""
        with self.translated("stat"):
            return self._minio.stat_object(self.bucket, key).size or 0

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """Every object below `prefix`, in key order."""
        with self.translated("list"):
            for item in self._minio.list_objects(self.bucket, prefix=prefix, recursive=True):
                if item.object_name and not item.is_dir:
                    modified_at = item.last_modified or datetime.now(UTC)
                    yield StoredObject(item.object_name, item.size or 0, modified_at)

    def folders(self, prefix: str, *, after: str, limit: int) -> list[str]:
        """At most `limit` names of folders right below `prefix`, in the store's order, from behind the folder `after`."""
        found: list[str] = []
        with self.translated("list"):
            for item in self._minio.list_objects(self.bucket, prefix=prefix, start_after=f"{prefix}{after}/" if after else None):
                name = (item.object_name or "").removeprefix(prefix).rstrip("/")
                # Some stores answer with the folder itself, whose objects are behind its name.
                if item.is_dir and name != after:
                    found.append(name)
                if len(found) == limit:
                    break
        return found

    def remove(self, keys: Sequence[str]) -> None:
        """Removes `keys`; a key that is not there is no error."""
        with self.translated("delete"):
            errors = list(self._minio.remove_objects(self.bucket, [DeleteObject(key) for key in keys]))
        if errors:
            raise UnavailableError(f"{len(errors)} of {len(keys)} objects could not be removed ({errors[0].message}); repeat the delete.")

    def start_multipart(self, key: str) -> str:
        """Begins an upload in parts; returns its id."""
        with self.translated("put"):
            response = self._signed("POST", key, query={"uploads": ""})
        match = re.search(r"<UploadId>([^<]+)</UploadId>", response.data.decode())
        if match is None:
            raise UnavailableError(f"The object store at {self.settings.endpoint} began no multipart upload; repeat the request.")
        return match[1]

    def put_part(self, key: str, *, upload_id: str, number: int, data: bytes) -> str:
        """Uploads part `number` (from 1); returns its ETag."""
        with self.translated("put"):
            response = self._signed("PUT", key, body=data, query={"partNumber": str(number), "uploadId": upload_id})
        ARTIFACT_BYTES.labels("out").inc(len(data))
        return response.headers["ETag"]

    def finish_multipart(self, key: str, *, upload_id: str, etags: Sequence[str], size_bytes: int) -> None:
        """Joins the parts. A repeat after a lost answer finds no upload but the object, and counts as success."""
        parts = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{escape(etag)}</ETag></Part>" for n, etag in enumerate(etags, start=1))
        body = f'<CompleteMultipartUpload xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{parts}</CompleteMultipartUpload>'
        try:
            with self.translated("put"):
                response = self._signed("POST", key, body=body.encode(), query={"uploadId": upload_id})
        except NotFoundError:
            if self.size_bytes(key) != size_bytes:
                raise
            return
        # S3 may send 200 before it knows, and an error in the body.
        if b"<Error>" in response.data:
            raise UnavailableError(f"The object store could not join the parts of {key}: {_error_text(response.data)}. Repeat the upload.")

    def abort_multipart(self, key: str, *, upload_id: str) -> None:
        """Drops an upload's parts; no error if it is gone."""
        with self.translated("delete"):
            self._signed("DELETE", key, query={"uploadId": upload_id}, accept=(404,))

    def abort_stale_multiparts(self, prefix: str, *, before: datetime) -> None:
        """Drops uploads in parts below `prefix` that began before `before`: their writer died."""
        with self.translated("list"):
            # The client library has no public call for it.
            listed = self._minio._list_multipart_uploads(self.bucket, prefix=prefix)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        for upload in listed.uploads:
            if upload.upload_id and upload.initiated_time and upload.initiated_time < before:
                self.abort_multipart(upload.object_name, upload_id=upload.upload_id)

    def _signed(
        self,
        method: str,
        key: str,
        *,
        body: bytes | None = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        accept: Sequence[int] = (),
    ) -> BaseHTTPResponse:
        """One request by a presigned URL: the way to headers and calls that the client library does not offer."""
        url = self._minio.get_presigned_url(method, self.bucket, key, expires=_URL_LIFETIME, extra_query_params=dict(query or {}))
        sent = dict(headers or {})
        if body is not None:
            digest = hashlib.md5(body, usedforsecurity=False).digest()
            sent["Content-MD5"] = base64.b64encode(digest).decode()
        response = self._http.urlopen(method, url, body=body, headers=sent)
        if response.status >= 300 and response.status not in accept:
            raise _answer_error(response, endpoint=self.settings.endpoint, bucket=self.bucket, key=key)
        return response

    @contextmanager
    def translated(self, operation: str) -> Iterator[None]:
        """Turns the client library's failures into ours and counts them."""
        try:
            with self._as_ours(operation):
                yield
        except FineryError as error:
            if not isinstance(error, NotFoundError):
                ARTIFACT_FAILURES.labels(operation).inc()
            if isinstance(error, (UnavailableError, FailedPreconditionError)):
                STORE_UNAVAILABLE.inc()
            raise

    @contextmanager
    def _as_ours(self, operation: str) -> Iterator[None]:
        endpoint, bucket = self.settings.endpoint, self.bucket
        try:
            yield
        except S3Error as error:
            raise _error(error.code or "", error.message or "", endpoint=endpoint, bucket=bucket, key=error.object_name or "") from error
        except (HTTPError, OSError, ServerError, InvalidResponseError) as error:
            cause = _cause(error)
            hint = f" FINERY_S3_SECURE is {str(self.settings.secure).lower()}; it has to be as the store is." if cause == "SSLError" else ""
            raise UnavailableError(
                f"The object store at {endpoint} did not answer for {self.settings.retry_deadline_s:.0f} s ({operation}: {cause}). "
                f"Check that it runs and can be reached, then repeat the request.{hint}"
            ) from error
        except MinioException as error:
            message = f"The object store at {endpoint} failed ({operation}: {type(error).__name__}); repeat the request."
            raise UnavailableError(message) from error


def _cause(error: Exception) -> str:
    """What went wrong, without the URL that urllib3 puts into its messages: a presigned one is as good as a key."""
    reason: BaseException | None = error.reason if isinstance(error, MaxRetryError) else error
    return f"HTTP {error.status_code}" if isinstance(error, ServerError) else type(reason).__name__


def _answer_error(response: BaseHTTPResponse, *, endpoint: str, bucket: str, key: str) -> FineryError:
    match = re.search(rb"<Code>([^<]*)</Code>", response.data)
    code = match[1].decode() if match else {403: "AccessDenied", 404: "NoSuchKey"}.get(response.status, str(response.status))
    return _error(code, _error_text(response.data), endpoint=endpoint, bucket=bucket, key=key)


def _error_text(data: bytes) -> str:
    match = re.search(rb"<Message>([^<]*)</Message>", data)
    return (match[1] if match else data[:200]).decode(errors="replace")


def _error(code: str, message: str, *, endpoint: str, bucket: str, key: str) -> FineryError:
    if code in _MISSING:
        return NotFoundError(f"There is no object {key} in the store.")
    if code == "NoSuchBucket":
        return FailedPreconditionError(f"The object store at {endpoint} has no bucket {bucket}; make it or set FINERY_S3_BUCKET.")
    if code in _REFUSED:
        return FailedPreconditionError(
            f"The object store at {endpoint} refused the keys ({code}: {message}). "
            "Check FINERY_S3_ACCESS_KEY, FINERY_S3_SECRET_KEY, or the files that they are read from, and its policy."
        )
    if code in _FULL:
        return ResourceExhaustedError(
            f"The object store at {endpoint} is full ({code}: {message}), and {key or 'the object'} was not stored. "
            "Make room there, or raise the bucket's quota; then repeat the request.",
            code="disk_full",
        )
    return UnavailableError(
        f"The object store at {endpoint} answered {code}: {message}. If its disk is full make room; then repeat the request."
    )
