"""Cross-entropy of hidden states through the head's weight, in tiles; `api` says what is taken, this module only re-exports it."""

from finery_kernels.linear_cross_entropy.api import linear_cross_entropy, linear_cross_entropy_forward_backward

__all__ = ["linear_cross_entropy", "linear_cross_entropy_forward_backward"]
