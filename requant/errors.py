"""The errors that a user can cause, and the way out of each.

RequantError            anything requant refuses to do; the command line exits with 2
├── CheckpointError     a folder, file, tensor or config that cannot be used as it is
├── FormatError         a weight that a format cannot hold, or a format that does not exist
└── ToldError           the error of another process of the same run, which prints it

A message reads *where: what is wrong, with both numbers; what to do*.
"""

from __future__ import annotations


class RequantError(Exception):
    """Raised for everything that is the input's fault, not requant's."""

    def __str__(self) -> str:
        """The message; of one that quotes a hostile name at length, its beginning and its end."""
        text = super().__str__()
        return text if len(text) <= 2500 else f"{text[:1800]} ... {text[-600:]}"


class CheckpointError(RequantError):
    """Raised when a checkpoint cannot be read, or an output cannot be written."""


class FormatError(RequantError):
    """Raised when a format does not exist or cannot hold the weight it is asked to hold."""


class ToldError(RequantError):
    """Raised in the processes of a run whose first process could not go on."""
