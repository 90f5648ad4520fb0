"""Photo files: supported formats, and decoding."""
