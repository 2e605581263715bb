"""Filling a folder with base models once, for all who read it, and waiting for one: what a cluster's Job and pods run.

    python -m finery_common.base_weights fill SOURCES.yaml FOLDER
    python -m finery_common.base_weights wait FOLDER/NAME [--timeout-s 7200]

Owns the sources file, and that a model's folder appears at once, whole and with the digest it must have. Where a model's files come from
is the catalogue's.

    models:
      - name: Llama-3.1-8B-Instruct
        hub_id: org/name          # or s3_prefix; with neither, the folder has to be there already
        sha256: 3f…               # what `folder_sha256` must give; printed where it is not named
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finery_common.artifacts import ArtifactStore
from finery_common.catalogue import BaseModelEntry, check_folder, folder_sha256, materialize
from finery_common.errors import DataLossError, DeadlineExceededError, FailedPreconditionError, FineryError
from finery_common.settings import ServiceSettings
from finery_common.telemetry import configure_logging

_POLL_S = 2.0
_LENGTH = 8  # The catalogue's smallest: how long rows may be is nothing to whoever copies files.

log = structlog.get_logger(__name__)


class Source(BaseModel):
    """Where one model comes from, and its digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    hub_id: str | None = None
    s3_prefix: str | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @property
    def entry(self) -> BaseModelEntry | None:
        """As the catalogue fetches it; None where nothing is to be fetched."""
        if self.hub_id is None and self.s3_prefix is None:
            return None
        return BaseModelEntry(name=self.name, hub_id=self.hub_id, s3_prefix=self.s3_prefix, max_sequence_length=_LENGTH)


class _SourcesFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[Source, ...]


def read_sources(path: Path) -> tuple[Source, ...]:
    """The sources file. Raises FailedPreconditionError that says what is wrong with it."""
    try:
        sources = _SourcesFile.model_validate(cast("object", yaml.safe_load(path.read_text()))).models
        for source in sources:
            _ = source.entry
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise FailedPreconditionError(f"The sources {path} cannot be used: {error}") from error
    return sources


def fill(sources: Sequence[Source], folder: Path, *, store: ArtifactStore | None) -> None:
    """Brings every model into `folder`, which other processes may fill as well. Blocks.

    Raises DataLossError for a digest that is another one, and what `materialize` raises.
    """
    for source in sources:
        target = folder / source.name
        if not target.exists() and (entry := source.entry) is not None:
            sha256 = _fetch(source, entry, target, store=store)
        else:
            check_folder(target, name=source.name)
            sha256 = _checked(source, target)
        log.info("base model is there", model=source.name, sha256=sha256)


def wait(folder: Path, *, timeout_s: float) -> None:
    """Waits until `folder` is a whole model. Raises DeadlineExceededError."""
    deadline_s = time.monotonic() + timeout_s
    while not folder.is_dir():
        if time.monotonic() >= deadline_s:
            raise DeadlineExceededError(
                f"{folder} was not there after {timeout_s:.0f} s; look at the log of the Job that fetches base weights."
            )
        time.sleep(_POLL_S)
    check_folder(folder, name=folder.name)


def _fetch(source: Source, entry: BaseModelEntry, target: Path, *, store: ArtifactStore | None) -> str:
    """Next to its place, so that a rename puts it there whole. What a killed run has fetched is there for the next one. Answers the digest.

    Of two at a time one may take the other's files away, which then fails and finds the model when it is run again.
    """
    if entry.s3_prefix is not None and store is None:
        raise FailedPreconditionError(f"{source.name} comes from the object store; set FINERY_S3_ENDPOINT and the keys.")
    staging = target.parent / f".{source.name}.fetching"
    # A hub_id asks no store.
    fetched = materialize(entry, cache_dir=staging / "cache", store=cast("ArtifactStore", store))
    whole = staging / f"whole-{secrets.token_hex(4)}"
    try:
        shutil.copytree(fetched, whole, copy_function=_link, ignore=shutil.ignore_patterns(".*"))
        sha256 = _checked(source, whole)
        # Another run may have been first.
        with contextlib.suppress(OSError):
            whole.rename(target)
        return sha256
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """Large files are not copied where the file system can do without."""
    real = Path(source).resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)


def _checked(source: Source, folder: Path) -> str:
    with tempfile.TemporaryDirectory() as memo:
        sha256 = folder_sha256(folder, memo_dir=Path(memo))
    if source.sha256 is not None and sha256 != source.sha256:
        raise DataLossError(
            f"Base model {source.name}: its files have the SHA-256 {sha256}, wanted {source.sha256}. "
            "Correct the digest where the model was changed on purpose, else remove its folder and fetch it again."
        )
    return sha256


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; answers its exit status."""
    parser = argparse.ArgumentParser(prog="python -m finery_common.base_weights", description="Base models for a whole cluster.")
    commands = parser.add_subparsers(dest="command", required=True)
    filling = commands.add_parser("fill", help="fetch the models that a folder lacks, and check all")
    filling.add_argument("sources", type=Path)
    filling.add_argument("folder", type=Path)
    waiting = commands.add_parser("wait", help="wait until a model's folder is there")
    waiting.add_argument("folder", type=Path)
    waiting.add_argument("--timeout-s", type=float, default=7200.0)
    options = parser.parse_args(arguments)
    configure_logging("base-weights")
    try:
        if options.command == "wait":
            wait(options.folder, timeout_s=options.timeout_s)
        else:
            sources = read_sources(options.sources)
            needs_store = any(source.s3_prefix is not None for source in sources)
            fill(sources, options.folder, store=ArtifactStore.connect(ServiceSettings().s3()) if needs_store else None)
    except FineryError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
