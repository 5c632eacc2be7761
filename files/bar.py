"""A bar that shows how far something is, on stderr where that is a terminal."""

import os
import threading

from tqdm import tqdm

from languages import translated


class Bar(tqdm):
    """tqdm's, with a lock of this process alone: its own is multiprocessing's, too, and when Ctrl-C leaves that behind,
    Python 3.14 says so.
    """

    def __init__(self, iterable=None, desc=None, total=None, **options):
        if "TQDM_DISABLE" not in os.environ:
            options["disable"] = None  # as stderr has it
        super().__init__(iterable, desc and translated(desc), total, **options)


Bar.set_lock(threading.RLock())
