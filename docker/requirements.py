"""What one image installs: `requirements.py [--override FILE] EXTRA…`, run in the build stage beside pyproject.toml and constraints.txt.

Owns which lines of those files hold for the image, and writes them to `build/requirements.txt` and `build/constraints.txt`. Installing is
pip's part. Only Python's own modules are imported: nothing is installed yet when this runs.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path


def requirements(pyproject: str, extras: Sequence[str]) -> list[str]:
    """What `finery[extras]` needs, less finery. Raises KeyError for an extra that there is not."""
    project = tomllib.loads(pyproject)["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def constraints(text: str, *, override: str = "") -> list[str]:
    """The pins of `text`; those of `override` replace the ones of the same distribution."""
    pins = {_distribution(line): line for line in (*text.splitlines(), *override.splitlines()) if line and not line.startswith("#")}
    return list(pins.values())


def _distribution(pin: str) -> str:
    """`pydantic_core==2.50.4` -> `pydantic-core`: one name for all the ways to write it."""
    return re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower()


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="+", metavar="EXTRA")
    parser.add_argument("--override", type=Path, help="constraints that win over those of constraints.txt")
    arguments = parser.parse_args()
    override = arguments.override.read_text() if arguments.override else ""
    build = Path("build")
    build.mkdir(exist_ok=True)
    needed = requirements(Path("pyproject.toml").read_text(), arguments.extras)
    (build / "requirements.txt").write_text("\n".join(needed) + "\n")
    (build / "constraints.txt").write_text("\n".join(constraints(Path("constraints.txt").read_text(), override=override)) + "\n")


if __name__ == "__main__":
    main()
