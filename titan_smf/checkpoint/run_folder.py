"""The folder of a run: one run writes into it at a time, and none begins anew over another."""

from pathlib import Path

from filelock import FileLock, Timeout

from titan_smf.checkpoint.checkpointer import LAST, committed_steps
from titan_smf.errors import CheckpointError, ConfigError, UserError
from titan_smf.runtime import from_first_rank


def make_run_folder(folder: Path) -> None:
    """Make the folder of a run.

    Raises:
        ConfigError: it cannot be made or is something else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror})"
        raise ConfigError("job.dump_folder", str(folder), allowed) from None


def lock_run_folder(folder: Path) -> FileLock:
    """Keep other runs out of the folder until the lock is released or this process ends.

    Collective: rank 0 holds the lock.

    Raises:
        UserError: another run holds it.
    """
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = "another run is writing there; give another job.dump_folder"
            raise UserError(f"{folder}: {message}") from None

    from_first_rank(acquire)
    return lock


def check_not_overwritten(folder: Path, checkpoints: Path, resumes: bool) -> None:
    """Check that a run which has saved goes on from there, not from random weights. Collective.

    Args:
        folder: the run's.
        checkpoints: the folder of its checkpoints.
        resumes: whether this start would have taken a checkpoint (`checkpoint.enable`).

    Raises:
        CheckpointError: there are checkpoints which this start ignores, or they have gone.
    """
    from_first_rank(lambda: _check_not_overwritten(folder, checkpoints, resumes))


def _check_not_overwritten(folder: Path, checkpoints: Path, resumes: bool) -> None:
    steps, last = committed_steps(checkpoints), folder / LAST
    if steps and not resumes:
        raise CheckpointError(
            f"{folder} holds a run with checkpoints up to step {steps[-1]}, which a start without "
            "checkpoint.enable would overwrite; enable it to go on, or give a new job.dump_folder"
        )
    if not steps and last.is_file() and (saved := last.read_text().strip()):
        raise CheckpointError(
            f"{folder}: this run saved {saved}, but {checkpoints} holds no complete checkpoint; "
            "restore it, or give a new job.dump_folder to start anew"
        )
