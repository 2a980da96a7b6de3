"""Traces of requests, where somebody collects them."""
