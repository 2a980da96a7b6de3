"""The serving wing: HTTP, admission, the engine and the residency of adapters."""
