"""Confirmation and verdict: which optimizer is faster, how stable, how sure."""
