"""Tests and measurements on a GPU."""
