"""What every command shares: options, JSON, messages, tables, exit codes, and Ctrl-C."""
