"""4-bit NormalFloat weights in bitsandbytes' layout: dequantization; `api` says what is taken, this module only re-exports it."""

from finery_kernels.nf4.api import Nf4State, dequantize

__all__ = ["Nf4State", "dequantize"]
