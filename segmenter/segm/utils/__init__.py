"""Devices, processes and logging."""
