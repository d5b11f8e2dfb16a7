#!/usr/bin/env python3
# MIT licence; see LICENSE.  One of two files that work together or alone: daemonize.py.
"""Serve over HTTP to who has a password: Basic and Digest, from one dictionary.

    python3 authserver.py passwd users jim          (asks for jim's password, twice)
    python3 authserver.py --passwords users --root .
    curl --digest -u jim http://127.0.0.1:8081/README

One exchange, of a server with --realm files (\\ marks a line broken for this page):

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

In Part I, which is about who is there,

    realm           the name of what is protected; a password is for one realm
    challenge       what a 401 asks for: one WWW-Authenticate line per scheme and algorithm
    credentials     what an Authorization field brings
    HA1             H(user:realm:password): all that a server must know for Digest, and,
                    because Basic brings the password itself, all it must know for Basic
    HA2             H(method:uri): the request
    response        H(HA1:nonce:nc:cnonce:qop:HA2): the proof
    frame           Digest credentials without what each request has anew: uri, cnonce, nc and
                    response, its holes
    nonce           our signed time stamp in the proof; nc counts its uses; cnonce is
                    random text of the client
    stale           the proof is right but its nonce is not, or no longer: try again with
                    this one, and do not ask the person
    qop             what the proof covers: auth = method and uri, auth-int = the body as well
    -sess           form of an algorithm that mixes nonce and cnonce into HA1
    verdict         what the authenticator says of a request: 200 and whose it is, or why not

and in Part II, which is about a server,

    target          what the request line asks for, as sent, before any clean-up
    head            request line and fields; an answer has one, too
    page            a function that answers in the loop; a handler, a class of http.server's,
                    answers in a thread
    story           the generator that tells a request, from its head to its line in the log
    peer            who is at the other end of the socket; host is whom the log names, client
                    whom a lock-out would hit: with a proxy between, these are three

The way of a request: bytes -> head (7) -> Authorization (1) -> credentials (2) -> the one
dictionary (3) and the nonce (4) -> verdict (5) -> page (8) -> one write (9, 10).  Part III, which
nobody has to read, has what people serve and how they get at it: folders (11 to 13), HTTPS
(14), handlers (15), other servers (16), proxies that ask (17), files of secrets (18), addresses
(19) and options (20).  Nearly each section begins with what it took to find out.

For programs: protect(HandlerClass, passwords), protect_wsgi(application, passwords),
Passwords({"jim": "secret"}, realm="files"), AuthServer, Files.  daemonize.py finds
add_arguments() and bind().

See: RFC 7616 (Digest), RFC 7617 (Basic), RFC 9110 (HTTP), RFC 9112 (its messages).
"""
import argparse
import base64
import calendar
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
import mimetypes
import mmap
import operator
import os
import queue
import re
import resource
import selectors
import shlex
import signal
import socket
import socketserver
import ssl              # at no cost: http.client, and so http.server, has it
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
from typing import (Any, Callable, Deque, Dict, Generator, Iterable, Iterator, List,
                    Mapping, NamedTuple, Optional, Sequence, Set, TextIO, Tuple, Union)

# -- 0. Settings and messages -------------------------------------------------

DEFAULT_ADDRESS = "127.0.0.1:8081"      # the port of the article that this began with
REALM = "authserver"
SCHEMES = ("digest", "basic")   # Digest first: urllib reads only the first challenge
ALGORITHMS = ("MD5",)       # alone: urllib (until 3.13) fails when SHA-256 stands before it
QOP = ("auth",)             # "auth-int" beside it makes wget fall back to RFC 2069
NONCE_LIFETIME = 300.0      # seconds; with 5 nobody could log in from Safari
NEXT_NONCE = 0.9            # of that life; then answers bring the next nonce along
CLOCK_SKEW = 30.0           # seconds that machines with one nonce secret may differ
NC_WINDOW = 64              # uses of a nonce that may overtake one another: a 64-bit word
NONCE_SLOTS = 1 << 16       # nonces in use whose counts are kept, 24 bytes each
CLIENT_BUCKETS = 1 << 16    # of clients whose failures are counted, 16 bytes each
MAX_ROWS = 64               # processes that count for themselves
MAX_FAILURES = (10, 60.0)   # wrong passwords in so many seconds: more than a person mistypes
MAX_CREDENTIALS = 16384     # characters of an Authorization field: a uri of 8 KiB fits
MAX_HOPS = 10               # proxies behind one another, in X-Forwarded-For
MAX_TEXT = 1024             # bytes of a name or user:password; to normalize 16 KiB takes 100 ms
MAX_CHALLENGE = 255         # characters; wget (1.21 to 1.24) aborts on more, before another
SLOW_HASHES = 2             # verified at a time, so that guessing cannot take every CPU
SLOW_QUEUE = 32             # more that may wait for their turn; the next is told 503
REMEMBERED = 8192           # credentials found right: a token by its hash, a frame as text, < 3 KiB
COUNTERS = ("requests", "challenges", "failures", "stale", "replays", "lockouts", "malformed",
            "busy", "workers")
SHORT = 200             # bytes of a request line that is worth remembering
MAX_LINE = 8192         # bytes of request line (RFC 9112 section 3 asks for 8000); beyond: 414
MAX_HEAD = 32768        # bytes of a request head; browsers stop at about 16 KiB; beyond: 431
MAX_FIELDS = 100        # field lines, as many as http.client reads; beyond: 431
MAX_BODY = 1 << 30      # bytes of request body, for handlers that take uploads; beyond: 413
READ_SIZE = 1 << 14     # bytes per recv(2) in the loop: nearly every head comes in one
IN_MEMORY = 1 << 16     # bytes of body, and of answers, that the loop holds for a connection
SENDFILE_SIZE = 1 << 20     # bytes of a file per sendfile(2): then others get their turn
MAX_MEMOS = 512         # blocks of fields whose meaning is remembered
MAX_MEMO = 4096         # bytes of a head that is worth it
MAX_CONNECTIONS = 20000     # per worker, where the limit of open files allows; about 20 MiB
SPARE_FILES = 64        # descriptors kept back, for logs and for what handlers open
BACKLOG = 1024          # connections that the kernel queues; http.server's 5 loses SYNs
BATCH = 16              # connections accepted, or answers sent, before others get their turn
STREAM_THREADS = 200    # handlers that may wait at a time, in a thread each; beyond: 503
PACE_SECONDS = 30.0     # for each 64 KiB of body or answer: who is slower than 2 KiB/s goes
SLICE = 0.001           # seconds of a turn for who asks ahead; 200 such clients had taken 13 ms
PAUSE_SECONDS = 0.02    # between looks whether we may accept connections (again)
DRAIN_SECONDS = 1       # for which a draining server waits for a connection's next request


class Refusal(ValueError):
    """What a person must read instead of a running server; a second line may say `try:`."""

    status = 2              # of the command: a mistake in what it was given


class BindError(Refusal):
    """An address that cannot be had: no mistake of usage."""

    status = 1


class Malformed(ValueError):
    """Credentials that break the grammar: 400, whoever sent them."""


class NoNonce(Malformed):
    """Digest credentials from a client that has seen no challenge yet (LWP): 401, with one."""


class Busy(Exception):
    """Every thread that could do what takes long has work: 503."""


################################################################ PART I: WHO IS THERE
#
# What HTTP authentication is, and one dictionary that serves both schemes. Nothing in it knows
# of sockets; a server asks it one question: Authenticator.judge().


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
# In upper case as well: some clients write it so.
is_nc = re.compile(r"(?!0{8})[0-9a-fA-F]{8}").fullmatch
# 32 digits of MD5, or 64 of SHA-256 and SHA-512-256; whether the length is right shows later.
is_hash = re.compile(r"[0-9a-fA-F]{32}(?:[0-9a-fA-F]{32})?").fullmatch
# RFC 8187 section 3.2.1: ext-value = charset "'" [ language ] "'" value-chars
match_extended = re.compile(r"(?i)UTF-8'[^']*'([^']*)").fullmatch
# Surrogates stand for bytes that were no text.
has_control = re.compile("[\x00-\x1f\x7f\ud800-\udfff]").search


class DigestCredentials(NamedTuple):
    """What a Digest Authorization field claims; nothing in it is believed yet."""

    usernames: Tuple[str, ...]      # the readings of the name, in the order of their trial
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
    # Match by match, each where the last one ended: to search would try each blank of thousands.
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
    r"""Return the readings of username or username*: as the RFC has it, then as clients do.

    Four of six clients send DOMAIN\user with a bare backslash, and curl has begun to
    percent-encode what is not ASCII. To try them helps no stranger: the proof must fit the
    first entry that is found.

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
    realm, nonce, uri, response, algorithm, qop, nc, cnonce = [params.get(name, "") for name in (
        "realm", "nonce", "uri", "response", "algorithm", "qop", "nc", "cnonce")]
    if not nonce:
        raise NoNonce("nonce")
    if not realm or not uri or not is_hash(response):
        raise Malformed("realm, uri or response")
    # No qop is the form of RFC 2069: well-formed, so no 400; the authenticator refuses it with 401.
    if qop and not is_nc(nc):
        raise Malformed("nc")
    if qop and not cnonce or len(realm) + len(nonce) + len(cnonce) > MAX_TEXT:
        raise Malformed("cnonce, or something is too long")
    # uri stays as it came: curl sends a backslash in it bare, as in its request line.
    return DigestCredentials(
        read_usernames(params), unescape(realm), unescape(nonce), uri, response.lower(),
        # No algorithm means MD5; an unknown one (CANONICAL: section 2) becomes "", which is never
        # offered: 401, not 400.
        CANONICAL.get(algorithm.lower() or "md5", ""), qop, nc, unescape(cnonce))


# -- 2. The digest ------------------------------------------------------------
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


# Without -sess; None: this Python has none.
PLAIN = {"MD5": find_hash("md5"), "SHA-256": find_hash("sha256"),
         "SHA-512-256": find_hash("sha512_256", "sha512-256")}
# H is the same with -sess; only A1 differs (digest_ha1_session).
HASHES = {name + sess: found for name, found in PLAIN.items() if found for sess in ("", "-sess")}
CANONICAL = {(name + sess).lower(): name + sess for name in PLAIN for sess in ("", "-sess")}


def to_hex(algorithm: str, octets: bytes) -> str:
    """Return the algorithm's hash of octets in hexadecimal digits."""
    digits: str = HASHES[algorithm](octets).hexdigest()
    return digits


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
    # surrogatepass: a program may pass a lone surrogate. It is a wrong password then, no error.
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


# -- 3. The dictionary: one for both schemes ----------------------------------
#
# Basic brings a password, Digest a proof made from HA1. A checker that compares passwords
# can never serve Digest: Digest is offered, all looks well, and every log-in fails in
# silence (README's article [4]). But HA1 can be made from the password; so a dictionary of
# HA1s serves both, and holds no password. What it cannot serve (from a htpasswd hash there
# is no way to HA1) is found at start, and not by the user in front of the door.
#
# An HA1 is worth as much as the password, for this realm: who reads it can log in. "Do
# not use it because in-memory passwords can be a security hole", says Twisted of its own
# dictionary; this one is as safe as the permissions of its file. A line with `plain` is no
# worse for this realm. It is for all others in which the same person has the same password:
# so it is for tests, and for programs that write the file themselves.
#
# What the parser (1) would refuse, what no client could send or some would spoil, is refused
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

    @property
    def is_slow(self) -> bool:
        """Whether it takes long to verify a password: libcrypt's hashes are made for that."""
        return self.crypted.startswith("$")


def is_username(text: str) -> bool:
    """Return whether a name is one that clients, log and readers of the file can handle."""
    # Most clients send a backslash bare: before the closing quotation mark it would escape that.
    found = re.fullmatch(r'(?!-$|[# ])[^:"]+(?<![ \\])', text)
    # Percent-encoded, as some clients send it, a name is three times as long: MAX_TEXT.
    return found is not None and text.isprintable() and len(text.encode("utf-8")) < 256


def normal_username(username: str) -> str:
    r"""Return the normal form of a name, or raise Refusal.

    >>> normal_username("Ju\u0308rgen")
    'Jürgen'
    """
    if not is_username(username):
        raise Refusal(f"unable to use user name {username!r}: it is -, empty or longer than 255 "
                      f"bytes, or has # or a blank at its start, \\ or a blank at its end, or a "
                      f"colon, \" or what is invisible or no UTF-8")
    return unicodedata.normalize("NFC", username)


def normal_password(username: str, password: str) -> str:
    """Return the normal form of a password that this user can send under both schemes."""
    password = unicodedata.normalize("NFC", password)
    size = len(f"{username}:{password}".encode("utf-8", "surrogatepass"))
    if not password or has_control(password) or size > MAX_TEXT:
        raise Refusal(f"unable to use this password: empty, control characters in it, no UTF-8, or "
                      f"too long: Basic carries {MAX_TEXT} bytes of name, colon and password")
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
    ha1 = {name: digest_ha1(username, realm, password, name) for name in PLAIN if name in HASHES}
    return Entry(username, line, ha1, "")


def matches(entry: Entry, realm: str, password: str) -> bool:
    """Return whether this is the password of an entry's user; may wait for a slow hash.

    >>> matches(Entry("jim", 1, {}, "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ="), "files", "secret")
    True
    """
    phrase = password.encode("utf-8", "surrogatepass")
    if entry.is_slow:
        # All that begin with the same 72 bytes would be right: $2a$, $2b$, $2y$.
        if entry.crypted.startswith("$2") and len(phrase) > BCRYPT_BYTES:
            return False
        setting, (function, turns) = entry.crypted.encode("ascii"), load_crypt()
        with turns:
            # crypt(3) returns setting and hash in one, and takes such a whole as setting.
            return hmac.compare_digest(function(phrase, setting) or b"", setting)
    if entry.crypted:
        octets = base64.b64decode(entry.crypted.partition("}")[2])      # the hash, then the salt
        found = (SHA1 or hashlib.sha1)(phrase + octets[20:]).digest()
        return hmac.compare_digest(found, octets[:20])
    # The first line: it is the one that Apache's htdigest changes, and no other.
    name, ha1 = next(iter(entry.ha1.items()))
    return hmac.compare_digest(digest_ha1(entry.username, realm, password, name), ha1)


class Passwords:
    """The one knower of passwords, for Basic and for Digest.

    Passwords({"jim": "secret"}, realm="files") makes HA1s at once and forgets the passwords;
    Passwords.read() takes a file. Nothing in it changes afterwards: a reload makes a new
    one, and with the old one goes what it has granted.
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
        self._decoy = max(self.entries.values(), key=lambda entry: entry.is_slow,
                          default=Entry("", 0, {"SHA-256": ""}, ""))
        self.granted: Dict[Any, Any] = {}       # what authenticators have found right: recall()

    @classmethod
    def read(cls, path: str, realm: str = REALM) -> "Passwords":
        """Read the password file at path ("-" = standard input), or name all its mistakes."""
        # First: a bad realm is a mistake of the options, and no change to the file would cure it.
        check_realm(realm)
        entries, mistakes = parse_passwords(
            read_secrets("passwords", path, passwd_command(path, [FIRST_USER], realm)), realm)
        if mistakes:
            curable = [name for _, name in mistakes if name]
            raise refuse_file(f"use passwords {path}", [text for text, _ in mistakes],
                              passwd_command(path, curable, realm))
        return cls(None, realm, entries, path)

    @property
    def warnings(self) -> List[str]:
        """What a person should know of the hashes in it."""
        kinds = sorted({entry.kind if entry.crypted else "HA1" for entry in self.entries.values()})
        mixed = [f"{' and '.join(kinds)} in one file: the time of an answer tells which a user has"]
        return (mixed if len(kinds) > 1 else []) + [
            f"{kind} in {self.source}: bcrypt knows {BCRYPT_BYTES} bytes of a password, longer "
            f"ones are refused" for kind in kinds if kind.startswith("$2")]

    def fingerprint(self) -> bytes:
        """Return 32 bytes that tell this dictionary from all others."""
        known = [(entry.username, sorted(entry.ha1.items()), entry.crypted)
                 for entry in self.entries.values()]
        return hashlib.sha256(repr((self.realm, sorted(known))).encode("utf-8")).digest()

    def check_servable(self, schemes: Sequence[str], algorithms: Sequence[str]) -> None:
        """Refuse what some user could never answer, however right the password.

        Or Digest would be offered, and fail in silence: see the beginning of this section.
        """
        gaps = [(entry, algorithm) for entry in self.entries.values() if "digest" in schemes
                for algorithm in algorithms if hash_name(algorithm) not in entry.ha1]
        texts = [f"line {entry.line}: user {entry.username!r} has only {entry.kind}: cannot "
                 f"answer Digest {algorithm}" for entry, algorithm in gaps]
        if texts:
            cure = passwd_command(self.source, [gaps[0][0].username], self.realm)
            raise refuse_file(f"serve every user of {self.source}", texts,
                              (cure + "   # or: " if cure else "") + "--schemes basic")

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
        return self.entries.get(username, self._decoy).is_slow

    def verify(self, username: str, password: str) -> bool:
        """Do what check_password() does, for normal forms."""
        correct = matches(self.entries.get(username, self._decoy), self.realm, password)
        # Last, and after all the work: what fits the decoy is no password of a stranger.
        return correct and username in self.entries


# -- 4. Nonces, and what the workers share ------------------------------------
#
# A nonce says when it was made and carries our signature: a 401 costs no memory, nor do
# a million of them. Memory is spent only once a right response has used a nonce: the
# table then knows which counts (nc) are used up. Without it, whoever records a request
# could send it again for as long as the nonce lives.
#
# The table is memory that several processes map. Memory alone has no atomic
# test-and-set: of 20,000 races forced between two processes both won 19,985. So a slot
# is read and written under fcntl.lockf on a byte of its own (3 us), which the kernel
# gives back when a worker dies, and under a thread lock, because POSIX record locks do
# not keep the threads of one process apart. They vanish when the process closes ANY
# descriptor of the file; so one object holds the only one.
#
# Nothing here grows. A newer nonce takes over the slot of an older one, and no slot ever
# accepts an older nonce than the newest it has held: what was forgotten is never good
# again. Its owner is told `stale` and comes back with a new nonce, in another slot.
#
# That rule needs a clock that never goes back, so time here is the monotonic clock plus an
# offset, both the same for whoever maps the table. Where machines share a nonce secret they
# must agree on the time of day as well: there a clock that was set begins a new ERA, with
# all slots empty, and a new issuer, so that no nonce of the era before is good in it.
#
# Who maps a table: the workers of a daemon, forked after it was made; its heir (a restart
# hands the descriptor over, so that no client notices); and, by a name that only its
# user can reach, the processes of a WSGI server, which know nothing of one another (16).

# 27 bytes are 36 characters of base64 and no padding: a nonce has one spelling.
is_nonce = re.compile(r"[A-Za-z0-9_-]{36}").fullmatch


def find_mac() -> Callable[[bytes, bytes], bytes]:
    """Return sign(key, data): 12 bytes that only a holder of the key can make."""
    try:
        hashlib.blake2s(b"", key=b"key", digest_size=12)
    except (AttributeError, TypeError, ValueError):     # FIPS mode knows no BLAKE2, or no key to it
        return lambda key, data: hmac.new(key, data, "sha256").digest()[:12]
    # BLAKE2 takes a key, so this is a MAC by itself: half the time of HMAC with SHA-256.
    return lambda key, data: hashlib.blake2s(data, key=key, digest_size=12).digest()


sign = find_mac()


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


def nonce_body(nonce: str, key: bytes) -> bytes:
    r"""Return the first 15 bytes of a nonce that we signed, else b"".

    >>> nonce = make_nonce(b"key", 1.0, b"random" + b"boot")
    >>> nonce_body(nonce, b"key"), nonce_body(nonce, b"another key")
    (b'\x00\x00\x00\x00drandomboot', b'')
    """
    # What has not the form of a nonce takes the same way: no signature equals b"".
    signed = base64.urlsafe_b64decode(nonce) if is_nonce(nonce) else b""
    return signed[:15] if hmac.compare_digest(sign(key, signed[:15]), signed[15:]) else b""


def nonce_time(body: bytes) -> float:
    """Return when a nonce was made, in seconds since the epoch."""
    return int.from_bytes(body[:5], "big") / 100


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
        return nonce_count, seen & ((1 << NC_WINDOW) - 1)
    if -ahead >= NC_WINDOW or seen >> -ahead & 1:
        return None
    return highest, seen | 1 << -ahead


# The table, from its first byte: what it is, its secrets, its clock; a row of counters for each
# worker; a slot for each nonce in use (time and random bytes, highest nc, its window); a
# bucket for some of the clients (failures, since when).
HEADER = struct.Struct("<8s32s16s32sdd")    # layout, nonce key, salt, issuers, offset, started
LAYOUT = b"authsv02"
ISSUERS = 56                                # where they begin in it
ROW = struct.Struct("<%dQ" % len(COUNTERS))
SLOT = struct.Struct("<11sxIQ")
BUCKET = struct.Struct("<QQ")
ROWS = 128
SLOTS = ROWS + MAX_ROWS * ROW.size
BUCKETS = SLOTS + NONCE_SLOTS * SLOT.size
TABLE_SIZE = BUCKETS + CLIENT_BUCKETS * BUCKET.size


F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2     # of fcntl(2), which Python names since 3.8


def open_memory(size: int) -> int:
    """Return a descriptor of that much memory; on Linux nobody can make it smaller.

    An heir maps it: a page that is cut off under a process kills it (SIGBUS).
    See: memfd_create(2), F_SEAL_SHRINK.
    """
    try:
        fd = os.memfd_create("authserver", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError):       # macOS; Python before 3.8; a kernel without it
        with tempfile.TemporaryFile(prefix="authserver-") as stream:
            fd = os.dup(stream.fileno())
        os.write(fd, bytes(size))           # written, so that a full disk is found now
        return fd
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return fd


@functools.lru_cache(maxsize=1024)
def find_buckets(salt: bytes, client: str) -> Tuple[int, int]:
    """Return where a client's two buckets are; nobody without the salt can choose them."""
    signature = sign(salt, client.encode("utf-8", "replace"))
    first, second = (int.from_bytes(signature[i:i + 4], "big") for i in (0, 4))
    # The second lies among the others: one client never has the same bucket twice.
    second = first + 1 + second % (CLIENT_BUCKETS - 1)
    return (BUCKETS + BUCKET.size * (first % CLIENT_BUCKETS),
            BUCKETS + BUCKET.size * (second % CLIENT_BUCKETS))


class Exclusively:
    """Keep all other threads and processes from what lies at an offset.

    A class: contextlib's generator would take half as long again as what it guards.
    """

    __slots__ = ("mutex", "fd", "offset")

    def __init__(self, mutex: Any, fd: int, offset: int) -> None:
        self.mutex, self.fd, self.offset = mutex, fd, offset

    def __enter__(self) -> None:
        self.mutex.acquire()
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX, 1, self.offset)
        except BaseException:       # no locks left, or a signal's SystemExit
            self.mutex.release()
            raise

    def __exit__(self, *error: object) -> None:
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, self.offset)
        self.mutex.release()


class SharedTable:
    """What all workers must agree on: the nonce key, uses of nonces, failures, the clock.

    For the authenticator: accept, count_failure, lock_left, now, add; key, issuers.
    For the server: set_clock, offset, add, statistics; fd is what an heir is given.
    """

    fd = -1

    def __init__(self, fd: int = -1) -> None:
        self.fd = open_memory(TABLE_SIZE) if fd < 0 else fd
        self._memory = mmap.mmap(self.fd, TABLE_SIZE)
        self._mutex = threading.RLock()
        self._row, self._owner = -1, 0          # of our counters; the pid that claimed it
        self.alone = False                      # True: no other process has this table
        with self._exclusively(0):
            if self._memory[:8] != LAYOUT:
                offset = time.time() - time.monotonic()
                HEADER.pack_into(self._memory, 0, LAYOUT, os.urandom(32), os.urandom(16),
                                 os.urandom(4), offset, time.time())
        _, self.key, self._salt, *_ = HEADER.unpack_from(self._memory)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def _exclusively(self, offset: int) -> Any:
        return self._mutex if self.alone else Exclusively(self._mutex, self.fd, offset)

    # -- the clock

    @property
    def offset(self) -> float:
        """What to add to the monotonic clock."""
        return float(HEADER.unpack_from(self._memory)[4])

    def now(self) -> float:
        """Return the time: seconds since the epoch, which never go back within an era."""
        return time.monotonic() + self.offset

    @property
    def issuers(self) -> bytes:
        """Who we are, and were in the seven eras before: 4 bytes each."""
        return self._memory[ISSUERS:ISSUERS + 32]

    @property
    def started(self) -> float:
        """Since when this table watches."""
        return float(HEADER.unpack_from(self._memory)[5])

    def set_clock(self, wall: float) -> None:
        """Begin a new era if the time of day has jumped: only machines that share need this."""
        with self._exclusively(0):
            layout, key, salt, issuers, offset, _ = HEADER.unpack_from(self._memory)
            if abs(wall - time.monotonic() - offset) > CLOCK_SKEW:
                HEADER.pack_into(self._memory, 0, layout, key, salt, os.urandom(4) + issuers[:28],
                                 wall - time.monotonic(), wall)
                self._memory[SLOTS:BUCKETS] = bytes(BUCKETS - SLOTS)

    # -- nonces

    def accept(self, body: bytes, nonce_count: int) -> str:
        """Use up this count of a nonce and return "", or return why not."""
        if body[11:] != self._memory[ISSUERS:ISSUERS + 4] and self._is_foreign(body):
            return "stale"
        # The last two of the six random bytes: they are random, so no hash has to spread them.
        offset = SLOTS + SLOT.size * ((body[9] << 8 | body[10]) % NONCE_SLOTS)
        with self._exclusively(offset):
            identity, highest, seen = SLOT.unpack_from(self._memory, offset)
            if identity != body[:11]:
                # <=, not <: two nonces of one hundredth of a second could take the slot from each
                # other in turn, and with it their counts: the same nc would pass for ever.
                if body[:5] <= identity[:5]:
                    return "stale"
                highest = seen = 0
            window = advance_window(highest, seen, nonce_count)
            if window is None:
                return "replay"
            SLOT.pack_into(self._memory, offset, body[:11], *window)
            return ""

    def _is_foreign(self, body: bytes) -> bool:
        """Return whether nobody here can know that this nonce has not been used.

        Another issuer with our key is ourselves in a former era, or another machine, whose
        nonces count from when we began to watch. Where its clock is ahead of ours, one that was
        used before that can pass once more: README says so.
        """
        issuers = self.issuers
        former = [issuers[i:i + 4] for i in range(4, 32, 4)]
        return body[11:] in former or nonce_time(body) < self.started

    # -- clients who guess: each counts in two buckets, and is locked out when both are full. Two
    # attackers of one bucket cannot reset each other, and an innocent would have to share both.

    def count_failure(self, client: str, now: float, limit: int, seconds: float) -> bool:
        """Count a wrong password of client; return whether that locks it out."""
        with self._exclusively(BUCKETS):
            for offset in find_buckets(self._salt, client):
                failures, since = BUCKET.unpack_from(self._memory, offset)
                # Of two who count at a time one may have looked at the clock before the other.
                if abs(now - since / 100) >= seconds:
                    failures, since = 0, int(now * 100)
                # The last one starts the lock-out; those that come later do not prolong it.
                since = int(now * 100) if failures + 1 == limit else since
                BUCKET.pack_into(self._memory, offset, failures + 1, since)
        return self.lock_left(client, now, limit, seconds) > 0

    def lock_left(self, client: str, now: float, limit: int, seconds: float) -> float:
        """Return the seconds for which client is still locked out, or 0."""
        left = seconds
        for offset in find_buckets(self._salt, client):
            failures, since = BUCKET.unpack_from(self._memory, offset)
            if failures < limit or since / 100 >= now + seconds:
                return 0.0
            left = min(left, since / 100 + seconds - now)
        return max(0.0, left)

    # -- counters: a row for each worker; those beyond MAX_ROWS share the last one

    def _own_row(self) -> int:
        """Return the offset of our row; it is ours for as long as we hold the lock on it."""
        if self._owner != os.getpid():
            self._owner = os.getpid()
            for number in range(MAX_ROWS):
                self._row = ROWS + ROW.size * number
                with contextlib.suppress(OSError):      # another process has it
                    fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._row)
                    break
        return self._row

    def add(self, counter: str, amount: int = 1) -> None:
        """Add to one of COUNTERS."""
        with self._mutex:
            row = self._own_row()
            values = list(ROW.unpack_from(self._memory, row))
            values[COUNTERS.index(counter)] += amount
            ROW.pack_into(self._memory, row, *values)

    def statistics(self) -> Dict[str, int]:
        """Return all COUNTERS with their values, of all who ever counted."""
        rows = ROW.iter_unpack(self._memory[ROWS:SLOTS])
        return dict(zip(COUNTERS, map(sum, zip(*rows))))


# -- 5. The authenticator -----------------------------------------------------
#
# The order of checks is a promise. Who brings no credentials gets a challenge. Then the
# lock-out (429). Then the grammar: what is malformed gets 400, whoever it names. Then
# realm, algorithm and qop, and the uri: it must be the very target of the request line
# (RFC 7616 section 3.4.6); four servers that we tried do not compare it, and there a
# header recorded on /x opens /secret. Then the response, made with the user's HA1, or
# for a stranger with one that nobody has. Only for a right response the nonce and its
# count: who has no password can use up nothing, and learns nothing.
#
# The checks are a generator, for two of them may have to wait: it yields a function where a
# slow hash has to be made (and wants its result sent back), and passes on what reading a body
# yields (qop=auth-int). Who drives it decides how to wait: the loop lends the function to a
# thread (9), a server with a thread per connection just calls it: at_once().
#
# Who was found right comes again, with the same token (Basic), or the same credentials but for
# the four holes (Digest). So what was found is granted to the next request as well: a token, by
# a hash, for no password stays in memory; for a frame, whose HA1 and which nonce it is about,
# and then only uri, proof and count are looked at. It is a short cut for who is right, and no
# second judge: recall() says yes, or nothing. What is wrong is never remembered, so
# nobody without a password makes the server remember anything.

Fields = Sequence[Tuple[str, str]]
# It yields what has to be called, is sent the result, and ends with a Verdict.
Asking = Generator[Any, Any, "Verdict"]


class Verdict(NamedTuple):
    """What the authenticator says about a request."""

    status: int                     # 200: let in; 0: not asked yet; else what it is refused with
    username: Optional[str] = None                  # who it is; with 200 only
    log_user: Optional[str] = None                  # that, or who it wrongly claimed to be
    reason: str = ""                                # for the error log
    fields: Fields = ()                             # header fields of the answer
    scheme: str = ""                                # "Basic", "Digest" or ""


class Grant(NamedTuple):
    """What a right Digest response was about; of the next one in its frame it is known."""

    username: str
    ha1: str
    nonce: str
    algorithm: str
    body: bytes             # of the nonce, if it is ours; else b""
    made: float             # when, in seconds since the epoch; else 0


@functools.lru_cache(maxsize=4096)
def cached_ha2(method: str, uri: str, algorithm: str) -> Tuple[str, str]:
    """Return HA2 of a request, and of its answer; pages are asked for again and again."""
    # An answer has no method: A2 = ":" request-uri (RFC 7616 section 3.5).
    return digest_ha2(method, uri, algorithm), digest_ha2("", uri, algorithm)


ORIGIN = re.compile("(?i)^https?://[^/?#]*")


def is_same_target(uri: str, target: str) -> bool:
    """Return whether the uri of a proof is the target of the request line, as sent.

    As sent: http.server makes /x of //x, and the proof is about what was asked for. An
    absolute form stands for its path: of a proxy's clients some prove the one and some the
    other (urllib), and it asks us for either.

    >>> is_same_target("/x?a=1", "/x"), is_same_target("//h/x", "http://h/x")
    (False, False)
    >>> is_same_target("/x", "http://host/x"), is_same_target("http://host/x", "/x")
    (True, True)

    See: RFC 7616 section 3.4.6.
    """
    path = ORIGIN.sub("", uri)
    return uri == target or path[:1] == "/" and path == ORIGIN.sub("", target)


def no_body() -> Generator[Any, Any, bytes]:
    """Return the body of a request that has none."""
    return b""
    yield       # which makes this a generator, as whoever reads a body is


class Attempt:
    """What the authenticator may know of a request; a server's own kind has more to it.

    method; target, as sent, before any clean-up; authorization, the values of all such fields;
    client, whom a lock-out would hit, or None; time, by the authenticator's clock; schemes,
    those offered where it came in.
    """

    read_body: Callable[[], Generator[Any, Any, bytes]] = staticmethod(no_body)
    same_target: Callable[[str, str], bool] = staticmethod(is_same_target)

    def __init__(self, method: str, target: str, authorization: Sequence[str],
                 client: Optional[str], time: float, schemes: Sequence[str]) -> None:
        self.method, self.target, self.authorization = method, target, authorization
        self.client, self.time, self.schemes = client, time, schemes


def call_for(read: Callable[[], bytes]) -> Generator[Any, Any, bytes]:
    """Read a body as the authenticator wants it read: it asks, and we wait."""
    content: bytes = (yield read)
    return content


def at_once(asking: Asking) -> Verdict:
    """Return what a generator of checks comes to; here and now, however long it takes."""
    result = None
    while True:
        try:
            work = asking.send(result)
        except StopIteration as stop:
            verdict: Verdict = stop.value
            return verdict
        result = work()


# The short cut for Digest: what a client sends with each request differs in four HOLES: uri,
# cnonce, nc and response, in this spelling with most of them. What lies between is the FRAME.
# What fits in a hole is visible ASCII but for " , and \, so it ends no quotation, no parameter
# and no line.
# Split, it is piece, hole, filling, piece, hole, filling ... piece: [::3] are the pieces, which
# are the frame, and [1::3] the holes between them.
HOLES = (' uri="', ' cnonce="', ' nc=', ' response="')
split_frame = re.compile(rf'({"|".join(HOLES)})([!#-+\--\[\]-~]+)').split


def is_frame(parts: List[str], credentials: DigestCredentials) -> bool:
    r"""Return whether these holes are where the strict parser finds uri, cnonce, nc and response.

    A quotation may have in it what looks like a hole. So they are filled anew, and parsed.

    >>> plain = ('Digest username="jim", realm="r", nonce="n", uri="/", cnonce="c", nc=00000001, '
    ...          'qop=auth, response="' + "0" * 32 + '"')
    >>> sly = plain.replace("jim", "a nc=00000001 b").replace(", nc", ",nc")
    >>> for value in (plain, sly):
    ...     is_frame(split_frame(value), parse_digest(parse_authorization(value)[2]))
    True
    False
    """
    if sorted(parts[1::3]) != sorted(HOLES):
        return False
    probes = dict(zip(HOLES, ("/", "c", "12345678", "0" * 64)))
    filled = [text for piece, hole in zip(parts[::3], parts[1::3])
              for text in (piece, hole, probes[hole])]
    uri, cnonce, nc, response = probes.values()
    expected = credentials._replace(uri=uri, cnonce=cnonce, nc=nc, response=response)
    try:
        return parse_digest(parse_authorization("".join(filled) + parts[-1])[2]) == expected
    except Malformed:       # what was filled is no hole
        return False


def challenges(realm: str, nonce: str, schemes: Sequence[str] = SCHEMES,
               algorithms: Sequence[str] = ALGORITHMS, qop: Sequence[str] = QOP,
               stale: bool = False) -> List[str]:
    """Return the values of the WWW-Authenticate fields, one per scheme and algorithm.

    >>> for challenge in challenges("files", "abc", stale=True): print(challenge)
    Digest realm="files", nonce="abc", qop="auth", algorithm=MD5, charset=UTF-8, stale=true
    Basic realm="files", charset="UTF-8"

    See: RFC 7616 section 3.3 (what is quoted and what is not), section 3.7 (several).
    """
    end = ", stale=true" if stale else ""
    lines = {"basic": [f'Basic realm="{realm}", charset="UTF-8"'],
             "digest": [f'Digest realm="{realm}", nonce="{nonce}", qop="{",".join(qop)}", '
                        f'algorithm={name}, charset=UTF-8{end}' for name in algorithms]}
    return [line for scheme in schemes for line in lines[scheme]]


def check_offer(realm: str, schemes: Sequence[str], algorithms: Sequence[str],
                qop: Sequence[str]) -> None:
    """Refuse to offer what we, this Python or the clients cannot do."""
    for what, given, known in (("scheme", schemes, SCHEMES), ("qop", qop, ("auth", "auth-int")),
                               ("algorithm", algorithms, tuple(CANONICAL.values()))):
        if not given or len(set(given)) < len(given) or not set(given) <= set(known):
            raise Refusal(f"unable to offer {what} {','.join(given)}: "
                          f"one or more of {', '.join(known)}, each once")
    for name in set(algorithms) - set(HASHES):
        raise Refusal(f"unable to offer algorithm {name}: the hashlib of this Python lacks it")
    longest = max(map(len, challenges(realm, "n" * 36, schemes, algorithms, qop, True)))
    if longest > MAX_CHALLENGE:
        raise Refusal(f"unable to use realm {realm!r}: {longest - MAX_CHALLENGE} characters too "
                      f"long, wget crashes on challenges of more than {MAX_CHALLENGE}")


def offer(chosen: Sequence[str], is_safe: bool) -> Sequence[str]:
    """Return the schemes to offer: no Basic where somebody could listen, unless it was chosen."""
    return chosen or (SCHEMES if is_safe else SCHEMES[:1])


class Authenticator:
    """Say who sends a request; the conductor of everything above.

    Methods for the server: recall, and then examine, or judge, which is both; clock, offered.
    Instance variables: passwords, which a reload sets; table; schemes, and is_explicit: somebody
    has said which.
    """

    def __init__(self, passwords: Passwords, schemes: Optional[Sequence[str]] = None,
                 algorithms: Sequence[str] = ALGORITHMS, qop: Sequence[str] = QOP,
                 nonce_lifetime: float = NONCE_LIFETIME, nonce_secret: bytes = b"",
                 table: Optional[SharedTable] = None,
                 max_failures: Tuple[int, float] = MAX_FAILURES) -> None:
        self.is_explicit, schemes = schemes is not None, SCHEMES if schemes is None else schemes
        check_offer(passwords.realm, schemes, algorithms, qop)
        passwords.check_servable(schemes, algorithms)
        self.passwords, self.max_failures = passwords, max_failures
        self.schemes, self.algorithms, self.qop = tuple(schemes), tuple(algorithms), tuple(qop)
        self.nonce_lifetime, self.table = nonce_lifetime, table or SharedTable()
        self.shares_nonces = bool(nonce_secret)
        # The key of BLAKE2 is at most 32 bytes, a secret file may be longer. With the realm in
        # it a nonce of one realm is unknown in another, though both share the secret.
        self._key = hmac.new(nonce_secret or self.table.key, passwords.realm.encode("ascii"),
                             "sha256").digest()
        self._nobody = os.urandom(16).hex()         # the HA1 of strangers, which nobody has
        self._memo_key = os.urandom(32)

    def clock(self) -> float:
        """Return the time that nonces and lock-outs go by."""
        return self.table.now()

    def offered(self, is_safe: bool) -> Sequence[str]:
        """Return the schemes to offer where nobody, or somebody, could listen."""
        return offer(self.schemes if self.is_explicit else (), is_safe)

    def judge(self, attempt: Attempt) -> Asking:
        """Return the Verdict on an attempt; yields what has to be waited for."""
        return self.recall(attempt) or (yield from self.examine(attempt))

    def examine(self, attempt: Attempt) -> Asking:
        """Do what judge() does, for who has not been found right before."""
        # Before the lock-out: who brings no password guesses nothing.
        if not attempt.authorization:
            self.table.add("challenges")
            return self._refuse(attempt, "no credentials")
        locked = self._locked(attempt)
        if locked:
            return locked
        try:
            if len(attempt.authorization) > 1:
                raise Malformed("two Authorization fields")
            scheme, token, params = parse_authorization(attempt.authorization[0])
            credentials = parse_digest(params) if scheme == "digest" else None
            if scheme not in attempt.schemes:
                return self._refuse(attempt, f"{scheme.capitalize()} is not offered here")
            if credentials is None:
                return (yield from self._judge_basic(attempt, *decode_basic(token)))
            # Only where auth-int is offered. There a stranger's body is read as well, 64 KiB at
            # most: without it nobody can tell that he is one.
            is_signed = credentials.qop == "auth-int" and "auth-int" in self.qop
            body = (yield from attempt.read_body()) if is_signed else None
            return self._judge_digest(attempt, credentials, body)
        except NoNonce:
            return self._refuse(attempt, "no nonce yet")
        except Malformed as error:
            self.table.add("malformed")
            return Verdict(400, reason=f"malformed: {error}")

    def recall(self, attempt: Attempt) -> Optional[Verdict]:
        """Return the verdict on credentials like some that were found right; else None.

        What was granted is kept in the dictionary: a reload makes a new one, which knows nobody.
        The lock-out is asked first, or a right guess would show in spite of it.
        """
        said = attempt.authorization[0] if len(attempt.authorization) == 1 else ""
        scheme = "basic" if said[:1] in ("B", "b") else "digest"
        if scheme not in attempt.schemes or self.lock_left_of(attempt.client, attempt.time):
            return None
        if scheme == "basic":
            return self.passwords.granted.get(self._memo_of(said))
        if len(said) > MAX_TEXT:        # a longer one was never remembered
            return None
        parts = split_frame(said)
        found = self.passwords.granted.get(self._frame_of(parts))
        if found is None:
            return None
        grant, pick = found
        uri, cnonce, nc, response = pick(parts)
        if uri != attempt.target or not is_nc(nc):
            return None
        ha2, ha2_of_answer = cached_ha2(attempt.method, uri, grant.algorithm)
        expected = digest_response(grant.ha1, grant.nonce, nc, cnonce, "auth", ha2, grant.algorithm)
        if not hmac.compare_digest(expected, response):
            return None
        return self._spend_nonce(attempt, grant, nc, cnonce, ha2_of_answer)

    def _locked(self, attempt: Attempt) -> Optional[Verdict]:
        """Return the verdict on who has guessed too often, or None."""
        wait = self.lock_left_of(attempt.client, attempt.time)
        return Verdict(429, reason="locked out", fields=(
            ("Retry-After", str(wait)),)) if wait else None

    # Two authenticators may share a dictionary, and one may offer less than the other, or know
    # other nonces. So a key of ours is in both: neither believes what the other has found.

    def _memo_of(self, authorization: str) -> bytes:
        return hashlib.sha256(self._memo_key + authorization.encode("latin-1")).digest()

    def _frame_of(self, parts: List[str]) -> Tuple[Any, ...]:
        return (self._memo_key, *parts[::3], *parts[1::3])

    def _judge_basic(self, attempt: Attempt, username: str, password: str) -> Asking:
        """Look at Basic credentials."""
        passwords = None
        # Again, if a reload came while a slow hash was made: who is no longer in it is out.
        while passwords is not self.passwords:
            passwords = self.passwords
            verify = functools.partial(self._verify, passwords, attempt, username, password)
            found = (yield verify) if passwords.is_slow(username) else verify()
        assert passwords is not None
        known = username in passwords.entries
        # Again: of guesses whose hashes were made together the eleventh must learn nothing.
        return self._locked(attempt) or found or self._fail(
            attempt, username, "bad password" if known else "unknown user")

    def _verify(self, passwords: Passwords, attempt: Attempt, username: str,
                password: str) -> Optional[Verdict]:
        """Return the verdict on a right password, and note it for whoever waits for a thread.

        A browser opens eight connections at once, all with the same credentials: one hash.
        """
        memo = self._memo_of(attempt.authorization[0])
        if memo not in passwords.granted and not passwords.verify(username, password):
            return None
        verdict = Verdict(200, username, username, "", (), "Basic")
        self._remember(passwords, memo, verdict)
        return verdict

    def _remember(self, passwords: Passwords, credentials: Any, found: Any) -> None:
        """Keep what was found right, in the dictionary in which it was found."""
        if len(passwords.granted) >= REMEMBERED:
            passwords.granted.clear()       # then all are judged once more, that is all
        passwords.granted[credentials] = found

    def _remember_frame(self, passwords: Passwords, attempt: Attempt,
                        credentials: DigestCredentials, grant: Grant) -> None:
        """Remember right credentials by their frame, and where its holes are."""
        parts = split_frame(attempt.authorization[0])
        if is_frame(parts, credentials):
            pick = operator.itemgetter(*[3 * parts[1::3].index(hole) + 2 for hole in HOLES])
            self._remember(passwords, self._frame_of(parts), (grant, pick))

    def _judge_digest(self, attempt: Attempt, credentials: DigestCredentials,
                      body: Optional[bytes]) -> Verdict:
        """Look at Digest credentials: whom they concern, the uri, the response, the nonce.

        RFC 2617 section 3.2.1 has the response before the nonce: "should only set stale to
        TRUE if it receives a request for which the nonce is invalid but with a valid digest
        for that nonce". Without qop (RFC 2069) there is no nc, and a response could be
        replayed at will.
        """
        algorithm, uri, passwords = credentials.algorithm, credentials.uri, self.passwords
        if credentials.realm != passwords.realm:
            return self._refuse(attempt, "another realm")
        if algorithm not in self.algorithms or credentials.qop not in self.qop:
            return self._refuse(attempt, "algorithm or qop not offered")
        if uri != attempt.target and not attempt.same_target(uri, attempt.target):
            return Verdict(400, reason="uri mismatch")
        entry = passwords.find(credentials.usernames)
        # A stranger's response takes the same way, and fails by an HA1 that nobody has.
        ha1 = (entry.ha1.get(hash_name(algorithm)) if entry else None) or self._nobody
        if algorithm.endswith("-sess"):
            ha1 = digest_ha1_session(ha1, credentials.nonce, credentials.cnonce, algorithm)
        response = digest_response(
            ha1, credentials.nonce, credentials.nc, credentials.cnonce, credentials.qop,
            digest_ha2(attempt.method, uri, algorithm, body), algorithm)
        if not hmac.compare_digest(response, credentials.response) or entry is None:
            reason = "bad response" if entry else "unknown user"
            claimed = entry.username if entry else credentials.usernames[0]
            return self._fail(attempt, claimed, reason)
        nonce = nonce_body(credentials.nonce, self._key)
        grant = Grant(entry.username, ha1, credentials.nonce, algorithm, nonce, nonce_time(nonce))
        # With auth-int a body belongs to the proof, and with -sess its cnonce to HA1.
        if body is None and algorithm in PLAIN and len(attempt.authorization[0]) <= MAX_TEXT:
            self._remember_frame(passwords, attempt, credentials, grant)
        return self._spend_nonce(attempt, grant, credentials.nc, credentials.cnonce,
                                 digest_ha2("", uri, algorithm))

    def _spend_nonce(self, attempt: Attempt, grant: Grant, nc: str, cnonce: str,
                     ha2: str) -> Verdict:
        """Let a right response pass once, while its nonce lives; else ask for a new one."""
        age = attempt.time - grant.made
        is_alive = -CLOCK_SKEW <= age < self.nonce_lifetime
        fault = self.table.accept(grant.body, int(nc, 16)) if is_alive else "stale"
        if fault:
            self.table.add("replays" if fault == "replay" else "stale")
            return self._refuse(attempt, fault, stale=True)
        # We know HA1 too: RFC 7616 section 3.5. Its qop should be that of the request, and is auth
        # in each case: our own proof under auth-int would need the body of an answer that is not
        # made yet.
        proof = digest_response(grant.ha1, grant.nonce, nc, cnonce, "auth", ha2, grant.algorithm)
        if '"' in cnonce or "\\" in cnonce:
            cnonce = re.sub(r'(["\\])', r"\\\1", cnonce)
        info = f'rspauth="{proof}", qop=auth, nc={nc}, cnonce="{cnonce}"'
        if age >= self.nonce_lifetime * NEXT_NONCE:
            info += f', nextnonce="{self._make_nonce(attempt.time)}"'
        return Verdict(200, grant.username, grant.username, "",
                       (("Authentication-Info", info),), "Digest")

    def _make_nonce(self, now: float) -> str:
        return make_nonce(self._key, now, os.urandom(6) + self.table.issuers[:4])

    def challenge(self, now: float, schemes: Optional[Sequence[str]] = None,
                  stale: bool = False) -> Fields:
        """Return the WWW-Authenticate fields of a 401."""
        lines = challenges(self.passwords.realm, self._make_nonce(now), schemes or self.schemes,
                           self.algorithms, self.qop, stale)
        return tuple(("WWW-Authenticate", line) for line in lines)

    def _refuse(self, attempt: Attempt, reason: str, log_user: Optional[str] = None,
                stale: bool = False) -> Verdict:
        """Say 401: to the client the same for every reason but stale."""
        fields = self.challenge(attempt.time, attempt.schemes, stale)
        return Verdict(401, None, log_user, reason, fields)

    def _fail(self, attempt: Attempt, username: str, reason: str) -> Verdict:
        """Say 401 to wrong credentials, and count them."""
        self.table.add("failures")
        limit, seconds = self.max_failures
        if limit and attempt.client is not None and self.table.count_failure(
                attempt.client, attempt.time, limit, seconds):
            self.table.add("lockouts")
        return self._refuse(attempt, reason, username)

    def lock_left_of(self, client: Optional[str], now: float) -> int:
        """Return the seconds for which client is locked out, or 0."""
        limit, seconds = self.max_failures
        if not limit or client is None:
            return 0
        return math.ceil(self.table.lock_left(client, now, limit, seconds))


# -- 6. Who is asking ---------------------------------------------------------
#
# A lock-out needs to know whom it hits. Behind a proxy all clients have the proxy's address.
# X-Forwarded-For has theirs, but a client can write that field, too: so it is read from the
# right, and only as far as those who wrote it are trusted.

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


# Where the other side may well be a proxy, which speaks for one client or for everybody.
INSIDE = [ipaddress.ip_network(text) for text in (
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7", "fe80::/10")]


class TrustedProxies:
    """Whose X-Forwarded-For is believed: networks, and `unix:` for unix sockets.

    None: nobody has said. Then nobody is believed, and nobody INSIDE is ever locked out, or ten
    wrong passwords that came through a proxy would keep out all who come through it.
    """

    def __init__(self, options: Optional[Sequence[str]] = ()) -> None:
        self._doubtful = INSIDE if options is None else []
        options = options or ()
        self._unix = "unix:" in options
        self._networks: List[Union[ipaddress.IPv4Network, ipaddress.IPv6Network]] = []
        for option in [text for text in options if text != "unix:"]:
            try:
                self._networks.append(ipaddress.ip_network(option, strict=False))
            except ValueError:
                raise Refusal(f"unable to trust proxy {option}: expected a network or unix:")
        # A client's address is classified once per connection, and mostly it has come before.
        self.find_client = functools.lru_cache(maxsize=1024)(self._find_client)

    def trusts(self, address: Optional[Address]) -> bool:
        """Return whether to believe what a peer says; a unix socket's has no address."""
        return self._unix if address is None else any(address in net for net in self._networks)

    def _find_client(self, peer: str, forwarded: str = "") -> Tuple[str, Optional[str]]:
        """Return the address for the log, and whom a lock-out may hit, or None.

        A trusted peer's X-Forwarded-For is read from the right, past trusted hops: what
        stands left of them was written by the client. On loopback, and behind a proxy that
        says nothing, all clients have one address: a lock-out would hit them all. An IPv6
        client can choose among the 2**64 addresses of its network, so that is what counts.

        >>> proxies = TrustedProxies(["10.0.0.0/8"])
        >>> proxies.find_client("10.0.0.1", "127.0.0.1, 192.0.2.7,10.9.9.9")
        ('192.0.2.7', '192.0.2.7')
        >>> proxies.find_client("9.9.9.9", "1.2.3.4")
        ('9.9.9.9', '9.9.9.9')
        """
        address = parse_address(peer)
        hops = forwarded.rsplit(",", MAX_HOPS)[-MAX_HOPS:]      # what is left of them is not read
        while self.trusts(address) and hops:
            hop = parse_address(hops.pop())
            if hop is None:
                break
            address = hop
        shown = peer if address is None else str(address)
        if address is None or address.is_loopback or self.trusts(address) or any(
                address in net for net in self._doubtful):
            return shown, None
        if address.version == 6:
            return shown, str(ipaddress.IPv6Address(int(address) >> 64 << 64)) + "/64"
        return shown, shown


################################################################ PART II: A SERVER
#
# How one thread serves ten thousand clients, and how a request stays one story in it.


# -- 7. Reading a request -----------------------------------------------------
#
# Two programs that read the same bytes differently can be played against each
# other: what a proxy takes for one request and we for two is a request that
# nobody checked ("smuggling").  http.server reads generously: it drops all
# fields after a line without a colon, splits lines at a bare CR, believes one
# of two Content-Lengths and takes an unread body for the next request. Here
# nothing is repaired: one spelling is right, all else is 400, and the
# connection closes, for nobody knows where the next request would begin.
#
# Who goes from page to page sends the same fields with each request, but for the
# request line and the credentials. So what a block of fields means is remembered, by
# its bytes without the credentials, from the second time it comes; the rest is read
# each time.

# RFC 9112 section 3: request-line = method SP request-target SP HTTP-version
# A target is visible ASCII without "#". RFC 3986 allows less, but curl sends \ | ^ bare.
match_request_line = re.compile(rf'({TOKEN}) ([!"$-~]+) HTTP/([0-9])\.([0-9])').fullmatch
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
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t -~\x80-\xff]*)?")
UNPRINTABLE = re.compile(r"[^ !#-\[\]-~]")
# One line of credentials, which is cut out of a block before that is remembered.
find_authorization = re.compile(
    rb"\r\n[Aa]uthorization:[ \t]*([\t -~\x80-\xff]*)(?=\r\n)").search

Values = Dict[str, List[str]]


class BadRequest(Exception):
    """A request that is answered with status, after which the connection closes."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class FieldBlock(NamedTuple):
    """What the fields of a head say, read strictly."""

    values: Values          # field name in lower case -> values
    length: int             # of the body, as far as it was said; -1: nothing was said
    chunked: bool           # it was not, for it comes in chunks
    keep_alive: bool        # the client may send another request
    expects: bool           # ... and waits for 100 Continue before the body
    forwarded: str          # X-Forwarded-For
    log_tail: str           # Referer and User-Agent, as the log shows them


class Request(Attempt):
    """One request, as the authenticator, its page and the log see it.

    For pages: method, target (as sent), path (what it asks for: no scheme, no host, one slash
    at the start, and the query), values (field name in lower case -> values; requests share
    them, so they are not to be changed), username (None where no password is asked for), now
    (seconds since the epoch).
    """

    username: Optional[str] = None
    client: Optional[str] = None
    now = time = 0.0
    host = ""                           # of the client, for the log
    asked = False                       # a proxy asks, and method and target are its client's
    status = 0                          # of the answer

    def __init__(self, method: str = "GET", target: str = "/", path: str = "/", line: str = "",
                 minor: int = 1, fields: Optional[FieldBlock] = None,
                 authorization: Sequence[str] = ()) -> None:
        self.method, self.target, self.path, self.line = method, target, path, line
        self.minor, self.fields, self.authorization = minor, fields or NO_FIELDS, authorization
        self.is_head = method == "HEAD"     # by what came: a proxy asks about another method
        self.verdict = UNASKED

    @property
    def values(self) -> Values:
        """The fields."""
        return self.fields.values

    def has_body(self) -> bool:
        """Return whether more follows than the head."""
        return self.fields.chunked or self.fields.length > 0


def parse_head(octets: bytes) -> Request:
    r"""Return the request whose head octets are, up to and with the empty line.

    >>> request = parse_head(b"GET //a?b HTTP/1.1\r\nHost: x\r\n\r\n")
    >>> request.target, request.path, request.fields.keep_alive
    ('//a?b', '/a?b', True)
    """
    line, _, block = octets[:-2].decode("latin-1").partition("\r\n")
    if len(octets) > MAX_HEAD:
        raise BadRequest(414 if len(line) > MAX_LINE else 431, "head too large")
    method, target, path, shown, minor = parse_request_line(line)
    fields = parse_fields(block, minor)
    check_length(method, minor, fields)
    # Not for pages, nor to be remembered: there may be a password in it.
    authorization = fields.values.pop("authorization", ())
    return Request(method, target, path, shown, minor, fields, authorization)


class HeadReader:
    """Read heads as parse_head does; what a block of fields meant is remembered."""

    def __init__(self) -> None:
        self._known: Dict[bytes, Optional[FieldBlock]] = {}     # None: it has come once

    def read(self, octets: bytes) -> Request:
        r"""Return the request whose head octets are.

        >>> HeadReader().read(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n").path
        '/a'
        """
        end = octets.find(b"\r\n")
        if len(octets) > MAX_MEMO:
            return parse_head(octets)           # which refuses what is larger still
        found = find_authorization(octets, end)
        start, stop = found.span(1) if found else (end, end)
        # With the digit before it: the version is part of what the fields mean.
        key = octets[end - 1:start] + octets[stop:]
        fields = self._known.get(key)
        if fields is None:
            return self._learn(key, parse_head(octets), found is not None)
        parse = cached_request_line if end < SHORT else read_request_line
        method, target, path, shown, minor = parse(octets[:end])
        if not minor:
            check_length(method, minor, fields)
        said = (octets[start:stop].decode("latin-1").rstrip(" \t"),) if found else ()
        return Request(method, target, path, shown, minor, fields, said)

    def _learn(self, key: bytes, request: Request, is_cut: bool) -> Request:
        """Keep what a block of fields meant, if it has come before; return the request."""
        # A second Authorization, or one in a spelling of its own, is read by parse_head each time.
        if len(request.authorization) == int(is_cut):
            if len(self._known) >= MAX_MEMOS:
                self._known.clear()     # then each client's next head is parsed, that is all
            # A browser's first request, a scanner's thousand: most blocks never come again.
            self._known[key] = request.fields if key in self._known else None
        return request


def parse_fields(block: str, minor: int) -> FieldBlock:
    """Return what the field lines of a head mean."""
    values: Values = {}
    unread = block.count("\n")
    if unread > MAX_FIELDS:
        raise BadRequest(431, "too many fields")
    # findall() passes over what does not match, in silence: each line it took is counted off.
    for name, value in FIELD_LINE.findall(block):
        values.setdefault(name.lower(), []).append(value.strip(" \t"))
        unread -= 1
    if unread:
        raise BadRequest(400, "field line")
    check_host(values, minor)
    length, chunked = framing(values, minor)
    referer, agent = (escape(values.get(name, ["-"])[0]) for name in ("referer", "user-agent"))
    # Several fields are one list, in their order: RFC 9110 section 5.3.
    return FieldBlock(values, length, chunked, keeps_alive(values, minor),
                      expects_continue(values, minor), ",".join(values.get("x-forwarded-for", ())),
                      f'"{referer}" "{agent}"')


def parse_request_line(line: str) -> Tuple[str, str, str, str, int]:
    """Return method, request target, what path and query it asks for, log line, minor version.

    >>> parse_request_line("GET //foo HTTP/1.1")
    ('GET', '//foo', '/foo', 'GET //foo HTTP/1.1', 1)
    """
    if len(line) > MAX_LINE:
        raise BadRequest(414, "request line too long")
    match = match_request_line(line)
    if match is None:
        raise BadRequest(400, "request line")
    method, target, major, minor = match.groups()
    if major != "1":
        raise BadRequest(505, "HTTP version")
    # A higher minor version is served as the highest we know: RFC 9110 section 2.5.
    return method, target, origin_path(method, target), escape(line), 0 if minor == "0" else 1


def read_request_line(octets: bytes) -> Tuple[str, str, str, str, int]:
    """Return what a request line says, as it came."""
    return parse_request_line(octets.decode("latin-1"))


# Pages are asked for again and again. Short lines only: thousands of 8 KiB are no small memory.
cached_request_line = functools.lru_cache(maxsize=4096)(read_request_line)


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


def framing(values: Values, minor: int) -> Tuple[int, bool]:
    """Return the length of the body (-1: not said), and whether it is chunked instead.

    >>> framing({"content-length": ["5"]}, 1), framing({}, 1)
    ((5, False), (-1, False))
    >>> framing({"transfer-encoding": ["Chunked"]}, 1)
    (-1, True)

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
        return -1, True
    # Not int() alone, which also takes "+5", " 5" and "1_0".
    if len(lengths) > 1 or lengths and re.fullmatch("[0-9]+", lengths[0]) is None:
        raise BadRequest(400, "Content-Length")
    if lengths and len(lengths[0]) > 15:    # int() of a very long one would take seconds
        raise BadRequest(413, "body too large")
    return int(lengths[0]) if lengths else -1, False


def check_length(method: str, minor: int, fields: FieldBlock) -> None:
    """Refuse a body whose end HTTP/1.0 cannot tell.

    See: RFC 9112 section 6.3.
    """
    if not minor and fields.length < 0 and method in ("POST", "PUT", "PATCH"):
        raise BadRequest(411, "no Content-Length")


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


UNASKED = Verdict(0)        # of a request that the authenticator has not been asked about
PUBLIC = Verdict(200)       # of one for which it need not be asked
NO_FIELDS = FieldBlock({}, -1, False, False, False, "", '"-" "-"')


# -- 8. Pages: what answers in the loop ---------------------------------------
#
# A page is a function: a Request in, an Answer out. It runs in the loop that serves
# everybody, so it must not wait for anything; a file it need not even read, it names the
# part of it that is to be sent. The example, folders of files (11), refusals are pages.

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n"
                for status in http.HTTPStatus}
PAGE_METHODS = ("GET", "HEAD", "OPTIONS")
ALLOW = ("Allow", ", ".join(PAGE_METHODS))
METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")


class FilePart(NamedTuple):
    """A body that lies in a file: the server sends that part of it, then closes it."""

    file: Any               # has fileno() and close()
    offset: int
    length: int


class Answer(NamedTuple):
    """What a page returns."""

    status: int
    fields: Fields          # without Content-Length, Date, Server, Connection
    body: Union[bytes, FilePart] = b""


Page = Callable[[Request], Answer]
# RFC 9110 section 5.5: in a value CR, LF and NUL are "dangerous", other controls but HTAB invalid.
ends_line = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]").search

STYLE = (
    ":root{color-scheme:light dark;font:100%/1.5 system-ui,sans-serif}"
    "body{max-width:48rem;margin:3rem auto;padding:0 1rem}h1{font-size:1.3rem}"
    "a{color:inherit;text-underline-offset:.2em}a:hover{text-decoration:underline}"
    "table,td:first-child{width:100%}table{border-spacing:0}"
    "th,td{padding:.4rem 0;border-bottom:1px solid #8883;text-align:left}"
    "th,td+td{font:.85rem system-ui,sans-serif;color:#777;white-space:nowrap}"
    "th+th,td+td{padding-left:1.5rem;text-align:right;font-variant-numeric:tabular-nums}"
    "td a{display:block;text-decoration:none}td a[href$='/']{font-weight:600}i{font-style:normal}"
    "h1,td:first-child{overflow-wrap:anywhere}"
    "@media(max-width:32rem){body{margin:1rem auto}th+th,td+td{padding-left:1rem}i{display:none}}")
EXPLANATIONS = {
    401: "This is for who has a password. To try again, reload the page.",
    403: "The server may not give you this.",
    404: "There is nothing here.",
    429: "Too many wrong passwords came from your address. Wait a minute, then reload the page.",
    500: "Something went wrong here; the log of the server says what.",
    503: "The server cannot answer just now. Reload the page in a moment.",
}
HTML = ("Content-Type", "text/html; charset=utf-8")
# Browsers shall not guess that a text is a program: https://fetch.spec.whatwg.org/#nosniff
NOSNIFF = ("X-Content-Type-Options", "nosniff")
# What was given for a password is nobody else's: RFC 9111 section 3.5 and 5.2.2.7.
PRIVATE = (("Cache-Control", "private"), ("Vary", "Authorization"))


def html_page(title: str, body: str) -> bytes:
    r"""Return a page; title is text, body is HTML.

    >>> html_page("a<b", "<p>c")[-50:]
    b'</style><title>a&lt;b</title><h1>a&lt;b</h1>\n<p>c\n'
    """
    title = html.escape(title)
    # The empty icon keeps browsers from asking for /favicon.ico.
    return (f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
            f'<style>{STYLE}</style><title>{title}</title><h1>{title}</h1>\n{body}\n'
            ).encode("utf-8", "replace")


@functools.lru_cache(maxsize=None)
def error_page(status: int) -> bytes:
    """Return the page of a refusal; the same bytes each time, a 401 is sent often."""
    home = '\n<p><a href="/">Home</a>' if status in (403, 404) else ""
    return html_page(f"{status} {http.HTTPStatus(status).phrase}",
                     f"<p>{EXPLANATIONS.get(status, '')}{home}")


def error_answer(status: int, *fields: Tuple[str, str]) -> Answer:
    """Return the answer of a refusal."""
    return Answer(status, (HTML, *fields), error_page(status))


@functools.lru_cache(maxsize=256)
def example_answer(path: str, user: str) -> Answer:
    r"""Return the answer of the example resource.

    >>> b"<p>This is foo, for jim." in example_answer("/example/foo?a=b", "jim").body
    True
    """
    folder, _, name = path.partition("?")[0].rpartition("/")
    if folder + name == "":
        return Answer(200, (HTML,), html_page(
            "It works", '<p><a href="/example/foo">/example/foo</a>'))
    if not name or not (folder + "/").startswith("/example/"):
        return error_answer(404)
    name = urllib.parse.unquote(name)
    return Answer(200, (HTML,), html_page(
        name, f"<p>This is {html.escape(name)}, for {html.escape(user)}."))


def example(request: Request) -> Answer:
    """Answer /example/foo with a page about foo and the user; / leads to it."""
    return example_answer(request.path, request.username or "everybody")


def page_answer(server: "AuthServer", request: Request) -> Answer:
    """Return a page's answer; for what no page knows, ours."""
    if request.method not in PAGE_METHODS:
        return error_answer(405 if request.method in METHODS else 501, ALLOW)
    if request.method == "OPTIONS":
        return Answer(204, (ALLOW,))
    try:
        assert server.page is not None
        answer = server.page(request)
        if not isinstance(answer, Answer) or answer.status not in STATUS_LINES:
            raise TypeError(f"expected an Answer with a status of HTTP, not {answer!r:.40}")
        # Our own pages say nothing that ends a line; a program's may.
        if server.has_guest and ends_line("".join([name + value for name, value in answer.fields])):
            raise ValueError("control characters in its fields")    # which would become others
    except Exception:
        server.log.error(f"error: {request.line}: {traceback.format_exc()}")
        answer = error_answer(500)
    return answer


def refusal(server: "AuthServer", request: Request) -> Answer:
    """Return the answer to a request that may not pass; the log is told why."""
    verdict = request.verdict
    if verdict.reason != "no credentials":
        server.log.error(f"{request.host or '-'}: refused {log_name(verdict.log_user)}: "
                         f"{verdict.reason}")
    # nginx makes 500 of all else that its subrequest brings.
    return error_answer(403 if request.asked and verdict.status != 401 else verdict.status)


def put_off(server: "AuthServer", request: Request, reason: str) -> Answer:
    """Return the answer to a request that nobody has time for."""
    if server.authenticator:
        server.authenticator.table.add("busy")
    request.verdict = Verdict(503, reason=reason, fields=(("Retry-After", "1"),))
    return refusal(server, request)


def field_lines(fields: Fields) -> str:
    """Return header fields as they go over the wire.

    >>> field_lines([("Allow", "GET")])
    'Allow: GET\\r\\n'
    """
    return "".join([f"{name}: {value}\r\n" for name, value in fields]) if fields else ""


# For what pages of ours say, which is mostly the same; a proof is never said twice.
cached_field_lines = functools.lru_cache(maxsize=1024)(field_lines)


@functools.lru_cache(maxsize=256)
def log_name(username: Optional[str]) -> str:
    """Return a user's name as one word of the log; nobody is -, and no name is mistaken for it.

    >>> log_name("jim"), log_name("a b"), log_name("-"), log_name(""), log_name(None)
    ('jim', 'a%20b', '%2D', '""', '-')
    """
    if not username or username == "-":
        return "-" if username is None else '""' if not username else "%2D"
    return urllib.parse.quote(username, "!$&'()*+,/:;=?@", errors="replace")


def is_public(prefixes: Sequence[bytes], path: str) -> bool:
    """Return whether a path lies below one of these prefixes, whoever reads it.

    >>> [is_public([b"/pub"], path) for path in ("/pub/a?b", "/pub", "/public", "/pub/%2e%2e/a")]
    [True, True, False, False]
    """
    if not prefixes:
        return False
    decoded = decode_path(path)
    return b"\\" not in decoded and any((decoded + b"/").startswith(prefix.rstrip(b"/") + b"/")
                                        for prefix in prefixes)


# -- 9. One connection --------------------------------------------------------
#
# A request is a generator, Connection.answer(): its whole story, from the head to the line in
# the log, read from top to bottom. It yields where it must wait: MORE for bytes that have not
# come yet, or a function that takes long and is lent to a thread. go_on() drives it: it
# sends in what was waited for. A connection without a request has no generator; of 10,000
# connections nearly all have none.
#
#     Connection.ready()     bytes have come, or can go
#       advance()            a head is whole: begin its story, or go on with it
#         go_on()            until it is told, or waits
#           answer()         read -> who is it -> the page, or the handler -> finish -> skip
#     Channel.flush()        later in the same turn, for a batch of answers: one write for each;
#                            a file's part by sendfile(2)
#
# Why a generator? What a request waits for (a body, a slow hash, a handler) lies in the middle
# of what is done for it. Callbacks would cut it there: this story was 25 hops once, over
# three classes and two threads, and which came after which nobody could read anywhere. A
# thread for each connection would keep it whole, and cost 230 us for a new connection and 10,000
# threads for as many idle ones. A generator is a function that can wait without a thread.
#
# It answers one request at a time: one when it is read, then one in each turn of the loop. What
# waits is in the buffer, and its connection in server.later, until other clients had their turn.
# So nobody gets more by pipelining, and answers leave in the order of the requests (RFC 9112
# section 9.3.2): the next is not begun before the one before it is with the kernel, its file
# as well.
#
# To be fair is to have a deadline for everything. WAITS has them, by what a connection waits
# for; none is moved by a single byte, or a client could make one last for ever. A connection
# is always in exactly one of these stages:
#
#     (handshake) -> first -> [head] -> [body] [thread] -> [rest] [write] -> idle -> [head] ...
#                                                                  or -> linger -> closed
#
# (A thread has its own limits: section 15.)
#
# Two sides of a connection end apart. We say that nothing more will come (FIN) as soon as the
# last answer has left; but a client that is still sending has not read it yet, and close(2) with
# unread bytes would send a reset, on which its kernel throws the answer away. So who was refused
# in the middle of an upload may linger for a while: it is read, and nothing is kept of it.

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
MORE, REST = "body", "rest"     # what a story yields when it waits for bytes; that is its stage
WAITS = {                   # seconds that a connection may spend
    "first": 20.0,          # from accept to the first byte
    "head": 20.0,           # from the first byte of a head to its last: not per byte
    "handshake": 20.0,      # of TLS
    "body": PACE_SECONDS,   # reading a body in the loop, of at most 64 KiB
    "rest": PACE_SECONDS,   # ... of a request that has been answered
    "write": PACE_SECONDS,  # writing, and as long again for every 64 KiB that went
    "idle": 75.0,           # between two requests; browsers wait for 60 to 120 s
    "linger": 10.0,         # sending, though it has been refused
}
CLOSE = "Connection: close\r\n"
# What a socket says that has to wait; under TLS it may, to read, have to wait for a write.
NOT_NOW = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
NO_CONTENT = (204, 304)     # statuses without a body: RFC 9110 section 6.4.1
NO_LINGER = struct.pack("ii", 1, 0)     # close(2) resets, and forgets what was not sent
Story = Generator[Any, Any, None]


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
        self.left = max(0, length)      # bytes of the body, or of this chunk, still to come
        self.next_line = "size" if chunked else ""      # what follows: take_line() calls take_...
        # Bytes left for chunks; after the last of them, for the trailer.
        self.room = MAX_BODY if chunked else length
        self.done = not self.left and not chunked
        self.rest = bytearray()
        self.taken = b""        # what was read ahead of a handler, as it came (qop=auth-int)
        self.is_read = False    # it was, and the client has been told 100 Continue

    def feed(self, octets: bytes) -> bytes:
        """Take octets as they came, return what they mean."""
        if 0 < len(octets) <= self.left and not self.rest:      # nothing but body: no copy
            self.left -= len(octets)
            self.done = not self.left and not self.next_line
            return octets
        self.rest += octets         # a size may have come in two halves
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
        """Take the line that is due, if it is there: take_end, take_size or take_trailer.

        Each of them says which comes next: the grammar of RFC 9112 section 7.1 as a machine of
        three states.
        """
        end = self.rest.find(b"\r\n")
        if end > MAX_LINE or end < 0 and len(self.rest) > MAX_LINE:
            raise BadRequest(400, "chunk line too long")
        if end < 0:
            return False
        line = bytes(self.rest[:end])
        del self.rest[:end + 2]
        take = {"size": self.take_size, "end": self.take_end, "trailer": self.take_trailer}
        take[self.next_line](line)
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


# One for all requests without a body: it is done, so nobody ever feeds it.
NO_BODY = Body(0, False)


class Channel:
    """A client's connection as far as it is bytes: in, out, and one deadline for either.

    For whoever talks: receive, wait; output and part, which flush() sends; hang_up, close.
    TLSConnection (14) overrides send, send_part and shut.

    Bytes go out in two forms: output, which lies in memory, and then part, which lies in a
    file and never comes here, unless it has to be encrypted. While either waits for the client,
    nothing is read from it (writes): a client that asks and does not take what it asked for
    finds its own requests waiting, and not our memory filling.
    """

    # Of thousands nearly all are idle, so an idle one is small.
    __slots__ = ("server", "listener", "socket", "address", "buffer", "output", "part", "stage",
                 "deadline", "watched", "writes", "closing", "lingers")

    def __init__(self, server: "AuthServer", listener: "Listener", sock: Any, address: Any) -> None:
        self.server, self.listener, self.socket, self.address = server, listener, sock, address
        self.buffer = b""           # received, and not understood yet
        self.output = b""           # not sent yet
        self.part: Optional[FilePart] = None        # ... and after it this
        self.watched = False        # by the selector
        self.writes = False         # it waits for the client: nothing is read meanwhile
        self.closing = False        # after the output
        self.lingers = False        # ... because the client may still be sending
        self.wait("first")

    def wait(self, stage: str) -> None:
        """Set what is waited for, and for how long."""
        patience = WAITS[stage]
        if self.server.draining and stage in ("first", "idle"):
            patience = DRAIN_SECONDS
        self.stage, self.deadline = stage, self.server.clock + patience

    def receive(self) -> Optional[bytes]:
        """Return what has come; b"" when nothing will come any more, None when nothing has yet."""
        try:
            octets: bytes = self.socket.recv(READ_SIZE)
        except NOT_NOW:
            return None
        except (OSError, ValueError):       # ValueError: TLS has ended
            return b""
        return octets

    def take_buffer(self) -> bytes:
        """Return what has been received, once."""
        octets, self.buffer = self.buffer, b""
        return octets

    def send(self, octets: bytes) -> int:
        """Return how many of these bytes the kernel took."""
        try:
            return int(self.socket.send(octets))
        except NOT_NOW:
            return 0

    def send_part(self, part: FilePart) -> int:
        """Return how many bytes of a file the kernel took.  See: sendfile(2)."""
        try:
            sent = os.sendfile(self.socket.fileno(), part.file.fileno(), part.offset,
                               min(part.length, SENDFILE_SIZE))
        except (BlockingIOError, InterruptedError):
            return 0
        # A file that was cut has no more; to pad it would be a lie, to go on an endless loop.
        if not sent:
            raise EOFError
        return sent

    def flush(self) -> None:
        """Send the output; what the client does not take now waits, and so do its requests.

        At first without asking whether the client is ready: nearly always it is, and then no
        turn of the loop is needed. Only what is left over waits for the selector.
        """
        sent = 0
        try:
            if self.output:
                sent = self.send(self.output)
                self.output = self.output[sent:]
            if self.part and not self.output:
                part, size = self.part, self.send_part(self.part)
                self.part = part._replace(offset=part.offset + size, length=part.length - size)
                sent += size
                if not self.part.length:
                    part.file.close()
                    self.part = None
        except (OSError, EOFError):
            self.close()
            return
        if self.output or self.part:
            self.wait_to_write(sent)
        elif self.closing:
            self.hang_up()
        elif self.writes:
            self.watch(False)
            self.wait("idle")
            self.server.later[self] = None          # what came meanwhile

    def wait_to_write(self, sent: int) -> None:
        """Wait until the client takes more; who takes too little is cut off.

        The deadline moves by what was taken, so a slow line gets a large file in the end, and a
        client that takes a byte now and then does not hold our memory for ever.
        """
        if not self.writes:
            self.watch(True)
            self.wait("write")
        # Haste is no credit for later: what the kernel took at once, the client may never read.
        self.deadline = min(self.deadline + sent * PACE_SECONDS / IN_MEMORY,
                            self.server.clock + WAITS["write"])

    def watch(self, writes: bool) -> None:
        """Wait for the moment to write, or to read; never for both: an event means one thing."""
        selector = self.server.selector
        events = selectors.EVENT_WRITE if writes else selectors.EVENT_READ
        change = selector.modify if self.watched else selector.register
        change(self.socket, events, self.ready)
        self.watched, self.writes = True, writes

    def unwatch(self) -> None:
        """Wait for nothing."""
        if self.watched:
            self.server.selector.unregister(self.socket)
            self.watched = False

    def ready(self, events: int) -> None:
        """Do what can be done now."""
        raise NotImplementedError

    def hang_up(self) -> None:
        """Close; if the client may still be sending, let it finish and read the answer first.

        Closing a socket with bytes unread sends a reset, and a reset makes the client's
        kernel forget an answer that it has already received.

        See: RFC 9112 section 9.6.
        """
        if self.stage == "linger":
            return
        if self.lingers or self.buffer:
            with contextlib.suppress(OSError):
                self.shut()
                self.buffer = b""
                self.watch(False)
                self.wait("linger")
                return
        self.close()

    def shut(self) -> None:
        """Say that nothing more will come."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close; what the kernel still holds for a client that does not read is forgotten."""
        with contextlib.suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self.close()

    def close(self) -> None:
        """Forget the connection; harmless when it is repeated."""
        if self in self.server.connections:
            self.server.forget(self)
            with contextlib.suppress(OSError):      # it has ended already
                if self.server.has_guest:           # a child that it forked may hold it, too
                    self.socket.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):      # a handler has closed it by its number
                self.socket.close()
        if self.part:
            self.part.file.close()
        self.closing, self.buffer, self.output, self.part = True, b"", b"", None


class Connection(Channel):
    """A connection as far as it is requests: the story of each, and its driver.

    For the loop: ready, advance, expire, close.

    host is whom the log names, client whom a lock-out would hit. They are found once: what is
    known of an address does not change while it is connected.
    """

    __slots__ = ("host", "client", "story")

    def __init__(self, server: "AuthServer", listener: "Listener", sock: Any, address: Any) -> None:
        super().__init__(server, listener, sock, address)
        self.story: Optional[Story] = None          # of the request that is being answered
        # For the log, and for a lock-out; another one's, when a proxy speaks for others.
        self.host, self.client = server.proxies.find_client(     # type: str, Optional[str]
            host_of(address))

    def ready(self, events: int) -> None:
        """Send what waits, or else read what came, and work on it.

        The end of what a client sends is looked at last: it may ask, say that it has no more
        to ask, and read (`nc` does). Who waits in `later` has sent enough for now.
        """
        if self.writes:
            self.flush()
        elif self not in self.server.later:
            octets = self.receive()
            if not octets:
                if octets is not None:
                    self.close()
                return
            # Who was refused may go on sending: it is read, so that it can read our answer.
            if not self.closing:
                self.buffer = self.buffer + octets if self.buffer else octets
            self.advance()

    def take_turn(self) -> None:
        """Go on with what was sent ahead, in `later`; stay there until nothing more has come.

        Or 200 clients that pipeline without end would be as good as 200 that have just come,
        each time that they are read, and those would wait for them all: 13 ms.
        """
        before = len(self.buffer)
        self.advance()
        if self.story is None and not (self.closing or self.writes):
            if len(self.buffer) < before:
                self.server.later[self] = None
            else:
                self.ready(selectors.EVENT_READ)

    def advance(self) -> None:
        """Go on with the request at hand, or with the next one if its head is there.

        Nothing is parsed before the empty line has come, so a head that comes byte by byte
        costs a search per byte and no more; check_partial_head() bounds how long it may be.
        """
        if self.story is not None:
            if self.stage != "thread" and not self.writes:
                self.go_on()
        elif self.buffer and not (self.writes or self.closing or self.output or self.part):
            end = self.buffer.find(b"\r\n\r\n") + 4
            if self.buffer[:2] == b"\r\n":      # an empty line before a request is no request
                self.buffer = self.buffer[2:]
                self.server.later[self] = None
            elif end > 3:
                octets, self.buffer = self.buffer[:end], self.buffer[end:]
                self.story = self.answer(octets)
                self.go_on()
            else:
                self.check_partial_head()
        self.hand_over()

    def hand_over(self) -> None:
        """Have send_answers() send what is ready, or hang up."""
        if (self.output or self.part or self.closing) and not self.writes:
            self.server.unsent.append(self)

    def check_partial_head(self) -> None:
        """Refuse a head that can only become worse; wait for the rest of others, not for long."""
        end = self.buffer.find(b"\n")
        if end < 0 and len(self.buffer) > MAX_LINE:
            self.refuse(BadRequest(414, "request line too long"))
        elif len(self.buffer) > MAX_HEAD:
            self.refuse(BadRequest(431, "head too large"))
        # RFC 9112 section 2.2 lets us end a line at a bare LF; a proxy in front may not have.
        elif end >= 0 and self.buffer[end - 1:end] != b"\r":
            self.refuse(BadRequest(400, "line without CR"))
        elif self.stage != "head":
            self.wait("head")

    # -- the story of a request

    def answer(self, octets: bytes) -> Story:
        """Answer the request whose head octets are: everything that happens to it, in order.

        The order is the server's promise. Who it is comes before what it wants: a stranger does
        not learn whether a page exists, which methods it has, or how large a body may be (but for
        qop=auth-int, whose proof is about the body). The answer comes before the rest of the
        body: what nobody wanted must not delay it. And the body comes before the next request,
        for only its end says where that one begins.
        """
        server, request, body = self.server, None, NO_BODY
        answer: Optional[Answer] = None
        try:
            request = server.heads.read(octets)
            if request.has_body():
                body = Body(request.fields.length, request.fields.chunked)
                request.read_body = functools.partial(self.read_body, request.fields, body)
            verdict = request.verdict = self.let_in(request) or (
                yield from self.examine(request))
            request.username = verdict.username
            if verdict.status != 200:
                answer = refusal(server, request)
            elif request.fields.length > MAX_BODY:
                raise BadRequest(413, "body too large")
            elif request.asked:
                answer = grant(request)
            elif server.page is not None:
                answer = page_answer(server, request)
            else:
                answer = yield from self.host_handler(octets, request, body)
        except BadRequest as error:
            self.refuse(error, octets, request)
        except Busy as error:           # nobody is there to whom it could be lent
            assert request is not None
            answer = put_off(server, request, str(error))
        if answer is not None and request is not None:
            self.finish(request, answer, body)
        if body is not NO_BODY:
            yield from self.skip(body)

    def let_in(self, request: Request) -> Optional[Verdict]:
        """Find whose request it is; return the verdict where nothing has to be checked.

        That is where everybody may come in, or where credentials like these were found right
        before: no generator has to be made for them.
        """
        server, authenticator = self.server, self.server.authenticator
        request.now, request.host, request.client = server.wall, self.host, self.client
        request.time, request.schemes = server.now, self.listener.schemes
        if request.fields.forwarded or server.forward_auth:
            refused = self.look_behind(request)
            if refused:
                return refused
        if not request.asked and (authenticator is None or server.public and is_public(
                server.public, request.path)):
            return PUBLIC
        return authenticator.recall(request) if authenticator else None

    def look_behind(self, request: Request) -> Optional[Verdict]:
        """Find whose request a proxy passes on, or asks about; return the verdict if it may not."""
        server, peer = self.server, host_of(self.address)
        said = request.fields.forwarded[-MAX_TEXT:]
        request.asked = is_forward_auth(server.forward_auth, request.path)
        is_trusted = server.proxies.trusts(parse_address(peer))
        if is_trusted:                      # it may speak for others
            request.host, request.client = server.proxies.find_client(peer, said)
        if request.asked:
            asked = asked_about(request, server.forward_auth)
            if not asked or not is_trusted:
                return Verdict(403, reason="forward-auth: no --trusted-proxy, or not one method "
                                           "and one URI")
            request.method, request.target = asked
            request.same_target = is_same_spelling
            request.line = escape(f"{asked[0]} {asked[1]} HTTP/1.{request.minor}")
        return None

    def examine(self, request: Request) -> Asking:
        """Have the authenticator look at what let_in() did not know."""
        assert self.server.authenticator is not None        # let_in() has seen to that
        return self.server.authenticator.examine(request)

    def read_body(self, fields: FieldBlock, body: Body) -> Generator[Any, Any, bytes]:
        """Return the whole of a body; one that the loop cannot hold is refused.

        For qop=auth-int alone, where the proof is about the body. What was read stays in
        body.taken, as it came: a handler has a right to read it as well.
        """
        # If something has come after the head, the client is not waiting: RFC 9110 section 10.1.1.
        if fields.expects and not self.buffer:
            self.output += CONTINUE
        content = b""
        while True:
            body.taken += self.buffer
            content += body.feed(self.take_buffer())
            # Twice, for chunks: what says how long they are may be as long as they.
            if max(len(content), len(body.taken) // 2, fields.length) > IN_MEMORY:
                raise BadRequest(413, "body too large")
            if body.done:
                break
            yield MORE
        body.taken = body.taken[:len(body.taken) - len(body.rest)]
        body.is_read = True
        return content

    def skip(self, body: Body) -> Story:
        """Read and drop a small body that nobody wanted, so that the connection can go on.

        What is malformed has had its answer; but nobody knows where a next request would begin.
        """
        try:
            while not body.done and not self.closing:
                body.feed(self.take_buffer())
                if not body.done:
                    yield REST
        except BadRequest:
            self.lingers = self.closing = True
        if body.rest:
            self.buffer = body.take_rest() + self.buffer

    def host_handler(self, octets: bytes, request: Request,
                     body: Body) -> Generator[Any, Any, Optional[Answer]]:
        """Have a handler answer, in a thread; return our own answer where it sent none.

        What the handler wrote has gone to the client already. All that is left to find out is
        whether both sides know where it ended: only then may another request follow. To be
        wrong here would hand the next client of a proxy the answer that this one was owed.
        """
        sock = HandlerSocket(self, octets, request, body)
        yield sock
        sock.is_shut, was_shut = True, sock.is_shut     # for threads that it may have left behind
        if sock.follower.fault:
            self.server.log.error(f"{request.host}: {request.line}: {sock.follower.fault}")
        if sock.is_silent() and not was_shut:
            if sock.nonsense:
                raise sock.nonsense
            self.closing = True
            return error_answer(500)
        self.closing = self.closing or self.server.draining or was_shut or sock.ends_connection()
        self.lingers = self.closing and not body.done
        self.note(request, sock.follower.status, sock.follower.size)
        return None

    def finish(self, request: Request, answer: Answer, body: Body) -> None:
        """Put an answer into the output, and a line into the log.

        Head and body leave together. In two writes Nagle's algorithm would hold the second one
        back until the client has acknowledged the first, and the client waits 40 ms with that:
        http.server's default took 44 ms a request.
        """
        fields, content = request.fields, answer.body
        size = content.length if isinstance(content, FilePart) else len(content)
        # What is large, or may be, nobody reads only to drop it; nor what waits for 100 Continue.
        if not body.done and (fields.chunked or fields.expects or fields.length > IN_MEMORY):
            self.lingers = self.closing = True
        if self.server.draining or not fields.keep_alive:
            self.closing = True
            self.lingers = self.lingers or not body.done    # or a reset would take the answer along
        length = "" if answer.status in NO_CONTENT else f"Content-Length: {size}\r\n"
        ends = CLOSE if self.closing else "" if request.minor else "Connection: keep-alive\r\n"
        # A program's fields may be anybody's, a redirect's as long as what was asked for.
        once = self.server.has_guest or answer.status != 200
        in_words = field_lines if once else cached_field_lines
        lines = in_words(answer.fields) + field_lines(request.verdict.fields)
        head = f"{STATUS_LINES[answer.status]}{self.server.stamp}{lines}{length}{ends}\r\n"
        octets = head.encode("latin-1", "replace")
        if not isinstance(content, FilePart):
            size = size if length and not request.is_head else 0
            octets += content[:size]
        elif not (length and size and not request.is_head):
            size = 0
            content.file.close()
        else:
            self.part = content
        self.output = self.output + octets if self.output else octets
        self.note(request, answer.status, size)

    def note(self, request: Request, status: int, size: int) -> None:
        """Put a line into the log: the request has been answered."""
        request.status = status
        self.wait("idle")
        self.server.answered += 1
        if self.listener.logs:
            self.server.log.access(request, size)

    def refuse(self, error: BadRequest, octets: bytes = b"",
               request: Optional[Request] = None) -> None:
        """Answer what is no request, or not a whole one, and hang up."""
        if request is None:         # its first line is all that the log can show
            line = (octets or self.buffer)[:MAX_LINE].partition(b"\r\n")[0].decode("latin-1")
            request = Request("", "", "", escape(line))
            request.host = self.host
        # Whatever follows what we could not read is no request, so nothing of it is kept.
        self.buffer, self.closing, self.lingers = b"", True, True
        request.verdict = Verdict(error.status, reason=f"malformed: {error}")
        self.finish(request, refusal(self.server, request), NO_BODY)

    # -- its driver

    def go_on(self, value: Any = None, error: Optional[BaseException] = None) -> None:
        """Tell the story on, with what it waited for, until it ends or waits again.

        A wish is a stage (more bytes, please), or a function for a thread. Each is granted by
        calling this again: by advance() when bytes have come, by come_back() from the thread,
        by expire() with an error when it took too long.
        """
        story = self.story
        assert story is not None
        try:
            # next() ends without an exception, at its default: most stories end at once.
            wish = (next(story, None) if value is error is None else
                    story.throw(error) if error else story.send(value))
        except StopIteration:
            wish = None
        if wish is None:
            self.story = None
            if self.stage == REST:
                self.wait("idle")
            if self.buffer:
                self.server.later[self] = None      # other clients first
            return
        if wish not in (MORE, REST):
            self.lend(wish)
        elif self.stage != wish:
            self.wait(wish)

    def lend(self, work: Callable[[], Any]) -> None:
        """Lend the connection to a thread; the loop goes on with what work returns.

        From here to come_back() the socket is the thread's. It is out of the selector, since
        two readers of one socket would each get half of what comes.
        """
        server = self.server
        pool = server.handlers if isinstance(work, HandlerSocket) else server.hashers
        if not pool.lend(functools.partial(self.do, work)):
            self.go_on(None, Busy("every thread is busy"))
            return
        self.unwatch()
        # The reads and writes of a handler have deadlines of their own.
        self.stage, self.deadline = "thread", float("inf")

    def do(self, work: Callable[[], Any]) -> Callable[[], None]:
        """Do work, come what may; in a thread.  Return what tells the loop."""
        result, error = None, None
        try:
            result = work()
        except BaseException as caught:     # SystemExit, too: the story has to know
            error = caught
        if self.server.is_over:             # shutdown(): it let us finish, and nobody is left
            return self.close
        return functools.partial(self.server.call_soon,
                                 functools.partial(self.come_back, result, error))

    def come_back(self, result: Any, error: Optional[BaseException]) -> None:
        """Come back from a thread, and go on; if anything is left to go on with."""
        try:
            self.socket.setblocking(False)
            self.watch(False)
            self.wait("idle")
            self.go_on(result, error)
            self.hand_over()
        except Exception:       # a handler has closed the descriptor itself; a hash has failed
            self.server.log.error(f"error: {traceback.format_exc()}")
            self.close()

    def expire(self) -> None:
        """Close what took too long; who is in the middle of a request is told so.

        408 in the idle stage would be an answer to a question that nobody asked; some clients
        take it for that of their next one.
        """
        if self.stage not in ("head", MORE):
            (self.reset if self.writes else self.close)()
            return
        slow = BadRequest(408, "too slow")
        if self.story is None:
            self.refuse(slow)
        else:
            self.go_on(None, slow)
        self.hand_over()

    def close(self) -> None:
        """Forget the request as well."""
        if self.story is not None and self.stage != "thread":
            self.story.close()
        self.story = None
        super().close()


# -- 10. The server -----------------------------------------------------------
#
# One thread waits for all sockets at once (selectors) and does whatever does not
# wait. An idle or slow client costs a Connection and a deadline, not a thread.
# Deadlines are looked at once a second: a walk over 10,000 connections takes
# half a millisecond, no timer structure is cheaper.
#
#     serve_forever()
#       turn()             select
#         make_calls()     what other threads want done here: come_back(), drain(), release()
#         accept()         new connections, and what they ask for: welcome()
#         ready()          what came is read and answered
#         send_answers()   ... and leaves, a batch at a time
#         take_turn()      who asked ahead, and waits in `later`
#         tidy_up()        when there is nothing else to do: who is overdue, log, counters
#
# Why not more threads, for more CPUs? They would share one interpreter, and with it one lock;
# processes do not. daemonize.py forks several workers, each with a loop of its own, and they
# accept from the same sockets: the kernel gives each connection to whoever asks first.
#
# What is done in a turn is done for somebody who waits. What nobody waits for (the log, the
# counters, to look for who is overdue) is put off until a turn has nothing else to do, or a
# second is over: that is tidy_up(). Under load it is paid once for hundreds of requests.


class Listener(NamedTuple):
    """A listening socket, and what is offered to who comes in there."""

    socket: socket.socket
    schemes: Sequence[str]
    context: Any = None     # an ssl.SSLContext: HTTPS
    logs: bool = True       # not what probe() asks


class Log:
    """The access log (descriptor 1) and the error log (descriptor 2), of whole lines.

    Descriptors, not files: whoever started us has put them where they belong, and may put them
    elsewhere while we run (daemonize.py does, when the log is rotated). Only write(2) sees that.

    One write(2) for many requests, so that several workers can append to one file. A
    full disk stops the log and nothing else: the lost lines are counted, and said as soon as
    writing works again.
    """

    def __init__(self) -> None:
        self.date = ""
        self.waiting: Dict[int, List[str]] = {1: [], 2: []}
        self.lost = 0

    def access(self, request: Request, size: int) -> None:
        """Note an answer, in the Combined format that log analysers and fail2ban read.

        The user column has a name for a success and for wrong credentials, and "-" for
        first challenges and stale ones: so fail2ban's filter traefik-auth bans the right.
        """
        user = request.verdict.log_user
        self.waiting[1].append(
            f'{request.host or "-"} - {"-" if user is None else log_name(user)} [{self.date}] '
            f'"{request.line}" {request.status or "-"} {size} {request.fields.log_tail}\n')

    def error(self, text: str) -> None:
        """Note what an administrator should know; only its own line feeds divide lines."""
        lines = "\n".join(escape(line).replace("\\x22", '"') for line in text.split("\n"))
        self.waiting[2].append(f"[{self.date}] authserver: {lines}\n")

    def flush(self) -> None:
        """Write what was noted; descriptors 1 and 2 may be another file by now (rotation)."""
        for fd in (1, 2):
            # Taken before it is written: SIGTERM, which comes as SystemExit between any two
            # lines of this, must not find them here and write them again.
            lines, self.waiting[fd] = self.waiting[fd], []
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


class Pool:
    """Threads for what may take long: persistent, started when they are needed.

    Not concurrent.futures: it waits for its threads at the end of the process, and a handler
    may never return.
    """

    def __init__(self, size: int, waiting: int = 0) -> None:
        self.size, self.limit = size, size + waiting    # threads; pieces of work at a time
        self.threads = self.work = 0                    # of now
        self.queue: queue.Queue[Callable[[], Callable[[], None]]] = queue.Queue()
        self.mutex = threading.Lock()

    def lend(self, work: Callable[[], Callable[[], None]]) -> bool:
        """Have work done soon; return False where too much is to be done already.

        A queue without an end would only move the waiting to where nobody sees it, and answer
        clients that have left long ago. So there is a limit, and beyond it the truth: 503.
        """
        with self.mutex:
            if self.work >= self.limit:
                return False
            if self.work >= self.threads and self.threads < self.size:
                try:
                    # daemon: a handler that never returns must not keep the process from ending.
                    threading.Thread(target=self.run, daemon=True).start()
                    self.threads += 1       # only now: start() fails where processes are full
                except RuntimeError:        # and nobody else is free
                    return False
            self.work += 1
        self.queue.put(work)
        return True

    def run(self) -> None:
        """Do what comes, for ever; work does not raise."""
        process = os.getpid()
        while True:
            tell = self.queue.get()()
            if os.getpid() != process:      # a child that a handler forked has come back from it
                return                      # ... and ends when its own threads have
            # Our place is free before anybody hears of it: who is told may need it at once.
            with self.mutex:
                self.work -= 1
            tell()


def log_date(second: int) -> str:
    """Return a time as Combined logs have it: local, with its distance from UTC."""
    local = time.localtime(second)
    # Not %b: strftime would name the month in the language of the locale.
    month = http.server.BaseHTTPRequestHandler.monthname[local.tm_mon]
    return f"{local.tm_mday:02d}/{month}/" + time.strftime("%Y:%H:%M:%S %z", local)


@functools.lru_cache(maxsize=None)
def raise_file_limit() -> int:
    """Raise the limit of open files to what is allowed, but not for forked children; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):       # macOS: "unlimited" is refused
        return soft
    # By os.fork(), that is (since Python 3.7): what subprocess starts keeps our limit.
    getattr(os, "register_at_fork", dict)(
        after_in_child=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
    return hard


def host_of(address: Any) -> str:
    """Return the host in a peer's socket address; "" for a unix socket's, a path if anything.

    >>> [host_of((host, 80)) for host in ("192.0.2.1", "::ffff:192.0.2.1", "2001:db8::ffff:1")]
    ['192.0.2.1', '192.0.2.1', '2001:db8::ffff:1']
    >>> host_of("/run/client")
    ''
    """
    host = str(address[0]) if isinstance(address, tuple) and address[0] != "unix:" else ""
    # IPv4 on a socket of both families. By parse_address it would take 5 us.
    return host[7:] if host.startswith("::ffff:") and "." in host else host


class Loop(http.server.HTTPServer):
    """All connections, in one thread; the half of a server that waits.

    Methods for the server: open, turn, close, call_soon.  For connections: forget, and what
    they read: clock, now, wall, stamp; later.
    """

    authenticator: Optional[Authenticator]
    listeners: List[Listener]
    draining = held = False     # it accepts nobody any more; nobody yet
    is_over = False             # nobody takes turns: the loop has ended

    def begin_life(self) -> None:
        """Be a loop without connections; BaseServer's __init__ has done the rest."""
        self.log, self.heads = Log(), HeadReader()
        self.connections: Set[Connection] = set()
        # connections with more requests in their buffers; who came first, comes first
        self.later: Dict[Any, None] = {}
        self.fresh: List[Any] = []              # ... that have just been accepted
        self.unsent: Deque[Any] = collections.deque()       # ... whose answer is ready
        self.calls: Deque[Callable[[], None]] = collections.deque()     # from other threads
        self.answered = self.counted = 0        # requests; those in the statistics already
        self.paused_until = self.offset = 0.0
        self.second, self.tidied = 0, 0.0       # the time in words; when tidy_up() last was
        self.walked = 0.0                       # ... and last looked who is overdue
        self.look_at_clock()

    def open(self) -> None:
        """Begin to wait for whatever may happen."""
        self.is_over = False
        self.calls.clear()          # what was asked for while nobody listened, the flags say, too
        self.limit = max(BATCH, min(MAX_CONNECTIONS, raise_file_limit() - SPARE_FILES))
        self.wake, self.waker = socket.socketpair()
        self.selector = selectors.DefaultSelector()     # an epoll must not be shared by a fork
        self.selector.register(self.wake, selectors.EVENT_READ, self.hear_calls)
        self.accept_again()

    def close(self) -> None:
        """Send and log what is ready, end all connections; but a handler at work may finish."""
        self.is_over = True
        self.send_answers()
        self.save()
        for connection in [item for item in self.connections if item.stage != "thread"]:
            connection.close()
        for closable in (self.selector, self.wake, self.waker):
            closable.close()

    def turn(self, patience: Optional[float]) -> None:
        """Do what there is to do; where there is nothing, wait for something.

        It looks twice. The first look does not wait; only if it finds nothing, and nobody is in
        `later`, there is time to rest, and then to wait. One call more in a quiet turn, so that
        a busy one writes its log once a second.
        """
        self.handshakes = 0
        events = self.selector.select(0)
        self.look_at_clock()
        is_busy = events or self.later
        if not is_busy:
            self.tidy_up()
            events = self.selector.select(PAUSE_SECONDS if self.paused_until else patience)
            self.look_at_clock()
        self.make_calls()       # first: drain() may have to say who is let in no longer
        for key, mask in events:
            self.call(key.data, mask)
            if len(self.unsent) >= BATCH:
                self.send_answers()
        self.send_answers()
        # As many as wait now; each gets one request answered, and may queue again. Who has been
        # left when the time is up is first in the next turn, and sockets are looked at before.
        end = time.monotonic() + SLICE if self.later else 0.0
        for connection in list(self.later):
            del self.later[connection]
            self.call(connection.take_turn)
            self.send_answers()
            if time.monotonic() > end:
                break
        if is_busy and self.clock - self.tidied > 1:
            self.tidy_up()
        self.service_actions()

    def send_answers(self) -> None:
        """Send what has been made ready, a batch at a time.

        To send wakes the client. Where many wait in one process, a proxy's for example, the first
        answer wakes it, and the others find it awake: 17 us of CPU for a request that cost 21.
        """
        while self.unsent:
            # Taken before it is sent: SIGTERM, which comes as SystemExit between any two lines of
            # this, must not find it here, or close() would send it again.
            self.call(self.unsent.popleft().flush)

    def tidy_up(self) -> None:
        """Do what can wait until there is nothing else to do, or for a second.

        Who is overdue is judged here, after all that had come was done: a process that was
        frozen answers what is in its sockets first.
        """
        if self.clock - self.walked > 1:    # 10,000 connections: half a millisecond
            self.walked = self.clock
            for connection in [item for item in self.connections
                               if item.deadline < self.clock and item not in self.later]:
                self.call(connection.expire)
            self.send_answers()
        self.tidied = self.clock
        self.save()

    def save(self) -> None:
        """Write the log, and count what has been answered."""
        self.log.flush()
        if self.answered > self.counted and self.authenticator:
            self.authenticator.table.add("requests", self.answered - self.counted)
            self.counted = self.answered

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function of the loop; a mistake of ours may cost a connection, not the worker."""
        try:
            function(*arguments)
        except Exception:
            self.log.error(f"error: {traceback.format_exc()}")
            if isinstance(getattr(function, "__self__", None), Connection):
                function.__self__.close()       # type: ignore[attr-defined]

    def look_at_clock(self) -> None:
        """Look at the clocks, once a turn; once a second, put the time into words.

        Three clocks: clock, for deadlines, never jumps; wall is what people and HTTP call the
        time; now is the authenticator's, which all who share its table must agree on.
        """
        self.wall, self.clock = time.time(), time.monotonic()
        if int(self.wall) != self.second:
            self.second = int(self.wall)
            date = email.utils.formatdate(self.second, usegmt=True)
            self.stamp = f"Server: authserver\r\nDate: {date}\r\n"
            self.log.date = log_date(self.second)
            if self.authenticator:
                if self.authenticator.shares_nonces:
                    self.authenticator.table.set_clock(self.wall)
                self.offset = self.authenticator.table.offset
        self.now = self.clock + self.offset     # what the authenticator goes by
        if self.paused_until and self.paused_until < self.clock:
            self.accept_again()

    def call_soon(self, call: Callable[[], None]) -> None:
        """Have call made by the loop; from any thread.

        The only thing that other threads may do to it: all else here is the loop's alone, and
        needs no lock.
        """
        self.calls.append(call)
        with contextlib.suppress(OSError, AttributeError):      # awake anyway, or not running
            self.waker.send(b"x", socket.MSG_DONTWAIT)

    def hear_calls(self, events: int) -> None:
        """Take the bytes that woke us, and make the calls that came with them."""
        # In this order: a call that is added after the last popleft() sends a new byte.
        self.wake.recv(4096, socket.MSG_DONTWAIT)
        self.make_calls()

    def make_calls(self) -> None:
        """Make the calls that other threads asked for."""
        for _ in range(len(self.calls)):    # not those that come meanwhile: others wait as well
            self.call(self.calls.popleft())

    def accept_again(self) -> None:
        """Begin to accept connections, or go on after a pause; unless hold() is in force."""
        self.paused_until = 0.0
        if self.held or self.draining:
            return
        for listener in self.listeners:
            # Several workers may wake for one connection; for the late ones accept() must not wait.
            listener.socket.setblocking(False)
            if listener.socket.family != socket.AF_UNIX:
                # Accepted sockets inherit it: one call here instead of one per connection.
                listener.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(KeyError):         # it is there already
                self.selector.register(listener.socket, selectors.EVENT_READ,
                                       functools.partial(self.accept, listener))

    def stop_accepting(self) -> None:
        """Leave new connections to the kernel's queue, or to another process."""
        for listener in self.listeners:
            with contextlib.suppress(KeyError):
                self.selector.unregister(listener.socket)

    def accept(self, listener: Listener, events: int) -> None:
        """Accept some connections.

        Some, not all: who connects 10,000 times must not keep those waiting who are connected.
        The socket stays readable, and the next turn goes on.
        """
        for _ in range(BATCH):
            if self.draining:       # at once: our successor begins to accept
                break
            try:
                # Of an SSLSocket the plain accept(2): its own would wait for the handshake.
                sock, address = socket.socket.accept(listener.socket)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.make_room()
                break
            # Its mistake (verify_request may be a program's) costs this client, not the others.
            self.call(self.admit, listener, sock, address or ("unix:", 0))
        self.welcome()

    def admit(self, listener: Listener, sock: socket.socket, address: Any) -> None:
        """Take a connection; make room for the next one.

        Where all places are taken somebody has to go, and it is who has done nothing for the
        longest time: a flood of idle connections pushes out itself, and refuses nobody new.
        """
        allowed = False
        try:
            allowed = self.verify_request(sock, address)
        finally:
            if not allowed:
                sock.close()
        if not allowed:
            return
        if len(self.connections) >= self.limit:
            self.make_room()
        sock.setblocking(False)
        kind = TLSConnection if listener.context else Connection
        try:
            connection = kind(self, listener, sock, address)    # type: ignore[arg-type]
        except OSError:             # it has left already: a look at the port, no more
            sock.close()
            return
        self.connections.add(connection)
        self.fresh.append(connection)

    def welcome(self) -> None:
        """Read from who has just come: while others came, the first request has come, mostly.

        Who gets an answer and leaves was never watched: two system calls less of eight.
        """
        for connection in self.fresh:
            self.call(connection.ready, selectors.EVENT_READ)
            if not (connection.watched or connection.closing or connection.stage == "thread"):
                connection.watch(False)
        self.fresh.clear()

    def forget(self, connection: Connection) -> None:
        """Strike a connection off the books."""
        self.connections.remove(connection)
        self.later.pop(connection, None)
        connection.unwatch()

    def make_room(self) -> None:
        """Close connections that have waited longest; if there are none, accept none for a while.

        A socket with clients in its queue stays readable: without the pause the loop
        would spin, as http.server's does.
        """
        idle = [item for item in self.connections
                if item.stage in ("first", "idle", "head", "handshake", "linger")
                and not item.output and not item.part and item not in self.later]
        # deadline - WAITS is the time since when it waits; of 64 idle ones one or two have to go.
        for connection in heapq.nsmallest(1 + len(idle) // 64, idle,
                                          key=lambda item: item.deadline - WAITS[item.stage]):
            connection.close()
        if not idle and not self.paused_until:
            self.stop_accepting()
            self.paused_until = self.clock + PAUSE_SECONDS


# Hooks of socketserver that assume one request at a time and a connection for each. Nobody
# calls them here, and what is never called must not look as if it were.
UNUSED_HOOKS = ("get_request", "process_request", "process_request_thread", "shutdown_request",
                "close_request")


class AuthServer(Loop):
    """An HTTPServer that keeps every connection in one loop.

    handler_class may have been through protect(); or it is no class at all, but a page.

    Methods for the caller: serve_forever, handle_request, shutdown, server_close.
    Methods that may be overridden, as on any HTTPServer: verify_request, finish_request,
    handle_error, handle_timeout, service_actions, server_bind, server_activate.
    Methods for daemonize.py: hold, release, drain, probe, reload, status, abandon.
    Instance variables: sockets, workers, greeting, legacy; authenticator, public, proxies.
    """

    request_queue_size = BACKLOG
    reread: Callable[[], None]      # passwords and certificate; whoever knows them sets this
    abandon: Callable[[], None]     # what a start that failed has made
    greeting = forward_auth = ""
    workers = 1                 # a program's own; the command line says one per CPU
    stopping = False

    def __init__(self, server_address: Any, handler_class: Any, bind_and_activate: bool = True,
                 authenticator: Optional[Authenticator] = None,
                 listeners: Sequence[Listener] = (), public: Sequence[Any] = (),
                 stream_threads: int = STREAM_THREADS) -> None:
        for name in UNUSED_HOOKS:
            if getattr(type(self), name, None) is not getattr(http.server.HTTPServer, name, None):
                raise TypeError(f"{type(self).__name__}.{name}() would never be called: AuthServer "
                                f"has a loop and threads of its own")
        is_handler = isinstance(handler_class, (type, functools.partial))
        self.page: Optional[Page] = None if is_handler else handler_class
        self.has_guest = not (handler_class is example or isinstance(handler_class, Files))
        handler_class = only_once(handler_class) if is_handler else handler_class
        guard = find_attribute(handler_class, "authenticator")
        if guard and authenticator and guard is not authenticator:
            raise TypeError("two authenticators: one is protect()'s, the other an argument")
        self.authenticator = authenticator or guard
        self.proxies = find_attribute(handler_class, "proxies") or TrustedProxies()
        self.public = [os.fsencode(prefix) for prefix in public]    # of text, as of bytes
        self.listeners = list(listeners)
        if listeners:
            socketserver.BaseServer.__init__(self, server_address, handler_class)
            self.socket = listeners[0].socket
        else:       # its listener is made when it begins to serve
            http.server.HTTPServer.__init__(self, server_address, handler_class, bind_and_activate)
        self.handlers, self.hashers = Pool(stream_threads), Pool(SLOW_HASHES, SLOW_QUEUE)
        self.reread = self.abandon = lambda: None
        self.stopped = threading.Event()
        # Of those whose table we share: before the first worker of ours.
        self.forebears = (self.authenticator.table.statistics()["workers"]
                          if self.authenticator else 0)
        self.begin_life()

    @property
    def sockets(self) -> List[socket.socket]:
        """What to hand over at a restart."""
        return [listener.socket for listener in self.listeners] or [self.socket]

    @property
    def legacy(self) -> Optional[int]:
        """The memory that an heir shares with us: with it no client notices a restart."""
        return self.authenticator.table.fd if self.authenticator else None

    def server_bind(self) -> None:
        """Bind without asking the DNS for our own name, which HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Serve until shutdown() or drain(), or until a signal handler raises."""
        self.begin()
        is_busy = type(self).service_actions is not socketserver.BaseServer.service_actions
        try:
            self.announce()
            while not self.stopping and not (self.draining and not self.connections):
                # Without connections no deadline runs: sleep until something happens.
                self.turn(poll_interval if self.connections or is_busy else None)
        finally:
            self.close()
            self.stopping = False
            self.stopped.set()

    def handle_request(self) -> None:
        """Serve one request, or wait for `timeout` seconds in vain."""
        self.begin()
        try:
            end = float("inf") if self.timeout is None else self.clock + self.timeout
            before = self.answered
            while self.answered == before and self.clock < end:
                self.turn(min(1.0, max(0.0, end - self.clock)))
            if self.answered == before:
                self.handle_timeout()
            self.drain()        # whoever waits for the rest of an answer gets it
            while self.connections:
                self.turn(1.0)
        finally:
            self.draining = False
            self.close()

    def begin(self) -> None:
        """Open the loop; for a program's own socket, which it may have wrapped for TLS."""
        self.stopped.clear()
        # A folder: now, in the jail and as who serves it, or nobody would know that it cannot be.
        getattr(self.page, "open", lambda: None)()
        if not self.listeners or self.socket not in self.sockets:
            context = getattr(self.socket, "context", None)
            is_safe = context is not None or is_private(self.socket)
            schemes = self.authenticator.offered(is_safe) if self.authenticator else ()
            self.listeners = [Listener(self.socket, schemes, context)]
        self.open()

    def announce(self) -> None:
        """Log the addresses; the first worker does it for all."""
        authenticator = self.authenticator
        if not authenticator or authenticator.table.statistics()["workers"] == self.forebears:
            for address, listener in zip(self.addresses(), self.listeners):
                self.log.error(f"listening on {address} ({', '.join(listener.schemes)})")
            if authenticator and authenticator.max_failures[0]:
                self.log.error("never locked out, for they may be many: clients on loopback, on "
                               "unix sockets, and of proxies without X-Forwarded-For")
        if authenticator:
            authenticator.table.add("workers")
        else:
            self.log.error("warning: no authenticator: everybody is let in")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a handler raised."""
        self.log.error(f"error: {traceback.format_exc()}")

    # -- the end, and what daemonize.py asks for

    def shutdown(self) -> None:
        """End serve_forever() from another thread, and wait for its end."""
        self.stopping = True
        self.call_soon(lambda: None)
        self.stopped.wait()

    def hold(self) -> None:
        """Before the workers are forked: have them accept nobody until release().

        Nobody waits for it long: our predecessor serves until it has been told to drain.
        """
        self.held = True

    def release(self) -> None:
        """End hold(), in a worker; now that the old daemon has stopped accepting."""
        self.held = False
        self.call_soon(self.accept_again)

    def drain(self) -> None:
        """Accept nobody, end connections after their next answer, then end serve_forever().

        Whoever is connected gets one more answer, with Connection: close in it, and knows that
        it has to connect again. An idle connection is closed after DRAIN_SECONDS; a request
        that crosses that close on its way is the client's to repeat (RFC 9112 section 9.3.1).
        """
        self.draining = True
        self.call_soon(self.begin_drain)

    def begin_drain(self) -> None:
        """Do the loop's part of drain().

        After a reload we go since others have new passwords. Who is not among them any more
        gets no last answer here: they are read again. Where we may not (root has read them,
        for a daemon without rights) there was no reload, and who was let in may finish.
        """
        self.stop_accepting()
        with contextlib.suppress(Refusal):
            self.reread()
        for connection in self.connections:
            if connection.stage in ("first", "idle", "handshake"):
                connection.deadline = min(connection.deadline, self.clock + DRAIN_SECONDS)

    def probe(self) -> None:
        """Ask for a page as a client would, in memory; raise Refusal if the answer is not right.

        Without a socket: what can be broken (a folder that cannot be opened, a table that is
        not there, a mistake in this file) shows in the story of a request, wherever it is told.
        """
        getattr(self.page, "open", lambda: None)()
        listener = self.listeners[0]._replace(logs=False)
        client = Connection(self, listener, None, ("unix:", 0))
        story = client.answer(b"GET / HTTP/1.1\r\nHost: probe\r\n\r\n")
        # A story that waits is one that a handler would tell: its turn is not now.
        waits = next(story, None) is not None
        story.close()
        line = client.output.partition(b"\r\n")[0].decode("latin-1")
        if self.authenticator and line.startswith("HTTP/1.1 401"):
            self.authenticator.table.add("challenges", -1)      # nobody was there
        if not waits and not re.match("HTTP/1.1 [1-4]", line):
            raise Refusal(f"unable to probe the server: it answered {escape(line)}")

    def reload(self) -> None:
        """Read passwords and certificate again; raise Refusal, and keep the old, if one is bad."""
        self.reread()

    def addresses(self) -> List[str]:
        """Return where we listen."""
        return [address_of(listener.socket, "https" if listener.context else "http")
                for listener in self.listeners]

    def status(self) -> Dict[str, Any]:
        """Return what the daemon's status should say of the application."""
        known: Dict[str, Any] = {"addresses": self.addresses()}
        if self.authenticator:
            known["users"] = len(self.authenticator.passwords.entries)
            known.update(self.authenticator.table.statistics())
            del known["workers"]        # all that ever were; the daemon knows those of now
        return known

    def server_close(self) -> None:
        """Close the listening sockets."""
        for sock in self.sockets:
            sock.close()


################################################################ PART III: WHAT NOBODY HAS TO READ
#
# Folders of files, TLS, other people's code, proxies that ask, files of secrets, addresses, the
# command line. Parts I and II call a few functions of it, whose names say what they do.


@contextlib.contextmanager
def trying_to(deed: str) -> Iterator[None]:
    """Put a system call that fails into words, for a person: unable to VERB OBJECT: REASON."""
    try:
        yield
    except OSError as error:
        raise Refusal(f"unable to {deed}: {error.strerror or error}")


# -- 11. Files ----------------------------------------------------------------
#
# One mechanism keeps a request inside the tree. A path is decoded once, cut into names,
# and walked from the root's descriptor, one open(2) per name, each relative to the folder
# before it and each with O_NOFOLLOW: so no name can be anything but an entry of that very
# folder, whatever somebody renames meanwhile. There is no check before the open that
# could be out of date: what a descriptor is, fstat(2) says afterwards.
#
# A symlink is refused by the kernel; then it is read, and its text walked in the same way
# from the folder where it lies. Its ".." goes back to the descriptor that we came from,
# and not through ".." of the file system, which may have been moved out of the tree; above
# the root there is none to go back to. An absolute one goes on at the root if its text
# begins with the root's path, and else nowhere. What a link may lead through, also through
# names with a dot, was decided by who made the link.
#
# Everything that is not to be had is an OSError, and STATUS_OF says what the client hears.

# O_PATH: to walk through a folder takes only the right to search it. Linux alone has it.
FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW
# A FIFO must not block (though who waits to write sees a reader come and go), a terminal not
# become ours. os.open adds O_CLOEXEC: PEP 446.
LAST = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
# What a symlink then is (ENOTDIR: with O_DIRECTORY; EMLINK: on FreeBSD), or may be.
IS_LINK = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)
MAX_LINKS = 40          # on one path, as many as the kernel follows: path_resolution(7)
MAX_LISTED = 20000      # entries of a folder; they take 0.1 s, in which nobody else is served
YOUNG = 2.0             # seconds, the coarsest clock of a file system (FAT): what is younger may
                        # still change without a new time
STATUS_OF = dict.fromkeys((
    errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG,
    errno.EINVAL, errno.EILSEQ,         # no link after all; names that this file system cannot have
    errno.ENXIO, errno.ENODEV), 404)    # sockets; devices without a driver
STATUS_OF.update({errno.EACCES: 403, errno.EPERM: 403, errno.EMFILE: 503, errno.ENFILE: 503,
                  errno.ESTALE: 503, errno.EAGAIN: 503})    # another's lease: see fcntl(2)

# The same on every box, whatever its /etc/mime.types says.
TYPES = """
    text/html html htm, text/css css, text/javascript js mjs, text/markdown md, text/csv csv,
    text/plain txt text log conf cfg ini toml yaml yml sh py c h rst diff patch, text/vtt vtt,
    application/json json map, application/xml xml, application/pdf pdf, application/wasm wasm,
    application/manifest+json webmanifest, application/gzip gz tgz, application/zip zip,
    application/x-tar tar, application/x-bzip2 bz2, application/x-xz xz, application/zstd zst,
    font/woff woff, font/woff2 woff2, image/png png, image/jpeg jpg jpeg, image/gif gif,
    image/webp webp, image/avif avif, image/svg+xml svg, image/x-icon ico, audio/mpeg mp3,
    audio/mp4 m4a, audio/ogg ogg oga opus, audio/flac flac, audio/wav wav, video/mp4 mp4 m4v,
    video/webm webm, video/ogg ogv, video/quicktime mov, video/x-matroska mkv"""
TYPE_OF = {"." + extension: kind + ("; charset=utf-8" if kind.startswith("text/") else "")
           for kind, *extensions in map(str.split, TYPES.split(",")) for extension in extensions}
# Python's own, for the rest. What the system has is in other tables (but with Python 3.6).
more_types = functools.lru_cache(maxsize=None)(mimetypes.MimeTypes)


def content_type(name: str) -> str:
    """Return the type of a file, by its last extension.

    Never a Content-Encoding beside it: who downloads an archive wants the archive.

    >>> content_type("a.HTML"), content_type("a.tar.gz"), content_type("README")
    ('text/html; charset=utf-8', 'application/gzip', 'application/octet-stream')
    """
    extension, unknown = os.path.splitext(name.lower())[1], "application/octet-stream"
    return TYPE_OF.get(extension) or more_types().types_map[True].get(extension, unknown)


@functools.lru_cache(maxsize=1024)
def describe(name: bytes, inode: int, size: int, mtime_ns: int, modified: int, is_young: bool,
             is_public: bool) -> Tuple[str, Fields, Sequence[Any]]:
    """Return the tag of a file, the fields of an answer with it, and the proofs for If-Range.

    A young file may change without a new time. So its tag is weak, and not the one that it
    will get: what was kept of its youth is fetched again.

    See: RFC 9110 section 8.8; 13.1.5: for If-Range, a weak one proves nothing.
    """
    weak, dash = ("W/", "-") if is_young else ("", "")
    tag = f'{weak}"{mtime_ns:x}-{size:x}-{inode:x}{dash}"'
    date = email.utils.formatdate(modified, usegmt=True)
    fields = (("Content-Type", content_type(name.decode("latin-1"))), NOSNIFF,
              ("Accept-Ranges", "bytes"), ("ETag", tag), ("Last-Modified", date))
    # As text, for a client has both from us; None: it sends no If-Range.
    proofs = (None,) if is_young else (None, [tag], [date])
    return tag, fields + (() if is_public else PRIVATE), proofs


# RFC 9110 section 8.8.3: entity-tag = [ "W/" ] DQUOTE *etagc DQUOTE
find_tags = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")').findall
# RFC 9110 section 14.1.2: int-range = first-pos "-" [ last-pos ]; suffix-range = "-" suffix-length
match_range = re.compile(r"(?i)bytes=[ \t]*([0-9]{0,99})-([0-9]{0,99})[ \t]*").fullmatch


def has_tag(values: Sequence[str], tag: str, weakly: bool) -> bool:
    """Return whether If-Match, or weakly If-None-Match, has a tag; "*" names any.

    See: RFC 9110 section 8.8.3.2.
    """
    text, [(weak, opaque)] = ",".join(values), find_tags(tag)
    return text.strip(" \t") == "*" or any(
        other == opaque and (weakly or not weak and not mark) for mark, other in find_tags(text))


def read_date(text: str) -> float:
    """Return the seconds of an HTTP-date; NaN, which compares with nothing, if it is none.

    >>> read_date("Sun, 06 Nov 1994 08:49:37 GMT"), read_date("Sun Nov  6 08:49:37 1994")
    (784111777.0, 784111777.0)
    >>> read_date("yesterday")
    nan

    See: RFC 9110 section 5.6.7; 13.1.3: a recipient "MUST ignore" what is no date.
    """
    try:
        # Its zone is GMT, also where none is written.
        return float(calendar.timegm(email.utils.parsedate(text) or ()))
    # By version of Python, that is what it makes of rubbish.
    except (IndexError, OverflowError, TypeError, ValueError):
        return math.nan


def check_conditions(values: Values, tag: str, modified: int) -> int:
    """Return 412 or 304 if a condition says so, or else 200.

    See: RFC 9110 section 13.2.2, whose order this is.
    """
    fails = is_known = False
    if "if-match" in values:
        fails = not has_tag(values["if-match"], tag, False)
    elif "if-unmodified-since" in values:
        fails = modified > read_date(values["if-unmodified-since"][0])
    if "if-none-match" in values:
        is_known = has_tag(values["if-none-match"], tag, True)
    elif "if-modified-since" in values:
        is_known = modified <= read_date(values["if-modified-since"][0])
    return 412 if fails else 304 if is_known else 200


def parse_range(text: str, size: int) -> Optional[Tuple[int, int]]:
    """Return offset and length of the one range asked for, or None for the whole file.

    Length 0 is a range that the file does not have.

    >>> parse_range("bytes=2-", 10), parse_range("bytes=-99", 10), parse_range("bytes=10-", 10)
    ((2, 8), (0, 10), (10, 0))
    >>> parse_range("bytes=0-1,4-5", 10), parse_range("bytes=4-2", 10)
    (None, None)

    See: RFC 9110 section 14.2: "A server MAY ignore the Range header field".
    """
    match = match_range(text)
    first, last = match.groups() if match else ("", "")
    # Of an empty file no Content-Range can name a byte: section 14.4.
    if not size or not first + last or first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    end = min(size, int(last) + 1) if first and last else size
    return start, max(0, end - start)


@functools.lru_cache(maxsize=512)
def decode_path(path: str) -> bytes:
    r"""Return a path without its query, decoded once; b"" if it can be read in two ways.

    Such are names of no length, "." and "..", a NUL, and a slash that came encoded: others
    who read that path, a proxy or --public, may find another file.

    >>> decode_path("/a%20b/c?d"), decode_path("/"), decode_path("/%C3%A4\\")
    (b'/a b/c', b'/', b'/\xc3\xa4\\')
    >>> [decode_path(path) for path in ("//a", "/a/%2e%2E/b", "/a%2fb", "/a%00")]
    [b'', b'', b'', b'']

    See: RFC 3986 section 7.3.
    """
    encoded = path.partition("?")[0].encode("latin-1")
    decoded = urllib.parse.unquote_to_bytes(encoded)
    names = decoded.split(b"/")
    plain = not (b"\0" in decoded or b"." in names or b".." in names or b"" in names[1:-1])
    return decoded if plain and len(names) == encoded.count(b"/") + 1 else b""


def private_fields(request: Request) -> Fields:
    """Return PRIVATE, unless the answer is for everybody."""
    return () if request.username is None else PRIVATE


def refuse(status: int, request: Request, *fields: Tuple[str, str]) -> Answer:
    """Return an answer that says nothing but its status."""
    return error_answer(status, NOSNIFF, *private_fields(request), *fields)


def redirect(path: bytes, request: Request) -> Answer:
    """Send who asked for a folder without the slash to where its relative links work.

    A path that begins with two slashes would be another host's; decode_path has none.

    See: RFC 9110 section 15.4.2; RFC 3986 section 4.2.
    """
    query = request.path[len(request.path.partition("?")[0]):]
    return refuse(301, request, ("Location", f"{urllib.parse.quote(path)}/{query}"))


def read_part(fd: int, offset: int, length: int) -> Union[bytes, FilePart]:
    """Return a part of a file: what is small at once, of what is large a descriptor of its own."""
    if length > IN_MEMORY:
        return FilePart(open(os.dup(fd), "rb", buffering=0), offset, length)
    octets = os.pread(fd, length, offset)
    if len(octets) < length:
        # Its tag would be that of the longer one, for ever.
        raise OSError(errno.ESTALE, "cut since fstat")
    return octets


def answer_file(fd: int, name: bytes, found: os.stat_result, request: Request) -> Answer:
    """Return what a client gets of a file: the whole or a part, unless it has it already.

    See: RFC 9110 section 14.2 (a HEAD has no range), 15.3.7 (206), 15.4.5 (304), 15.5.17 (416).
    """
    size, now, values = found.st_size, request.now, request.values
    # Section 8.8.2.1: it "MUST NOT" be later than the Date; and some dates have no words.
    modified = max(0, min(int(found.st_mtime), int(now)))
    tag, fields, proofs = describe(name, found.st_ino, size, found.st_mtime_ns, modified,
                                   now - found.st_mtime < YOUNG, request.username is None)
    status, part = check_conditions(values, tag, modified), None
    if status == 304:
        return Answer(304, fields[3:])      # from ETag on, what keeps a copy up to date
    if status == 412:
        return refuse(412, request)
    if "range" in values and request.method == "GET" and values.get("if-range") in proofs:
        part = parse_range(",".join(values["range"]), size)
    if part is None:
        return Answer(200, fields, read_part(fd, 0, size))
    offset, length = part
    if not length:
        return refuse(416, request, ("Content-Range", f"bytes */{size}"))
    extent = ("Content-Range", f"bytes {offset}-{offset + length - 1}/{size}")
    return Answer(206, (*fields, extent), read_part(fd, offset, length))


# -- 12. Listings -------------------------------------------------------------

# RFC 3986 section 2.3: unreserved. All else is encoded in href: so nothing in a name can end the
# attribute, and "a:b" has no scheme. (The slash: what is spelled is many names at once.)
RESERVED = re.compile("[^A-Za-z0-9._~/-]+")
quote_run = functools.lru_cache(maxsize=1024)(lambda run: urllib.parse.quote(os.fsencode(run), ""))
# Shown as U+FFFD: controls, what turns the direction of the text, what HTML does not allow.
UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufdd0-\ufdef\ufffe\uffff]")
DIGITS = re.compile("[0-9]+")


def showable(name: str) -> str:
    r"""Return a name of the file system as text; what cannot be shown is replaced.

    >>> showable("a\tb\udce4")
    'a\ufffdb\ufffd'
    """
    if name.isprintable():
        return name
    return UNSHOWABLE.sub("\ufffd", os.fsencode(name).decode("utf-8", "replace"))


def spell(names: Sequence[str]) -> Iterable[Tuple[str, str, str, str]]:
    """Return of each name what sorts it as people do, itself, its href and its text.

    >>> list(spell(["A9&"]))
    [('a00000000000000000009&', 'A9&', 'A9%26', 'A9&amp;')]
    """
    # All names in one text, which takes a third of the time; no name has a slash.
    text = "/".join(names)
    keys = DIGITS.sub(lambda match: match[0].zfill(20), text.lower())
    hrefs = RESERVED.sub(lambda match: quote_run(match[0]), text)
    labels = html.escape(showable(text))
    return zip(keys.split("/"), names, hrefs.split("/"), labels.split("/"))


def human_size(size: int) -> str:
    """Return a number of bytes for people.

    >>> human_size(0), human_size(1023), human_size(1536), human_size(10 << 30)
    ('0 B', '1023 B', '1.5 KiB', '10.0 GiB')
    """
    if size < 1024:
        return f"{size} B"
    power = (size.bit_length() - 1) // 10
    return f"{size / (1 << 10 * power):.1f} {' KMGTPE'[power]}iB"


@functools.lru_cache(maxsize=4096)
def human_date(minute: int) -> str:
    """Return a minute since the epoch as date and time, in UTC.

    >>> human_date(28333333)
    '2023-11-14<i> 22:13</i>'
    """
    # Local time would change with the jail: /etc/localtime is not there. The year 9999 is the last.
    moment = time.gmtime(60 * max(0, min(minute, 4223371679)))
    return time.strftime("%Y-%m-%d<i> %H:%M</i>", moment)


# -- 13. The tree -------------------------------------------------------------
#
# The folder is opened twice. First with all rights, before any port: only to complain while
# a person reads it, and to see which files are the secrets. Then anew, by who serves it: a
# descriptor from outside a jail would lead out of it (fchdir), and that root may open the folder
# does not say that the daemon's user may.
#
# A secret has as many names as somebody gave it: hard links, symlinks, a second mount. So what is
# compared is device and inode, of the file that has been opened. But `passwd` puts a new file in
# the old one's place, and the system gives a freed inode to the next file that is made: to take
# that for the secret would make somebody's page vanish. Hence the time beside the inode, and
# a look at the secret's own path where the two disagree.


def is_below(path: str, folder: str) -> bool:
    """Return whether a path leads into a folder, or to it.

    >>> is_below("/srv/../etc/x", "/etc"), is_below("/etcetera", "/etc")
    (True, False)
    """
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


class Files:
    """The page of a folder: the files below it, and listings.

    For the caller: exposed, which of the secrets lie below it; open() and close().
    secrets are paths of files that are never served, by whatever name they are found;
    chroot is where the process will be locked in before the first request, or None.
    """

    def __init__(self, root: str, hidden: bool = False, secrets: Sequence[str] = (),
                 chroot: Optional[str] = None) -> None:
        self.name, self.hidden, self.fd = root, hidden, -1
        self.path, real = os.path.abspath(root), os.path.realpath(root)
        # How absolute links begin that stay inside.
        self.prefixes = {os.path.join(os.fsencode(path), b"") for path in (self.path, real)}
        self.exposed = [path for path in secrets
                        if is_below(path, real) or is_below(os.path.dirname(path), real)]
        # Those are found by their place: each may be replaced, or made, while we serve. A link has
        # two: where it lies, for it may be given another target (certbot), and where it leads.
        self.inside = [os.path.relpath(place, real) for path in self.exposed for place in {
            os.path.realpath(path),
            os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))}]
        self.known: Dict[Tuple[int, int], Tuple[str, int]] = {}
        self.open()
        self.note_secrets([os.path.realpath(path) for path in secrets])
        self.close()            # it is not what will be served: see above
        if chroot is not None:
            if not is_below(root, chroot):
                raise Refusal(f"unable to serve {root}: it is not below --chroot {chroot}")
            self.path = os.path.join("/", os.path.relpath(real, os.path.realpath(chroot)))

    def open(self) -> None:
        """Open the folder (again): as who serves it, and in the jail."""
        self.close()
        with trying_to(f"serve {self.name}"):
            # The dot: in a folder that may be read but not searched, no file can be opened.
            self.fd = os.open(os.path.join(self.path, "."), os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        """Close the folder; the next request opens it again."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def note_secrets(self, paths: Sequence[str]) -> None:
        """Note device and inode of secrets, and when they were written."""
        for path in paths:
            with contextlib.suppress(OSError):      # not made yet, or out of our sight
                found = os.stat(path, dir_fd=self.fd)
                self.known[found.st_dev, found.st_ino] = path, found.st_mtime_ns

    def is_secret(self, found: os.stat_result) -> bool:
        """Return whether a file is one of the secrets."""
        if (found.st_dev, found.st_ino) not in self.known:
            return False
        path, written = self.known[found.st_dev, found.st_ino]
        try:
            # Or else it was replaced since, removed, and its inode has become another file's.
            return (found.st_mtime_ns == written
                    or os.path.samestat(found, os.stat(path, dir_fd=self.fd)))
        except OSError:         # outside the jail, or not for us to see
            return True

    def __call__(self, request: Request) -> Answer:
        """Answer a request with a file, a listing, a redirection or a refusal.

        What is hidden is 404, not 403: that would say that there is something.
        """
        if self.fd < 0:
            self.open()
        self.note_secrets(self.inside)
        path = decode_path(request.path)
        try:
            if not path or b"/." in path and not self.hidden:
                raise FileNotFoundError(errno.ENOENT, "no such name")
            return self.find(path.split(b"/")[1:], request)
        except IsADirectoryError:
            return redirect(path, request)
        except OSError as error:
            if error.errno not in STATUS_OF:
                raise
            return refuse(STATUS_OF[error.errno], request)

    def find(self, names: List[bytes], request: Request) -> Answer:
        """Answer with a file, or with a folder's index.html or listing.

        An index.html that may not be read is 403, and not a listing: who put it there did not
        mean the names to be read.
        """
        if names[-1]:
            return self.send(names, request)
        try:
            return self.send(names[:-1] + [b"index.html"], request)
        except OSError as error:
            if error.errno != errno.EISDIR and STATUS_OF.get(error.errno or 0) != 404:
                raise
        return self.list(names, request)

    def send(self, names: List[bytes], request: Request) -> Answer:
        """Answer with a file; its descriptor says what it is, the name may be another's by now."""
        fd, found = self.walk(names)
        try:
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, "a folder")
            # Once more: `passwd` may have put a new file there between our look and the open(2).
            self.note_secrets(self.inside)
            if not stat.S_ISREG(found.st_mode) or self.is_secret(found):
                raise FileNotFoundError(errno.ENOENT, "not for clients")
            return answer_file(fd, names[-1], found, request)
        finally:
            os.close(fd)

    def list(self, names: List[bytes], request: Request) -> Answer:
        """Answer with the listing of a folder.

        By the descriptor again: listed is what was opened, and not what has its name by now.
        """
        fd, _ = self.walk(names)
        try:
            found = [name for name in os.listdir(fd) if self.hidden or name[0] != "."]
            rows = self.rows(found[:MAX_LISTED], fd, names[:-1])
        finally:
            os.close(fd)
        head = "<table><tr><th>Name<th>Size<th>Modified<i> (UTC)</i>\n"
        above = '<tr><td><a href="../">../</a><td><td>\n' if len(names) > 1 else ""
        rest = f"<p>{MAX_LISTED} of {len(found)} names." if len(found) > MAX_LISTED else ""
        title = "/" + "/".join([showable(os.fsdecode(name)) for name in names])
        page = html_page(title, f"{head}{above}{''.join(rows)}</table>{rest}")
        return Answer(200, (HTML, NOSNIFF, *private_fields(request)), page)

    def rows(self, names: Sequence[str], fd: int, above: List[bytes]) -> List[str]:
        """Return the lines of a listing: what of a folder's names can be had; folders first.

        No link of a listing leads to a 403 or 404. To find out by opening each file would take
        three system calls for a name; lstat(2) alone answers for nearly all.
        """
        lines = []
        for key, name, href, label in spell(names):
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISLNK(found.st_mode):
                    link, found = self.walk(above + [os.fsencode(name)])
                    os.close(link)
            except OSError:         # removed meanwhile; a link that leads nowhere, or outside
                continue
            mode, is_file = found.st_mode, stat.S_ISREG(found.st_mode)
            if not (is_file or stat.S_ISDIR(mode)) or self.is_secret(found):
                continue
            # What everybody may read (and a folder, search) needs no system call more.
            needed = 0o444 if is_file else 0o555
            if mode & needed != needed and not os.access(name, needed & 7, dir_fd=fd):
                continue
            slash, size = ("", human_size(found.st_size)) if is_file else ("/", "")
            date = human_date(int(found.st_mtime) // 60)
            line = f'<tr><td><a href="{href}{slash}">{label}{slash}</a><td>{size}<td>{date}\n'
            lines.append((is_file, key, name, line))
        return [line for *_, line in sorted(lines)]

    def walk(self, names: List[bytes]) -> Tuple[int, os.stat_result]:
        """Open what names lead to; an empty last one makes sure of a folder.

        Two stacks: the folders opened on the way, so that ".." needs no name, and the names left,
        on which those of a link are put. Of the last name it is not known what it is, so it is
        opened to be read, at once; there is no moment between a look at it and its use.

        See: openat(2); O_NOFOLLOW in open(2); path_resolution(7).
        """
        opened, left, links = [self.fd], names[::-1], 0
        try:
            while left:
                name = left.pop()
                if name == b"..":           # of a link: decode_path lets none pass
                    if len(opened) == 1:
                        raise FileNotFoundError(errno.ENOENT, "outside")
                    os.close(opened.pop())
                    left = left or [b""]        # a link's last word: that folder itself
                    continue
                try:
                    flags = FOLDER if left else LAST
                    opened.append(os.open(name or b".", flags, dir_fd=opened[-1]))
                except OSError as error:
                    links += 1                  # a loop of links ends here
                    if error.errno not in IS_LINK or links > MAX_LINKS:
                        raise
                    left = left + self.read_link(name, opened) or [b""]
            found = os.fstat(opened[-1])        # first: should it fail, `finally` closes this, too
            return opened.pop(), found
        finally:
            for fd in opened[1:]:
                os.close(fd)

    def read_link(self, name: bytes, opened: List[int]) -> List[bytes]:
        """Return the names in a symlink's text, last first; an absolute one goes by the root."""
        text = os.readlink(name, dir_fd=opened[-1])
        # Up to the root by the folders that we came through. "./", for behind the prefix there
        # may be one more slash, and the text would be absolute again.
        for prefix in self.prefixes:
            if (text + b"/").startswith(prefix):
                text = b"../" * (len(opened) - 1) + b"./" + text[len(prefix):]
        if text.startswith(b"/"):
            raise FileNotFoundError(errno.ENOENT, "outside")
        return [part for part in text.split(b"/")[::-1] if part not in (b"", b".")]


# -- 14. HTTPS ----------------------------------------------------------------
#
# The way that documentations show, to wrap the listening socket, shakes hands in accept(): one
# client that connects and says nothing stops the server for everybody. Here accept(2) is the
# plain one, and the handshake a stage of the connection, with a deadline like all others.
#
# Whatever is found on a port is sent to it: half of a handshake, noise, HTTP in clear. None of it
# is an error of ours, so each is one line in the log, with the reason that OpenSSL gives.

def expiry_of(certificate: str) -> float:
    """Return when the first certificate of a PEM text ends, in seconds since the epoch."""
    der = ssl.PEM_cert_to_DER_cert(certificate[certificate.index("-----BEGIN CERT"):
                                               certificate.index("-----END CERT") + 25])
    # RFC 5280 section 4.1.2.5: validity is two times, each a UTCTime or a GeneralizedTime.
    found = re.findall(rb"\x17\r(\d{12})Z|\x18\x0f(\d{14})Z", der)
    short, long = found[1]
    digits = (long or (b"20" if short < b"5" else b"19") + short).decode("ascii")
    return float(calendar.timegm(time.strptime(digits, "%Y%m%d%H%M%S")))


def tls_context(certificate: str, key: Optional[str]) -> Any:
    """Return the context of HTTPS: TLS 1.2 and 1.3, and otherwise ssl's own defaults.

    One for all workers, made before they are forked: so each can go on with a session that
    another has begun, for they have the same keys of its tickets.
    """
    text, key = read_secrets("certificate", certificate, is_strict=False), key or certificate
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        expiry = expiry_of(text)
    except (ValueError, IndexError):
        raise Refusal(f"unable to use certificate {certificate}: there is none in it (PEM)")
    with trying_to(f"use key {key}"):
        try:
            context.load_cert_chain(certificate, key, password=lambda: "")     # ask no terminal
        except ssl.SSLError as error:
            raise Refusal(f"unable to use key {key}: " + (
                f"it is not that of {certificate}" if "MISMATCH" in str(error) else
                f"there is none in it, or it is encrypted\n"
                f"try: openssl pkey -in {shlex.quote(key)} -out NEW"))
    # OpenSSL takes a key whoever may read it; we do not. Last: of a certificate without a key in
    # its file everybody may read all, and what its owner has to hear is that the key is missing.
    read_secrets("key", key)
    # OpenSSL 3 refuses it by itself: a client could have the arithmetic done for ever.
    context.options |= getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    if hasattr(context, "minimum_version"):     # since Python 3.7
        context.minimum_version = ssl.TLSVersion.TLSv1_2
    else:
        context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    if hasattr(context, "num_tickets"):         # since Python 3.8
        # OpenSSL would send two with each handshake, which costs it 5 % more. Who opens several
        # connections at once does without, and each that goes on brings a ticket of its own.
        context.num_tickets = 1
    if expiry < time.time():
        warn(f"certificate {certificate} has expired")
    return context


class TLSConnection(Connection):
    """A connection whose bytes are encrypted; what it adds is how to wait.

    Three things are different. Before the first byte there is a handshake, of which each half
    may have to wait for the other side. To read may need a write, and the other way round
    (SSLWantReadError, SSLWantWriteError). And bytes can lie decrypted in the TLS layer, where
    no selector sees them: so READ_SIZE is that of a record (RFC 8446 section 5.1).

    See: ssl, "Notes on non-blocking sockets".
    """

    __slots__ = ()

    def __init__(self, server: "AuthServer", listener: "Listener", sock: Any, address: Any) -> None:
        sock = listener.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        super().__init__(server, listener, sock, address)
        self.wait("handshake")

    def ready(self, events: int) -> None:
        """Shake hands first; BATCH of them a turn, so that a crowd leaves time for the others."""
        if self.stage == "handshake":
            self.server.handshakes += 1
            if self.server.handshakes > BATCH or not self.shake_hands():
                return          # if one too many: the selector says so again
        super().ready(events)

    def shake_hands(self) -> bool:
        """Go on with the handshake as far as it goes; return whether it is done.

        In the loop, since a thread could be kept by a client that says nothing. The arithmetic
        of it (1 ms with a key of 2048 bits) is all that others wait for.
        """
        try:
            self.socket.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as wish:
            self.watch(isinstance(wish, ssl.SSLWantWriteError))
        except (OSError, ValueError) as error:
            said = str(getattr(error, "reason", None) or error)
            self.give_up(re.sub(r" \(_ssl\.c:\d+\)", "", said))
        else:
            self.watch(False)
            self.wait("first")
            return True
        return False

    def give_up(self, reason: str) -> None:
        """End a handshake that failed: with words, where plain HTTP has come."""
        plain = reason == "HTTP_REQUEST"
        self.server.log.error(f"{self.host or '-'}: refused -: " + (
            "plain HTTP, where HTTPS is spoken" if plain else f"TLS: {reason}"))
        if plain:
            page = html_page("HTTPS only", "<p>Ask again with https://")
            head = (f"{STATUS_LINES[400]}{self.server.stamp}Content-Type: {HTML[1]}\r\n"
                    f"Content-Length: {len(page)}\r\nConnection: close\r\n\r\n")
            with contextlib.suppress(OSError):
                # Under the encryption; it is 1 KiB, which an empty buffer takes at once. And
                # what has come is read, or to close would be a reset, and the answer lost.
                socket.socket.send(self.socket, head.encode("ascii") + page)
                socket.socket.recv(self.socket, READ_SIZE)
        self.close()

    def send(self, octets: bytes) -> int:
        """Return how many bytes went; encrypted is no more than may go now."""
        return super().send(octets[:IN_MEMORY])

    def send_part(self, part: FilePart) -> int:
        """Return how many bytes of a file went: through our memory, to be encrypted.

        By pread(2), at an offset: several answers may be sending the same open file.
        """
        octets = os.pread(part.file.fileno(), min(part.length, IN_MEMORY), part.offset)
        if not octets:
            raise EOFError
        return self.send(octets)

    def shut(self) -> None:
        """Say that nothing more will come, as TLS says it (close_notify).

        Without it a client cannot tell our end from that of somebody who cut the line, and an
        answer without a length would look whole. For the client's own we do not wait.
        See: RFC 8446 section 6.1.
        """
        with contextlib.suppress(OSError, ValueError):      # it wants to wait for the client's
            self.socket.unwrap()
        super().shut()

    def close(self) -> None:
        """Say so, and forget the connection."""
        if self in self.server.connections and self.stage not in ("handshake", "linger", "thread"):
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()
        super().close()


# -- 15. Other people's handlers ----------------------------------------------
#
# A handler class is run by http.server's own code, unmodified, in a thread. To it an exchange
# looks like a socket whose client sends one request and hangs up. What it writes is passed on
# at once; only the head of its answer is read along, for the status in the log, for the
# fields that a proof needs, and to know where the answer ends: only then can the connection
# serve another request.
#
# What cannot be followed (a descriptor that was handed out, another protocol, more or fewer
# bytes than announced) ends the connection after the handler, with nothing added.
#
# Why not derive from the handler, and put our own methods in the place of http.server's? The
# first version did. Each handler that names a base class (SimpleHTTPRequestHandler.end_headers(
# self)) went past us, into code that expected a socket; one that wrote to the socket was answered
# twice. At the socket there is no way past: whatever a handler does, it does by bytes.
#
#     host_handler()            the loop's half (9): lends us to a thread, and waits
#       HandlerSocket()         in the thread: finish_request(), which is socketserver's hook
#         recv()                the head, the body, its end
#         send()                take() of the Follower, then put(): the client
#       is_silent()             ... in the loop again: has anybody been answered?
#       ends_connection()       ... and does everybody know where the answer ended?

# RFC 9112 section 4: status-line = HTTP-version SP status-code SP [ reason-phrase ]
match_status_line = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])[ \r]").match
find_length = re.compile(rb"(?i)\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r").search
is_chunked = re.compile(rb"(?i)\ntransfer-encoding:[^\n]*chunked[ \t]*\r").search
find_bare_lf = re.compile(rb"(?<!\r)\n").search      # whose end of a head nobody agrees upon
says_close = re.compile(rb"(?i)\nconnection:(?:[^\n]*,)?[ \t]*close[ \t]*[,\r]").search


class Follower:
    """Reads an answer along, as the bytes of it pass.

    It changes two things: it adds fields to the head (the proof that we know HA1, Connection:
    close where we mean it), and it cuts off bytes that were not announced, for the client would
    take them for the beginning of the next answer.

    Instance variables: status; size, of the body so far; fault, what was wrong with it; closes,
    it is the last one on its connection; upgraded, what follows is another protocol.
    """

    def __init__(self, request: Request, body: Body, draining: bool) -> None:
        self.request, self.body = request, body
        self.closes = draining or not (request.minor and request.fields.keep_alive)
        self.head = b""                         # of the answer, until it is whole
        self.announced: Optional[Body] = None   # what it announced; None: all that comes
        self.status, self.size, self.fault = 0, 0, ""
        self.upgraded = self.raw = False        # raw: it is not to be understood

    def take(self, octets: bytes) -> bytes:
        """Return what of these bytes goes to the client; of a head that is not whole, nothing.

        What we add to a head has to be in it when it goes. And what is no head at all goes as it
        is: a handler may speak whatever it likes with its client, but then it is the last one.
        """
        if self.status or self.raw:
            return self.cut(octets)
        self.head, passed = self.head + octets, b""
        while self.head and not self.status:
            end = self.head.find(b"\r\n\r\n") + 4
            is_odd = find_bare_lf(self.head, 0, end if end > 3 else len(self.head))
            found = None if is_odd else match_status_line(self.head)
            if end < 4 and len(self.head) <= MAX_HEAD and (found or len(self.head) < 16):
                break
            if end < 4 or not found:
                self.fault = "the handler's answer has no head to be read"
                return passed + self.give_up()
            head, self.head, status = self.head[:end], self.head[end:], int(found.group(2))
            if status >= 200 or status == 101:
                rest, self.head, self.status = self.head, b"", status
                passed += self.complete(head, found.group(1) == b"1") + self.cut(rest)
            # 100 Continue and its like: another follows. Who has sent its body has been told so.
            elif status != 100 or not self.body.is_read:
                passed += head
        return passed

    def give_up(self) -> bytes:
        """Return what was held back; from now on nothing is."""
        head, self.head, self.raw = self.head, b"", bool(self.head) or self.raw
        return head

    def complete(self, head: bytes, is_new: bool) -> bytes:
        """Return the head with what verdict and connection have to say; find the answer's end.

        In the order of RFC 9112 section 6.3: first what has no body, whatever its fields say (a
        HEAD has the length of the GET); then chunks, which outdo a length; else all that comes.
        """
        length, status, request = find_length(head), self.status, self.request
        self.upgraded = status == 101 or request.method == "CONNECT" and status < 300
        if self.upgraded:
            return head
        if request.method == "HEAD" or status in NO_CONTENT:
            self.announced = Body(0, False)
        elif is_chunked(head):
            self.announced = Body(0, True)
            self.announced.room = sys.maxsize   # a download, or a stream that never ends
        elif length:
            self.announced = Body(int(length.group(1)), False)
        says_so = bool(says_close(head))
        self.closes = self.closes or says_so or not (is_new and self.announced)
        fields = field_lines(request.verdict.fields) + CLOSE * (self.closes and not says_so)
        line = head.find(b"\r\n") + 2
        return head[:line] + fields.encode("latin-1", "replace") + head[line:]

    def cut(self, octets: bytes) -> bytes:
        """Return bytes of the answer's body, without those that nobody has announced."""
        if self.announced:
            try:
                self.announced.feed(octets)
            except BadRequest as error:
                self.fault, self.announced = f"the handler sent a malformed {error}", Body(0, False)
                return b""
            more = self.announced.take_rest() if self.announced.done else b""
            if more:
                self.fault, octets = "the handler sent more than it announced", octets[:-len(more)]
        self.size += len(octets)
        return octets


class HandlerSocket:
    """What a handler takes for the client's socket.

    Reading gives the head, the body as it came, and then its end.  Writing goes to the client.

    Instance variables for the server: verdict; follower, which knows the answer; nonsense, what
    was wrong with the body; gone, the client; is_shut, bypassed, failed: what became of it.
    """

    def __init__(self, connection: Connection, octets: bytes, request: Request, body: Body) -> None:
        self.connection, self.body, self.verdict = connection, body, request.verdict
        self.pending = octets                   # for the handler to read
        self.follower = Follower(request, body, connection.server.draining)
        self.nonsense: Optional[BadRequest] = None
        # The client has left; the handler has closed it, has handed it out, has raised.
        self.gone = self.is_shut = self.bypassed = self.failed = False
        self.timeout: Optional[float] = None    # as the handler wants it
        self.patience = PACE_SECONDS            # for bytes of the body
        self.is_parsed = False                  # the handler has seen the request
        self._io_refs, self._closed = 0, False  # for makefile()

    # http.server's streams are the socket module's own: these are all that they need. Closed it
    # is when the last file made of it has been.
    makefile, close = socket.socket.makefile, socket.socket.close
    __enter__, __exit__ = socket.socket.__enter__, socket.socket.__exit__
    _decref_socketios = socket.socket._decref_socketios     # type: ignore[attr-defined]

    def _real_close(self) -> None:
        self.is_shut = True

    def shutdown(self, how: int) -> None:
        """End one direction, or both; the client sees it when the handler returns."""
        self.is_shut = self.is_shut or how != socket.SHUT_RD

    def settimeout(self, seconds: Optional[float]) -> None:
        """Set how long a handler wants to wait; we do not wait longer than PACE_SECONDS."""
        self.timeout = None if seconds is None else float(seconds)

    def gettimeout(self) -> Optional[float]:
        """Return that."""
        return self.timeout

    def setblocking(self, blocking: bool) -> None:
        """Set whether it wants to wait at all."""
        self.timeout = None if blocking else 0.0

    def __getattr__(self, name: str) -> Any:
        """Return what the real socket has; what could carry bytes past us is the last we know."""
        if name not in ("family", "type", "proto", "getsockname", "getpeername", "getsockopt",
                        "setsockopt", "cipher", "version", "getpeercert", "context"):
            self.bypassed = True
            self.put(self.follower.give_up())
            # A child that is given the descriptor expects one that waits.
            self.connection.socket.settimeout(None)
        return getattr(self.connection.socket, name)

    # -- reading

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Return some of what the client sent, for this request; b"" is its end."""
        if not self.pending and self.follower.upgraded:
            self.pending = self.receive(None)
        elif not self.pending:
            self.pending, self.body.taken = self.body.taken or self.receive_body(), b""
        piece, rest = self.pending[:size], self.pending[size:]
        if not flags & socket.MSG_PEEK:
            self.pending = rest
        return piece

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        """Fill a buffer with it."""
        view = memoryview(buffer).cast("B")
        piece = self.recv(min(size or len(view), len(view)), flags)
        view[:len(piece)] = piece
        return len(piece)

    def receive(self, patience: Optional[float]) -> bytes:
        """Return what comes next from the client."""
        octets = self.connection.take_buffer()
        if not octets:
            self.set_timeout(patience)
            octets = self.connection.socket.recv(IN_MEMORY)
        return octets

    def receive_body(self) -> bytes:
        """Return what comes next of the body; as it came, chunks and all."""
        if self.body.done:
            return b""
        start, octets = time.monotonic(), self.receive(self.patience)
        self.patience += len(octets) * PACE_SECONDS / IN_MEMORY - (time.monotonic() - start)
        self.patience = min(self.patience, PACE_SECONDS)
        try:
            self.body.feed(octets)
        except BadRequest as error:             # what came before it must not pass for all
            self.nonsense = error
            raise ConnectionAbortedError(errno.ECONNABORTED, str(error))
        finally:
            self.gone = not octets
            if self.gone or self.nonsense:      # nothing more can be read
                self.body.done, self.body.rest = True, bytearray()
        rest = self.body.take_rest() if self.body.done else b""
        self.connection.buffer = rest
        return octets[:len(octets) - len(rest)]

    def set_timeout(self, seconds: Optional[float]) -> None:
        """Have the real socket wait for so long, or less if the handler wants it so.

        Never 0, which means not to wait, nor less: patience may be used up, and to say so is
        the real socket's part, by its own exception.
        """
        limits = [limit for limit in (seconds, self.timeout) if limit is not None]
        self.connection.socket.settimeout(max(0.01, min(limits)) if limits else None)

    # -- writing

    def send(self, data: Any, flags: int = 0) -> int:
        """Send all of it: who writes here waits for the client anyway."""
        if self.is_shut:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        view = memoryview(data).cast("B")
        # In pieces: each has a deadline of its own, and to follow an answer copies what passes.
        for start in range(0, len(view), IN_MEMORY):
            self.put(self.follower.take(bytes(view[start:start + IN_MEMORY])))
        return len(view)

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send data."""
        self.send(data)

    def sendfile(self, file: Any, offset: int = 0, count: Optional[int] = None) -> int:
        """Send a file, or a part of it.  See: socket.socket.sendfile."""
        file.seek(offset)
        left = math.inf if count is None else count
        sizes = [self.send(octets) for octets in iter(
            lambda: file.read(int(min(IN_MEMORY, left - file.tell() + offset))), b"")]
        return sum(sizes)

    def put(self, octets: bytes) -> None:
        """Send bytes at the client's pace, if that is not too slow."""
        try:
            if octets:          # or a socket that is not ours any more would be asked, for nothing
                self.set_timeout(PACE_SECONDS)      # of a whole sendall, since Python 3.5
                self.connection.socket.sendall(octets)
        except OSError:
            self.gone = True            # or as good as gone: it does not read
            raise

    # -- its whole life, in a thread

    def __call__(self) -> None:
        """Run the handler, however long it takes.

        Nothing that it does is an error of ours. What it raises because its client has left, or
        has sent nonsense, is not its own error, either, and no line in the log.
        """
        server, connection, answer = self.connection.server, self.connection, self.follower
        try:
            server.finish_request(self, connection.address)     # type: ignore[arg-type]
        except BaseException:           # SystemExit, too: the loop goes on without this thread
            self.failed = True
            if not self.gone and not self.nonsense:
                server.handle_error(self, connection.address)
        if answer.head:                 # what looked like the beginning of an answer
            with contextlib.suppress(OSError):
                self.put(answer.give_up())
        if not self.gone and answer.announced and not answer.announced.done:
            answer.fault = answer.fault or "the handler sent less than it announced"

    def is_silent(self) -> bool:
        """Return whether nothing has been answered, and somebody is there to be told."""
        answer = self.follower
        return not (answer.status or answer.raw or self.bypassed or self.gone)

    def ends_connection(self) -> bool:
        """Return whether nobody knows, or everybody, that this answer was the last one here."""
        answer = self.follower
        return bool(answer.fault or answer.closes or answer.upgraded or self.nonsense or self.gone
                    or self.failed or self.bypassed)


class Once(http.server.BaseHTTPRequestHandler):
    """What goes before every handler: one verdict is for one request.

    For handlers: remote_user and auth_type, the user and the scheme.

    http.server would go on to read where the first request ends. There is its body, if the
    handler did not want it: written by who knows whom, and let in by the first one's password.
    """

    remote_user: Optional[str] = None
    auth_type = ""
    needs_server = True         # which asks for the password; protect() needs none
    _given: Any = None          # self.request, before a handler has wrapped it

    def setup(self) -> None:
        """Note what we were given, before a handler does something to it."""
        self._given = self.request
        super().setup()

    @property
    def _lent(self) -> Optional[HandlerSocket]:
        """The socket, if AuthServer serves us."""
        # self.request, too: a handler's own setup() need not have called ours.
        for sock in (self._given, self.request):
            if isinstance(sock, HandlerSocket):
                return sock
        return None

    def handle_one_request(self) -> None:
        """Handle it, and no more: to handle() this was the last one."""
        super().handle_one_request()
        if self._lent:
            self.close_connection = True

    def parse_request(self) -> bool:
        """Parse the first request, and end the connection, as far as we know it, at the second."""
        sock = self._lent
        if sock:
            if sock.is_parsed:
                self.close_connection = True
                return False
            sock.is_parsed, verdict = True, sock.verdict
            self.remote_user, self.auth_type = verdict.username, verdict.scheme
        elif self.needs_server:
            raise PermissionError("nobody has been asked for a password: AuthServer was gone round")
        return super().parse_request()

    def log_request(self, code: Union[int, str] = "-", size: Union[int, str] = "-") -> None:
        """Leave it to AuthServer's access log, unless the handler has a log of its own."""
        base, own = http.server.BaseHTTPRequestHandler, super().log_request
        if not self._lent or base.log_message is not type(
                self).log_message or base.log_request is not getattr(own, "__func__", own):
            own(code, size)


def only_once(handler_class: Any) -> Any:
    """Return a class of handlers with Once before it; also inside a functools.partial."""
    if isinstance(handler_class, functools.partial):
        return functools.partial(only_once(handler_class.func), *handler_class.args,
                                 **handler_class.keywords)
    is_http = issubclass(handler_class, http.server.BaseHTTPRequestHandler)
    if not is_http or issubclass(handler_class, Once):
        return handler_class
    return type(handler_class.__name__, (Once, handler_class), {})


def find_attribute(handler_class: Any, name: str) -> Any:
    """Return what protect() has put before a handler, also inside a functools.partial; or None."""
    while isinstance(handler_class, functools.partial):
        handler_class = handler_class.func
    return getattr(handler_class, name, None)


# -- 16. protect() and protect_wsgi() -----------------------------------------
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
#
#     handle_one_request()      http.server's: reads the request line
#       parse_request()         ours; where AuthServer has asked already, no more than the next line
#         parse_request()       http.server's
#         parse_head()          ours: is it the same that http.server has read?
#         Gate.judge()          the authenticator; it may call for the body (auth-int)
#         refuse()              401, and the rest of the body is read: the handler never runs
#       do_GET()                the handler's
#         end_headers()         ours: Authentication-Info
#
#     application(environ)      ours: judge_environ(), which is all of this for WSGI
#       application(environ)    theirs, with REMOTE_USER

LINGER_SECONDS = 10.0       # for which a refused client may go on sending
TABLES: "weakref.WeakValueDictionary[str, SharedTable]" = weakref.WeakValueDictionary()


def open_shared_file(name: str, size: int) -> int:
    """Return a descriptor of a file of that size which all processes of our user share."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    path = os.path.join(base, f"authserver-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    # Opened first, then looked at: what is looked at by its name may be another one afterwards.
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        found = os.fstat(folder)
        # Where everybody may make a folder, somebody else may have been first.
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PermissionError(errno.EACCES, f"others have access to {path}")
        # Until it is closed: between another's open and its lock, a file looks unused.
        fcntl.flock(folder, fcntl.LOCK_EX)
        # Not those that we use: to close a file would end all our record locks on it.
        for other in set(os.listdir(folder)) - set(TABLES):
            fd = os.open(other, os.O_RDWR | os.O_NOFOLLOW, dir_fd=folder)
            with open(fd, "rb+"), contextlib.suppress(BlockingIOError):     # in use
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(other, dir_fd=folder)
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=folder)
        fcntl.flock(fd, fcntl.LOCK_SH)          # for as long as any of us lives
        missing = size - os.fstat(fd).st_size
        # Written, and now: of a hole a full disk would make a page that is not there (SIGBUS).
        if os.pwrite(fd, bytes(missing), size - missing) < missing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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


def read_on(read: Callable[[], bytes]) -> bool:
    """Read what a refused client still sends; return whether that has come to an end.

    Not for ever: a client that sends a byte now and then would hold a thread, and of those a
    server of other people's has few.
    """
    end = time.monotonic() + LINGER_SECONDS
    while time.monotonic() < end:
        if not read():
            return True
    return False


class Gate:
    """The authenticator before other people's code, with what it needs to know of the host.

    Unless schemes says what is offered, Basic is not where it could be listened to: there the
    password itself would be read, and not only what it protects.
    """

    def __init__(self, passwords: Passwords, trusted_proxies: Optional[Sequence[str]],
                 offer: Dict[str, Any], share: bool = False) -> None:
        # Before anything asks it something: a dict has no realm, and would say so less clearly.
        if not isinstance(passwords, Passwords):
            raise TypeError(f"unable to use {passwords!r:.40} as passwords: expected "
                            f'Passwords({{"jim": "secret"}}, realm="files")')
        # To the program's own log: it has a name there, and who is in charge may silence it.
        import logging          # 8 ms, only for programs
        self.log = logging.getLogger("authserver")
        if share and "table" not in offer:
            try:
                offer["table"] = shared_table(passwords)
            except OSError as error:
                self.log.warning("unable to share nonces with other processes: %s", error)
        self.authenticator = Authenticator(passwords, **offer)
        self.proxies = TrustedProxies(trusted_proxies)
        for warning in passwords.warnings:
            self.log.warning(warning)

    def judge(self, attempt: Attempt, peer: str, forwarded: str, is_safe: bool,
              read: Callable[[], bytes]) -> Verdict:
        """Return the verdict on an attempt of peer, whose body read() would return.

        is_safe: nobody can listen on its way.
        """
        authenticator = self.authenticator
        attempt.read_body = functools.partial(call_for, read)
        # Whom a proxy speaks for, before anything is judged: a lock-out would hit that one. Cut,
        # for it is remembered, and who asks may have written it; a proxy's word is at the end.
        host, attempt.client = self.proxies.find_client(peer, forwarded[-MAX_TEXT:])
        if authenticator.shares_nonces:     # with machines that must agree on the time of day
            authenticator.table.set_clock(time.time())
        attempt.time, attempt.schemes = authenticator.clock(), authenticator.offered(is_safe)
        try:
            verdict = at_once(authenticator.judge(attempt))
        except BadRequest as error:         # from read_body
            verdict = Verdict(error.status, reason=str(error))
        if verdict.status != 200 and verdict.reason != "no credentials":
            self.log.warning("%s: refused %s: %s", host, log_name(verdict.log_user), verdict.reason)
        return verdict


class Guard(Once):
    """What protect() puts before a handler; on AuthServer, which has asked already, idle.

    It comes first in the class that protect() makes, so that no handler's own parse_request()
    or end_headers() goes before it; where a handler has one, super() leads there.
    """

    gate: Gate
    authenticator: Authenticator
    needs_server = False
    info: Fields = ()           # for the handler's answer
    expects = unread = False    # a client that waits for 100 Continue; a body nobody has read

    def parse_request(self) -> bool:
        """Ask for the password when http.server has read a head and before it acts on it."""
        self.info, self.expects = (), False         # not those of the last request
        if self._lent:                              # AuthServer adds its fields itself
            asked = self._lent.connection.server.authenticator
            if asked is None or asked.passwords is not self.authenticator.passwords:
                raise PermissionError("AuthServer has not asked for the password of protect()")
            passes = super().parse_request()
        else:
            verdict = self.ask()
            passes, self.info = verdict.status == 200, verdict.fields
            self.remote_user, self.auth_type = verdict.username, verdict.scheme
        # Now, and not when http.server meets the field: to whom the password has been asked of.
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
        # http.server first: what it refuses, it refuses as it would without us. Then the strict
        # parser, for what http.server has read may not be what the client meant.
        stream, self.rfile = self.rfile, io.BytesIO(octets.partition(b"\n")[2])
        try:
            if not super().parse_request():         # and has said why
                return UNASKED
        finally:
            self.rfile = stream
        self.unread = True                          # of a head that we cannot read, anything
        try:
            request = parse_head(octets)
            self.unread = request.has_body()
            verdict = self.judge(request)
        except BadRequest as error:
            verdict = Verdict(error.status)
        if verdict.status != 200:
            self.refuse(verdict)
        return verdict

    def judge(self, request: Request) -> Verdict:
        """Return the verdict on a request that http.server and parse_head understand."""
        is_safe = (hasattr(self.connection, "getpeercert")      # TLS
                   or is_private(getattr(self.server, "socket", self.connection)))
        # A unix socket's peer has no address, or "".
        return self.gate.judge(request, self.client_address[0] if self.client_address else "",
                               request.fields.forwarded, is_safe,
                               functools.partial(self.read_content, request.fields))

    def read_content(self, fields: FieldBlock) -> bytes:
        """Return the body, for qop=auth-int; the handler reads it again, and is the last."""
        if fields.chunked or fields.length > IN_MEMORY:
            raise BadRequest(411 if fields.chunked else 413, "body too large for auth-int")
        if self.expects:
            self.expects = not super().handle_expect_100()
        content = self.rfile.read(max(0, fields.length))
        # The last: what the client has sent after it lies in the stream that is replaced here.
        self.rfile, self.close_connection, self.unread = io.BytesIO(content), True, False
        return content

    def refuse(self, verdict: Verdict) -> None:
        """Answer a request that may not pass; let a client that is still sending read it."""
        page = error_page(verdict.status)
        # Before send_response(): a handler's own may look at it.
        self.close_connection = self.close_connection or self.unread
        self.send_response(verdict.status)
        closes = [("Connection", "close")] * self.close_connection
        for name, value in (*verdict.fields, HTML, ("Content-Length", str(len(page))), *closes):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(page if self.command != "HEAD" else b"")
        if self.unread:
            # Our side first: the client must see the end of the answer, or it might wait for more.
            with contextlib.suppress(OSError):          # it has left, or says nothing
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(LINGER_SECONDS)
                read_on(functools.partial(self.connection.recv, IN_MEMORY))

    def end_headers(self) -> None:
        """Add Authentication-Info to the handler's answer."""
        for name, value in self.info:
            self.send_header(name, value)
        super().end_headers()


def check_handler(handler: Any) -> None:
    """Refuse what would never ask for the password; by name, and before it serves anybody.

    The password is asked for in parse_request(). A handler with a loop of its own that reads
    requests in another way would go round it, and nothing would show it: it would just serve.
    """
    if (not isinstance(handler, type) or issubclass(handler, Guard)
            or not issubclass(handler, http.server.BaseHTTPRequestHandler)):
        raise TypeError(f"unable to protect {handler!r:.60}: expected a class of handlers, derived "
                        f"from BaseHTTPRequestHandler, and not protected yet")
    for name in ("handle", "handle_one_request"):
        method: Any = getattr(handler, name)
        code = getattr(getattr(method, "__wrapped__", method), "__code__", None)
        # By the names in its code: what calls none of these cannot come to parse_request().
        if not {"handle", "handle_one_request", "parse_request"} & {*getattr(code, "co_names", ())}:
            raise TypeError(f"unable to protect {handler.__name__}: its {name}() does not call "
                            f"parse_request(), where the password is asked for")


def protect(handler_class: Any, passwords: Passwords,
            trusted_proxies: Optional[Sequence[str]] = None, **offer: Any) -> Any:
    """Return a handler class that answers only who has a password; any server runs it.

    It may be wrapped in a functools.partial, which is how http.server itself is told a folder
    (directory=...): then so is what is returned. trusted_proxies are as --trusted-proxy;
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
    length = environ.get("CONTENT_LENGTH") or ""
    # Not int() alone: wsgiref hands on what the client said. What is no length ends nowhere.
    left = int(length) if re.fullmatch("[0-9]{1,15}", length) else 0
    if not length and environ.get("wsgi.input_terminated"):
        left = MAX_BODY                     # in chunks, whose end the server finds
    while left:
        piece = environ["wsgi.input"].read(min(left, IN_MEMORY))
        left -= len(piece) or left
        yield piece


def read_signed(environ: Dict[str, Any], body: Iterator[bytes]) -> bytes:
    """Return the body, for qop=auth-int; the application reads it again."""
    content = b""
    for piece in body:
        content += piece
        if len(content) > IN_MEMORY:
            raise BadRequest(413, "body too large for auth-int")
    environ["wsgi.input"] = io.BytesIO(content)
    return content


def judge_environ(gate: Gate, environ: Dict[str, Any]) -> Verdict:
    """Return the verdict on the request that a WSGI environment describes."""
    peer, field = environ.get("REMOTE_ADDR", ""), environ.get("HTTP_AUTHORIZATION")
    # One iterator for both who may read it: what the first has read the second must not expect.
    address, body = parse_address(peer), body_of(environ)
    target = environ.get("RAW_URI") or environ.get("REQUEST_URI")       # gunicorn; the others
    attempt = Attempt(environ["REQUEST_METHOD"], str(target or ""),
                      () if field is None else (field,), None, 0.0, ())
    if not target:
        attempt.same_target = functools.partial(is_same_resource, environ)
    is_safe = (not peer or environ.get("wsgi.url_scheme") == "https"    # no peer: a unix socket
               or address is not None and address.is_loopback)
    verdict = gate.judge(attempt, peer, environ.get("HTTP_X_FORWARDED_FOR", ""), is_safe,
                         functools.partial(read_signed, environ, body))
    # What read_signed() has left of the body, or all of it.
    if verdict.status != 200 and not read_on(lambda: next(body, b"")) and (
            not environ.get("CONTENT_LENGTH")):
        # Of chunks cheroot does not find the end by itself: this ends the connection.
        raise ConnectionAbortedError("a refused client does not stop sending")
    return verdict


def protect_wsgi(application: Any, passwords: Passwords,
                 trusted_proxies: Optional[Sequence[str]] = None, **offer: Any) -> Any:
    """Return a WSGI application that answers only who has a password; as protect() does.

    The name is in REMOTE_USER, the scheme in AUTH_TYPE; refusals go to the logger authserver.

    Behind a proxy, name it: trusted_proxies=["127.0.0.1"]. To wsgiref, and to most servers,
    REMOTE_ADDR is the proxy: without it that one stands in the log, and a lock-out hits nobody,
    or, where its address is a public one, everybody. With TLS at the proxy, on another machine,
    Basic is offered only if schemes says so: the request comes as plain HTTP from a network.
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
            # Set anew: a client cannot send these two, but a server in front may have.
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


# -- 17. Forward-auth ---------------------------------------------------------
#
# nginx (auth_request), Traefik (forwardAuth), Caddy (forward_auth) and Envoy (ext_authz) can
# ask another server whether a request may pass. They send its header fields on, and say its
# method and target in fields of their own (Envoy: as they are, below a prefix). 2xx lets it
# pass, 401 and 403 go to the client; anything else nginx turns into 500.

METHOD_FIELDS = ("x-original-method", "x-forwarded-method")
TARGET_FIELDS = ("x-original-uri", "x-forwarded-uri")


def asked_about(request: Request, prefix: str) -> Optional[Tuple[str, str]]:
    """Return method and target of the request that a proxy asks about; None: it does not say.

    Two fields that say the same thing may be from two proxies, or one from the client: then
    they must agree, or nobody knows what would be let through.
    """
    said = [{value for name in names for value in request.values.get(name, ())} or {""}
            for names in (METHOD_FIELDS, TARGET_FIELDS)]
    if max(map(len, said)) > 1:
        return None
    (method,), (target,) = said
    rest = request.target[len(prefix):]         # Envoy's way: what stands behind the prefix
    if rest.startswith("/") and request.path == request.target and not method and not target:
        return request.method, rest
    # Not both ways at once, but for a slash that somebody set behind the prefix.
    return (method, target) if method and target and (rest == "/" or rest[:1] != "/") else None


def is_same_spelling(uri: str, target: str) -> bool:
    """Return whether the uri of a proof names the target that a proxy asks about.

    Caddy spells a path anew: `[` is %5B in what it says. Each step of a path is compared as
    what it decodes to, so that %2F is still no slash; the query as it is.

    >>> [is_same_spelling("/a[1]/b", text) for text in ("/a%5b1%5D/b", "/a[1]%2Fb", "/a[1]/b?")]
    [True, False, False]
    """
    def steps(text: str) -> Any:
        path, query, rest = text.partition("?")
        return query + rest, [urllib.parse.unquote_to_bytes(step.encode("latin-1"))
                              for step in path.split("/")]
    return uri == target or steps(uri) == steps(target)


def is_forward_auth(prefix: str, path: str) -> bool:
    """Return whether a path is where proxies ask.

    >>> [is_forward_auth("/auth", path) for path in ("/auth", "/auth/x?y", "/authority")]
    [True, True, False]
    """
    return bool(prefix) and (path + "/").replace("?", "/").startswith(prefix.rstrip("/") + "/")


def grant(request: Request) -> Answer:
    """Return what tells a proxy to let a request pass, and whose it is."""
    # Field values are bytes: the name goes as UTF-8.
    name = (request.username or "").encode("utf-8").decode("latin-1")
    return Answer(200, (("Remote-User", name), ("Cache-Control", "no-store")))


# -- 18. Secrets on disk ------------------------------------------------------
#
# A file of secrets is never half there, and never there for others: it is written under another
# name, with its owner and mode, before it gets its own. Of two who make it at a time one fails,
# and of two who change it one waits: or the second would write back what the first had read.


def command(*words: str, script: str = os.path.basename(__file__)) -> str:
    """Return a command line, for this file or one beside it, that can be pasted into a shell."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    return " ".join(map(shlex.quote, ("python3", path) + words))


def passwd_command(path: str, usernames: Sequence[str], realm: str) -> str:
    """Return the command that sets the password of the first of these, "" if none can."""
    # What is no regular file is a pipe or a folder; a new file has no form yet.
    if not usernames or path == "-" or os.path.exists(path) and not os.path.isfile(path):
        return ""
    return command("passwd", path, usernames[0], *["--realm", realm][:2 * (realm != REALM)])


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


FORMS: Set[Tuple[str, int]] = set()     # kinds and lengths of hashes that libcrypt makes


def check_crypted(entry: Entry) -> Entry:
    """Return an entry whose hash this machine can verify; else raise Refusal.

    libcrypt is asked for a hash with the same salt: if that is not as long, it does not know
    the kind, or an editor has cut off the end. Once for each form: bcrypt takes its time.
    """
    kind, form = entry.kind, (entry.kind, len(entry.crypted))
    if ":" in entry.crypted:
        raise Refusal("field 3: nothing may follow a hash of htpasswd")
    if not is_crypted(entry.crypted):
        raise Refusal(f"field 2: {entry.crypted[:5]}... is no hash we know (htpasswd -B makes one)")
    if kind[0] == "{" and SHA1 is None:
        raise Refusal(f"field 2: the hashlib of this Python lacks SHA-1, for {kind}")
    if entry.is_slow and form not in FORMS:
        function, turns = load_crypt()
        with turns:
            made = function(b"probe", entry.crypted.encode("ascii"))
        # Only a yes is kept: what is wrong with this line need not be with the next one's.
        if len(made or b"") != len(entry.crypted):
            raise Refusal(f"field 2: the libcrypt of this machine does not know {kind}, or this "
                          f"one is of the wrong length")
        FORMS.add(form)
    return entry


def split_line(line: str) -> Tuple[str, str, str]:
    """Return the fields of a line: user, place, value; the place of a htpasswd hash is "".

    Blanks at a line's ends are cut off, as Apache does.

    >>> split_line(" jim:plain:se:cret"), split_line("ann:{SHA}0=\\r")
    (('jim', 'plain', 'se:cret'), ('ann', '', '{SHA}0='))
    """
    username, _, rest = line.strip(" \t\r").partition(":")
    place, _, value = ("", "", rest) if rest.startswith(("{", "$")) else rest.partition(":")
    return unicodedata.normalize("NFC", username), place, value


def is_line_of(line: str, username: str, realm: str) -> bool:
    """Return whether a line is about this user in this realm; a broken one may be.

    >>> [is_line_of(line, "jim", "a") for line in ("jim:a:0", " jim:{SHA}x", "#jim:a:0", "jim:b:0")]
    [True, True, False, False]
    """
    name, place, value = split_line(line)
    return name == username and (place in ("", "plain", realm) or not value)


def make_entry(line: int, username: str, realm: str, place: str, value: str) -> Entry:
    """Return the entry that the fields of a line stand for.

    >>> make_entry(1, "jim", "files", "files", "5e93c589edbe9d5867a3bce43a1066c1").ha1
    {'MD5': '5e93c589edbe9d5867a3bce43a1066c1'}
    """
    if not value:
        raise Refusal("expected user:realm:HA1, user:HASH or user:plain:PASSWORD, "
                      "but a field is missing")
    if place == "plain":
        return entry_of_password(username, line, realm, value)
    if not place:
        return check_crypted(Entry(username, line, {}, value))
    if not is_hash(value):
        raise Refusal("field 3: neither 32 nor 64 hex digits")
    # The length tells which hash: 64 digits count as SHA-256, though SHA-512-256 has as many.
    name = "MD5" if len(value) == 32 else "SHA-256"
    if name not in HASHES:
        raise Refusal(f"field 3: the hashlib of this Python lacks {name}")
    return Entry(username, line, {name: value.lower()}, "")


def add_entry(entries: Dict[str, Entry], entry: Entry, realm: str) -> None:
    """Add an entry, unless it lets everybody in, or contradicts an earlier one of its user."""
    # Without any password; slow hashes are not tried.
    if not entry.is_slow and matches(entry, realm, ""):
        raise Refusal("an empty password")
    first = entries.setdefault(entry.username, entry)
    # A second line may add the HA1 of another hash, and nothing else.
    if first is not entry and (first.crypted or entry.crypted or set(first.ha1) & set(entry.ha1)):
        raise Refusal(f"again, after line {first.line}")
    first.ha1.update(entry.ha1)


def parse_passwords(text: str, realm: str) -> Tuple[Dict[str, Entry], List[Tuple[str, str]]]:
    """Return entries by user; and mistakes, each with the user whose new password would cure it.

    >>> parse_passwords("# staff\\njim:plain:secret\\n jim:plain:other \\n", "files")[1]
    [("line 3: user 'jim': again, after line 2", 'jim')]
    """
    entries: Dict[str, Entry] = {}
    mistakes, elsewhere = [], set()     # type: List[Tuple[str, str]], Set[str]
    # Not splitlines(): it also divides at a form feed or U+2028, and the numbers would be wrong.
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip(" \t\r")[:1] in ("", "#"):
            continue
        name, place, value = split_line(content)
        is_ours = is_line_of(content, name, realm)
        try:
            # What is no HA1 may be a password whose owner has forgotten the `plain`.
            if is_ours or not is_hash(value):
                add_entry(entries, make_entry(line, normal_username(name), realm, place, value),
                          realm)
            else:
                elsewhere.add(place)
        except Refusal as error:
            mistakes.append((f"line {line}: user {name!r}: {error}",
                             name if is_ours and is_username(name) else ""))
    if not entries and not mistakes:
        others = ", but of " + ", ".join(sorted(elsewhere)) if elsewhere else ""
        mistakes.append((f"no user of realm {realm} in it{others}", FIRST_USER))
    return entries, mistakes


def refuse_file(what: str, mistakes: Sequence[str], cure: str) -> Refusal:
    """Return the Refusal of a file, with up to ten mistakes and the command that cures one.

    >>> str(refuse_file("use passwords F", ["a", "b"], "chmod 600 F"))
    'unable to use passwords F: a; b\\ntry: chmod 600 F'
    """
    more = [f"and {len(mistakes) - 10} more"] if len(mistakes) > 10 else []
    return Refusal(f"unable to {what}: " + "; ".join(list(mistakes[:10]) + more)
                   + (f"\ntry: {cure}" if cure else ""))


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


def read_secrets(what: str, path: str, cure: str = "", is_strict: bool = True) -> str:
    """Return the text of a file of secrets ("-" = standard input), if it is one.

    Bytes that are no UTF-8 become surrogates, which no name and no password may have: so a line
    is told by its number, and a comment may be in any encoding. cure makes a file that is missing.
    """
    try:
        # closefd: with descriptor 0 closed, the next file opened would be "standard input".
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as stream:
            exposed, octets = is_exposed(stream.fileno()), stream.read()
    except OSError as error:
        raise refuse_file(f"read {what} {path}", [str(error.strerror)],
                          cure * (error.errno == errno.ENOENT))
    if exposed and is_strict:
        raise refuse_file(f"use {what} {path}", ["everybody may read or change it"],
                          f"chmod 600 {shlex.quote(path)}")
    # -sig: some editors put U+FEFF at the start, which would become part of the first name.
    return octets.decode("utf-8-sig", "surrogateescape")


FIRST_USER = "admin"
LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"    # 32, and none looks like another


def password_lines(username: str, realm: str, password: str) -> List[str]:
    """Return the htdigest lines of a user; MD5 first, for Apache reads the first that fits."""
    known = entry_of_password(username, 0, realm, password).ha1
    return [f"{username}:{realm}:{known[name]}" for name in ("MD5", "SHA-256") if name in known]


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

    A file that is replaced keeps its owner, group and mode, for it may have been made for the
    group of a daemon. But what others could read, or change, is 0600 from now on.
    """
    # Beside it, for neither a link nor a rename leads to another file system. With a dot before
    # it: the folder may be one that is served, and what lies there for a moment is a secret, too.
    fd, new = tempfile.mkstemp(".new", f".{os.path.basename(path)}.", os.path.dirname(path))
    mode = 0o600 if gid is None else 0o640
    try:
        with open(fd, "w", encoding="utf-8", errors="surrogateescape") as stream:
            if replace:
                old = os.stat(path)
                mode = 0o600 if old.st_mode & 0o007 else stat.S_IMODE(old.st_mode)
                gid = old.st_gid if mode & 0o070 else None
                if os.geteuid() == 0:
                    os.fchown(fd, old.st_uid, old.st_gid)
            # The group before the mode: for a moment another group could read it.
            if gid is not None:
                try:
                    os.fchown(fd, -1, gid)
                except PermissionError:
                    raise Refusal(f"unable to write {path}: only root, or a member, may keep group "
                                  f"{gid}\ntry: chmod 600 {shlex.quote(path)}")
            os.fchmod(fd, mode)
            stream.write(text)
            stream.flush()
            # Before the name: after a crash it must not stand for an empty file.
            os.fsync(fd)
        # A link, unlike a rename, fails where another process has just made the file.
        (os.rename if replace else os.link)(new, path)
    finally:
        if os.path.lexists(new):
            os.unlink(new)


@contextlib.contextmanager
def locked(path: str) -> Iterator[bool]:
    """Have other passwd commands wait for this file; False: there is none to wait for.

    The lock goes with the file when that is replaced: who has waited looks whether the name
    still stands for what was locked. Of those who make a new file only one succeeds.
    """
    while os.path.exists(path):
        # To write: a file system over a network locks nothing else.
        with open(path, "rb+") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            # Of /dev/null root would make a file, for everybody.
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            if os.path.exists(path) and os.path.samestat(os.fstat(stream.fileno()), os.stat(path)):
                yield True
                return
    yield False


def change_password(path: str, username: str, realm: str, password: Optional[str]) -> str:
    """Set the password of a user in a file, or delete the user (None); return what was done."""
    username = normal_username(username)
    check_realm(realm)
    new_lines = [] if password is None else password_lines(username, realm, password)
    # Through links, or the rename would replace a link by a file.
    target = os.path.realpath(path)
    with trying_to(f"write passwords {path}"):
        try:
            with locked(target) as exists:
                # Read only now, under the lock: or a change just made would be undone. Not
                # strictly: if others may read it, what takes its place is 0600.
                old = read_secrets("passwords", target, is_strict=False) if exists else ""
                known = any(is_line_of(line, username, realm) for line in old.split("\n"))
                if password is None and not known:
                    raise Refusal(f"unable to delete user {username!r}: not in {path}")
                write_file(target, edit_passwords(old, username, realm, new_lines), replace=exists)
        except FileExistsError:     # made by another one meanwhile: now there is one to edit
            return change_password(path, username, realm, password)
    return "deleted" if password is None else "changed" if known else "added"


def run_passwd(path: str, username: str, realm: str = REALM, from_stdin: bool = False,
               delete: bool = False) -> str:
    """Do what `passwd FILE USER` asks for, and return what to say about it."""
    # As bytes: what Python decoded in the locale of cron, which is ASCII, it has mangled.
    username = normal_username(os.fsencode(username).decode("utf-8", "surrogateescape"))
    if delete:
        password = None
    elif from_stdin:
        octets = sys.stdin.buffer.readline().rstrip(b"\r\n")
        password = octets.decode("utf-8", "surrogateescape")
    else:
        import getpass              # termios and more, for this verb alone
        try:
            password = getpass.getpass("new password: ")
            if getpass.getpass("again: ") != password:
                raise Refusal("unable to set the password: the two differ")
        except UnicodeError:
            raise Refusal("unable to read the password: not in the encoding of this locale\n"
                          "try: export LC_ALL=C.UTF-8")
        except (EOFError, KeyboardInterrupt):       # here Ctrl-C is no end well: none was set
            raise Refusal("unable to read the password: nobody typed one\ntry: "
                          + command("passwd", path, username, "--realm", realm, "--stdin"))
    done = change_password(path, username, realm, password)
    # The realm, for it is what one forgets: a line for another one lets nobody in here.
    return f"user {username!r} {done} in {path} (realm {realm!r})"


def first_password(path: str, gid: Optional[int] = None, realm: str = REALM) -> Tuple[str, str]:
    """Make a password file with one user and a random password; return the two."""
    # 256 is 8 * 32, so % prefers no letter; 16 letters of 5 bits are 80 bits.
    password = "".join(LETTERS[octet % 32] for octet in os.urandom(16))
    lines = password_lines(FIRST_USER, realm, password)
    with trying_to(f"make passwords {path}"):
        write_file(path, edit_passwords("", FIRST_USER, realm, lines), gid)
    return FIRST_USER, password


def read_nonce_secret(path: str) -> bytes:
    """Return the secret in a file; make the file when there is none."""
    path = os.path.abspath(path)
    if not os.path.exists(path):
        # FileExistsError: who was faster made our secret, too.
        with trying_to(f"make nonce secret {path}"), contextlib.suppress(FileExistsError):
            write_file(path, os.urandom(32).hex() + "\n")
    secret = read_secrets("nonce secret", path).strip()
    if len(secret) < 16:
        # Without it, it is made anew.
        raise refuse_file(f"use nonce secret {path}", ["shorter than 16 bytes"],
                          f"rm {shlex.quote(path)}")
    return secret.encode("utf-8", "surrogateescape")


# -- 19. Addresses ------------------------------------------------------------
#
# Everything about an address is found out before anything else is done with it: the name
# is looked up, with the rights and in the file system of who typed it, and what is handed over
# (by systemd, or at a restart) is compared with the result. Only what nobody has handed over
# is bound anew: to bind first would fail on our own predecessor.


class Place(NamedTuple):
    """Where to listen: a numeric host and a port, or the path of a unix socket."""

    family: int
    where: Any          # as socket.bind wants it; of IPv6 with flow and scope

    def fits(self, sock: socket.socket) -> bool:
        """Return whether a socket that was handed over listens where we want to."""
        theirs, ours = sock.getsockname(), self.where
        if sock.family == self.family != socket.AF_UNIX and ours[1] == 0:       # any port
            ours = ours[:1] + theirs[1:2] + ours[2:]
        return bool(sock.family == self.family and theirs == ours)


def has_ipv6() -> bool:
    """Return whether the kernel has IPv6: socket.has_ipv6 says only that Python has."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6):
        return True
    return False


def parse_bind(text: str) -> Place:
    """Return the address of a --bind option.

    >>> parse_bind("127.0.0.1:80").where, parse_bind("unix:/run/x").where
    (('127.0.0.1', 80), '/run/x')
    """
    if text.startswith("unix:") and text != "unix:":
        return Place(socket.AF_UNIX, os.path.abspath(text[5:]))
    match = re.fullmatch(r"(?:\[([0-9A-Za-z:.%_-]+)\]|([0-9A-Za-z._-]*)):([0-9]{1,9})", text)
    # getaddrinfo(3) takes larger ports, and makes others of them.
    if match is None or int(match.group(3)) > 65535:
        raise Refusal(f"unable to bind {text}: expected HOST:PORT, [V6]:PORT, :PORT or unix:PATH; "
                      f"ports are 0 to 65535")
    family = 0 if has_ipv6() else socket.AF_INET
    host = match.group(1) or match.group(2) or ("0.0.0.0" if family else "::")
    with trying_to(f"bind {text}"):
        # As bytes: for text Python would load its IDNA tables first, which takes 5 ms.
        # The first answer only: a name with several addresses needs several --bind.
        found = socket.getaddrinfo(host.encode(), int(match.group(3)), family,
                                   socket.SOCK_STREAM)[0]
    # Whole: the address of a link is one only with its scope, the number of an interface.
    return Place(found[0], found[4])


def open_socket(text: str, place: Place) -> socket.socket:
    """Return a socket that listens at place; text is how the --bind option names it.

    Its options first: the kernel looks at them when it binds, and at no later time.
    """
    family, where = place
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Or connections of the last run, for a minute in TIME_WAIT, would hold the port. To a unix
        # socket it says nothing: there the name is left over.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_UNIX:
            remove_stale_socket(where)
        elif family == socket.AF_INET6:
            # Said in either case: the default is the machine's (net.ipv6.bindv6only).
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, where[0] != "::")
        sock.bind(where)
        if family == socket.AF_UNIX:
            os.chmod(where, 0o666)      # as a port: whoever gets there needs a password
        # Last: from now on clients come, and everything must be as it shall be.
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
    """Remove a unix socket that nobody listens on any more: its name outlives its process."""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):     # bind() says it
        # First what it is: a file that is no socket refuses connections as well.
        if stat.S_ISSOCK(os.lstat(path).st_mode) and (
                client.connect_ex(path) == errno.ECONNREFUSED):
            os.unlink(path)


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
    given = list(options.sockets)
    # systemd knows where. What a predecessor hands over is about the options of then.
    if given and not options.bind and not options.predecessor:
        return given
    sockets = []
    for text in options.bind or [DEFAULT_ADDRESS]:
        place = parse_bind(text)
        # At most one: of several that fit, the others are for other --bind options, or closed.
        # So --bind :0 given twice keeps two ports over a restart.
        fitting = [sock for sock in given if place.fits(sock)][:1]
        sockets += fitting or [open_socket(text, place)]
        given = [sock for sock in given if sock not in fitting]
    # What is left belongs to options that nobody has given again. This closes our copy only:
    # the predecessor listens there until it is told to leave.
    for sock in given:
        sock.close()
    return sockets


# -- 20. The command line -----------------------------------------------------
#
# Copied alone this file is a server; beside daemonize.py it is what that hosts. Either way
# it is three calls:
#
#     add_arguments(parser)     our options, in our own parser or in daemonize.py's
#     bind(options)             with full privileges, once
#       check_options()         first what is wrong already, while nothing has been made yet
#       find_passwords()        a first file, if it may be made: bind() removes it if the rest fails
#       make_server()
#         make_page()           the folder before the ports: one that is open, and closed again,
#         make_listeners()      would look like a server that crashed; the key before them, too
#         make_authenticator()  last: only the addresses decide in which schemes every user must
#                               be servable
#     serve_forever()           as the daemon's user, in each worker
#       reread()                ... but this in the daemon itself, at `reload`, with its rights
#
# What serve_forever() needs lies in the server by then, open or in memory: after bind() there may
# be another root folder, and a user to whom neither key nor passwords would be readable.

# What daemonize.py adds to our own options, and what that is where nobody has added it.
UNHOSTED: Dict[str, Any] = {
    "name": "authserver", "sockets": (), "predecessor": None, "legacy": None, "uid": None,
    "gid": None, "chroot": None, "config_prefix": "", "may_create": False, "private_files": ()}


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


def add_arguments(parser: Any) -> None:
    """Add our options to a parser (daemonize.py's, or our own); in brackets the defaults."""
    add = parser.add_argument
    add("--bind", metavar="ADDRESS", action="append",
        help=f"HOST:PORT, [V6]:PORT, :PORT (IPv4, IPv6), unix:PATH; repeatable ({DEFAULT_ADDRESS})")
    add("--root", metavar="DIR", help="serve the files below DIR, read-only (the example)")
    add("--hidden", action="store_true", help="... also names that begin with a dot")
    add("--tls-cert", metavar="FILE", help="HTTPS, with this certificate and its chain")
    add("--tls-key", metavar="FILE", help="... and its key (in the certificate's file)")
    add("--public", metavar="PREFIX", action="append", default=[],
        help="ask for no password below this path; repeatable (nowhere)")
    add("--passwords", metavar="FILE",
        help="dictionary; - reads standard input, once (/etc/NAME.passwords, ~/.NAME/passwords)")
    add("--realm", metavar="NAME", default=REALM, help="protection space (%(default)s)")
    # No default, but one for each address: make_listeners().
    add("--schemes", metavar="LIST", help="offered, in this order (digest,basic on loopback, unix "
                                          "sockets and with TLS, digest alone elsewhere)")
    add("--algorithms", metavar="LIST", default=",".join(ALGORITHMS),
        help="of Digest: MD5, SHA-256, SHA-512-256, each also -sess (%(default)s)")
    add("--qop", metavar="LIST", default=",".join(QOP), help="auth, auth-int (%(default)s)")
    add("--nonce-lifetime", metavar="SECONDS", type=float, default=NONCE_LIFETIME,
        help="after which clients silently try again (%(default)g)")
    add("--nonce-secret", metavar="FILE",
        help="of machines that accept one another's nonces; made when absent (a new one)")
    add("--max-failures", metavar="N/SECONDS", default="%d/%d" % MAX_FAILURES,
        help="lock an address out after N wrong passwords (%(default)s; 0: never)")
    add("--trusted-proxy", metavar="CIDR", action="append", default=[],
        help="believe what these peers say of their clients; unix: too; repeatable (nobody)")
    add("--forward-auth", metavar="PATH",
        help="answer nginx auth_request, Traefik forwardAuth, Caddy forward_auth there (nowhere)")
    add("--stream-threads", metavar="N", type=int, default=STREAM_THREADS,
        help="handlers that may wait at a time, a thread each (%(default)s)")


def check_options(options: argparse.Namespace) -> None:
    """Refuse values of options that mean nothing; what something else has to parse, it refuses."""
    check_realm(options.realm)          # before any command is named that would have it, too
    for is_wrong, text in (
            # This way round: NaN is not less than anything.
            (not 1 <= options.nonce_lifetime <= 1e6,
             f"use --nonce-lifetime {options.nonce_lifetime}: expected 1 to 1000000 seconds"),
            (options.stream_threads < 1,
             f"use --stream-threads {options.stream_threads}: expected at least 1"),
            (options.forward_auth and "auth-int" in options.qop.lower(),
             "use --forward-auth with --qop auth-int: a proxy asks without the body"),
            (options.tls_key and not options.tls_cert, "use --tls-key: --tls-cert is missing"),
            (options.forward_auth and not options.forward_auth.startswith("/"),
             f"answer at {options.forward_auth}: it does not begin with /"),
            # A prefix is plain, a path encoded: one that does not fit itself fits no path.
            *[(not prefix.startswith("/") or not is_public(
                [os.fsencode(prefix)], urllib.parse.quote(os.fsencode(prefix))),
               f"make {prefix} public: no path, as it is once decoded, begins with it")
              for prefix in options.public]):
        if is_wrong:
            raise Refusal(f"unable to {text}")


def find_passwords(options: argparse.Namespace) -> Tuple[str, Optional[Tuple[str, str]]]:
    """Return the path of the password file, and user and password if it had to be made.

    It is made where somebody reads what start prints, and nowhere else: a password that was
    printed into a log, or to nobody, would be a door that its owner does not know of.
    """
    if options.passwords:
        return options.passwords if options.passwords == "-" else os.path.abspath(
            options.passwords), None
    # Only who hosts us has a place for it that is found again from any folder.
    path = options.config_prefix and options.config_prefix + "passwords"
    if path and os.path.exists(path):
        return path, None
    if not path:
        raise Refusal("unable to find a password file: expected --passwords FILE\ntry: "
                      f"{passwd_command('users', [FIRST_USER], options.realm)} && "
                      f"{command('--passwords', 'users')}")
    if not options.may_create:
        raise refuse_file("find a password file", [f"{path} is not there"],
                          passwd_command(path, [FIRST_USER], options.realm))
    # Only with --uid another user must read the file; without it 0600 is enough.
    gid = None if options.uid is None else options.gid
    return path, first_password(path, gid, options.realm)


def read_passwords(path: str, realm: str) -> Passwords:
    """Return the password file's dictionary, and say what a person should know of it.

    At a reload once more: it may be another file by then, with other hashes.
    """
    passwords = Passwords.read(path, realm)
    for warning in passwords.warnings:
        warn(warning)
    return passwords


def greet(user: str, password: str, path: str, options: argparse.Namespace,
          server: AuthServer) -> str:
    """Return what the first start says, once: the password itself is kept nowhere.

    Its commands can be pasted, and work in any folder.
    """
    # Where a client on this machine gets to what listens everywhere.
    url = server.addresses()[0].replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
    if url.startswith("unix:"):
        url = f"--unix-socket {shlex.quote(url[5:])} http://localhost/"
    url += "" if isinstance(server.page, Files) else "example/foo"
    # No client knows who signed a certificate for 127.0.0.1.
    insecure = "--insecure " if url.startswith("https:") else ""
    # Who has a pidfile, or a name, of its own answers to no other.
    handle = [] if options.name == "authserver" else ["--name", options.name]
    handle = ["--pidfile", options.pidfile] if getattr(options, "pidfile", None) else handle
    reload = command("reload", *handle, script="daemonize.py")
    return (f"user: {user}\npassword: {password}\nkept in: {path}\n"
            f"change it: {passwd_command(path, [user], options.realm)} && {reload}\n"
            f"try: curl {insecure}--digest -u {user} {url}")


def make_authenticator(options: argparse.Namespace, path: str,
                       schemes: Sequence[str]) -> Authenticator:
    """Return the authenticator that the options ask for."""
    secret = read_nonce_secret(options.nonce_secret) if options.nonce_secret else b""
    return Authenticator(
        read_passwords(path, options.realm), schemes,
        parse_choice(options.algorithms, CANONICAL.values()),
        parse_choice(options.qop, ("auth", "auth-int")), options.nonce_lifetime, secret,
        inherited_table(options.legacy), parse_max_failures(options.max_failures))


def make_listeners(options: argparse.Namespace) -> List[Listener]:
    """Return the listening sockets, each with what is offered there.

    Basic sends the password itself: unless asked for it is offered only where nobody can
    listen. Digest sends a proof; but what is then served can be read all the same, and its
    owner should hear that from us: once, though there are several such addresses.
    """
    chosen = () if options.schemes is None else parse_choice(options.schemes, SCHEMES)
    # Before the sockets: a key that is no key should not have opened a port.
    context = tls_context(options.tls_cert, options.tls_key) if options.tls_cert else None
    listeners, exposed = [], []
    for sock in open_sockets(options):
        # Over a unix socket comes a proxy, which speaks TLS itself.
        tls = None if sock.family == socket.AF_UNIX else context
        is_safe = tls is not None or is_private(sock)
        listeners.append(Listener(sock, offer(chosen, is_safe), tls))
        exposed.extend([] if is_safe else [address_of(sock)])
    if exposed:
        warn(f"a network reaches {' and '.join(exposed)}, without TLS: "
             f"{'' if 'basic' in chosen else 'Basic is off there, and '}what is served can be "
             f"read on its way\ntry: openssl req -x509 -newkey rsa:2048 -nodes -days 365 "
             f"-subj /CN=$(hostname) -keyout tls.pem -out tls.pem   # then add --tls-cert tls.pem")
    return listeners


def make_page(options: argparse.Namespace, path: str) -> Page:
    """Return what is served: a folder, or the example."""
    if not options.root:
        return example
    # Not served, by whatever name: Files knows them by device and inode.
    chosen = [options.passwords and path, options.nonce_secret, options.tls_key or options.tls_cert]
    secrets = {path, *chosen, *options.private_files} - {"-", "", None}     # each once
    files = Files(options.root, options.hidden, sorted(secrets), options.chroot)
    # Who shares a home folder has not chosen that ~/.NAME lies below it.
    for name in secrets.intersection(chosen, files.exposed):
        warn(f"{name} lies below --root {options.root}: it is not served, but would be safer "
             f"elsewhere")
    return files


def make_server(options: argparse.Namespace, path: str) -> AuthServer:
    """Return the server that the options ask for, with the passwords in the file at path."""
    page, listeners = make_page(options, path), make_listeners(options)
    # All that any address offers: chosen schemes are those of each, and else the longer has both.
    schemes = max((item.schemes for item in listeners), key=len)
    server = AuthServer(None, page, True, make_authenticator(options, path, schemes), listeners,
                        options.public, options.stream_threads)
    server.proxies = TrustedProxies(options.trusted_proxy)
    server.forward_auth = options.forward_auth or ""
    # Those that we may use, which macOS does not tell. More than four workers wait for one another:
    # for the table of nonces, and for the listening socket.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    server.workers = min(4, cpus or 1)
    server.reread = functools.partial(reread, server, options, path)
    return server


def bind(options: argparse.Namespace) -> AuthServer:
    """Open sockets and files, with full privileges; return the server that will use them."""
    options = argparse.Namespace(**dict(UNHOSTED, **vars(options)))
    # A reload reads them again, and a daemon has another working directory by then.
    for name in ("tls_cert", "tls_key", "nonce_secret"):
        given = getattr(options, name)
        setattr(options, name, given and os.path.abspath(given))
    check_options(options)
    path, first = find_passwords(options)
    with contextlib.ExitStack() as undo:        # also after Ctrl-C: nobody has seen the password
        if first:
            undo.callback(os.unlink, path)
        server = make_server(options, path)
        server.greeting = greet(*first, path, options, server) if first else ""
        server.abandon = undo.pop_all().close   # from here on who hosts us decides
    return server


def reread(server: AuthServer, options: argparse.Namespace, path: str) -> None:
    """Take new passwords and a new certificate; all of it, or nothing.

    First everything is read, then everything is taken: a mistake in the second file must not
    leave us with the first one's news. Workers need no telling: fresh ones are forked.
    """
    authenticator = server.authenticator
    assert authenticator is not None
    passwords = authenticator.passwords
    if path != "-":         # which could be read only once
        passwords = read_passwords(path, options.realm)
        passwords.check_servable(authenticator.schemes, authenticator.algorithms)
    context = tls_context(options.tls_cert, options.tls_key) if options.tls_cert else None
    # From here on nothing fails.
    authenticator.passwords = passwords
    server.listeners = [item._replace(context=item.context and context)
                        for item in server.listeners]


def inherited_table(fd: Optional[int]) -> Optional[SharedTable]:
    """Return the table of the daemon whose place we take, if it is one that we can read.

    It may be of another version: a restart is how one gets a new one. Then its clients are
    asked once more, which nobody notices.
    """
    # The size first: a shorter one would be read beyond its end, which is SIGBUS.
    if fd is None or os.fstat(fd).st_size != TABLE_SIZE or os.pread(fd, 8, 0) != LAYOUT:
        return None
    return SharedTable(fd)


def warn(text: str) -> None:
    """Tell who started us what could be better."""
    say(f"authserver: warning: {text}", sys.stderr)


def say(text: str, stream: TextIO) -> None:
    """Print lines; a name in them must not colour the terminal, nor be too much for its encoding.

    In a bare environment that is ASCII.
    """
    shown = "".join(char if char.isprintable() or char == "\n" else
                    char.encode("unicode_escape").decode("ascii") for char in text)
    encoding = stream.encoding or "ascii"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


EPILOG = """examples:
  authserver.py passwd users jim            a user; the password is asked for
  authserver.py --passwords users --root .
  authserver.py --passwords users --bind :8443 --tls-cert cert.pem"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of our own command line."""
    parser = argparse.ArgumentParser(
        prog="authserver.py", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        usage="authserver.py [options] | passwd [options] FILE USER",
        description="Serve over HTTP, to users with a password (Basic and Digest).")
    add_arguments(parser)
    return parser


def passwd(arguments: Sequence[str]) -> str:
    """Do the passwd verb, and return what to say."""
    parser = argparse.ArgumentParser(prog="authserver.py passwd", allow_abbrev=False,
                                     description="Add or change a user (asks twice).")
    # Their names are those of run_passwd(). No option takes the password: ps would show it.
    parser.add_argument("path", metavar="FILE")
    parser.add_argument("username", metavar="USER")
    parser.add_argument("--realm", default=REALM, help="(%(default)s)")
    parser.add_argument("--stdin", dest="from_stdin", action="store_true",
                        help="read the password, one line")
    parser.add_argument("--delete", action="store_true", help="delete the user instead")
    return run_passwd(**vars(parser.parse_args(arguments)))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Serve in the foreground, or do the passwd verb."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # Not a subcommand of the parser: daemonize.py adds our options to its own, and has verbs.
        if words[:1] == ["passwd"]:
            say(passwd(words[1:]), sys.stdout)
            return 0
        with bind(build_parser().parse_args(words)) as server:
            # After bind(): until then there is nothing to end well. SystemExit passes through
            # serve_forever(), whose `finally` writes the last lines of the log.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            if server.authenticator:
                server.authenticator.table.alone = True     # we fork nobody
            server.serve_forever()
    except KeyboardInterrupt:           # how one ends what runs in a terminal: no mistake
        pass
    except (OSError, Refusal) as error:
        say(f"authserver: fatal: {error}", sys.stderr)
        return int(getattr(error, "status", 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
