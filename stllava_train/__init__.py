"""Conversations in; Stage 1, preference pairs, DPO and a checkpoint out, for `stllava_eval` to score."""
