"""The kernels: times by formula and counts, host times, and micro-benchmarks (``pytest bench/kernels``)."""
