"""Short-lived signed tokens between services (JWT, HS256): who calls, for which project, and for a worker which attempt.

Owns signing, reading and the caller of the present request. API keys are the gateway's.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass

import jwt

from finery_common.errors import PermissionDeniedError, UnauthenticatedError

SERVICE_TOKEN_TTL_S = 300.0
METADATA_KEY = "authorization"
_AUDIENCE = "finery"


@dataclass(frozen=True)
class Principal:
    """The caller. `project` is empty for a service acting for itself; `job_id` and `epoch` are set for a worker's attempt."""

    caller: str
    project: str
    job_id: str | None = None
    epoch: int | None = None


_current: ContextVar[Principal] = ContextVar("finery_principal")


class TokenSigner:
    """Makes and reads tokens with the installation's key."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def sign(self, principal: Principal, *, ttl_s: float = SERVICE_TOKEN_TTL_S) -> str:
        """A token for `principal` that expires in `ttl_s` seconds."""
        claims: dict[str, str | int | float] = {"aud": _AUDIENCE, "sub": principal.caller, "project": principal.project}
        claims["exp"] = time.time() + ttl_s
        if principal.job_id is not None and principal.epoch is not None:
            claims |= {"job_id": principal.job_id, "epoch": principal.epoch}
        return jwt.encode(claims, self._secret, algorithm="HS256")

    def read(self, token: str) -> Principal:
        """The principal that `token` names. Raises UnauthenticatedError where it is expired or not ours."""
        try:
            claims = jwt.decode(token, self._secret, algorithms=["HS256"], audience=_AUDIENCE, options={"require": ["exp", "sub"]})
        except jwt.ExpiredSignatureError as error:
            raise UnauthenticatedError("The token has expired; get a new one.") from error
        except jwt.InvalidTokenError as error:
            raise UnauthenticatedError("The token is not one of this installation's; send `authorization: Bearer <token>`.") from error
        return Principal(claims["sub"], claims.get("project", ""), claims.get("job_id"), claims.get("epoch"))


def set_principal(principal: Principal) -> None:
    """Binds the caller of the present request; the server's interceptor does it."""
    _current.set(principal)


def current_principal() -> Principal:
    """The caller of the present request."""
    try:
        return _current.get()
    except LookupError as error:
        raise UnauthenticatedError("No credentials; send `authorization: Bearer <token>`.") from error


def require_project() -> str:
    """The project of the present request. Raises PermissionDeniedError where its caller has none, or is a worker."""
    principal = current_principal()
    if not principal.project or principal.job_id is not None:
        raise PermissionDeniedError("These credentials name no project.")
    return principal.project


def require_attempt() -> tuple[str, str, int]:
    """(project, job id, epoch) of the worker calling. Raises PermissionDeniedError for anybody else."""
    principal = current_principal()
    if principal.job_id is None or principal.epoch is None:
        raise PermissionDeniedError("Only a worker's attempt may call this.")
    return principal.project, principal.job_id, principal.epoch
