"""`nibble bench`: this server and PEFT's own loops on the same weights, in the same run."""
