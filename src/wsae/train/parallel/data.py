"""What each rank reads: its hooks, and its rows of every batch. The batches are those of one process."""

from wsae.acts.source import StoreSource
from wsae.acts.stream import ActivationSource, Batch, BatchStream, ShuffledStream, State


def only_hooks(source: ActivationSource, hooks: tuple[str, ...]) -> ActivationSource:
    """Return a source that reads these hooks alone where it can (a store), else the source itself."""
    if isinstance(source, StoreSource) and hooks != tuple(source.hooks):
        return StoreSource(source.store.path, hooks, verify=False)  # rank 0 has checked the files
    return source


def rows_of(
    source: ActivationSource, batch_size: int, seed: int, state: State | None, rows: slice
) -> BatchStream:
    """Return the source's stream of batches with these rows of each only.

    Stores and arrays read no other rows; a live model computes all of them, so every rank runs it.
    """
    stream = source.stream(batch_size, seed, state)
    if isinstance(stream, ShuffledStream):
        whole = stream._gather
        stream._gather = lambda index: whole(index[rows])
        return stream
    return _Rows(stream, rows)


class _Rows:
    """Some rows of every batch of a stream."""

    def __init__(self, stream: BatchStream, rows: slice) -> None:
        self._stream, self._rows = stream, rows

    def next(self) -> Batch:
        """Return the rows of the next batch by hook."""
        return {hook: x[self._rows] for hook, x in self._stream.next().items()}

    def state(self) -> State:
        """Return the exact position as JSON."""
        return self._stream.state()
