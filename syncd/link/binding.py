"""Channel binding: what ties a login to the TLS connection that it is made in.

A man in the middle who has got hold of a certificate that we trust still has another one than
the server: with ``tls-server-end-point`` (RFC 5929 section 4) the proof of the password covers
the certificate, so that passing it on is of no use to him.
"""

from __future__ import annotations

import logging

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes

log = logging.getLogger(__name__)


def tls_server_end_point(der: bytes) -> bytes | None:
    """Hash a certificate by the hash function of its own signature (RFC 5929 section 4.1).

    Args:
      der: The server's certificate, as it came.

    Returns:
      The hash, or None where the RFC leaves it open: a signature without a single hash
      function, such as Ed25519.
    """
    try:
        algorithm = x509.load_der_x509_certificate(der).signature_hash_algorithm
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        # OpenSSL is satisfied with certificates that break the letter of RFC 5280.
        log.info("no channel binding with the server's certificate: %s", error)
        return None
    if algorithm is None:
        return None
    # Broken as they are, these two only say which certificate; the RFC replaces them.
    if isinstance(algorithm, hashes.MD5 | hashes.SHA1):
        algorithm = hashes.SHA256()
    digest = hashes.Hash(algorithm)
    digest.update(der)
    return digest.finalize()
