"""Starts processes and ends them with all that came of them, also what has detached itself, as every job does.

Each line of standard input is JSON, [command, log file]; the answer is the process id. When the input closes, because
the fixture is done or because pytest was killed, everything that is left is killed.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

PR_SET_CHILD_SUBREAPER = 36


def reap(number: int, frame: FrameType | None) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def main() -> None:
    # Whoever loses its parent below this process becomes its child.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, reap)
    for line in sys.stdin:
        command, log = json.loads(line)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        print(process.pid, flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while left := children.read_text().split():
        for child in left:
            os.kill(int(child), signal.SIGKILL)
        os.wait()  # those that it had started are children now


if __name__ == "__main__":
    main()
