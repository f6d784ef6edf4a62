"""Answers and references become scores, and scores become means, intervals and tests."""
