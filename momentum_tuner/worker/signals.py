"""How a process is asked to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a wish to drain; the second ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> None:
        """Take over both signals of this process."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            os._exit(130)
        self.asked = True
