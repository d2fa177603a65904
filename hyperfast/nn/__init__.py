"""Modules: hypernetworks, their targets, and both in one."""
