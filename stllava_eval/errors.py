"""A wrong input -> one line for the person who gave it."""


def printable(text: str) -> str:
    """`text` on one line that no terminal takes for commands: control characters, newlines too, stand as `\\x1b`.

    >>> printable("red \\x1b[31m")
    'red \\\\x1b[31m'
    """
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: the value, where it was, what would be right, what to do. Commands print it
    without a traceback and end with exit code 2; any other exception is a bug and keeps its traceback.
    """
