"""Networks by name, as ordinary PyTorch modules."""
