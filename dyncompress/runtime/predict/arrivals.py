"""Batches as they come in, with the time, and a word when too long nothing came."""

from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from queue import Empty, Queue
from threading import Event, Thread
from time import perf_counter

from ...passes.graph.inputs import Inputs

Arrival = tuple[Inputs, float]  # a batch, and when it came: `perf_counter`, in seconds


def as_asked_for(batches: Iterable[Inputs]) -> Generator[Arrival]:
    """Every batch, read when the next one is wanted, however long that takes."""
    for batch in batches:
        yield batch, perf_counter()


def as_they_come(batches: Iterable[Inputs], wait: Callable[[], float | None], ahead: int) -> Generator[Arrival | None]:
    """Every batch, read in a thread of its own, and None whenever `wait()` seconds pass without one.

    What the thread raises is raised here. Once this generator is closed, the thread ends after the batch it waits for.

    Args:
        wait: asked each time; None: as long as it takes.
        ahead: how many batches are read before they are asked for, at most.
    """
    queue: Queue[Arrival | Exception | None] = Queue(ahead)
    closed = Event()

    def read() -> None:
        try:
            for batch in batches:
                queue.put((batch, perf_counter()))
                if closed.is_set():
                    return
            queue.put(None)
        except Exception as error:
            queue.put(error)

    Thread(target=read, name="dyncompress-stream", daemon=True).start()
    try:
        while True:
            try:
                came = queue.get(timeout=wait())
            except Empty:
                yield None
                continue
            if came is None:
                return
            if isinstance(came, Exception):
                raise came
            yield came
    finally:
        closed.set()
        with suppress(Empty):  # room for what the thread holds in its hand
            while True:
                queue.get_nowait()
