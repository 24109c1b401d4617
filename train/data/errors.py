"""What goes wrong while data is prepared, apart from the data."""


class WorkerError(RuntimeError):
    """A process that prepares batches has died; the message says what may help."""
