"""Benchmarks: one module an operation, `train` for training steps beside other engines, `cpu` for training on a CPU."""
