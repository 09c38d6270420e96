"""One file, one method: the distillation room."""
