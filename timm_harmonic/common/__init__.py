"""The bottom floor: errors, files, images, devices and progress bars."""


class TimmHarmonicError(RuntimeError):
    """Something that the user can mend; the message says what. The command prints it without a traceback."""


class InputError(TimmHarmonicError, ValueError):
    """An argument, a network, an image or another input cannot be used; the message names it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
