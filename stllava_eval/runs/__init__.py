"""Run folders: answers and their scores, written, read again and checked."""
