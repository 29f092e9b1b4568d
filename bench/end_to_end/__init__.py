"""Prefill, decode and memory on this machine: ``python -m bench.end_to_end``."""
