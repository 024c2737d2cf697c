"""Several runs in threads of one process: one at a time, but for the steps a GPU has recorded.

Nothing of a run has to be safe beside another's but the replaying of its recorded steps, each on a
stream of its own: for the rest a thread holds the turn, of which there is one.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_turn = threading.Lock()
_own = threading.local()


@contextmanager
def held() -> Iterator[None]:
    """This thread's turn: waits for it, and has it until the block ends."""
    with _turn:
        _own.has = True
        try:
            yield
        finally:
            _own.has = False


@contextmanager
def passed() -> Iterator[None]:
    """Let other threads have their turn meanwhile; nothing where this one has none to give."""
    if not getattr(_own, "has", False):
        yield
        return
    _own.has = False
    _turn.release()
    try:
        yield
    finally:
        _turn.acquire()
        _own.has = True
