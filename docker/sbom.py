"""What is installed under the root of an image, as CycloneDX 1.6 in JSON: `sbom.py ROOT --name NAME --version VERSION --output FILE`.

Owns finding Python's distributions and Debian's packages there and naming them by package URLs. It reads files only and runs nothing of
the image. Wheels that bring libraries along (torch, psycopg) are listed as the wheels they are.
"""

# The decorators of cyclonedx hide its constructors' parameters from the type checker.
# pyright: reportCallIssue=false, reportUnknownVariableType=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from email.parser import HeaderParser
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import DisjunctiveLicense
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

_NOT_OF_THE_IMAGE = {"proc", "sys", "dev", "run", "tmp"}


def bill(root: Path, *, name: str, version: str) -> Bom:
    """All that is installed under `root`, as the parts of the image `name`."""
    bom = Bom(components=[*map(_python_component, distributions(root)), *debian_components(root)])
    bom.metadata.component = Component(type=ComponentType.CONTAINER, name=name, version=version, bom_ref=name)
    bom.register_dependency(bom.metadata.component, bom.components)
    return bom


def distributions(root: Path) -> Iterator[Distribution]:
    """Python's, wherever in the image they lie."""
    for folder, names, _ in os.walk(root):
        if Path(folder) == root:
            names[:] = sorted(set(names) - _NOT_OF_THE_IMAGE)
        for name in names:
            if name.endswith((".dist-info", ".egg-info")) and (Path(folder, name) / "METADATA").is_file():
                yield PathDistribution(Path(folder, name))


def _python_component(distribution: Distribution) -> Component:
    name, version = distribution.metadata["Name"], distribution.version
    purl = PackageURL("pypi", name=name.lower().replace("_", "-"), version=version)
    said = distribution.metadata.get("License-Expression") or distribution.metadata.get("License") or ""
    return Component(name=name, version=version, purl=purl, bom_ref=str(purl), licenses=_licenses(said))


def debian_components(root: Path) -> Iterator[Component]:
    """Debian's or Ubuntu's packages, by dpkg's own record."""
    record = root / "var" / "lib" / "dpkg" / "status"
    text = record.read_text(errors="replace") if record.is_file() else ""
    namespace = _os_release(root).get("ID", "debian")
    for paragraph in filter(str.strip, text.split("\n\n")):
        fields = HeaderParser().parsestr(paragraph)
        if fields["Status"] == "install ok installed":
            qualifiers = {"arch": fields["Architecture"]}
            purl = PackageURL("deb", namespace, fields["Package"], fields["Version"], qualifiers)
            yield Component(name=fields["Package"], version=fields["Version"], purl=purl, bom_ref=str(purl))


def _licenses(said: str) -> list[DisjunctiveLicense]:
    """A name as the distribution writes it; some write the whole text, which is no name."""
    return [DisjunctiveLicense(name=said)] if said and "\n" not in said else []


def _os_release(root: Path) -> dict[str, str]:
    file = root / "etc" / "os-release"
    lines = file.read_text().splitlines() if file.is_file() else []
    pairs = (line.partition("=") for line in lines)
    return {name: value.strip('"') for name, _, value in pairs}


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--version", required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = bill(arguments.root, name=arguments.name, version=arguments.version)
    arguments.output.write_text(JsonV1Dot6(found).output_as_string(indent=1))


if __name__ == "__main__":
    main()
