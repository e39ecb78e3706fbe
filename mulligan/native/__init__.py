"""Kernels in C++ for the CPU: decoding, and attention over trees."""
