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
NAMES_LISTED = 12  # more than these make the line unreadable


class InputError(ValueError):
    """Wrong input, worded `<field>: got X, expected Y; do Z`, in one line whatever X holds.

    A lone text is a finished message, perhaps below a traceback: pickle and torch, which passes on
    what a loader worker raised, build the error anew from such a text.
    """

    def __init__(self, field: str, got: object = "", expected: str = "", do: str = "") -> None:
        """Word the message from its four parts; `do` is the remedy."""
        if expected:
            lines = f"{field}: got {got}, expected {expected}; {do}".splitlines()
            text = " ".join(line.strip() for line in lines if line.strip())
        else:
            text = field.splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")
        super().__init__(text)
        self.field = text.partition(": got ")[0]


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that the user named is not there."""


class Interrupted(KeyboardInterrupt):  # noqa: N818 - it is a KeyboardInterrupt, not an error
    """The run was stopped by the user after its state was saved; `hint` resumes it."""

    def __init__(self, hint: str) -> None:
        """Keep the command line that goes on."""
        super().__init__(hint)
        self.hint = hint


def near_miss(word: str, known: Iterable[str]) -> str:
    """`did you mean 'lr'?` for a misspelt name, or the list of what there is."""
    names = sorted(known)
    if close := get_close_matches(word, names, n=1, cutoff=0.6):
        return f"did you mean '{close[0]}'?"
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return f"there are {', '.join(names[:NAMES_LISTED])}{more}"


def run_main(body: Callable[[], None]) -> int:
    """Run a command's body and return its exit status.

    A full disk is the user's to mend wherever it shows, so it counts as wrong input too.
    """
    try:
        body()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"\ninterrupted, state saved; go on with: {stop.hint}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ninterrupted before anything was there to save; start again", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) went away: not an error, but stdout is unusable now.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        full = InputError("disk", "a full one", "room to write", "free some space and try again")
        print(f"error: {full}", file=sys.stderr)
        return 2
    return 0
