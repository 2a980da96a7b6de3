"""From what a user wrote to token ids: chat template and truncation."""
