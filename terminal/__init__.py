"""What every command shares: options, JSON, messages, tables, exit codes, Ctrl-C, and time limits."""
