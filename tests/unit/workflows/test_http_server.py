"""The server's socket and certificate: what is wrong with them is known before a model is loaded."""

from __future__ import annotations

import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tunesmith.core.errors import UserError
from tunesmith.workflows.http_server import check_tls, is_loopback, listen, url_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    args = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    args += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(args, check=True, capture_output=True)
    return cert, key


def test_certificate_and_key_in_two_files_or_in_one(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = pair
    assert check_tls(str(cert), str(key)) == {"ssl_certfile": str(cert), "ssl_keyfile": str(key)}
    both = tmp_path / "both.pem"
    both.write_text(cert.read_text() + key.read_text())
    assert check_tls(str(both), None) == {"ssl_certfile": str(both)}
    assert check_tls(None, None) == {}


def test_what_is_no_certificate_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = pair
    other = tmp_path / "other.pem"
    subprocess.run(["openssl", "genrsa", "-out", str(other), "2048"], check=True, capture_output=True)
    locked = tmp_path / "locked.pem"
    args = ["openssl", "rsa", "-aes128", "-passout", "pass:x1234", "-in", str(key), "-out", str(locked)]
    subprocess.run(args, check=True, capture_output=True)
    for certificate, private, words in (
        (tmp_path / "nothing", None, "no such file"),
        (cert, tmp_path / "nothing", "--tls-key .*no such file"),
        (cert, other, "cannot be used"),
        (cert, None, "cannot be used"),
        (key, key, "cannot be used"),
        (cert, locked, "cannot be used"),
        (None, key, "without --tls-cert"),
    ):
        with pytest.raises(UserError, match=words):
            check_tls(certificate and str(certificate), private and str(private))


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


def test_listening_and_its_url() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, tls=False) == f"http://127.0.0.1:{port}"
        assert url_of(listener, tls=True) == f"https://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen on no"):
        listen("no.such.host.invalid", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_an_ipv6_address_stands_in_brackets() -> None:
    try:
        listener = listen("::1", 0)
    except UserError:
        pytest.skip("this machine has no IPv6 address")
    with listener:
        assert url_of(listener, tls=False) == f"http://[::1]:{listener.getsockname()[1]}"
