"""Workloads of networks that people run, in the shapes in which they run them; a file each."""
