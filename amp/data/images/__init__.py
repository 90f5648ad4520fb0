"""Photo files: which formats are read, and their bytes to pixels."""
