"""One process at a time writes to a folder; what Windows refuses while another program has a file is tried again."""

import contextlib
import errno
import os
import stat
import sys
import time

from languages import translated

IN_PASSING = (FileNotFoundError, FileExistsError)  # while another process makes or removes what is opened here
if os.name == "nt":
    IN_PASSING += (PermissionError,)  # what Windows says of a file that is just being removed
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # what a system says where there are none


@contextlib.contextmanager
def locked(folder, patient=True):
    """Makes folder, and keeps other processes that ask from writing to it; if nothing has come, it is removed again.

    The system takes the lock back from a process that dies. patient: wait for a process that has it. Raises OSError.
    """
    path = os.path.join(folder, ".lock")
    while True:
        with open_in(folder, path) as f:
            wait_for_lock(f, folder, patient)
            if not is_at(f, path):
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


def open_in(folder, path):
    """Opens a file in a folder, and makes both: again if another process, done with them, removes them meanwhile."""

    def make_and_open():
        os.makedirs(folder, exist_ok=True)
        return open(plain_file(path), "ab")

    return insist(make_and_open, despite=IN_PASSING)


def wait_for_lock(f, folder, patient):
    if not try_lock(f):
        if not patient:
            raise OSError("another process writes to it: wait until it has ended")
        print(translated(f"waiting for another process that writes to {folder}"), file=sys.stderr, flush=True)
        while not try_lock(f):
            time.sleep(0.1)


def try_lock(f):
    """Whether this process may write to f: not while another has its lock. Where a file system has none, all may."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(f.fileno(), 2**31 - 2, os.SEEK_SET)  # Windows lets nobody read what is locked: behind all there is
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # as POSIX and Windows say that another process has it
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_at(f, path):
    """Whether a file that is open is the one at path."""
    try:
        return os.path.samestat(os.fstat(f.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def insist(action, *paths, despite=(PermissionError,)):
    """An action such as os.remove, tried for a second: a virus scanner may hold what has just been written."""
    for _ in range(100):
        with contextlib.suppress(*despite):
            return action(*paths)
        time.sleep(0.01)
    return action(*paths)


def plain_file(path):
    """path, which may be opened. Raises OSError if it leads to anything but a file: to open a FIFO takes for ever."""
    try:
        is_plain = stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        is_plain = not os.path.islink(path)
    if not is_plain:
        raise OSError(f"{path} is no file: remove it")
    return path
