"""Training data: conversations and their images, read, checked and encoded."""
