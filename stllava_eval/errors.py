"""A wrong input -> one line for the person who gave it."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: the value, where it was, what would be right, what to do. Commands print it
    without a traceback and end with exit code 2; any other exception is a bug and keeps its traceback.
    """
