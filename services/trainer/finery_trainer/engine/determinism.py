"""The deterministic mode of what is computed by transformers' and TRL's modules: the same bits in every run.

The engine's own layers need none of it: their kernels are told one by one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from finery_common.errors import FailedPreconditionError
from finery_common.spec import TrainingSpec

_NO_FORM = "does not have a deterministic implementation"
"""What torch says of an operation."""


@contextlib.contextmanager
def deterministic_operations(spec: TrainingSpec, device: torch.device) -> Iterator[None]:
    """On a GPU, where the spec asks for it, only operations that give the same bits in every run; a CPU has no others here.

    Raises FailedPreconditionError where the model needs one that has no such form.
    """
    if device.type == "cpu" or not spec.deterministic:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    # cuBLAS reads it at its first product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if _NO_FORM not in str(error):
            raise
        raise FailedPreconditionError(
            "deterministic: got true, but this model computes with an operation that gives other bits in every run "
            f"({str(error).partition(_NO_FORM)[0].strip()}); leave it out.",
            param="spec.deterministic",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)
