"""The same races on a GPU, and what the choices of its plans rest on: ``bench/gpu/gpu.sh``."""
