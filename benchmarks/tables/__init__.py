"""Recorded tables: the times of (nearly) all configs of some specs on one GPU, and what is learnt from them without it.

:mod:`.read` reads a table, :mod:`.replay` lets a search run over it, :mod:`.search_quality` measures such searches.
"""
