"""URLs by which one object is downloaded without a key, straight from the store.

Owns how long they may live and under which name a browser saves the file. Signing is the client's; who may have one is the services'
business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

from finery_common.artifacts.client import S3Client
from finery_common.artifacts.manifest import ObjectEntry
from finery_common.errors import InvalidArgumentError

DEFAULT_LIFETIME_S = 3600
MAX_LIFETIME_S = 7 * 24 * 3600
"""S3 signs for no longer."""


@dataclass(frozen=True)
class DownloadUrl:
    """A URL for one object. Whoever has it can read the object until it ends: it is never logged, and no part of `repr`."""

    url: str = field(repr=False)
    expires_at: datetime
    """UTC."""
    entry: ObjectEntry
    """What comes: size and SHA-256, for the client to check."""


def sign(client: S3Client, *, key: str, entry: ObjectEntry, lifetime_s: int, file_name: str) -> DownloadUrl:
    """A URL for the object `key`. Raises InvalidArgumentError for a lifetime that is not from 1 s to 7 days."""
    if not 1 <= lifetime_s <= MAX_LIFETIME_S:
        raise InvalidArgumentError(f"lifetime_s: got {lifetime_s}, wanted 1 to {MAX_LIFETIME_S} (7 days)", param="lifetime_s")
    lifetime = timedelta(seconds=lifetime_s)
    expires_at = datetime.now(UTC) + lifetime
    return DownloadUrl(client.download_url(key, lifetime=lifetime, disposition=attachment(file_name)), expires_at, entry)


def attachment(file_name: str) -> str:
    """The Content-Disposition that saves under `file_name` (RFC 6266): in ASCII for old clients, and as it is."""
    plain = re.sub(r"[^A-Za-z0-9 ._-]", "_", file_name)
    exact = "" if plain == file_name else f"; filename*=UTF-8''{quote(file_name, safe='')}"
    return f'attachment; filename="{plain}"{exact}'
