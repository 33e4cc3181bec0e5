"""When a long job is due to say how far it is, and how much time is left."""

import time


class ProgressTimer:
    """Measures a job from its creation and spaces its lines of progress."""

    def __init__(self, seconds_between_lines: float = 5.0) -> None:
        self._between = seconds_between_lines
        self._start = self._last_line = time.monotonic()

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def seconds_left(self, done: float, total: float) -> float:
        """Return the seconds until all is done, at the speed so far; `done` is not 0."""
        return self.elapsed() * max(0, total - done) / done

    def due(self) -> bool:
        """Say whether it is time for a line; if so, the time to the next one begins."""
        is_due = time.monotonic() - self._last_line >= self._between
        if is_due:
            self.restart_line()
        return is_due

    def restart_line(self) -> None:
        """Begin the time to the next line: one is printed now."""
        self._last_line = time.monotonic()


def format_duration(seconds: float) -> str:
    """Format a duration as `1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
