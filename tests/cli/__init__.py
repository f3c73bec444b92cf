"""Tests of the command line, run in-process on a tiny model."""
