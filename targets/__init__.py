"""What a machine can do, and the generators of its kernels."""
