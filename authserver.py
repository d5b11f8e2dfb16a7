#!/usr/bin/env python3
# MIT licence; see LICENSE.  One of two files that work together or alone: daemonize.py.
"""Serve over HTTP to who has a password: Basic and Digest, from one dictionary.

    python3 authserver.py passwd users jim          (asks for jim's password, twice)
    python3 authserver.py --passwords users
    curl --digest -u jim http://127.0.0.1:8081/example/foo

One exchange, as it goes over the wire (\\ marks a line broken for this page):

    GET /example/foo HTTP/1.1
                                401 Unauthorized
                                WWW-Authenticate: Digest realm="files", nonce="AQ...x7", \\
                                    qop="auth", algorithm=MD5, charset=UTF-8
                                WWW-Authenticate: Basic realm="files", charset="UTF-8"
    GET /example/foo HTTP/1.1
    Authorization: Digest username="jim", realm="files", nonce="AQ...x7", \\
        uri="/example/foo", qop=auth, nc=00000001, cnonce="f2", response="8ca5...dbec"
                                200 OK
                                Authentication-Info: rspauth="9b71...09a5", qop=auth, \\
                                    nc=00000001, cnonce="f2"

Throughout this file

    realm           the name of what is protected; a password is for one realm
    challenge       what a 401 asks for: one WWW-Authenticate line per scheme and algorithm
    credentials     what an Authorization field brings
    HA1             H(user:realm:password): all that a server must know for Digest, and,
                    because Basic brings the password itself, all it must know for Basic
    HA2             H(method:uri): the request
    response        H(HA1:nonce:nc:cnonce:qop:HA2): the proof
    nonce           our signed time stamp in the proof; nc counts its uses; cnonce is
                    random text of the client
    stale           the proof is right but its nonce is not, or no longer: try again with
                    this one, and do not ask the person
    qop             what the proof covers: auth = method and uri, auth-int = the body as well
    -sess           form of an algorithm that mixes nonce and cnonce into HA1
    target          what the request line asks for, as sent, before any clean-up
    head            request line and fields; an exchange is one request and its answer
    peer            who is at the other end of the socket; host is whom the log names, client
                    whom a lock-out would hit: with a proxy between, these are three
    memo            what one exact head meant, to be checked again and not parsed again

The way of a request: bytes -> head (7) -> Authorization (1) -> credentials (2, 3) -> the one
dictionary (4) -> Verdict (5) -> handler (8) -> one write (9, 10). Sections 11 to 13 put it
before other people's handlers and applications, and on the command line.

For programs: protect(HandlerClass, passwords), protect_wsgi(application, passwords),
Passwords({"jim": "secret"}, realm="files"), AuthServer.  daemonize.py finds add_arguments()
and bind().

See: RFC 7616 (Digest), RFC 7617 (Basic), RFC 9110 (HTTP), RFC 9112 (its messages).
"""
import argparse
import base64
import collections
import contextlib
import email.utils
import errno
import fcntl
import functools
import hashlib
import heapq
import hmac
import html
import http.client
import http.server
import io
import ipaddress
import math
import mmap
import os
import re
import resource
import selectors
import shlex
import signal
import socket
import socketserver
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.parse
import weakref
from typing import (Any, BinaryIO, Callable, Deque, Dict, Iterable, List, Mapping,
                    NamedTuple, Optional, Sequence, Set, TextIO, Tuple, Union)

# -- 0. Settings and messages -------------------------------------------------

DEFAULT_ADDRESS = "127.0.0.1:8081"      # the article's port
REALM = "authserver"
SCHEMES = ("digest", "basic")   # Digest first: urllib reads only the first challenge
ALGORITHMS = ("MD5",)       # alone: urllib (until 3.13) fails when SHA-256 stands before it
QOP = ("auth",)             # "auth-int" beside it makes wget fall back to RFC 2069
NONCE_LIFETIME = 300.0      # seconds; with 5 nobody could log in from Safari
NEXT_NONCE = 0.9            # of that life; then answers bring the next nonce along
CLOCK_SKEW = 30.0           # seconds that machines with one nonce secret may differ
NC_WINDOW = 128             # uses of a nonce that may overtake one another: two 64-bit words
NONCE_SLOTS = 1 << 16       # nonces in use whose counts are kept, 32 bytes each
CLIENT_SLOTS = 1 << 13      # clients whose failures are counted, 24 bytes each
MAX_FAILURES = (10, 60.0)   # wrong passwords in so many seconds: more than a person mistypes
MAX_CREDENTIALS = 16384     # characters of an Authorization field: a uri of 8 KiB fits
MAX_TEXT = 1024             # bytes of a name or user:password; to normalize 16 KiB takes 100 ms
MAX_CHALLENGE = 255         # characters; wget (1.21 to 1.24) aborts on more, before another
SLOW_HASHES = 2             # verified at a time, so that guessing cannot take every CPU
SLOW_QUEUE = 32             # more that may wait for their turn; the next is told 503
REMEMBERED = 8192           # slow hashes found right, by a keyed hash; 150 bytes each
COUNTERS = ("requests", "challenges", "failures", "stale", "replays", "lockouts", "malformed",
            "busy", "workers")
MAX_LINE = 8192         # bytes of request line (RFC 9112 section 3 asks for 8000); beyond: 414
MAX_HEAD = 32768        # bytes of a request head; browsers stop at about 16 KiB; beyond: 431
MAX_FIELDS = 100        # field lines, as many as http.client reads; beyond: 431
MAX_BODY = 1 << 30      # bytes of request body, for handlers that take uploads; beyond: 413
READ_SIZE = 1 << 14     # bytes per recv(2) in the loop: nearly every head comes in one
PIPELINED = 4           # requests of one connection answered before others get their turn
SLICE = 0.001           # seconds of a turn for requests that wait in buffers: 200 clients had 16 ms
IN_MEMORY = 1 << 16     # bytes of body, and of answers, that the loop holds for a connection
MAX_MEMOS = 512         # heads remembered per listening address, about 3 KiB each
MAX_CONNECTIONS = 20000     # per worker, where the limit of open files allows; about 20 MiB
MAX_PER_CLIENT = 1000       # of them from one address, or IPv6 /64: a large office behind one NAT
SPARE_FILES = 64        # descriptors kept back, for logs and for what handlers open
BACKLOG = 1024          # connections that the kernel queues; http.server's 5 loses SYNs
BATCH = 16              # connections accepted at a time, before others get their turn
POOL_THREADS = 40       # handlers that may wait at a time, in a thread each; beyond: 503
PACE_SECONDS = 30.0     # for each 64 KiB of body or answer: who is slower than 2 KiB/s goes
WAITS = {               # seconds that a connection may spend
    "first": 20.0,      # from accept to the first byte
    "head": 20.0,       # from the first byte of a head to its last: not per byte
    "body": PACE_SECONDS,       # reading a body in the loop, of at most 64 KiB
    "write": PACE_SECONDS,      # writing, and as long again for every 64 KiB that went
    "idle": 75.0,       # between two requests; browsers wait for 60 to 120 s
    "linger": 10.0,     # sending, though it has been refused
    "pool": float("inf"),       # with a handler: the streams have their own deadlines
}
PAUSE_SECONDS = 0.02    # between looks whether we may accept connections (again)
DRAIN_SECONDS = 1       # for which a draining server waits for a connection's next request
PROBE_SECONDS = 5       # for the answer to probe()


class Refusal(ValueError):
    """What a person must read instead of a running server; a second line may say `try:`."""

    status = 2              # of the command: a mistake in what it was given


class BindError(Refusal):
    """An address that cannot be had: no mistake of usage."""

    status = 1


class Malformed(ValueError):
    """Credentials that break the grammar: 400, whoever sent them."""


class Busy(Exception):
    """Too many slow hashes wait for their turn: 503."""


# -- 1. Reading the header ----------------------------------------------------
#
# One strict parser. It accepts what RFC 9110 allows, blanks around "=", empty list
# elements and quoted pairs included; all else raises Malformed, so that no later line
# meets a form it does not expect. Header fields are bytes; they are held as text by
# Latin-1, which gives the same bytes back.

# RFC 9110 section 5.6.2: token = 1*tchar
TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
# RFC 9110 section 5.6.4: quoted-string = DQUOTE *( qdtext / quoted-pair ) DQUOTE
# Unrolled: each byte fits in one place only, so a quotation that never ends fails in linear time.
QDTEXT = r'[^"\\\x00-\x08\x0a-\x1f\x7f]*'
QUOTED_STRING = rf'"({QDTEXT}(?:\\[\t\x20-\x7e\x80-\xff]{QDTEXT})*)"'
# RFC 9110 section 11.2: auth-param = token BWS "=" BWS ( token / quoted-string )
match_param = re.compile(
    rf'[ \t,]*({TOKEN})[ \t]*=[ \t]*(?:({TOKEN})|{QUOTED_STRING})[ \t]*(?:,|\Z)').match
is_token = re.compile(TOKEN).fullmatch
# RFC 9110 section 11.2: token68 = 1*( ALPHA / DIGIT / "-" / "." / "_" / "~" / "+" / "/" ) *"="
is_token68 = re.compile(r"[A-Za-z0-9\-._~+/]+=*").fullmatch
# RFC 2617 section 3.2.2: nc-value = 8LHEX; RFC 7616 section 3.4: it counts from 1
is_nc = re.compile(r"(?!0{8})[0-9a-fA-F]{8}").fullmatch
# 32 digits of MD5, or 64 of SHA-256 and SHA-512-256; whether the length is right shows later.
is_response = re.compile(r"[0-9a-fA-F]{32}(?:[0-9a-fA-F]{32})?").fullmatch
# RFC 8187 section 3.2.1: ext-value = charset "'" [ language ] "'" value-chars
match_extended = re.compile(r"(?i)UTF-8'[^']*'([^']*)").fullmatch
has_control = re.compile(r"[\x00-\x1f\x7f]").search


class DigestCredentials(NamedTuple):
    """What a Digest Authorization field claims; nothing in it is believed yet."""

    usernames: Tuple[str, ...]      # the readings of the name, likeliest first
    userhash: bool                  # the name is H(user:realm)
    realm: str
    nonce: str
    uri: str
    response: str
    algorithm: str
    qop: str                        # "" in the old form of RFC 2069
    nc: str
    cnonce: str


def parse_authorization(value: str) -> Tuple[str, str, Dict[str, str]]:
    """Return scheme, token and parameters of credentials; escapes in values are kept.

    >>> parse_authorization("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==")
    ('basic', 'QWxhZGRpbjpvcGVuIHNlc2FtZQ==', {})
    >>> parse_authorization('DIGEST username = "a,b" , ,NC=1')
    ('digest', '', {'username': 'a,b', 'nc': '1'})

    See: RFC 9110 section 11.4; 11.2 (in a challenge, a parameter "MUST only occur once").
    """
    # credentials = auth-scheme [ 1*SP ( token68 / #auth-param ) ]
    scheme, _, rest = value.strip(" \t").partition(" ")
    rest = rest.strip(" \t")
    if len(value) > MAX_CREDENTIALS or not is_token(scheme):
        raise Malformed("no scheme, or too long")
    # No form is both: after the "=" of a token68 comes nothing, after a parameter's comes a value.
    if is_token68(rest):
        return scheme.lower(), rest, {}
    params: Dict[str, str] = {}
    # Commas at the end are empty elements, and those are no error: RFC 9110 section 5.6.1.2.
    position, end = 0, len(rest.rstrip(" \t,"))
    while position < end:
        match = match_param(rest, position)
        if match is None or match.group(1).lower() in params:
            raise Malformed("parameter syntax" if match is None else "a parameter twice")
        params[match.group(1).lower()] = match.group(2) or match.group(3) or ""
        position = match.end()
    return scheme.lower(), "", params


def unescape(value: str) -> str:
    r"""Return a quoted-string's content without the backslashes of its quoted pairs.

    >>> unescape(r'DOM\\jim')
    'DOM\\jim'
    """
    return re.sub(r"\\(.)", r"\1", value) if "\\" in value else value


def from_octets(octets: bytes) -> str:
    """Return octets as text in Unicode's composed form: UTF-8 if they are that, else Latin-1.

    All challenges ask for UTF-8, yet requests, aiohttp and old browsers send Latin-1;
    text in Latin-1 is hardly ever valid UTF-8 by accident.

    See: RFC 7617 section 2.1, RFC 7616 section 4.
    """
    try:
        text = octets.decode("utf-8")
    except UnicodeDecodeError:
        text = octets.decode("latin-1")
    # Before normalize(): its time grows with the square of a run of combining marks.
    if len(octets) > MAX_TEXT or has_control(text):
        raise Malformed("name or password too long, or with control characters")
    return unicodedata.normalize("NFC", text)


def decode_basic(token: str) -> Tuple[str, str]:
    """Return user name and password from the token of Basic credentials.

    >>> decode_basic("QWxhZGRpbjpvcGVuIHNlc2FtZQ==")
    ('Aladdin', 'open sesame')

    See: RFC 7617 section 2.
    """
    try:
        octets = base64.b64decode(token)
    except ValueError:
        octets = b""
    # The decoder passes over what is not base64: only encoding again shows that it did.
    if not octets or base64.b64encode(octets) != token.encode("ascii"):
        raise Malformed("not base64")
    # user-pass = user-id ":" password
    username, colon, password = from_octets(octets).partition(":")
    if not colon:
        raise Malformed("no colon")
    return username, password


def read_usernames(params: Mapping[str, str]) -> Tuple[str, ...]:
    r"""Return the readings of username or username*, likeliest first.

    Four of six clients send DOMAIN\user with a bare backslash, and curl has begun to
    percent-encode what is not ASCII. Trying all readings helps no stranger: the proof
    must fit the entry that is found.

    >>> read_usernames({"username": r"DOM\jim"})
    ('DOMjim', 'DOM\\jim')
    >>> read_usernames({"username*": "UTF-8''J%C3%A4s%C3%B8n%20Doe"})
    ('Jäsøn Doe',)

    See: RFC 7616 section 3.4 (username*).
    """
    raw, extended = params.get("username"), match_extended(params.get("username*", ""))
    if raw is None and extended is not None:
        return (from_octets(urllib.parse.unquote_to_bytes(extended.group(1))),)
    # "Sending both username and username* ... MUST be treated as an error": RFC 7616 section 3.4.
    if raw is None or "username*" in params:
        raise Malformed("username")
    octets = raw.encode("latin-1")
    forms = [octets]
    if "\\" in raw:
        forms.insert(0, unescape(raw).encode("latin-1"))
    if "%" in raw:
        forms.append(urllib.parse.unquote_to_bytes(octets))
    return tuple(map(from_octets, forms))


def parse_digest(params: Mapping[str, str]) -> DigestCredentials:
    """Return the credentials in the parameters of a Digest Authorization field.

    See: RFC 7616 section 3.4.
    """
    realm, nonce, uri, response, algorithm, qop, nc, cnonce = (params.get(name, "") for name in (
        "realm", "nonce", "uri", "response", "algorithm", "qop", "nc", "cnonce"))
    userhash = params.get("userhash", "").lower() == "true"
    if not realm or not nonce or not uri or not is_response(response):
        raise Malformed("realm, nonce, uri or response")
    # No qop is the form of RFC 2069: well-formed, so no 400; _check_digest refuses it with 401.
    if qop and not (is_nc(nc) and cnonce) or len(realm + nonce + cnonce) > MAX_TEXT:
        raise Malformed("nc or cnonce, or something is too long")
    if userhash and "username*" in params:
        raise Malformed("userhash with username*")
    # uri stays as it came: curl sends a backslash in it bare, as in its request line.
    return DigestCredentials(
        read_usernames(params), userhash, unescape(realm), unescape(nonce), uri, response.lower(),
        # No algorithm means MD5; an unknown one becomes "", which is never offered: 401, not 400.
        CANONICAL.get(algorithm.lower() or "md5", ""), qop, nc, unescape(cnonce))


# -- 2. Digest arithmetic -----------------------------------------------------
#
# MD5 is broken where an attacker chooses both texts. Here it hashes a secret with the
# request, and for that it is not known to be broken; but it is fast, as is SHA-256: who
# records one exchange can try millions of passwords a second against it. MD5 is the
# default because every client knows it.


def find_hash(*names: str) -> Optional[Callable[[bytes], Any]]:
    """Return the constructor of the first of these hashes that this Python has, or None.

    In FIPS mode MD5 is there only for who says usedforsecurity=False (from Python 3.9
    on; on RHEL 8 in its 3.6 too). Elsewhere older Pythons do not know that word.
    """
    for name in names:
        maker = getattr(hashlib, name, None) or functools.partial(hashlib.new, name)
        # Called, not only looked up: in FIPS mode hashlib.md5 is there, and raises ValueError.
        for make in (maker, functools.partial(maker, usedforsecurity=False)):
            try:
                make(b"")
            except (TypeError, ValueError):
                continue
            return make
    return None


FOUND = {"MD5": find_hash("md5"), "SHA-256": find_hash("sha256"),
         "SHA-512-256": find_hash("sha512_256", "sha512-256")}
# H is the same with -sess; only A1 differs (digest_ha1_session).
HASHES = {name + sess: found for name, found in FOUND.items() if found for sess in ("", "-sess")}
CANONICAL = {(name + sess).lower(): name + sess for name in FOUND for sess in ("", "-sess")}


def to_hex(algorithm: str, octets: bytes) -> str:
    """Return the algorithm's hash of octets in hexadecimal digits."""
    return str(HASHES[algorithm](octets).hexdigest())


def hash_name(algorithm: str) -> str:
    """Return the algorithm without its -sess: an HA1 is kept under that name."""
    return algorithm[:-5] if algorithm.endswith("-sess") else algorithm


def digest_ha1(username: str, realm: str, password: str, algorithm: str = "MD5") -> str:
    """Return HA1, the only part of the digest that depends on the password.

    >>> digest_ha1("Mufasa", "http-auth@example.org", "Circle of Life")
    '3d78807defe7de2157e2b0b6573a855f'

    See: RFC 7616 section 3.4.2.
    """
    # A1 = unq(username) ":" unq(realm) ":" passwd
    # surrogatepass: a lone surrogate, which only a program can pass, is wrong and no exception.
    return to_hex(algorithm, f"{username}:{realm}:{password}".encode("utf-8", "surrogatepass"))


def digest_ha1_session(ha1: str, nonce: str, cnonce: str, algorithm: str = "MD5-sess") -> str:
    """Return the HA1 of a -sess algorithm, from the stored one.

    See: RFC 7616 section 3.4.2.
    """
    # A1 = H( unq(username) ":" unq(realm) ":" passwd )
    #      ":" unq(nonce-prime) ":" unq(cnonce-prime)
    # Latin-1 gives back the bytes that the client hashed, whatever encoding they were meant in.
    return to_hex(algorithm, f"{ha1}:{nonce}:{cnonce}".encode("latin-1"))


def digest_ha2(method: str, uri: str, algorithm: str = "MD5", body: Optional[bytes] = None) -> str:
    """Return HA2, which ties the proof to this request; with a body, in its auth-int form.

    >>> digest_ha2("GET", "/dir/index.html")
    '39aff3a2bab6126f332b942af96d3366'

    See: RFC 7616 section 3.4.3.
    """
    # A2 = Method ":" request-uri                       (auth)
    # A2 = Method ":" request-uri ":" H(entity-body)    (auth-int)
    # None and b"" differ: under auth-int a request without a body proves that it has none.
    integrity = "" if body is None else ":" + to_hex(algorithm, body)
    return to_hex(algorithm, f"{method}:{uri}{integrity}".encode("latin-1"))


def digest_response(ha1: str, nonce: str, nc: str, cnonce: str, qop: str, ha2: str,
                    algorithm: str = "MD5") -> str:
    """Return the proof that whoever made it knows HA1.

    >>> digest_response("939e7578ed9e3c518a452acee763bce9", "dcd98b7102dd2f0e8b11d0f600bfb0c093",
    ...                 "00000001", "0a4f113b", "auth", "39aff3a2bab6126f332b942af96d3366")
    '6629fae49393a05397450978507c4ef1'

    See: RFC 7616 section 3.4.1.
    """
    # KD(secret, data) = H(secret ":" data), and secret is H(A1).
    # response = KD ( H(A1), unq(nonce) ":" nc ":" unq(cnonce) ":" unq(qop) ":" H(A2) )
    return to_hex(algorithm, f"{ha1}:{nonce}:{nc}:{cnonce}:{qop}:{ha2}".encode("latin-1"))


def digest_userhash(username: str, realm: str, algorithm: str = "MD5") -> str:
    """Return what a client sends as its name when it hides the name.

    See: RFC 7616 section 3.4.4.
    """
    # username = H( unq(username) ":" unq(realm) )
    return to_hex(algorithm, f"{username}:{realm}".encode())


# -- 3. Nonces, and what the workers share ------------------------------------
#
# A nonce says when it was made and carries our signature: a 401 costs no memory, nor do
# a million of them. Memory is spent only once a right response has used a nonce: the
# table then knows which counts (nc) are used up. Without it, whoever records a request
# could send it again for as long as the nonce lives.
#
# The table is memory that was mapped before the workers were forked. Memory alone has
# no atomic test-and-set: of 20,000 races forced between two processes both won 19,985.
# So a slot is read and written under fcntl.lockf on a byte of its own (3 us), which the
# kernel gives back when a worker dies, and under a thread lock, because POSIX record
# locks do not keep the threads of one process apart. They vanish when the process closes
# ANY descriptor of the file; so one object holds the only one. The locked file stays
# empty: if it were mapped, a full disk would turn the first touch of a page into SIGBUS.
#
# Nothing here grows. A newer nonce takes over the slot of an older one, and no slot ever
# accepts an older nonce than the newest it has held: what was forgotten is never good
# again. Its owner is told `stale` and comes back with a new nonce, in another slot.

# 27 bytes are 36 characters of base64 and no padding: a nonce has one spelling.
is_nonce = re.compile(r"[A-Za-z0-9_-]{36}").fullmatch


def sign(key: bytes, data: bytes) -> bytes:
    """Return 12 bytes that only a holder of the key can make."""
    # BLAKE2 takes a key, so this is a MAC by itself: a third of the time of HMAC with SHA-256.
    return hashlib.blake2s(data, key=key, digest_size=12).digest()


def make_nonce(key: bytes, now: float, salt: bytes) -> str:
    """Return a nonce: time, salt (6 random bytes and 4 that name the issuer), signature.

    >>> make_nonce(b"key", 1.0, b"random" + b"boot")
    'AAAAAGRyYW5kb21ib290W8okM-1KMPfcdDSm'

    See: RFC 7616 section 3.3, also why the client's address is not in it: "requests from
    a single user often go through different proxies".
    """
    # Hundredths of a second in 40 bits last until the year 2318.
    body = int(now * 100).to_bytes(5, "big") + salt
    return base64.urlsafe_b64encode(body + sign(key, body)).decode("ascii")


def nonce_time(body: bytes) -> float:
    """Return when a nonce was made, in seconds since the epoch."""
    return int.from_bytes(body[:5], "big") / 100


def check_nonce(nonce: str, key: bytes, now: float, lifetime: float = NONCE_LIFETIME,
                issuer: bytes = b"", start: float = 0.0) -> Optional[bytes]:
    r"""Return the first 15 bytes of a nonce of ours that is still good, else None.

    Another issuer with the same key counts as us from start on, when we began to watch:
    before that it may have seen this nonce used.

    >>> check_nonce(make_nonce(b"key", 1.0, b"random" + b"boot"), b"key", now=300.9)
    b'\x00\x00\x00\x00drandomboot'
    >>> check_nonce(make_nonce(b"key", 1.0, b"random" + b"boot"), b"key", now=301.0)
    """
    # What has not the form of a nonce takes the same way: no signature equals b"".
    signed = base64.urlsafe_b64decode(nonce) if is_nonce(nonce) else b""
    body, issued = signed[:15], nonce_time(signed)
    if not hmac.compare_digest(sign(key, body), signed[15:]):
        return None
    if not issued - CLOCK_SKEW <= now < issued + lifetime:
        return None
    # Nonces of ours were watched from the start; those of another machine since our own start.
    return body if body[-4:] == issuer or issued >= start else None


def advance_window(highest: int, seen: int, nonce_count: int) -> Optional[Tuple[int, int]]:
    """Return the window of a nonce after this use, or None when the use is refused.

    Bit i of seen stands for highest - i. Browsers and aiohttp send counts out of order
    over several connections; inside the window each is accepted once. No shift exceeds
    the window: 1 << 0xffffffff would take half a gigabyte.

    >>> advance_window(5, 0b1, 7)
    (7, 5)
    >>> advance_window(7, 0b101, 6)
    (7, 7)
    >>> advance_window(7, 0b101, 5)

    See: RFC 7616 section 3.4 (nc); RFC 4303 section 3.4.3, where IPsec does the same.
    """
    ahead = nonce_count - highest
    if ahead > 0:
        # This is ((seen << ahead) | 1) if ... else 1: a use too far ahead forgets all older ones.
        seen = seen << ahead | 1 if ahead < NC_WINDOW else 1
        return nonce_count, seen & (1 << NC_WINDOW) - 1
    if -ahead >= NC_WINDOW or seen >> -ahead & 1:
        return None
    return highest, seen | 1 << -ahead


# A slot: whose it is, a count, and two words. A nonce: time and random bytes, highest nc,
# its window. A client: fingerprint, failures, since when. All others: one value.
SLOT = struct.Struct("<11sxIQQ")
Slot = Tuple[bytes, int, int, int]
COUNTER_SLOT = NONCE_SLOTS + CLIENT_SLOTS       # the first of them


def use_up(body: bytes, nonce_count: int, slot: Slot) -> Union[Slot, str]:
    """Return the slot with this use of a nonce in it, or why the use is refused."""
    identity, highest, low_word, high_word = slot
    if identity != body[:11]:
        # <=, not <: two nonces of one hundredth of a second could take the slot from each other in
        # turn, and with it their counts: the same nc would pass again and again.
        if body[:5] <= identity[:5]:
            return "stale"
        highest = low_word = high_word = 0
    # The 128 bits of the window lie in two words, for struct has no longer one.
    window = advance_window(highest, high_word << 64 | low_word, nonce_count)
    if window is None:
        return "replay"
    return body[:11], window[0], window[1] & (1 << 64) - 1, window[1] >> 64


def add_failure(client: bytes, now: int, limit: int, ticks: int, slot: Slot) -> Union[Slot, str]:
    """Return the slot with one more failure of client; the last one starts the lock-out.

    A newcomer takes over the slot of another client, unless that one is locked out. Times
    are in hundredths of a second.
    """
    owner, failures, since, _ = slot
    recent = since <= now < since + ticks
    if owner != client and recent and failures >= limit:
        return "taken"
    if owner != client or not recent:
        failures, since = 0, now
    failures += 1
    return client, failures, now if failures >= limit else since, 0


def open_nameless_file() -> int:
    """Return a descriptor of an empty file without a name; first in memory, if there is room."""
    # /dev/shm is memory. None is the usual place, /tmp; there the file stays as empty.
    for folder in ("/dev/shm", None):
        try:
            fd, path = tempfile.mkstemp(prefix="authserver-", dir=folder)
            os.unlink(path)
            return fd
        except OSError as error:
            reason = error.strerror
    raise Refusal(f"unable to make a temporary file: {reason}")


class SharedTable:
    """What all workers must agree on, in memory they share; made before they are forked.

    Methods for the authenticator: accept, count_failure, lock_left.
    Methods for the server: add, statistics.
    """

    _fd = -1

    def __init__(self) -> None:
        # -1: no file. mmap shares by default, so what a forked worker writes all others see.
        self._memory = mmap.mmap(-1, SLOT.size * (COUNTER_SLOT + len(COUNTERS)))
        self._fd = open_nameless_file()
        self._mutex = threading.Lock()
        self._key = os.urandom(16)          # nobody can choose names of clients that collide
        self.alone = False                  # True: no other process has this table

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def _read(self, slot: int) -> Slot:
        found: Slot = SLOT.unpack_from(self._memory, SLOT.size * slot)
        # No lock: a torn read may show a wrong number once; it never passes a nonce (accept does).
        return found

    def _change(self, slot: int, change: Callable[[Slot], Union[Slot, str]]) -> str:
        """Put what change makes of a slot in its place, or return why it would not."""
        with self._mutex:
            try:
                if not self.alone:
                    fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, slot)
                new = change(SLOT.unpack_from(self._memory, SLOT.size * slot))
                if isinstance(new, str):
                    return new
                SLOT.pack_into(self._memory, SLOT.size * slot, *new)
                return ""
            finally:
                if not self.alone:
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, slot)

    def accept(self, body: bytes, nonce_count: int) -> str:
        """Use up this count of a nonce and return "", or return why not."""
        # The last two of the six random bytes: they are random, so no hash has to spread them.
        slot = int.from_bytes(body[9:11], "big") % NONCE_SLOTS
        return self._change(slot, functools.partial(use_up, body, nonce_count))

    def _client_slot(self, client: str) -> Tuple[int, bytes]:
        signature = sign(self._key, client.encode("utf-8", "replace"))
        return NONCE_SLOTS + int.from_bytes(signature[8:], "big") % CLIENT_SLOTS, signature[:11]

    def count_failure(self, client: str, now: float, limit: int, seconds: float) -> bool:
        """Count a wrong password of client; return whether that locks it out."""
        slot, name = self._client_slot(client)
        self._change(slot, functools.partial(add_failure, name, int(now * 100), limit,
                                             int(seconds * 100)))
        return self.lock_left(client, now, limit, seconds) > 0

    def lock_left(self, client: str, now: float, limit: int, seconds: float) -> float:
        """Return the seconds for which client is still locked out, or 0."""
        slot, name = self._client_slot(client)
        owner, failures, since, _ = self._read(slot)
        if owner != name or failures < limit or since > now * 100:
            return 0.0
        return max(0.0, since / 100 + seconds - now)

    def add(self, counter: str, amount: int = 1) -> None:
        """Add to one of COUNTERS."""
        self._change(COUNTER_SLOT + COUNTERS.index(counter),
                     # struct pads b"" with NULs; slot[2] is the one value.
                     lambda slot: (b"", 0, slot[2] + amount, 0))

    def statistics(self) -> Dict[str, int]:
        """Return all COUNTERS with their values."""
        return {name: self._read(COUNTER_SLOT + index)[2] for index, name in enumerate(COUNTERS)}


# -- 4. Passwords: one dictionary for both schemes ----------------------------
#
# Basic brings a password, Digest a proof made from HA1. A checker that compares passwords
# can never serve Digest: in the second article all looked well, and every log-in failed
# in silence. But HA1 can be made from the password; so a dictionary of HA1s serves both,
# and holds no password. What it cannot serve (from a htpasswd hash there is no way to
# HA1) is found at start, and not by the user in front of the door.
#
# An HA1 is worth as much as the password, for this realm: who reads it can log in. "Do
# not use it because in-memory passwords can be a security hole", says Twisted of its own
# dictionary; this one is as safe as the permissions of its file. A line with `plain` is no
# worse for this realm. It is for all others in which the same person has the same password:
# so it is for tests, and for programs that write the file themselves.
#
# Limits have twins: what no client could send, or some clients would spoil, is refused
# here, where the person who chose it can choose again. So is what one reader of the file
# would take for something else than another: a blank at an end, a letter nobody sees.

# How hashes begin: {SHA} and {SSHA} of htpasswd, the others are libcrypt's business.
B64 = "[A-Za-z0-9+/]"
# {SSHA}: 20 bytes and at least 1 of salt make at least 28 characters; 27 and "=" have no salt.
# Without $apr1$: libcrypt does not know it, and its 1000 rounds would be a loop in Python.
is_crypted = re.compile(rf"\{{SHA\}}{B64}{{27}}=|\{{SSHA\}}(?:{B64}{{4}}){{7,}}(?:{B64}{{2}}==|"
                        rf"{B64}{{3}}=)?|\$(?!apr1\$)[0-9a-z]+\$[!-9;-~]+").fullmatch
# With rounds or cost and without the salt: what decides how long a hash is, and takes.
match_kind = re.compile(r"\{[^}]*\}|\$[156]\$(?:rounds=\d+\$)?|\$[^$]*\$[^$]*\$").match
is_ha1 = re.compile("[0-9a-fA-F]{32}(?:[0-9a-fA-F]{32})?").fullmatch
# Most clients send a backslash bare: before the closing quotation mark it would escape that.
is_username = re.compile(r'(?!-$|[# ])[^:"]{1,255}(?<![ \\])').fullmatch
BCRYPT_BYTES = 72           # of a password; libcrypt does not read the rest
SHA1 = find_hash("sha1")


class Entry(NamedTuple):
    """What is known of one user."""

    username: str
    line: int                       # of the file; 0 = from elsewhere
    ha1: Dict[str, str]             # hash name -> HA1
    crypted: str                    # a htpasswd hash, or ""

    @property
    def kind(self) -> str:
        """How the password is kept."""
        match = match_kind(self.crypted)
        return match.group() if match else " and ".join(self.ha1) + " HA1"


def command(*words: str) -> str:
    """Return a command line for this file that can be pasted into a shell."""
    return " ".join(map(shlex.quote, ("python3", os.path.abspath(__file__)) + words))


def passwd_command(path: str, usernames: Sequence[str], realm: str) -> str:
    """Return the command that sets the password of the first of these, "" if none can."""
    # What is no regular file is a pipe or a folder; a new file has no form yet.
    if not usernames or path == "-" or os.path.exists(path) and not os.path.isfile(path):
        return ""
    return command("passwd", path, usernames[0], *["--realm", realm][:2 * (realm != REALM)])


def normal_username(username: str) -> str:
    r"""Return the normal form of a name that clients, log and readers of the file can handle.

    >>> normal_username("Ju\u0308rgen")
    'Jürgen'
    """
    if not username.isprintable() or not is_username(username):
        raise Refusal(f"unable to use user name {username!r}: it is -, empty or longer than 255, "
                      f"or has # or a blank at its start, \\ or a blank at its end, or a colon, \" "
                      f"or invisible character")
    return unicodedata.normalize("NFC", username)


def normal_password(username: str, password: str) -> str:
    """Return the normal form of a password that this user can send under both schemes."""
    password = unicodedata.normalize("NFC", password)
    # surrogatepass, and surrogates refused: they stand for bytes that were no text.
    octets = f"{username}:{password}".encode("utf-8", "surrogatepass")
    if not password or has_control(password) or re.search("[\ud800-\udfff]", password):
        raise Refusal("unable to use this password: empty, or control characters in it")
    if len(octets) > MAX_TEXT:
        raise Refusal(f"unable to use this password: too long, Basic carries {MAX_TEXT} bytes of "
                      f"name, colon and password")
    return password


def check_realm(realm: str) -> None:
    r"""Refuse a realm that clients or the password file would misunderstand.

    wget, urllib, requests and httpx all answer wrongly to a " or \ in it; in the file a
    colon ends it, and `plain`, { and $ begin something else.
    """
    if not re.fullmatch(r"(?!plain$|[ {$])[ !#-9;-\[\]-~]+(?<! )", realm):
        raise Refusal(f"unable to use realm {realm!r}: printable ASCII without \" \\ or colon, "
                      f"not `plain`, and not {{ $ or blank at its ends")


def entry_of_password(username: str, line: int, realm: str, password: str) -> Entry:
    """Return an entry that serves every scheme and algorithm, and forget the password."""
    password = normal_password(username, password)
    ha1 = {name: digest_ha1(username, realm, password, name) for name in FOUND if name in HASHES}
    return Entry(username, line, ha1, "")


def matches_sha(stored: str, password: str) -> bool:
    """Return whether password fits a {SHA} or {SSHA} hash.

    >>> matches_sha("{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=", "secret")
    True
    """
    octets = base64.b64decode(stored.partition("}")[2])     # the hash, then the salt
    phrase = password.encode("utf-8", "surrogatepass")
    found = (SHA1 or hashlib.sha1)(phrase + octets[20:]).digest()
    return hmac.compare_digest(found, octets[:20])


@functools.lru_cache(maxsize=None)
def load_crypt() -> Tuple[Callable[[bytes, bytes], Optional[bytes]], threading.Semaphore]:
    """Return crypt(phrase, setting) of the C library, and how many may call it at a time.

    Python's own crypt left with 3.13, and stopped all threads while it hashed. crypt(3) keeps
    its result where all threads write theirs: one at a time where there is no crypt_r(3).
    """
    for name in ("libcrypt.so.1", "libcrypt.so.2", "libcrypt.so.5", None):
        try:
            import ctypes           # 3 ms and a megabyte, only for who has such hashes
            library = ctypes.CDLL(name)
            function = getattr(library, "crypt_r", None) or library.crypt
        except (ImportError, OSError, AttributeError):
            continue
        function.restype = ctypes.c_char_p
        if not hasattr(library, "crypt_r"):
            return function, threading.Semaphore(1)
        # struct crypt_data has 131,232 bytes in an old glibc, and less elsewhere.
        return (lambda phrase, setting, crypt_r=function: crypt_r(
            phrase, setting, ctypes.create_string_buffer(160 * 1024)),
            threading.Semaphore(SLOW_HASHES))
    return (lambda phrase, setting: None), threading.Semaphore(1)


ENDINGS: Dict[str, int] = {}        # kind of hash -> length of what follows its last "$"


def check_crypted(entry: Entry) -> Entry:
    """Return an entry whose hash this machine can verify; else raise Refusal.

    A kind is tried once, with the first user's salt. The others must be as long, or an
    editor has cut them off.
    """
    kind, ending = entry.kind, len(entry.crypted.rpartition("$")[2])
    if not is_crypted(entry.crypted):
        raise Refusal(f"field 2: {entry.crypted[:5]}... is no hash we know (htpasswd -B makes one)")
    if kind[0] == "{" and SHA1 is None:
        raise Refusal(f"field 2: the hashlib of this Python lacks SHA-1, for {kind}")
    if kind[0] == "$" and kind not in ENDINGS:
        function, turns = load_crypt()
        with turns:
            made = (function(b"probe", entry.crypted.encode("ascii")) or b"").decode("latin-1")
        if not made.startswith(kind):
            raise Refusal(f"field 2: the libcrypt of this machine does not know {kind}, or "
                          f"something is wrong with the salt")
        ENDINGS[kind] = len(made.rpartition("$")[2])
    if ENDINGS.get(kind, ending) != ending:
        raise Refusal(f"field 2: a {kind} hash of the wrong length")
    return entry


def split_line(text: str) -> Tuple[str, str, str]:
    """Return the fields of a line: user, place, value; the place of a htpasswd hash is "".

    >>> split_line("jim:plain:se:cret"), split_line("ann:{SHA}0=")
    (('jim', 'plain', 'se:cret'), ('ann', '', '{SHA}0='))
    """
    username, _, rest = text.partition(":")
    place, colon, value = rest.partition(":")
    if rest.startswith(("{", "$")):
        if colon:
            raise Refusal(f"user {username!r}: field 3: nothing may follow a hash of htpasswd")
        return normal_username(username), "", rest
    if not place or not value:
        raise Refusal("expected user:realm:HA1, user:HASH or user:plain:PASSWORD, "
                      "but a field is missing")
    if place != "plain" and not is_ha1(value):
        raise Refusal(f"user {username!r}: field 3: neither 32 nor 64 hex digits")
    return normal_username(username), place, value


def make_entry(line: int, username: str, realm: str, place: str, value: str) -> Entry:
    """Return the entry that the fields of a line stand for.

    >>> make_entry(1, "jim", "files", "files", "5e93c589edbe9d5867a3bce43a1066c1").ha1
    {'MD5': '5e93c589edbe9d5867a3bce43a1066c1'}
    """
    if place == "plain":
        return entry_of_password(username, line, realm, value)
    if not place:
        return check_crypted(Entry(username, line, {}, value))
    # The length tells which hash: 64 digits count as SHA-256, though SHA-512-256 has as many.
    name = "MD5" if len(value) == 32 else "SHA-256"
    if name not in HASHES:
        raise Refusal(f"field 3: the hashlib of this Python lacks {name}")
    return Entry(username, line, {name: value.lower()}, "")


def add_entry(entries: Dict[str, Entry], entry: Entry, realm: str) -> None:
    """Add an entry, unless it lets everybody in, or contradicts an earlier one of its user."""
    # Without any password; slow hashes are not tried.
    if (entry.crypted[:1] == "{" and matches_sha(entry.crypted, "")
            or any(digest_ha1(entry.username, realm, "", name) == entry.ha1[name]
                   for name in entry.ha1)):
        raise Refusal("an empty password")
    first = entries.setdefault(entry.username, entry)
    # A second line may add the HA1 of another hash, and nothing else.
    if first is not entry and (first.crypted or entry.crypted or set(first.ha1) & set(entry.ha1)):
        raise Refusal(f"again, after line {first.line}")
    first.ha1.update(entry.ha1)


class Found(NamedTuple):
    """What is in a password file."""

    entries: Dict[str, Entry]       # by user
    mistakes: List[str]             # each with its line
    curable: List[str]              # users whose mistakes a new password would cure
    elsewhere: Set[str]             # realms that are not ours


def parse_passwords(text: str, realm: str) -> Found:
    """Return what is in a password file; blanks at a line's ends are cut off, as Apache does.

    >>> parse_passwords("# staff\\njim:plain:secret\\n jim:plain:other \\n", "files").mistakes
    ["line 3: user 'jim': again, after line 2"]
    """
    found = Found({}, [], [], set())
    # Not splitlines(): it also divides at a form feed or U+2028, and the numbers would be wrong.
    for line, content in enumerate(text.split("\n"), 1):
        content = content.strip(" \t\r")
        if not content or content.startswith("#"):
            continue
        whose = ""
        try:
            username, place, value = split_line(content)
            if place in ("", "plain", realm):
                whose = username
                add_entry(found.entries, make_entry(line, username, realm, place, value), realm)
            else:
                found.elsewhere.add(place)
        except Refusal as error:
            found.mistakes.append(f"line {line}: " + f"user {whose!r}: " * bool(whose) + f"{error}")
            found.curable.extend([whose] * bool(whose))
    if not found.entries and not found.mistakes:
        others = ", but of " * bool(found.elsewhere) + ", ".join(sorted(found.elsewhere))
        found.mistakes.append(f"no user of realm {realm} in it" + others)
        found.curable.append(FIRST_USER)
    return found


def refuse_file(what: str, mistakes: Sequence[str], cure: str) -> Refusal:
    """Return the Refusal of a file, with up to ten mistakes and the command that cures one.

    >>> str(refuse_file("use passwords F", ["a", "b"], "chmod 600 F"))
    'unable to use passwords F: a; b\\ntry: chmod 600 F'
    """
    more = [f"and {len(mistakes) - 10} more"] * (len(mistakes) > 10)
    return Refusal(f"unable to {what}: " + "; ".join(list(mistakes[:10]) + more)
                   + f"\ntry: {cure}" * bool(cure))


def is_exposed(fd: int) -> bool:
    """Return whether others may read or change an open file of secrets.

    Containers are given theirs as 0444: root's, or on a mount that nobody can write to, and
    who is in the container may read them anyway.
    """
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or not found.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        return False
    is_roots = found.st_uid == 0 != os.geteuid() and not found.st_mode & 0o222
    return not is_roots and not os.fstatvfs(fd).f_flag & os.ST_RDONLY


def read_text(path: str, realm: str) -> Tuple[str, bool]:
    """Return the text of a password file, and whether others may read or change it."""
    try:
        # closefd: with descriptor 0 closed, the next file opened would be "standard input".
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as stream:
            exposed, octets = is_exposed(stream.fileno()), stream.read()
        # -sig: some editors put U+FEFF at the start, which would become part of the first name.
        return octets.decode("utf-8-sig"), exposed
    except FileNotFoundError as error:
        raise refuse_file(f"read passwords {path}", [str(error.strerror)],
                          passwd_command(path, [FIRST_USER], realm))
    except OSError as error:
        raise Refusal(f"unable to read passwords {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        # 10 is a line feed: until Python 3.12 no backslash may stand inside an f-string's braces.
        raise Refusal(f"unable to read passwords {path}: "
                      f"line {octets.count(10, 0, error.start) + 1}: not UTF-8")


class Passwords:
    """The one knower of passwords, for Basic and for Digest.

    Passwords({"jim": "secret"}, realm="files") makes HA1s at once and forgets the passwords;
    Passwords.read() takes a file. Nothing in it changes afterwards: a reload makes a new
    one, and with it go the remembered verdicts.
    """

    def __init__(self, users: Optional[Mapping[str, str]] = None, realm: str = REALM,
                 entries: Optional[Mapping[str, Entry]] = None, source: str = "FILE") -> None:
        check_realm(realm)
        self.realm, self.source = realm, source
        self.entries: Dict[str, Entry] = dict(entries or {})
        for username, password in (users or {}).items():
            name = normal_username(username)
            self.entries[name] = entry_of_password(name, 0, realm, password)
        # What stands in for unknown users, so that they cost what others cost.
        # False < True: if any hash is slow, the decoy is.
        self._decoy = max(self.entries.values(), key=lambda entry: entry.crypted[:1] == "$",
                          default=Entry("", 0, {"SHA-256": ""}, ""))
        self._secret = os.urandom(32)
        self._remembered: Set[bytes] = set()

    @classmethod
    def read(cls, path: str, realm: str = REALM) -> "Passwords":
        """Read the password file at path ("-" = standard input), or name all its mistakes."""
        text, exposed = read_text(path, realm)
        found = parse_passwords(text, realm)
        if exposed:
            raise refuse_file(f"use passwords {path}", ["everybody may read or change it"],
                              f"chmod 600 {shlex.quote(path)}")
        if found.mistakes:
            raise refuse_file(f"use passwords {path}", found.mistakes,
                              passwd_command(path, found.curable, realm))
        return cls(None, realm, found.entries, path)

    @property
    def warnings(self) -> List[str]:
        """What a person should know of the hashes in it."""
        kinds = sorted({entry.kind if entry.crypted else "HA1" for entry in self.entries.values()})
        mixed = [f"{' and '.join(kinds)} in one file: the time of an answer tells which a user has"]
        return mixed * (len(kinds) > 1) + [
            f"{kind} in {self.source}: bcrypt knows {BCRYPT_BYTES} bytes of a password, longer "
            f"ones are refused" for kind in kinds if kind.startswith("$2")]

    def fingerprint(self) -> bytes:
        """Return 32 bytes that tell this dictionary from all others."""
        known = [(entry.username, sorted(entry.ha1.items()), entry.crypted)
                 for entry in self.entries.values()]
        return hashlib.sha256(repr((self.realm, sorted(known))).encode("utf-8")).digest()

    def check_servable(self, schemes: Sequence[str], algorithms: Sequence[str]) -> None:
        """Refuse what some user could never answer, however right the password.

        This is the trap of the second article, where Digest was offered and the checker
        knew Basic only.
        """
        gaps = [(entry, algorithm) for entry in self.entries.values() if "digest" in schemes
                for algorithm in algorithms if hash_name(algorithm) not in entry.ha1]
        texts = [f"line {entry.line}: user {entry.username!r} has only {entry.kind}: cannot "
                 f"answer Digest {algorithm}" for entry, algorithm in gaps]
        if texts:
            cure = passwd_command(self.source, [gaps[0][0].username], self.realm)
            raise refuse_file(f"serve every user of {self.source}", texts,
                              (cure + "   # or: ") * bool(cure) + "--schemes basic")

    def find(self, usernames: Iterable[str]) -> Optional[Entry]:
        """Return the entry of the first of these names that has one."""
        return next((self.entries[name] for name in usernames if name in self.entries), None)

    def check_password(self, username: str, password: str) -> bool:
        """Return whether this is the password of that user; may wait for a slow hash."""
        username, password = (unicodedata.normalize("NFC", text) for text in (username, password))
        # libcrypt would stop reading at a NUL.
        return not has_control(password) and self.verify(username, password)

    def is_slow(self, username: str) -> bool:
        """Return whether to verify this user's password takes long; for unknown ones, too."""
        return self.entries.get(username, self._decoy).crypted.startswith("$")

    def is_known(self, username: str, password: str) -> bool:
        """Return whether this is remembered as right, so that to verify it takes no time."""
        crypted = self.entries.get(username, self._decoy).crypted
        return self._key(crypted, password) in self._remembered

    def verify(self, username: str, password: str) -> bool:
        """Do what check_password() does, for normal forms."""
        entry = self.entries.get(username)
        model = entry or self._decoy
        if model.crypted.startswith("$"):
            correct = self._verify_slow(model.crypted, password)
        elif model.crypted:
            correct = matches_sha(model.crypted, password)
        else:
            # The first line: it is the one that Apache's htdigest changes, and no other.
            name = next(iter(model.ha1))
            correct = hmac.compare_digest(
                digest_ha1(username, self.realm, password, name), model.ha1[name])
        # What fits the decoy is no password of a stranger.
        return correct and entry is not None

    def _key(self, crypted: str, password: str) -> bytes:
        """Return what a verdict is remembered by: no password, and useless elsewhere."""
        return sign(self._secret, f"{crypted}:{password}".encode("utf-8", "surrogatepass"))

    def _verify_slow(self, crypted: str, password: str) -> bool:
        """Return a remembered yes, or find out. A no is never kept."""
        phrase, key = password.encode("utf-8", "surrogatepass"), self._key(crypted, password)
        if key in self._remembered:
            return True
        # All that begin with the same 72 bytes would be right: $2a$, $2b$, $2y$.
        if crypted.startswith("$2") and len(phrase) > BCRYPT_BYTES:
            return False
        setting, (function, turns) = crypted.encode("ascii"), load_crypt()
        with turns:
            # Another request with the same password may have gone before.
            # crypt(3) returns setting and hash in one, and takes such a whole as setting.
            correct = key in self._remembered or hmac.compare_digest(
                function(phrase, setting) or b"", setting)
        if correct:
            # All at once: what is forgotten is hashed again at its next use, that is all.
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            self._remembered.add(key)
        return correct


# -- 5. The authenticator -----------------------------------------------------
#
# The order of checks is a promise. Grammar first: what is malformed gets 400, whoever it
# names. Then realm, algorithm and qop, and the uri: it must be the very target of the
# request line (RFC 7616 section 3.4.6); four servers that we tried do not compare it, and
# there a header recorded on /x opens /secret. Then the response, made with the user's
# HA1, or for a stranger with one that nobody has. Only for a right response the nonce and
# its count: who has no password can use up nothing, and learns nothing.
#
# A memo is the result of all that for one exact head; again() looks at what can differ
# between two requests with that head. There are none of refusals, so nobody without a
# password makes the server remember anything.


Fields = Tuple[Tuple[str, str], ...]


class Verdict(NamedTuple):
    """What the authenticator says about a request."""

    status: int                     # 200, 400, 401, 429 or 503; 0: ask again, it takes time
    username: Optional[str] = None                  # who it is; with 200 only
    log_user: str = "-"                             # that, or who it wrongly claimed to be
    reason: str = ""                                # for the error log
    fields: Fields = ()                             # header fields of the answer
    scheme: str = ""                                # "Basic", "Digest" or ""
    memo: Optional["Memo"] = None                   # with 200


class Memo:
    """How to check again a head that has been checked in full.

    Whoever keeps it keeps it for one client at one listening address, and asks is_locked
    first: else a right guess under another's head would show in spite of the lock-out.
    """

    def __init__(self, authenticator: "Authenticator", username: str, nc: str = "",
                 response: str = "") -> None:
        self.authenticator, self.passwords = authenticator, authenticator.passwords
        self.username, self.nc, self.response = username, nc, response
        self.verdict = Verdict(200, username, username, "", (), "Basic", self)

    def is_for(self, nc: str, response: str) -> bool:
        """Return whether the keeper, with a simpler pattern, found the same nc and response."""
        return nc == self.nc and response == self.response

    def again(self, now: float, nc: str, response: str) -> Optional[Fields]:
        """Return the fields to send if verdict holds again, or None: take the full path.

        The same Basic head brings the same password: right, as long as the dictionary is
        the same.
        """
        return () if self.passwords is self.authenticator.passwords else None


class DigestMemo(Memo):
    """All of a Digest proof but nc and response, hashed as far as it goes.

    It serves the full path too: make one, see whether it proves the response, use it.
    """

    def __init__(self, authenticator: "Authenticator", credentials: DigestCredentials,
                 username: str, ha1: str, ha2: str) -> None:
        super().__init__(authenticator, username, credentials.nc, credentials.response)
        nonce, cnonce, algorithm = credentials.nonce, credentials.cnonce, credentials.algorithm
        if algorithm.endswith("-sess"):
            ha1 = digest_ha1_session(ha1, nonce, cnonce, algorithm)
        # RFC 7616 section 3.5: a server SHOULD answer with the client's qop. But our own
        # proof under auth-int would need the body of an answer that is not made yet.
        # An answer has no method: A2 = ":" request-uri (RFC 7616 section 3.5).
        mutual = digest_ha2("", credentials.uri, algorithm)
        self._start = HASHES[algorithm](f"{ha1}:{nonce}:".encode("latin-1"))
        self._tail = f":{cnonce}:{credentials.qop}:{ha2}"
        self._mutual_tail = f":{cnonce}:auth:{mutual}"
        self._cnonce = re.sub(r'(["\\])', r"\\\1", cnonce)
        self.body = b""                     # of the nonce, once it has been checked
        self.born = self.fresh_until = 0.0

    def _hash(self, nc_and_tail: str) -> str:
        """Return the hash of a proof; what never changes of it has been hashed already."""
        state = self._start.copy()
        state.update(nc_and_tail.encode("latin-1"))
        digits: str = state.hexdigest()
        return digits

    def proves(self, nc: str, response: str) -> bool:
        """Return whether whoever made this response knows HA1."""
        # As bytes: compare_digest() refuses text beyond ASCII, and again() passes on anything.
        return hmac.compare_digest(self._hash(nc + self._tail).encode("ascii"),
                                   response.encode("latin-1"))

    def info(self, nc: str) -> Fields:
        """Return Authentication-Info: we know HA1 too. See: RFC 7616 section 3.5."""
        proof = self._hash(nc + self._mutual_tail)
        info = f'rspauth="{proof}", qop=auth, nc={nc}, cnonce="{self._cnonce}"'
        return (("Authentication-Info", info),)

    def again(self, now: float, nc: str, response: str) -> Optional[Fields]:
        """See Memo. What differs under Digest: nc and response, and the nonce grows old."""
        known = self.passwords is self.authenticator.passwords
        if not known or not is_nc(nc) or not self.proves(nc, response):
            return None
        # A clock set back makes the nonce one of the future: the full path knows about that.
        if not self.born - CLOCK_SKEW <= now < self.fresh_until:
            return None
        # Last: what has not proved its response must not use up a count.
        if self.authenticator.table.accept(self.body, int(nc, 16)):
            return None
        return self.info(nc)


class Attempt(NamedTuple):
    """What the authenticator may know of a request."""

    method: str
    target: str                     # as sent, before any clean-up
    client: Optional[str]           # whom a lock-out would hit, or None
    now: float
    schemes: Sequence[str]
    read_body: Callable[[], bytes]
    blocking: bool


def challenges(realm: str, nonce: str, schemes: Sequence[str] = SCHEMES,
               algorithms: Sequence[str] = ALGORITHMS, qop: Sequence[str] = QOP,
               stale: bool = False, userhash: bool = False) -> List[str]:
    """Return the values of the WWW-Authenticate fields, one per scheme and algorithm.

    >>> for challenge in challenges("files", "abc", stale=True): print(challenge)
    Digest realm="files", nonce="abc", qop="auth", algorithm=MD5, charset=UTF-8, stale=true
    Basic realm="files", charset="UTF-8"

    See: RFC 7616 section 3.3 (what is quoted and what is not), section 3.7 (several).
    """
    # text * True is the text, text * False is "".
    extras = ", userhash=true" * userhash + ", stale=true" * stale
    lines = {"basic": [f'Basic realm="{realm}", charset="UTF-8"'],
             "digest": [f'Digest realm="{realm}", nonce="{nonce}", qop="{",".join(qop)}", '
                        f'algorithm={name}, charset=UTF-8{extras}' for name in algorithms]}
    return [line for scheme in schemes for line in lines[scheme]]


def is_same_target(uri: str, target: str) -> bool:
    """Return whether the uri of a proof is the target of the request line, as sent.

    As sent: http.server makes /x of //x, and the proof is about what was asked for. A
    target in absolute form may stand for its path: that is what clients of a proxy prove.

    >>> is_same_target("/x?a=1", "/x"), is_same_target("/x", "http://host/x")
    (False, True)

    See: RFC 7616 section 3.4.6, which would have them prove the absolute form.
    """
    return uri == target or uri[:1] == "/" and uri == re.sub("(?i)^https?://[^/?#]*", "", target)


def check_offer(realm: str, schemes: Sequence[str], algorithms: Sequence[str],
                qop: Sequence[str], userhash: bool = False) -> None:
    """Refuse to offer what we, this Python or the clients cannot do."""
    for what, given, known in (("scheme", schemes, SCHEMES), ("qop", qop, ("auth", "auth-int")),
                               ("algorithm", algorithms, tuple(CANONICAL.values()))):
        if not given or len(set(given)) < len(given) or not set(given) <= set(known):
            raise Refusal(f"unable to offer {what} {','.join(given)}: "
                          f"one or more of {', '.join(known)}, each once")
    for name in set(algorithms) - set(HASHES):
        raise Refusal(f"unable to offer algorithm {name}: the hashlib of this Python lacks it")
    longest = max(map(len, challenges(realm, "n" * 36, schemes, algorithms, qop, True, userhash)))
    if longest > MAX_CHALLENGE:
        raise Refusal(f"unable to use realm {realm!r}: {longest - MAX_CHALLENGE} characters too "
                      f"long, wget crashes on challenges of more than {MAX_CHALLENGE}")


class Authenticator:
    """Say who sends a request; the conductor of everything above.

    Methods for the server: authenticate, is_locked, challenge.
    Instance variable that a reload sets: passwords.
    """

    def __init__(self, passwords: Passwords, schemes: Sequence[str] = SCHEMES,
                 algorithms: Sequence[str] = ALGORITHMS, qop: Sequence[str] = QOP,
                 nonce_lifetime: float = NONCE_LIFETIME, nonce_secret: bytes = b"",
                 table: Optional[SharedTable] = None, now: Optional[float] = None,
                 max_failures: Tuple[int, float] = MAX_FAILURES, userhash: bool = False) -> None:
        check_offer(passwords.realm, schemes, algorithms, qop, userhash)
        self.passwords, self.max_failures, self.userhash = passwords, max_failures, userhash
        self.schemes, self.algorithms, self.qop = tuple(schemes), tuple(algorithms), tuple(qop)
        self.nonce_lifetime, self.table = nonce_lifetime, table or SharedTable()
        # With a shared secret, the issuer tells our nonces from those of other machines
        # and of our own predecessor, who knew of uses that we do not know of.
        self._started = time.time() if now is None else now
        self._issuer, self._decoy_key = os.urandom(4), os.urandom(32)
        secret = nonce_secret or os.urandom(32)
        # The key of BLAKE2 is at most 32 bytes, a secret file may be longer. With the realm in
        # it a nonce of one realm is unknown in another, though both share the secret.
        self._key = hmac.new(secret, passwords.realm.encode("ascii"), "sha256").digest()

    def authenticate(self, method: str, target: str, authorization: Sequence[str],
                     client: Optional[str], now: float, schemes: Optional[Sequence[str]] = None,
                     read_body: Callable[[], bytes] = bytes,
                     blocking: bool = True) -> Verdict:
        """Return the Verdict; its status is 0 when it needs a slow hash and may not block.

        authorization holds the values of all Authorization fields.
        """
        attempt = Attempt(method, target, client, now, schemes or self.schemes, read_body, blocking)
        # Before the lock-out: who brings no password guesses nothing.
        if not authorization:
            self.table.add("challenges")
            return self._refuse(attempt, "no credentials")
        wait = self._lock_left(client, now)
        if wait:
            return Verdict(429, reason="locked out", fields=(("Retry-After", str(wait)),))
        try:
            return self._check(attempt, authorization)
        except Malformed as error:
            self.table.add("malformed")
            return Verdict(400, reason=f"malformed: {error}")
        except Busy:
            self.table.add("busy")
            return Verdict(503, reason="busy", fields=(("Retry-After", "1"),))

    def _check(self, attempt: Attempt, authorization: Sequence[str]) -> Verdict:
        """Look at credentials of either scheme."""
        if len(authorization) > 1:
            raise Malformed("two Authorization fields")
        scheme, token, params = parse_authorization(authorization[0])
        if scheme not in attempt.schemes:
            return self._refuse(attempt, "scheme not offered")
        if scheme == "digest":
            return self._check_digest(attempt, parse_digest(params))
        username, password = decode_basic(token)
        correct = self.passwords.verify(username, password, attempt.blocking)
        if correct is None:
            return Verdict(0)
        if not correct:
            known = username in self.passwords.entries
            return self._fail(attempt, username, "bad password" if known else "unknown user")
        return Memo(self, username).verdict

    def _check_digest(self, attempt: Attempt, credentials: DigestCredentials) -> Verdict:
        """Look at Digest credentials: whom they concern, the uri, the response, the nonce.

        RFC 2617 section 3.2.1 has the response before the nonce: "should only set stale to
        TRUE if it receives a request for which the nonce is invalid but with a valid digest
        for that nonce". Without qop (RFC 2069) there is no nc, and a response could be
        replayed at will.
        """
        algorithm, names = credentials.algorithm, credentials.usernames
        if credentials.realm != self.passwords.realm:
            return self._refuse(attempt, "another realm")
        if algorithm not in self.algorithms or credentials.qop not in self.qop:
            return self._refuse(attempt, "algorithm or qop not offered")
        if not is_same_target(credentials.uri, attempt.target):
            return Verdict(400, reason="uri mismatch")
        # A hash has neither backslash nor percent sign: its first reading is the only one.
        entry = (self.passwords.find_userhash(names[0], algorithm) if credentials.userhash
                 else self.passwords.find(names))
        # A stranger's HA1 is one that nobody has. It is made for known users as well, or the
        # time would tell who is known.
        nobody = to_hex(algorithm, self._decoy_key + names[0].encode("utf-8"))
        ha1 = entry.ha1.get(hash_name(algorithm), "") if entry else ""
        # Only now: to read a body takes time, and what was refused above does not need it.
        body = attempt.read_body() if credentials.qop == "auth-int" else None
        ha2 = digest_ha2(attempt.method, credentials.uri, algorithm, body)
        memo = DigestMemo(self, credentials, entry.username if entry else "", ha1 or nobody, ha2)
        if memo.proves(credentials.nc, credentials.response):
            return self._spend_nonce(attempt, credentials, memo)
        if entry is None:
            return self._fail(attempt, names[0], "unknown user")
        return self._fail(attempt, entry.username, "bad response" if ha1 else "scheme not servable")

    def _spend_nonce(self, attempt: Attempt, credentials: DigestCredentials,
                     memo: DigestMemo) -> Verdict:
        """Grant a right response once, while its nonce lives; else ask for a new one."""
        body = check_nonce(credentials.nonce, self._key, attempt.now, self.nonce_lifetime,
                           self._issuer, self._started)
        fault = self.table.accept(body, int(credentials.nc, 16)) if body else "stale"
        if body is None or fault:
            self.table.add("replays" if fault == "replay" else "stale")
            return self._refuse(attempt, fault, stale=True)
        memo.body, memo.born = body, nonce_time(body)
        # The memo ends where answers begin to carry a nextnonce, which differs each time.
        memo.fresh_until = memo.born + self.nonce_lifetime * NEXT_NONCE
        (name, info), = memo.info(credentials.nc)
        fresh = attempt.now < memo.fresh_until
        if not fresh:
            info += f', nextnonce="{self._make_nonce(attempt.now)}"'
        # The body that auth-int proves is not in the head: no memo can stand for it.
        keep = memo if fresh and credentials.qop == "auth" else None
        memo.verdict = Verdict(200, memo.username, memo.username, "", ((name, info),), "Digest",
                               keep)
        return memo.verdict

    def _make_nonce(self, now: float) -> str:
        return make_nonce(self._key, now, os.urandom(6) + self._issuer)

    def challenge(self, now: float, schemes: Optional[Sequence[str]] = None,
                  stale: bool = False) -> Fields:
        """Return the WWW-Authenticate fields of a 401."""
        lines = challenges(self.passwords.realm, self._make_nonce(now), schemes or self.schemes,
                           self.algorithms, self.qop, stale, self.userhash)
        return tuple(("WWW-Authenticate", line) for line in lines)

    def _refuse(self, attempt: Attempt, reason: str, log_user: str = "-",
                stale: bool = False) -> Verdict:
        """Say 401: to the client the same for every reason but stale."""
        fields = self.challenge(attempt.now, attempt.schemes, stale)
        return Verdict(401, None, log_user, reason, fields)

    def _fail(self, attempt: Attempt, username: str, reason: str) -> Verdict:
        """Say 401 to wrong credentials, and count them."""
        self.table.add("failures")
        limit, seconds = self.max_failures
        if limit and attempt.client is not None and self.table.count_failure(
                attempt.client, attempt.now, limit, seconds):
            self.table.add("lockouts")
        return self._refuse(attempt, reason, username)

    def _lock_left(self, client: Optional[str], now: float) -> int:
        """Return the seconds for which client is locked out, or 0."""
        limit, seconds = self.max_failures
        if not limit or client is None:
            return 0
        return math.ceil(self.table.lock_left(client, now, limit, seconds))

    def is_locked(self, client: Optional[str], now: float) -> bool:
        """Return whether client is locked out."""
        return self._lock_left(client, now) > 0


def parse_choice(text: str, known: Iterable[str]) -> Tuple[str, ...]:
    """Return the names in a comma-separated option, in their canonical spelling.

    >>> parse_choice("sha-256,md5", CANONICAL.values())
    ('SHA-256', 'MD5')
    """
    spelling = {name.lower(): name for name in known}
    return tuple(spelling.get(name.strip().lower(), name) for name in text.split(","))


def parse_max_failures(text: str) -> Tuple[int, float]:
    """Return the two numbers of --max-failures.

    >>> parse_max_failures("10/60"), parse_max_failures("0")
    ((10, 60.0), (0, 60.0))
    """
    match = re.fullmatch(r"0|([1-9][0-9]{0,8})/([1-9][0-9]{0,8})", text)
    if match is None:
        raise Refusal(f"unable to use --max-failures {text}: expected N/SECONDS, or 0")
    return int(match.group(1) or 0), float(match.group(2) or MAX_FAILURES[1])


# -- 5.1 Who is asking --------------------------------------------------------

Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


def parse_address(text: str) -> Optional[Address]:
    """Return the address of a peer, or in an element of X-Forwarded-For, or None.

    >>> [str(parse_address(text)) for text in ("::ffff:192.0.2.1", " [2001:db8::1]:80", "-")]
    ['192.0.2.1', '2001:db8::1', 'None']
    """
    # [v6] or [v6]:port; v4:port; or an address alone, of which a zone (%eth0) is cut off:
    # ipaddress knows zones since Python 3.9 only.
    match = re.fullmatch(r"\[(.*)\](?::\d+)?|([\d.]+):\d+|([^%]*)(?:%.*)?", text.strip(" \t"))
    try:
        address = ipaddress.ip_address(match.group(match.lastindex or 3) if match else "")
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


class TrustedProxies:
    """Whose X-Forwarded-For is believed: networks, and `unix:` for unix sockets."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._unix = "unix:" in options
        self._networks: List[Union[ipaddress.IPv4Network, ipaddress.IPv6Network]] = []
        for option in [text for text in options if text != "unix:"]:
            try:
                self._networks.append(ipaddress.ip_network(option, strict=False))
            except ValueError:
                raise Refusal(f"unable to trust proxy {option}: expected a network or unix:")

    def trusts(self, address: Optional[Address]) -> bool:
        """Return whether to believe what a peer says; a unix socket's has no address."""
        return self._unix if address is None else any(address in net for net in self._networks)

    def find_client(self, peer: str, forwarded: Sequence[str] = ()) -> Tuple[str, Optional[str]]:
        """Return the address for the log, and whom a lock-out may hit, or None.

        A trusted peer's X-Forwarded-For is read from the right, past trusted hops: what
        stands left of them was written by the client. On loopback, and behind a proxy that
        says nothing, all clients have one address: a lock-out would hit them all. An IPv6
        client can choose among the 2**64 addresses of its network, so that is what counts.

        >>> proxies = TrustedProxies(["10.0.0.0/8"])
        >>> proxies.find_client("10.0.0.1", ["127.0.0.1, 192.0.2.7", "10.9.9.9"])
        ('192.0.2.7', '192.0.2.7')
        >>> proxies.find_client("192.0.2.9", ["1.2.3.4"])
        ('192.0.2.9', '192.0.2.9')
        """
        address = parse_address(peer)
        # Several fields are one list, in their order: RFC 9110 section 5.3.
        hops = ",".join(forwarded).split(",")
        while self.trusts(address) and hops:
            hop = parse_address(hops.pop())
            if hop is None:
                break
            address = hop
        shown = peer if address is None else str(address)
        if address is None or address.is_loopback or self.trusts(address):
            return shown, None
        if address.version == 6:
            return shown, str(ipaddress.ip_network(f"{address}/64", strict=False))
        return shown, shown


# -- 6. Files of secrets: the passwd verb, the first password, the nonce secret

FIRST_USER = "admin"
LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"    # 32, and none looks like another


def password_lines(username: str, realm: str, password: str) -> List[str]:
    """Return the htdigest lines of a user; MD5 first, for Apache reads the first that fits."""
    return [f"{username}:{realm}:{digest_ha1(username, realm, password, name)}"
            for name in ("MD5", "SHA-256") if name in HASHES]


def is_line_of(line: str, username: str, realm: str) -> bool:
    """Return whether a line of a password file is about this user, in this realm.

    >>> [is_line_of(line, "jim", "a") for line in ("jim:a:0", " jim:{SHA}x", "#jim:a:0", "jim:b:0")]
    [True, True, False, False]
    """
    name, _, rest = line.strip(" \t\r").partition(":")
    place, colon, _ = rest.partition(":")
    if unicodedata.normalize("NFC", name) != username:
        return False
    return not colon or rest[0] in "{$" or place in (realm, "plain")


def edit_passwords(text: str, username: str, realm: str, new_lines: Sequence[str]) -> str:
    r"""Return the text of a password file with new lines for a user, in the old ones' place.

    Comments, other users, and the same user in other realms stay as they are.

    >>> edit_passwords("# x\njim:plain:old\nann:files:00", "jim", "files", ["jim:files:11"])
    '# x\njim:files:11\nann:files:00\n'
    """
    # Not splitlines(): only a line feed divides lines here.
    lines = [line.rstrip("\n") for line in io.StringIO(text)]
    mine = [number for number, line in enumerate(lines) if is_line_of(line, username, realm)]
    others = [line for number, line in enumerate(lines) if number not in mine]
    others[mine[0] if mine else len(others):0] = new_lines
    return "".join(line + "\n" for line in others)


def write_file(path: str, text: str, gid: Optional[int] = None, replace: bool = False) -> None:
    """Put text into a file, 0600, or 0640 for a group: whole, or not at all.

    A file that is replaced keeps its owner and group if we may give them, and 0640 if it
    had that: it may have been made for the group of a daemon.
    """
    new = f"{path}.{os.urandom(4).hex()}.new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "w", encoding="utf-8") as stream:
            if replace:
                old = os.stat(path)
                gid = old.st_gid if stat.S_IMODE(old.st_mode) == 0o640 else None
                if os.geteuid() == 0:
                    os.fchown(fd, old.st_uid, old.st_gid)
            if gid is not None:
                os.fchown(fd, -1, gid)
                os.fchmod(fd, 0o640)
            stream.write(text)
            stream.flush()
            # Before the name: after a crash it must not stand for an empty file.
            os.fsync(fd)
        # A link, unlike a rename, fails where another process has just made the file.
        (os.rename if replace else os.link)(new, path)
    finally:
        if os.path.lexists(new):
            os.unlink(new)


def lock_file(path: str) -> Optional[BinaryIO]:
    """Return a file that other passwd commands must wait for; None: there is no such file.

    The lock goes with the file when that is replaced: who has waited looks whether the name
    still stands for what was locked. Of those who make a new file only one succeeds.
    """
    while os.path.exists(path):
        # To write: a file system over a network locks nothing else.
        stream = open(path, "rb+")
        fcntl.flock(stream, fcntl.LOCK_EX)
        if os.path.exists(path) and os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
            return stream
        stream.close()
    return None


def change_password(path: str, username: str, realm: str, password: Optional[str]) -> str:
    """Set the password of a user in a file, or delete the user (None); return what was done."""
    username = normal_username(username)
    check_realm(realm)
    new_lines = [] if password is None else password_lines(
        username, realm, normal_password(username, password))
    # Through links, or the rename would replace a link by a file.
    target = os.path.realpath(path)
    try:
        with contextlib.ExitStack() as stack:
            stream = lock_file(target)
            old = read_text(stack.enter_context(stream).name, realm)[0] if stream else ""
            known = any(is_line_of(line, username, realm) for line in old.split("\n"))
            if password is None and not known:
                raise Refusal(f"unable to delete user {username!r}: not in {path}")
            write_file(target, edit_passwords(old, username, realm, new_lines), None, bool(stream))
    except FileExistsError:         # made by another one meanwhile: now there is one to edit
        return change_password(path, username, realm, password)
    except OSError as error:
        raise Refusal(f"unable to write passwords {path}: {error.strerror}")
    return "deleted" if password is None else "changed" if known else "added"


def from_person(octets: bytes) -> str:
    """Decode what was typed; as octets, for in the ASCII locale of cron Python mangles the rest."""
    try:
        return from_octets(octets)
    except Malformed as error:
        raise Refusal(f"unable to use this {error}")


def run_passwd(path: str, username: str, realm: str = REALM, from_stdin: bool = False,
               delete: bool = False) -> str:
    """Do what `passwd FILE USER` asks for, and return what to say about it."""
    # The bytes of argv: Python decoded them in the locale, and cron's locale is ASCII.
    username = normal_username(from_person(os.fsencode(username)))
    if delete:
        password = None
    elif from_stdin:
        password = from_person(sys.stdin.buffer.readline().rstrip(b"\r\n"))
    else:
        import getpass              # termios and more, for this verb alone
        try:
            password = getpass.getpass("new password: ")
            if getpass.getpass("again: ") != password:
                raise Refusal("unable to set the password: the two differ")
        except UnicodeError:
            raise Refusal("unable to read the password: not in the encoding of this locale\n"
                          "try: export LC_ALL=C.UTF-8")
    done = change_password(path, username, realm, password)
    return f"user {username!r} {done} in {path} (realm {realm!r})"


def first_password(path: str, gid: Optional[int] = None, realm: str = REALM) -> Tuple[str, str]:
    """Make a password file with one user and a random password; return the two."""
    # 256 is 8 * 32, so % prefers no letter; 16 letters of 5 bits are 80 bits.
    password = "".join(LETTERS[octet % 32] for octet in os.urandom(16))
    try:
        write_file(path, edit_passwords("", FIRST_USER, realm,
                                        password_lines(FIRST_USER, realm, password)), gid)
    except OSError as error:
        raise Refusal(f"unable to make passwords {path}: {error.strerror}")
    return FIRST_USER, password


def read_nonce_secret(path: str) -> bytes:
    """Return the secret in a file; make the file when there is none."""
    path = os.path.abspath(path)
    try:
        if not os.path.exists(path):
            with contextlib.suppress(FileExistsError):      # who was faster made our secret too
                write_file(path, os.urandom(32).hex() + "\n")
        with open(path, "rb") as stream:
            secret, exposed = stream.read(4096).strip(), is_exposed(stream.fileno())
    except OSError as error:
        raise Refusal(f"unable to read or make nonce secret {path}: {error.strerror}")
    if exposed or len(secret) < 16:
        fault, cure = (("everybody may read or change it", "chmod 600") if exposed else
                       ("shorter than 16 bytes", "rm"))     # then it is made anew
        raise refuse_file(f"use nonce secret {path}", [fault], f"{cure} {shlex.quote(path)}")
    return secret


# -- 7. Reading a request -----------------------------------------------------
#
# Two programs that read the same bytes differently can be played against each
# other: what a proxy takes for one request and we for two is a request that
# nobody checked ("smuggling").  http.server reads generously: it drops all
# fields after a line without a colon, splits lines at a bare CR, believes one
# of two Content-Lengths and takes an unread body for the next request. Here
# nothing is repaired: one spelling is right, all else is 400, and the
# connection closes, for nobody knows where the next request would begin.

# RFC 9112 section 3: request-line = method SP request-target SP HTTP-version
# A target is visible ASCII without "#". RFC 3986 allows less, but curl sends \ | ^ bare.
REQUEST_LINE = re.compile(rf'({TOKEN}) ([!"$-~]+) HTTP/([0-9])\.([0-9])')
# RFC 9112 section 5: field-line = field-name ":" OWS field-value OWS
# OWS is stripped later: inside the pattern it would make matching quadratic.
FIELD_LINE = re.compile(rf"^({TOKEN}):([\t -~\x80-\xff]*)\r\n", re.MULTILINE)
# RFC 9110 section 7.2: Host = uri-host [ ":" port ]
HOST = re.compile(r"(?:[0-9A-Za-z!$&'()*+;=._~%-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")
# RFC 9112 section 3.2.2: absolute-form = absolute-URI
# No "@": RFC 9110 section 4.2.4 wants userinfo in a URI treated as an error.
ABSOLUTE = re.compile(r"https?://([^/?@]+)([/?].*)?", re.IGNORECASE)
# RFC 9112 section 7.1: chunk = chunk-size [ chunk-ext ] CRLF chunk-data CRLF
# 15 digits at most: a size is never a number that takes long to make.
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t -~\x80-\xff]*)?")
UNPRINTABLE = re.compile(r"[^ !#-\[\]-~]")

Values = Dict[str, List[str]]


class BadRequest(Exception):
    """A request that is answered with status, after which the connection closes."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Head(NamedTuple):
    """A request head, read strictly."""

    line: str               # the request line, as the log shows it
    method: str
    target: str             # the request target, as sent
    path: str               # what handlers get: no scheme, no host, one slash at the start
    minor: int              # of HTTP/1.x
    values: Values          # field name in lower case -> values
    length: int             # of the body, as far as it was said
    chunked: bool           # it was not
    keep_alive: bool        # the client may send another request
    expects: bool           # ... and waits for 100 Continue before the body
    log_tail: str           # Referer and User-Agent, as the log shows them


def parse_head(octets: bytes) -> Head:
    r"""Return the head that octets, up to and with the empty line, stand for.

    >>> head = parse_head(b"GET //a?b HTTP/1.1\r\nHost: x\r\n\r\n")
    >>> head.target, head.path, head.keep_alive
    ('//a?b', '/a?b', True)
    """
    # Without the empty line: now each field line, the last one too, ends with its own CRLF.
    line, _, block = octets[:-2].decode("latin-1").partition("\r\n")
    unread = block.count("\n")
    if len(line) > MAX_LINE:
        raise BadRequest(414, "request line too long")
    if len(octets) > MAX_HEAD or unread > MAX_FIELDS:
        raise BadRequest(431, "head too large")
    method, target, minor = parse_request_line(line)
    values: Values = {}
    # findall() passes over what does not match, in silence: each line it took is counted off.
    for name, value in FIELD_LINE.findall(block):
        values.setdefault(name.lower(), []).append(value.strip(" \t"))
        unread -= 1
    if unread:
        raise BadRequest(400, "field line")
    check_host(values, minor)
    length, chunked = framing(method, values, minor)
    referer, agent = (escape(values.get(name, ["-"])[0]) for name in ("referer", "user-agent"))
    return Head(escape(line), method, target, origin_path(method, target), minor, values, length,
                chunked, keeps_alive(values, minor), expects_continue(values, minor),
                f'"{referer}" "{agent}"')


def parse_request_line(line: str) -> Tuple[str, str, int]:
    """Return method, request target and minor version.

    >>> parse_request_line("GET /example/foo HTTP/1.1")
    ('GET', '/example/foo', 1)
    """
    match = REQUEST_LINE.fullmatch(line)
    if match is None:
        raise BadRequest(400, "request line")
    if match.group(3) != "1":
        raise BadRequest(505, "HTTP version")
    # A higher minor version is served as the highest we know: RFC 9110 section 2.5.
    return match.group(1), match.group(2), min(int(match.group(4)), 1)


def origin_path(method: str, target: str) -> str:
    """Return the path and query that a target of any of the four forms asks for.

    Several slashes at the start become one, as in http.server: a handler that redirects
    to a path "//host/" would send the client to another site (CVE-2021-28861).

    >>> origin_path("GET", "http://host:80/a?b"), origin_path("OPTIONS", "*")
    ('/a?b', '*')

    See: RFC 9112 section 3.2.
    """
    if (method, target) == ("OPTIONS", "*") or method == "CONNECT":
        return target
    if not target.startswith("/"):
        match = ABSOLUTE.fullmatch(target)
        if match is None or HOST.fullmatch(match.group(1)) is None:
            raise BadRequest(400, "request target")
        target = match.group(2) or "/"
    # "http://host?b" has no path; then its path is "/": RFC 9112 section 3.2.1.
    return "/" + target.lstrip("/") if target[:2] == "//" or target[0] == "?" else target


def check_host(values: Values, minor: int) -> None:
    """Refuse a missing (since HTTP/1.1), second or malformed Host.

    See: RFC 9112 section 3.2.
    """
    hosts = values.get("host", [])
    if len(hosts) != 1 and (hosts or minor) or hosts and HOST.fullmatch(hosts[0]) is None:
        raise BadRequest(400, "Host")


def framing(method: str, values: Values, minor: int) -> Tuple[int, bool]:
    """Return the length of the body, and whether it is chunked instead.

    >>> framing("POST", {"content-length": ["5"]}, 1)
    (5, False)
    >>> framing("POST", {"transfer-encoding": ["Chunked"]}, 1)
    (0, True)

    See: RFC 9112 section 6.
    """
    lengths = values.get("content-length", [])
    if "transfer-encoding" in values:
        codings = split_list(values["transfer-encoding"])
        # HTTP/1.0 knows no Transfer-Encoding (RFC 9112 section 6.1); with a length beside it
        # the message may be an attempt at smuggling (section 6.3).
        if lengths or not minor or codings[-1] != "chunked" or codings.count("chunked") > 1:
            raise BadRequest(400, "Transfer-Encoding")
        if len(codings) > 1:
            raise BadRequest(501, "transfer coding")
        return 0, True
    if not lengths and not minor and method in ("POST", "PUT", "PATCH"):
        raise BadRequest(411, "no Content-Length")      # RFC 9112 section 6.3
    # Not int() alone, which also takes "+5", " 5" and "1_0".
    if len(lengths) > 1 or lengths and re.fullmatch("[0-9]+", lengths[0]) is None:
        raise BadRequest(400, "Content-Length")
    if lengths and len(lengths[0]) > 15:    # int() of a very long one would take seconds
        raise BadRequest(413, "body too large")
    return int(lengths[0]) if lengths else 0, False


def split_list(fields: Sequence[str]) -> List[str]:
    """Return the elements of a list-based field, in lower case.

    Empty ones, too, which RFC 9110 section 5.6.1.2 would pass over: `chunked,` is refused,
    for who knows what the next program makes of it.

    >>> split_list(["Keep-Alive, x", "y"])
    ['keep-alive', 'x', 'y']

    See: RFC 9110 section 5.6.1.
    """
    return [element.strip(" \t").lower() for element in ",".join(fields).split(",")]


def keeps_alive(values: Values, minor: int) -> bool:
    """Return whether the client may send another request.

    >>> keeps_alive({}, 1), keeps_alive({}, 0), keeps_alive({"connection": ["Keep-Alive"]}, 0)
    (True, False, True)

    See: RFC 9112 section 9.3.
    """
    if "connection" not in values:
        return bool(minor)
    options = split_list(values["connection"])
    return "close" not in options and (bool(minor) or "keep-alive" in options)


def expects_continue(values: Values, minor: int) -> bool:
    """Return whether the client waits for 100 Continue before it sends the body.

    See: RFC 9110 section 10.1.1.
    """
    if "expect" not in values or not minor:
        return False
    if split_list(values["expect"]) != ["100-continue"]:
        raise BadRequest(417, "Expect")
    return True


def escape(text: str) -> str:
    r"""Return text with nothing in it that could end a line, a quotation, or colour a terminal.

    >>> escape('a"\x1b[1m')
    'a\\x22\\x1b[1m'
    """
    return UNPRINTABLE.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


class Body:
    r"""Find the end of a body, and its meaning, in bytes that arrive in pieces.

    >>> body = Body(0, True)
    >>> body.feed(b"5;x=y\r\nhel"), body.done, body.feed(b"lo\r\n0\r\n\r\nGET"), body.done
    (b'hel', False, b'lo', True)
    >>> body.take_rest()        # belongs to the next request
    b'GET'

    See: RFC 9112 section 6 and 7.1.
    """

    def __init__(self, length: int, chunked: bool) -> None:
        self.left = length      # bytes of the body, or of this chunk, still to come
        self.next_line = "size" if chunked else ""      # what follows: take_line() calls take_...
        # Bytes left for chunks; after the last of them, for the trailer.
        self.room = MAX_BODY if chunked else length
        self.done = not length and not chunked
        self.rest = bytearray()

    def feed(self, octets: bytes) -> bytes:
        """Take octets as they came, return what they mean."""
        self.rest += octets
        pieces: List[bytes] = []
        while not self.done and self.rest:
            if self.left:
                pieces.append(bytes(self.rest[:self.left]))
                del self.rest[:self.left]
                self.left -= len(pieces[-1])
                self.done = not self.left and not self.next_line
            elif not self.take_line():
                break
        return b"".join(pieces)

    def take_line(self) -> bool:
        """Take the line that is due, if it is there: take_end, take_size or take_trailer."""
        end = self.rest.find(b"\r\n")
        if end > MAX_LINE or end < 0 and len(self.rest) > MAX_LINE:
            raise BadRequest(400, "chunk line too long")
        if end < 0:
            return False
        line = bytes(self.rest[:end])
        del self.rest[:end + 2]
        getattr(self, "take_" + self.next_line)(line)
        return True

    def take_end(self, line: bytes) -> None:
        """Take the empty line at the end of a chunk."""
        if line:
            raise BadRequest(400, "chunk longer than its size")
        self.next_line = "size"

    def take_size(self, line: bytes) -> None:
        """Take the size of the next chunk; after one of 0 the trailer begins."""
        match = CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise BadRequest(400, "chunk size")
        self.left = int(match.group(1), 16)
        self.room -= self.left
        if self.room < 0:
            raise BadRequest(413, "body too large")
        self.next_line = "end" if self.left else "trailer"
        self.room = self.room if self.left else MAX_HEAD

    def take_trailer(self, line: bytes) -> None:
        """Take a field after the last chunk, and forget it; the empty line is the end."""
        self.room -= len(line) + 2
        if line and not FIELD_LINE.match(line.decode("latin-1") + "\r\n") or self.room < 0:
            raise BadRequest(400, "trailer")
        self.done = not line

    def take_rest(self) -> bytes:
        """Return, once, what came after the end."""
        rest = bytes(self.rest)
        self.rest.clear()
        return rest


# -- 8. Handlers --------------------------------------------------------------
#
# The API is the one everybody knows: a BaseHTTPRequestHandler with do_GET,
# headers, rfile, wfile, send_response. AuthServer runs any such class, in a
# thread and on the real socket; to make it serve one exchange and no more,
# AuthHandler is put behind it, where it finds BaseHTTPRequestHandler's methods
# replaced but all of its own in force:
#
#     class Hosted(SimpleHTTPRequestHandler, AuthHandler)     # what hosted() makes
#
# A handler that never waits for anything says nonblocking = True and is run in
# the loop, in memory, and its whole answer leaves in one write.

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n"
                for status in http.HTTPStatus}

Work = Callable[[], None]


class BodyStream(io.RawIOBase):
    """rfile: the body, decoded, and then its end; the next request is out of reach."""

    def __init__(self, exchange: "Exchange") -> None:
        super().__init__()
        self.exchange, self.pending = exchange, b""

    def readable(self) -> bool:
        """Return True: io.BufferedReader asks."""
        return True

    def readinto(self, into: Any) -> int:
        """Fill into as far as one piece goes; 0 is the end."""
        # A loop: bytes may have come that mean nothing yet, such as the size of a chunk.
        while not self.pending and not self.exchange.body.done:
            self.pending = self.exchange.receive()
        size = min(len(into), len(self.pending))
        into[:size], self.pending = self.pending[:size], self.pending[size:]
        return size


class AnswerStream(io.BufferedIOBase):
    """wfile: every write goes out at once, at the client's pace, if that is not too slow."""

    def __init__(self, exchange: "Exchange") -> None:
        super().__init__()
        self.exchange, self.sent = exchange, 0

    def writable(self) -> bool:
        """Return True: io asks."""
        return True

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.exchange.connection.socket.fileno()

    def write(self, data: Any) -> int:
        """Send data."""
        octets, sock = memoryview(data).cast("B"), self.exchange.connection.socket
        self.exchange.lost = True       # until proven otherwise
        for start in range(0, len(octets), IN_MEMORY):
            sock.settimeout(PACE_SECONDS)       # of a whole sendall, since Python 3.5
            piece = octets[start:start + IN_MEMORY]
            sock.sendall(piece)
            self.sent += len(piece)
        self.exchange.lost = False
        return len(octets)


class AuthHandler(http.server.BaseHTTPRequestHandler):
    """A request handler for one exchange: AuthServer passes it where the socket usually is.

    For derived classes: do_GET and friends; remote_user, the authenticated user;
    nonblocking, the promise never to wait for anything.
    """

    nonblocking = False
    protocol_version = "HTTP/1.1"
    remote_user: Optional[str] = None

    def setup(self) -> None:
        """Take over the exchange and its streams."""
        exchange = self.exchange = self.request
        self.request = self.connection = exchange.connection.socket
        self.rfile, self.wfile = exchange.rfile, exchange.wfile
        self.remote_user = exchange.verdict.username
        self.auth_type = exchange.verdict.scheme
        self.lines: List[str] = []
        self.has_end = self.exchange.head.method == "HEAD"

    def handle_one_request(self) -> None:
        """Call do_METHOD, which AuthServer has made sure of; the next request is not ours."""
        if self.parse_request():
            getattr(self, "do_" + self.command)()
        self.exchange.closes, self.close_connection = self.close_connection, True

    def finish(self) -> None:
        """Leave the streams to the loop."""

    def parse_request(self) -> bool:
        """Take over what parse_head has found."""
        head = self.exchange.head
        self.command, self.path = head.method, head.path
        self.request_version = "HTTP/1.1" if head.minor else "HTTP/1.0"
        self.close_connection = self.exchange.closes or self.protocol_version < "HTTP/1.1"
        return True

    def __getattr__(self, name: str) -> Any:
        """Make what most handlers never ask for: headers, requestline, raw_requestline."""
        exchange = self.__dict__.get("exchange")
        text = exchange.octets.decode("latin-1") if exchange else ""
        if exchange and name == "headers":
            self.headers = http.client.HTTPMessage()
            for field, value in FIELD_LINE.findall(text):
                self.headers[field] = value.strip(" \t")
        elif exchange and name in ("requestline", "raw_requestline"):
            self.requestline = text.partition("\r\n")[0]
            self.raw_requestline = self.requestline.encode("latin-1") + b"\r\n"
        else:
            raise AttributeError(name)
        return self.__dict__[name]

    def log_request(self, code: Union[int, str] = "-", size: Union[int, str] = "-") -> None:
        """Leave it to the access log, unless the handler has a log of its own."""
        if type(self).log_message is not http.server.BaseHTTPRequestHandler.log_message:
            super().log_request(code, size)

    def send_response(self, code: int, message: Optional[str] = None) -> None:
        """Begin an answer: status line, Server and Date."""
        self.log_request(code)
        self.send_response_only(code, message)
        self.lines.append(self.exchange.connection.server.stamp)

    def send_response_only(self, code: int, message: Optional[str] = None) -> None:
        """Begin an answer: status line."""
        line = STATUS_LINES.get(code, "")
        if message is not None or not line:
            line = f"HTTP/1.1 {code:d} {message or ''}\r\n"
        # line[8:]: without "HTTP/1.1", for which comes what the handler's protocol_version says.
        self.exchange.status, self.lines = int(code), [self.protocol_version, line[8:]]

    def send_header(self, keyword: str, value: str) -> None:
        """Add a field; Connection decides what becomes of the connection."""
        name = keyword.lower()
        if name == "connection":
            self.close_connection = value.lower() == "close"
            return
        if name in ("content-length", "transfer-encoding"):
            self.has_end = True
        self.lines.append(f"{keyword}: {value}\r\n")

    def end_headers(self) -> None:
        """Write the head, with what verdict and connection have to say."""
        exchange = self.exchange
        if exchange.status >= 200:
            self.lines += [f"{name}: {value}\r\n" for name, value in exchange.fields]
            # An answer without a length ends where the connection does: RFC 9112 section 6.3.
            has_end = self.has_end or exchange.status in (204, 304)
            self.lines.append(exchange.connection_field(self.close_connection or not has_end))
            self.close_connection = exchange.closes
        self.lines.append("\r\n")
        head = "".join(self.lines).encode("latin-1", "replace")
        self.lines = []
        exchange.head_size += len(head)
        self.wfile.write(head)


class ExampleHandler(AuthHandler):
    """The example resource: /example/foo names foo and the user; / leads to it."""

    nonblocking = True

    def do_GET(self) -> None:
        """Answer with a page about the last part of the path."""
        status, page = example_page(self.path, self.remote_user or "everybody")
        self.wfile.write(self.exchange.compose(status, "text/html; charset=utf-8", page))

    do_HEAD = do_GET

    def do_OPTIONS(self) -> None:
        """Say what can be done, with this resource or ("*") with the server."""
        self.send_response(204)
        self.send_header("Allow", ", ".join(allowed(type(self))))
        self.end_headers()


@functools.lru_cache(maxsize=64)
def example_page(path: str, user: str) -> Tuple[int, bytes]:
    r"""Return status and page of the example resource.

    >>> example_page("/example/foo?a=b", "jim")[1]
    b'<!DOCTYPE html><title>example</title><p>This is foo, for jim.</p>\n'
    """
    folder, _, name = path.partition("?")[0].rpartition("/")
    status, text = 404, "There is no such page."
    if folder + name == "":
        status, text = 200, '<a href="/example/foo">/example/foo</a>'
    elif name and (folder + "/").startswith("/example/"):
        name = urllib.parse.unquote(name)
        status, text = 200, f"This is {html.escape(name)}, for {html.escape(user)}."
    page = f"<!DOCTYPE html><title>example</title><p>{text}</p>\n"
    return status, page.encode("utf-8", "replace")


def allowed(handler_class: type) -> List[str]:
    """Return the methods that a handler class answers.

    >>> allowed(ExampleHandler)
    ['GET', 'HEAD', 'OPTIONS']
    """
    return sorted(name[3:] for name in dir(handler_class) if name.startswith("do_"))


def hosted(handler: Any) -> Any:
    """Return a handler class with AuthHandler behind it; also inside a functools.partial."""
    if isinstance(handler, functools.partial):
        return functools.partial(hosted(handler.func), *handler.args, **handler.keywords)
    if issubclass(handler, AuthHandler):
        return handler
    # Of its bases the handler's own methods come first, then AuthHandler's, then those of
    # BaseHTTPRequestHandler. Its version is said again, or AuthHandler's 1.1 would hide a 1.0.
    return type(handler.__name__, (handler, AuthHandler),
                {"protocol_version": handler.protocol_version})


# -- 9. One exchange, one connection ------------------------------------------
#
# The life of a request, all in the thread of the loop but for what says pool:
#
#   Connection.ready -> advance -> begin -> recall -> grant     a head that is known (a memo)
#                                        or parse_head -> Exchange.authenticate
#     -> judge -> reply                      a refusal: answered right here
#        or grant -> respond                 a nonblocking handler
#                 or collect -> respond      ... once its small body is there
#                 or offload(serve) -> pool  any other handler
#     -> finish -> Connection.deliver -> flush  one write; then the next request
#
# The whole-head memo. A client sends the same head again and again, but for a
# digest's nc and response. So the bytes of a head that was parsed strictly
# and authenticated are the key to what they meant. Equal keys are equal bytes
# from the same client on the same listening address, with at most two holes at
# the same places, which the strict parser found to be nc and response; these,
# the nonce's age and lock-outs are looked at on every hit (Memo.again). Only
# a 200 makes an entry, so strangers make none; heads with a body have none; a
# new password file ends them all.

METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
UNKNOWN = Verdict(0)
# One for all exchanges: it is done, so nobody ever feeds it.
NO_BODY = Body(0, False)

Key = Tuple[Union[str, bytes], ...]


def memo_key(host: str, octets: bytes) -> Tuple[Key, str, str]:
    r"""Return the key of a head, and the nc and response that are cut out of it.

    >>> memo_key("::1", b'Authorization: Digest nc=00000001, response="00ff"\r\n')[0]
    ('::1', b'Authorization: Digest nc=', b', response="', b'"\r\n')
    """
    # Clients write Authorization or authorization. A guess that finds another field does no harm:
    # remember() keeps nothing unless the strict parser has found the same nc and response.
    start = octets.find(b"uthorization: Digest ")
    if start < 0:
        return (host, octets), "", ""
    count = octets.find(b" nc=", start) + 4
    proof = octets.find(b' response="', start) + 11
    end = octets.find(b'"', proof)
    if count < proof:
        key = host, octets[:count], octets[count + 8:proof], octets[end:]
    else:
        key = host, octets[:proof], octets[end:count], octets[count + 8:]
    return key, octets[count:count + 8].decode("latin-1"), octets[proof:end].decode("latin-1")


class BodyNeeded(Exception):
    """The verdict depends on a body that has not arrived yet (qop=auth-int)."""


class Exchange:
    """One request and its answer."""

    body = NO_BODY
    content: Optional[bytearray] = None     # of a body that the loop collects
    rfile: Any = None               # and wfile: the streams of the handler
    wfile: Any = None
    status = 0                      # of the answer
    head_size = 0                   # bytes of it that are not body
    lost = False                    # the client, in the middle of something

    def __init__(self, connection: "Connection", octets: bytes, head: Head, host: str,
                 client: Optional[str], verdict: Verdict = UNKNOWN, fields: Fields = ()) -> None:
        self.connection, self.octets, self.head = connection, octets, head
        self.host = host            # the client's address for the log
        self.client = client        # ... for the lock-out; None: it can hit nobody
        self.verdict, self.fields = verdict, fields     # fields: of the answer
        self.closes = not head.keep_alive    # the connection, after the answer
        if head.chunked or head.length:
            self.body = Body(head.length, head.chunked)
            self.patience = PACE_SECONDS        # for its bytes; in the pool

    def connection_field(self, close: bool) -> str:
        """Return the Connection field of the answer, "" where it goes without saying.

        See: RFC 9112 section 9.3.
        """
        self.closes = close or self.connection.server.draining
        if self.closes:
            return "Connection: close\r\n"
        return "" if self.head.minor else "Connection: keep-alive\r\n"

    def authenticate(self) -> None:
        """Get a verdict: at once, after the body has come, or from the pool (a slow hash)."""
        try:
            verdict = self.ask(False)
        except BodyNeeded:
            self.collect()
            return
        if verdict.status:
            self.judge(verdict)
        else:
            self.offload(self.verify)

    def ask(self, blocking: bool) -> Verdict:
        """Ask the authenticator."""
        server, head = self.connection.server, self.head
        if server.authenticator is None:
            return Verdict(200)
        return server.authenticator.authenticate(
            head.method, head.target, head.values.get("authorization", ()), self.client,
            server.now, self.connection.listener.schemes, self.read_content, blocking)

    def verify(self) -> Work:
        """Ask, however long it takes; in the pool."""
        return functools.partial(self.judge, self.ask(True))

    def read_content(self) -> bytes:
        """Return the body, for qop=auth-int."""
        if self.content is None and not self.body.done:
            raise BodyNeeded
        return bytes(self.content or b"")

    def judge(self, verdict: Verdict) -> None:
        """Let the request pass, or refuse it."""
        self.verdict, self.fields = verdict, verdict.fields
        if verdict.status == 200:
            if verdict.memo is not None and self.body is NO_BODY:
                self.connection.remember(self, verdict.memo)
            self.grant()
            return
        if verdict.reason != "no credentials":
            self.connection.server.log.error(
                f"{self.host}: refused {log_name(verdict.log_user)}: {verdict.reason}")
        self.reply(verdict.status)

    def grant(self) -> None:
        """Find who answers: the handler right here, the handler in the pool, or nobody."""
        server, head = self.connection.server, self.head
        if head.method not in server.methods:
            self.fields += (("Allow", ", ".join(server.methods)),)
            self.reply(405 if head.method in METHODS else 501)
        elif head.length > MAX_BODY:
            self.reply(413)
        elif not server.nonblocking or self.body_is_large() and self.content is None:
            self.offload(self.serve)
        elif self.body.done:
            self.respond()
        else:
            self.collect()

    def body_is_large(self) -> bool:
        """Return whether the body is too much, or may be, to be held or skipped by the loop."""
        return self.head.chunked or self.head.length > IN_MEMORY

    def respond(self) -> None:
        """Run the handler here and now."""
        connection = self.connection
        self.rfile, self.wfile = io.BytesIO(self.content or b""), io.BytesIO()
        try:
            connection.server.handler(self, connection.address, connection.server)
        except Exception:
            self.fail(traceback.format_exc())
            return
        self.finish(self.wfile.getvalue())

    def collect(self) -> None:
        """Have the loop read the body; collected() goes on from there."""
        connection, self.content = self.connection, bytearray()
        # If something has come after the head, the client is not waiting: RFC 9110 section 10.1.1.
        if self.head.expects and not connection.buffer:
            connection.output += CONTINUE
        connection.read_body(self, self.body)

    def collected(self) -> None:
        """Go on with the body at hand."""
        if self.verdict.status:
            self.grant()
        else:
            self.authenticate()

    def offload(self, work: Callable[[], Work]) -> None:
        """Give the connection to a thread; what work returns is then called by the loop."""
        server = self.connection.server
        if server.offloaded >= POOL_THREADS:
            self.fields += (("Retry-After", "1"),)
            self.reply(503)
            return
        server.offloaded += 1
        self.connection.leave()
        # daemon: a handler that never returns must not keep the process from ending.
        threading.Thread(target=self.run, args=(work,), daemon=True).start()

    def run(self, work: Callable[[], Work]) -> None:
        """Do work, come what may; in the pool."""
        then: Work = self.connection.close
        try:
            then = work()
        except BadRequest as error:     # found while the handler was reading the body
            then = functools.partial(self.reply, error.status, True)
        except BaseException:           # SystemExit too: it would end the thread, unanswered
            then = functools.partial(self.fail, traceback.format_exc())
        finally:
            self.connection.server.call_soon(functools.partial(self.connection.come_back, then))

    def serve(self) -> Work:
        """Run the handler on the real socket, however long it takes; in the pool."""
        connection, self.wfile = self.connection, AnswerStream(self)
        self.wfile.write(connection.output)     # what earlier requests are still owed
        connection.output, self.wfile.sent = b"", 0
        self.rfile = (io.BufferedReader(BodyStream(self)) if self.content is None
                      else io.BytesIO(self.content))
        connection.server.handler(self, connection.address, connection.server)
        return self.served

    def receive(self) -> bytes:
        """Return the next piece of the body; in the pool."""
        connection, start = self.connection, time.monotonic()
        octets, connection.buffer = connection.buffer, b""
        if not octets:
            self.lost = True        # until proven otherwise
            # Never 0, which would mean "do not block", nor less, which is an error.
            connection.socket.settimeout(max(0.01, self.patience))
            if self.head.expects and not self.wfile.sent:
                connection.socket.sendall(CONTINUE)
            octets = connection.socket.recv(IN_MEMORY)
            if not octets:
                raise ConnectionResetError(errno.ECONNRESET, "client left in the middle")
            self.lost = False
        self.patience += len(octets) * PACE_SECONDS / IN_MEMORY - (time.monotonic() - start)
        self.patience = min(self.patience, PACE_SECONDS)
        return self.body.feed(octets)

    def served(self) -> None:
        """End what a handler has answered on the socket itself."""
        if self.lost:
            self.connection.close()
        elif self.wfile.sent:
            self.finish(b"", self.wfile.sent)
        else:
            self.fail("the handler sent no answer")

    def fail(self, why: str) -> None:
        """Answer 500 for a handler that raised, unless it has begun to answer itself."""
        if not self.lost:
            self.connection.server.log.error(f"error: {self.head.line}: {why}")
        if self.lost or isinstance(self.wfile, AnswerStream) and self.wfile.sent:
            self.connection.close()
        else:
            self.reply(500)

    def reply(self, status: int, close: bool = False) -> None:
        """Answer with nothing but a status."""
        unread = not self.body.done and (self.body_is_large() or self.head.expects)
        self.closes = self.closes or close or unread
        page = STATUS_LINES[status][9:].encode("ascii")
        self.finish(self.compose(status, "text/plain", page))

    def compose(self, status: int, content_type: str, page: bytes) -> bytes:
        """Return a whole answer."""
        self.status = status
        fields = "".join([f"{name}: {value}\r\n" for name, value in self.fields])
        head = (f"{STATUS_LINES[status]}{self.connection.server.stamp}{fields}Content-Type: "
                f"{content_type}\r\nContent-Length: {len(page)}\r\n"
                f"{self.connection_field(self.closes)}\r\n").encode("latin-1")
        self.head_size = len(head)
        return head if self.head.method == "HEAD" else head + page

    def finish(self, answer: bytes, sent: int = 0) -> None:
        """Log the exchange and leave the rest to the connection; sent = bytes that went before."""
        connection = self.connection
        if connection.listener.logs:
            connection.server.log.access(self, (sent or len(answer)) - self.head_size)
        connection.deliver(self, answer)


class Connection:
    """One client's connection, from accept to close: bytes in, bytes out, one deadline.

    Of thousands nearly all are idle, so an idle one is small.
    """

    __slots__ = ("server", "listener", "socket", "address", "host", "client", "buffer", "output",
                 "stage", "deadline", "writes", "exchange", "body", "closing", "lingers")

    def __init__(self, server: "AuthServer", listener: "Listener", sock: socket.socket,
                 address: Any, host: str, client: str = "") -> None:
        self.server, self.listener, self.socket = server, listener, sock
        self.address = address      # for handlers
        self.host = host            # for rules and logs
        self.client = client        # whose connections are counted; "": nobody's
        self.buffer = b""           # received, and not understood yet
        self.output = b""           # not sent yet
        self.writes = False         # it waits for the client: nothing is read meanwhile
        self.exchange: Optional[Exchange] = None    # whose body is being read
        self.body: Optional[Body] = None            # being read by the loop
        self.closing = False        # after the output
        self.lingers = False        # ... because the client may still be sending
        self.wait("first")

    def wait(self, stage: str) -> None:
        """Set what is waited for, and for how long."""
        self.stage, self.deadline = stage, self.server.clock + WAITS[stage]

    def ready(self, events: int) -> None:
        """Send what waits, or else read what came; then work."""
        if self.output:
            self.flush()
        elif self in self.server.later:
            return              # it has sent enough for now
        else:
            try:
                octets = self.socket.recv(READ_SIZE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                octets = b""
            if not octets:
                self.close()
            elif self.body is not None:
                self.receive(octets)
            elif not self.closing:
                self.buffer = self.buffer + octets if self.buffer else octets
        self.advance()

    def advance(self) -> None:
        """Answer requests that are whole, but not too many; send the answers together."""
        for _ in range(PIPELINED):
            if not self.buffer or self.body or self.closing or self.writes or self.stage == "pool":
                break
            end = self.buffer.find(b"\r\n\r\n") + 4
            if end > 3:
                octets, self.buffer = self.buffer[:end], self.buffer[end:]
                self.begin(octets)
            elif self.buffer[:2] == b"\r\n":    # an empty line before a request is no request
                self.buffer = self.buffer[2:]
            else:
                self.check_partial_head()
                break
        else:
            self.server.later[self] = None      # other clients first
        if self.output and not self.writes and self.stage != "pool":
            self.flush()

    def check_partial_head(self) -> None:
        """Refuse a head that can only become worse; wait for the rest of others, not for long."""
        end = self.buffer.find(b"\n")
        if end < 0 and len(self.buffer) > MAX_LINE:
            self.refuse(414, "request line too long")
        elif len(self.buffer) > MAX_HEAD:
            self.refuse(431, "head too large")
        # RFC 9112 section 2.2 lets us end a line at a bare LF; a proxy in front may not have.
        elif end >= 0 and self.buffer[end - 1:end] != b"\r":
            self.refuse(400, "line without CR")
        elif self.stage != "head":
            self.wait("head")

    def begin(self, octets: bytes) -> None:
        """Begin the exchange of a whole head."""
        exchange = self.recall(octets)
        if exchange is not None:
            exchange.grant()
        elif octets[:2] == b"\r\n":
            self.buffer = octets[2:] + self.buffer
        else:
            try:
                head = parse_head(octets)
            except BadRequest as error:
                self.buffer = octets
                self.refuse(error.status, str(error))
                return
            forwarded = head.values.get("x-forwarded-for", ())
            host, client = self.server.proxies.find_client(self.host, forwarded)
            Exchange(self, octets, head, host, client).authenticate()

    def recall(self, octets: bytes) -> Optional[Exchange]:
        """Return the exchange of a head that is known, and still right."""
        key, nonce_count, response = memo_key(self.host, octets)
        known = self.listener.memos.get(key)
        if known is None:
            return None
        head, host, client, memo = known
        now, authenticator = self.server.now, self.server.authenticator
        if client is not None and authenticator and authenticator.is_locked(client, now):
            return None
        fields = memo.again(now, nonce_count, response)
        if fields is None:
            return None
        return Exchange(self, octets, head, host, client, memo.verdict, fields)

    def remember(self, exchange: Exchange, memo: Memo) -> None:
        """Keep what a head meant, if its holes are where the strict parser saw them."""
        key, nonce_count, response = memo_key(self.host, exchange.octets)
        if memo.is_for(nonce_count, response):
            memos = self.listener.memos
            if len(memos) >= MAX_MEMOS:
                memos.clear()       # then the next request of each client is parsed, that is all
            # The fields have been looked at: without them an entry takes half the memory.
            head = exchange.head._replace(values={})
            memos[key] = head, exchange.host, exchange.client, memo

    def read_body(self, exchange: Optional[Exchange], body: Body) -> None:
        """Read a body that exchange waits for, or that nobody wants."""
        self.exchange, self.body = exchange, body
        self.wait("body")
        octets, self.buffer = self.buffer, b""
        self.receive(octets)

    def receive(self, octets: bytes) -> None:
        """Take bytes of the body."""
        body, exchange = self.body, self.exchange
        if body is None:
            return
        try:
            piece = body.feed(octets)
            if exchange is not None and exchange.content is not None:
                exchange.content += piece
                if len(exchange.content) > IN_MEMORY:
                    raise BadRequest(413, "body too large")
        except BadRequest as error:
            self.refuse(error.status, str(error))
            return
        if body.done:
            self.buffer, self.body, self.exchange = body.take_rest(), None, None
            self.wait("idle")
            if exchange is not None:
                exchange.collected()

    def refuse(self, status: int, reason: str) -> None:
        """Answer what is no request, or not a whole one, and hang up."""
        exchange = self.exchange
        if exchange is None:
            line = escape(self.buffer[:MAX_LINE].partition(b"\r\n")[0].decode("latin-1"))
            head = Head(line, "", "", "", 1, {}, 0, False, False, False, '"-" "-"')
            exchange = Exchange(self, b"", head, self.host, None)
        # Whatever follows what we could not read is no request, so nothing of it is kept.
        self.buffer, self.exchange, self.body = b"", None, None
        self.lingers = True
        self.server.log.error(f"{self.host}: refused -: malformed: {reason}")
        exchange.reply(status, True)

    def deliver(self, exchange: Exchange, answer: bytes) -> None:
        """Take an answer; find where the next request begins."""
        self.output = self.output + answer if self.output else answer
        self.closing = exchange.closes or self.server.draining
        self.wait("idle")
        body = exchange.body
        if body.done:
            if body.rest:
                self.buffer = body.take_rest() + self.buffer
        elif exchange.body_is_large() or self.closing:
            self.closing = self.lingers = True
        else:
            # A small body that nobody wanted is read and dropped, and the connection goes on.
            self.read_body(None, body)
        if self.closing:
            self.lingers = self.lingers or bool(self.buffer)
            if not self.output:
                self.hang_up()

    def flush(self) -> None:
        """Send the output; what the client does not take now waits, and so do its requests."""
        try:
            sent = self.socket.send(self.output)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        self.output = self.output[sent:]
        if self.output:
            if not self.writes:
                self.watch(True)
                self.wait("write")
            # Haste is no credit for later: what the kernel took at once, the client may never read.
            self.deadline = min(self.deadline + sent * PACE_SECONDS / IN_MEMORY,
                                self.server.clock + WAITS["write"])
        elif self.closing:
            self.hang_up()
        elif self.writes:
            self.watch(False)
            self.wait("body" if self.body else "idle")

    def watch(self, writes: bool) -> None:
        """Wait for the moment to write, or to read."""
        self.writes = writes
        self.server.selector.modify(
            self.socket, selectors.EVENT_WRITE if writes else selectors.EVENT_READ, self.ready)

    def hang_up(self) -> None:
        """Close; if the client may still be sending, let it finish and read the answer first.

        Closing a socket with bytes unread sends a reset, and a reset makes the client's
        kernel forget an answer that it has already received.

        See: RFC 9112 section 9.6.
        """
        if self.lingers and self.stage != "linger":
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_WR)
                self.watch(False)
                self.wait("linger")
                return
        self.close()

    def leave(self) -> None:
        """Leave the loop for a thread."""
        self.server.selector.unregister(self.socket)
        self.wait("pool")

    def come_back(self, then: Work) -> None:
        """Come back from a thread, and go on."""
        self.server.offloaded -= 1
        self.socket.setblocking(False)
        self.server.selector.register(self.socket, selectors.EVENT_READ, self.ready)
        self.wait("idle")
        then()
        self.advance()

    def expire(self) -> None:
        """Close what took too long; who is in the middle of a request is told so."""
        if self.stage == "head" or self.stage == "body" and self.exchange:
            self.refuse(408, "too slow")
            self.advance()
        else:
            self.close()

    def close(self) -> None:
        """Forget the connection; harmless when it is repeated."""
        if self in self.server.connections:
            self.server.forget(self)
            self.socket.close()
        self.closing, self.buffer, self.output = True, b"", b""


# -- 10. The server -----------------------------------------------------------
#
# One thread waits for all sockets at once (selectors) and does whatever does not
# wait. An idle or slow client costs a Connection and a deadline, not a thread.
# Deadlines are looked at once a second: a walk over 10,000 connections takes
# half a millisecond, no timer structure is cheaper.


class Listener(NamedTuple):
    """A listening socket, the schemes offered there, and the heads seen there."""

    socket: socket.socket
    schemes: Sequence[str]
    memos: Dict[Key, Tuple[Head, str, Optional[str], Memo]]
    logs: bool = True       # not for the socket of probe()


DEADLY = (signal.SIGTERM, signal.SIGINT)


class Log:
    """The access log (descriptor 1) and the error log (descriptor 2), written once per turn.

    One write(2) per turn of the loop instead of one per request, and of whole lines, so
    that several workers can append to one file. A full disk stops the log and nothing
    else: the lost lines are counted, and said as soon as writing works again.
    """

    def __init__(self) -> None:
        self.date = ""
        self.waiting: Dict[int, List[str]] = {1: [], 2: []}
        self.requests = 0       # answered in this turn
        self.lost = 0

    def access(self, exchange: Exchange, size: int) -> None:
        """Note an answer, in the Combined format that log analysers and fail2ban read.

        The user column has a name for a success and for wrong credentials, and "-" for
        first challenges and stale ones: so fail2ban's filter traefik-auth bans the right.
        """
        head, verdict = exchange.head, exchange.verdict
        self.requests += 1
        self.waiting[1].append(
            f'{exchange.host or "unix:"} - {log_name(verdict.log_user)} [{self.date}] '
            f'"{head.line}" {exchange.status or "-"} {size} {head.log_tail}\n')

    def error(self, text: str) -> None:
        """Note what an administrator should know; only its own line feeds divide lines."""
        lines = "\n".join(escape(line).replace("\\x22", '"') for line in text.split("\n"))
        self.waiting[2].append(f"[{self.date}] authserver: {lines}\n")

    def flush(self) -> None:
        """Write what was noted; descriptors 1 and 2 may be another file by now (rotation)."""
        if not (self.waiting[1] or self.waiting[2]):
            return
        # SIGTERM comes as SystemExit, and must not come between a write and its clear().
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, DEADLY)
        for fd, lines in self.waiting.items():
            octets = "".join(lines).encode("ascii")
            try:
                # write(2) may take a part of it, on a full disk for one.
                while octets:
                    octets = octets[os.write(fd, octets):]
                if lines and self.lost:
                    os.write(2, b"authserver: warning: %d lines of the log lost\n" % self.lost)
                    self.lost = 0
            except OSError:
                self.lost += octets.count(b"\n")
            lines.clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@functools.lru_cache(maxsize=256)
def log_name(username: str) -> str:
    """Return a user's name as one word of the log.

    >>> log_name("jim"), log_name("a b"), log_name("-")
    ('jim', 'a%20b', '-')
    """
    return urllib.parse.quote(username, "!$&'()*+,/:;=?@", errors="replace")


def log_date(second: int) -> str:
    """Return a time as Combined logs have it: local, with its distance from UTC."""
    local = time.localtime(second)
    # Not %b: strftime would name the month in the language of the locale.
    month = http.server.BaseHTTPRequestHandler.monthname[local.tm_mon]
    return f"{local.tm_mday:02d}/{month}/" + time.strftime("%Y:%H:%M:%S %z", local)


def raise_file_limit() -> int:
    """Raise the limit of open files to what is allowed, but not for children; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):       # macOS: "unlimited" is refused
        return soft
    at_fork = getattr(os, "register_at_fork", None)     # since Python 3.7
    if at_fork:
        at_fork(after_in_child=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
    return hard


def host_of(address: Any) -> str:
    """Return the host in a peer's socket address; "" for a unix socket's, a path if anything.

    >>> [host_of((host, 80)) for host in ("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::ffff:1")]
    ['192.0.2.1', '192.0.2.1', '2001:db8::ffff:1']
    >>> host_of("/run/client")
    ''
    """
    host = str(address[0]) if isinstance(address, tuple) else ""
    # IPv4 on a socket of both families. By parse_address it would take 5 us.
    return host[7:] if host.startswith("::ffff:") and "." in host else host


def nothing() -> None:
    """Do nothing."""


def count_cpus() -> int:
    """Return how many CPUs we may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1      # macOS


class AuthServer(http.server.HTTPServer):
    """An HTTPServer that keeps every connection in one loop; see the head of this section.

    Methods for the caller: serve_forever, shutdown, server_close; from daemonize.py also
    hold, release, drain, probe, reload, status, abandon.
    Instance variables: sockets, workers, greeting, authenticator, draining.
    """

    request_queue_size = BACKLOG

    def __init__(self, server_address: Any, handler_class: Any, bind_and_activate: bool = True,
                 authenticator: Optional[Authenticator] = None,
                 sockets: Sequence[Tuple[socket.socket, Sequence[str]]] = ()) -> None:
        self.handler = hosted(handler_class)
        served = getattr(self.handler, "func", self.handler)
        self.nonblocking, self.methods = served.nonblocking, allowed(served)
        self.authenticator = authenticator or getattr(served, "authenticator", None)
        if sockets:
            socketserver.BaseServer.__init__(self, server_address, handler_class)
        else:
            super().__init__(server_address, handler_class, bind_and_activate)
            sockets = [(self.socket, SCHEMES)]
        self.listeners = [Listener(sock, schemes, {}) for sock, schemes in sockets]
        self.sockets = [sock for sock, _ in sockets]
        self.socket = self.sockets[0]
        self.proxies = TrustedProxies()
        self.workers = min(4, count_cpus())
        self.greeting, self.abandon, self.reread = "", nothing, nothing
        self.connections: Set[Connection] = set()
        # connections with more requests in their buffers; who came first, comes first
        self.later: collections.OrderedDict[Connection, None] = collections.OrderedDict()
        self.per_client: Dict[str, int] = collections.Counter()
        self.calls: Deque[Work] = collections.deque()       # for the loop, from other threads
        self.log = Log()
        self.offloaded = self.second = 0    # threads of the pool; when tick() was last at work
        self.serving = self.draining = self.stopping = False
        self.paused_until = 0.0
        self.gate = mmap.mmap(-1, 1)        # shared with the workers
        self.stopped = threading.Event()
        self.tick()
        self.open_probe()

    def server_bind(self) -> None:
        """Bind without asking the DNS for our own name, which HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Serve until shutdown() or drain(), or until a signal handler raises."""
        self.limit = max(BATCH, min(MAX_CONNECTIONS, raise_file_limit() - SPARE_FILES))
        self.stopped.clear()
        self.wake, self.waker = socket.socketpair()
        self.selector = selectors.DefaultSelector()     # an epoll must not be shared by a fork
        try:
            self.selector.register(self.wake, selectors.EVENT_READ, self.make_calls)
            self.selector.register(self.probed.socket, selectors.EVENT_READ, self.probed.ready)
            self.accept_again()
            self.announce()
            self.serving = True
            while not self.stopping and not (self.draining and not self.connections):
                self.turn(poll_interval)
        finally:
            self.log.flush()
            for connection in list(self.connections):
                connection.close()
            for closable in (self.selector, self.wake, self.waker):
                closable.close()
            self.serving = self.stopping = False
            self.stopped.set()

    def announce(self) -> None:
        """Log the addresses; the first worker does it for all."""
        authenticator = self.authenticator
        if authenticator is None or not authenticator.table.statistics()["workers"]:
            for listener in self.listeners:
                self.log.error(f"listening on {address_of(listener.socket)} "
                               f"({', '.join(listener.schemes)})")
            if authenticator and authenticator.max_failures[0]:
                self.log.error("never locked out, for they may be many: clients on loopback, on "
                               "unix sockets, and of proxies without X-Forwarded-For")
        if authenticator:
            authenticator.table.add("workers")

    def turn(self, poll_interval: float) -> None:
        """Wait for something to do, do it, write the log."""
        self.log.flush()
        if self.later or self.paused_until:
            poll_interval = 0 if self.later else PAUSE_SECONDS
        busy = self.connections or self.paused_until
        # Without connections no deadline runs: sleep until something happens.
        events = self.selector.select(poll_interval if busy else None)
        self.tick()
        for key, mask in events:
            self.call(key.data, mask)
        end = time.monotonic() + SLICE
        while self.later and time.monotonic() < end:
            self.call(self.later.popitem(last=False)[0].advance)
        if self.log.requests and self.authenticator:
            self.authenticator.table.add("requests", self.log.requests)
            self.log.requests = 0

    def call(self, function: Callable[..., None], *arguments: int) -> None:
        """Call a function of the loop; a mistake of ours may cost a connection, not the worker."""
        try:
            function(*arguments)
        except Exception:
            self.log.error(f"error: {traceback.format_exc()}")
            if isinstance(getattr(function, "__self__", None), Connection):
                function.__self__.close()       # type: ignore[attr-defined]

    def tick(self) -> None:
        """Look at the clocks; once a second, format the dates and close what is overdue."""
        self.now, self.clock = time.time(), time.monotonic()
        if int(self.now) != self.second:
            self.second = int(self.now)
            date = email.utils.formatdate(self.second, usegmt=True)
            self.stamp = f"Server: authserver\r\nDate: {date}\r\n"
            self.log.date = log_date(self.second)
            # A list, made first: expire() takes connections out of the set.
            for connection in [item for item in self.connections
                               if item.deadline < self.clock and item not in self.later]:
                connection.expire()
        if self.paused_until and self.paused_until < self.clock:
            self.accept_again()

    def call_soon(self, call: Work) -> None:
        """Have call made by the loop; from any thread."""
        self.calls.append(call)
        with contextlib.suppress(OSError, AttributeError):      # awake anyway, or not running
            self.waker.send(b"x", socket.MSG_DONTWAIT)

    def make_calls(self, events: int) -> None:
        """Make the calls that other threads asked for."""
        # First the byte, then the calls: one added after the last popleft() sends a new byte.
        self.wake.recv(4096, socket.MSG_DONTWAIT)
        while self.calls:
            self.call(self.calls.popleft())

    def accept_again(self) -> None:
        """Begin to accept connections, or go on after a pause, unless hold() is in force."""
        self.paused_until = self.clock + PAUSE_SECONDS if self.gate[0] else 0.0
        if self.paused_until or self.draining:
            return
        for listener in self.listeners:
            # Several workers may wake for one connection; for the late ones accept() must not wait.
            listener.socket.setblocking(False)
            if listener.socket.family != socket.AF_UNIX:
                # Accepted sockets inherit it: one call here instead of one per connection.
                listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(listener.socket, selectors.EVENT_READ,
                                   functools.partial(self.accept, listener))

    def stop_accepting(self) -> None:
        """Leave new connections to the kernel's queue, or to another process."""
        for listener in self.listeners:
            with contextlib.suppress(KeyError):
                self.selector.unregister(listener.socket)

    def accept(self, listener: Listener, events: int) -> None:
        """Accept some connections."""
        for _ in range(BATCH):
            if self.draining:       # at once: our successor begins to accept
                return
            try:
                sock, address = listener.socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.make_room()
                return
            self.admit(listener, sock, address)

    def admit(self, listener: Listener, sock: socket.socket, address: Any) -> None:
        """Take a connection, unless its address has too many; make room for the next one."""
        host = host_of(address)
        client = self.count_as(host)
        if client:
            if self.per_client[client] >= MAX_PER_CLIENT:
                sock.close()
                return
            self.per_client[client] += 1
        if len(self.connections) >= self.limit:
            self.make_room()
        sock.setblocking(False)
        connection = Connection(self, listener, sock, address or ("unix:", 0), host, client)
        self.connections.add(connection)
        self.selector.register(sock, selectors.EVENT_READ, connection.ready)

    def count_as(self, host: str) -> str:
        """Return the client whose connections are counted (IPv6: a /64); "" for us and proxies."""
        # The first test saves 5 us for each connection from a proxy or a benchmark on this machine.
        return "" if host[:4] in ("", "127.") else self.proxies.find_client(host)[1] or ""

    def forget(self, connection: Connection) -> None:
        """Strike a connection off the books."""
        self.connections.remove(connection)
        if connection.stage != "pool":
            self.selector.unregister(connection.socket)
        if connection.client:
            self.per_client[connection.client] -= 1
            if not self.per_client[connection.client]:
                del self.per_client[connection.client]

    def make_room(self) -> None:
        """Close connections that have waited longest; if there are none, accept none for a while.

        A socket with clients in its queue stays readable: without the pause the loop
        would spin, as http.server's does.
        """
        idle = [item for item in self.connections
                if item.stage in ("first", "idle", "head", "linger")]
        # deadline - WAITS is the time since when it waits; of 64 idle ones one or two have to go.
        for connection in heapq.nsmallest(1 + len(idle) // 64, idle,
                                          key=lambda item: item.deadline - WAITS[item.stage]):
            connection.close()
        if not idle and not self.paused_until:
            self.stop_accepting()
            self.paused_until = self.clock + PAUSE_SECONDS

    def shutdown(self) -> None:
        """End serve_forever() from another thread, and wait for its end."""
        self.stopping = True
        self.call_soon(nothing)
        self.stopped.wait()

    def hold(self) -> None:
        """Before the workers are forked: have them accept nobody until release().

        While old and new daemon accept from one socket, a digest client that meets them in
        turn has its nonce called stale by each of them.
        """
        self.gate[0] = 1

    def release(self) -> None:
        """End hold(), for all workers; now that the old daemon has been told to drain."""
        self.gate[0] = 0

    def drain(self) -> None:
        """Accept nobody, end connections after their next answer, then end serve_forever()."""
        self.draining = True
        self.call_soon(self.begin_drain)

    def begin_drain(self) -> None:
        """Do the loop's part of drain()."""
        self.stop_accepting()
        self.selector.unregister(self.probed.socket)
        for connection in self.connections:
            if connection.stage in ("first", "idle"):
                connection.deadline = min(connection.deadline, self.clock + DRAIN_SECONDS)

    def open_probe(self) -> None:
        """Make the socket pair of probe(): who asks writes to one end, workers answer on the other.

        Of datagrams: several workers share their end, and each of them reads whole questions.
        """
        ours, self.probing = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        self.probed = Connection(self, Listener(ours, SCHEMES, {}, False), ours, ("unix:", 0), "")

    def probe(self) -> None:
        """Ask for a page as a client would; raise Refusal if the answer is not the right one."""
        self.probing.settimeout(PROBE_SECONDS)
        self.probing.send(b"GET / HTTP/1.1\r\nHost: probe\r\n\r\n")
        try:
            answer = self.probing.recv(IN_MEMORY)
        except OSError as error:
            raise Refusal(f"unable to probe the server: {error}")
        # Without an authenticator any answer will do: the handler may know no "/".
        if self.authenticator and not answer.startswith(b"HTTP/1.1 401 "):
            line = answer.partition(b"\r\n")[0].decode("latin-1")
            raise Refusal(f"unable to probe the server: it answered {escape(line)}")

    def reload(self) -> None:
        """Read the password file again; raise Refusal and keep the old one if it is wrong.

        The next probe asks the workers that will be forked, not those that we had.
        """
        self.reread()
        if not self.serving:
            self.probing.close()
            self.probed.socket.close()
            self.open_probe()

    def status(self) -> Dict[str, Any]:
        """Return what the daemon's status should say of the application."""
        known: Dict[str, Any] = {"addresses": [address_of(sock) for sock in self.sockets]}
        if self.authenticator:
            known["users"] = len(self.authenticator.passwords.entries)
            known.update(self.authenticator.table.statistics())
            del known["workers"]        # all that ever were; the daemon knows those of now
        return known

    def server_close(self) -> None:
        """Close the listening sockets."""
        for sock in self.sockets + [self.probing, self.probed.socket]:
            sock.close()


# -- 11. protect() and protect_wsgi() -----------------------------------------
#
# Here other people's servers read the requests and write the answers, in a thread or a
# process for each. Where they do less than we need, it is done here: the head is read once
# more, strictly; and what a refused client still sends is read to its end, or the server
# would take it for the next request, or close on it: then the client's system throws the
# answer away before it has been read (RFC 9112 section 9.6).
#
# The processes of a WSGI server know nothing of one another. They meet in a file that has
# the dictionary's name, in a folder that only their user can enter: /dev/shm/authserver-UID,
# or below the temporary folder. Who uses it holds a lock on it; what nobody uses is removed
# by the next one who comes, for its clock may be that of another boot.

LINGER_SECONDS = 10.0       # for which a refused client may go on sending
TABLES: "weakref.WeakValueDictionary[str, SharedTable]" = weakref.WeakValueDictionary()


def open_shared_file(name: str, size: int) -> int:
    """Return a descriptor of a file of that size which all processes of our user share."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    path = os.path.join(base, f"authserver-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(folder)
        # Where everybody may make a folder, somebody else may have been first.
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EACCES, f"others have access to {path}")
        fcntl.flock(folder, fcntl.LOCK_EX)      # until it is closed
        # Not those that we use: to close a file would end all our record locks on it.
        for other in set(os.listdir(folder)) - set(TABLES):
            with open(os.open(other, os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder), "rb+") as stream:
                with contextlib.suppress(BlockingIOError):      # in use
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(other, dir_fd=folder)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        fcntl.flock(fd, fcntl.LOCK_SH)          # for as long as any of us lives
        # Now: later a full disk would be a page that is not there (SIGBUS).
        os.posix_fallocate(fd, 0, size)
        return fd
    finally:
        os.close(folder)


def shared_table(passwords: Passwords) -> SharedTable:
    """Return the table of all processes that serve this dictionary."""
    name = (LAYOUT + passwords.fingerprint()).hex()
    table = TABLES.get(name)
    if table is None:
        table = TABLES[name] = SharedTable(open_shared_file(name, TABLE_SIZE))
    return table


class UnknownProxies(TrustedProxies):
    """What we believe where nobody has said whom to trust: a private address may be a proxy's.

    Whether it speaks for one client or for everybody we cannot know, so it is never locked
    out: ten wrong passwords by a stranger would keep all others out.
    """

    INSIDE = TrustedProxies(["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10",
                             "fc00::/7", "fe80::/10"])

    def _find_client(self, peer: str, forwarded: str = "") -> Tuple[str, Optional[str]]:
        shown, client = super()._find_client(peer, forwarded)
        is_inside = client and self.INSIDE.trusts(parse_address(peer))
        return shown, None if is_inside else client


class Gate:
    """The authenticator before other people's code, with what it needs to know of the host."""

    def __init__(self, passwords: Passwords, trusted_proxies: Optional[Sequence[str]],
                 offer: Dict[str, Any], share: bool = False) -> None:
        if not isinstance(passwords, Passwords):
            raise TypeError(f"unable to use {passwords!r:.40} as passwords: expected "
                            f'Passwords({{"jim": "secret"}}, realm="files")')
        import logging          # 8 ms, only for programs
        self.log = logging.getLogger("authserver")
        if share and "table" not in offer:
            try:
                offer["table"] = shared_table(passwords)
            except OSError as error:
                self.log.warning("unable to share nonces with other processes: %s", error)
        self.authenticator = Authenticator(passwords, **offer)
        self.schemes: Optional[Sequence[str]] = offer.get("schemes")
        self.proxies = (UnknownProxies() if trusted_proxies is None else
                        TrustedProxies(trusted_proxies))
        if trusted_proxies is None:
            self.log.info("never locked out: clients on loopback and with private addresses, which "
                          "may be proxies; trusted_proxies=[...] says which are")
        for warning in passwords.warnings:
            self.log.warning(warning)

    def judge(self, method: str, target: str, authorization: Sequence[str], peer: str,
              forwarded: str, is_safe: bool, read_body: Callable[[], bytes],
              same_target: Callable[[str, str], bool] = is_same_target) -> Verdict:
        """Return the verdict on a request; is_safe: nobody can listen on its way."""
        host, client = self.proxies.find_client(peer, forwarded)
        schemes = self.schemes or (SCHEMES if is_safe else SCHEMES[:1])
        try:
            verdict = self.authenticator.authenticate(
                method, target, authorization, client, self.authenticator.clock(), schemes,
                read_body, same_target)
        except BadRequest as error:         # from read_body
            verdict = Verdict(error.status, reason=str(error))
        if verdict.status != 200 and verdict.reason != "no credentials":
            self.log.warning("%s: refused %s: %s", host, log_name(verdict.log_user), verdict.reason)
        return verdict


class Guard(http.server.BaseHTTPRequestHandler):
    """What protect() puts before a handler; on AuthServer, which has asked already, idle.

    For handlers: remote_user and auth_type, the user and the scheme.
    """

    gate: Gate
    remote_user: Optional[str] = None
    auth_type = ""
    info: Fields = ()           # for the handler's answer
    expects = unread = False    # a client that waits for 100 Continue; a body nobody has read

    def parse_request(self) -> bool:
        """Ask for the password when http.server has read a head and before it acts on it."""
        self.info, self.expects = (), False         # not those of the last request
        verdict = getattr(self.request, "verdict", UNASKED)
        if verdict.status == 200:                   # by AuthServer, which adds its fields itself
            passes = super().parse_request()
        else:
            verdict = self.ask()
            passes, self.info = verdict.status == 200, verdict.fields
        self.remote_user, self.auth_type = verdict.username, verdict.scheme
        return passes and (not self.expects or super().handle_expect_100())

    def handle_expect_100(self) -> bool:
        """Put 100 Continue off: http.server would say it before the password is asked for."""
        self.expects = True
        return True

    def ask(self) -> Verdict:
        """Return the verdict on the request, and answer if it may not pass."""
        octets = line = getattr(self, "raw_requestline")    # the type stubs do not list it
        while line not in (b"\r\n", b"\n", b"") and len(octets) <= MAX_HEAD:
            line = self.rfile.readline(MAX_HEAD)
            octets += line
        stream, self.rfile = self.rfile, io.BytesIO(octets.partition(b"\n")[2])
        try:
            if not super().parse_request():         # and has said why
                return UNASKED
        finally:
            self.rfile = stream
        self.unread = True                          # of a head that we cannot read, anything
        try:
            verdict = self.judge(parse_head(octets))
        except BadRequest as error:
            verdict = Verdict(error.status)
        if verdict.status != 200:
            self.refuse(verdict)
        return verdict

    def judge(self, request: Request) -> Verdict:
        """Return the verdict on a request that http.server and parse_head understand."""
        server: Any = self.server
        self.unread = request.fields.chunked or request.fields.length > 0
        return self.gate.judge(
            request.method, request.target, request.authorization,
            self.client_address[0] if self.client_address else "", request.fields.forwarded,
            hasattr(self.connection, "getpeercert") or is_private(server.socket),
            functools.partial(self.read_content, request.fields))

    def read_content(self, fields: FieldBlock) -> bytes:
        """Return the body, for qop=auth-int; the handler reads it again, and is the last."""
        if fields.chunked or fields.length > IN_MEMORY:
            raise BadRequest(411 if fields.chunked else 413, "body too large for auth-int")
        if self.expects:
            self.expects = not super().handle_expect_100()
        content = self.rfile.read(max(0, fields.length))
        self.rfile, self.close_connection, self.unread = io.BytesIO(content), True, False
        return content

    def refuse(self, verdict: Verdict) -> None:
        """Answer a request that may not pass."""
        page = error_page(verdict.status)
        self.close_connection = self.close_connection or self.unread
        self.send_response(verdict.status)
        for name, value in (*verdict.fields, HTML, ("Content-Length", str(len(page)))):
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(page if self.command != "HEAD" else b"")
        if self.unread:
            self.linger()

    def linger(self) -> None:
        """Let a client that is still sending read the answer, then leave."""
        end = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(OSError):          # it has left, or its time is over
            self.connection.shutdown(socket.SHUT_WR)
            more = True
            while more:
                self.connection.settimeout(max(0.01, end - time.monotonic()))
                more = bool(self.connection.recv(IN_MEMORY)) and time.monotonic() < end

    def end_headers(self) -> None:
        """Add Authentication-Info to the handler's answer."""
        for name, value in self.info:
            self.send_header(name, value)
        super().end_headers()


def check_handler(handler: Any) -> None:
    """Refuse what would never ask for the password; by name, and before it serves anybody."""
    if (not isinstance(handler, type) or issubclass(handler, Guard)
            or not issubclass(handler, http.server.BaseHTTPRequestHandler)):
        raise TypeError(f"unable to protect {handler!r:.60}: expected a class of handlers, derived "
                        f"from BaseHTTPRequestHandler, and not protected yet")
    for name in ("handle", "handle_one_request"):
        method: Any = getattr(handler, name)
        code = getattr(getattr(method, "__wrapped__", method), "__code__", None)
        if not {"handle", "handle_one_request", "parse_request"} & set(code.co_names if code else ()):
            raise TypeError(f"unable to protect {handler.__name__}: its {name}() does not call "
                            f"parse_request(), where the password is asked for")


def protect(handler_class: Any, passwords: Passwords,
            trusted_proxies: Optional[Sequence[str]] = None, **offer: Any) -> Any:
    """Return a handler class that answers only who has a password; any server runs it.

    It may be wrapped in a functools.partial. trusted_proxies are as --trusted-proxy;
    further arguments are those of Authenticator. Where a network reaches the server, and
    without TLS, Digest alone is offered unless schemes says what is.
    """
    if isinstance(handler_class, functools.partial):
        return functools.partial(protect(handler_class.func, passwords, trusted_proxies, **offer),
                                 *handler_class.args, **handler_class.keywords)
    check_handler(handler_class)
    gate = Gate(passwords, trusted_proxies, offer)
    return type(handler_class.__name__, (Guard, handler_class), {
        "__module__": handler_class.__module__, "gate": gate,
        "authenticator": gate.authenticator, "proxies": gate.proxies})      # for AuthServer


def is_same_resource(environ: Dict[str, Any], uri: str, target: str) -> bool:
    """Return whether the uri of a proof names what a WSGI environment without a target is about.

    How the path was spelt the server has not told: `%2C` and `,` are one to the application,
    and so they are to us. http.server makes one slash of several at the start.

    >>> environ = {"PATH_INFO": "/a,b", "QUERY_STRING": "c=%2C"}
    >>> [is_same_resource(environ, uri, "") for uri in ("//a%2cb?c=%2C", "/a,b?c=,", "/a,b")]
    [True, False, False]
    """
    path, _, query = uri.partition("?")
    asked = (environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")).encode("latin-1")
    named = urllib.parse.unquote_to_bytes(path.encode("latin-1"))
    return query == environ.get("QUERY_STRING", "") and asked in (
        named, re.sub(b"^/+", b"/", named))


def body_of(environ: Dict[str, Any]) -> Iterator[bytes]:
    """Yield what the body of a request consists of, if it is known where it ends."""
    length = environ.get("CONTENT_LENGTH")          # wsgiref tells what the client said
    left = MAX_BODY if environ.get("wsgi.input_terminated") else 0
    if length:
        left, _ = framing({"content-length": [length]}, 1)
    while left:
        piece = environ["wsgi.input"].read(min(left, IN_MEMORY))
        left -= len(piece) or left
        yield piece


def read_signed(environ: Dict[str, Any]) -> bytes:
    """Return the body, for qop=auth-int; the application reads it again."""
    content = b""
    for piece in body_of(environ):
        content += piece
        if len(content) > IN_MEMORY:
            raise BadRequest(413, "body too large for auth-int")
    environ["wsgi.input"] = io.BytesIO(content)
    return content


def skip_body(environ: Dict[str, Any]) -> None:
    """Read what a refused client sends."""
    end = time.monotonic() + LINGER_SECONDS
    for _ in body_of(environ):
        if time.monotonic() > end:
            # Of chunks cheroot does not find the end by itself: this ends the connection.
            if not environ.get("CONTENT_LENGTH"):
                raise ConnectionAbortedError("a refused client does not stop sending")
            break


def judge_environ(gate: Gate, environ: Dict[str, Any]) -> Verdict:
    """Return the verdict on the request that a WSGI environment describes."""
    peer, field = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_AUTHORIZATION")
    address = parse_address(peer)       # no peer: a unix socket
    target = environ.get("RAW_URI") or environ.get("REQUEST_URI")       # gunicorn; the others
    verdict = gate.judge(
        environ["REQUEST_METHOD"], str(target or ""), () if field is None else (field,), peer,
        environ.get("HTTP_X_FORWARDED_FOR", ""),
        not peer or environ["wsgi.url_scheme"] == "https" or bool(address and address.is_loopback),
        functools.partial(read_signed, environ),
        is_same_target if target else functools.partial(is_same_resource, environ))
    if verdict.status != 200:
        with contextlib.suppress(BadRequest):       # a length that is none
            skip_body(environ)
    return verdict


def protect_wsgi(application: Any, passwords: Passwords,
                 trusted_proxies: Optional[Sequence[str]] = None, **offer: Any) -> Any:
    """Return a WSGI application that answers only who has a password; as protect() does.

    The name is in REMOTE_USER, the scheme in AUTH_TYPE; refusals go to the logger authserver.
    """
    if not callable(application):
        raise TypeError(f"unable to protect {application!r:.60}: expected a WSGI application")
    gate = Gate(passwords, trusted_proxies, offer, True)

    def guarded(environ: Dict[str, Any], start_response: Any) -> Any:
        """Answer a refusal, or else call the application."""
        verdict = judge_environ(gate, environ)

        def start(status: str, fields: List[Tuple[str, str]], *exc_info: Any) -> Any:
            return start_response(status, list(fields) + list(verdict.fields), *exc_info)
        if verdict.status == 200:
            # WSGI text is bytes read as Latin-1 (PEP 3333).
            environ["REMOTE_USER"] = str(verdict.username).encode("utf-8").decode("latin-1")
            environ["AUTH_TYPE"] = verdict.scheme
            return application(environ, start)
        page = error_page(verdict.status)
        # uWSGI closes without a word: who asks again at once, as under Digest, would be reset.
        closes = [("Connection", "close")] * ("uwsgi.version" in environ)
        start(STATUS_LINES[verdict.status][9:].rstrip(),
              [HTML, ("Content-Length", str(len(page)))] + closes)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [page]
    return guarded


# -- 12. Addresses ------------------------------------------------------------


class Place(NamedTuple):
    """Where to listen: a numeric host and a port, or the path of a unix socket."""

    family: int
    where: Any          # as socket.bind wants it; of IPv6 with flow and scope

    def fits(self, sock: socket.socket) -> bool:
        """Return whether a socket that was handed over listens where we want to."""
        theirs, ours = sock.getsockname(), self.where
        if sock.family != self.family or self.family == socket.AF_UNIX:
            return sock.family == self.family and bool(theirs == ours)
        # Port 0 is any port.
        return bool(theirs[:1] + theirs[2:] == ours[:1] + ours[2:] and ours[1] in (0, theirs[1]))


def has_ipv6() -> bool:
    """Return whether the kernel has IPv6: socket.has_ipv6 says only that Python has."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def parse_bind(text: str) -> Place:
    """Return the address of a --bind option.

    >>> parse_bind("127.0.0.1:80").where, parse_bind("unix:/run/x").where
    (('127.0.0.1', 80), '/run/x')
    """
    if text.startswith("unix:") and text != "unix:":
        return Place(socket.AF_UNIX, os.path.abspath(text[5:]))
    match = re.fullmatch(r"(?:\[([0-9A-Za-z:.%_-]+)\]|([0-9A-Za-z._-]*)):([0-9]{1,9})", text)
    if match is None:
        raise Refusal(f"unable to bind {text}: expected HOST:PORT, [V6]:PORT, :PORT or unix:PATH")
    family = 0 if has_ipv6() else socket.AF_INET
    host = match.group(1) or match.group(2) or ("0.0.0.0" if family else "::")
    port = int(match.group(3))
    if port > 65535:
        raise Refusal(f"unable to bind {text}: ports are 0 to 65535")
    try:
        # As bytes: for text Python would load its IDNA tables first, which takes 5 ms.
        # The first answer only: a name with several addresses needs several --bind.
        found = socket.getaddrinfo(host.encode(), port, family, socket.SOCK_STREAM)[0]
    except OSError as error:
        raise Refusal(f"unable to bind {text}: {error.strerror}")
    # Whole: the address of a link is one only with its scope, the number of an interface.
    return Place(found[0], found[4])


def open_socket(text: str, place: Place) -> socket.socket:
    """Return a socket that listens at place; text is how the --bind option names it."""
    family, where = place
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family == socket.AF_UNIX:
            remove_stale_socket(where)
        else:
            # Or connections of the last run, for a minute in TIME_WAIT, would hold the port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Said in either case: the default is the machine's (net.ipv6.bindv6only).
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, where[0] != "::")
        sock.bind(where)
        if family == socket.AF_UNIX:
            os.chmod(where, 0o666)      # as a port: whoever gets there needs a password
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise BindError(f"unable to bind {text}: {error.strerror or error}"
                        + bind_advice(text, place, error))
    return sock


def bind_advice(text: str, place: Place, error: OSError) -> str:
    """Return the second line of a message about an address that we could not have."""
    host, _, port = text.rpartition(":")
    if place.family != socket.AF_UNIX and error.errno == errno.EADDRINUSE:
        return f"\ntry: ss -ltnp 'sport = :{port}'   # says who has it"
    if place.family != socket.AF_UNIX and error.errno == errno.EACCES and int(port) < 1024:
        return f"\ntry: --bind {host}:{8000 + int(port)}   # or as root"
    return ""


def remove_stale_socket(path: str) -> None:
    """Remove a unix socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
    except OSError:
        pass            # bind() will say it


def address_of(sock: socket.socket, scheme: str = "http") -> str:
    """Return where a socket listens, as a URL or as --bind has it."""
    where = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{where}"
    host = where[0].partition("%")[0]       # Python 3.6 puts the zone here as well
    if sock.family == socket.AF_INET6:
        # RFC 6874 section 2: IPv6addrz = IPv6address "%25" ZoneID
        host = f"[{host}%25{socket.if_indextoname(where[3])}]" if where[3] else f"[{host}]"
    return f"{scheme}://{host}:{where[1]}/"


def is_private(sock: socket.socket) -> bool:
    """Return whether no network lies between the socket and its clients."""
    address = parse_address(sock.getsockname()[0]) if sock.family != socket.AF_UNIX else None
    return sock.family == socket.AF_UNIX or address is not None and address.is_loopback


def open_sockets(options: argparse.Namespace) -> List[socket.socket]:
    """Return listening sockets for all addresses asked for, from those handed over if they fit."""
    given = list(getattr(options, "sockets", []))
    if given and not options.bind and not getattr(options, "predecessor", None):
        return given            # systemd knows where
    sockets = []
    for text in options.bind or [DEFAULT_ADDRESS]:
        place = parse_bind(text)
        # At most one: of several that fit, the others are for other --bind options, or closed.
        fitting = [sock for sock in given if place.fits(sock)][:1]
        sockets += fitting or [open_socket(text, place)]
        given = [sock for sock in given if sock not in fitting]
    for sock in given:
        sock.close()
    return sockets


# -- 13. The command line -----------------------------------------------------

def add_arguments(parser: Any) -> None:
    """Add our options to a parser (daemonize.py's, or our own)."""
    add = parser.add_argument
    add("--bind", metavar="ADDRESS", action="append",
        help=f"HOST:PORT, [V6]:PORT, :PORT (both families) or unix:PATH; repeatable "
             f"(default: {DEFAULT_ADDRESS}; port 0: any)")
    add("--passwords", metavar="FILE", help="the password dictionary; - reads standard input, once")
    add("--allow-partial", action="store_true",
        help="serve, though some users can not answer every scheme offered")
    add("--realm", metavar="NAME", default=REALM, help="protection space (default: %(default)s)")
    add("--schemes", metavar="LIST",
        help="offered, in this order (default: digest,basic; digest alone over a network)")
    add("--algorithms", metavar="LIST", default=",".join(ALGORITHMS),
        help="of Digest: MD5, SHA-256, SHA-512-256, each also -sess (default: %(default)s)")
    add("--qop", metavar="LIST", default=",".join(QOP),
        help="of Digest: auth, auth-int (default: %(default)s)")
    add("--nonce-lifetime", metavar="SECONDS", type=float, default=NONCE_LIFETIME,
        help="after which clients silently try again (default: %(default)g)")
    add("--nonce-secret", metavar="FILE",
        help="shared by machines that accept one another's nonces (default: a new one each start)")
    add("--trusted-proxy", metavar="CIDR", action="append", default=[],
        help="believe X-Forwarded-For from these peers only; repeatable (default: nobody)")
    add("--max-failures", metavar="N/SECONDS", default="%d/%d" % MAX_FAILURES,
        help="lock an address out after N wrong passwords (default: %(default)s; 0: never)")


def find_passwords(options: argparse.Namespace) -> Tuple[str, Optional[Tuple[str, str]]]:
    """Return the path of the password file, and user and password if it had to be made."""
    if options.passwords:
        path = options.passwords if options.passwords == "-" else os.path.abspath(options.passwords)
        return path, None
    prefix = getattr(options, "config_prefix", "")
    path = prefix + "passwords"
    if prefix and os.path.exists(path):
        return path, None
    if not (prefix and getattr(options, "may_create", False)):
        raise Refusal("unable to find a password file: --passwords is missing\n"
                      "try: authserver.py passwd FILE USER")
    # Only with --uid another user must read the file; without it 0600 is enough.
    gid = getattr(options, "gid", None) if getattr(options, "uid", None) is not None else None
    return path, first_password(path, gid, options.realm)


def read_passwords(path: str, options: argparse.Namespace, schemes: Sequence[str],
                   algorithms: Sequence[str]) -> Passwords:
    """Return the password file's dictionary, if it can serve what is offered."""
    passwords = Passwords.read(path, options.realm, options.allow_partial)
    passwords.check_servable(schemes, algorithms, options.allow_partial)
    for warning in passwords.warnings:
        print(f"authserver: warning: {escape(warning)}", file=sys.stderr, flush=True)   # 3.6 waits
    return passwords


def greet(user: str, password: str, server: AuthServer) -> str:
    """Return what the first start says, once."""
    sock = server.sockets[0]
    url = address_of(sock)
    if sock.family == socket.AF_UNIX:
        url = f"--unix-socket {sock.getsockname()} http://localhost/"
    url = url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
    return f"user: {user}\npassword: {password}\ntry: curl --digest -u {user} {url}example/foo"


def bind(options: argparse.Namespace) -> AuthServer:
    """Open sockets and files, with full privileges; return the server that will use them."""
    chosen = () if options.schemes is None else parse_choice(options.schemes, SCHEMES)
    algorithms = parse_choice(options.algorithms, CANONICAL.values())
    qop = parse_choice(options.qop, ("auth", "auth-int"))
    proxies = TrustedProxies(options.trusted_proxy)
    failures = parse_max_failures(options.max_failures)
    lifetime = options.nonce_lifetime
    if not 1 <= lifetime <= 1e6:
        raise Refusal(f"unable to use --nonce-lifetime {lifetime}: expected 1 to 1000000 seconds")
    secret = read_nonce_secret(options.nonce_secret) if options.nonce_secret else b""
    path, first = find_passwords(options)
    try:
        sockets = open_sockets(options)
        offers = [chosen or (SCHEMES if is_private(sock) else SCHEMES[:1]) for sock in sockets]
        # As asked for, so that check_offer sees every word; else what any address offers.
        schemes = chosen or [name for name in SCHEMES if any(name in offer for offer in offers)]
        read = functools.partial(read_passwords, path, options, schemes, algorithms)
        authenticator = Authenticator(read(), schemes, algorithms, qop, lifetime, secret,
                                      max_failures=failures)
    # BaseException: Ctrl-C must not leave a file whose password nobody has seen.
    except BaseException:
        if first:
            os.unlink(path)
        raise
    server = AuthServer(None, ExampleHandler, True, authenticator, list(zip(sockets, offers)))
    server.proxies = proxies
    if path != "-":         # which can be read only once
        server.reread = lambda: setattr(authenticator, "passwords", read())
    if first:
        server.abandon = lambda: os.unlink(path)
        server.greeting = greet(*first, server)
    return server


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of our own command line."""
    parser = argparse.ArgumentParser(
        prog="authserver.py", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="authserver.py [options] | passwd FILE USER [--stdin] [--delete] [--realm NAME]",
        description="Serve over HTTP, to users with a password (Basic and Digest).",
        epilog="examples:\n  authserver.py passwd users jim\n"
               "  authserver.py --passwords users --bind :8081")
    add_arguments(parser)
    return parser


def passwd(arguments: Sequence[str]) -> str:
    """Do the passwd verb, and return what to say."""
    parser = argparse.ArgumentParser(prog="authserver.py passwd", allow_abbrev=False,
                                     description="Add or change a user (asks twice).")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("user", metavar="USER")
    parser.add_argument("--realm", default=REALM, help="(default: %(default)s)")
    parser.add_argument("--stdin", action="store_true", help="read the password, one line")
    parser.add_argument("--delete", action="store_true", help="delete the user instead")
    options = parser.parse_args(arguments)
    return run_passwd(options.file, options.user, options.realm, options.stdin, options.delete)


def say(text: str, stream: TextIO) -> None:
    """Print a line; what the encoding of a bare environment lacks is shown escaped."""
    encoding = stream.encoding or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Serve in the foreground, or do the passwd verb."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["passwd"]:
            say(passwd(words[1:]), sys.stdout)
            return 0
        server = bind(build_parser().parse_args(words))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))   # the log gets its last lines
        if server.authenticator:
            server.authenticator.table.alone = True     # we fork nobody
        try:
            server.serve_forever()
        finally:
            server.server_close()
    except KeyboardInterrupt:
        return 0
    except (OSError, Refusal) as error:
        say(f"authserver: fatal: {error}", sys.stderr)
        return int(getattr(error, "status", 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
