"""SIGINT and SIGTERM as a request that the loop looks at between steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from typing_extensions import Self

STOP = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While entered, the first signal is kept in `received`; a second one acts as it did before."""

    def __init__(self) -> None:
        self.received: int = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread alone; elsewhere signals go where they always went.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in STOP}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
