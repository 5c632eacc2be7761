"""One process at a time writes to a folder; what Windows refuses while another program has a file is tried again."""

import contextlib
import os
import sys
import time


@contextlib.contextmanager
def locked(folder):
    """Makes folder, and keeps other processes that ask from writing to it; if nothing has come, it is removed again.

    The system takes the lock back from a process that dies. Raises OSError.
    """
    path = os.path.join(folder, ".lock")
    while True:
        os.makedirs(folder, exist_ok=True)
        with open(plain_file(path), "ab") as f:
            wait_for_lock(f, folder)
            if not (os.path.exists(path) and os.path.samestat(os.fstat(f.fileno()), os.stat(path))):
                continue  # the process that had the lock has removed it
            try:
                yield
            finally:
                if os.name == "nt":
                    f.close()  # Windows removes no file that is open, here or in another process
                with contextlib.suppress(OSError):
                    os.remove(path)
                    os.rmdir(folder)  # if it is empty
            return


def wait_for_lock(f, folder):
    if not try_lock(f):
        print(f"waiting for another process that writes to {folder}", file=sys.stderr, flush=True)
        while not try_lock(f):
            time.sleep(0.1)


def try_lock(f):
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # as POSIX and Windows say that another process has it
        return False
    return True


def insist(action, *paths):
    """os.remove, os.rename or os.replace, tried for a second: a virus scanner may hold what has just been written."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return action(*paths)
        time.sleep(0.05)
    return action(*paths)


def plain_file(path):
    """path, which may be opened. Raises OSError if it leads to anything but a file: to open a FIFO takes for ever."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise OSError(f"{path} is no file: remove it")
    return path
