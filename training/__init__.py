"""The training wing: makes the adapters that the service serves, over the same base."""
