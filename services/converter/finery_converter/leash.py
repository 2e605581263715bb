"""Processes that die with the one that started them, even when that one is killed -9.

    python -m finery_converter.leash <parent's pid> <program> <argument>…

binds itself to its parent and becomes the program. Linux only (prctl); owns nothing else. The kernel looks at the thread that started
the child: start leashed children from the main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def leashed(command: Sequence[str]) -> list[str]:
    """`command` as a child of this process that dies with it."""
    return [sys.executable, "-m", "finery_converter.leash", str(os.getpid()), *command]


def main(parent_pid: int, command: Sequence[str]) -> None:
    """Becomes `command`, to be killed by the kernel when the parent ends; ends at once where it has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == parent_pid:
        os.execvp(command[0], list(command))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
    sys.exit("the parent had ended before this process was bound to it")
