"""An audit of judges, questions and pairs: figures, warnings and a page."""
