"""Hand-written C++ kernels for x86-64 CPUs, and what calls them."""

# More than one machine has CPUs today (two sockets of 192 cores with two threads each make 768). The OpenMP runtime
# starts all threads of a team at once and ends the process, from some 30,000 on, when the system refuses one.
MAX_THREADS = 1024
