"""Report a wrong input in one line to the person who gave it; every room of both packages raises these errors."""

import errno


def printable(text: str) -> str:
    """Return `text` on one line, safe for a terminal: control characters, newlines too, become `\\x1b`.

    >>> printable("red \\x1b[31m")
    'red \\\\x1b[31m'
    """
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


LONGEST_REASON = 300  # characters of another library's words in one of our lines. Our choice: three lines of a terminal


def one_line(error: object) -> str:
    """Return an error's message on one line, without its last full stop; a long one ends at a sentence, else at a word.

    >>> one_line(ValueError("404 Client Error.\\n\\nRepository not found."))
    '404 Client Error. Repository not found'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > LONGEST_REASON:
        sentence = text.rfind(". ", 0, LONGEST_REASON)
        begun = text[:LONGEST_REASON]
        text = text[:sentence] if sentence > LONGEST_REASON // 2 else f"{begun.rpartition(' ')[0] or begun} ..."
    return text if text.endswith("...") else text.rstrip(".")


# What no code can prevent: the name is too long, we may not, the disk is full or read-only, a parent is a file
_DISK = {
    getattr(errno, name)
    for name in ["ENAMETOOLONG", "EACCES", "EPERM", "ENOSPC", "EDQUOT", "EROFS", "EIO", "ELOOP", "ENOTDIR"]
}


def disk_error_line(error: OSError) -> str | None:
    """Return the one line for an error about a file or folder that is no bug; None for other errors."""
    if error.errno not in _DISK or error.filename is None:
        return None
    name = str(error.filename)
    return f"{name if len(name) <= 500 else name[:500] + '...'}: {error.strerror}. Choose another file or folder."


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: the value, where it was, what would be right, what to do. Commands print it
    without a traceback and end with exit code 2; any other exception is a bug and keeps its traceback.
    """


class NotThereError(InputError):
    """A server does not know what it was asked for (HTTP 404)."""
