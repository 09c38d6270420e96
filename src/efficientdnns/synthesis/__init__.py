"""One file, one method: the synthesis room."""
