"""Images and questions become answers, by our own engine, by transformers or by a server."""
