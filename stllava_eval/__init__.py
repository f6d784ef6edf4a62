"""Images and questions in, requests, answers, scores and a leaderboard out."""

__version__ = "0.1.0"
