"""What a worker makes of the wish to stop, however it comes."""

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from momentum_tuner.worker.signals import StopSignal

stop = StopSignal()
stop.install()
{wish}
os.kill(os.getpid(), signal.SIGTERM)
assert stop.asked
print("drains", flush=True)
{second}
"""


@pytest.mark.parametrize("wish", ["", "stop.asked = True"])
@pytest.mark.parametrize(
    ("second", "code"), [("", 0), ("os.kill(os.getpid(), signal.SIGTERM)", 130), ("os.kill(os.getpid(), 2)", 130)]
)
def test_the_first_signal_drains_and_the_second_ends_wherever_the_wish_came_from(wish, second, code):
    program = PROGRAM.format(wish=wish, second=second)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "drains\n"), done.stderr
