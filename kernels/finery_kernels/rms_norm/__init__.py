"""RMSNorm with the residual add before it, forward and backward: `api` is public, `reference` plain torch, `triton` the kernel."""

from finery_kernels.rms_norm.api import add_rms_norm, rms_norm, rms_norm_backward, rms_norm_forward

__all__ = ["add_rms_norm", "rms_norm", "rms_norm_backward", "rms_norm_forward"]
