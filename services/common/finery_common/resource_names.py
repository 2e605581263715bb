"""Names of resources: `projects/{project}/{collection}/{id}`. Owns their making and parsing."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from finery_common.errors import InvalidArgumentError, NotFoundError

PROJECT = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_RESOURCE_ID = re.compile(r"[A-Za-z0-9._:-]{1,256}")


@dataclass(frozen=True)
class ResourceName:
    """A parsed name; `str()` gives the wire form back."""

    project: str
    collection: str
    id: str

    def __str__(self) -> str:
        return f"projects/{self.project}/{self.collection}/{self.id}"


def parse_name(name: str, *, collection: str, project: str) -> ResourceName:
    """Parses `projects/{project}/{collection}/{id}` for a caller of `project`.

    Raises InvalidArgumentError for a malformed name and NotFoundError for another project's, with the text of a missing one.
    """
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "projects" or parts[2] != collection or not _RESOURCE_ID.fullmatch(parts[3]):
        raise InvalidArgumentError(f"name: got {name!r}, wanted projects/{{project}}/{collection}/{{id}}", param="name")
    if parts[1] != project:
        raise NotFoundError(f"There is no {name} in project {project}; list {collection} to see what there is.", param="name")
    return ResourceName(project, collection, parts[3])


def parse_parent(parent: str, *, project: str) -> str:
    """Parses `projects/{project}`; raises as `parse_name` does."""
    parts = parent.split("/")
    if len(parts) != 2 or parts[0] != "projects" or not PROJECT.fullmatch(parts[1]):
        raise InvalidArgumentError(f"parent: got {parent!r}, wanted projects/{{project}}", param="parent")
    if parts[1] != project:
        raise NotFoundError(f"There is no project {parts[1]} for these credentials, which are for {project}.", param="parent")
    return parts[1]


def is_resource_id(text: str) -> bool:
    """Whether `text` can be the id of anything."""
    return _RESOURCE_ID.fullmatch(text) is not None


def new_id(prefix: str) -> str:
    """A fresh id such as `ftjob-<24 hex>`, for `prefix` `ftjob-`."""
    return prefix + secrets.token_hex(12)


def model_alias(*, base_model: str, project: str, suffix: str, job_id: str, checkpoint_step: int | None = None) -> str:
    """The public name of a job's model, in OpenAI's form `ft:<base>:<project>:<suffix>:<id>[:ckpt-step-<n>]`."""
    alias = f"ft:{base_model}:{project}:{suffix}:{job_id.removeprefix('ftjob-')}"
    return alias if checkpoint_step is None else f"{alias}:ckpt-step-{checkpoint_step}"


def adapter_id(*, job_id: str, step: int) -> str:
    """The id of the adapter that `job_id` published at `step`."""
    return f"{job_id}-{step}"
