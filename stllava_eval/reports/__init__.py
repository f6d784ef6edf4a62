"""Runs become leaderboards, comparisons, inspections, pages and the verdict of a gate."""
