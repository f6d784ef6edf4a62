"""The plug-in of lmms-eval: its model `stllava_med` and the functions that our task files name."""
