"""A time limit ends what runs: Python code by an exception, whatever it catches, and native code with the process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from doratune.terminal.deadline import NATIVE_SECONDS, TimeUpError, time_limit


def test_a_call_is_ended_when_its_time_is_up_even_by_code_that_goes_on_after_failures() -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    begin, (before, _) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    with pytest.raises(TimeUpError, match="the time was up"), time_limit(begin + 0.1):
        stubborn()
    assert time.monotonic() - begin < 5.0
    with time_limit(begin + 60.0), time_limit(None):
        pass
    now = signal.getitimer(signal.ITIMER_REAL)[0]
    assert now == pytest.approx(before - (time.monotonic() - begin), abs=1.0), "an alarm that was set is set again"


NATIVE = """
import hashlib, time
from doratune.errors import UsageError
from doratune.terminal.deadline import time_limit
with time_limit(time.monotonic() + 0.2, last_words=UsageError("it is too slow; \x1b[2J choose less")):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


def test_native_code_that_answers_no_signal_is_ended_with_the_process_and_a_message() -> None:
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", NATIVE], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - begin < NATIVE_SECONDS + 15.0
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "Error: it is too slow; \\x1b[2J choose less\n")


def test_what_ends_in_time_goes_on_after_it() -> None:
    code = NATIVE.replace("2**31 - 1", "1") + f"time.sleep({NATIVE_SECONDS} + 0.6)\nprint('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")
