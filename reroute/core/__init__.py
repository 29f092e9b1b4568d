"""Routing without a model: schedules and decisions, the plan of a prompt, its prefill, and what it costs.

Imports PyTorch and ``reroute_kernels``, never Transformers.
"""
