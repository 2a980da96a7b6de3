"""Who may do what: API keys, scopes, tenants, quotas, and the record of what was done."""
