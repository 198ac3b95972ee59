"""Sections of real tissue, simulated ones with known labels, and any others with a checksum."""

from stofm.datasets._load import load
from stofm.datasets._simulate_slice import simulate_slice

__all__ = ["load", "simulate_slice"]
