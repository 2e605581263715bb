"""This machine's SeaweedFS, PostgreSQL and Prometheus in the places of the images that compose.yaml names beside ours.

Owns what those images do for themselves: users, folders, a first start that makes a database or takes the keys, programs of their checks.
"""

from __future__ import annotations

import os
import pwd
import signal
import sys
from pathlib import Path

from images.compose_host import Substitute

_NOBODY = 65534
POSTGRES = """
[ -s "$PGDATA/PG_VERSION" ] || {
    initdb --pgdata="$PGDATA" --username="$POSTGRES_USER" --pwfile="$POSTGRES_PASSWORD_FILE" --encoding=UTF8 $POSTGRES_INITDB_ARGS
    echo "CREATE DATABASE $POSTGRES_DB" | postgres --single -D "$PGDATA" postgres
    echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
    printf "listen_addresses='*'\\nunix_socket_directories='/tmp'\\nfsync=off\\n" >>"$PGDATA/postgresql.conf"
}
exec "$@"
"""
STORE = """
keys="{\\"accessKey\\": \\"$(cat "$MINIO_ROOT_USER_FILE")\\", \\"secretKey\\": \\"$(cat "$MINIO_ROOT_PASSWORD_FILE")\\"}"
echo "{\\"identities\\": [{\\"name\\": \\"root\\", \\"credentials\\": [$keys], \\"actions\\": [\\"Admin\\"]}]}" >/tmp/s3.json
exec weed -logtostderr=true server -dir="$2" -ip=127.0.0.1 -ip.bind=0.0.0.0 -master.peers=none -master.telemetry=false \
    -master.volumeSizeLimitMB=1024 -volume.max=100 -volume.minFreeSpace=256MiB -volume.preStopSeconds=0 \
    -s3 -s3.port=9000 -s3.config=/tmp/s3.json
"""
STORE_CHECK = "#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/9000\n"


def postgres(root: Path) -> Substitute:
    """Runs what its image's entry point would."""
    user = pwd.getpwnam("postgres")
    _folder(root / "var/lib/postgresql/data", user.pw_uid, user.pw_gid)
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda folder: int(folder.parent.name))
    environment = [f"PATH={programs}:/usr/bin:/bin", "PGDATA=/var/lib/postgresql/data"]
    config = _config(f"{user.pw_uid}:{user.pw_gid}", ["sh", "-euc", POSTGRES, "postgres"], environment)
    return Substitute("postgres", root, config | {"StopSignal": signal.SIGINT})


def store(root: Path) -> Substitute:
    """SeaweedFS's S3 at MinIO's port, and an `mc` that only knows whether it is there."""
    programs = _folder(root / "usr/local/bin", 0, 0)
    (programs / "weed").symlink_to(Path(sys.executable).with_name("weed"))
    (programs / "mc").write_text(STORE_CHECK)
    (programs / "mc").chmod(0o755)
    # It waits for itself when it is told to end; nothing is lost when it is not asked.
    return Substitute("minio", root, _config("0:0", ["sh", "-euc", STORE, "minio"]) | {"StopSignal": signal.SIGKILL})


def prometheus(root: Path) -> Substitute:
    """Debian's."""
    _folder(root / "prometheus", _NOBODY, _NOBODY)
    return Substitute("prometheus", root, _config(f"{_NOBODY}:{_NOBODY}", ["prometheus"]))


def _folder(path: Path, uid: int, gid: int) -> Path:
    path.mkdir(parents=True)
    os.chown(path, uid, gid)
    return path


def _config(user: str, entry: list[str], environment: list[str] | None = None) -> dict[str, object]:
    return {"User": user, "Entrypoint": entry, "WorkingDir": "/", "Env": environment or ["PATH=/usr/local/bin:/usr/bin:/bin"]}
