"""One file, one method: the distributed room."""
