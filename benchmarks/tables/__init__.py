"""Recorded tables: the measured times of most configs of some dozen specs, for replaying searches and lookups."""
