"""The drop-ins for other people's frameworks."""
