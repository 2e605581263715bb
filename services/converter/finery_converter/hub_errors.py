"""What goes wrong with a Hub, in our words: which error it is, and whether trying again may help.

Owns that, and that no text names a URL that bytes are sent to: whoever has one can write there.
"""

from __future__ import annotations

import httpx2
from huggingface_hub.errors import HfHubHTTPError

from finery_common.errors import (
    FailedPreconditionError,
    FineryError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)

_MAX_REASON = 300
_PASSES = {408, 409, 412, 429}
_QUOTA = {402, 413, 507}


def explained(error: Exception, *, endpoint: str, repository: str) -> tuple[FineryError | None, bool]:
    """`error` of a call to the Hub at `endpoint` as one of ours, and whether it may pass. None for one that is not the Hub's doing."""
    cause = _cause(error)
    if isinstance(cause, FineryError):
        return cause, False
    if isinstance(cause, HfHubHTTPError):
        return _answered(cause, endpoint=endpoint, repository=repository)
    if isinstance(cause, httpx2.HTTPError):
        text = (
            f"The Hub at {endpoint} cannot be reached ({type(cause).__name__}). Check FINERY_HUB_ENDPOINT and the network; then push again."
        )
        return UnavailableError(text, code="hub_unreachable"), True
    if isinstance(cause, ValueError):
        text = f"The server at {endpoint} does not answer as a Hugging Face Hub does ({_short(str(cause))}); check FINERY_HUB_ENDPOINT."
        return FailedPreconditionError(text, code="hub_refused"), False
    return None, False


def is_offered_in_vain(error: Exception, *, endpoint: str) -> bool:
    """Whether `error` is of Xet storage that the Hub offers and that does not take the bytes; Git LFS may."""
    cause = _cause(error)
    if isinstance(cause, (FineryError, ValueError)):
        return False
    if isinstance(cause, HfHubHTTPError):
        return not _is_of_hub(cause, endpoint)
    return not isinstance(cause, (httpx2.HTTPError, MemoryError)) and type(cause).__module__.startswith(("hf_xet", "builtins"))


def _answered(error: HfHubHTTPError, *, endpoint: str, repository: str) -> tuple[FineryError, bool]:
    status = error.response.status_code
    if not _is_of_hub(error, endpoint):
        text = f"The storage behind the Hub at {endpoint} answered HTTP {status} to an upload; push again."
        if status in _QUOTA:
            return ResourceExhaustedError(text, code="hub_quota"), False
        # A URL that has run out is refused, and the next attempt asks for another.
        return UnavailableError(text, code="hub_unreachable"), True
    said = f"HTTP {status}: {_short(error.server_message or '')}" if error.server_message else f"HTTP {status}"
    if status >= 500 and status not in _QUOTA:
        return UnavailableError(f"The Hub at {endpoint} fails ({said}); push again later.", code="hub_unreachable"), True
    if status in _PASSES:
        return UnavailableError(f"The Hub at {endpoint} asks to wait ({said}); push again later.", code="hub_unreachable"), True
    if status in _QUOTA or _is_about_room(error.server_message or ""):
        text = f"The Hub at {endpoint} has no room for {repository} ({said}); free some of the owner's storage there, or raise its limit."
        return ResourceExhaustedError(text, code="hub_quota"), False
    return _refused(status, said, endpoint=endpoint, repository=repository), False


def _refused(status: int, said: str, *, endpoint: str, repository: str) -> FineryError:
    if status == 401:
        text = f"The Hub at {endpoint} refused the token ({said}). Put one that is valid, and may write to {repository}, into its secret."
        return FailedPreconditionError(text, code="hub_token_refused", param="spec.hub.token")
    if status in (403, 404):
        text = (
            f"The Hub at {endpoint} does not let the token write to {repository} ({said}). Check the owner's name, and that the token has "
            "the right to write there, or to make repositories there where it is new."
        )
        return FailedPreconditionError(text, code="hub_forbidden", param="spec.hub.repository")
    if status == 400:
        return InvalidArgumentError(
            f"The Hub at {endpoint} refused what was pushed to {repository} ({said}).", code="hub_refused", param="spec.hub"
        )
    return FailedPreconditionError(f"The Hub at {endpoint} refused the push to {repository} ({said}).", code="hub_refused")


def _is_of_hub(error: HfHubHTTPError, endpoint: str) -> bool:
    """Whether the Hub itself answered, and not the storage that it sends bytes to."""
    url = str(error.response.url)
    return url.startswith(f"{endpoint}/") and ("/api/" in url or ".git/info/lfs" in url or "/resolve/" in url)


def _is_about_room(text: str) -> bool:
    # Its limit of private storage comes as 403.
    return "storage" in text.lower() and ("limit" in text.lower() or "quota" in text.lower())


def _cause(error: BaseException) -> BaseException:
    """What is behind the RuntimeError that the library wraps around an upload's failure."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _short(text: str) -> str:
    return " ".join(word for word in text.split() if "://" not in word)[:_MAX_REASON]
