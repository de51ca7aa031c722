"""The errors that a user can cause. Each message names the problem and the fix in one sentence."""

import signal


class AgptError(Exception):
    """Base class: the command line prints the message after ``agpt:`` and exits with ``status``."""

    status = 2


class BundleError(AgptError):
    """A bundle is missing, altered, or not supported by this version."""


class RecipeError(AgptError):
    """A recipe or its memory bank is missing, malformed, or made with another bundle."""


class ImageError(AgptError):
    """An image cannot be read, or a frame has the wrong type or shape."""


class CameraError(AgptError):
    """A camera, video or folder delivers no frames."""


class ConfigError(AgptError):
    """An option has an invalid value."""


class Interrupted(AgptError):
    """A signal stopped the work; the exit status is 128 + its number, as in shells."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.status = 128 + number


class NoReaderError(AgptError):
    """The reader of standard output has closed it; the exit status is the one after SIGPIPE, as in shells."""

    status = 128 + 13

    def __init__(self) -> None:
        super().__init__("the reader of the output has closed it: the rest of the output is lost")


class UnjudgedError(AgptError):
    """A run ended in which no part got a verdict."""


class ClosedError(AgptError):
    """An inspector was used after it was closed."""


class LateError(AgptError):
    """The part's deadline left no time for a verdict."""


class FrameError(AgptError):
    """A frame does not show the enrolled product."""
