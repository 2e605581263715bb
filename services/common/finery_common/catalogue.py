"""Base models: which there are, where their files come from, and what those files hash to.

Owns the catalogue file and local folders of base models in Hugging Face's layout. Loading a model is the engine's and vLLM's
business; making a folder of a GGUF file is the trainer's.

    models:
      - name: SmolLM2-135M-Instruct
        path: /srv/models/smollm2          # or s3_prefix: projects/base/models/smollm2/, or hub_id: org/name
        max_sequence_length: 2048
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from finery_common.artifacts import ArtifactStore
from finery_common.artifacts.manifest import check_prefix
from finery_common.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError, UnavailableError

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model")
# The format's own bound.
_MAX_HEADER_BYTES = 100_000_000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class BaseModelEntry(BaseModel):
    """One base model of the catalogue: a name and exactly one place where its files are."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    # No colon and no slash: names of tuned models are `ft:<base>:<project>:…`.
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    """The name people use."""
    path: Path | None = None
    """A local folder; a relative one counts from the catalogue's."""
    s3_prefix: str | None = None
    """An artifact of kind model in the store."""
    hub_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")
    """A model of the Hugging Face Hub."""
    max_sequence_length: int = Field(ge=8, le=1_048_576)
    """In tokens."""

    @field_validator("s3_prefix")
    @classmethod
    def _is_prefix(cls, value: str | None) -> str | None:
        try:
            return None if value is None else check_prefix(value)
        except InvalidArgumentError as error:
            raise ValueError(error.message) from error

    @model_validator(mode="after")
    def _has_one_place(self) -> Self:
        places = [name for name in ("path", "s3_prefix", "hub_id") if getattr(self, name) is not None]
        if len(places) != 1:
            raise ValueError(f"got {' and '.join(places) or 'none of them'}, wanted one of path, s3_prefix and hub_id")
        return self


class _CatalogueFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[BaseModelEntry, ...]


class Catalogue:
    """The base models of one installation, by name, in the file's order."""

    def __init__(self, entries: Sequence[BaseModelEntry]) -> None:
        self._entries = {entry.name: entry for entry in entries}

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads the catalogue file. Raises FailedPreconditionError that says which entry is wrong."""
        try:
            with path.open() as file:
                content = cast("object", yaml.safe_load(file))
            models = _CatalogueFile.model_validate(content).models
        except OSError as error:
            raise FailedPreconditionError(
                f"Cannot read the catalogue {path}: {error.strerror}; set FINERY_CATALOGUE to a YAML file."
            ) from error
        except yaml.YAMLError as error:
            raise FailedPreconditionError(f"The catalogue {path} is not YAML: {error}") from error
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
            raise FailedPreconditionError(f"The catalogue {path} is wrong: {wrong}") from error
        names = [entry.name for entry in models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise FailedPreconditionError(f"The catalogue {path} names {', '.join(twice)} twice; give each model a name of its own.")
        return cls([_resolved(entry, folder=path.resolve().parent) for entry in models])

    def get(self, name: str) -> BaseModelEntry:
        """The entry called `name`. Raises NotFoundError that lists the names there are."""
        if name not in self._entries:
            known = ", ".join(self._entries) or "none"
            raise NotFoundError(f"There is no base model {name!r}; there are: {known}.", param="model", code="model_not_found")
        return self._entries[name]

    def list(self) -> tuple[BaseModelEntry, ...]:
        """Every entry."""
        return tuple(self._entries.values())


def materialize(entry: BaseModelEntry, *, cache_dir: Path, store: ArtifactStore) -> Path:
    """A local folder with the model in Hugging Face's layout, fetched if need be. Blocks; treat the folder as read-only.

    Raises FailedPreconditionError for a folder without safetensors weights, NotFoundError for a place with nothing there,
    UnavailableError for a store or Hub that cannot be reached.
    """
    if entry.path is not None:
        folder = entry.path
    elif entry.s3_prefix is not None:
        folder = store.fetch(entry.s3_prefix, cache_dir)
    else:
        assert entry.hub_id is not None
        folder = _from_hub(entry.hub_id, cache_dir=cache_dir)
    check_folder(folder, name=entry.name)
    return folder


def read_config(entry: BaseModelEntry, *, cache_dir: Path, store: ArtifactStore) -> dict[str, object]:
    """The model's `config.json`, and nothing else of the model. Blocks. Raises as `materialize` does."""
    try:
        if entry.path is not None:
            text = (entry.path / "config.json").read_text()
        elif entry.s3_prefix is not None:
            with store.open(entry.s3_prefix, "config.json") as file:
                text = file.read().decode()
        else:
            assert entry.hub_id is not None
            text = (_from_hub(entry.hub_id, cache_dir=cache_dir, files=("config.json",)) / "config.json").read_text()
        content = cast("object", json.loads(text))
    except FileNotFoundError as error:
        raise NotFoundError(f"Base model {entry.name}: there is no {error.filename}; correct its place in the catalogue.") from error
    except (OSError, ValueError) as error:
        raise FailedPreconditionError(f"Base model {entry.name}: its config.json cannot be read ({error}); restore the file.") from error
    if not isinstance(content, dict):
        raise FailedPreconditionError(f"Base model {entry.name}: its config.json is no JSON object; restore the file.")
    return cast("dict[str, object]", content)


def check_folder(folder: Path, *, name: str) -> None:
    """Raises unless `folder` is a model whose weights are safetensors: pickled ones run code when they are loaded.

    A folder that is not there is a NotFoundError, any other fault a FailedPreconditionError.
    """
    try:
        _check_files(folder, name=name)
    except PermissionError as error:
        raise FailedPreconditionError(
            f"Base model {name}: {error.filename} may not be read by the user of this process; `chmod -R a+rX` it."
        ) from error


def _check_files(folder: Path, *, name: str) -> None:
    if not folder.is_dir():
        raise NotFoundError(f"Base model {name}: there is no folder {folder}; correct its path in the catalogue.")
    if not (folder / "config.json").is_file():
        raise FailedPreconditionError(f"Base model {name}: {folder} has no config.json, so it is no model in Hugging Face's layout.")
    index = folder / "model.safetensors.index.json"
    wanted = _shards(index, name=name) if index.is_file() else ["model.safetensors"]
    missing = [shard for shard in wanted if not (folder / shard).is_file()]
    if missing:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f" It has {', '.join(pickles)}, but pickled weights are never loaded; convert them to safetensors." if pickles else ""
        raise FailedPreconditionError(f"Base model {name}: {folder} lacks {', '.join(missing[:5])}.{found}")


def tensor_names(folder: Path) -> frozenset[str]:
    """Names of the model's tensors, by its index or the header of its one file; none where those cannot be read. Blocks."""
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            return frozenset(json.loads(index.read_text())["weight_map"])
        with (folder / "model.safetensors").open("rb") as file:
            size_bytes = int.from_bytes(file.read(8), "little")
            return frozenset(json.loads(file.read(min(size_bytes, _MAX_HEADER_BYTES)))) - {"__metadata__"}
    except (OSError, ValueError, KeyError, TypeError):
        return frozenset()


def folder_sha256(folder: Path, *, memo_dir: Path) -> str:
    """SHA-256 over the names and digests of all files below `folder`, hidden ones left out.

    Remembered in `memo_dir` for as long as no file's size or time changes. Raises FailedPreconditionError for no files.
    """
    if remembered := remembered_sha256(folder, memo_dir=memo_dir):
        return remembered
    files = dict(_files(folder))
    if not files:
        raise FailedPreconditionError(f"{folder} has no files to take a digest of.")
    memo = _memo(files, folder=folder, memo_dir=memo_dir)
    lines = "".join(f"{_file_sha256(path)}  {name}\n" for name, path in files.items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    # Files written to meanwhile have another memo, so a mixed digest is never looked up.
    memo_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=memo_dir, delete=False) as file:
        file.write(digest)
    os.replace(file.name, memo)
    return digest


def remembered_sha256(folder: Path, *, memo_dir: Path) -> str | None:
    """What `folder_sha256` gave for the files as they are now, or None where it would have to read them."""
    files = dict(_files(folder))
    memo = _memo(files, folder=folder, memo_dir=memo_dir)
    return memo.read_text() if files and memo.is_file() else None


def _resolved(entry: BaseModelEntry, *, folder: Path) -> BaseModelEntry:
    return entry if entry.path is None else entry.model_copy(update={"path": folder / entry.path.expanduser()})


def _from_hub(hub_id: str, *, cache_dir: Path, files: Sequence[str] = _HUB_FILES) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    except ImportError as error:
        raise FailedPreconditionError(f"Base model {hub_id} needs the package huggingface-hub; install it or use path.") from error
    try:
        return Path(snapshot_download(hub_id, cache_dir=cache_dir / "hub", allow_patterns=list(files)))
    except RepositoryNotFoundError as error:
        raise NotFoundError(f"The Hub has no model {hub_id} for these credentials; correct hub_id or set HF_TOKEN.") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UnavailableError(
            f"Cannot fetch {hub_id} from the Hub ({type(error).__name__}): check the network and HF_HUB_OFFLINE, "
            "or use a local folder as path."
        ) from error


def _shards(index: Path, *, name: str) -> list[str]:
    try:
        content = cast("Mapping[str, Mapping[str, str]]", json.loads(index.read_text()))
        return sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPreconditionError(f"Base model {name}: {index} is no index of safetensors ({error}); restore the file.") from error


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if path.is_file())
    return iter(sorted((name, path) for name, path in found if not any(part.startswith(".") for part in name.split("/"))))


def _memo(files: Mapping[str, Path], *, folder: Path, memo_dir: Path) -> Path:
    stats = [(name, (stat := path.stat()).st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, path in files.items()]
    key = hashlib.sha256(json.dumps([str(folder.resolve()), stats]).encode()).hexdigest()
    return memo_dir / f"{key}.sha256"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
