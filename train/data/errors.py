"""What goes wrong while data is prepared, apart from the data."""

from __future__ import annotations

import time

from .sources import first_line

# Seconds from a connection that breaks to the signal that says so.
GRACE = 5.0


class WorkerError(RuntimeError):
    """A process that prepares batches has died; the message says what may help."""

    @classmethod
    def of(cls, error: Exception) -> WorkerError:
        advice = "if memory ran out, fewer --workers or a smaller --batch-size help"
        return cls(f"a process that prepares batches has died ({first_line(error)}); {advice}")


def is_obituary(error: RuntimeError) -> bool:
    """Whether it is what torch raises, wherever the main thread happens to be, when such a process has died."""
    return str(error).startswith("DataLoader worker")


def obituary() -> RuntimeError | None:
    """Waits for what torch raises: it must not come out of the handling of a broken connection. None if it does not."""
    try:
        time.sleep(GRACE)
    except RuntimeError as error:
        if not is_obituary(error):
            raise
        return error
    return None
