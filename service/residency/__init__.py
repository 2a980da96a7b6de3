"""Where adapters live while they serve: host cache and slots."""
