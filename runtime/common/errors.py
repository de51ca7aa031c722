"""Every error a user can cause. Each message is one sentence that names what is wrong and the fix."""


class AgptError(Exception):
    """Base: the command line prints the message after ``agpt:`` and exits with status 2."""


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
    """The user stopped the work; the command line exits with status 130, as for the signal."""


class UnjudgedError(AgptError):
    """Parts came and not one of them got a verdict."""


class ClosedError(AgptError):
    """An inspector was used after it was closed."""


class LateError(AgptError):
    """There was no time for a verdict before the part's deadline."""
