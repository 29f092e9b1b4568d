"""Benchmarks: on this machine (``end_to_end``), of the kernels (``kernels``), and on a GPU (``gpu_check``)."""
