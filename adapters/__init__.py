"""What an adapter is: manifest, checks, store, lowering, and the operator that applies it."""
