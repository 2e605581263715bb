"""The training engine: tensors and specs in, trained weights out; no gRPC, no S3, no database.

    model = engine.load(spec, base_dir)
    outcome = engine.loop.train(model, data, spec, on_step)

`model` loads and adapts, `data` reads shards, `loop` drives, `distributed` on several GPUs, `preference` on pairs, `optim` steps,
`checkpoint` saves everything that a run needs to go on, `adapter` writes what serving reads, `full_model` what is trained whole.
"""

from finery_trainer.engine import adapter, checkpoint, data, distributed, full_model, loop, optim, preference, stack
from finery_trainer.engine.model import load, precision_of

__all__ = ["adapter", "checkpoint", "data", "distributed", "full_model", "load", "loop", "optim", "precision_of", "preference", "stack"]
