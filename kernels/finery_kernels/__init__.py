"""Finery's GPU kernels: one package an operation, each with `api` (public), `reference` (plain torch, the oracle) and `triton`.

A CUDA tensor takes the kernel, any other the reference; what an operation does not support raises `UnsupportedError`. Imports torch and
triton, and nothing of the services.
"""
