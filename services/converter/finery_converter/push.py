"""Pushing a folder to a repository of a Hugging Face Hub, or of anything that speaks its HTTP API.

Owns what is compared, added and removed, and in which order, so that a push can be repeated at any point: bytes go first, one commit
makes them visible, and a repository that has them already gets none. Leaves the protocol to `huggingface_hub`, what failures mean to
`hub_errors`, whose token it is to the settings.

It sets the library up for the whole process: run it in one of its own (`push_process`), which is also how it is cancelled.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finery_common.errors import FailedPreconditionError, InvalidArgumentError
from finery_converter.hub_errors import explained, is_offered_in_vain
from finery_converter.model_card import CARD_NAME, is_ours

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import RepoFile

HUB = "https://huggingface.co"
OnProgress = Callable[[float], None]
_CONNECT_S, _ANSWER_S = 15.0, 300.0
_UPLOADS_AT_A_TIME = 4
_HASHING_SHARE = 0.1
# A model's files in parts, or in one; the index of the parts has the name of the whole.
_PART = re.compile(r"(?P<stem>.+?)(?:-\d{5}-of-\d{5})?\.(?P<kind>safetensors|gguf)(?:\.index\.json)?")


@dataclass(frozen=True)
class Pushed:
    """Where the folder is now."""

    commit: str
    """The commit's hexadecimal id."""
    url: str
    is_new: bool
    """False where the repository had all of it before."""


@dataclass(frozen=True)
class Patience:
    """How often an attempt that failed for a reason that may pass is repeated without a byte more having gone out."""

    attempts: int = 6
    first_wait_s: float = 1.0
    max_wait_s: float = 30.0

    def wait_s(self, failures: int) -> float:
        return min(self.max_wait_s, self.first_wait_s * 2.0 ** (failures - 1))


def push(
    folder: Path,
    repository: str,
    *,
    token: str,
    endpoint: str = HUB,
    revision: str = "main",
    private: bool = True,
    commit_message: str,
    card: str | None = None,
    on_progress: OnProgress = lambda _: None,
    patience: Patience = Patience(),
) -> Pushed:
    """Makes `owner/name` hold what `folder` holds, in one commit on the branch `revision`; both are made where they are missing.

    `card` becomes README.md where neither the folder nor the repository has one of its own. Other files of the repository stay, but for
    parts of a model that is replaced. Repeating a push that ended, or broke off, is safe: what has arrived is not sent again, and the same
    content makes no second commit. `on_progress` gets the share done, 0 to 1.

    Raises InvalidArgumentError for a name that no repository can have, FailedPreconditionError where the token or its rights do not do
    (`hub_token_refused`, `hub_forbidden`, `hub_repository_public`), ResourceExhaustedError for a quota of the Hub's (`hub_quota`) and
    UnavailableError where it stays gone (`hub_unreachable`). No error names a URL that bytes are sent to, or the token.
    """
    _check_repository(repository)
    _set_up_library()
    from huggingface_hub import HfApi

    job = _Push(
        HfApi(endpoint=endpoint.rstrip("/"), token=_checked(token)),
        folder,
        repository,
        revision=revision,
        private=private,
        message=commit_message,
        card=card,
        on_progress=on_progress,
    )
    failures, sent_bytes = 0, 0
    while True:
        try:
            return job.attempt()
        except Exception as error:
            if job.uses_xet and is_offered_in_vain(error, endpoint=job.api.endpoint):
                job.uses_xet = False
                continue
            known, may_pass = explained(error, endpoint=job.api.endpoint, repository=repository)
            if known is None:
                raise
            failures = failures + 1 if job.sent_bytes == sent_bytes else 1
            sent_bytes = job.sent_bytes
            if not may_pass or failures >= patience.attempts:
                # Without the library's error, whose text has the URLs that bytes were sent to: whoever has one can write there.
                raise known from None
        time.sleep(patience.wait_s(failures))


class _Push:
    """One push over all of its attempts."""

    def __init__(
        self,
        api: HfApi,
        folder: Path,
        repository: str,
        *,
        revision: str,
        private: bool,
        message: str,
        card: str | None,
        on_progress: OnProgress,
    ) -> None:
        self.api = api
        self._folder = folder
        self._repository = repository
        self._revision = revision
        self._private = private
        self._message = message
        self._card = card
        self._progress = _Progress(on_progress)
        self.uses_xet = True
        """Until it turns out that the server does not offer it, or offers what does not answer."""

    @property
    def sent_bytes(self) -> int:
        """How far the uploads have got, over all attempts."""
        return self._progress.sent_bytes

    def attempt(self) -> Pushed:
        """Compares, uploads what differs, and commits it. Raises what the library does."""
        head = self._head()
        self.uses_xet = self.uses_xet and self._offers_xet()
        there = self._there(head)
        paths = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        self._progress.start(sum(path.stat().st_size for path in paths))
        with contextlib.ExitStack() as stack:
            additions = list(self._additions(paths, there, stack))
            names = {path.relative_to(self._folder).as_posix() for path in paths}
            additions += self._card_addition(names, there)
            operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions, *_deletions(_outdated(names, there))]
            if not operations:
                return self._done(Pushed(head, f"{self.api.endpoint}/{self._repository}/commit/{head}", is_new=False))
            made = self.api.create_commit(
                self._repository,
                operations,
                commit_message=self._message,
                revision=self._revision,
                # Of two pushes at one time the later finds what the earlier has done, and compares again.
                parent_commit=head or None,
                num_threads=_UPLOADS_AT_A_TIME,
            )
        return self._done(Pushed(made.oid, made.commit_url, is_new=made.oid != head))

    def _done(self, pushed: Pushed) -> Pushed:
        self._progress.finish()
        return pushed

    def _head(self) -> str:
        """The branch's newest commit, empty before the first. Makes repository and branch where they are missing."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        try:
            return self._known_head()
        except RepositoryNotFoundError:
            self.api.create_repo(self._repository, private=self._private, exist_ok=True)
        except RevisionNotFoundError:
            self.api.create_branch(self._repository, branch=self._revision, exist_ok=True)
        try:
            return self._known_head()
        except RevisionNotFoundError:
            self.api.create_branch(self._repository, branch=self._revision, exist_ok=True)
            return self._known_head()

    def _known_head(self) -> str:
        info = self.api.model_info(self._repository, revision=self._revision, timeout=_ANSWER_S)
        if self._private and info.private is False:
            raise FailedPreconditionError(
                f"{self._repository} is public, and the push is to be private; make the repository private on the Hub, push to another "
                "one, or allow it by `private: false`.",
                code="hub_repository_public",
                param="spec.hub.private",
            )
        return info.sha or ""

    def _there(self, head: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        if not head:
            return {}
        tree = self.api.list_repo_tree(self._repository, recursive=True, revision=head)
        return {item.path: item for item in tree if isinstance(item, RepoFile)}

    def _offers_xet(self) -> bool:
        """Whether the server has Xet storage, which the library otherwise takes for granted; else bytes go by Git LFS over HTTP."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        url = f"{self.api.endpoint}/api/models/{self._repository}/xet-write-token/{_quoted(self._revision)}"
        answer = get_session().get(url, headers={"authorization": f"Bearer {self.api.token}"})
        if answer.status_code == 404:
            return False
        hf_raise_for_status(answer)
        return "x-xet-cas-url" in answer.headers

    def _additions(self, paths: Iterable[Path], there: dict[str, RepoFile], stack: contextlib.ExitStack) -> Iterator[CommitOperationAdd]:
        """The files that the repository has not, or has with other content."""
        from huggingface_hub import CommitOperationAdd

        for path in paths:
            name = path.relative_to(self._folder).as_posix()
            if self.uses_xet:
                addition = CommitOperationAdd(name, str(path))
            else:
                # The library sends what it is given open by LFS, and hashes it at once.
                file = stack.enter_context(_CountedFile(path, self._progress))
                addition = CommitOperationAdd(name, file)
                file.is_hashed = True
            if not _is_same(addition, path, there.get(name)):
                yield addition

    def _card_addition(self, names: set[str], there: dict[str, RepoFile]) -> Sequence[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        if self._card is None or CARD_NAME in names:
            return ()
        card = self._card.encode()
        if CARD_NAME in there:
            with tempfile.TemporaryDirectory() as folder:
                path = self.api.hf_hub_download(self._repository, CARD_NAME, revision=self._revision, local_dir=folder)
                present = Path(path).read_bytes()
            if present == card or not is_ours(present.decode(errors="replace")):
                return ()
        return (CommitOperationAdd(CARD_NAME, card),)


class _Progress:
    """Bytes into the share done: a tenth for hashing, the rest for sending. It never goes back."""

    def __init__(self, on_progress: OnProgress) -> None:
        self._on_progress = on_progress
        self._total_bytes = 1
        self._hashed_bytes = 0
        self._sent: dict[Path, int] = {}
        self._share = 0.0

    @property
    def sent_bytes(self) -> int:
        return sum(self._sent.copy().values())

    def start(self, total_bytes: int) -> None:
        self._total_bytes, self._hashed_bytes = max(1, total_bytes), 0

    def hashed(self, num_bytes: int) -> None:
        self._hashed_bytes += num_bytes
        self._say()

    def sent(self, path: Path, position: int) -> None:
        """`path` has been read up to `position`; a file that is sent again counts from where it has been already."""
        self._sent[path] = max(self._sent.get(path, 0), position)
        self._say()

    def finish(self) -> None:
        self._on_progress(1.0)

    def _say(self) -> None:
        hashed, sent = min(1.0, self._hashed_bytes / self._total_bytes), min(1.0, self.sent_bytes / self._total_bytes)
        share = _HASHING_SHARE * hashed + (1 - _HASHING_SHARE) * sent
        if share > self._share:
            self._share = share
            self._on_progress(share)


class _CountedFile(io.BufferedReader):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, progress: _Progress) -> None:
        super().__init__(io.FileIO(path), 1 << 20)
        self._path = path
        self._progress = progress
        self.is_hashed = False
        """What is read from now on is sent."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._count(len(data))
        return data

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        num_bytes = super().readinto(buffer)
        self._count(num_bytes)
        return num_bytes

    def _count(self, num_bytes: int) -> None:
        if self.is_hashed:
            self._progress.sent(self._path, self.tell())
        else:
            self._progress.hashed(num_bytes)


def _is_same(addition: CommitOperationAdd, path: Path, present: RepoFile | None) -> bool:
    """Whether the repository's file has this content; sizes that differ spare the reading."""
    if present is None:
        return False
    size_bytes = path.stat().st_size
    if present.lfs is not None:
        return present.lfs.size == size_bytes and present.lfs.sha256 == addition.upload_info.sha256.hex()
    if present.size != size_bytes:
        return False
    content = path.read_bytes()
    return present.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _outdated(names: set[str], there: Iterable[str]) -> list[str]:
    """Files of the repository that are parts of a model which `names` bring anew: whoever loads it would take them for its own."""
    renewed = {key for name in names if (key := _model_of(name))}
    return sorted(name for name in there if name not in names and _model_of(name) in renewed)


def _model_of(name: str) -> tuple[str, str] | None:
    match = _PART.fullmatch(name)
    return (match["stem"], match["kind"]) if match else None


def _deletions(names: Iterable[str]) -> list[CommitOperationDelete]:
    from huggingface_hub import CommitOperationDelete

    return [CommitOperationDelete(name, is_folder=False) for name in names]


def _check_repository(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        reason = "" if repository.count("/") == 1 else "there is no owner"
    except HFValidationError as error:
        reason = str(error)
    if reason:
        raise InvalidArgumentError(
            f"hub.repository: got {repository[:200]!r}, wanted owner/name of letters, digits, '-', '_' and '.' ({reason})",
            code="hub_repository_invalid",
            param="spec.hub.repository",
        )


def _checked(token: str) -> str:
    """A token that can stand in a header. Its text is in no error."""
    if token and token.isascii() and token.isprintable() and " " not in token:
        return token
    raise FailedPreconditionError(
        "The Hub's token is empty or has white space or other than ASCII within; write the token alone into its secret.",
        code="hub_token_refused",
        param="spec.hub.token",
    )


def _set_up_library() -> None:
    """No bars, no lines that name URLs, and an end to waiting, which the library's own client has not."""
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    disable_progress_bars()
    hub_logging.set_verbosity(logging.CRITICAL)
    set_client_factory(lambda: httpx2.Client(follow_redirects=True, timeout=httpx2.Timeout(_ANSWER_S, connect=_CONNECT_S)))


def _quoted(revision: str) -> str:
    from urllib.parse import quote

    return quote(revision, safe="")
