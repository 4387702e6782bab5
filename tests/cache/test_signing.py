"""Rows can be signed with an Ed25519 key; a row that is changed, or moved under another key, is no longer signed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from doratune.cache.entry import Binary, Entry, Signature
from doratune.cache.errors import SigningError
from doratune.cache.signing import (
    PublicKey,
    SigningKey,
    binary_digest,
    entry_digest,
    read_public_keys,
    read_signing_key,
    signers,
)
from doratune.cache.store import Store
from doratune.codegen.spec import Config

from .world import a_binary, a_spec, an_entry, with_final

OPENSSH = serialization.PrivateFormat.OpenSSH
PKCS8 = serialization.PrivateFormat.PKCS8

LOCKED = """-----BEGIN OPENSSH PRIVATE KEY-----
b3BlbnNzaC1rZXktdjEAAAAACmFlczI1Ni1jdHIAAAAGYmNyeXB0AAAAGAAAABDCNfoOjg
ItwktdKE2rgoMEAAAAEAAAAAEAAAAzAAAAC3NzaC1lZDI1NTE5AAAAIPCs5JgYCd6uFM/q
F5PdC9Y5pN2kKJH3zKymqEZ/eoNWAAAAkAMUMqtLLqhm6pVp/na81qOzt4Ev4ZawCpiskx
IpJXEy3ICjsIlMXiltfNqSeHjpkotwNeNadc/+r0yZncqlE2Y2SeGszigU/LheHP4vYTUq
QQsyczWraHAG2SA6TKB3LEpV9xDDxfoQ/BfxAWHzO3mYZVRZEoYjd6LPWi0a/G1C9yC6iP
mm7CUXeTZw8E2WDQ==
-----END OPENSSH PRIVATE KEY-----
"""
"""Made by ssh-keygen with the passphrase "secret", because cryptography writes such files only with another package."""


def write_key(path: Path, form: serialization.PrivateFormat = OPENSSH, password: bytes | None = None) -> SigningKey:
    """Write a new private key to ``path`` and its public one beside it, as ssh-keygen does."""
    key = ed25519.Ed25519PrivateKey.generate()
    protection = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    path.touch(0o600)
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, protection))
    public = key.public_key()
    line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(path.name + ".pub").write_bytes(line + b" somebody@somewhere\n")
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return SigningKey(PublicKey(raw), key)


@pytest.fixture
def key(tmp_path: Path) -> SigningKey:
    write_key(tmp_path / "key")
    return read_signing_key(tmp_path / "key")


# Rows.


def test_an_export_is_signed_row_by_row_and_a_store_of_any_kind_keeps_the_signatures(
    place: str, tmp_path: Path, key: SigningKey
) -> None:
    signed = tmp_path / "signed.sqlite"
    with Store.open(place, create=True) as store:
        store.put_all([an_entry(), with_final(an_entry(a_spec(rank=16)))])
        store.put_binary(a_binary())
        store.export(signed, sign=key)
        assert signers(store, store.entries(), [key.public]) == [None, None]
        with Store.open(signed, readonly=True) as copy:
            rows: list[Entry | Binary] = [*copy.entries(), *copy.binaries()]
            assert signers(copy, rows, [key.public]) == [key.public] * 3
            store.put_signatures(copy.signatures())
        assert signers(store, [*store.entries(), *store.binaries()], [key.public]) == [key.public] * 3


def test_an_export_keeps_signatures_of_what_it_holds_and_adds_its_own(tmp_path: Path, key: SigningKey) -> None:
    other = write_key(tmp_path / "other")
    first, second, third = (tmp_path / f"{name}.sqlite" for name in ("first", "second", "third"))
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put(an_entry())
        store.put_binary(a_binary())
        store.export(first, sign=key)
    with Store.open(first, readonly=True) as store:
        store.export(second, sign=other, binaries=False)
        store.export(third, sign=key)
    with Store.open(second, readonly=True) as store:
        assert len(store.signatures()) == 2
        assert signers(store, store.entries(), [key.public, other.public]) == [key.public]
        assert signers(store, store.entries(), [other.public]) == [other.public]
    assert first.read_bytes() == third.read_bytes()


def test_signatures_of_many_rows_are_found(tmp_path: Path, key: SigningKey) -> None:
    binaries = [a_binary(f"code-{number}") for number in range(300)]
    digests = {binary_digest(binary) for binary in binaries}
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put_signatures(key.sign(digest) for digest in (*digests, "another"))
        assert {one.digest for one in store.signatures(digests)} == digests
        assert {one.digest for one in store.signatures([*digests][:3])} == {*[*digests][:3]}
        assert signers(store, binaries, [key.public]) == [key.public] * 300


def changed_entries(entry: Entry) -> list[Entry]:
    assert entry.final is not None
    changed = [
        replace(entry, spec=a_spec("h100")),
        replace(entry, spec=a_spec(rank=16)),
        replace(entry, config=Config.parse(f"{entry.config}".replace("num_warps=4", "num_warps=8"))),
        replace(entry, template_digest="other"),
        replace(entry, source_digest="other"),
        replace(entry, source=entry.source + "#"),
        replace(entry, created_at="2026-11-24T10:00:00+00:00"),
        replace(entry, lookup_regret=1.0),
        replace(entry, final=None),
        replace(entry, final=replace(entry.final, contenders=entry.final.contenders[:1])),
        replace(entry, final=replace(entry.final, settled=False)),
    ]
    for name in (each.name for each in fields(entry.evaluation)):
        value = getattr(entry.evaluation, name)
        other = (1.0,) if isinstance(value, tuple) else "predicted" if isinstance(value, str) else 7
        changed.append(replace(entry, evaluation=replace(entry.evaluation, **{name: other})))
    for name in (each.name for each in fields(entry.environment)):
        changed.append(replace(entry, environment=replace(entry.environment, **{name: "another"})))
    return changed


def test_every_part_of_a_row_is_signed() -> None:
    entry, binary = with_final(), a_binary()
    digests = {entry_digest(each) for each in changed_entries(entry)}
    assert len(digests) == len(changed_entries(entry))
    assert entry_digest(entry) not in digests
    others = [replace(binary, **{each.name: "another"}) for each in fields(binary) if each.name != "image"]
    others += [replace(binary, image=binary.image + b"\0"), replace(binary, kernel="compose_kernel\0", triton="3.7.1")]
    assert binary_digest(binary) not in {binary_digest(each) for each in others}
    assert len({binary_digest(each) for each in others}) == len(others)


def test_a_row_that_was_moved_under_another_key_is_not_signed(tmp_path: Path, key: SigningKey) -> None:
    """Whoever writes the store can copy images and signatures, but not make a signature for another meaning."""
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        honest = a_binary()
        store.put_binary(honest)
        store.put_signatures([key.sign(binary_digest(honest))])
        for moved in (replace(honest, code_digest="code-2"), replace(honest, triton="3.8.0")):
            store.put_binary(moved)
            signature = next(iter(store.signatures())).signature
            store.put_signatures([Signature(binary_digest(moved), key.public.fingerprint, signature)])
        found = dict(
            zip(map(binary_digest, store.binaries()), signers(store, store.binaries(), [key.public]), strict=True)
        )
        assert [digest for digest, by in found.items() if by is not None] == [binary_digest(honest)]


def test_a_signature_of_another_key_or_of_the_wrong_length_is_none(tmp_path: Path, key: SigningKey) -> None:
    stranger = write_key(tmp_path / "stranger")
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put_binary(a_binary())
        digest = binary_digest(a_binary())
        store.put_signatures([stranger.sign(digest)])
        assert signers(store, store.binaries(), [key.public]) == [None]
        for forged in (stranger.sign(digest).signature, b"", b"\0" * 64, b"\0" * 1000):
            store.put_signatures([Signature(digest, key.public.fingerprint, forged)])
            assert signers(store, store.binaries(), [key.public]) == [None]
        store.put_signatures([key.sign(digest)])
        assert signers(store, store.binaries(), [stranger.public, key.public]) == [stranger.public]
        assert signers(store, store.binaries(), []) == [None]


# Keys.


@pytest.mark.parametrize("form", [OPENSSH, PKCS8], ids=["openssh", "pem"])
def test_keys_of_openssh_and_of_openssl_are_read(tmp_path: Path, form: serialization.PrivateFormat) -> None:
    made = write_key(tmp_path / "key", form)
    assert read_signing_key(tmp_path / "key").public == made.public
    public = made.private.public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "public.pem").write_bytes(pem)
    (tmp_path / "two.pub").write_bytes(b"# team\n\n" + (tmp_path / "key.pub").read_bytes() * 2)
    assert read_public_keys(tmp_path / "public.pem") == read_public_keys(tmp_path / "key.pub") == (made.public,)
    assert read_public_keys(tmp_path / "two.pub") == (made.public,) * 2


def test_a_fingerprint_is_the_one_that_ssh_keygen_prints() -> None:
    line = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPCs5JgYCd6uFM/qF5PdC9Y5pN2kKJH3zKymqEZ/eoNW test"
    public = serialization.load_ssh_public_key(line)
    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    assert PublicKey(raw).fingerprint == "SHA256:5XlvYpTi2FKRIWfGx3qz4yaJYOBjUfccxJ3EPHCx2wQ"


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    write_key(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(SigningError, match=r"key .*: others can read or write it \(mode 640\); chmod 600 "):
        read_signing_key(tmp_path / "key")


def test_a_file_that_is_no_usable_key_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_key(tmp_path / "locked.pem", PKCS8, b"secret")
    write_key(tmp_path / "key")
    curve = ec.generate_private_key(ec.SECP256R1())
    pem = curve.private_bytes(serialization.Encoding.PEM, PKCS8, serialization.NoEncryption())
    public = curve.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    contents = {
        "locked": LOCKED.encode(),
        "curve": pem,
        "curve.pub": public,
        "cut": (tmp_path / "key").read_bytes()[:200],
        "cut.pub": b"ssh-ed25519 AAAA",
        "text": b"hello",
        "empty": b"",
        "big": b"\n" * (1 << 17),
    }
    for name, content in contents.items():
        (tmp_path / name).touch(0o600)
        (tmp_path / name).write_bytes(content)
    private = {
        "locked": "has a passphrase",
        "locked.pem": "has a passphrase",
        "curve": "not an Ed25519 key",
        "cut": "damaged",
        "text": "not a private key",
        "key.pub": "not a private key|others can read",
        "empty": "not a private key",
        "big": "larger than",
        "missing": "No such file",
        ".": "not a file",
    }
    for name, said in private.items():
        with pytest.raises(SigningError, match=said):
            read_signing_key(tmp_path / name)
    for name, said in {
        "key": "a private key; name its public one",
        "curve.pub": "not an Ed25519 key",
        "cut.pub": "not a file of Ed25519",
        "text": "not a file of Ed25519",
        "empty": "holds no public key",
        "missing": "No such file",
    }.items():
        with pytest.raises(SigningError, match=said):
            read_public_keys(tmp_path / name)


WITHOUT = """
import sys
sys.modules["cryptography"] = None
from doratune.cache.errors import MissingCryptographyError
from doratune.cache.signing import read_public_keys, read_signing_key
from doratune.cache.store import Store
for read in (read_signing_key, read_public_keys):
    try:
        read(sys.argv[1])
    except MissingCryptographyError as error:
        print(error)
with Store.open(sys.argv[2], readonly=True) as store:
    print(len(store.signatures()), len(store.entries()))
"""


def test_without_cryptography_stores_work_and_the_error_names_the_extra(tmp_path: Path, key: SigningKey) -> None:
    with Store.open(tmp_path / "store.sqlite", create=True) as store:
        store.put(an_entry())
        store.export(tmp_path / "signed.sqlite", sign=key)
    arguments = [str(tmp_path / "key"), str(tmp_path / "signed.sqlite")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, check=True)
    said = "signatures need the package cryptography; run: pip install 'doratune[sign]'"
    assert done.stdout.splitlines() == [said, said, "1 1"]
