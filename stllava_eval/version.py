"""The version of the package, in a file of its own: the root names modules that need it."""

__version__ = "0.1.0"
