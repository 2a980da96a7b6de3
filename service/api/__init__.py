"""HTTP: routes and wire schemas, one file per skin; errors become replies in one place."""
