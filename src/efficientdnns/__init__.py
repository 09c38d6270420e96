"""EfficientDNNs."""
