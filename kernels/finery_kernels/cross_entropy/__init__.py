"""Cross-entropy over a vocabulary, its gradient taken in the same call; `api` says what is taken, this module only re-exports it."""

from finery_kernels.cross_entropy.api import cross_entropy, cross_entropy_forward_backward_

__all__ = ["cross_entropy", "cross_entropy_forward_backward_"]
