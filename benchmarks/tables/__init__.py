"""Recorded tables: the measured times of most configs of some dozen specs, for replaying searches and lookups.

25 times of the H100's tables (kind 1, the last ones of their specs) are of a later run: configs that a lookup chose and
that were missing, timed in turn with the spec's two best and scaled to the times that these have in the table."""
