"""Initialization, signal propagation and normalization-free training for any Flax model."""
