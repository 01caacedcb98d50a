"""Hand-written C++ kernels for x86-64 CPUs, and what calls them."""
