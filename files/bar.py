"""A bar that shows how far something is, on stderr where that is a terminal."""

import threading

from tqdm import tqdm


class Bar(tqdm):
    """tqdm's, with a lock of this process alone: its own is multiprocessing's, too, and when Ctrl-C leaves that behind,
    Python 3.14 says so.
    """

    def __init__(self, *args, disable=None, **options):  # None: as stderr has it
        super().__init__(*args, disable=disable, **options)


Bar.set_lock(threading.RLock())
