"""Trains ``reroute.demo.tinyvlm`` from scratch, on the CPU: ``python -m training.tinyvlm.train --out runs/tinyvlm``."""
