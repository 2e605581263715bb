"""Processes that end with the one that started them, even when that one is killed -9.

    python leash.py <parent's pid> <signal> <program> <argument>…

binds itself to its parent, to get the signal at the parent's end, and becomes the program. Linux only (prctl); owns nothing else.
The kernel looks at the thread that started the child: start leashed children from the main thread.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def leashed(command: Sequence[str], *, number: signal.Signals = signal.SIGKILL) -> list[str]:
    """`command` as a child of this process that gets the signal `number` when this process ends."""
    # By its path and isolated: the child's environment may be made for the program and know no module of ours.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(number)), *command]


def main(parent_pid: int, number: int, command: Sequence[str]) -> None:
    """Becomes `command`, to be sent signal `number` by the kernel when the parent ends; ends at once where it has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() == parent_pid:
        os.execvp(command[0], list(command))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.exit("the parent had ended before this process was bound to it")
