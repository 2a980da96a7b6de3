"""Evaluation: how good an adapter is, how sure that is, and which of two is better."""
