"""Sign the rows of a store with Ed25519 keys, and check the signatures.

A signature covers one row with all that gives it its meaning: of a binary its code, kernel, Triton version,
architecture, metadata and image; of an entry its spec (with the GPU), config, digests, source, evaluation and
environment. A signed row that is changed, or moved under another key, is no longer signed. Signatures have a table of
their own and are found by the digest of the row, so one row can be checked without reading the others.

Keys are files: a private key as ``ssh-keygen -t ed25519`` or ``openssl genpkey -algorithm ed25519`` makes it, without a
passphrase; public keys as PEM or as lines of OpenSSH. The package cryptography does the work (the extra ``sign``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .entry import Binary, BinaryKey, Entry, Signature
from .errors import MissingCryptographyError, SigningError
from .permissions import key_exposed

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    from .store import Store

_MESSAGE = "doratune store row, version 1\n"
"""The start of every signed message, so that no signature made for another purpose is one of a row."""
_MOST_KEY_BYTES = 1 << 16
_SSH_TYPE = b"ssh-ed25519"
_PEM_PUBLIC = b"-----BEGIN PUBLIC KEY-----"
_PEM_PRIVATE = (b"-----BEGIN PRIVATE KEY-----", b"-----BEGIN ENCRYPTED PRIVATE KEY-----")
_SSH_PRIVATE = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 public key. ``fingerprint`` is the text that ``ssh-keygen -l`` prints, such as ``SHA256:Tm6…``."""

    raw: bytes
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        blob = b"".join(len(part).to_bytes(4, "big") + part for part in (_SSH_TYPE, self.raw))
        digest = base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
        object.__setattr__(self, "fingerprint", f"SHA256:{digest}")

    def verifies(self, digest: str, signature: bytes) -> bool:
        """Whether ``signature`` is this key's of the row with this digest.

        Raises:
            MissingCryptographyError: the extra ``sign`` is not installed.
        """
        ed25519 = _cryptography()
        from cryptography.exceptions import InvalidSignature

        try:
            ed25519.Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _message(digest))
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class SigningKey:
    """An Ed25519 private key; read one with :func:`read_signing_key`."""

    public: PublicKey
    private: Ed25519PrivateKey = field(repr=False)

    def sign(self, digest: str) -> Signature:
        """Return the signature of the row with this digest. Equal rows have equal signatures."""
        return Signature(digest, self.public.fingerprint, self.private.sign(_message(digest)))


def entry_digest(entry: Entry) -> str:
    """The digest of all that ``entry`` says, in hexadecimal; ``entry`` as it was read from a store."""
    values: dict[str, Any] = {"spec": str(entry.spec), "config": entry.config.to_dict()}
    values |= {name: getattr(entry, name) for name in ("template_digest", "source_digest", "source", "created_at")}
    values |= {"evaluation": asdict(entry.evaluation), "environment": asdict(entry.environment)}
    if entry.final is not None:
        contenders = [asdict(each) | {"config": each.config.to_dict()} for each in entry.final.contenders]
        values["final"] = asdict(entry.final) | {"contenders": contenders}
    values["lookup_regret"] = entry.lookup_regret
    return _digest("entry", _known(values))


def binary_digest(binary: Binary) -> str:
    """The digest of the key, metadata and image of ``binary``, in hexadecimal."""
    values = {name: getattr(binary, name) for name in BinaryKey._fields}
    values |= {"metadata": binary.metadata, "image": hashlib.sha256(binary.image).hexdigest()}
    return _digest("binary", values)


def row_digest(row: Entry | Binary) -> str:
    """The digest of a row, whichever table it is of."""
    return entry_digest(row) if isinstance(row, Entry) else binary_digest(row)


def signers(store: Store, rows: Sequence[Entry | Binary], keys: Iterable[PublicKey]) -> list[PublicKey | None]:
    """For each of ``rows``, which were read from ``store``, the first of ``keys`` that signed it, or None.

    Raises:
        MissingCryptographyError: the extra ``sign`` is not installed.
    """
    named = {key.fingerprint: key for key in keys}
    digests = [row_digest(row) for row in rows]
    if not named or not digests:
        return [None] * len(digests)
    found = {(one.digest, one.key): one.signature for one in store.signatures({*digests}, named)}
    return [_signer(digest, found, named) for digest in digests]


def _signer(
    digest: str, signatures: Mapping[tuple[str, str], bytes], keys: Mapping[str, PublicKey]
) -> PublicKey | None:
    for name, key in keys.items():
        signature = signatures.get((digest, name))
        if signature is not None and key.verifies(digest, signature):
            return key
    return None


def read_signing_key(path: str | Path) -> SigningKey:
    """Read a private key that nobody else can read or write.

    Raises:
        MissingCryptographyError: the extra ``sign`` is not installed.
        SigningError: the file cannot be read, others can, or it holds no Ed25519 private key without a passphrase.
    """
    ed25519 = _cryptography()
    from cryptography.hazmat.primitives import serialization

    text = _key_text(path)
    exposed = key_exposed(Path(path))
    if exposed is not None:
        raise SigningError(f"key {path}: {exposed}")
    load = serialization.load_ssh_private_key if _SSH_PRIVATE in text else serialization.load_pem_private_key
    if not any(start in text for start in (*_PEM_PRIVATE, _SSH_PRIVATE)):
        raise SigningError(f"key {path}: not a private key; make one with: ssh-keygen -t ed25519 -N '' -f FILE")
    try:
        private = load(text, None)
    except TypeError:
        raise SigningError(f"key {path}: has a passphrase; use a key without one (ssh-keygen -p removes it)") from None
    except Exception as error:  # ValueError and others, as the version of cryptography has it
        if "password" in str(error).lower() or "encrypted" in str(error).lower():
            raise SigningError(
                f"key {path}: has a passphrase; use a key without one (ssh-keygen -p removes it)"
            ) from None
        raise SigningError(f"key {path}: damaged ({str(error)[:200]})") from None
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise SigningError(f"key {path}: not an Ed25519 key; make one with: ssh-keygen -t ed25519 -N '' -f FILE")
    return SigningKey(_public(private.public_key()), private)


def holds_public_keys(text: bytes) -> bool:
    """Whether the start of a file looks like that of a file of public keys."""
    lines = _lines(text)
    return bool(lines) and lines[0].startswith((_SSH_TYPE + b" ", _PEM_PUBLIC))


def read_public_keys(path: str | Path) -> tuple[PublicKey, ...]:
    """Read a file with a public key in PEM, or with one or more lines of OpenSSH (``ssh-ed25519 AAAA… comment``).

    Raises:
        MissingCryptographyError: the extra ``sign`` is not installed.
        SigningError: the file cannot be read, or something in it is not an Ed25519 public key.
    """
    ed25519 = _cryptography()
    from cryptography.hazmat.primitives import serialization

    text = _key_text(path)
    if any(start in text for start in (*_PEM_PRIVATE, _SSH_PRIVATE)):
        raise SigningError(f"key {path}: a private key; name its public one (for OpenSSH's: {path}.pub)")
    found: list[PublicKey] = []
    pem = _PEM_PUBLIC in text
    load = serialization.load_pem_public_key if pem else serialization.load_ssh_public_key
    for each in [text] if pem else _lines(text):
        try:
            public = load(each)
        except Exception as error:  # ValueError and others, as the version of cryptography has it
            raise SigningError(f"key {path}: not a file of Ed25519 public keys ({str(error)[:200]})") from None
        if not isinstance(public, ed25519.Ed25519PublicKey):
            raise SigningError(f"key {path}: not an Ed25519 key; other kinds are not used")
        found.append(_public(public))
    if not found:
        raise SigningError(f"key {path}: holds no public key")
    return tuple(found)


def _lines(text: bytes) -> list[bytes]:
    """The lines that are neither empty nor a comment."""
    return [line for line in map(bytes.strip, text.splitlines()) if line and not line.startswith(b"#")]


def _cryptography() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise MissingCryptographyError(
            "signatures need the package cryptography; run: pip install 'doratune[sign]'"
        ) from None
    return ed25519


def _public(key: Ed25519PublicKey) -> PublicKey:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return PublicKey(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


def _key_text(path: str | Path) -> bytes:
    try:
        where = Path(path).expanduser()
        if not stat.S_ISREG(where.stat().st_mode):
            raise SigningError(f"key {path}: not a file; name a key's file")
        with where.open("rb") as file:
            text = file.read(_MOST_KEY_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:
        raise SigningError(f"key {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(text) > _MOST_KEY_BYTES:
        raise SigningError(f"key {path}: larger than {_MOST_KEY_BYTES} bytes; not a file of keys")
    return text


def _message(digest: str) -> bytes:
    return f"{_MESSAGE}{digest}".encode()


def _digest(kind: str, values: Mapping[str, Any]) -> str:
    # JSON and not joined texts, so that no two rows have the same bytes.
    text = json.dumps([kind, values], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _known(value: Any) -> Any:
    """The value without the parts that are None: a later version may add such parts to an older row."""
    if isinstance(value, dict):
        return {name: _known(part) for name, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_known(part) for part in value]
    return value
