"""Functions for processes that are started anew, in a module that imports nothing heavy."""

import os
import time


def slow_square(number: int) -> int:
    """Take longer for the first of every four items; 13 is refused."""
    time.sleep(0.05 * (number % 4 == 0))
    if number == 13:
        raise ZeroDivisionError("thirteen")
    return number * number


def process_id(number: int) -> int:
    """Return which process this is, a little later."""
    time.sleep(0.02)
    return os.getpid()
