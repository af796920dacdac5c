"""Evaluation room: linear probe, attacked accuracy and pictures."""
