"""Errors that are the user's to mend, and how a command reports them.

A command ends with 0 (done), 2 (wrong input: one line on stderr) or 130 (interrupted). Everything
else is a bug and keeps its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class InputError(ValueError):
    """Wrong input, worded `<field>: got X, expected Y; do Z`, in one line whatever X holds.

    A lone text is a finished message, perhaps below a traceback: pickle and torch, which passes on
    what a loader worker raised, build the error anew from such a text.
    """

    def __init__(self, field: str, got: object = "", expected: str = "", do: str = "") -> None:
        """Word the message from its four parts; `do` is the remedy."""
        text = f"{field}: got {got}, expected {expected}; {do}"
        if not expected:
            text = field.splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")
        super().__init__(" ".join(line.strip() for line in text.splitlines() if line.strip()))
        self.field = text.partition(": got ")[0]


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that the user named is not there."""


class Interrupted(KeyboardInterrupt):
    """The run was stopped by the user after its state was saved; the text is what resumes it."""


def near_miss(word: str, known: Iterable[str]) -> str:
    """`did you mean 'lr'?` for a misspelt name, or the list of what there is."""
    names = sorted(known)
    if close := get_close_matches(word, names, n=1, cutoff=0.6):
        return f"did you mean '{close[0]}'?"
    return f"there are {', '.join(names[:12])}" + f" and {len(names) - 12} more" * (len(names) > 12)


def run_main(body: Callable[[], None]) -> int:
    """Run a command's body; returns its exit status. A full disk counts as wrong input."""
    try:
        body()
        return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        saved = f"state saved; go on with: {stop}"
        lost = "before anything was there to save; start again"
        print("\ninterrupted,", saved if isinstance(stop, Interrupted) else lost, file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) went away: not an error, but stdout is unusable now.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        told = "error: disk: got a full one, expected room; free some and try again"
        print(told, file=sys.stderr)
        return 2
