"""Settings that every service reads from the environment (prefix FINERY_), once, in its `__main__`.

Owns names, defaults and the reading of secret files; services subclass `ServiceSettings` for what is theirs alone.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from finery_common.artifacts import PUBLIC_ENDPOINT, S3Settings
from finery_common.errors import FailedPreconditionError


def default_state_dir() -> Path:
    """`$XDG_STATE_HOME/finery`, or `~/.local/state/finery`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "finery"


class ServiceSettings(BaseSettings):
    """What a service needs to know to start. A secret comes from its variable or, better, from the file `…_FILE` names."""

    model_config = SettingsConfigDict(env_prefix="FINERY_", frozen=True, extra="ignore", use_attribute_docstrings=True)

    state_dir: Path = Field(default_factory=default_state_dir)
    """Databases, caches and logs of this machine."""
    cache_dir: Path | None = None
    """Content-addressed cache of artifacts; `<state_dir>/cache` where unset."""
    grpc_address: str = "127.0.0.1:0"
    """Where this service listens."""
    metrics_port: int = 0
    """Loopback port of `/metrics`; 0 takes a free one and logs it."""
    metrics_host: str = "127.0.0.1"
    """Address of `/metrics`."""
    database_url: str = ""
    """`postgresql://…` (a schema a service), or empty for SQLite under `<state_dir>/db`."""
    database_password_file: Path | None = None
    """File that holds the password of `database_url`, which then names a user only."""
    s3_endpoint: str = ""
    """host:port of MinIO or any S3."""
    s3_bucket: str = "finery"
    """Made where missing."""
    s3_region: str = "us-east-1"
    """Region of the bucket."""
    s3_secure: bool = False
    """HTTPS to the store."""
    s3_public_endpoint: str = Field(default="", pattern=PUBLIC_ENDPOINT)
    """`https://host[:port]` by which clients reach the store, in download URLs; empty where they reach `s3_endpoint`."""
    s3_access_key: SecretStr | None = None
    """Or `s3_access_key_file`."""
    s3_access_key_file: Path | None = None
    """File that holds the access key."""
    s3_secret_key: SecretStr | None = None
    """Or `s3_secret_key_file`."""
    s3_secret_key_file: Path | None = None
    """File that holds the secret key."""
    token_secret_file: Path | None = None
    """File that holds the key which signs the services' short-lived tokens; the same for all services of an installation."""
    catalogue: Path | None = None
    """YAML file of base models."""
    dataprep_address: str = ""
    """gRPC target of dataprep."""
    trainer_address: str = ""
    """gRPC target of the training service."""
    converter_address: str = ""
    """gRPC target of the converter."""
    serving_address: str = ""
    """gRPC target of serving."""
    vllm_ca_file: Path | None = None
    """PEM certificates of who signs vLLM's, where vLLM listens on a TLS port."""
    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    otlp_endpoint: str = ""
    """`http://host:4317` of an OpenTelemetry collector, for traces; none where empty."""

    @property
    def artifact_cache_dir(self) -> Path:
        return self.cache_dir or self.state_dir / "cache"

    def service_database_url(self, service: str) -> str:
        """The database of `service`: SQLite has a file a service. Raises FailedPreconditionError for an unreadable password file."""
        if not self.database_url:
            return f"sqlite+aiosqlite:///{self.state_dir / 'db' / f'{service}.sqlite'}"
        return self.database_url if self.database_password_file is None else self._database_url_with_password()

    def _database_url_with_password(self) -> str:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        password = secret(None, self.database_password_file, name="FINERY_DATABASE_PASSWORD")
        try:
            url = make_url(self.database_url)
        except ArgumentError:
            # Whoever opens it says what is wrong.
            return self.database_url
        if not url.username or url.password is not None:
            raise FailedPreconditionError(
                "FINERY_DATABASE_URL: with FINERY_DATABASE_PASSWORD_FILE it wants a user and no password, as in postgresql://user@host/database"
            )
        return url.set(password=password).render_as_string(hide_password=False)

    def s3(self) -> S3Settings:
        """Where the artifact store is. Raises FailedPreconditionError where the endpoint or a key is missing."""
        if not self.s3_endpoint:
            raise FailedPreconditionError("FINERY_S3_ENDPOINT is not set; set it to host:port of the object store")
        return S3Settings(
            endpoint=self.s3_endpoint,
            access_key=secret(self.s3_access_key, self.s3_access_key_file, name="FINERY_S3_ACCESS_KEY"),
            secret_key=secret(self.s3_secret_key, self.s3_secret_key_file, name="FINERY_S3_SECRET_KEY"),
            bucket=self.s3_bucket,
            region=self.s3_region,
            secure=self.s3_secure,
            public_endpoint=self.s3_public_endpoint,
        )

    def token_secret(self) -> str:
        """The signing key. Raises FailedPreconditionError where it is missing or too short."""
        value = secret(None, self.token_secret_file, name="FINERY_TOKEN_SECRET")
        if len(value) < 32:
            raise FailedPreconditionError(f"{self.token_secret_file}: got {len(value)} characters, wanted 32 or more of randomness")
        return value


def secret(value: SecretStr | None, file: Path | None, *, name: str) -> str:
    """The secret itself or its file's content. Raises FailedPreconditionError that names the variable to set."""
    if value is not None:
        return value.get_secret_value()
    if file is None:
        raise FailedPreconditionError(f"{name} is not set; set it, or {name}_FILE to a file that holds it")
    try:
        return file.read_text().strip()
    except OSError as error:
        raise FailedPreconditionError(f"{name}_FILE: cannot read {file}: {error.strerror}") from error
