"""Runnable examples on real data, short enough to copy."""
