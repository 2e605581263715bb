"""What an artifact records about itself, and which keys it may live under.

Owns the manifest's fields, its deterministic bytes and digest, and the checks on prefixes and object names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from finery_common.errors import DataLossError, InvalidArgumentError

ArtifactKind = Literal["file", "dataset", "checkpoint", "adapter", "model", "metrics"]

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 16 << 20
"""Some 100,000 objects."""

_SEGMENT = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}"
_PREFIX = re.compile(
    rf"projects/{_SEGMENT}/"
    rf"(?:(?:files|datasets|adapters|models)/{_SEGMENT}|runs/{_SEGMENT}/(?:checkpoints/{_SEGMENT}|metrics))/"
)
_OBJECT_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")
_MAX_REASON = 500
_SHA256 = r"^[0-9a-f]{64}$"
_FOLDER = r"objects/[0-9a-f]{32}/"
_OBJECT_KEY = re.compile(rf"(?P<prefix>projects/.+?/){_FOLDER}.+")


class ObjectEntry(BaseModel):
    """One object of an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Relative to the artifact, with `/` between parts."""
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)


class ArtifactRef(BaseModel):
    """Where a published artifact lies and what its manifest hashes to: enough to fetch exactly these bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str
    manifest_sha256: str = Field(pattern=_SHA256)
    kind: ArtifactKind
    size_bytes: int = Field(ge=0)
    """Sum over the objects, without the manifest."""


class Manifest(BaseModel):
    """Everything readers trust about an artifact. Its digest is the SHA-256 of `to_bytes()`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    kind: ArtifactKind
    folder: str = Field(pattern=rf"^{_FOLDER}$")
    """Where the objects lie below the prefix. Every writer has a folder of its own, so no attempt can touch another's bytes."""
    objects: tuple[ObjectEntry, ...]
    """Sorted by name."""
    made_from: dict[str, str]
    """Role -> digest or reference of what went in, such as `dataset` and `base_model`."""
    spec: dict[str, JsonValue]
    """The full specification of the work that made it."""
    attempt: str
    """The attempt that made it."""
    metadata: dict[str, JsonValue]
    """Facts for readers that no later step depends on for correctness, such as an upload's file name."""
    created_at: datetime
    """UTC."""

    def to_bytes(self) -> bytes:
        """JSON with sorted keys and no spare white space: the same manifest gives the same bytes."""
        content = self.model_dump(mode="json")
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Sum over the objects."""
        return sum(entry.size_bytes for entry in self.objects)

    def entry(self, name: str) -> ObjectEntry | None:
        """The object called `name`, or None."""
        return next((entry for entry in self.objects if entry.name == name), None)

    def ref(self, prefix: str) -> ArtifactRef:
        return ArtifactRef(prefix=prefix, manifest_sha256=self.sha256, kind=self.kind, size_bytes=self.size_bytes)


def parse_manifest(data: bytes, *, key: str) -> Manifest:
    """Reads a manifest's bytes. Raises DataLossError where they are not one."""
    try:
        manifest = Manifest.model_validate_json(data)
        _check_names([check_object_name(entry.name) for entry in manifest.objects])
    except (ValidationError, InvalidArgumentError) as error:
        reason = str(error)[:_MAX_REASON]
        message = f"{key} is not a manifest of schema version {SCHEMA_VERSION}: {reason}. Restore it or delete the artifact."
        raise DataLossError(message) from error
    return manifest


def _check_names(names: Sequence[str]) -> None:
    """Raises InvalidArgumentError where two objects cannot be files of one folder."""
    files = set(names)
    if len(files) < len(names):
        raise InvalidArgumentError("object names: two objects have one name")
    for name in names:
        if parent := next((str(path) for path in PurePosixPath(name).parents if str(path) in files), None):
            raise InvalidArgumentError(f"object names: {parent!r} is a file and a folder")


def check_prefix(prefix: str) -> str:
    """Returns `prefix` if it may hold an artifact. Raises InvalidArgumentError: a shorter one would let a delete reach siblings."""
    if not _PREFIX.fullmatch(prefix):
        raise InvalidArgumentError(
            f"artifact prefix: got {prefix!r}, wanted projects/<project>/<files|datasets|adapters|models>/<id>/, "
            "projects/<project>/runs/<job>/checkpoints/<step>/ or projects/<project>/runs/<job>/metrics/"
        )
    return prefix


def check_object_name(name: str) -> str:
    """Returns `name` if it is a safe relative path. Raises InvalidArgumentError."""
    if not _OBJECT_NAME.fullmatch(name):
        raise InvalidArgumentError(
            f"object name: got {name[:_MAX_REASON]!r}, wanted up to 8 parts of letters, digits, '.', '_' and '-', "
            "joined by '/', none beginning with '.'"
        )
    return name


def artifact_prefix_of(key: str) -> str | None:
    """The artifact that `key` belongs to, or None for a foreign key."""
    if match := _OBJECT_KEY.fullmatch(key):
        return match["prefix"]
    prefix, slash, name = key.rpartition("/")
    return prefix + slash if name == MANIFEST_NAME and _PREFIX.fullmatch(prefix + slash) else None
