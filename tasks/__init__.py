"""The lmms-eval task files: data only."""
