"""The command line `stllava-eval`: one module for each command, with its options and its action."""
