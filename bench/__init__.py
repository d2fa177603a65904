"""Measurements: named workloads, rivals side by side in one run, each one checked."""
