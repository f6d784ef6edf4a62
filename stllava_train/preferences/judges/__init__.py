"""Judges: what they are asked, what that costs, and how their replies become verdicts."""
