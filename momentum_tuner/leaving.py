"""How a process of ours ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process without taking its modules apart, which takes a fifth of a second, with torch a whole one.

    All else is done as ever: threads that are not daemons end, what is registered to happen at exit happens, and what
    is written reaches its file.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # tells pools of threads to end, and waits for all but daemons
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None and not stream.closed:
                stream.flush()
    except OSError:  # Python knows what to say of it
        sys.exit(code)
    os._exit(code)
