"""Secrets come from files, and what cannot be read is told by its variable."""

from __future__ import annotations

import psycopg
import pytest

from finery_common.database import Database
from finery_common.errors import FailedPreconditionError
from finery_common.settings import ServiceSettings


async def test_the_databases_password_comes_from_a_file_whatever_is_in_it(postgres_url, tmp_path):
    password = "p@ss/w:rd %?#"
    server, _, name = postgres_url.rpartition("/")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE passfile LOGIN SUPERUSER PASSWORD 'p@ss/w:rd %?#'")
    try:
        (tmp_path / "password").write_text(password + "\n")
        url = f"postgresql://passfile@{server.rpartition('@')[2]}/{name}"
        settings = ServiceSettings(database_url=url, database_password_file=tmp_path / "password")
        database = await Database.open(settings.service_database_url("gateway"), schema="test")
        await database.close()
    finally:
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute("DROP OWNED BY passfile CASCADE")
            connection.execute("DROP ROLE passfile")


@pytest.mark.parametrize("url", ["postgresql://host/database", "postgresql://user:password@host/database"])
def test_a_password_file_beside_a_url_without_a_user_or_with_a_password_is_refused(url, tmp_path):
    (tmp_path / "password").write_text("secret")
    settings = ServiceSettings(database_url=url, database_password_file=tmp_path / "password")
    with pytest.raises(FailedPreconditionError, match="FINERY_DATABASE_URL.*postgresql://user@host/database"):
        settings.service_database_url("gateway")


def test_a_password_file_that_is_not_there_is_named(tmp_path):
    settings = ServiceSettings(database_url="postgresql://user@host/database", database_password_file=tmp_path / "nothing")
    with pytest.raises(FailedPreconditionError, match="FINERY_DATABASE_PASSWORD_FILE: cannot read .*nothing"):
        settings.service_database_url("gateway")


def test_sqlite_needs_no_password(tmp_path):
    settings = ServiceSettings(state_dir=tmp_path, database_password_file=tmp_path / "nothing")
    assert settings.service_database_url("gateway") == f"sqlite+aiosqlite:///{tmp_path}/db/gateway.sqlite"
