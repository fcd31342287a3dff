"""Worker processes that end with the program that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for a block; after an error no new work is started, and what runs ends.

    They end at once when this process is interrupted, stopped or killed. Raises OSError when one of them was killed.
    """
    others = multiprocessing.active_children()
    # Not by fork, which copies locks held by threads of the progress bar and of Arrow.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_follow_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise OSError(
            "a worker was killed, probably out of memory; run the same command again with fewer --workers"
        ) from error
    except (KeyboardInterrupt, SystemExit):
        for process in set(multiprocessing.active_children()) - set(others):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """Ends this worker when its parent ends, however that happens; Ctrl-C is for the parent to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
