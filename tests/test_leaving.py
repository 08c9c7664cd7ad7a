"""A process that leaves does all that one that ends does, but takes nothing apart."""

import os
import subprocess
import sys

ENDING = """
import atexit, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from momentum_tuner.leaving import leave

class Module:
    def __del__(self, write=os.write):
        write(2, b"taken apart")

left = Module()
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
pool = ThreadPoolExecutor()  # of which nobody says that it is over, as of torch's compiler
pool.submit(int).result()
print("main")
{leave}(3)
"""


def ended(leave: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ENDING.format(leave=leave)],
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=30,
    )


def test_whoever_leaves_waits_for_its_threads_and_writes_all_it_has_to_say_but_takes_nothing_apart():
    usual, left = ended("sys.exit"), ended("leave")
    assert left.returncode == usual.returncode == 3
    assert left.stdout == usual.stdout == "main\nthread\nat exit\n"
    assert (usual.stderr, left.stderr) == ("taken apart", "")


def test_output_that_finds_no_room_is_an_error_as_ever():
    with open("/dev/full", "w") as full:
        usual, left = ended("sys.exit", full.fileno()), ended("leave", full.fileno())
    assert left.returncode == usual.returncode == 120
    assert "No space left on device" in left.stderr
