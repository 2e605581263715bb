"""The tree and its configuration agree: a package that exists is installed, linted and under the import rules."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
STUBS = Path("protos/gen/finery")


def _packages() -> list[Path]:
    """Every package of ours, relative to the root: the stubs, the libraries, the services, the kernels."""
    found = [
        path.parent.relative_to(ROOT)
        for pattern in ("services/*/finery_*", "kernels/finery_*")
        for path in ROOT.glob(f"{pattern}/__init__.py")
    ]
    return [STUBS, *sorted(found)]


def test_every_package_is_in_the_wheel_and_in_an_editable_install():
    wheel = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {Path(folder) for folder in wheel["packages"]} == set(_packages())
    assert {Path(folder) for folder in wheel["dev-mode-dirs"]} == {package.parent for package in _packages()}


def test_every_package_is_under_the_import_rules():
    assert set(PYPROJECT["tool"]["importlinter"]["root_packages"]) == {package.name for package in _packages()}


def test_the_type_checker_finds_every_package():
    shared = {Path("tests"), Path("services/gateway/benchmarks")}
    assert {Path(folder) for folder in PYPROJECT["tool"]["pyright"]["extraPaths"]} == {package.parent for package in _packages()} | shared


def test_every_services_tests_are_checked_as_tests():
    environments = {environment["root"] for environment in PYPROJECT["tool"]["pyright"]["executionEnvironments"]}
    assert {str(path.relative_to(ROOT)) for path in ROOT.glob("services/*/tests")} <= environments


def test_test_files_have_names_of_their_own():
    names = [path.name for folder in ("services", "tests", "kernels") for path in (ROOT / folder).rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}


def test_pins_are_exact_and_name_no_index():
    for path in ROOT.glob("constraints*.txt"):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines
        assert all(line.count("==") == 1 and "://" not in line and not line.startswith("-") for line in lines), path.name
