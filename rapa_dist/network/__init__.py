"""The digital side: im2col and its inverse, pooling, normalisation, the fully connected layer."""
