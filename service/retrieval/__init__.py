"""Retrieval: collections of documents, cut into passages that a prompt can quote."""
