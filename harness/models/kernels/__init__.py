"""Compiled passes for CPUs (`kernels.cpp`), each with a plain path in torch that is its reference."""
