"""One file, one method: the pruning room."""
