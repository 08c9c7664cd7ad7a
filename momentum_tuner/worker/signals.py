"""How a process is asked to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a wish to drain; the second ends the process at once.

    The wish may come otherwise too, and then the first signal is no second one: who stops a machine's or a service's
    processes signals all of them, and the one that started this worker passes it on.
    """

    def __init__(self) -> None:
        self.asked = False
        self._signalled = False

    def install(self) -> None:
        """Take over both signals of this process."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._signalled:
            os._exit(130)
        self._signalled = self.asked = True
