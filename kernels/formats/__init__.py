"""Number formats of weights: how a matrix is laid out for the kernels, and what precision it keeps."""
