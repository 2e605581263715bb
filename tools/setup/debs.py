"""Single files out of Debian packages, without root: nothing is installed, the package is only unpacked.

A fresh Debian or Ubuntu has neither pip for Python (it is in python3-pip-whl) nor libnuma, which vLLM's CPU kernels link.
`apt-get` downloads into a folder of ours with package lists of ours, so that it needs no rights and touches no state.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

from commands import Reporter, SetupError

_lock = threading.Lock()


def unpack(package: str, *, tools_dir: Path, reporter: Reporter) -> Path:
    """Downloads `package` and unpacks it below `tools_dir`; returns the folder that stands for `/`.

    Raises SetupError where there is no apt-get or it has no such package.
    """
    with _lock:
        return _unpack(package, tools_dir=tools_dir, reporter=reporter)


def _unpack(package: str, *, tools_dir: Path, reporter: Reporter) -> Path:
    target = tools_dir / "debs" / package
    if (target / "usr").is_dir():
        return target
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SetupError(f"The file wanted is in Debian's package {package}, and there is no apt-get here: install its counterpart.")
    state_dir = tools_dir / "debs" / "apt"
    download_dir = state_dir / "downloads" / package
    for folder in (state_dir / "lists" / "partial", state_dir / "cache" / "archives" / "partial", download_dir):
        folder.mkdir(parents=True, exist_ok=True)
    options = ["-o", f"Dir::State::lists={state_dir / 'lists'}", "-o", f"Dir::Cache={state_dir / 'cache'}"]
    # Without this apt drops to user _apt, who may not write into a home.
    options += ["-o", "APT::Sandbox::User="]
    reporter.run("package lists of this system", ["apt-get", *options, "-q", "update"])
    reporter.run(
        f"{package} downloaded", ["sh", "-c", 'cd "$0" && exec apt-get "$@"', str(download_dir), *options, "-q", "download", package]
    )
    deb = next(iter(download_dir.glob("*.deb")), None)
    if deb is None:
        raise SetupError(f"apt-get downloaded no {package}; see the log, or ask an administrator: apt-get install {package}")
    reporter.run(f"{package} unpacked", ["dpkg-deb", "--extract", str(deb), str(target)])
    return target
