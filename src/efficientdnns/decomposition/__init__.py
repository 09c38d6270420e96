"""One file, one method: the decomposition room."""
