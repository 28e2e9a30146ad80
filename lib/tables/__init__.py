"""A user's tables, pictures and vectors: opened, checked, trusted in nothing. May import lib.stages."""
