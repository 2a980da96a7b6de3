"""Continuous batching over one base: schedule, run, sample, deliver."""
