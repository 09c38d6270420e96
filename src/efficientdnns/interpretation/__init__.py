"""One file, one method: the interpretation room."""
