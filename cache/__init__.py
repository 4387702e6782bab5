"""The store of winners: entries, schema, the stack of stores and lookup."""
