"""One file, one method: the quantization room."""
