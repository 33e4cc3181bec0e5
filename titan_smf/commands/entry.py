"""What all commands share: options, help, exit codes, one message for a user's mistake."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from titan_smf.config.help import print_help
from titan_smf.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

Command = Callable[[Sequence[str]], int | None]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows the description with its lines as they are."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_options(
    parser: argparse.ArgumentParser, options: Iterable[tuple[str, str | int | float | bool, str]]
) -> None:
    """Add options given as (name, default, help); each takes its default's type, False a switch."""
    for name, default, meaning in options:
        if default is False:
            parser.add_argument(name, action="store_true", help=meaning)
        else:
            shown = f"{meaning} (default: {default})" if default else meaning
            parser.add_argument(name, default=default, type=type(default), help=shown)


def start(command: Command) -> NoReturn:
    """Run a command on this process alone, with the arguments that it was started with."""
    sys.exit(exit_code(command, sys.argv[1:]))


def start_on_ranks(command: Command, usage: str | None) -> NoReturn:
    """Run a command that torchrun may start on several processes; without arguments show usage."""
    argv = sys.argv[1:]
    if not argv:
        print(usage)
        sys.exit(EXIT_USER_ERROR)
    if print_help(argv, usage):
        sys.exit(0)
    from titan_smf.runtime import end_process

    end_process(exit_code_on_ranks(command, argv))


def exit_code(command: Command, argv: Sequence[str]) -> int:
    """Run a command and return its exit code; a `UserError` becomes one message and code 2."""
    try:
        return command(argv) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":  # of several ranks one says so
            print("interrupted; run again to resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1


def exit_code_on_ranks(command: Command, argv: Sequence[str]) -> int:
    """Run a command as one rank and return its exit code; ranks print a common error once."""
    import torch.distributed as dist

    from titan_smf import runtime

    runtime.set_default_ranks()
    runtime.configure_logging()

    def as_rank(argv: Sequence[str]) -> int | None:
        try:
            runtime.check_devices()
            code = command(argv)
        except UserError:
            if runtime.rank() != 0:
                # torchrun ends this process as soon as rank 0 has exited with the same error.
                time.sleep(10)
            raise
        # Only here: after an error other ranks may wait in a collective, and so would this one.
        if dist.is_initialized():
            dist.destroy_process_group()
        return code

    return exit_code(as_rank, argv)
