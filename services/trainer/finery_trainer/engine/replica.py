"""One of several replicas besides the first: `python -m finery_trainer.engine.replica <descriptor>`, started by `distributed`.

The inherited descriptor is one end of a `multiprocessing.Pipe`: it brings a Task, then an Action after every step; back go `distributed`'s
words or an exception.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import traceback
from multiprocessing.connection import Connection

from finery_common.telemetry import configure_logging
from finery_trainer.engine import distributed

_DELAY_S = 2.0


def main(descriptor: int) -> int:
    """The process; answers its exit status."""
    from transformers.utils import logging as transformers_logging

    configure_logging("trainer-worker", level=os.environ.get("FINERY_LOG_LEVEL", "INFO"))
    transformers_logging.disable_progress_bar()
    with Connection(descriptor) as connection:
        try:
            distributed.follow(connection.recv(), connection)
        except Exception as error:  # noqa: BLE001 - whatever it is, the first replica must learn of it
            if isinstance(error, distributed.ReplicaLostError):
                # A consequence. The first replica, which ends this one, is to see the cause first.
                time.sleep(_DELAY_S)
            connection.send(_sendable(error))
            return 1
        connection.send(distributed.DONE)
    return 0


def _sendable(error: Exception) -> Exception:
    """`error` with where it happened, or one that says the same, where that cannot be made again elsewhere."""
    error.add_note(f"In another replica's process:\n{''.join(traceback.format_tb(error.__traceback__))}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - its own
    except Exception:  # noqa: BLE001 - an exception's own pickling may raise anything
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
