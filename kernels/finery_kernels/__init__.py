"""Finery's GPU kernels: one package an operation, each with `api` (public), `reference` (plain torch, the oracle) and `triton`, but for
`attention`, which dispatches to libraries' kernels, and `lora`, whose products are cuBLAS's.

A CUDA tensor takes the kernel, any other the reference; what an operation does not support raises `UnsupportedError`. Imports torch and
triton, and nothing of the services.
"""
