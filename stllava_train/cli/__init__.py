"""The command line `stllava-train`: one module for each stage, with its options and its action."""
