"""Simulated sections with known labels, and public sections with a checksum."""

from stofm.datasets._load import load
from stofm.datasets._simulate_slice import simulate_slice

__all__ = ["load", "simulate_slice"]
