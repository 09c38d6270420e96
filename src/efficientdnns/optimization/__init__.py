"""One file, one method: the optimization room."""
