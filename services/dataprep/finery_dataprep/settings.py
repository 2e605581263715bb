"""What dataprep reads from the environment beyond what every service does."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from finery_common.settings import ServiceSettings


class DataprepSettings(ServiceSettings):
    """Dataprep's settings, prefix FINERY_."""

    dataprep_workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Processes that tokenize one large file; the number of cores where unset."""

    @property
    def scratch_dir(self) -> Path:
        """Uploaded files while they are prepared; this process's own, emptied at start."""
        return self.state_dir / "dataprep"
