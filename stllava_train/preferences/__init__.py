"""A checkpoint's questions and answers become judged preference pairs."""
