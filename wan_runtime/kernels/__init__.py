"""Triton kernels: one fused operation a file, each beside its plain-torch twin. Importing a kernel file loads Triton,
so backends import them inside the functions that run them."""
