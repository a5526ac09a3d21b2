"""Work beside the main thread: reading and hashing a gigabyte keep no Python waiting."""

import threading
from concurrent.futures import Future


def beside(function, *args) -> Future:
    """function(*args) in a thread of its own, for which the program's exit waits; the Future has what it returns or raises."""
    future = Future()

    def work():
        try:
            future.set_result(function(*args))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work).start()
    return future
