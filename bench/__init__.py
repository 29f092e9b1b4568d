"""Benchmarks of Reroute on this machine: ``python -m bench``; micro-benchmarks of the operations: ``pytest bench``."""
