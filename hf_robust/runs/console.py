"""How a run speaks to the person who started it: text on standard output, mistakes as one message."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["leave_process_group", "run_or_exit", "tell"]


STOPPED = 130  # exit status after Ctrl-C, as shells have it


def tell(text: str = "") -> None:
    """Write a line to standard output, at once.

    Args:
        text (`str`): without the line break.
    """
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def run_or_exit(main: Callable[..., Any], argv: list[str] | None = None, **parsing: Any) -> None:
    """Call `main`; an error of the user's making ends in one message and exit status 1, not in a traceback.

    Args:
        main (`Callable`): the run, called with `argv` and `parsing`.
        argv (`list[str]`, *optional*): arguments; default: those of the process.
        parsing (`Any`): passed on to its parser.
    """
    try:
        main(argv, **parsing)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nstopped. What was finished is kept: the same evaluation goes on there, a training with "
            "--resume_from_checkpoint true\n"
        )
        sys.exit(STOPPED)
    leave_process_group()


def leave_process_group() -> None:
    """End the communication between processes while the interpreter is whole.

    A group that is left to the interpreter's own end has threads running by then, and one that wakes up late takes the
    process down (`terminate called without an active exception`): the launcher reports a finished run as failed.
    """
    distributed = sys.modules.get("torch.distributed")  # not imported: nothing to leave
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
