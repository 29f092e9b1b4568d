"""What tests and benchmarks of the kernels share. Nothing else in the package imports it."""
