"""Every error a user can cause. Each message is one sentence that names what is wrong and the fix."""

import signal


class AgptError(Exception):
    """Base: the command line prints the message after ``agpt:`` and exits with ``status``."""

    status = 2


class BundleError(AgptError):
    """A bundle is missing, altered, or not one this version can open."""


class RecipeError(AgptError):
    """A recipe or its memory bank is missing, malformed, or made with another bundle."""


class ImageError(AgptError):
    """An image cannot be read or is not a frame the inspector takes."""


class CameraError(AgptError):
    """A camera, video or folder gives no frames."""


class ConfigError(AgptError):
    """An option has a value the program cannot work with."""


class Interrupted(AgptError):
    """A signal stopped the work; the exit status is the one that shells give for it."""

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.status = 128 + number


class NoReaderError(AgptError):
    """The reader of standard output has gone; the exit status is the one that shells give for SIGPIPE."""

    status = 128 + 13

    def __init__(self) -> None:
        super().__init__("the reader of the output has gone: what was not written is lost")


class UnjudgedError(AgptError):
    """A run ended and not one part got a verdict."""


class ClosedError(AgptError):
    """An inspector was used after it was closed."""


class LateError(AgptError):
    """There was no time for a verdict before the part's deadline."""
