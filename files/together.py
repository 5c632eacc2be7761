"""Files that belong together are replaced together: a folder has all of the old ones or all of the new, at any time.

They are written into the folder .saving inside it. When all are on disk it is renamed, to .saved, which is the one step
that counts: what dies earlier leaves the old files, what dies later is finished by whoever reads or writes here next.
"""

import contextlib
import os
import shutil

from files.lock import insist, locked

SAVING, SAVED = ".saving", ".saved"


@contextlib.contextmanager
def replacing(folder):
    """Yields a new folder: files that are written into it take the place of those of the same names in folder.

    An error leaves the old ones. Raises OSError, which names a file or the folder.
    """
    os.makedirs(folder, exist_ok=True)
    with locked(folder):
        move(folder)
        saving = os.path.join(folder, SAVING)
        if os.path.lexists(saving):  # of a process that was killed
            shutil.rmtree(saving)
        os.mkdir(saving)
        try:
            yield saving
            for name in os.listdir(saving):
                with open(os.path.join(saving, name), "r+b") as f:
                    os.fsync(f.fileno())
            insist(os.rename, saving, os.path.join(folder, SAVED))
        except BaseException as error:
            shutil.rmtree(saving, ignore_errors=True)
            if isinstance(error, OSError):
                error.filename = error.filename or folder
            raise
        move(folder)


def finish(folder):
    """Goes on where a process was killed while it moved files to their places. Raises OSError."""
    if os.path.lexists(os.path.join(folder, SAVED)):
        with locked(folder):
            move(folder)


def move(folder):
    saved = os.path.join(folder, SAVED)
    if os.path.isdir(saved) and not os.path.islink(saved):  # a link would bring in what lies elsewhere
        for name in os.listdir(saved):
            insist(os.replace, os.path.join(saved, name), os.path.join(folder, name))
        insist(os.rmdir, saved)
