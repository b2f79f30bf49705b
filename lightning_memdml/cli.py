"""The command `memdml`. Its help, its version and an error for an unknown command need no torch."""

from __future__ import annotations

import errno
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning_memdml.argument_paths import with_local_paths
from lightning_memdml.atomic_write import DISK_FULL
from lightning_memdml.commands import COMMANDS, TRAINER, run
from lightning_memdml.latest_run import follow_latest
from lightning_memdml.library_errors import sentence_for
from lightning_memdml.verbosity import is_verbose, take_verbose
from lightning_memdml.warnings_filter import hide_what_users_cannot_change

OWN_ERRORS = (ValueError, TypeError, OSError, ImportError)  # that this package raises for a user's mistakes
ABOUT_PATHS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Modules in the working directory can be named in options and configurations, as with `python -m lightning_memdml`.

    Args:
        arguments: What follows `memdml`; by default what the process was started with.

    Raises:
        SystemExit: With a sentence, if a name, an option, a file or a value is wrong; with 130 after Ctrl-C.
    """
    # Lightning starts the other ranks with `sys.argv`, so the arguments have to be there.
    given = take_verbose(sys.argv[1:] if arguments is None else arguments)
    sys.argv[1:] = [follow_latest(argument) for argument in given]
    if not is_verbose():
        hide_what_users_cannot_change()
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    name = "".join(sys.argv[1:2])
    try:
        sys.argv[1:] = with_local_paths(sys.argv[1:])
        run(name, sys.argv[2:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has enough, as in `memdml configs | head`. The interpreter would flush into the pipe once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as error:
        _exit_if_interrupted(name, error)
        raise
    except Exception as error:
        known = sentence_for(error)
        if known is not None:
            sys.exit(f"error: {known}")
        message = _message_of_this_package(error) if isinstance(error, OWN_ERRORS) else None
        message = message or _message_about_a_file(error)
        if message is None:
            raise
        from lightning_memdml.cli_messages import readable

        sys.exit(f"error: {readable(message)}")


def _exit_if_interrupted(name: str, error: BaseException) -> None:
    """Exit with 130 and a sentence after Ctrl-C, which Lightning turns into an exit with 1."""
    if not isinstance(error if isinstance(error, KeyboardInterrupt) else error.__context__, KeyboardInterrupt):
        return
    for child in multiprocessing.active_children():  # the interpreter would wait for their work
        child.terminate()
    command = COMMANDS.get(name)
    # Of a training that has begun, Lightning has printed how to go on.
    if command is not None and (command.function != TRAINER or isinstance(error, KeyboardInterrupt)):
        print(f"\nInterrupted. {command.after_interrupt}".rstrip(), file=sys.stderr)
    sys.exit(130)


def _message_of_this_package(error: BaseException | None) -> str | None:
    """Return the message of the first error in the chain that this package raised; others need their traceback."""
    while error is not None:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
            return str(error)
        if (message := _message_of_a_worker(str(error))) is not None:
            return message
        error = error.__cause__  # jsonargparse wraps the error of a class
    return None


def _message_about_a_file(error: BaseException) -> str | None:
    """Return a sentence for an error of the operating system about a path or a full disk."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        place = "" if error.filename is None else f" for {error.filename!r}"
        return f"Expected space on the disk{place} but got: {error.strerror}. Free some space."
    if not isinstance(error, OSError) or error.errno not in ABOUT_PATHS or error.filename is None:
        return None
    return f"Expected to read or write {error.filename!r} but got: {error.strerror}. Check the path, or pass another."


def _message_of_a_worker(text: str) -> str | None:
    """Return the message of an error in a process that opens images: torch passes its traceback on as text."""
    files = re.findall(r'^ *File "(.+)", line \d+, in ', text, re.MULTILINE)
    if not text.startswith("Caught ") or not files or Path(__file__).parent not in Path(files[-1]).parents:
        return None
    return text.strip().rpartition("\n")[2].partition(": ")[2]


if __name__ == "__main__":
    main()
