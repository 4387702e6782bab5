"""The errors of a store, as types. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

from ..errors import DoratuneError, UsageError


class LocationError(UsageError):
    """The text does not name a store: an unknown URL scheme, an in-memory database, an empty path."""


class NoHomeError(DoratuneError):
    """This user has no folder for a store, or ``DORATUNE_HOME`` is not a folder path."""


class StoreError(DoratuneError):
    """A store could not be opened, read or written; the base of the errors below."""

    lines = False


class MissingStoreError(StoreError):
    """There is no store at the location."""


class NotAStoreError(StoreError):
    """What is at the location is not a doratune store. It is left as it is."""


class CorruptStoreError(StoreError):
    """The store's file is damaged: truncated, or overwritten in part."""


class CorruptRowError(StoreError):
    """A row holds an invalid value; the message names the row and the store.

    ``row_id`` is the id of a row that the database itself cannot give.
    """

    row_id: int | None = None


class InvalidEntryError(StoreError):
    """The entry or binary to be stored is not valid, so nothing was written."""


class NewerStoreError(StoreError):
    """The store has a schema that this version of doratune does not know."""


class OlderStoreError(StoreError):
    """The store has an earlier schema and was opened read-only, so it could not be migrated."""


class ReadOnlyStoreError(StoreError):
    """The store cannot be written: it was opened read-only, or the disk, file or database is read-only."""


class StoreAccessError(StoreError):
    """The system denied access: no permission, a disk error, a full disk, or another process held a lock too long."""


class UnreachableStoreError(StoreError):
    """The database server does not answer, or refuses the login."""


class MissingDriverError(StoreError):
    """The Python driver for the database is not installed."""


class SigningError(DoratuneError):
    """A key cannot be used: its file is missing, damaged, of another kind, or others can read or write it."""


class MissingCryptographyError(SigningError):
    """Signatures were asked for and the package cryptography is not installed."""


class TrustError(UsageError):
    """An item of ``DORATUNE_TRUST`` or ``--trust`` names neither a store, a folder nor a file of public keys."""


class MergeConflictError(StoreError):
    """Stores to be merged have entries of one spec that differ, and neither is to be preferred."""
