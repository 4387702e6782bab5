"""The store of winners: entries, schema, layers and lookup."""
