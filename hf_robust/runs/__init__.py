"""Whole runs, from parsed flags to the files they leave: what the examples and the command line call."""
