"""Options that many commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Where this machine's system keeps everything; default $FINERY_STATE_DIR.")
]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="At most this many.")]
