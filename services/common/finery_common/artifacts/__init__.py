"""Immutable artifacts in S3: the only package that talks to the store.

An artifact is a key prefix with a manifest. It exists from the moment its manifest does, and nothing in it is ever written
again. Inside: `manifest` (what is recorded), `store` (reading, listing, deleting), `writer` (publishing), `cache` (local
copies), `download` (URLs for clients), `client` (requests, retries, errors). What the bytes mean is left to the services.

All calls block; async callers use `asyncio.to_thread`, and `put_chunks` for uploads that arrive piecemeal.
"""

from finery_common.artifacts.cache import remove_unfinished
from finery_common.artifacts.client import PUBLIC_ENDPOINT, S3Settings
from finery_common.artifacts.download import DEFAULT_LIFETIME_S, MAX_LIFETIME_S, DownloadUrl
from finery_common.artifacts.manifest import ArtifactKind, ArtifactRef, Manifest, ObjectEntry
from finery_common.artifacts.reader import ObjectReader
from finery_common.artifacts.store import ArtifactStore
from finery_common.artifacts.upload import ObjectUpload, put_chunks
from finery_common.artifacts.writer import ArtifactWriter

__all__ = [
    "DEFAULT_LIFETIME_S",
    "MAX_LIFETIME_S",
    "PUBLIC_ENDPOINT",
    "ArtifactKind",
    "ArtifactRef",
    "ArtifactStore",
    "ArtifactWriter",
    "DownloadUrl",
    "Manifest",
    "ObjectEntry",
    "ObjectReader",
    "ObjectUpload",
    "S3Settings",
    "put_chunks",
    "remove_unfinished",
]
