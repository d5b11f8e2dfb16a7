#!/usr/bin/env python3
"""The behaviour of daemonize.py and authserver.py, as sentences.

    python3 test_all.py                 everything, cheap to dear; the exit status is honest
    python3 test_all.py -v              the same, each behaviour in one sentence
    python3 test_all.py Start Stop      some subjects, by class name (Start.test_... for one)
    python3 test_all.py -k replay       the tests with that word, or pattern, in their name
    python3 test_all.py bench           speed beside the servers that are installed here
    python3 test_all.py soak            the long ones; --minutes N, --seed N
    python3 -m pytest test_all.py       where you prefer pytest

Every test works from outside: real processes, real sockets, real users, in a
folder of its own whose name has a space and an umlaut.  As root the tests of
users, jails and hostile daemons run too.

Not tested:
    machines without fork (Windows); macOS and the BSDs (their fall-backs are
        tested on Linux, with /proc and pidfd hidden from the code)
    boot and shutdown under a real systemd (its notify socket and its listening
        sockets are played by the tests)
    a power failure between two writes; a file system over a network
    more than one machine behind a balancer
    browsers other than Chromium (their header fields are replayed)
"""
import argparse
import array
import ast
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import fnmatch
import functools
import gc
import glob
import grp
import hashlib
import html
import http.client
import http.server
import importlib.machinery
import io
import itertools
import json
import marshal
import multiprocessing
import os
import platform
import pty
import pwd
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import unittest
import urllib.error
import urllib.parse
import urllib.request
import warnings
import wave
import wsgiref.simple_server
from random import Random
from typing import (Any, BinaryIO, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union)
from unittest import mock

sys.dont_write_bytecode = True  # nothing is written beside the programs
import authserver
from authserver import AuthServer, Authenticator, Passwords, Refusal, protect, protect_wsgi

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCES = [os.path.join(HERE, name) for name in ("daemonize.py", "authserver.py")]
README = os.path.join(HERE, "README")
PATIENCE = 20.0           # seconds; no command of a test may take longer
SOON = 8.0                # seconds, on a crowded machine; what is not obeyed takes 10, or 30
ROOT = os.geteuid() == 0
LINUX = os.path.exists("/proc/self/environ")
NOBODY, OTHER = 65534, 1  # two users (and groups) that are neither root nor each other
AS_NOBODY = ["--uid", str(NOBODY)]
AS_USER = AS_NOBODY * ROOT  # of a daemon that shall not be root's
SEED = int(os.environ.get("TEST_SEED") or time.time())  # of every test that rolls dice; --seed N

# -- 0. The harness ----------------------------------------------------------
#
# A Box is a folder, the processes that were started in it, and their end.
# The folder's name stands in the command line or the environment of each of
# them: so close() finds them, whatever has become of their pidfile.

OWNER = os.getpid()             # cleans up at the end; a test's forked child must not
TEMP = tempfile.mkdtemp(prefix="daemonize-test-")
TOKEN = os.path.basename(TEMP)  # in every name that a test uses outside TEMP
os.chmod(TEMP, 0o755)
ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "LANG", "LD_LIBRARY_PATH") if name in os.environ}
ENVIRONMENT.update(DAEMONIZE_TEST=TOKEN, HOME=os.path.join(TEMP, "home"),  # of browsers and git
                   PYTHONPYCACHEPREFIX=os.path.join(TEMP, "pycache"))
if sys.version_info < (3, 8):  # without that prefix: an application rewritten within a second is new
    ENVIRONMENT["PYTHONDONTWRITEBYTECODE"] = "1"

# A Python start costs more than most of what a test asks for, and a run has two thousand.  So they
# have a virtual environment without what else is installed here, and each program is what its
# text compiles to: Python looks into a script, whatever its name, for that.  LEAN is what
# daemonize.py executes, from Python 3.11 on, to begin again without a syntax tree.
PROGRAMS = os.path.join(TEMP, "programs")
PYTHON = os.path.join(PROGRAMS, "bin", "python3")
DAEMONIZE = os.path.join(PROGRAMS, "daemonize.py")
LEAN = os.path.join(PROGRAMS, "lean", "daemonize.py")
AUTHSERVER = os.path.join(PROGRAMS, "alone", "authserver.py")


def make_programs() -> None:
    """Make PYTHON, AUTHSERVER and, with the application that they host beside them, DAEMONIZE and LEAN."""
    real = os.path.realpath(sys.executable)
    for path in (PYTHON, AUTHSERVER, LEAN):
        os.makedirs(os.path.dirname(path))
    os.symlink(real, PYTHON)
    with open(os.path.join(PROGRAMS, "pyvenv.cfg"), "w") as file:
        file.write("home = %s\ninclude-system-site-packages = false\n" % os.path.dirname(real))
    with open(SOURCES[0], "rb") as file, open(LEAN + ".text", "w") as text:
        text.write("import marshal; lean = __file__; exec(marshal.loads(%r))"
                   % marshal.dumps(compile(file.read(), SOURCES[0], "exec")))
    for source, compiled in zip(SOURCES + [text.name], (DAEMONIZE, AUTHSERVER, LEAN)):
        py_compile.compile(source, cfile=compiled, doraise=True)
    for path in (DAEMONIZE, LEAN):
        os.symlink(SOURCES[1], os.path.join(os.path.dirname(path), "authserver.py"))


make_programs()

ENVIRONMENT["PATH"] = os.path.dirname(PYTHON) + os.pathsep + ENVIRONMENT.get("PATH", os.defpath)

HOME = pwd.getpwuid(os.getuid()).pw_dir
needs_root = unittest.skipUnless(ROOT, "needs root")
needs_user = unittest.skipIf(ROOT, "needs an ordinary user")
needs_home = unittest.skipUnless(os.access(HOME, os.W_OK), "needs a home")
needs_linux = unittest.skipUnless(LINUX, "needs Linux with /proc")


def needs(*programs: str) -> Callable[[Any], Any]:
    """Skip a test where one of these programs is not installed."""
    missing = [program for program in programs if not shutil.which(program)]
    return unittest.skipIf(missing, "needs " + ", ".join(missing))


def remove(*paths: str) -> None:
    """Remove files, and folders with what is in them."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(path)


class Result(NamedTuple):
    """What a command left: exit status, both texts, the seconds it took."""
    code: int
    out: str
    err: str
    seconds: float


def run(argv: Sequence[str], want: Optional[int] = None, data: bytes = b"", **popen: Any) -> Result:
    """Run a command to its end; fail when its exit status is not `want` (None: any)."""
    settings = dict(dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), env=ENVIRONMENT)
    began = time.monotonic()
    with subprocess.Popen(list(argv), **dict(settings, **popen)) as child:
        try:
            texts = child.communicate(data, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            child.kill()
            raise AssertionError("no end within %s s: %s" % (PATIENCE, " ".join(argv)))
    out, err = ((text or b"").decode(errors="backslashreplace") for text in texts)
    if want not in (None, child.returncode):
        raise AssertionError("exit status %s, not %s: %s\n%s%s" % (child.returncode, want, " ".join(argv), out, err))
    return Result(child.returncode, out, err, time.monotonic() - began)


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Poll until `condition()` is true, and return it; only for what gives no sign of its own."""
    deadline, pause = time.monotonic() + seconds, 0.002
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        select.select([], [], [], pause)
        pause = min(1.3 * pause, 0.05)
    raise AssertionError("not within %s s: %s" % (seconds, what))


def threads(count: int, function: Callable[[int], Any]) -> List[Any]:
    """Call function(0), function(1), ... in a thread each; return the results, or raise."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, range(count)))


@contextlib.contextmanager
def meanwhile(*functions: Callable[[], Any]) -> Iterator[None]:
    """Call each function again and again, in a thread of its own, while the body runs; raise what one raises."""
    end = threading.Event()

    def repeat(function: Callable[[], Any]) -> None:
        while not end.is_set():
            function()
    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        calls = [pool.submit(repeat, function) for function in functions]
        try:
            yield
        finally:
            end.set()
    for call in calls:
        call.result()


def read(path: str) -> str:
    """Return the text of a file, "" when there is none."""
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as file:
            return file.read()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    if LINUX:
        return read("/proc/%d/stat" % pid).rpartition(")")[2].split()[:1] not in ([], ["Z"], ["X"])
    return subprocess.call(["kill", "-0", str(pid)], stderr=subprocess.DEVNULL) == 0


def processes(word: str) -> List[int]:
    """Return the living processes that have `word` in their command line or environment."""
    return [int(pid) for pid in os.listdir("/proc" if LINUX else TEMP) if pid.isdigit()
            and (mentions("/proc/%s/cmdline" % pid, word) or mentions("/proc/%s/environ" % pid, word))]


def mentions(path: str, word: str) -> bool:
    """Tell whether a file can be read and has `word` in it; those of a zombie are empty."""
    try:
        with open(path, "rb", 0) as file:
            return word.encode() in (file.read() or b"")
    except OSError:
        return False


def kill_all(word: str) -> None:
    """Kill the processes that mention `word`, again and again: one may just have forked."""
    for pids in iter(lambda: processes(word), []):
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def family(pid: int) -> List[int]:
    """Return a process and its descendants."""
    found = [pid]
    for parent in found:
        for task in glob.glob("/proc/%d/task/*/children" % parent):
            found += [int(word) for word in read(task).split()]
    return found


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and its descendants, the reaped ones included."""
    fields = [read("/proc/%d/stat" % one).rpartition(")")[2].split()[11:15] for one in family(pid)]
    return sum(int(value) for four in fields for value in four) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> float:
    """Return the proportional share of memory (PSS) of a process and its descendants in MiB."""
    texts = [read("/proc/%d/smaps_rollup" % one) for one in family(pid)]
    return sum(int(n) for text in texts for n in re.findall(r"(?m)^Pss: +(\d+)", text)) / 1024


def free_port() -> int:
    """Return a free port that the kernel gives to no client (those are 32768 and up)."""
    while True:
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", random.SystemRandom().randrange(10000, 32768)))
            return int(sock.getsockname()[1])


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """Hold a port of 127.0.0.1 that nobody else can bind."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(1)
        yield int(sock.getsockname()[1])


class Box:
    """A folder, the commands run in it, and the end of every process that came of them."""

    server: "subprocess.Popen[bytes]"  # of launch()

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix=os.fsdecode(b"b\xc3\xb6 x-"), dir=TEMP)
        os.chmod(self.folder, 0o755)
        self.mark = self.folder.rpartition(" ")[2]  # ASCII: as found under any locale
        self.pidfile, self.log, self.starts = self.path("d.pid"), self.path("d.log"), 0
        self.output = self.path("output")           # what spawned programs say
        self.env = dict(ENVIRONMENT, DAEMONIZE_TEST=self.folder)
        self.spawned: List[subprocess.Popen[bytes]] = []

    def path(self, *names: str) -> str:
        """Return the path of a name in the folder."""
        return os.path.join(self.folder, *names)

    def write(self, name: str, text: str, mode: int = 0o644, owner: int = -1) -> str:
        """Write a file, give it to `owner`, and return its path."""
        with open(self.path(name), "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.chmod(file.name, mode)
        os.chown(file.name, owner, owner)
        return self.path(name)

    def move(self, name: str, mode: int = 0o755, owner: int = -1) -> str:
        """Make a folder, have pidfile and log in it from now on, and return its path."""
        self.pidfile, self.log = self.path(name, "d.pid"), self.path(name, "d.log")
        return self.make(name, mode, owner)

    def make(self, name: str, mode: int = 0o755, owner: int = -1) -> str:
        """Make a folder, give it to `owner`, and return its path."""
        os.mkdir(self.path(name))
        os.chmod(self.path(name), mode)
        os.chown(self.path(name), owner, owner)
        return self.path(name)

    def argv(self, action: str, *options: str) -> List[str]:
        """Return the command line of an action on the box's pidfile."""
        return [PYTHON, DAEMONIZE, action, "--pidfile", self.pidfile] + list(options)

    def daemonize(self, *argv: str, want: Optional[int] = 0, **popen: Any) -> Result:
        """Run `daemonize.py ARGV...`: nothing is added; from the beginning where the caller is a special one."""
        settings = dict({"env": self.env, "cwd": self.folder}, **popen)
        return run([PYTHON, DAEMONIZE if popen else LEAN] + list(argv), want, **settings)

    def start(self, *options: str, app: str = "", **keys: Any) -> Result:
        """Run `start` with the box's pidfile and log; `app`: text of the Python file to host."""
        self.starts += 1  # makes each text one longer: Python's cache looks at size and second only
        hosted = ["--app", self.write("app.py", app + "#" * self.starts)] if app else []
        return self.daemonize("start", "--pidfile", self.pidfile, "--logfile", self.log, *hosted, *options, **keys)

    def host(self, *options: str, app: str = "", **keys: Any) -> str:
        """Start an application, APP unless told otherwise, and return the address where it listens."""
        return self.address(self.start(*options, app=app or APP, **keys))

    def command(self, action: str, *options: str, **keys: Any) -> Result:
        """Run stop, restart, reload or status on the box's pidfile."""
        return self.daemonize(action, "--pidfile", self.pidfile, *options, **keys)

    def python(self, code: str, *argv: str, want: Optional[int] = 0, **popen: Any) -> Result:
        """Run Python code beside daemonize.py, which it has imported."""
        settings = dict({"env": self.env, "cwd": self.folder}, **popen)
        return run([PYTHON, "-c", "import json, os, resource, sys\nsys.path.insert(0, %r)\nimport daemonize\n%s"
                    % (HERE, code)] + list(argv), want, **settings)

    def status(self) -> Dict[str, Any]:
        """Return what `status --json` says of a running daemon."""
        return dict(json.loads(self.command("status", "--json").out))

    def pid(self) -> int:
        """Return the pid in the pidfile; 0 when it is empty or gone."""
        return int(read(self.pidfile).strip() or 0)

    def slay(self) -> int:
        """Kill the daemon, as nobody can prevent, wait for its death, and return its pid."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not is_alive(pid), "death")
        return pid

    def logged(self, word: str, count: int = 1) -> str:
        """Wait for a word in the daemon's log, and return the log."""
        until(lambda: read(self.log).count(word) >= count, "in the log: " + word)
        return read(self.log)

    def address(self, result: Optional[Result] = None) -> str:
        """Return the address that `start` printed, or else the first that `status` says."""
        return self.address_in(result.out if result else " ".join(self.status()["addresses"]))

    def address_in(self, text: str) -> str:
        """Return the first address in a text."""
        found = re.search(r"(?:[\w.]+|\[[0-9a-f:]+\]):\d+|unix:\S+", text)
        assert found, "no address in: " + text
        return found.group()

    def processes(self) -> List[int]:
        """Return the living processes of this box."""
        return processes(self.mark)

    def spawn(self, *argv: str, **popen: Any) -> "subprocess.Popen[bytes]":
        """Start a foreground program, its output in the file `output`, and return it at once."""
        with open(self.output, "ab") as output:
            settings = {"env": self.env, "cwd": self.folder, "stdin": subprocess.DEVNULL,
                        "stdout": output, "stderr": output}
            self.spawned.append(subprocess.Popen(list(argv), **dict(settings, **popen)))
        return self.spawned[-1]

    def stranger(self) -> "subprocess.Popen[bytes]":
        """Start a process that nobody may signal."""
        return self.spawn("sleep", "86400")

    def launch(self, *argv: str, **popen: Any) -> str:
        """Start a server, wait until it says that it listens, and return its first address."""
        before = len(read(self.output))
        self.server = self.spawn(*argv, **popen)
        until(lambda: "listening on" in read(self.output)[before:] or self.server.poll() is not None, "a server")
        said = read(self.output)[before:]
        assert self.server.poll() is None, said
        return self.address_in(said.partition("listening on")[2])

    def serve(self, *options: str, **popen: Any) -> str:
        """Run authserver.py in the foreground on a free port and return its address."""
        return self.launch(PYTHON, AUTHSERVER, "--bind", "127.0.0.1:0", *options, **popen)

    def kill(self, child: "subprocess.Popen[bytes]") -> None:
        """Kill a program that was spawned, and forget what was said."""
        child.kill()
        child.wait()
        remove(self.output)

    def end(self) -> None:
        """End every process of this box."""
        if LINUX:
            kill_all(self.mark)
        elif self.pid():
            os.kill(self.pid(), signal.SIGKILL)
        for child in self.spawned:
            child.kill()
            child.wait()

    def close(self) -> None:
        """End every process of this box and remove its folder."""
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)


class BoxTest(unittest.TestCase):
    """A test with a Box of its own."""
    box: Box

    def setUp(self) -> None:
        self.box = Box()
        self.addCleanup(self.box.close)

    def activated(self, *argv: str, pid: str = "$$") -> Tuple["subprocess.Popen[bytes]", str]:
        """Start a program with a listening socket as descriptor 3, as systemd does; return it and the address."""
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.bind(("127.0.0.1", 0))
        sock.listen(8)
        script = 'LISTEN_FDS=1 LISTEN_PID=%s LISTEN_FDNAMES=web exec "$@"' % pid
        child = self.box.spawn("sh", "-c", script, "sh", *argv, pass_fds=[3],
                               preexec_fn=lambda: os.dup2(sock.fileno(), 3))
        return child, "127.0.0.1:%d" % sock.getsockname()[1]

    def own_name(self) -> str:
        """Return a name for a daemon with default files, which are removed at the end."""
        name, places = TOKEN + "-" + self.box.mark, ["/run/", "/etc/", "/var/log/"] if ROOT else [HOME + "/."]
        self.addCleanup(lambda: remove(*(path for place in places for path in glob.glob(place + name + "*"))))
        self.addCleanup(self.box.close)  # before its files go
        return name

    def stops(self) -> Result:
        """Run `stop`, which is quick and leaves no process and no pidfile."""
        result = self.box.command("stop")
        self.assertEqual((self.box.processes(), os.path.exists(self.box.pidfile)), ([], False))
        self.assertLess(result.seconds, SOON)
        return result

    def small_disk(self, size: str) -> str:
        """Return a folder "small" in the box that holds no more than that."""
        small = self.box.make("small")
        if run(["mount", "-t", "tmpfs", "-o", "size=%s,mode=755" % size, "none", small]).code:
            self.skipTest("needs the right to mount")
        self.addCleanup(lambda: until(lambda: run(["umount", small]).code == 0, "umount"))
        self.addCleanup(self.box.end)
        return small

    def fill(self, folder: str) -> None:
        """Write a file until the disk is full."""
        with contextlib.suppress(OSError), open(os.path.join(folder, "filler"), "wb", 0) as filler:
            while True:
                filler.write(b"x" * 4096)


class SharedBoxTest(unittest.TestCase):
    """Tests that look at one Box and at what set_up started in it, and leave it as it was."""
    box: Box

    @classmethod
    def setUpClass(cls) -> None:
        cls.box = Box()
        try:
            cls.set_up()
        except BaseException:
            cls.box.close()
            raise

    @classmethod
    def set_up(cls) -> None:
        """Start what the tests of this class look at."""

    @classmethod
    def tearDownClass(cls) -> None:
        cls.box.close()


def setUpModule() -> None:
    """Let Ctrl-C end a child, though the run itself was begun with SIGINT ignored (`... &`)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.makedirs(ENVIRONMENT["HOME"], exist_ok=True)


@atexit.register
def clean_up() -> List[str]:
    """End what the run has left, remove its files, and return what there was of them."""
    if os.getpid() != OWNER:
        return []
    left = [read("/proc/%d/cmdline" % pid).replace("\0", " ") for pid in processes(TOKEN)]
    kill_all(TOKEN)
    remove(ENVIRONMENT["PYTHONPYCACHEPREFIX"], ENVIRONMENT["HOME"], PROGRAMS)
    for place in ("/run/", "/etc/", "/var/log/", "/tmp/", os.path.join(HOME, ".")):
        left += [path for path in glob.glob(place + "*%s*" % TOKEN) if path != TEMP]
    left += [os.path.join(TEMP, name) for name in os.listdir(TEMP)] if os.path.isdir(TEMP) else []
    remove(TEMP, *(path for path in left if TOKEN in path))
    return left


def tearDownModule() -> None:
    """Fail the run when a process or a file of it is left (a port needs a process to hold it)."""
    left = clean_up()
    assert not left, "left behind: %s" % left


# -- 0.1 One connection, and a client's own arithmetic -------------------------


class Answer(NamedTuple):
    """One HTTP answer: status, header fields (lower-case name, value), body."""
    status: int
    fields: List[Tuple[str, str]]
    body: bytes

    def field(self, name: str) -> Optional[str]:
        """Return the first value of a field, or None."""
        return dict(reversed(self.fields)).get(name.lower())


class Wire(socket.socket):
    """A connection to HOST:PORT, [V6]:PORT, http://HOST:PORT/ or unix:PATH."""

    def __init__(self, address: str, timeout: float = PATIENCE, source: str = "") -> None:
        where: Any = address[5:]
        if not address.startswith("unix:"):
            host, _, port = address.replace("http://", "").strip("/").rpartition(":")
            where = host.strip("[]"), int(port)
        super().__init__(socket.AF_UNIX if isinstance(where, str) else
                         socket.AF_INET6 if ":" in where[0] else socket.AF_INET)
        self.settimeout(timeout)
        try:
            if source:
                self.bind((source, 0))
            self.connect(where)
        except OSError:
            self.close()
            raise

    def exchange(self, data: bytes, body: bool = True) -> Answer:
        """Send one request and read its one answer (`body` False: to HEAD)."""
        self.sendall(data)
        with self.makefile("rb", 0) as file:  # unbuffered: takes no byte of a later answer
            status = int(file.readline().split()[1])
            lines = [line.decode("latin-1").partition(":") for line in iter(file.readline, b"\r\n")]
            fields = [(name.lower(), value.strip()) for name, _, value in lines]
            missing, content = int(dict(fields).get("content-length", 1 << 30)) * body, bytearray()
            while missing > len(content):
                piece = file.read(missing - len(content))
                if not piece:
                    break
                content += piece
        return Answer(status, fields, bytes(content))

    def ask(self, *words: str, data: bytes = b"", body: bool = True) -> Answer:
        """Send head(*words) and data, and read the answer."""
        return self.exchange(head(*words) + data, body)

    def hear(self) -> bytes:
        """Return all that comes until the server closes."""
        octets = bytearray()    # to which one can add without copying it
        with contextlib.suppress(ConnectionResetError):
            for piece in iter(lambda: self.recv(65536), b""):
                octets += piece
        return bytes(octets)

    def abort(self) -> None:
        """Close with a reset."""
        self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()


connect, exchange = Wire, Wire.exchange


def talk(address: str, data: bytes, end: bool = False) -> bytes:
    """Send `data` (`end`: and the end of it) on a connection of its own; return all that comes."""
    with Wire(address) as wire:
        with contextlib.suppress(*[OSError] * end):  # refused in the middle
            wire.sendall(data)
            if end:
                wire.shutdown(socket.SHUT_WR)
        return wire.hear()


def reach(address: str) -> Optional[OSError]:
    """Return why an address cannot be connected to, or None."""
    try:
        Wire(address).close()
    except OSError as error:
        return error
    return None


def basic(username: str, password: str, charset: str = "utf-8") -> str:
    """Return the value of a Basic Authorization field."""
    return "Basic " + base64.b64encode(("%s:%s" % (username, password)).encode(charset)).decode()


JIM, WRONG = basic("jim", "secret"), basic("jim", "wrong")
CLOSE, EMPTY = "Connection: close", "Content-Length: 0"


def head(path: str = "/example/foo", method: str = "GET", auth: str = JIM, *fields: str) -> bytes:
    """Return a request head for a user that may come in ("" = without Authorization)."""
    lines = ["%s %s HTTP/1.1" % (method, path), "Host: test"]
    lines += ["Authorization: " + auth] * bool(auth) + list(fields)
    return "\r\n".join(lines + ["", ""]).encode("latin-1")


def request(address: str, *words: str, data: bytes = b"", body: bool = True) -> Answer:
    """Send one request, head(*words) and data, on a connection of its own."""
    with Wire(address) as wire:
        return wire.ask(*words, data=data, body=body)


def called(main: Callable[[List[str]], int], words: Sequence[str]) -> Tuple[int, str]:
    """Call a main() in this process; return its exit status and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            return main(list(words)), said.getvalue()
        except SystemExit as end:
            return int(end.code or 0), said.getvalue()


def told(*words: str, typed: bytes = b"") -> Tuple[int, str]:
    """Call authserver.main(), which must not serve; return its exit status and what it says."""
    with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(typed))), \
            mock.patch.object(AuthServer, "serve_forever", side_effect=AssertionError("it serves")):
        return called(authserver.main, words)


def statuses(octets: bytes) -> List[int]:
    """Return the statuses of all answers in what came over a connection."""
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", octets)]


def hashed(algorithm: str, *parts: Union[str, bytes]) -> str:
    """Return H(part:part:...) of RFC 7616 in hex, by hashlib alone: the programs are not asked."""
    sha512 = "sha512_256" if "sha512_256" in hashlib.algorithms_available else "sha512-256"
    names = {"MD5": "md5", "SHA-256": "sha256", "SHA-512-256": sha512}
    octets = b":".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    return hashlib.new(names[algorithm.replace("-sess", "")], octets).hexdigest()


def respond(values: Dict[str, str], method: str = "GET", algorithm: str = "MD5",
            qop: str = "auth", nc: str = "00000001", body: Optional[bytes] = None) -> str:
    """Return the response that a client computes (RFC 7616 section 3.4.1)."""
    one = functools.partial(hashed, algorithm)
    ha1 = one(values["username"], values["realm"], values["password"])
    if algorithm.endswith("-sess"):
        ha1 = one(ha1, values["nonce"], values["cnonce"])
    ha2 = one(method, values["uri"], *([] if body is None else [one(body)]))
    return one(ha1, values["nonce"], nc, values["cnonce"], qop, ha2)


class Digest:
    """A digest client that has read a challenge (or an Authentication-Info with nextnonce)."""

    def __init__(self, challenge: str, username: str = "jim", password: str = "secret",
                 uri: str = "/x", **settings: str) -> None:
        self.values = {"username": username, "password": password, "cnonce": "f2", "uri": uri}
        self.settings, self.count = settings, 0
        self.hear(challenge)

    def hear(self, challenge: str) -> None:
        """Take realm and nonce from a field's value."""
        found = dict(re.findall('(realm|nonce)="([^"]*)"', challenge.replace("nextnonce", "nonce")))
        self.count *= found.get("nonce") == self.values.get("nonce")
        self.values.update(found)

    def field(self, nc: str = "", method: str = "GET", body: Optional[bytes] = None,
              drop: Sequence[str] = (), **changes: str) -> str:
        """Return the next Authorization field; changes are raw text, made after the hashing."""
        self.count += 1
        algorithm = self.settings.get("algorithm", "MD5")
        values = dict(self.values, **{k: v for k, v in changes.items() if k == "nonce"})
        params = {name: '"%s"' % values[name] for name in ("realm", "nonce", "uri", "cnonce")}
        params.update(username='"%s"' % values["username"].encode().decode("latin-1"),
                      nc=nc or "%08x" % self.count, qop=self.settings.get("qop", "auth"), algorithm=algorithm)
        params["response"] = '"%s"' % respond(values, method, algorithm, params["qop"], params["nc"], body)
        params.update({k: v for k, v in changes.items() if k != "nonce"})
        return "Digest " + ", ".join("%s=%s" % (name.replace("_star", "*"), value)
                                     for name, value in params.items() if name not in drop)


def digest(address: str, path: str, method: str = "GET", uri: str = "", body: Optional[bytes] = None) -> str:
    """Return fresh Digest credentials of jim; with auth-int when there is a body to sign."""
    challenge = request(address, path, method, "", EMPTY).field("WWW-Authenticate") or ""
    client = Digest(challenge, uri=uri or path, qop="auth" if body is None else "auth-int")
    return client.field(method=method, body=body)


# -- 1. Authentication, without sockets --------------------------------------

NOW = 2000000000.0     # Wed, 18 May 2033 03:33:20 GMT
RFC = dict(username="Mufasa", realm="http-auth@example.org", password="Circle of Life",
           nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v",
           cnonce="f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ", uri="/dir/index.html")
RFC2617 = dict(RFC, realm="testrealm@host.com", password="Circle Of Life",
               nonce="dcd98b7102dd2f0e8b11d0f600bfb0c093", cnonce="0a4f113b")
JASON = dict(username="Jäsøn Doe", realm="api@example.org", password="Secret, or not?",
             nonce="5TsQWLVdgBdmrQ0XsxbDODV+57QdFR34I9HAbC/RVvkK",
             cnonce="NTg6RKcb9boFIAS3KrFK9BGeh+iDa/sm6jUMp2wds69v", uri="/doe.json")
VECTORS: Sequence[Any] = ((RFC2617, {}, "6629fae49393a05397450978507c4ef1"),
    (RFC2617, {"method": ""}, "376602cfd2f4e8e5e78b948a85263e85"), (RFC, {}, "8ca523f5e9506fed4657c9700eebdbec"),
    (RFC, {"algorithm": "SHA-256"}, "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    (RFC, {"method": ""}, "9b712497bc9f91499fbcca1dfc5f09a5"), (RFC, {"method": "", "algorithm": "SHA-256"},
     "86d3b25618d41854ca5039a5d7e53ff6355d5134a9b1fb088a78ac3c462195a0"),
    (RFC, {"algorithm": "MD5-sess"}, "e783283f46242139c486a698fec7211d"), (RFC, {"algorithm": "SHA-256-sess"},
     "2fd51b3a77ad75bad6afad6003e818d767133c46d9e2749e7f5232ae1ea3efd7"),
    (RFC, {"qop": "auth-int", "body": b""}, "8804a53d3640a40a4f73cea12c5ba451"),
    (RFC, {"qop": "auth-int", "body": b"hello", "method": "POST"}, "23fef4d928a3e9fa6e0b0de51288c997"),
    (RFC, {"qop": "auth-int", "body": b"hello", "method": "POST", "algorithm": "SHA-256"},
     "c98b95dbdb463c4483e324bced57d591946a6f84098142757b1333c52c47d62e"), (JASON, {"algorithm": "SHA-256"},
     "b6d5cb9c3000ea2385250005e294d7132b260b8fd08940d2377373493cee8cc4"),
    (JASON, {}, "2428277c77e50ae43afb1669a43dae19"),
    # RFC 7616 section 3.9.2 prints SHA-512 cut short (erratum 4897); this is the real one.
    (JASON, {"algorithm": "SHA-512-256"}, "3798d4131c277846293534c3edc11bd8a5e4cdcbff78b05db9d95eeb1cec68a5"))
_, _crypt_works = authserver.load_crypt(), authserver.load_crypt()[0](b"x", b"$6$saltsalt$")
needs_crypt = unittest.skipUnless(_crypt_works, "needs a libcrypt that knows $6$")


def crypted(password: str, setting: str) -> str:
    """Return what the C library makes of a password."""
    return (authserver.load_crypt()[0](password.encode(), setting.encode()) or b"").decode()


def attempt(authenticator: Authenticator, *fields: str, client: Optional[str] = None, now: float = NOW,
            target: str = "/x", method: str = "GET", schemes: Sequence[str] = (),
            read_body: Callable[[], bytes] = bytes) -> Any:
    """Return the verdict on a request with these Authorization fields; its parts fit together."""
    found = authserver.Attempt(method, target, fields, client, now, schemes or authenticator.schemes)
    found.read_body = functools.partial(authserver.call_for, read_body)
    verdict = authserver.at_once(authenticator.judge(found))
    reason = verdict.reason.partition(":")[0]
    assert verdict.status == {"": 200, "malformed": 400, "uri mismatch": 400, "locked out": 429}.get(
        reason, 401), verdict
    assert (verdict.username is not None) == (verdict.status == 200), verdict
    assert is_stale(verdict) == (reason in ("stale", "replay")), verdict
    return verdict


def make(users: Optional[Dict[str, str]] = None, **settings: Any) -> Authenticator:
    """Return an authenticator for realm files, whose clock began 10 seconds before NOW."""
    passwords = settings.pop("passwords", None) or Passwords(
        users or {"jim": "secret", "ann": "other"}, realm="files")
    table = authserver.SharedTable()
    table.set_clock(settings.pop("now", NOW - 10))
    return Authenticator(passwords, table=table, **settings)


class Client(Digest):
    """A digest client that has got its challenge from an authenticator."""

    def __init__(self, authenticator: Authenticator, username: str = "jim",
                 password: str = "secret", now: float = NOW, **settings: str) -> None:
        self.authenticator = authenticator
        super().__init__(authenticator.challenge(now)[0][1], username, password, **settings)

    def ask(self, field: str = "", **settings: Any) -> Any:
        """Send a request, with the next field of this client or another one."""
        return attempt(self.authenticator, field or self.field(), **settings)

    def says(self, field: Union[str, int] = "", **settings: Any) -> str:
        """Do that, or send the field with this count; return why it is refused, or ""."""
        if isinstance(field, int):
            field = self.field("%08x" % field)
        return str(self.ask(field, **settings).reason)


def is_stale(verdict: Any) -> bool:
    """Return whether a verdict is a 401 that asks nobody for a password."""
    return verdict.status == 401 and "stale=true" in verdict.fields[0][1]


class AuthTestCase(unittest.TestCase):
    """What the subjects below share."""

    def folder(self) -> str:
        """Return a folder that is gone after the test."""
        path = tempfile.mkdtemp(prefix=os.fsdecode(b"authserver \xc3\xa4 "), dir=TEMP)
        self.addCleanup(shutil.rmtree, path)
        return path

    def write(self, text: str, mode: int = 0o600) -> str:
        """Return the path of a new password file."""
        path = os.path.join(self.folder(), "passwords")
        with open(path, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)
        os.chmod(path, mode)
        return path

    def read(self, *lines: str) -> Passwords:
        """Return what a password file of these lines is read as."""
        return Passwords.read(self.write("\n".join(lines)), "files")

    def refuses(self, pattern: str, function: Callable[..., Any], *args: Any, **kw: Any) -> str:
        """Assert that function raises a Refusal whose text fits; return the cure that it names."""
        with self.assertRaisesRegex(Refusal, pattern) as caught:
            function(*args, **kw)
        return str(caught.exception).partition("\ntry: ")[2]

    def gives(self, function: Callable[..., Any], *rows: Sequence[Any]) -> None:
        """Assert of each row that function returns its last item for all others."""
        for row in rows:
            with self.subTest(row[:-1]):
                self.assertEqual(row[-1], function(*row[:-1]))


class HeaderParsing(AuthTestCase):
    """An Authorization field is read strictly, and always by the same parser"""

    GOOD = dict(username='"a"', realm='"r"', nonce='"n"', uri='"/"', qop="auth", nc="00000001",
                cnonce='"c"', response='"%s"' % ("0" * 32))

    def setUp(self) -> None:
        """Make who knows another realm: what is well-formed goes no further."""
        self.authenticator = make()

    def field(self, end: str = "", **changes: Optional[str]) -> str:
        """Return a Digest field with some parameters changed (None: left out)."""
        params: Dict[str, Optional[str]] = dict(self.GOOD, **changes)
        words = ["%s=%s" % item for item in params.items() if item[1] is not None]
        return "Digest " + ",".join(words) + end

    def malformed(self, *fields: str) -> None:
        """Assert that each is answered with 400, in nobody's name."""
        for field in fields:
            with self.subTest(field[:40]):
                self.assertEqual((400, None, None), attempt(self.authenticator, field)[:3])

    def test_refuses_a_whole_field_for_one_fault(self) -> None:
        """Each stands alone beside all that Digest asks for: nothing else is the reason."""
        for field in (self.field(", ,\t,"), self.field(qop=None)):
            self.assertEqual("another realm", attempt(self.authenticator, field).reason)
        missing: List[Any] = [None]
        wrong = {"nc": ["0", "1", "00000000", "000000001", "123456789", "zzzzzzzz", "+0000001",
                        '"0000 001"', "0000_001", '"%s"' % ("\xb2" * 8)],
                 "response": ['"%s"' % text for text in (
                     "", "0" * 31, "0" * 33, "0" * 96, "g" * 32, "\xe9\xe9")],
                 "cnonce": ['""'], "realm": [], "uri": [], "username": []}
        for name, texts in wrong.items():
            self.malformed(*[self.field(**{name: text}) for text in missing + texts])
        for name in ("a", "ISO-8859-1''a", "UTF-8''a'b"):
            self.malformed(self.field(username=None, **{"username*": name}))
        self.malformed(*map(self.field, (
            ",x", ",x=", ",x=y z=w", ";x=y", ',x="y', ',x=y"', ",=y", ',x="y"z', ",x=\xe9", ",\n",
            "=", ",x=y=", ",nc=00000001", ',NC="00000001"', ',x="", X=y', ",username*=UTF-8''a",
            *[',x="%s"' % text for text in ("\0", "\n", "\x08", "\x7f", "\\", "\\\0")])))
        # No scheme; and of Basic: no strict base64, no colon, control characters.
        self.malformed("", " ", "=", ",", "Dig\xe9st a=b", "Basic\tabc", "Basic", JIM + "!!!")
        self.malformed(*["Basic " + token for token in (
            "=", "====", "!!!", "YTpi=", "YTpi==", "YTpiYw", "YTpiYx==", "YT pi", "YTpi!!!!", "a=b",
            "YTpi-_-_", "YTpi,YTpi", "YTpi YTpi", "YWxpY2U=", "QWxhZGRpbjpvcGVuIHNlc2FtZQ")])
        self.malformed(basic("a", "b\0c"), basic("a\n", "b"), basic("a", "\x7f"))

    def test_a_host_is_a_name_or_an_address_with_a_port(self) -> None:
        for host in ("", "a", "[::1]", "[::1]:80", "a:", "127.0.0.1:80", "a_b.c-d~%20"):
            authserver.parse_head(("GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host).encode())
        for host in ("a/b", "u@b", "[]", "[::1]]", "[g]", "a:8o", "a:80:80"):
            with self.subTest(host), self.assertRaises(authserver.BadRequest):
                authserver.parse_head(("GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host).encode())

    def test_what_is_as_long_as_it_may_be_is_read(self) -> None:
        """A field, a name with its password, realm, nonce and cnonce together; and no more."""
        end = ",x=".ljust(authserver.MAX_CREDENTIALS - len(self.field()), "y")
        for more in (0, 1):
            text = "x" * (authserver.MAX_TEXT - 2 + more)
            fields = [self.field(**{name: '"%s"' % text}) for name in ("realm", "nonce", "cnonce")]
            for field in fields + [basic("a", text), self.field(end + "y" * more)]:
                self.assertEqual(400 if more else 401, attempt(self.authenticator, field).status)
        # To normalize 16 KiB of combining characters would take a tenth of a second.
        long = "\u0315\u0300" * 300
        self.malformed(basic(long, "x"), basic("x", long),
                       self.field(username='"%s"' % long.encode().decode("latin-1")))

    def test_a_field_takes_no_longer_than_its_length(self) -> None:
        """Sixteen times the length costs sixteen times the CPU, and not its square."""
        def cost(size: int, start: str, filling: str, end: str) -> float:
            began = time.process_time()
            with contextlib.suppress(authserver.Malformed):
                authserver.parse_authorization("Digest " + start + filling * size + end)
            return time.process_time() - began
        for form in (("x=y", "\t", "\xe9"), ("x=y", ", ", "\xe9"), ("", "z", "\t\xe9"),
                     ("x=y,", "z", "?")):
            long = min(cost(7000, *form) for _ in range(5))
            self.assertLess(long, 80 * cost(437, *form) + 0.001, form)


class DigestArithmetic(AuthTestCase):
    """The published examples come out to the letter"""

    def test_equals_what_others_have_published(self) -> None:
        """RFC 2617, RFC 7616 (with errata 4495, 4897), -sess and auth-int forms; CherryPy."""
        def theirs(values: Dict[str, str], method: str = "GET", algorithm: str = "MD5",
                   qop: str = "auth", body: Optional[bytes] = None) -> str:
            who = values["username"], values["realm"], values["password"]
            nonce, cnonce = values["nonce"], values["cnonce"]
            ha1 = authserver.digest_ha1(*who, algorithm)
            if algorithm.endswith("-sess"):
                ha1 = authserver.digest_ha1_session(ha1, nonce, cnonce, algorithm)
            ha2 = authserver.digest_ha2(method, values["uri"], algorithm, body)
            return authserver.digest_response(ha1, nonce, "00000001", cnonce, qop, ha2, algorithm)
        for values, settings, want in VECTORS:
            with self.subTest(values["realm"], **settings):
                if settings.get("algorithm", "MD5") not in authserver.HASHES:
                    self.skipTest("this Python's hashlib lacks " + settings["algorithm"])
                self.assertEqual(want, theirs(values, **settings))
                self.assertEqual(want, respond(values, **settings))  # what the tests compute
        self.assertEqual(authserver.digest_ha1("alice", "wonderland", "4x5istwelve"),
                         "3238cdfe91a8b2ed8e39646921a02d4c")

    def test_serves_where_fips_mode_refuses_hashes(self) -> None:
        """Both schemes and a lock-out, with hashlib as Red Hat's FIPS mode leaves it."""
        def strict(name: str) -> Any:
            real = getattr(hashlib, name)

            def call(*data: bytes, usedforsecurity: bool = True, **keys: Any) -> Any:
                if keys or usedforsecurity or name != "md5":
                    raise ValueError("disabled for FIPS")
                return real(*data)
            return call
        module: Any = types.ModuleType("anew")      # it finds out but once what it can do
        module.__file__ = AUTHSERVER
        loader = importlib.machinery.SourcelessFileLoader("anew", AUTHSERVER)
        names = ("md5", "blake2s", "blake2b")
        with mock.patch.multiple(hashlib, **{name: strict(name) for name in names}):
            loader.exec_module(module)
            guarded = module.Authenticator(module.Passwords({"jim": "secret"}, realm="files"),
                                           max_failures=(1, 60.0))
            client = Client(guarded, now=guarded.clock())
            said = [client.says(field, client="192.0.2.1", now=guarded.clock())
                    for field in (client.field(), JIM, WRONG, JIM)]
            self.assertEqual(said, ["", "", "bad password", "locked out"])
        with mock.patch.multiple(hashlib, create=True, new=mock.Mock(side_effect=ValueError),
                                 none=None, other=mock.Mock(side_effect=TypeError)):
            self.assertIsNone(authserver.find_hash("none", "sha512-256", "other"))


@contextlib.contextmanager
def children(count: int, function: Callable[[int], int]) -> Iterator[List[int]]:
    """Call function(0), function(1) ... at once, in children that live to the end of the body."""
    (gate, opened), (said, say), pids = os.pipe(), os.pipe(), []
    for number in range(count):
        pids.append(os.fork())
        if not pids[-1]:
            try:
                signal.alarm(int(PATIENCE))
                os.close(opened)
                os.read(gate, 1)        # returns at its end, for all of them at once
                os.write(say, b"%d\n" % function(number))
                os.close(say)
                signal.pause()
            finally:
                os._exit(1)
    for fd in (opened, gate, say):
        os.close(fd)
    try:
        with open(said) as results:
            yield [int(results.readline()) for _ in pids]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


class Nonces(AuthTestCase):
    """A nonce cannot be forged, and each of its counts is good once"""

    def crowded(self, slots: int) -> Any:
        """Return a patch that makes all new nonces share so many places in the table."""
        real = os.urandom
        return mock.patch("os.urandom", lambda size: (
            real(size)[:-2] + bytes([0, real(1)[0] % slots]) if size == 6 else real(size)))

    def test_is_good_for_its_lifetime_only(self) -> None:
        """Also shortly before it was made elsewhere; with stale, or near its end, comes another."""
        skew = authserver.CLOCK_SKEW
        for age, reason, word in (
                (-skew - 0.5, "stale", "stale=true"), (-skew, "", ""), (0, "", ""),
                (269, "", ""), (271, "", "nextnonce="), (299.5, "", "nextnonce="),
                (300, "stale", "stale=true")):
            client = Client(make())
            for _ in range(2):      # who is right the second time is recalled
                verdict = client.ask(now=NOW + age)
                told = re.findall("stale=true|nextnonce=", verdict.fields[0][1])
                self.assertEqual((verdict.reason, "".join(told)), (reason, word), age)
            if word:
                client.hear(verdict.fields[0][1])
                self.assertEqual("", client.says(now=NOW + age + 200))

    def test_cannot_be_forged(self) -> None:
        """A changed character, another key, junk: stale, but for a wrong password just wrong."""
        client, other = Client(make()), Client(make())
        nonce, liar = client.values["nonce"], Client(client.authenticator, password="wrong")
        forged = [nonce[:i] + "AB"[nonce[i] == "A"] + nonce[i + 1:] for i in range(len(nonce))]
        forged += ["x", "0" * 36, nonce + "=", nonce[:-1], "A" * 200, other.values["nonce"]]
        for text in forged:
            said = [one.says(one.field(nonce=text)) for one in (client, liar)]
            self.assertEqual(said, ["stale", "bad response"], text)
        self.assertEqual(["bad response", ""], [liar.says(now=NOW + 301), client.says(1)])

    def test_each_count_is_good_once_in_any_order(self) -> None:
        """The second time is a replay. A huge one costs nothing, and makes small ones too old."""
        client, top = Client(make()), 0xffffffff
        several = [1, 3, 2, 5, 4, 64]
        self.assertEqual([client.says(count) for count in several * 2], [""] * 6 + ["replay"] * 6)
        several = [top, 65, top - authserver.NC_WINDOW, top - 50]
        self.assertEqual([client.says(count) for count in several], ["", "replay", "replay", ""])

    def test_window_agrees_with_a_set(self) -> None:
        """For 5,000 random uses. No shift is longer than the window: that would take gigabytes."""
        class Short(int):
            def __lshift__(self, places: int) -> int:
                assert places < authserver.NC_WINDOW
                return int(self) << places
        chance, window = Random(SEED), (0, 0)
        used: Set[int] = set()
        for _ in range(5000):
            highest, seen = window
            count = max(1, highest + chance.randint(-150, 70))
            found = authserver.advance_window(highest, Short(seen), count)
            is_good = count not in used and count > highest - authserver.NC_WINDOW
            self.assertEqual(found and found[0], max(highest, count) if is_good else None)
            used.add(count)
            window = found or window

    def test_no_use_counts_twice_however_small_the_table(self) -> None:
        """With nonces that push one another out, and a clock that is set: never one use twice."""
        with self.crowded(2):
            authenticator, chance, now = make(), Random(SEED), NOW
            accepted, clients = [], []  # type: List[str], List[Client]
            for _ in range(1500):
                now += chance.choice((0, 0, 0, 0.003, 0.01, 1, 20) * 20 + (-3600, 3600))
                authenticator.table.set_clock(now)
                if chance.random() < 0.3 or not clients:
                    clients = clients[-6:] + [Client(authenticator, now=now)]
                client = chance.choice(clients)
                field = client.field("%08x" % chance.randint(1, 6))
                accepted += [field] * (not client.says(field, now=now))
        self.assertEqual(len(set(accepted)), len(accepted))
        self.assertGreater(len(accepted), 50)

    def test_a_newer_nonce_takes_the_place_and_an_older_one_never_does(self) -> None:
        """Of two of one moment in one place the second is stale; hardly any two want the same."""
        with self.crowded(1):
            authenticator = make()
            first, second, late = (Client(authenticator, now=now) for now in (NOW, NOW, NOW + 1))
            said = [client.says(1) for client in (first, second, first, late, first, second)]
        self.assertEqual(["", "stale", "replay", "", "stale", "stale"], said)
        clients = [Client(authenticator, now=NOW + 2) for _ in range(200)]
        self.assertLess(sum(client.says() == "stale" for client in clients), 10)

    def test_one_of_many_processes_or_threads_gets_the_same_count(self) -> None:
        """Eight use the same counts at once; record locks alone do not keep threads apart."""
        client, real = Client(make()), authserver.advance_window
        fields, gate = [client.field() for _ in range(80)], threading.Barrier(8)

        def race(fields: List[str]) -> int:
            return [client.says(field) for field in fields].count("")

        def thread(_: int) -> int:
            gate.wait(PATIENCE)
            return race(fields[60:])

        def slowly(*window: int) -> Any:
            select.select([], [], [], 0.001)  # others get their turn where it hurts most
            return real(*window)
        with children(8, lambda _: race(fields[:60])) as counts:
            self.assertEqual(sum(counts), 60)
        with mock.patch.object(authserver, "advance_window", slowly):
            self.assertEqual(sum(threads(8, thread)), 20)

    def test_each_process_counts_in_a_row_of_its_own(self) -> None:
        """For as long as it lives; the sum is of all who ever counted."""
        table = authserver.SharedTable()

        def count(_: int) -> int:
            for _ in range(5):
                table.add("busy")
            return table._own_row()
        with children(3, count) as rows:
            table.add("busy", 2)
            self.assertEqual(len({*rows, table._own_row()}), 4)
        self.assertEqual((table.statistics()["busy"], sum(table.statistics().values())), (17, 17))

    def test_a_lock_is_given_back(self) -> None:
        """To another process at once; where it cannot be had nothing changes, and nobody has it."""
        client = Client(make(max_failures=(1, 60.0)))
        self.assertEqual("", client.says(1))
        self.assertEqual("bad password", client.says(WRONG, client="192.0.2.1"))
        with children(1, lambda _: [client.says(1), client.says(2), client.says(
                WRONG, client="192.0.2.2")] == ["replay", "", "bad password"]) as said:
            self.assertEqual(said, [True])
        for error in (errno.ENOLCK, errno.EDEADLK):
            with mock.patch("fcntl.lockf", side_effect=OSError(error, "")):
                self.assertRaises(OSError, client.says, 3)
        self.assertEqual("", client.says(3))
        mutex = client.authenticator.table._mutex
        self.assertEqual(threads(1, lambda _: mutex.acquire(timeout=1)), [True])

    def test_an_heir_that_shares_the_memory_knows_what_was_used(self) -> None:
        """A nonce of the old one is good in the new one, no use twice, and a lock-out holds."""
        for secret in (b"", b"s" * 32):
            keys: Any = dict(nonce_secret=secret, max_failures=(1, 60.0))
            old = Authenticator(Passwords({"jim": "secret"}, realm="files"), **keys)
            table = authserver.SharedTable(os.dup(old.table.fd))
            heir = Authenticator(old.passwords, table=table, **keys)
            client = Client(old, now=old.clock())
            one, two, three = (client.field() for _ in range(3))
            for who, field, said in ((old, one, ""), (heir, two, ""), (heir, one, "replay"),
                                     (old, two, "replay"), (old, three, ""),
                                     (old, WRONG, "bad password"), (heir, JIM, "locked out")):
                verdict = attempt(who, field, client="192.0.2.1", now=old.clock())
                self.assertEqual(verdict.reason, said)

    def test_machines_with_one_secret_accept_one_anothers_nonces(self) -> None:
        """Younger than their own start, that is: after a restart an old one is stale once."""
        first, second = (make(nonce_secret=b"s" * 32) for _ in range(2))
        client = Client(first)
        client.authenticator = second
        self.assertEqual("", client.says())
        client.authenticator = make(nonce_secret=b"s" * 32, now=NOW + 5)
        verdict = client.ask(now=NOW + 6)
        client.hear(verdict.fields[0][1])
        self.assertEqual(["stale", ""], [verdict.reason, client.says(now=NOW + 7)])
        client.authenticator = make(nonce_secret=b"t" * 32)
        self.assertEqual("stale", client.says(now=NOW + 7))

    def test_a_clock_that_is_set_begins_an_era(self) -> None:
        """Not within CLOCK_SKEW of the right time; else all are stale once, and all places free."""
        with self.crowded(1):
            client, skew = Client(make()), authserver.CLOCK_SKEW
            table = client.authenticator.table
            for count, ahead in enumerate((0.0, skew - 1, 1 - skew), 1):
                table.set_clock(table.now() + ahead)
                self.assertEqual("", client.says(count), ahead)
            self.assertEqual("replay", client.says(1))
            for ahead in (skew + 1, -skew - 1, -3600):
                then, now = table.now(), table.now() + ahead
                old = Client(client.authenticator, now=then)
                table.set_clock(now)
                new = Client(client.authenticator, now=now)
                self.assertEqual([old.says(now=then), new.says(now=now)], ["stale", ""], ahead)
            self.assertEqual("stale", client.says(9))       # of three eras ago

    def test_a_time_of_day_that_steps_is_not_looked_at(self) -> None:
        """By who shares no secret: what was used stays used, and all nonces stay good."""
        authenticator, real = Authenticator(users()), time.time
        client = Client(authenticator, now=authenticator.clock())
        used = client.field()
        self.assertEqual("", client.says(used, now=authenticator.clock()))
        for step in (-86400, -3600, 3600, 86400):
            with mock.patch("time.time", lambda: real() + step):
                said = [client.says(field, now=authenticator.clock()) for field in ("", used)]
                self.assertEqual(said, ["", "replay"], step)

    @needs_linux
    def test_nothing_is_left_behind(self) -> None:
        """By 10,000 challenges no memory, once the caches are full; by a table no descriptor."""
        gc.collect()
        before, sizes = os.listdir("/proc/self/fd"), []  # type: List[str], List[str]
        for count in (3000, 10000):
            authenticator = make()
            for _ in range(count):
                attempt(authenticator)
            sizes += re.findall(r"VmData:\s+(\d+)", read("/proc/self/status"))
        self.assertLess(int(sizes[1]) - int(sizes[0]), 700)
        del authenticator
        gc.collect()
        self.assertEqual(os.listdir("/proc/self/fd"), before)

    def test_signs_and_remembers_whatever_python_and_kernel_lack(self) -> None:
        """BLAKE2, or one with keys, or a permitted one; memory that has a descriptor."""
        for error in (AttributeError, TypeError, ValueError):
            with mock.patch.object(hashlib, "blake2s", side_effect=error):
                sign = authserver.find_mac()
                made = {sign(key, data) for key in (b"k", b"l") for data in (b"", b"x")}
                self.assertEqual([len(mac) for mac in made], [12] * 4, error)
        for failure in (AttributeError, OSError(errno.ENOSYS, "")):
            with mock.patch.object(os, "memfd_create", side_effect=failure, create=True):
                client = Client(make())
            found, size = os.fstat(client.authenticator.table.fd), authserver.TABLE_SIZE
            self.assertEqual((found.st_nlink, found.st_size), (0, size))
            self.assertGreaterEqual(found.st_blocks * 512, size)    # so a full disk is found now
            self.assertEqual(["", "replay"], [client.says(1), client.says(1)])

    @unittest.skipUnless(hasattr(os, "memfd_create"), "needs memfd_create (Python 3.8, Linux)")
    def test_nobody_makes_the_memory_smaller(self) -> None:
        """Sealed: a page that is cut off under a process would kill it."""
        table = authserver.SharedTable()
        with self.assertRaises(PermissionError):
            os.ftruncate(table.fd, 0)


HEX = "0" * 32
LINE = "jim:files:" + hashed("MD5", "jim", "files", "secret")
SHA = "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ="       # of `secret`
BCRYPT, SLOW = "$2y$04$abcdefghijklmnopqrstuu", "$6$rounds=1000$saltsalt$"
KINDS = ("plain", "MD5", "SHA-256", "{SHA}", "{SSHA}", SLOW, "$6$s$", "$5$rounds=1000$saltsalt$",
         BCRYPT, BCRYPT.replace("y", "b"), "$y$j75$saltsalt$")


def users(**more: str) -> Passwords:
    """Return a dictionary of realm files, of this run: who serves the same shares locks."""
    return Passwords(dict({"jim": "secret", "run": TOKEN}, **more), realm="files")


def stored(kind: str, password: str) -> str:
    """Return a line of ann's, of one of KINDS."""
    octets, salt = password.encode(), b"salt" * (kind == "{SSHA}")
    if kind[0] == "$":
        return "ann:" + crypted(password, kind)
    if kind[0] == "{":
        octets = hashlib.sha1(octets + salt).digest() + salt
        return "ann:" + kind + base64.b64encode(octets).decode()
    if kind == "plain":
        return "ann:plain:" + password
    return "ann:files:" + hashed(kind, "ann", "files", password)


class PasswordFiles(AuthTestCase):
    """A password file is read as Apache reads it; a mistake names line, field and cure"""

    # What is said; of which lines, when they stand after jim's; passwd cures all but the last two.
    MISTAKES = (
        ("expected user:realm:HA1.*a field is missing", "bob", "bob:", "bob:secret", "bob:plain:"),
        ("field 2: 00000... is no hash", "bob::" + HEX),
        ("field 3: nothing may follow", "bob:%s:Bob" % SHA, "bob:$2y$05$%s:Bob" % ("x" * 53),
         "bob:$6$salt$%s:" % ("x" * 86)),
        ("field 3: neither 32 nor 64 hex digits", "bob:files:%s0" % HEX, "bob:files:%s:x" % HEX),
        ("field 2: {MD5}... is no hash we know", "bob:{MD5}x"),
        ("field 2: [$]apr1... is no hash we know", "bob:$apr1$a$b"),
        ("field 2: the libcrypt of this machine does not know [$]99[$]", "bob:$99$x$y"),
        ("field 2: the libcrypt .* this one is of the wrong length",
         "bob" + stored(SLOW, "x")[3:-1]),
        ("again, after line 1", "jim:plain:x", "jim:" + SHA, LINE),
        ("an empty password", "bob:{SHA}2jmj7l5rSw0yVb/vlWAYkK/YBwk=",
         "bob:files:" + hashed("MD5", "bob:files:")),
        ("unable to use this password: empty, control characters in it, no UTF-8, or too long",
         "bob:plain:a\tb", "bob:plain:b\udce4b", "bob:plain:" + "p" * 1021),
        ("field 3: neither 32 nor 64 hex digits", "bob:pass:word"),
        ("unable to use user name NAME: .* no UTF-8", *[name + ":plain:x" for name in (
            "\u200bbob", "b\udce4b", "bo\ufeffb", "bob\u00a0", "bob ", "bob\\", "-", "",
            "b" * 256)]))

    def test_names_line_field_and_cure(self) -> None:
        """Each mistake alone; the command that cures it can be pasted, and does."""
        for reason, line, curable in [(row[0], line, row not in self.MISTAKES[-2:])
                                      for row in self.MISTAKES for line in row[1:]]:
            with self.subTest(line[:40]):
                path, user = self.write("%s\n# x\n%s\n" % (LINE, line)), line.partition(":")[0]
                said = "unable to use passwords .*: line 3: user NAME: " + reason
                said = said.replace("NAME", re.escape(repr(user)))
                cure = shlex.split(self.refuses(said, Passwords.read, path, "files"))
                self.assertEqual(cure[:3], ["python3", SOURCES[1], "passwd"] * curable)
                if curable:
                    self.assertEqual(told(*cure[2:], "--stdin", typed=b"new\n")[0], 0)
                    self.assertTrue(Passwords.read(path, "files").check_password(user, "new"))

    def test_names_the_cure_of_the_whole_file(self) -> None:
        """Missing: passwd; open to all: chmod; both can be pasted. A folder, a pipe: no command."""
        missing, line = os.path.join(self.folder(), "it's new"), "admin:plain:x"
        cure = shlex.split(self.refuses("No such file", Passwords.read, missing))[2:]
        self.assertEqual(cure, ["passwd", missing, "admin"])
        self.assertEqual(told(*cure, "--stdin", typed=b"x\n")[0], 0)
        self.assertTrue(Passwords.read(missing).check_password("admin", "x"))
        secret = authserver.read_nonce_secret
        for reads, path in ((Passwords.read, self.write(line, 0o604)),
                            (Passwords.read, self.write(line, 0o602)),
                            (secret, self.write("s" * 32, 0o644)), (secret, self.write("s" * 15))):
            run(["sh", "-c", self.refuses("everybody may|shorter than 16", reads, path)], 0)
            reads(path)
        self.assertEqual(secret(self.write("s" * 16)), b"s" * 16)
        # The last is a wrong realm: what cures the file does not cure that.
        for words in ([self.folder()], ["/dev/null"], [self.write(LINE), "a:b"]):
            self.assertEqual(self.refuses("unable to", Passwords.read, *words), "")

    def test_passes_over_what_does_not_matter(self) -> None:
        """Blanks at ends, comments after blanks, CRLF, U+FEFF at the start, other realms."""
        passwords = self.read(
            "\ufeff# M\udcfcller\r", " \t# more\r", "\r", " \t%s \t\r" % LINE, "jim:other:" + HEX,
            "ann:plain:se:cret \r", "bob:other:%s " % (HEX * 2), "\tsha:%s\t" % SHA)
        self.assertEqual(["jim", "ann", "sha"], list(passwords.entries))
        self.gives(passwords.check_password, ("jim", "secret", True), ("ann", "se:cret", True),
                   ("sha", "secret", True))
        cure = self.refuses("no user of realm files in it, but of other, third", self.read,
                            "jim:other:" + HEX, "bob:third:" + HEX)
        self.assertRegex(cure, "passwd .* admin --realm files")

    def test_what_a_container_is_given_may_be_read_by_all(self) -> None:
        """0444 from root when we are not root, and anything on a read-only mount; nothing else."""
        for mode, owner, uid, flags, exposed in (
                (0o444, 0, 1000, 0, False), (0o644, 0, 1000, 0, True), (0o444, 1000, 1000, 0, True),
                (0o444, 0, 0, 0, True), (0o644, 0, 1000, os.ST_RDONLY, False),
                (0o666, 0, 0, os.ST_RDONLY, False), (0o602, 0, 1000, 0, True),
                (0o640, 0, 1000, 0, False)):
            found = mock.Mock(st_mode=stat.S_IFREG | mode, st_uid=owner, f_flag=flags)
            with self.subTest(oct(mode), owner=owner, uid=uid, flags=flags), mock.patch.multiple(
                    "os", fstat=lambda _: found, fstatvfs=lambda _: found, geteuid=lambda: uid):
                self.assertEqual(authserver.is_exposed(0), exposed)

    def test_fips_mode_is_told_by_line(self) -> None:
        """Without MD5 or SHA-1 the entries that need them are refused, each by line and field."""
        with mock.patch.dict(authserver.HASHES), mock.patch.object(authserver, "SHA1", None):
            del authserver.HASHES["MD5"]
            self.refuses("line 1: user 'jim': field 3: the hashlib of this Python lacks MD5; line 2"
                         ": user 'ann': field 2: .* lacks SHA-1", self.read, LINE, "ann:" + SHA)
            self.assertEqual(set(users().entries["jim"].ha1) - {"SHA-512-256"}, {"SHA-256"})

    def test_the_names_of_dictionaries_differ(self) -> None:
        """fingerprint() tells realm, users and passwords apart, but not the order of lines."""
        several = [users(), users(ann="x"), users(ann="hunter2"), users(bob="x"),
                   Passwords({"jim": "secret", "run": TOKEN}, realm="b")]
        self.assertEqual(len({item.fingerprint() for item in several}), len(several))
        other = Passwords({"ann": "x", "run": TOKEN, "jim": "secret"}, realm="files")
        self.assertEqual(several[1].fingerprint(), other.fingerprint())
        self.assertNotIn("hunter2", repr(vars(several[2])))

    def test_the_mistake_of_the_second_article_is_refused_at_start(self) -> None:
        """Digest, offered to who has a hash for Basic: named by line, user, scheme and cure."""
        passwords = self.read(LINE, "", "carol:" + SHA)
        cure = self.refuses(r"line 3: user 'carol' has only \{SHA\}: cannot answer Digest MD5",
                            make, passwords=passwords)
        self.assertRegex(cure, "authserver.py'? passwd .* carol --realm files.*--schemes basic")
        self.refuses("line 1: user 'jim' has only MD5 HA1: cannot answer Digest SHA-256",
                     make, passwords=passwords, algorithms=["SHA-256"])
        make(passwords=passwords, schemes=["basic"])


class Limits(AuthTestCase):
    """What a scheme, a client or the file could not carry is refused where it is stored"""

    NAMES = ("", "-", "a:b", "a\n", "#a", 'a"', " a", "a ", "a\\", "\ufeffa", "a\u200b", "\u00a0",
             "a\x7f", "a\x85", "\ud800", "b" * 256)
    SECRETS = ("", "a\x1fb", "\0", "a\x7f", "\udcff", "p" * 1021, "ü" * 511)
    REALMS = ("", 'a"b', "a\\b", "a:b", "a\n", "ä", "plain", "{SHA}", "$6$", " a", "a ")

    def test_in_the_library_and_by_passwd(self) -> None:
        """Names, passwords, realms that clients or readers of the file would misunderstand."""
        path = self.write("# precious\n")
        for name, realm, secret in [(name, "files", "x") for name in self.NAMES] + [
                ("jim", "files", secret) for secret in self.SECRETS] + [
                ("jim", realm, "x") for realm in self.REALMS]:
            with self.subTest(name, realm=realm, secret=secret[:5]):
                self.refuses("unable to use", Passwords, {name: secret}, realm=realm)
                self.refuses("unable to use", authserver.change_password, path, name, realm, secret)
        self.assertEqual(read(path), "# precious\n")
        Passwords({"a": "b"}, realm="A-Za z09 (plain) !#$")

    def test_what_is_accepted_gets_in(self) -> None:
        """The cure of that mistake: one dictionary for both schemes, even of the strangest."""
        people = {"jim": "p" * 1020, "a": "ü" * 511, "ü" * 127: "x", "--": "-", "50%": "%41",
                  "DOM\\jim": "a:b\\\"", "a b": " blank ", "jürgen": "päss",
                  "ju\u0308rg": "pa\u0308ss"}
        passwords = Passwords(people, realm="files")
        for pair in people.items():
            authenticator = make(passwords=passwords)
            nfc, nfd = [[unicodedata.normalize(form, text) for text in pair]
                        for form in ("NFC", "NFD")]
            for scheme, field in (("Basic", basic(*pair)),
                                  ("Digest", Client(authenticator, nfc[0], nfc[1]).field())):
                verdict = attempt(authenticator, field)
                self.assertEqual((verdict.username, verdict.scheme), (nfc[0], scheme))
            self.gives(passwords.check_password, (*nfc, True), (*nfd, True))

    def test_each_kind_of_entry_is_for_one_user_with_one_password(self) -> None:
        """All of it counts (72 bytes under bcrypt, which takes no more); what is stored is none."""
        for kind, right in [(name, word) for name in KINDS for word in (
                "secret", "a" * (72 if name.startswith("$2") else 200), "ü" * 36)]:
            with self.subTest(kind, right=right[:9]):
                line = stored(kind, right)
                if kind[0] == "$" and not line.startswith("ann:" + kind[:3]):
                    self.skipTest("needs a libcrypt that knows " + kind[:3])
                passwords, value = self.read(line), line.split(":")[-1]
                wrong = {"", "\0", "a" * 500, right[:-1], right + "x", right + "\0x",
                         right + "\ud800", right.swapcase(), line[4:], value,
                         value.partition("}")[2]} - {right}
                self.gives(passwords.check_password, *[("ann", word, False) for word in wrong],
                           *[(name, right, False) for name in (
                               "nobody", "", "ANN", "ann\0", "\ud800", line)], ("ann", right, True))
                warning = r"\A\$2.\$04\$ in .*: bcrypt knows 72 bytes" if "$2" in kind else r"\A\Z"
                self.assertRegex("".join(passwords.warnings), warning)
                self.assertFalse(passwords.verify("ann", right + "\ud800"))     # only a program can
        for kind, place in itertools.product(("{SHA}", "{SSHA}"), (0, 7, 9, 10, 12, 19)):
            octets = bytearray(base64.b64decode(stored(kind, "secret").partition("}")[2]))
            octets[place] ^= 1
            passwords = self.read("ann:" + kind + base64.b64encode(octets).decode())
            self.assertFalse(passwords.check_password("ann", "secret"), place)

    @needs_crypt
    def test_strangers_take_the_slowest_way(self) -> None:
        """Wherever the slow entry stands in the file, it stands in for who is not there."""
        slow = stored(SLOW, "hunter2")
        for lines in ([slow, LINE], [LINE, slow], ["sha:" + SHA, slow, LINE]):
            passwords = self.read(*lines)
            self.gives(passwords.is_slow, ("ann", True), ("nobody", True), ("jim", False))
            with mock.patch.object(authserver, "matches", return_value=True) as looked:
                self.assertFalse(passwords.verify("nobody", "hunter2"))
            self.assertEqual([call[0][0].is_slow for call in looked.call_args_list], [True])
            # Equal time is promised for files of one kind.
            self.assertIn("$6$rounds=1000$", passwords.warnings[0])
        self.assertFalse(users().is_slow("nobody"))


@needs_crypt
class SlowHashes(AuthTestCase):
    """The hashes of htpasswd and of the C library are verified, once per credential"""

    def test_a_bad_salt_is_the_fault_of_its_line_alone(self) -> None:
        """Another hash of that form is verified, also once the file has been mended."""
        good = stored(BCRYPT, "secret")
        bad = "bob:" + good[4:11] + "#" + good[12:]
        with mock.patch.object(authserver, "FORMS", set()):
            self.refuses("passwords.*: line 1: user 'bob': field 2: .*does not know [^;]*$",
                         self.read, bad, good)
            self.assertTrue(self.read(good).check_password("ann", "secret"))
            self.assertEqual(len(authserver.FORMS), 1)      # and is known from now on

    def test_finds_crypt_by_whatever_name_it_has(self) -> None:
        """crypt_r for two at a time; crypt for one; neither: the file is refused, not log-ins."""
        plain, reentrant = mock.Mock(spec=["crypt"]), mock.Mock(spec=["crypt_r"])
        plain.crypt.return_value = reentrant.crypt_r.return_value = b"made"
        for libraries, made, count in (([OSError, reentrant], b"made", 2), ([plain], b"made", 1),
                                       ([mock.Mock(spec=[])] + [OSError] * 3, None, 1)):
            with mock.patch("ctypes.CDLL", side_effect=libraries):
                function, turns = authserver.load_crypt.__wrapped__()
            self.assertEqual(made, function(b"phrase", b"setting"))
            self.assertEqual([turns.acquire(blocking=False) for _ in range(count + 1)],
                             [True] * count + [False])
        turns.release()
        with mock.patch.object(authserver, "load_crypt", lambda: (function, turns)), \
                mock.patch.object(authserver, "FORMS", set()):
            self.refuses("libcrypt", self.read, "u0:" + SLOW + "x" * 86)
            entry = authserver.Entry("u0", 1, {}, SLOW + "x")
            self.assertFalse(authserver.matches(entry, "files", "too long for it"))

    def test_a_right_password_is_hashed_once(self) -> None:
        """A wrong one is each time, another user's is not shared, and few are remembered."""
        line = stored(SLOW, "secret")
        passwords = self.read(line, line.replace("ann", "bob"))
        authenticator = make(passwords=passwords, schemes=["basic"], max_failures=(0, 1.0))
        function, turns = authserver.load_crypt()
        counting = mock.Mock(side_effect=function)

        def status(user: str, password: str) -> int:
            return int(attempt(authenticator, basic(user, password)).status)
        with mock.patch.object(authserver, "load_crypt", lambda: (counting, turns)):
            self.gives(status, *[("ann", "secret", 200), ("ann", "wrong", 401)] * 3,
                       ("bob", "secret", 200))
            self.assertEqual(5, counting.call_count)
        with mock.patch.multiple(authserver, REMEMBERED=3, matches=lambda *_: True):
            self.gives(status, *[("ann", "p%d" % number, 200) for number in range(10)])
        self.assertLessEqual(len(passwords.granted), 3)
        self.assertNotIn(b"p9", b"".join(passwords.granted))


class PasswdVerb(AuthTestCase):
    """passwd changes one user, and leaves the rest of the file alone"""

    def change(self, path: str, user: str, password: Optional[str] = "x") -> str:
        """Change a password, or delete a user, in realm files."""
        return authserver.change_password(path, user, "files", password)

    def test_adds_changes_and_deletes_in_place(self) -> None:
        """Comments, order, other users and other realms stay as they are."""
        rest = "\njim:other:%s\nann:{SHA}x\n" % HEX
        path = self.write("# staff\njim:plain:old\n%sjim:files:%s\n" % (rest, HEX))
        jim, bob = ("".join(line + "\n" for line in authserver.password_lines(*row)) for row in (
            ("jim", "files", "secret"), ("bob", "files", "x")))
        for user, password, done, text in (
                ("jim", "secret", "changed", jim + rest), ("bob", "x", "added", jim + rest + bob),
                ("bob", None, "deleted", jim + rest), ("jim", None, "deleted", rest)):
            self.assertEqual(self.change(path, user, password), done)
            self.assertEqual(read(path), "# staff\n" + text)
        self.refuses("not in", self.change, path, "jim", None)

    def test_replaces_what_is_the_users_and_nothing_else(self) -> None:
        """Lines with blanks, of another normal form, of every kind; all else stays, CRLF, too."""
        kept = ["# jim:plain:x", "jimmy:plain:x", "jim:other:" + HEX, "ann:%s\r" % SHA, "", "bad"]
        for line in ("jim:plain:x", " jim:files:%s \r" % HEX, "\tjim:" + SHA, "jim:$6$a$b:Jim",
                     "jim:", "jim"):
            text = "".join(item + "\n" for item in kept[:3] + [line] + kept[3:])
            changed = authserver.edit_passwords(text, "jim", "files", ["NEW"])
            self.assertEqual(changed.split("\n"), kept[:3] + ["NEW"] + kept[3:] + [""], line)
        self.assertEqual(authserver.edit_passwords("ju\u0308:plain:x", "jü", "files", []), "")

    def test_a_new_file_serves_everything(self) -> None:
        """Both schemes and algorithms; 0600, 0640 for a group; a random first one, made once."""
        path = os.path.join(self.folder(), "new")
        self.assertEqual("added", self.change(path, "müller", "pä:ss"))
        Passwords.read(path, "files").check_servable(["digest", "basic"], ["MD5", "SHA-256"])
        user, password = authserver.first_password(path + "1", None, "files")
        other = authserver.first_password(path + "2", os.getegid(), "files")
        self.assertEqual(("admin", 16, True), (user, len(password), password != other[1]))
        for name, mode, pair in ((path, 0o600, ("müller", "pä:ss")), (path + "2", 0o640, other),
                                 (path + "1", 0o600, (user, password))):
            self.assertEqual(mode, stat.S_IMODE(os.stat(name).st_mode))
            self.assertTrue(Passwords.read(name, "files").check_password(*pair))
        self.refuses("unable to make", authserver.first_password, path, None, "files")
        self.assertEqual(["new", "new1", "new2"], sorted(os.listdir(os.path.dirname(path))))

    def test_what_is_written_anew_is_as_it_was(self) -> None:
        """Mode, owner, group, a link stay; what others read is 0600; a full disk loses nothing."""
        owner = (NOBODY, OTHER) if ROOT else (os.getuid(), os.getgid())
        for before, after in ((0o640, 0o640), (0o600, 0o600), (0o660, 0o660), (0o644, 0o600),
                              (0o666, 0o600), (0o602, 0o600)):
            path = self.write("# x\n", before)
            os.chown(path, *owner)
            os.symlink(path, path + ".link")
            self.change(path + ".link", "jim")
            found = os.stat(path)
            self.assertEqual((stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid),
                             (after, *owner))
            self.assertTrue(os.path.islink(path + ".link"))
        text = read(path)
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left")):
            self.refuses("unable to write", self.change, path, "ann")
        if ROOT:                            # who would replace /dev/null by a file
            os.mknod(path + ".null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
            self.refuses("no regular file", self.change, path + ".null", "ann")
            self.assertTrue(stat.S_ISCHR(os.stat(path + ".null").st_mode))
            os.unlink(path + ".null")
        self.assertEqual(read(path), text)
        self.assertEqual({"passwords", "passwords.link"}, set(os.listdir(os.path.dirname(path))))

    def test_asks_twice_or_reads_one_line(self) -> None:
        """Two different answers change nothing; nor does none, or an umlaut in cron's locale."""
        path = self.write("")
        ask: Any = functools.partial(authserver.run_passwd, path, "jim", "files")
        with mock.patch("getpass.getpass", side_effect=[
                UnicodeDecodeError("ascii", b"\xc3", 0, 1, ""), EOFError(), "old",
                KeyboardInterrupt(), "secret", "secert", "old", "old"]):
            self.assertEqual(self.refuses("locale", ask), "export LC_ALL=C.UTF-8")
            for _ in range(2):
                self.assertIn("--realm files --stdin", self.refuses("nobody typed one", ask))
            self.refuses("differ", ask)
            self.assertEqual(("", True), (read(path), "'jim' added" in ask()))
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"new one\nmore\n"))):
            self.assertIn("changed", ask(from_stdin=True))
        self.assertTrue(Passwords.read(path, "files").check_password("jim", "new one"))
        self.assertIn("deleted", ask(delete=True))

    @needs("htpasswd")
    def test_reads_what_htpasswd_writes(self) -> None:
        """bcrypt, SHA-256, SHA-512 and SHA-1 entries of Apache's htpasswd let Basic in."""
        path = self.write("")
        for flag in ("-s", "-B", "-2", "-5"):       # an old one does not know them all
            run(["htpasswd", "-b", flag, path, "u" + flag, os.fsdecode("sécret".encode())])
        os.chmod(path, 0o600)
        passwords = Passwords.read(path, "files")
        for user in passwords.entries:
            self.gives(passwords.check_password, (user, "sécret", True), (user, "secret", False))

    @needs("htdigest")
    def test_shares_a_file_with_htdigest(self) -> None:
        """Apache's htdigest changes our entry and we its, in the same file."""
        path = os.path.join(self.folder(), "htdigest")

        def theirs(_: str, user: str, password: str) -> None:
            """Without a terminal it reads the password, twice, from standard input."""
            run(["htdigest", path, "files", user], 0, (password + "\n").encode() * 2,
                start_new_session=True)
            os.chmod(path, 0o600)
        # Of two lines of a user it changes the first: that is the one that counts.
        for change, user, password in ((self.change, "jim", "one"), (theirs, "ann", "two"),
                                       (self.change, "ann", "three"), (theirs, "jim", "four")):
            change(path, user, password)
            self.assertTrue(Passwords.read(path, "files").check_password(user, password), password)
        self.assertFalse(Passwords.read(path, "files").check_password("jim", "one"))

    def test_the_command_says_what_it_did_or_why_not(self) -> None:
        """`authserver.py passwd FILE USER`: --stdin, --realm, --delete; a mistake is one line."""
        path, typed = self.write("ann:plain:x\n"), "pä:ss\n".encode()
        words = ["passwd", path, os.fsdecode("müller".encode()), "--realm", "files"]
        for option, done in (("--stdin", "added"), ("--stdin", "changed"), ("--delete", "deleted")):
            said = told(*words, option, typed=typed)
            line = r"\A0 user 'm.+ller' %s in .+ \(realm 'files'\)\n\Z" % done
            self.assertRegex("%d %s" % said, line)
            known = Passwords.read(path, "files").check_password("müller", "pä:ss")
            self.assertEqual(known, done != "deleted")
        for user, option, typed in (
                ("a:b", "--stdin", b"x\n"), ("a\tb", "--stdin", b"x\n"), ("jim", "--delete", b""),
                ("jim", "--stdin", b"a\x1bb\n"), ("jim", "--stdin", b"x" * 2000),
                ("jim", "--stdin", b"\n")):
            said = told("passwd", path, user, option, typed=typed)
            self.assertRegex("%d %s" % said, r"\A2 authserver: fatal: unable to [^\n]+\n\Z")
        self.assertIn("usage", run([PYTHON, AUTHSERVER, "passwd", path], 2).err)
        self.assertRegex("%d %s" % told(), "2 .*: expected --passwords FILE\ntry: .* passwd users "
                         "admin && .* --passwords users\n")
        self.assertEqual("ann:plain:x\n", read(path))

    def test_eight_at_once(self) -> None:
        """On a file that is there, and on one that none has seen, all eight users are in it."""
        for text in ("# staff\nann:plain:x\n", ""):
            path = self.write(text)
            if not text:
                os.unlink(path)
            with children(8, lambda number: self.change(path, "u%d" % number) == "added") as said:
                self.assertEqual(said, [True] * 8)
            names = {line.partition(":")[0] for line in (text + read(path)).split()}
            self.assertEqual(names - {"#", "staff", "ann"}, {"u%d" % number for number in range(8)})
            self.assertTrue(read(path).startswith(text))
            self.assertEqual(os.listdir(os.path.dirname(path)), ["passwords"])

    def test_who_has_waited_locks_what_is_there_now(self) -> None:
        """What it had opened has lost its name to another one's change: nobody waits for that."""
        path, before = self.write(""), ["ann", "bob"]
        lock, write = fcntl.flock, authserver.write_file

        def wait(stream: Any, how: int) -> None:
            if before:
                self.change(path, before.pop())
            lock(stream, how)

        def look(target: str, *words: Any, **keys: Any) -> None:
            with open(target) as stream, self.assertRaises(BlockingIOError):
                lock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write(target, *words, **keys)
        with mock.patch("fcntl.flock", wait), mock.patch.object(authserver, "write_file", look):
            self.change(path, "jim")
        self.assertEqual(set(Passwords.read(path, "files").entries), {"ann", "bob", "jim"})


class Addresses(AuthTestCase):
    """--bind takes what the kernel takes, and says what to do about the rest"""

    def test_what_is_wrong_with_an_address(self) -> None:
        """Form, port, taken, only root's."""
        for text in ("80", "a b:80", "[::1", "::1:80", "unix:", "host:", "h:-1", "h:8o", ":99999",
                     "127.0.0.1:65536", "[::1]:100000"):
            self.refuses("unable to bind .*: expected HOST:PORT.*ports are 0 to 65535",
                         authserver.parse_bind, text)
        with taken_port() as port:
            text = "127.0.0.1:%d" % port
            self.refuses(r"unable to bind %s: .*\ntry: ss -ltnp 'sport = :%d'" % (text, port),
                         authserver.open_socket, text, authserver.parse_bind(text))
        denied = OSError(errno.EACCES, "Permission denied")
        for text, advice in ((":80", "--bind :8080"), (":1024", ""), ("unix:/root/s", ""),
                             ("127.0.0.1:443", "--bind 127.0.0.1:8443")):
            said = authserver.bind_advice(text, authserver.parse_bind(text), denied)
            self.assertEqual(said.partition("   #")[0], advice and "\ntry: " + advice)

    def test_keeps_the_scope_of_a_link_local_address(self) -> None:
        """The interface stands in the address to bind, in what fits it, and in the URL."""
        lo = socket.if_nametoindex("lo")
        place = authserver.parse_bind("[fe80::1%lo]:80")
        self.assertEqual(place.where[1:], (80, 0, lo))
        place = place._replace(where=("fe80::1",) + place.where[1:])

        def listening(*where: Any) -> Any:
            return mock.Mock(family=socket.AF_INET6, getsockname=lambda: where)
        self.gives(lambda *where: place.fits(listening(*where)),
                   ("fe80::1", 80, 0, lo, True), ("fe80::1", 80, 0, lo + 1, False),
                   ("fe80::1", 81, 0, lo, False), ("fe80::2", 80, 0, lo, False))
        self.gives(lambda scheme, *where: authserver.address_of(listening(*where), scheme),
                   ("https", "fe80::1", 443, 0, lo, "https://[fe80::1%25lo]:443/"),
                   ("http", "::1", 80, 0, 0, "http://[::1]:80/"))
        self.gives(lambda *where: authserver.is_private(listening(*where)),
                   ("fe80::1", 443, 0, lo, False), ("::1", 80, 0, 0, True))

    @needs_root
    @needs("ip", "curl")
    def test_listens_on_a_link(self) -> None:
        """In a network of its own: bound, named, and reached by that URL."""
        code = ("import sys, subprocess; sys.path.insert(0, sys.argv[1]); import authserver as a\n"
                "s = a.open_socket('x', a.parse_bind('[fe80::1%lo]:0')); print(a.address_of(s))\n"
                "subprocess.Popen(['curl', '-s', '-m', '5', '-g', a.address_of(s)])\n"
                "c, who = s.accept(); print(c.recv(99)); c.close()")
        script = 'ip link set lo up && ip addr add fe80::1/64 dev lo nodad && exec "$@"'
        said = run(["unshare", "-n", "sh", "-c", script, "sh", PYTHON, "-c", code, HERE])
        if "Operation not permitted" in said.err:
            self.skipTest("needs a network namespace")
        self.assertRegex(said.out, r"\Ahttp://\[fe80::1%25lo\]:\d+/\nb'GET / HTTP")

    def test_a_kernel_without_ipv6(self) -> None:
        """:PORT and names mean IPv4 there; an IPv6 address is refused by name, no traceback."""
        real = socket.socket

        def make(family: int = socket.AF_INET, *rest: Any) -> Any:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
            return real(family, *rest)
        with mock.patch("socket.socket", make):
            for text in (":0", "localhost:0", "127.0.0.1:0"):
                place = authserver.parse_bind(text)
                self.assertEqual(place.family, socket.AF_INET)
                authserver.open_socket(text, place).close()
            self.refuses(r"unable to bind \[::1\]:80: ", authserver.parse_bind, "[::1]:80")
        self.assertEqual(authserver.parse_bind(":0").where[0],
                         "::" if authserver.has_ipv6() else "0.0.0.0")


class BasicScheme(AuthTestCase):
    """Basic, as RFC 7617 has it"""

    def test_lets_the_right_password_in_and_refuses_all_else_alike(self) -> None:
        """In any case of Basic, with blanks, a colon, UTF-8, Latin-1; the log knows why not."""
        authenticator = make({"jim": "secret", "test": "123£", "col": "a:b"})
        for user, field, reason in (
                *[("jim", text, "") for text in (
                    JIM, JIM.replace("Basic", "bAsIc"), JIM.replace(" ", "   "))],
                *[("test", basic("test", "123£", charset), "") for charset in ("utf-8", "latin-1")],
                ("col", basic("col", "a:b"), ""),
                ("jim", WRONG, "bad password"), ("jim", basic("jim", ""), "bad password"),
                ("JIM", basic("JIM", "secret"), "unknown user"),
                ("", basic("", ""), "unknown user")):
            verdict = attempt(authenticator, field)
            self.assertEqual((verdict.log_user, verdict.reason), (user, reason))
            if not reason:
                self.assertEqual((200, user, user, "", (), "Basic"), verdict)

    def test_is_refused_where_it_is_not_offered(self) -> None:
        """On an address with Digest alone, even the right password is not looked at."""
        verdict = attempt(make(), JIM, schemes=["digest"])
        self.assertEqual((401, None, 1), (verdict.status, verdict.log_user, len(verdict.fields)))


class DigestScheme(AuthTestCase):
    """Digest, as RFC 7616 has it"""

    # What the log says of whom; RFC 2069 is the form without qop, LWP comes without a nonce.
    REFUSALS: Sequence[Tuple[str, Sequence[Dict[str, Any]]]] = (
        ("bad response", [{}, {"response": '"%s"' % HEX}, {"nonce": HEX}, {"username": '"ann"'}]),
        ("another realm", [{"realm": '"other"'}]), ("no nonce yet", [{"drop": ["nonce"]}]),
        ("algorithm or qop not offered", [
            {"algorithm": "SHA-256"}, {"algorithm": "foo"}, {"algorithm": "MD5-sess"},
            {"qop": "auth-int"}, {"qop": '"AUTH"'}, {"drop": ["qop"]},
            {"drop": ["qop", "nc", "cnonce"]}]),
        ("uri mismatch", [{"uri": '"/y"'}, {"uri": '"/x?a"'}]),
        ("malformed: nc", [{"drop": ["nc"]}]))

    def test_what_is_refused(self) -> None:
        """A known and an unknown user alike; only a wrong password names one, and counts."""
        for reason, change in [(reason, change) for reason, several in self.REFUSALS
                               for change in several]:
            fields, is_wrong = [], reason == "bad response"
            for user in ("jim", "nobody"):
                with self.subTest(reason, user=user, change=change):
                    client = Client(make(max_failures=(1, 60.0)), user, "wrong")
                    verdict = client.ask(client.field(**change), client="192.0.2.1",
                                         read_body=self.fail)
                    name = change.get("username", user).strip('"') if is_wrong else None
                    said = "unknown user" if name == "nobody" else reason
                    self.assertEqual((said, name), (verdict.reason, verdict.log_user))
                    self.assertEqual(is_wrong, client.says(JIM, client="192.0.2.1") == "locked out")
                    fields.append(re.sub('nonce="[^"]*"', "", str(verdict.fields)))
            self.assertEqual(*fields)

    def test_lets_the_right_response_in_and_proves_itself_too(self) -> None:
        """Every algorithm and qop that is offered, with Authentication-Info; not another body."""
        algorithms = [name for name in authserver.CANONICAL.values() if name in authserver.HASHES]
        for algorithm, body in itertools.product(algorithms, (None, b"hello")):
            with self.subTest(algorithm, body=body):
                authenticator = make(algorithms=algorithms, qop=["auth", "auth-int"])
                client = Client(authenticator, algorithm=algorithm, qop="auth" + "-int" * bool(body))
                field = client.field(body=body, method="POST")
                post = functools.partial(client.ask, field, method="POST")
                if body:
                    self.assertEqual("bad response", post(read_body=lambda: b"hallo").reason)
                verdict = post(read_body=(lambda: b"hello") if body else self.fail)
                info = 'rspauth="%s", qop=auth, nc=00000001, cnonce="f2"' % respond(
                    client.values, "", algorithm)
                fields = (("Authentication-Info", info),)
                self.assertEqual((200, "jim", "jim", "", fields, "Digest"), verdict)
        # A proof without the body, in a field that promises it: wrong, though one came before.
        client = Client(authenticator, qop="auth-int")
        self.assertEqual("", client.says(client.field(body=b"")))
        proof = '"%s"' % respond(client.values, nc="00000002")
        self.assertEqual("bad response", client.says(client.field(body=b"", response=proof)))

    def test_each_digit_of_the_response_counts(self) -> None:
        """One digit changed, wherever it stands: refused, and the count stays free."""
        client = Client(make())
        field = client.field()
        start = field.index('response="') + 10
        for i in range(start, start + 32):
            wrong = field[:i] + "01"[field[i] == "0"] + field[i + 1:]
            self.assertEqual("bad response", client.says(wrong), i)
        self.assertEqual("", client.says(field))

    def test_accepts_every_spelling_that_clients_use(self) -> None:
        """Bare and quoted values, any case and order, blanks, commas, no algorithm, escapes."""
        def escape(text: str, *names: str) -> str:
            return re.sub('( (?:%s)=")' % "|".join(names), r"\1\\", text)
        spellings: Sequence[Callable[[str], str]] = (
            lambda text: text.replace('"', "").replace("/x", '"/x"'),
            lambda text: text.replace("algorithm=MD5", 'algorithm="md5"'),
            lambda text: text.replace(", algorithm=MD5", ""),
            lambda text: text.replace("qop=auth", 'qop="auth"'),
            lambda text: text.replace("nc=", 'NC = ').replace(", ", " ,\t, "),
            lambda text: "digest " + ", ".join(reversed(text[7:].split(", "))),
            lambda text: text.replace("Digest realm", " \tDIGEST  , ,ReaLM") + "\t, ,",
            lambda text: re.sub("nc=([0-9]+)", r'nc="\1"', text),
            lambda text: text[:-33] + text[-33:].upper(),       # digits of the response
            lambda text: escape(text, "realm"), lambda text: escape(text, "nonce"),
            lambda text: escape(text, "cnonce"),
            lambda text: escape(text, "realm", "nonce", "cnonce"))
        for change in spellings:
            client = Client(make())
            self.gives(client.says, (change(client.field()), ""))
        rows: List[Tuple[str, Any]] = [
            ("müller", {"username": '"m\xfcller"'}), ("müller", {"username": '"m%C3%BCller"'}),
            ("DOM\\u", {"username": '"DOM\\\\u"'}), ("DOM\\u", {"username": '"DOM\\u"'}),
            ("a,b", {"username": '"a,b"'}),
            *[("müller", {"drop": ["username"], "username_star": spelling + "m%C3%BCller"})
              for spelling in ("UTF-8''", "utf-8'de'")]]
        for user, changes in rows:
            client = Client(make({user: "x"}), user, "x")
            self.assertEqual((200, user), client.ask(client.field(**changes))[:2], changes)

    def test_a_cnonce_is_given_back_as_it_was_meant(self) -> None:
        """A quotation mark or a backslash in quoted pairs, under the right proof."""
        for cnonce in ('a"b', "a\\b", 'a"b\\', "a'b"):
            client = Client(make())
            client.values["cnonce"] = cnonce
            quoted = '"%s"' % cnonce.replace("\\", "\\\\").replace('"', '\\"')
            fields = client.ask(client.field(cnonce=quoted)).fields
            self.assertEqual(fields, (("Authentication-Info", (
                'rspauth="%s", qop=auth, nc=00000001, cnonce=%s' % (
                    respond(client.values, ""), quoted))),))

    def test_a_right_field_of_any_length_is_right(self) -> None:
        """Up to MAX_CREDENTIALS, and again; what is too long for it is not remembered."""
        for size in (authserver.MAX_TEXT, authserver.MAX_TEXT + 1, authserver.MAX_CREDENTIALS):
            client = Client(make())
            for _ in range(2):
                self.assertEqual("", client.says((client.field() + ", x=").ljust(size, "y")))
            remembered = len(client.authenticator.passwords.granted)
            self.assertEqual(remembered, size <= authserver.MAX_TEXT)

    def test_proof_is_for_one_target_as_sent(self) -> None:
        """Another path, another query, a cleaned-up path, another method: refused."""
        for target in ("/y", "/x?a=1", "//x", "/x/", "/X", "*", "http://host/y", "http://host/x?a"):
            self.assertEqual("uri mismatch", Client(make()).says(target=target), target)
        for target in ("http://host/x", "*", "//a//b", "/x;p=1,2?q"):
            self.assertEqual("", Client(make(), uri=target).says(target=target), target)
        self.assertEqual("", Client(make()).says(target="http://host/x"))
        self.assertEqual("bad response", Client(make()).says(method="POST"))

    def test_an_empty_ha1_is_nobodys(self) -> None:
        """Who computes with no HA1, or one of zeros, is refused like any unknown user."""
        for ha1 in ("", HEX):
            nobody = Client(make(), "nobody")
            proof = hashed("MD5", ha1, nobody.values["nonce"], "00000001", "f2", "auth",
                           hashed("MD5", "GET", "/x"))
            self.assertEqual("unknown user", nobody.says(nobody.field(response='"%s"' % proof)))

    def test_a_reload_keeps_the_nonces(self) -> None:
        """New passwords count at once, without a stale for those that stayed the same."""
        authenticator = make()
        jim, ann = Client(authenticator), Client(authenticator, "ann", "other")
        self.assertEqual(["", ""], [jim.says(), ann.says()])
        authenticator.passwords = Passwords({"jim": "new", "ann": "other"}, realm="files")
        self.assertEqual(["bad response", ""], [jim.says(), ann.says()])
        jim.values["password"] = "new"
        self.assertEqual("", jim.says())


class Challenges(AuthTestCase):
    """A 401 asks so that all clients understand"""

    def test_says_one_line_per_scheme_in_the_order_of_the_settings(self) -> None:
        """Digest first; what the RFC quotes is quoted; no line is longer than wget's limit."""
        line = ('Digest realm="files", nonce="[^"]{20,60}", qop="auth%s", algorithm=%s, '
                'charset=UTF-8%s')
        plain = 'Basic realm="files", charset="UTF-8"'
        sessions = [name for name in authserver.HASHES if name.endswith("-sess")]
        rows: Any = (
            ({"algorithms": ["SHA-256", "MD5"]}, {},
             [line % ("", "SHA-256", ""), line % ("", "MD5", ""), plain]),
            ({"schemes": ["basic"]}, {}, [plain]),
            ({"algorithms": sessions, "qop": ["auth", "auth-int"], "schemes": ["digest"]},
             {"stale": True},
             [line % (",auth-int", name, ", stale=true") for name in sessions]))
        for settings, keywords, forms in rows:
            fields = make(**settings).challenge(NOW, **keywords)
            self.assertEqual(len(fields), len(forms))
            for (name, value), form in zip(fields, forms):
                self.assertRegex(name + ": " + value, r"\AWWW-Authenticate: %s\Z" % form)
                self.assertLess(len(value), 256)

    def test_offers_basic_where_nobody_listens_or_somebody_asked_for_it(self) -> None:
        """By itself on safe addresses only; where schemes were chosen, those are, everywhere."""
        both = "digest", "basic"
        self.gives(lambda schemes, is_safe: tuple(make(schemes=schemes).offered(is_safe)),
                   (None, True, both), (None, False, both[:1]), (both[1:], True, both[1:]),
                   (both[1:], False, both[1:]), (both, True, both), (both, False, both))

    def test_counts_what_it_says(self) -> None:
        """Each answer adds to the counter that status shows for it, and to no other."""
        authenticator = make(max_failures=(2, 60.0))
        client = Client(authenticator)
        field, zeros = client.field(), client.field(response='"%s"' % HEX)
        for fields, now, said, counted in (
                ([], NOW, "no credentials", "challenges"),
                (["Bearer x"], NOW, "Bearer is not offered here", ""),
                (["Negotiate x=="], NOW, "Negotiate is not offered here", ""),
                ([field], NOW, "", ""), ([field], NOW, "replay", "replays"),
                ([client.field()], NOW + 900, "stale", "stale"),
                (["Basic ="], NOW, "malformed: parameter syntax", "malformed"),
                ([JIM, JIM], NOW, "malformed: two Authorization fields", "malformed"),
                ([WRONG], NOW, "bad password", "failures"),
                ([zeros], NOW, "bad response", "failures lockouts"),
                ([JIM], NOW, "locked out", "")):
            before = authenticator.table.statistics()
            verdict = attempt(authenticator, *fields, client="192.0.2.1", now=now)
            after = authenticator.table.statistics()
            grown = [name for name in after for _ in range(after[name] - before[name])]
            self.assertEqual((verdict.reason, grown), (said, counted.split()))
            self.assertEqual(verdict.log_user, "jim" if "failures" in counted else verdict.username)

    def test_refuses_to_offer_what_somebody_could_not_answer(self) -> None:
        """Unknown, doubled, none at all, lacking here; one character more than wget can read."""
        with mock.patch.dict(authserver.HASHES):
            authserver.HASHES.pop("SHA-512-256", None)
            self.refuses("SHA-512-256: the hashlib of this Python lacks it", make,
                         algorithms=["SHA-512-256"])
        for keyword, names in (("algorithms", ["SHA-1"]), ("algorithms", []), ("qop", ["x"]),
                               ("schemes", ["bearer"]), ("schemes", ["basic", "basic"])):
            self.refuses("unable to offer", make, **{keyword: names})
        longest = authserver.MAX_CHALLENGE - len(authserver.challenges("", "n" * 36, stale=True)[0])
        authenticator = make(passwords=Passwords({"jim": "x"}, realm="r" * longest))
        self.assertEqual(max(len(value) for _, value in authenticator.challenge(NOW, stale=True)),
                         authserver.MAX_CHALLENGE)
        passwords = Passwords({"jim": "x"}, realm="r" * (longest + 1))
        self.refuses("1 characters too long", make, passwords=passwords)


class LockOut(AuthTestCase):
    """Too many wrong passwords lock an address out, and nothing else does"""

    def guess(self, authenticator: Any, times: int, client: Optional[str] = "192.0.2.1",
              now: float = NOW) -> None:
        """Try wrong passwords."""
        for number in range(times):
            attempt(authenticator, basic("jim", "w%d" % number), client=client, now=now)

    def status(self, authenticator: Any, client: Any = "192.0.2.1", now: float = NOW) -> int:
        """Return what the right password is told."""
        return int(attempt(authenticator, JIM, client=client, now=now).status)

    def test_clocks_that_were_looked_at_out_of_order(self) -> None:
        """Of two who count at a time one is late: nothing is forgotten, and nobody let in."""
        authenticator = make()
        self.guess(authenticator, 9)
        for now in (NOW + 0.05, NOW, NOW + 1):
            self.guess(authenticator, 1, now=now)
            self.assertEqual(self.status(authenticator, now=NOW), 429)
        self.assertEqual(self.status(authenticator, now=NOW + 61), 200)

    def test_has_one_beginning_and_one_end(self) -> None:
        """Failures count from their first; the last allowed begins it, later ones do nothing."""
        authenticator = make(max_failures=(3, 60.0))
        for seconds, guesses, status in (
                (0, 1, 200), (40, 1, 200), (61, 1, 200), (62, 1, 200), (63, 1, 429), (122, 1, 429),
                (122.5, 5, 429), (123.5, 0, 200), (123.5, 2, 200), (184, 2, 200), (184.5, 1, 429),
                (244, 0, 429), (245, 0, 200)):
            self.guess(authenticator, guesses, now=NOW + seconds)
            self.assertEqual(self.status(authenticator, now=NOW + seconds), status, seconds)
        self.guess(authenticator, 3, now=NOW + 300)
        verdict = attempt(authenticator, JIM, client="192.0.2.1", now=NOW + 301)
        self.assertIn(verdict.fields, [(("Retry-After", wait),) for wait in ("59", "60")])
        # Others, who has no address, and who brings no password yet are not touched.
        for client in ("192.0.2.2", None):
            self.assertEqual(self.status(authenticator, client, NOW + 301), 200)
        self.assertEqual(401, attempt(authenticator, client="192.0.2.1", now=NOW + 301).status)
        self.assertEqual(authenticator.table.statistics()["lockouts"], 3)
        authenticator.table.set_clock(NOW - 3600)   # a time ahead of now began no lock-out
        for guesses, status in ((0, 200), (2, 200), (1, 429)):
            self.guess(authenticator, guesses, now=NOW - 3600)
            self.assertEqual(self.status(authenticator, now=NOW - 3600), status)

    @mock.patch.object(Passwords, "is_slow", lambda *_: True)
    def test_slow_hashes_that_are_made_together(self) -> None:
        """Of twelve guesses the tenth is the last; eight requests of one browser make one hash."""
        def together(authenticator: Any, fields: Sequence[str]) -> List[int]:
            stories = [authenticator.judge(authserver.Attempt(
                "GET", "/x", [field], "192.0.2.1", NOW, authenticator.schemes)) for field in fields]
            done = [work() for work in [story.send(None) for story in stories]]
            said = []
            for story, result in zip(stories, done):
                with self.assertRaises(StopIteration) as caught:
                    story.send(result)
                said.append(caught.exception.value.status)
            return said
        guesses = [basic("jim", "w%d" % number) for number in range(11)] + [JIM]
        self.assertEqual(together(make(max_failures=(10, 60.0)), guesses), [401] * 10 + [429] * 2)
        with mock.patch.object(Passwords, "verify", return_value=True) as counted:
            self.assertEqual(together(make(), [JIM] * 8), [200] * 8)
        self.assertEqual(counted.call_count, 1)

    def test_fails_closed(self) -> None:
        """However full the table: no stranger's guesses free or hide anybody."""
        with mock.patch.object(authserver, "CLIENT_BUCKETS", 16):
            authenticator = make(max_failures=(5, 600.0))
            self.guess(authenticator, 5)
            for number in range(200):
                self.guess(authenticator, 1, "198.51.100.%d" % number, NOW + 1)
            self.assertEqual(429, self.status(authenticator, now=NOW + 2))
            for number in range(40):  # two that guess in turn; some pairs share a place
                authenticator = make(max_failures=(5, 600.0))
                pair = "192.0.2.1", "198.51.100.%d" % number
                for client in pair * 5:
                    self.guess(authenticator, 1, client)
                self.assertEqual([429] * 2, [self.status(authenticator, client) for client in pair])

    def test_who_shares_one_place_is_free_when_either_is(self) -> None:
        """Locked out is who has two full buckets, until the first of them is over."""
        table = authserver.SharedTable()
        one, two, three = (authserver.BUCKETS + authserver.BUCKET.size * i for i in range(3))
        places = {"192.0.2.1": (one, two), "192.0.2.2": (one, three), "192.0.2.3": (three, two)}
        with mock.patch.object(authserver, "find_buckets", lambda salt, client: places[client]):
            for client, now, left in zip(sorted(places), (NOW, NOW + 30, NOW + 30), (60, 30, 30)):
                self.assertTrue(table.count_failure(client, now, 1, 60.0))
                self.assertEqual(table.lock_left(client, now, 1, 60.0), left)
            self.gives(lambda client: table.lock_left(client, NOW + 60, 1, 60.0),
                       *[(client, 0) for client in places])

    def test_thousands_who_guess_lock_out_few_others(self) -> None:
        """4,000 addresses are locked out: of 1,000 innocents less than one in ten is, too."""
        table = authserver.SharedTable()
        table.alone = True      # takes no locks
        for number in range(4000):
            table.count_failure("2001:db8:0:%x::/64" % number, NOW, 1, 60.0)
        hit = [table.lock_left("198.51.%d.%d" % divmod(number, 250), NOW, 1, 60.0) > 0
               for number in range(1000)]
        self.assertLess(sum(hit), 100)

    def test_can_be_switched_off_and_spares_who_has_no_address(self) -> None:
        """0 = off, whatever was counted before, and nothing is; None is never locked out."""
        before = make(max_failures=(1, 60.0))
        self.guess(before, 20, None)
        self.guess(before, 1)
        self.assertEqual([429, 200], [self.status(before), self.status(before, None)])
        heir = Authenticator(before.passwords, table=before.table, max_failures=(0, 60.0))
        self.guess(heir, 20)
        self.assertEqual((200, 1), (self.status(heir), heir.table.statistics()["lockouts"]))

    def test_the_option_is_read_strictly(self) -> None:
        """N/SECONDS or 0."""
        self.gives(authserver.parse_max_failures, ("5/300", (5, 300.0)), ("0", (0, 60.0)))
        for text in ("", "5", "5/0", "/60", "-1/60", "5/60/7", "a/b", "00", "1e3/5"):
            self.refuses("max-failures", authserver.parse_max_failures, text)

    def test_finds_the_client_behind_trusted_proxies_only(self) -> None:
        """The rightmost address that is not a proxy's; nobody can choose his own."""
        one, own, local = ("192.0.2.1", "192.0.2.1"), "127.0.0.1", ("127.0.0.1", None)
        self.gives(lambda options, peer, forwarded: authserver.TrustedProxies(
            options and options.split()).find_client(peer, forwarded),
            (None, "10.0.0.1", "", ("10.0.0.1", None)), (None, "192.0.2.1", "", one),
            ("", "10.0.0.1", "", ("10.0.0.1", "10.0.0.1")), ("", "192.0.2.1", "198.51.100.1", one),
            ("", own, "", local), ("", "::1", "", ("::1", None)),
            ("", "::ffff:127.0.0.1", "", local), ("", "::ffff:192.0.2.1", "", one),
            ("", "2001:db8::1:2", "", ("2001:db8::1:2", "2001:db8::/64")),
            ("", "fe80::1%eth0", "", ("fe80::1", "fe80::/64")),
            ("", "", "192.0.2.1", ("", None)), ("unix:", "", "192.0.2.1", one),
            ("unix:", "", "6.6.6.6, unknown", ("", None)),
            ("127.0.0.0/8", own, "6.6.6.6, 192.0.2.1", one),
            ("127.0.0.0/8", "::ffff:127.0.0.1", "192.0.2.1:4711", one),
            (own, own, "6.6.6.6, [2001:db8::1]:80", ("2001:db8::1", "2001:db8::/64")),
            (own + " 10.0.0.0/8", own, "192.0.2.1, 10.0.0.7", one),
            ("10.1.2.3/8", "10.9.9.9", "192.0.2.1", one),   # named by any address in it
            (own, own, "192.0.2.1, unknown", local), (own, own, "192.0.2.1, [", local),
            ("10.0.0.0/8", "10.0.0.1", "192.0.2.1" + ",10.0.0.7" * 9, one),     # MAX_HOPS, or more
            *[("10.0.0.0/8", "10.0.0.1", "192.0.2.1" + ",10.0.0.7" * number, ("10.0.0.7", None))
              for number in (10, 3000)],
            (own, own, "192.0.2.1, ", local), (own, own, "", local),
            (own, "192.0.2.9", "192.0.2.1", ("192.0.2.9", "192.0.2.9")), (own, own, own, local))
        for option in ("x", "10.0.0.0/33", "", "10.0.0.0/8/8", "unix"):
            self.refuses("unable to trust proxy", authserver.TrustedProxies, [option])


class Fuzz(AuthTestCase):
    """No sequence of bytes makes the authenticator raise, or let anybody in"""

    def test_mutated_credentials_are_refused(self) -> None:
        """2,000 seeded mutations; 100,000 in the soak."""
        fuzz_credentials(2000, Random(SEED))

    def test_mutated_password_files_are_read_or_refused(self) -> None:
        """1,000 seeded mutations of a password file: entries and mistakes, no exception."""
        chance = Random(SEED)
        text = "\n".join([LINE, "sha:" + SHA, "# x", "ann:plain:secret", "bob:$1$a$x", ""])
        for _ in range(1000):
            authserver.parse_passwords(mutate(text, chance), "files")

    def test_what_is_remembered_changes_no_verdict(self) -> None:
        """Whoever was right before, whatever a name looks like: judged as for the first time."""
        fuzz_memory(300, Random(SEED))

    def test_only_what_a_proof_is_about_is_taken_for_it(self) -> None:
        """What looks like nc, uri or cnonce and is not: refused, by who remembers or does not."""
        plain, long = 'uri="/x", cnonce="f2", nc=00000001', "/" + "x" * authserver.MAX_CREDENTIALS
        hole, sly = 'x="a nc=00000001 b", ' + plain, plain.replace("nc=", "nc = ")
        for sentence, username, first, second, change, status in (
                ("a hole in another parameter", "jim", hole, hole.replace("1 b", "2 b"), {}, 401),
                ("a hole in the name", "j nc=00000001 m", sly, sly, {}, 401),
                ("two holes that have changed places", "jim", plain,
                 'cnonce="/x", uri="f2", nc=00000002', {}, 400),
                ("more than the limit", "jim", plain, 'uri="%s", cnonce="f2", nc=00000002' % long,
                 {"uri": long}, 400),
                ("HA1 of another session", "jim", "algorithm=MD5-sess, " + plain,
                 'algorithm=MD5-sess, uri="/x", cnonce="e3", nc=00000002', {"cnonce": "e3"}, 401)):
            authenticator = make({username: "secret"}, algorithms=["MD5", "MD5-sess"])
            client = Client(authenticator, username)
            values = client.values
            ha1 = hashed("MD5", username, "files", "secret")
            if "sess" in first:
                ha1 = hashed("MD5", ha1, values["nonce"], "f2")

            def craft(text: str, cnonce: str = "f2", nc: str = "00000002", uri: str = "/x") -> str:
                """Return credentials that are right for these values, whatever stands in text."""
                proof = hashed("MD5", ha1, values["nonce"], nc, cnonce, "auth",
                               hashed("MD5", "GET", uri))
                return ('Digest username="%s", realm="files", nonce="%s", qop=auth, %s, '
                        'response="%s"' % (username, values["nonce"], text, proof))
            with self.subTest(sentence):
                self.assertEqual(attempt(authenticator, craft(first, nc="00000001")).status, 200)
                field = craft(second, **change).replace("j nc=00000001", "j nc=00000002")
                for granted in (authenticator.passwords.granted, {}):
                    authenticator.passwords.granted = granted
                    verdict = attempt(authenticator, field, target=change.get("uri", "/x"))
                    self.assertEqual((verdict.status, is_stale(verdict)), (status, False))

    def test_who_was_right_is_recalled(self) -> None:
        """In any order of parameters, and for Basic: nothing is parsed, no password looked at."""
        for order in (1, -1):
            authenticator = make(algorithms=["MD5", "SHA-256"])

            def field_of(client: Client) -> str:
                return "Digest " + ", ".join(client.field()[7:].split(", ")[::order])
            digests = [functools.partial(field_of, Client(authenticator, algorithm=name))
                       for name in ("MD5", "SHA-256")]
            made: List[Callable[[], str]] = [*digests, lambda: JIM, lambda: JIM.replace("B", "b")]
            said, blind = [], mock.patch.object(authserver, "parse_authorization", None)
            for number, field in enumerate(made):
                said.append(attempt(authenticator, field()))
                with blind:
                    said += [attempt(authenticator, again()) for again in made[:number + 1]]
            self.assertEqual({verdict[:4] for verdict in said}, {(200, "jim", "jim", "")})

    def test_a_thread_is_for_slow_hashes_only(self) -> None:
        """The judge asks for one where a hash takes long, for strangers too; else it answers."""
        for slow, user, word in itertools.product((True, False), ("jim", "nobody"), ("x", "secret")):
            with self.subTest(user, slow=slow), \
                    mock.patch.object(Passwords, "is_slow", lambda *_: slow):
                found = authserver.Attempt("GET", "/x", [basic(user, word)], None, NOW, ["basic"])
                story = make().judge(found)
                if slow:
                    self.assertTrue(callable(story.send(None)))
                else:
                    self.assertRaises(StopIteration, story.send, None)

    def test_nothing_in_a_frame_is_passed_over(self) -> None:
        """One parameter that changes, or changes places with another, makes another frame."""
        client, chance = Client(make()), Random(SEED)

        def frame(params: List[str]) -> Any:
            parts = authserver.split_frame("Digest " + ", ".join(params))
            return client.authenticator._frame_of(parts)
        for _ in range(20):
            params = client.field()[7:].split(", ")
            chance.shuffle(params)
            several = [params, params[1:] + params[:1]]
            for place, text in enumerate(params):
                if not text.startswith(("uri=", "cnonce=", "nc=", "response=")):
                    text = text[:-1] + "x" + text[-1:]
                    several.append(params[:place] + [text] + params[place + 1:])
            self.assertEqual(len(set(map(frame, several))), len(several), params)

    def test_who_was_right_is_right_in_the_same_way_only(self) -> None:
        """Not where his scheme is not offered, beside a second field, or when he is locked out."""
        for scheme, other in (("basic", "digest"), ("digest", "basic")):
            client = Client(make(max_failures=(1, 60.0)))
            field: Callable[[], str] = client.field if scheme == "digest" else lambda: JIM
            ask = functools.partial(client.says, client="192.0.2.1")
            self.assertEqual(["", ""], [ask(field()) for _ in range(2)])
            self.assertIn("is not offered here", ask(field(), schemes=(other,)))
            two = attempt(client.authenticator, field(), field(), client="192.0.2.1")
            self.assertEqual("malformed: two Authorization fields", two.reason)
            self.assertEqual(["bad password", "locked out"], [ask(WRONG), ask(field())])
            self.assertEqual("", client.says(field(), client="192.0.2.2"))

    def test_what_another_authenticator_granted_is_nothing_here(self) -> None:
        """It has the same dictionary, and other nonces, or it offers more."""
        for other, status in (({}, 200), ({"table": authserver.SharedTable()}, 401),
                              ({"algorithms": ["SHA-256"]}, 401), ({"schemes": ["basic"]}, 401)):
            first = make()
            client = Client(first)
            self.assertEqual([client.ask().status for _ in range(2)], [200, 200])
            second = Authenticator(first.passwords, **dict({"table": first.table}, **other))
            self.assertEqual(attempt(second, client.field()).status, status)
        for authenticator in (first, Authenticator(first.passwords)):
            self.assertEqual(attempt(authenticator, JIM).status, 200)
        tokens = [key for key in first.passwords.granted if isinstance(key, bytes)]
        self.assertEqual(len(tokens), 2)        # of two keys: in no table of hashes

    def test_what_a_reload_took_is_not_given_back(self) -> None:
        """The dictionary is replaced in the middle of a judgement: the new one is told nothing."""
        new = Passwords({"ann": "other"}, realm="files")
        for name, status in (("verify", 401), ("find", 200)):      # Basic is judged again
            authenticator = make()
            old, client = authenticator.passwords, Client(authenticator)

            def reloading(*words: Any) -> Any:
                authenticator.passwords = new
                return getattr(Passwords, name)(old, *words)
            fields = [JIM] * 2 if name == "verify" else [client.field() for _ in range(2)]
            with mock.patch.object(old, name, reloading):
                self.assertEqual(client.ask(fields[0]).status, status)
            self.assertEqual((client.ask(fields[1]).status, new.granted), (401, {}))


PIECES = ("username*=", "userhash=true", 'nc="', "auth-int", "MD5-sess", '\\"', "UTF-8''", '", "',
          "ffffffff", "00000000", "Basic ", "%C3%BC", "\r\n", "\x00", *"\",=\\ \t:;%'{}$#0aA-*")


def mutate(text: str, chance: Random) -> str:
    """Return text with some characters dropped, doubled, reversed or replaced."""
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(text) + 1)
        stop = start + chance.choice((0, 1, 1, 1, 2, 8, 40))
        piece = text[start:stop]
        new = chance.choice(("", piece * 2, piece[::-1], chr(chance.randrange(256)),
                             chance.choice(PIECES)))
        text = text[:start] + new + text[stop:]
    return text


def fuzz_credentials(rounds: int, chance: Random) -> None:
    """Assert that mutated Authorization fields raise nothing and let nobody in.

    A mutation that leaves the meaning alone (blanks, case, an unknown parameter) may
    pass; so the password is wrong from the start.
    """
    authenticator = make(algorithms=["SHA-256", "MD5", "MD5-sess"], qop=["auth", "auth-int"],
                         max_failures=(0, 60.0))
    client = Client(authenticator, password="wrong")
    for number in range(rounds):
        client.settings = {"algorithm": chance.choice(authenticator.algorithms),
                           "qop": chance.choice(("auth", "auth-int"))}
        field = chance.choice((client.field(), client.field(), WRONG,
                               basic("ü" * chance.randrange(9), "x")))
        mutated = mutate(field, chance)
        fields = [mutated] if chance.random() < 0.98 else [mutated, field]
        verdict = attempt(authenticator, *fields, client="192.0.2.1")
        assert verdict.status in (400, 401), (number, mutated, verdict)
        assert all("\n" not in value and "\r" not in value for _, value in verdict.fields), mutated


def fuzz_memory(rounds: int, chance: Random) -> None:
    """Assert that who was found right before is judged as one of whom nothing is remembered."""
    settings: Any = dict(nonce_secret=b"s" * 32, max_failures=(0, 60.0), qop=["auth", "auth-int"],
                         algorithms=["MD5", "SHA-256", "MD5-sess"])
    twins = [make({"jim": "secret", "j nc=00000001 m": "x"}, **settings) for _ in range(2)]
    right = 0
    for number in range(rounds):
        client = Client(twins[0], **chance.choice((  # type: ignore[arg-type]
            {}, {}, {"algorithm": "SHA-256"}, {"algorithm": "MD5-sess"}, {"qop": "auth-int"},
            {"username": "j nc=00000001 m", "password": "x"})))
        for _ in range(4):
            client.values.update(cnonce=chance.choice(("f2", "a b", "c" * 300, "a,b", "e3")),
                                 uri=chance.choice(("/x", "/y")))
            nc = chance.choice(("", "", "00000001", "+0000002", "0000_003", "00000000", "2",
                                "ffffffff"))
            field = client.field(nc=nc, body=b"" if client.settings.get("qop") else None)
            field = mutate(field, chance) if chance.random() < 0.3 else field
            said = [attempt(twin, field) for twin in twins]
            twins[1].passwords.granted.clear()
            first, second = (str(verdict[:4]) + str(is_stale(verdict)) for verdict in said)
            assert first == second, (number, field, said)
            right += said[0].status == 200
    assert rounds // 2 < right and twins[0].passwords.granted, right


def compare_times(samples: int) -> List[Tuple[str, float, float]]:
    """Return each scheme's median seconds for a known user, and what an unknown adds."""
    result = []
    authenticator = make(max_failures=(0, 60.0))
    for scheme in ("basic", "digest"):
        times: Dict[str, List[float]] = {"jim": [], "bob": []}
        clients = {user: Client(authenticator, user, "wrong") for user in times}
        for number in range(samples * 2):
            user = ("jim", "bob")[number % 2]
            field = clients[user].field() if scheme == "digest" else basic(user, "wrong")
            start = time.perf_counter()
            attempt(authenticator, field)
            times[user].append(time.perf_counter() - start)
        known, unknown = (statistics.median(times[user]) for user in ("jim", "bob"))
        result.append((scheme, known, unknown - known))
    return result


# -- 1.5 Files, a page that is called directly ---------------------------------

OLD, OLD_DATE = 1000000000, "Sun, 09 Sep 2001 01:46:40 GMT"


def works_elsewhere(work: Callable[[], bool], jail: str = "") -> bool:
    """Return whether work returns True in a child: in a jail, or as who has no rights of root."""
    if not ROOT:
        return work()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            if jail:
                os.chroot(jail)
                os.chdir("/")
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os._exit(0 if work() else 1)
        os._exit(2)
    return os.waitpid(child, 0)[1] == 0


class FilesTest(unittest.TestCase):
    """A folder `tree` is served; what lies beside it, and says OUTSIDE, never is"""

    def setUp(self) -> None:
        opened = os.listdir("/proc/self/fd")    # whatever a test asks for: no more, at its end
        self.addCleanup(lambda: self.assertEqual(os.listdir("/proc/self/fd"), opened))
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="files-", dir=TEMP))
        self.addCleanup(shutil.rmtree, self.folder, True)
        os.chmod(self.folder, 0o755)
        self.root = self.path("tree")
        self.write("outside/secret.txt", b"OUTSIDE")
        self.write("tree.txt", b"OUTSIDE")
        os.mkdir(self.root)
        self.files = self.serve()

    def serve(self, root: str = "", **options: Any) -> "authserver.Files":
        """Return the page of the tree, or of another folder."""
        files = authserver.Files(root or self.root, **options)
        self.addCleanup(files.close)
        return files

    def path(self, name: str) -> str:
        """Return the path of a name beside the tree, or of tree/NAME."""
        return os.path.join(self.folder, name)

    def write(self, name: str, octets: bytes = b"x", mtime: float = OLD) -> str:
        """Write a file, with the folders above it; return its path."""
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as file:
            file.write(octets)
        os.utime(file.name, (mtime, mtime))
        return str(file.name)

    def grow(self, *names: str, octets: bytes = b"x",
             links: Sequence[Tuple[str, str]] = ()) -> None:
        """Write files of the tree, and make symlinks in it."""
        for name in names:
            self.write("tree/" + name, octets)
        for name, text in links:
            os.symlink(text, self.path("tree/" + name))

    def chmod(self, name: str, mode: int) -> None:
        """Change a mode in the tree, until the end of the test."""
        os.chmod(os.path.join(self.root, name), mode)
        self.addCleanup(os.chmod, os.path.join(self.root, name), 0o755)

    def get(self, path: str, files: Any = None, method: str = "GET", now: float = NOW,
            username: Optional[str] = "jim", **fields: Any) -> Any:
        """Ask for a path, field names have _ for -; the body is read, as the server would."""
        values = {name.replace("_", "-"): [value] for name, value in fields.items()}
        request = authserver.Request(method, path, path,
                                     fields=authserver.NO_FIELDS._replace(values=values))
        request.username, request.now = username, now
        answer: Any = (files or self.files)(request)
        self.kind, said = type(answer.body), dict(answer.fields)
        # No field comes twice. What a password was needed for is private, what is public says
        # nothing of that. And nobody shall guess a type: 304 has none.
        self.assertEqual(len(said), len(answer.fields))
        self.assertEqual([said.get(name) for name in (
            "Cache-Control", "Vary", "X-Content-Type-Options", "Content-Encoding")], [
            "private" if username else None, "Authorization" if username else None,
            None if answer.status == 304 else "nosniff", None])
        body = answer.body
        if self.kind is authserver.FilePart:
            with body.file as file:
                body = os.pread(file.fileno(), body.length, body.offset)
        return answer._replace(fields=said, body=body)

    def check(self, wanted: Dict[str, int], files: Any = None, **fields: Any) -> None:
        """Check the statuses of paths, and that nothing from outside comes with them."""
        for path, status in wanted.items():
            for username in ("jim", None):
                with self.subTest(path=path, fields=fields):
                    answer = self.get(path, files, username=username, **fields)
                    self.assertEqual(answer.status, status)
                    self.assertNotIn(b"OUTSIDE", answer.body)

    def links(self, path: str = "/", files: Any = None) -> List[str]:
        """Return the targets of the links of a page."""
        page = self.get(path, files).body.decode()
        return [html.unescape(link) for link in re.findall('<a href="([^"]*)">', page)]

    def after(self, function: str, when: Optional[bytes], act: Callable[[], Any]) -> Any:
        """Return a patch that makes os.FUNCTION act, once, after a call (for a name)."""
        real, acts = getattr(os, function), [act]

        def patched(first: Any, *rest: Any, **keys: Any) -> Any:
            result = real(first, *rest, **keys)
            if acts and (when is None or isinstance(first, bytes) and first == when):
                acts.pop()()
            return result
        return mock.patch.object(os, function, patched)

    # -- which file a path leads to, and that none leads out

    # As the file system has them, whatever the locale.
    NAMES = [os.fsdecode(name.encode("utf-8", "surrogateescape")) for name in (
        "a.txt", "a b+c&d;e.txt", "ä ö.txt", "\udce4.txt", "%41.txt", "a:b", "javascript:x",
        "back\\slash", "~", "x..", "a\nb", "q?", "#", "a=b", "<b>", "a&amp;b", "\"'", "\u202egpj",
        "x" * 200)]

    def test_every_name(self) -> None:
        """A path is decoded once; each name can be asked for, and the listing's link does that."""
        for name in self.NAMES:
            self.grow("sub/" + name, "sub/in %s/a" % name, octets=os.fsencode(name))
            path = "/sub/" + urllib.parse.quote(os.fsencode(name))
            for query in ("", "?%2f../=//"):
                self.assertEqual(self.get(path + query).body, os.fsencode(name))
        # Bytes that are not encoded, as curl sends what was typed.
        self.assertEqual(self.get("/sub/\xc3\xa4 \xc3\xb6.txt").body, "ä ö.txt".encode())
        base, bodies = "http://host:1", set()
        targets = {urllib.parse.urljoin(base + "/sub/", link) for link in self.links("/sub/")}
        self.assertEqual(len(targets), 2 * len(self.NAMES) + 1)
        for target in targets:
            answer = self.get(target[len(base):])
            self.assertEqual((target[:len(base)], answer.status), (base, 200), target)
            bodies.update([answer.body] * (target[-1] != "/"))
        self.assertEqual(bodies, set(map(os.fsencode, self.NAMES)))
        page = self.get("/sub/").body.decode()
        self.assertIsNone(re.search("[\x00-\x09\x0b-\x1f\u202e]", page))
        self.assertLessEqual(set(re.findall("<([a-z0-9]+)", page)),
                             set("html meta link style title h1 table tr th td a i".split()))

    def test_no_path_crosses_a_line(self) -> None:
        """Dots, slashes, NULs and backslashes in any spelling are 404, in both directions."""
        self.grow("sub/a.txt", "a.txt", octets=b"inside")
        climbs = ("..", "%2e%2e", ".%2E", "..%2f", "..%5c", "..\\", "%252e%252e", "..%00", "..;",
                  "\xc0\xae.")
        paths = [path.replace("^", climb) for climb in climbs for path in (
            "/^/tree.txt", "/sub/^/a.txt", "/sub/^/^/tree.txt", "/^", "/sub/^/")] + [
            "/sub%2fa.txt", "/sub%2Fa.txt", "/sub//a.txt", "//a.txt", "/./a.txt", "/sub/./a.txt",
            "/.", "/sub/.", "/sub%5ca.txt", "/sub\\a.txt", "/a.txt%00", "/a.txt%00.html", "/%00",
            "/a.txt/", "/a.txt/b", "//", "/sub//", "/" + "x" * 256, "/" + "x/" * 3000, "/a.txt\0",
            "/tree.txt", "/../tree/a.txt"]
        for hidden in (False, True):
            self.check(dict.fromkeys(paths, 404), self.serve(hidden=hidden))

    def test_what_is_hidden_and_what_is_no_file(self) -> None:
        """A name with a dot is there with `hidden` only. A FIFO, a socket, a link to one: never."""
        paths = ("/.git/config", "/.env", "/.git/", "/.git", "/sub/.x", "/%2eenv", "/...")
        self.grow(".git/config", ".env", "sub/.x", "...", links=[("link", "fifo")])
        os.mkfifo(self.path("tree/fifo"))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path("tree/socket"))
        self.check(dict.fromkeys(paths + ("/fifo", "/link", "/socket", "/fifo/"), 404))
        self.assertEqual(self.links(), ["sub/"])
        everything = self.serve(hidden=True)
        self.check({path: 301 if path == "/.git" else 200 for path in paths}, everything)
        self.assertEqual(self.links("/", everything), [".git/", "sub/", "...", ".env"])

    def test_links(self) -> None:
        """Who stays inside is followed, name by name; others are 404; the listing knows which."""
        root = self.root
        links = {
            200: {"same": "a.txt", "to-link": "same", "down": "sub/deep/b.txt",
                  "sub/up": "../a.txt", "sub/far": "../sub/../a.txt", "through": "folder/b.txt",
                  "dots": "./sub/.//deep/./b.txt", "mounted": "..data/c.txt", "link-1": "a.txt",
                  "sub/deep/top": "../../a.txt", "absolute": root + "/a.txt",
                  "slashes": root + "//a.txt", "sub/abs": root + "//a.txt",
                  "absolute-up": root + "/sub/../a.txt"},
            301: {"folder": "sub/deep", "sub/self": ".", "sub/root": "..", "slash": "sub/",
                  "all": root},
            404: {"out": "../tree.txt", "up": "..", "sub/up-up": "../../tree.txt", "loop": "loop",
                  "abs": self.path("tree.txt"), "back": "../tree/a.txt", "nothing": "nothing",
                  "etc": "/etc/passwd", "root": "/", "longer": root + "-a.txt", "x": "y", "y": "x",
                  "climb": root + "/../tree.txt", "dev": "/dev/null", "file-as-folder": "a.txt/b",
                  "climb-up": "sub/../..", "link-41": "link-40"}}
        links[200].update({"link-%d" % n: "link-%d" % (n - 1) for n in range(2, 41)})
        self.grow("a.txt", "sub/deep/b.txt", "..data/c.txt", octets=b"inside")
        for status, texts in links.items():
            self.grow(links=[*texts.items()])
        for status, texts in links.items():
            self.check({"/" + name: status for name in texts})
        for path in ("/folder/b.txt", "/sub/self/self/up", "/sub/root/sub/root/a.txt",
                     "/all/all/same"):
            self.assertEqual(self.get(path).body, b"inside", path)
        self.assertEqual({name.rstrip("/") for name in self.links()}, {"a.txt"} | {
            name for name in ["sub", *links[200], *links[301]] if "/" not in name})

    def test_a_folder_that_is_exchanged_leads_nowhere(self) -> None:
        """It moves outside, with a link in its place, between two opens; or again and again."""
        self.grow("secret.txt", octets=b"inside")

        def exchange() -> None:
            os.rename(self.path("tree/sub"), self.path("outside/sub"))
            os.symlink("../outside/sub", self.path("tree/sub"))
        for text in ("inner.txt", "../secret.txt"):
            with self.subTest(text=text):
                self.grow("sub/inner.txt", octets=b"inside", links=[("sub/link", text)])
                with self.after("open", b"sub", exchange):
                    self.assertEqual(self.get("/sub/link").body, b"inside")
                self.check({"/sub/link": 404})
                os.unlink(self.path("tree/sub"))
                shutil.rmtree(self.path("outside/sub"))
        self.grow("sub/secret.txt", octets=b"inside", links=[("link", self.path("outside"))])

        def rotate() -> None:
            for one, other in (("sub", "away"), ("link", "sub"), ("sub", "link"), ("away", "sub")):
                os.rename(self.path("tree/" + one), self.path("tree/" + other))
        with meanwhile(rotate):
            seen = {self.get("/sub/secret.txt").body[:6] for _ in range(2000)}
        self.assertLessEqual(seen, {b"inside", b"<!DOCT"})

    # -- what may not be had

    def test_secrets(self) -> None:
        """A secret is 404 under each of its names, also when it is replaced, or made, later."""
        inside, later = self.write("tree/users", b"OUTSIDE"), self.path("tree/log")
        outside = self.write("passwords", b"OUTSIDE")
        os.link(outside, self.path("tree/hard"))
        self.grow(links=[("link", "users")])
        files = self.serve(secrets=(inside, outside, later, self.path("tree.txt")))
        names = dict.fromkeys(("/users", "/link", "/hard", "/log"), 404)
        self.assertEqual(files.exposed, [inside, later])
        self.check(names, files)

        def replace(path: str, mtime: int) -> None:
            os.rename(self.write("tree/new", b"OUTSIDE", mtime), path)
        for path in (inside, outside, later):
            replace(path, OLD + 1)
        self.check(names, files)
        # ... and between our look at its place and the moment when it is opened.
        with self.after("stat", None, lambda: replace(inside, OLD + 3)):
            self.check({"/users": 404}, files)
        found = os.stat(self.write("tree/plain", b"plain", OLD + 2))
        # As if the file system had given it the inode of a password file that was replaced.
        for known in ((outside, OLD * 10 ** 9), ("users", 0)):
            files.known[found.st_dev, found.st_ino] = known
            self.assertEqual(self.get("/plain", files).body, b"plain")
            self.assertEqual(self.links("/", files), ["plain"])

    def test_a_secret_that_is_changed_where_it_lies(self) -> None:
        """It stays one: outside, with a link in the tree, also when its own path is gone."""
        outside, inside = self.write("passwords", b"OUTSIDE"), self.path("tree/users")
        os.link(outside, self.path("tree/hard"))
        files = self.serve(secrets=(os.path.relpath(outside), inside))
        for act in (lambda: None, lambda: self.write("passwords", b"OUTSIDE+", OLD + 1),
                    lambda: os.unlink(outside), lambda: self.write("tree/users", b"OUTSIDE"),
                    lambda: os.rename(self.write("tree/new", b"OUTSIDE", OLD + 3), inside)):
            act()       # the last two make a new one, and another in its place
            self.assertEqual(self.links("/", files), [])
            self.check({"/hard": 404}, files)
        # And what `passwd` writes beside it, before that takes its place, is one already.
        def look(_: int) -> None:
            names = set(os.listdir(self.root)) - {"hard", "users"}
            self.assertEqual((self.links("/", files), len(names)), ([], 1))
            self.check({"/" + name: 404 for name in names}, files)
        os.unlink(inside)
        with open(inside, "w"), mock.patch.object(os, "fsync", side_effect=look) as looked:
            authserver.change_password(inside, "jim", "files", "x")
        self.assertTrue(looked.called)

    def test_a_secret_behind_a_link(self) -> None:
        """Below the folder or beside it: given another target (certbot), it leads to the new one."""
        old, new = (self.write("tree/" + name, b"OUTSIDE") for name in ("old", "new"))
        for link in (self.path("tree/live"), self.path("live")):
            os.symlink(old, link)
            files = self.serve(secrets=(link,))
            os.unlink(link)
            os.symlink(new, link)
            self.check({"/old": 404, "/new": 404, "/live": 404}, files)
            os.unlink(link)

    def test_the_folder_by_other_names(self) -> None:
        """Served by a link, with secrets named by one: links in it are followed, no secret is."""
        link, real = self.path("link"), self.write("tree/users", b"OUTSIDE")
        os.symlink("tree", link)
        self.grow("a.txt", links=[("one", self.root + "/a.txt"), ("two", link + "/a.txt")])
        for root in (self.root, link):
            for secret in (real, link + "/users"):
                files = self.serve(root, secrets=(secret,))
                self.assertEqual((files.exposed, files.inside), ([secret], ["users"]))
                two = 200 if root == link else 404
                self.check({"/users": 404, "/one": 200, "/two": two}, files)
        for chroot, path in ((self.folder, "/tree"), (self.root, "/."), (link, "/.")):
            self.assertEqual(self.serve(link, chroot=chroot).path, path)
        for _ in range(3):
            files.open()        # anew: setUp sees that nothing is left of the old one

    def test_permissions(self) -> None:
        """What may not be read is 403 and not listed; on the way to a file, search is enough."""
        self.grow("own/a.txt", "shut.txt", "search/a.txt", "shut/a.txt")
        for name, mode in (("own/a.txt", 0o600), ("own", 0o700), ("shut.txt", 0),
                           ("search", 0o311), ("shut", 0)):
            self.chmod(name, mode)
        # Its mode says no to everybody; access(2), for the one who asks it, yes.
        self.assertEqual(self.links("/own/"), ["../", "a.txt"])
        self.assertIn("own/", self.links())
        wanted = {"/shut.txt": 403, "/search/a.txt": 200, "/search/": 403, "/shut/a.txt": 403,
                  "/shut/": 403, "/own/": 403 if ROOT else 200}
        self.assertTrue(works_elsewhere(
            lambda: {path: self.get(path).status for path in wanted} == wanted
            and self.links() == ["own/"] * (not ROOT)))

    def test_errors_of_the_system(self) -> None:
        """No descriptor is 503; an index that may not be read is 403, and never a listing."""
        self.grow("index.html", "a.txt")
        self.get("/")       # opens the root
        real = os.open
        for name, path, wanted in (
                (b"a.txt", "/a.txt", {errno.EMFILE: 503, errno.ENFILE: 503, errno.EAGAIN: 503}),
                (b"index.html", "/", {errno.EACCES: 403, errno.EPERM: 403, errno.EMFILE: 503,
                                      errno.ESTALE: 503, errno.ENOENT: 200, errno.ENXIO: 200})):
            for number, status in wanted.items():
                def refuse(asked: Any, *rest: Any, **keys: Any) -> int:
                    if asked == name:
                        raise OSError(number, "")
                    return real(asked, *rest, **keys)
                with mock.patch.object(os, "open", refuse):
                    self.assertEqual(self.get(path).status, status, (name, number))
        with mock.patch.object(os, "open", side_effect=OSError(errno.EIO, "")):
            self.assertRaises(OSError, self.get, "/a.txt")      # which nobody foresaw

    def test_what_cannot_be_served_is_told_at_once(self) -> None:
        """In a line: missing, no folder, not to be read, outside of the jail."""
        def reason(path: str, **options: Any) -> str:
            with self.assertRaises(Refusal) as caught:
                self.get("/", self.serve(path, **options))
            return str(caught.exception)
        for name, why in (("none", "No such file or directory"), ("tree.txt", "Not a directory")):
            path = self.path(name)
            self.assertEqual(reason(path), "unable to serve %s: %s" % (path, why))
        self.assertIn("not below --chroot", reason(self.root, chroot=self.path("outside")))
        denied = "unable to serve %s: Permission denied" % self.root
        for mode in (0, 0o444, 0o111):
            self.chmod("", mode)
            self.assertTrue(works_elsewhere(lambda: reason(self.root) == denied), oct(mode))

    def test_opened_by_who_serves(self) -> None:
        """The folder is opened at the first request, and again after close(): what then is it."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        files = self.serve("tree")
        os.chdir("/")
        for number in range(2):
            self.write("new/a.txt", b"%d" % number)
            os.rename(self.root, self.path("moved-%d" % number))
            os.rename(self.path("new"), self.root)
            self.assertEqual(self.get("/a.txt", files).body, b"%d" % number)
            files.close()

    @needs_root
    def test_jail(self) -> None:
        """In a jail the folder is found by its path there, and no secret is served."""
        self.grow("sub/a.txt", links=[("absolute", self.root + "/sub/a.txt")])
        secrets = [self.write("tree/users"), self.write("passwords")]
        os.link(secrets[1], self.path("tree/hard"))
        files = self.serve(chroot=self.folder, secrets=secrets)
        wanted = {"/sub/a.txt": 200, "/absolute": 200, "/users": 404, "/hard": 404, "/": 200}
        self.assertTrue(works_elsewhere(
            lambda: {path: self.get(path, files).status for path in wanted} == wanted, self.folder))

    # -- what an answer says of a file

    def test_folders(self) -> None:
        """A folder without its slash is redirected, on this host; index.html stands for it."""
        self.grow("sub/a.txt", "a b/a.txt", os.fsdecode(b"\xe4/a.txt"), "http:/a.txt", "bad/a.txt",
                  "index/index.html", "odd/index.html/a.txt", octets=b"body",
                  links=[("bad/index.html", self.path("tree.txt"))])
        for path, location in (("/sub", "/sub/"), ("/sub?a=//b&c", "/sub/?a=//b&c"),
                               ("/a%20b?", "/a%20b/?"), ("/%e4", "/%E4/"), ("/index", "/index/"),
                               ("/http:", "/http%3A/")):
            answer = self.get(path)
            self.assertEqual((answer.status, answer.fields.get("Location")), (301, location), path)
        self.check(dict.fromkeys(
            ("//sub", "///sub", "/\\sub", "/sub//", "/%2fsub", "/sub/a.txt/"), 404))
        answer = self.get("/index/")
        self.assertEqual((answer.body, answer.fields.get("Content-Type")),
                         (b"body", "text/html; charset=utf-8"))
        self.assertEqual(self.links("/odd/") + self.links("/bad/"),
                         ["../", "index.html/", "../", "a.txt"])

    def test_types(self) -> None:
        """A type is by the last extension, the same on each box; text is UTF-8; nobody guesses."""
        for kind, names in {
                "text/html": "a.html A.HTM", "text/javascript": "a.js a.mjs",
                "image/jpeg": "a.JPEG", "text/plain": "a.txt a.py", "text/markdown": "a.md",
                "image/svg+xml": "a.svg", "application/wasm": "a.wasm", "font/woff2": "a.woff2",
                "application/gzip": "a.tar.gz a.tgz a.html.gz", "application/postscript": "a.ps",
                "application/octet-stream": "README html a.unheard-of a."}.items():
            charset = "; charset=utf-8" if kind.startswith("text/") else ""
            for name in names.split():
                self.grow(name)
                said = self.get("/" + name).fields["Content-Type"]
                self.assertEqual(said, kind + charset, name)

    def validator(self, name: str = "ETag", now: float = NOW) -> str:
        """Return a field of a.txt."""
        return str(self.get("/a.txt", now=now).fields[name])

    def test_validators(self) -> None:
        """The tag changes with content, time and file; Last-Modified is no later than now."""
        path, tags = self.write("tree/a.txt", b"one"), set()     # type: str, Set[str]
        for name, octets, mtime in (("a.txt", b"two", OLD), ("a.txt", b"three", OLD),
                                    ("a.txt", b"three", OLD + .001), ("b", b"three", OLD + .001)):
            os.rename(self.write("tree/" + name, octets, mtime), path)
            self.assertEqual(self.validator(), self.validator())
            self.assertRegex(self.validator(), '^"[0-9a-f-]+"$')
            tags.add(self.validator())
        self.assertEqual(len(tags), 4)
        today = "Wed, 18 May 2033 03:33:20 GMT"
        for mtime, date in ((-5, "Thu, 01 Jan 1970 00:00:00 GMT"), (NOW + 9, today),
                            (1 << 33, today), (OLD, OLD_DATE)):
            os.utime(path, (mtime, mtime))
            self.assertEqual(self.validator("Last-Modified"), date, mtime)
            self.assertEqual(self.links(), ["a.txt"])
        # While time alone may not tell a change, the tag is weak, and not the later one.
        young = self.validator(now=OLD + 1)
        self.assertRegex(young, '^W/"')
        self.assertNotIn(self.validator(), young)
        for now, fields, status in (
                (OLD, {"if_none_match": young}, 304), (NOW, {"if_none_match": young}, 200),
                (OLD, {"if_match": young}, 412), (OLD, {"if_match": young[2:]}, 412),
                (OLD, {"range": "bytes=0-"}, 206),
                (OLD, {"range": "bytes=0-", "if_range": young}, 200)):
            self.check({"/a.txt": status}, now=now, **fields)

    # What conditions, in their order, and ranges make of ten digits: a status; or octets, with 206.
    EARLIER, LATER = OLD_DATE.replace(":40", ":39"), OLD_DATE.replace(":40", ":41")
    CONDITIONS: Dict[str, Dict[str, Any]] = {
        "if_match": {"TAG": 200, '"x", TAG': 200, "*": 200, '"x"': 412, "W/TAG": 412, "": 412},
        "if_unmodified_since": {OLD_DATE: 200, EARLIER: 412, "rubbish": 200},
        "if_none_match": {"TAG": 304, "W/TAG": 304, '"x",W/TAG ,"y"': 304, " * ": 304, '"x"': 200,
                          "": 200},
        "if_modified_since": {
            OLD_DATE: 304, LATER: 304, EARLIER: 200, "Sunday, 09-Sep-01 01:46:40 GMT": 304,
            "Sun Sep  9 01:46:40 2001": 304, "1": 200, " ": 200, "x" * 9999: 200,
            "Sun, 99 Xxx 99999999999999 01:46:40 GMT": 200},
        "range": dict({
            "bytes=0-0": b"0", "bytes=2-5": b"2345", "bytes=2-": b"23456789", "BYTES=1-1": b"1",
            "bytes=9-99": b"9", "bytes=-3": b"789", "bytes=-99": b"0123456789", "bytes= 1-1 ": b"1",
            "bytes=1-" + "9" * 99: b"123456789", "bytes=10-": 416, "bytes=99-100": 416,
            "bytes=-0": 416, "bytes": 200, "lines=1-2": 200}, **{"bytes=" + text: 200 for text in (
                "0-1,3-4", "5-2", "-", "", "a-b", "--1", "1-2-3", "+1-2", "1_0-", "\u0661-", "0x1-",
                "9" * 9999 + "-")}),
        "if_range": {"TAG": 200}}       # without a range
    COMBINED: List[Any] = [
        ({"if_match": "TAG", "if_unmodified_since": EARLIER}, 200),
        ({"if_match": '"x"', "if_none_match": "TAG"}, 412),
        ({"if_none_match": '"x"', "if_modified_since": OLD_DATE}, 200),
        ({"if_match": "TAG", "if_none_match": "TAG"}, 304),
        ({"if_none_match": "TAG", "range": "bytes=99-"}, 304),
        ({"if_match": '"x"', "range": "bytes=99-"}, 412),
        ({"if_match": "TAG", "range": "bytes=1-2"}, b"12")] + [
        ({"range": "bytes=1-2", "if_range": text}, want) for text, want in (
            ("TAG", b"12"), (OLD_DATE, b"12"), ('"x"', 200), ("W/TAG", 200), ("", 200), ("*", 200),
            (OLD_DATE.replace(":40", ":41"), 200), ("TAG,TAG", 200))]

    def test_conditions_and_ranges(self) -> None:
        """If-Match, If-Unmodified-Since, If-None-Match, If-Modified-Since, Range: in this order."""
        whole = b"0123456789"
        self.grow("a.txt", octets=whole)
        self.grow("empty", octets=b"")
        tag = self.validator()
        for asked, want in self.COMBINED + [({name: text}, want) for name in self.CONDITIONS
                                            for text, want in self.CONDITIONS[name].items()]:
            fields = {name: text.replace("TAG", tag) for name, text in asked.items()}
            status, part = (206, want) if isinstance(want, bytes) else (want, whole)
            start = whole.index(part)
            extents = {206: "bytes %d-%d/10" % (start, start + len(part) - 1), 416: "bytes */10"}
            with self.subTest(fields):
                answer = self.get("/a.txt", **fields)
                self.assertEqual((answer.status, answer.fields.get("Content-Range")),
                                 (status, extents.get(status)))
                if status < 400:
                    body = b"" if status == 304 else part
                    self.assertEqual((answer.body, answer.fields["ETag"]), (body, tag))
                    self.assertEqual("Content-Type" in answer.fields, status != 304)
                self.check({"/a.txt": status}, **fields)
                head_ = 200 if status in (206, 416) else status     # it has no range
                self.check({"/a.txt": head_}, method="HEAD", **fields)
        self.check({"/a.txt": 200}, if_none_match=tag[1:-1])        # without its quotes
        for text in ("bytes=0-", "bytes=-5", "bytes=3-4"):
            self.check({"/empty": 200}, range=text)

    def test_large_and_cut_files(self) -> None:
        """Large files are handed over open, small ones are read; who is cut meanwhile is 503."""
        octets = bytes(range(256)) * 400
        small = octets[:authserver.IN_MEMORY]
        self.grow("large", octets=octets)
        self.grow("small", octets=small)
        for path, text, body in (
                ("/large", "", octets), ("/large", "bytes=1-70000", octets[1:70001]),
                ("/large", "bytes=70000-", octets[70000:]), ("/small", "", small)):
            self.assertEqual(self.get(path, range=text).body, body)
            self.assertIs(self.kind, bytes if len(body) <= len(small) else authserver.FilePart)
        with self.after("fstat", None, lambda: os.truncate(self.path("tree/small"), 5)):
            self.assertEqual(self.get("/small").status, 503)

    # -- listings and other pages

    def test_listing(self) -> None:
        """Folders come first, numbers by their value; size, date; a way up; an end that is told."""
        self.grow("b.txt", "a10", "a9", "B1", "z/x", "Y/x", octets=b"x" * 1536)
        self.assertEqual(self.links(), ["Y/", "z/", "a9", "a10", "b.txt", "B1"])
        self.assertEqual(self.links("/z/"), ["../", "x"])
        for mtime, date in ((OLD, "2001-09-09<i> 01:46</i>"), (-5, "1970-01-01<i> 00:00</i>"),
                            (1 << 33, "2242-03-16<i> 12:56</i>")):
            for name, size in (("z", ""), ("b.txt", "1.5 KiB")):
                os.utime(self.path("tree/" + name), (mtime, mtime))
                self.assertIn("</a><td>%s<td>%s" % (size, date), self.get("/").body.decode())
        for most in (6, 3):
            with mock.patch.object(authserver, "MAX_LISTED", most):
                self.assertEqual(len(self.links()), most)
                self.assertEqual("%d of 6 names" % most in self.get("/").body.decode(), most < 6)

    def test_pages(self) -> None:
        """All pages have one style, for phones and dark rooms; a 401 says how to try again."""
        pages = {status: authserver.error_page(status)
                 for status in (400, 401, 403, 404, 405, 429, 500, 503)}
        for body in [*pages.values(), self.get("/").body]:
            for piece in ("<!DOCTYPE html>", "viewport", "scheme:light dark", authserver.STYLE):
                self.assertIn(piece, body.decode())
            self.assertNotIn(b"<script", body)
        self.assertLess(max(map(len, pages.values())), 1500)
        self.assertRegex(pages[401].decode(),
                         "401 Unauthorized</h1>\n<p>This .* To try again, .*\\.")
        self.assertIs(authserver.error_page(401), pages[401])
        self.assertIn(b'<a href="/">', pages[404])


# -- 2. HTTP, over real sockets ----------------------------------------------

PRELUDE = r'''
import functools, gc, http.server, io, os, resource, socketserver, ssl, sys, threading, time
sys.path.insert(0, %r)
sys.dont_write_bytecode = True
import authserver
from authserver import AuthServer, Authenticator, Passwords, protect, protect_wsgi
passwords = Passwords({"jim": "secret", "ann": "other"}, realm="files")
''' % HERE
LIBRARY_END = r'''
if not isinstance(server, authserver.AuthServer):  # which says it itself
    print("listening on http://127.0.0.1:%d/" % server.server_address[1], flush=True)
server.serve_forever()
'''
Row = Tuple[str, bytes, List[int], bool]        # sentence, what is sent, the statuses, closed?


class HttpTest(SharedBoxTest):
    """A server that a class shares: `script` makes it, or authserver.py runs with `settings`."""
    at: str
    script, settings = "", ""
    options: Sequence[str] = ()

    @classmethod
    def set_up(cls) -> None:
        passwords = cls.box.write("passwords", "jim:plain:secret\nann:plain:other\n", 0o600)
        main = "sys.exit(authserver.main(sys.argv[1:]))\n"
        path = cls.box.write("server.py", PRELUDE + cls.settings + "\n" + (
            cls.script + LIBRARY_END if cls.script else main))
        cls.at = cls.box.launch(PYTHON, path, "--passwords", passwords, "--bind", "127.0.0.1:0",
                                *cls.options)

    def say(self, data: bytes) -> bytes:
        """Send bytes and the end of them; return all that comes back."""
        return talk(self.at, data, True)

    def check(self, rows: Sequence[Row], tells: bool = True) -> None:
        """Send each row's bytes, then a request: it is answered, or the connection was closed.

        And that was told (`tells`), where it was known before the answer began.
        """
        for sentence, data, want, closes in rows:
            with self.subTest(sentence):
                said = self.say(data + head("/", "GET", JIM, CLOSE))
                self.assertEqual(statuses(said), want + [200] * (not closes))
                if want and closes and tells:
                    self.assertIn(b"\r\nconnection: close\r\n", said.lower())

    def trickle(self, wire: Wire, octets: bytes) -> Answer:
        """Send bytes in a packet each, and read the answer."""
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for octet in octets[:-1]:
            wire.sendall(bytes([octet]))
        return wire.exchange(octets[-1:])

    def leave(self, data: bytes, size: int = 0) -> None:
        """Send bytes, read some of the answer, and go away with a reset."""
        wire = Wire(self.at)
        wire.sendall(data)
        wire.recv(size)
        wire.abort()

    def log(self: Any) -> str:       # HttpCommand, which shares no server, has these two as well
        return read(self.box.output)

    def logged(self: Any, pattern: str, count: int = 1) -> List[Any]:
        """Wait for `count` matches in the log, and return them."""
        return list(until(lambda: len(re.findall(pattern, self.log())) >= count
                          and re.findall(pattern, self.log()), "%d of %s" % (count, pattern)))


def heads(want: Any, start: bytes, rows: Dict[str, bytes], end: bytes = b"\r\n\r\n") -> List[Any]:
    """Return rows: a word, a head (start, what is special about it, end), what becomes of it."""
    return [(word, start + octets + end, want) for word, octets in rows.items()]


G, P = b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\n"
G10, P10, HOST = b"GET / HTTP/1.0\r\n", b"POST / HTTP/1.0\r\n", b" HTTP/1.1\r\nHost: a\r\n\r\n"
TARGET = b"a" * (authserver.MAX_LINE - len(b"GET / HTTP/1.1"))
FIELD = b"X: " + b"a" * (authserver.MAX_HEAD - len(G + b"X: \r\n\r\n"))
FIELDS = b"X: a\r\n" * (authserver.MAX_FIELDS - 2) + b"X: a"
# Each bound is met exactly, and one more is refused, with a status. Who is read is not: that row
# says what differs from a GET of / without a body.
HEADS = [
    *heads(400, b"", {
        "two blanks before the target": b"GET  /", "a no-break space": b"GET /\xa0",
        "NUL in the target": b"GET /\x00", "a control character in the method": b"G\x01T /",
        "*": b"GET *", "no slash": b"GET a", "a fragment": b"GET /#x", "no host": b"GET http://",
        "a user": b"GET http://u@h/", "half an address": b"GET http://h[/",
        "no port": b"GET http://h:8o/"}, HOST),
    *heads(400, b"GET /", {
        "a blank after the version": b" HTTP/1.1 \r\nHost: a", "no Host": b" HTTP/1.1", "0.9": b"",
        "http in small letters": b" http/1.1\r\nHost: a",
        "a blank in Host": b" HTTP/1.1\r\nHost: a b",
        "two Hosts in 1.0": b" HTTP/1.0\r\nHost: a\r\nHost: a"}),
    *heads(400, G, {
        "two Hosts": b"Host: a", "a blank before the colon": b"X : a", "no colon": b"no colon",
        "no name": b": a", "a line that begins with a blank": b" folded", "a bare CR": b"X: a\rb",
        "a folded line": b"X: a\r\n folded", "NUL in a field": b"X: a\x00b",
        "a bare LF": b"X: a\nY: b", "DEL in a name": b"X\x7f: a"}),
    *heads(400, P + b"Content-Length:", {
        "two lengths": b" 1\r\nContent-Length: 1", "a list": b" 1, 1", "none": b"",
        "a sign": b" +1", "a negative length": b" -1", "hexadecimal": b" 0x1",
        "superscript": b" \xb9", "an underscore": b" 1_0",
        "length and chunks": b" 1\r\nTransfer-Encoding: chunked"}),
    *heads(400, P + b"Transfer-Encoding:", {
        "identity": b" identity", "an empty coding": b"", "an unknown coding": b" xchunked",
        "not last": b" chunked, gzip", "twice": b" chunked\r\nTransfer-Encoding: chunked"}),
    *heads(400, P10, {"chunks in 1.0": b"Transfer-Encoding: chunked"}),
    *heads({"keep_alive": False}, b"GET", {"no fields, as these": b" / HTTP/1.0"}),
    *heads(411, b"", {"no length": b"POST", "nor this": b"PUT", "...": b"PATCH"},
           b" / HTTP/1.0\r\n\r\n"),
    *heads(400, b"POST", {"no fields in 1.1": b" / HTTP/1.1"}),
    *heads(413, P, {"a length of 16 digits": b"Content-Length: 0000000000000001"}),
    *heads(414, b"GET /", {"too long": TARGET + b"a", "endless": b"a" * authserver.MAX_HEAD}, HOST),
    *heads(417, G, {"an expectation of tea": b"Expect: tea"}),
    *heads(431, G, {"a long field": FIELD + b"a", "many fields": FIELDS + b"\r\nX: a"}),
    *heads(501, P, {"gzip": b"Transfer-Encoding: gzip, chunked"}),
    *heads(505, b"", {"HTTP/2.0": b"GET / HTTP/2.0", "its preface": b"PRI * HTTP/2.0\r\n\r\nSM"}),
    *heads({}, G, {"a long field": FIELD, "many fields": FIELDS, "an option": b"Connection: x"}),
    *heads({"path": "/" + TARGET.decode()}, b"GET /", {"a long target": TARGET}, HOST),
    *heads({"path": "/a//b?c"}, b"GET ", {
        "a path and a query": b"/a//b?c", "two slashes": b"//a//b?c", "an URL": b"http://h/a//b?c",
        "an URL in capitals, with two slashes": b"HTTP://h:80//a//b?c"}, HOST),
    *heads({"path": "/?b"}, b"GET ", {"no path": b"http://h?b", "a slash": b"http://h/?b"}, HOST),
    *heads({"keep_alive": False}, G, {"told to close": b"Connection: x, Close"}),
    *heads({"keep_alive": False}, G10, {
        "1.0": b"X: y", "a word": b"Connection: x", "two words": b"Connection: keep-alive, close"}),
    *heads({}, G10, {"1.0 that stays": b"Connection: x, Keep-Alive"}),
    *heads({"keep_alive": False, "length": 0}, P10, {"no body in 1.0": b"Content-Length: 0"}),
    *heads({"keep_alive": False, "length": 1}, P10, {
        "1.0 waits for nothing": b"Content-Length: 1\r\nExpect: 100-continue"}),
    *heads({"chunked": True, "expects": True}, P, {
        "chunks": b"Expect: 100-Continue\r\nTransfer-Encoding: Chunked"}),
    *heads({"length": 1}, P, {"a length of 15 digits": b"Content-Length: 000000000000001"})]
# Of a request with a body the head alone would be no whole one.
SYNTAX = [(word, octets, [want], True) if isinstance(want, int) else
          (word, octets, [401], not want.get("keep_alive", True))
          for word, octets, want in HEADS if octets[:1] == b"G" or isinstance(want, int)] + [
    ("an empty line before a request", b"\r\n" + head("//example/foo"), [200], False),
    ("a HEAD of what is not there", head("/none", "HEAD"), [404], False),
    ("OPTIONS *", head("*", "OPTIONS"), [204], False),
    ("CONNECT", head("x:80", "CONNECT"), [405], False)]
SMUGGLED = b"GET /example/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
LENGTH, CHUNKED = "Content-Length: %d" % len(SMUGGLED), "Transfer-Encoding: chunked"
CHUNKS = b"3;ext=1\r\nabc\r\n1\r\nd\r\n0\r\nTrailer: x\r\n\r\n"


def rows(want: List[int], closes: bool, cases: Dict[str, bytes]) -> List[Row]:
    """Return the rows of what is answered in the same way."""
    return [(word, octets, want, closes) for word, octets in cases.items()]


BODIES = rows([401], True, {
    "chunks of a refused request": head("/", "POST", "", CHUNKED) + SMUGGLED,
    "a large body of one": head("/", "POST", "", "Content-Length: 100000") + SMUGGLED,
    "who waits": head("/", "PUT", "", "Content-Length: 9", "Expect: 100-continue")}) + [
    ("a small body of one", head("/", "POST", "", LENGTH) + SMUGGLED, [401], False),
    ("a body that the method has not", head("/", "POST", JIM, LENGTH) + SMUGGLED, [405], False),
    ("a GET with chunks", head("/", "GET", JIM, CHUNKED) + CHUNKS, [200], True),
    *rows([200], False, {
        "a GET with a body": head("/", "GET", JIM, "Content-Length: 4") + b"abcd",
        "64 KiB": head("/", "GET", JIM, "Content-Length: 65536") + b"a" * 65536})]
BROKEN_CHUNKS = (b"x\r\n", b"1\r\naX\r\n", b"0\r\nno colon\r\n\r\n", b"1;" + b"x" * 9000, b"\r\n",
                 b"-1\r\na\r\n", b"+1\r\n", b"0x1\r\na\r\n", b"1_0\r\n", b" 1\r\na\r\n", b"1 x\r\n",
                 b"1 \r\na\r\n0\r\n\r\n", b"1 \n\r\na\r\n", b"1\x00\r\n", b"1;\x00\r\n", b"g\r\n",
                 b"1\r\nab\r\n", b"1\r\na\r\n\r\n", b"0000000000000001\r\n", b"0\r\nX : y\r\n")


class HttpSyntax(HttpTest):
    """A request is read by the letter of the RFC, or refused"""

    def test_what_is_read_and_what_is_refused(self) -> None:
        """After what two programs could read differently nothing is; a body is never a request."""
        self.check(SYNTAX + BODIES)

    def test_methods_that_the_resource_has_not(self) -> None:
        """405 with Allow for a known method, 501 for an unknown one; strangers learn neither."""
        for method, status in (("POST", 405), ("DELETE", 405), ("TRACE", 405), ("BREW", 501)):
            with self.subTest(method), Wire(self.at) as wire:
                answer = wire.ask("/", method, JIM, EMPTY)
                self.assertEqual(answer.status, status)
                self.assertEqual(answer.field("Allow"), "GET, HEAD, OPTIONS")
                self.assertEqual(wire.ask("/", method, "").status, 401)

    def test_however_requests_are_cut_into_packets(self) -> None:
        """A head may come byte by byte; 500 may come at once, and are answered in their order."""
        with Wire(self.at) as wire:
            self.assertEqual(self.trickle(wire, head()).status, 200)
        self.assertEqual(statuses(self.say(head() * 500)), [200] * 500)
        answer = self.say(head("/example/one") + b"\r\n" + head("/nothing") + head("/", "HEAD")
                          + head("/example/two", "GET", JIM, CLOSE) + head())
        self.assertEqual(statuses(answer), [200, 404, 200, 200])
        self.assertLess(answer.index(b"one"), answer.index(b"two"))

    def test_head_has_the_fields_of_get_and_no_body(self) -> None:
        for path, auth in (("/", JIM), ("/", ""), ("/none", JIM)):
            with self.subTest(path, auth=auth), Wire(self.at) as wire:
                get, head_, again = (wire.ask(path, method, auth, body=method == "GET")
                                     for method in ("GET", "HEAD", "GET"))
                fields = [[field for field in answer.fields if field[0] not in (
                    "date", "www-authenticate")] for answer in (get, head_)]
                self.assertEqual(fields[0], fields[1])
                self.assertEqual((head_.status, again.status), (get.status, get.status))

    def test_who_can_only_become_worse_is_refused_and_reads_why(self) -> None:
        """Half a head for whose end nobody waits; 1 MiB to a 401, sent without a look."""
        size = 1 << 20
        for status, data in (
                (431, b"GET / HTTP/1.1\r\nX: " + b"a" * 40000), (414, b"GET /" + b"a" * 9000),
                (400, b"GET / HTTP/1.1\nHost: a\r\n"),
                (401, head("/", "POST", "", "Content-Length: %d" % size) + b"a" * size)):
            with self.subTest(status), Wire(self.at, SOON) as wire:     # before "linger" is over
                wire.sendall(data)
                self.assertEqual(statuses(wire.hear()), [status])

    def test_a_proof_is_good_once(self) -> None:
        """nc from 1 to 9, also out of order; the same again, or with another response, is 401.

        Whatever is remembered of heads; and what looks like credentials in a field beside them.
        """
        client = Digest(request(self.at, "/", "GET", "").field("www-authenticate") or "", uri="/")
        proofs = [client.field("%08x" % nc) for nc in (1, 2, 3, 4, 6, 5, 7, 8, 9)]
        forged = re.sub('response="[^"]*', 'response="%032d' % 0, proofs[0])
        last = "Authorization: " + client.field("0000000a")
        decoys = ['X-Authorization: Digest a=b, nc=%08x, response="0"' % nc for nc in (1, 1, 2)]
        with Wire(self.at) as wire:
            said = [wire.ask("/", "GET", proof).status for proof in [
                *proofs, *proofs, proofs[0], forged, proofs[0]]]
            self.assertEqual(said, [200] * 9 + [401] * 12)
            said = [wire.ask("/", "GET", "", decoy, last).status for decoy in decoys]
            self.assertEqual(said, [200, 401, 401])


class HttpInMemory(unittest.TestCase):
    """What a head means, and a body; and what becomes of an answer: without a socket"""

    def test_where_a_chunked_body_ends(self) -> None:
        """At the empty line after its trailer; each fault is refused, and what is too long."""
        line, most = b"x" * authserver.MAX_LINE, authserver.MAX_BODY
        trailer = b"0\r\n" + b"X: y\r\n" * (authserver.MAX_HEAD // 6)
        for octets, want in [
                (b"", b""), (b"0\r\n\r\n", b""), (b"F;x\r\n" + line[:15] + b"\r\n0\r\n", line[:15]),
                (b'a;x="y"\r\n0123456789\r\n00 \t;x\r\nX: y\r\n\r\n', b"0123456789"),
                (trailer, b""), (b"1;" + line[3:] + b"\r\na", b"a"), (b"1;" + line[:-2], b""),
                (b"%x\r\n" % most, b""), (b"%x\r\n" % (most + 1), 413)] + [
                (octets, 400) for octets in BROKEN_CHUNKS + (
                    b"1;" + line[1:] + b"\r\n", b"1;" + line, line + b"x", b"1\r\nab" + line,
                    trailer + b"X: y\r\n")]:
            size = 1 + len(octets) // 99
            for pieces in ([octets], [octets[i:i + size] for i in range(0, len(octets), size)]):
                with self.subTest(octets[:40], pieces=len(pieces)):
                    body = authserver.Body(0, True)
                    try:
                        self.assertEqual((b"".join(map(body.feed, pieces)), body.done),
                                         (want, octets.endswith(b"\r\n\r\n")))
                    except authserver.BadRequest as error:
                        self.assertEqual(error.status, want)
        body = authserver.Body(0, True)
        for _ in range(2):
            body.feed(b"%x\r\n" % (most // 2))
            body.left = 0           # as if that had come
            body.feed(b"\r\n")
        with self.assertRaises(authserver.BadRequest):
            body.feed(b"1\r\n")
        self.assertEqual([authserver.Body(n, False).done for n in (-1, 0, 1)], [True, True, False])

    def test_a_head_is_read_as_if_it_were_the_first(self) -> None:
        """Whatever came before, and wherever credentials seem to stand."""
        for lines in (
                "AUTHORIZATION: %s\r\nContent-Length: 1%s",
                "Authorization: Digest a=%s\r\nReferer: %s",
                "Proxy-Authorization: Digest a=%s\r\nAuthorization: %s",
                "X: uthorization: Digest %s\r\nUser-Agent: %s",
                "authorization: gest %s\r\nX: Authorization: %s",
                'Connection: x uri="%s"\r\nAuthorization: %s',
                "authorization:%s \r\nAuthorization: %s", "Authorization: %s\r\nConnection: %s"):
            reader = authserver.HeadReader()
            for pair in ("1 2", "1 2", "1 3", "4 2", "close 5", "6 7", "a,close 8"):
                octets = (G.decode() + lines % tuple(pair.split()) + "\r\n\r\n").encode()
                with self.subTest(octets):
                    self.assertEqual(*[
                        (found.fields, found.line, [*found.authorization])
                        for found in (reader.read(octets), authserver.parse_head(octets))])
        known = len(reader._known)
        reader.read(octets[:-2] + b"X: %s\r\n\r\n" % (b"a" * 5000))     # too long to be kept
        self.assertEqual(len(reader._known), known)
        with mock.patch.object(authserver, "MAX_MEMOS", 8):
            for number in [*range(300)] * 2:
                path = reader.read(b"GET /%d%sX: %d\r\n\r\n" % (number, HOST[:-2], number)).path
                self.assertEqual(path, "/%d" % number)
                self.assertLessEqual(len(reader._known), 8)

    def test_what_is_remembered_of_a_head(self) -> None:
        """The third time its fields are not parsed; credentials are not kept; its line counts."""
        reader, parsed = authserver.HeadReader(), mock.Mock(side_effect=authserver.parse_head)
        with mock.patch.object(authserver, "parse_head", parsed):
            for n in range(5):
                octets = b"GET /%d%sAuthorization: Basic %d \t\r\n\r\n" % (n, HOST[:-2], n)
                found = reader.read(octets)
                self.assertEqual(found.path, "/%d" % n)
                self.assertEqual([*found.authorization], ["Basic %d" % n])
            for n in range(5):
                reader.read(b"GET /%s HTTP/1.0\r\n\r\n" % (b"long" * 50 * n))
        self.assertEqual(parsed.call_count, 4)
        self.assertNotIn(b"Basic", b"".join(reader._known))
    def test_what_a_head_means(self) -> None:
        """For who reads it the first time, and whatever is remembered of it or of others."""
        plain = {"path": "/", "length": -1, "chunked": False, "keep_alive": True, "expects": False}
        reader = authserver.HeadReader()
        for word, octets, want in HEADS:
            for read in [authserver.parse_head] + [reader.read] * 3:
                with self.subTest(word):
                    try:
                        found = read(octets)
                        means = dict(found.fields._asdict(), path=found.path)
                        self.assertEqual({name: means[name] for name in plain}, dict(plain, **want))
                        self.assertEqual(found.has_body(), means["chunked"] or means["length"] == 1)
                    except authserver.BadRequest as error:
                        self.assertEqual(error.status, want)

    def test_nothing_is_kept_of_who_has_been_refused(self) -> None:
        """It is read, so that it can read the answer; our memory is not filled with it."""
        for closing, kept in ((True, b""), (False, b"ab")):
            connection = mock.Mock(writes=False, closing=closing, buffer=b"")
            connection.server.later = {}
            connection.receive.side_effect = [b"a", b"b", None, b""]
            for _ in range(4):
                authserver.Connection.ready(connection, 1)
            self.assertEqual((connection.buffer, connection.close.call_count), (kept, 1))

    def test_what_is_sent_first(self) -> None:
        """No byte of a file before the whole head; who is cut, or has left, is closed."""
        for sent, took, calls in (
                (2, 0, "send wait_to_write"), (3, 0, "send send_part wait_to_write"),
                (3, 4, "send send_part wait_to_write"), (3, 5, "send send_part"),
                (3, EOFError(), "send send_part close"), (BrokenPipeError(), 0, "send close"),
                (3, ConnectionResetError(), "send send_part close")):
            file = mock.Mock()
            channel = mock.Mock(output=b"abc", part=authserver.FilePart(file, 7, 5), closing=False,
                                writes=False)
            channel.send.side_effect, channel.send_part.side_effect = [sent], [took]
            authserver.Channel.flush(channel)
            self.assertEqual([call[0] for call in channel.method_calls], calls.split())
            self.assertEqual(file.close.called, took == 5)
            if took == 4:
                self.assertEqual(channel.part[1:], (11, 1))
                channel.wait_to_write.assert_called_with(7)

    def test_how_long_a_client_is_waited_for(self) -> None:
        """The deadline moves by what was taken, no further than a whole one."""
        pace, longest = authserver.PACE_SECONDS / authserver.IN_MEMORY, authserver.WAITS["write"]
        for writes, sent, deadline in ((True, 0, 100.0), (True, 1000, 100.0 + 1000 * pace),
                                       (True, 10 ** 9, 95.0 + longest), (False, 0, 100.0)):
            channel = mock.Mock(writes=writes, deadline=100.0, **{"server.clock": 95.0})
            authserver.Channel.wait_to_write(channel, sent)
            self.assertEqual(channel.deadline, deadline)
            self.assertEqual(channel.method_calls, [] if writes else [
                mock.call.watch(True), mock.call.wait("write")])
        for stage, draining in (("idle", False), ("idle", True), ("first", False), ("first", True),
                                ("head", True), ("write", True)):
            channel = mock.Mock(**{"server.clock": 95.0, "server.draining": draining})
            authserver.Channel.wait(channel, stage)
            soon = draining and stage in ("idle", "first")
            self.assertEqual((channel.stage, channel.deadline), (
                stage, 95.0 + (authserver.DRAIN_SECONDS if soon else authserver.WAITS[stage])))

    def test_who_has_to_wait_and_who_has_to_go(self) -> None:
        """A drain hastens who asks nothing, a story in a thread waits, a full machine has room."""
        for stage in ("first", "idle", "handshake", "head", "thread", "write"):
            connection = mock.Mock(stage=stage, deadline=1e9, writes=False)
            AuthServer.begin_drain(mock.Mock(clock=95.0, connections=[connection]))
            self.assertEqual(connection.deadline, 1e9 if stage in ("head", "thread", "write") else
                             95.0 + authserver.DRAIN_SECONDS)
        for stage, writes in (("thread", False), ("thread", True), ("head", True), ("head", False)):
            connection = mock.Mock(stage=stage, writes=writes)
            authserver.Connection.advance(connection)
            self.assertEqual(connection.go_on.called, (stage, writes) == ("head", False))
        for number in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM):
            loop = mock.Mock(draining=False)
            with mock.patch("socket.socket.accept", side_effect=OSError(number, "")):
                authserver.Loop.accept(loop, mock.Mock(), 1)
            self.assertEqual(loop.make_room.called, number != errno.EPERM)

    def test_who_may_still_be_sending_is_heard_to_its_end(self) -> None:
        for stage, lingers, buffer, error, calls in (
                ("linger", True, b"x", None, ""), ("write", False, b"", None, "close"),
                ("write", True, b"", None, "shut watch wait"),
                ("write", False, b"x", None, "shut watch wait"),
                ("write", True, b"", OSError, "shut close")):
            channel = mock.Mock(stage=stage, lingers=lingers, buffer=buffer)
            channel.shut.side_effect = error
            authserver.Channel.hang_up(channel)
            self.assertEqual([call[0] for call in channel.method_calls], calls.split())
            self.assertEqual(channel.watch.call_args_list, [mock.call(False)] * ("watch" in calls))
            self.assertEqual(channel.buffer, buffer if stage == "linger" or error else b"")


class Turns(unittest.TestCase):
    """What happens in one turn of the loop, and in which order"""

    def loop(self, *schemes: str, authenticator: Any = None, **settings: Any) -> Any:
        """Return a server whose turns the test makes."""
        for name, value in settings.items():
            patch = mock.patch.object(authserver, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        listener = authserver.Listener(sock, schemes)
        server = AuthServer(sock.getsockname(), authserver.example, authenticator=authenticator,
                            listeners=[listener])
        server.log.flush = server.log.waiting[2].clear      # type: ignore[method-assign]
        server.begin()
        self.addCleanup(server.server_close)
        self.addCleanup(server.close)
        return server

    def client(self, server: Any, data: bytes = b"") -> Wire:
        """Return a client that has sent something."""
        wire = Wire("127.0.0.1:%d" % server.server_address[1])
        self.addCleanup(wire.close)
        wire.sendall(data)
        return wire

    def status_of(self, server: Any, peer: str, octets: bytes) -> int:
        """Return what a request is answered that comes from an address."""
        connection = authserver.Connection(server, server.listeners[0], None, (peer, 4711))
        self.assertEqual((list(connection.answer(octets)), connection.host), ([], peer))
        status, = statuses(connection.output)
        return status

    def test_a_lock_out_is_of_the_address_that_connected(self) -> None:
        """Or of the one that a trusted proxy names; nobody else shares it, with the same head."""
        server = self.loop("basic", authenticator=make(max_failures=(2, 60.0)))
        server.proxies = authserver.TrustedProxies(["192.0.2.9"])
        for peer, forwarded, auth, want in (
                ("192.0.2.1", "", WRONG, 401), ("192.0.2.1", "", WRONG, 401),
                ("192.0.2.1", "", WRONG, 429), ("192.0.2.2", "", WRONG, 401),
                ("192.0.2.2", "", JIM, 200), ("192.0.2.1", "", JIM, 429),
                ("192.0.2.9", "192.0.2.1", JIM, 429), ("192.0.2.9", "192.0.2.3", JIM, 200),
                ("192.0.2.9", "", JIM, 200), ("192.0.2.3", "192.0.2.1", JIM, 200),
                ("192.0.2.1", "192.0.2.3", JIM, 429), ("127.0.0.1", "", WRONG, 401),
                ("127.0.0.1", "", WRONG, 401), ("127.0.0.1", "", JIM, 200)):
            octets = head("/", "GET", auth, *["X-Forwarded-For: " + forwarded] * bool(forwarded))
            self.assertEqual(self.status_of(server, peer, octets), want, (peer, forwarded))
            # The log has, of the same head, each time who has sent it.
            host = forwarded if forwarded and peer == "192.0.2.9" else peer
            self.assertEqual(server.log.waiting[1].pop().split()[0], host)

    def test_nothing_that_a_client_says_ends_a_quotation_in_the_log(self) -> None:
        """Neither target, Referer and User-Agent, nor what a proxy says that was asked for."""
        server = self.loop("basic", authenticator=make())
        server.proxies, server.forward_auth = authserver.TrustedProxies(["192.0.2.9"]), "/auth"
        for path, fields, status, line, tail in (
                ("/a\\", ['Referer: "\xe9', "User-Agent: \\\x80\t"], 404,
                 '"GET /a\\x5c HTTP/1.1" 404', '"\\x22\\xe9" "\\x5c\\x80"'),
                ("/auth", ["X-Original-Method: GET", 'X-Original-URI: /b"\xe9'], 200,
                 '"GET /b\\x22\\xe9 HTTP/1.1" 200', '"-" "-"')):
            octets = head(path, "GET", JIM, *fields)
            self.assertEqual(self.status_of(server, "192.0.2.9", octets), status)
            logged = r"\A192.0.2.9 - jim \[[^]]+\] %s \d+ %s\n\Z"
            line, tail = re.escape(line), re.escape(tail)
            self.assertRegex(server.log.waiting[1].pop(), logged % (line, tail))

    def test_who_asks_ahead_is_read_in_a_turn_of_its_own(self) -> None:
        """Of 20 that pipeline without end a turn answers one; who comes then is the next."""
        server = self.loop(SLICE=0.0, READ_SIZE=256)
        for _ in range(20):
            self.client(server, head("/", auth="") * 200)
        for _ in range(100):        # each has been read more than once by now
            server.turn(0)
        before, honest = server.answered, self.client(server, head("/", auth=""))
        for _ in range(2):          # it is accepted, and answered
            server.turn(0)
        honest.setblocking(False)
        self.assertEqual(honest.recv(12), b"HTTP/1.1 200")
        self.assertLess(server.answered - before, 5)

    def test_what_one_client_causes_costs_no_other(self) -> None:
        """A program's verify_request raises for the third of three: two have their answers."""
        server = self.loop()
        with mock.patch.object(server, "verify_request", side_effect=[True, True, KeyError()]):
            clients = [self.client(server, head("/", auth="")) for _ in range(3)]
            for _ in range(3):
                server.turn(0)
        self.assertEqual([sock.recv(12) for sock in clients[:2]], [b"HTTP/1.1 200"] * 2)
        self.assertEqual(clients[2].hear(), b"")

    def test_an_answer_leaves_once(self) -> None:
        """SIGTERM comes between send(2) and the next line: what has left is not sent again."""
        server, send = self.loop(), authserver.Channel.send
        client = self.client(server, head("/", auth=""))

        def send_and_die(connection: Any, octets: bytes) -> int:
            send(connection, octets)
            raise SystemExit
        with mock.patch.object(authserver.Channel, "send", send_and_die), \
                self.assertRaises(SystemExit):
            for _ in range(100):
                server.turn(1)
        server.close()
        self.assertEqual(client.hear().count(b"HTTP/1.1"), 1)

    def test_who_has_an_answer_coming_makes_room_for_nobody(self) -> None:
        """Its answer is ready and not sent, or its next request is in the buffer: not idle."""
        for requests in (1, 2):
            server = self.loop(SLICE=0.0)
            client = self.client(server)
            until(lambda: server.turn(0) or server.connections, "a connection")
            client.sendall(head("/", auth="") * requests)
            asked, = server.connections
            until(lambda: select.select([asked.socket], [], [], 1)[0], "the request")
            asked.ready(0)
            if requests == 2:
                server.send_answers()
            server.make_room()
            until(lambda: server.turn(0) or server.answered == requests, "the answers")
            server.close()
            self.assertEqual(statuses(client.hear()), [200] * requests)

    def test_calls_that_come_meanwhile_wait(self) -> None:
        """A call that asks for another one, for ever: the turn ends all the same."""
        server, calls = self.loop(), []     # type: Any, List[int]

        def again() -> None:
            calls.append(1)
            if len(calls) < 1000:
                server.call_soon(again)
        server.call_soon(again)
        server.turn(0)
        self.assertLess(len(calls), 5)

    def test_the_overdue_are_looked_for_once_a_second(self) -> None:
        """However many quiet turns there are: with 10,000 connections it takes 0.5 ms."""
        server, looked = self.loop(), mock.PropertyMock(return_value=float("inf"))
        idle = type("Idle", (), {"deadline": looked, "stage": "idle", "close": staticmethod(lambda: None)})
        server.connections.add(idle())
        for _ in range(50):
            server.turn(0)
        self.assertIn(looked.call_count, (1, 2))

    def test_a_thread_is_there_or_nobody_waits_for_it(self) -> None:
        """Its place is free before anybody hears of it; one that cannot be started has none."""
        pool, taken = authserver.Pool(1), []    # type: Any, List[bool]
        heard, busy = threading.Event(), threading.Event()
        self.addCleanup(busy.set)

        def tell() -> None:     # who is told that the only thread is done may lend it more
            taken.append(pool.lend(lambda: lambda: None))
            heard.set()
        pool.lend(lambda: tell)
        self.assertTrue(heard.wait(PATIENCE))
        self.assertEqual(taken, [True])
        pool, done = authserver.Pool(5), threading.Event()
        wait: Any = lambda: busy.wait() and (lambda: None)
        self.assertTrue(pool.lend(wait))
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no more")):
            self.assertFalse(pool.lend(wait))
        self.assertTrue(pool.lend(lambda: done.set) and done.wait(SOON))


HANDLERS = r'''
gate = threading.Event()
class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def begin(self, *fields, status=200):
        self.send_response(status)
        for field in fields: self.send_header(*field.split(": "))
        self.end_headers()
        return self.wfile
    def answer(self, body, length=None):
        self.begin("Content-Length: %d" % (len(body) if length is None else length)).write(body)
    def do_GET(self):
        getattr(self, "get_" + self.path.partition("?")[0].strip("/"), self.get_rest)()
    def get_raise(self): raise KeyError("on purpose")
    def get_exit(self): sys.exit(3)
    def get_none(self): pass
    def get_close(self): self.connection.close()
    def get_late(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nx")
        raise KeyError("late")
    def get_short(self): self.answer(b"12345", 10)
    def get_long(self): self.answer(b"1234567890EXTRA", 10)
    def get_no204(self): self.begin(status=204).write(b"deleted!")
    def get_endless(self): self.begin().write(b"no length")
    def get_shut(self): gate.clear(); self.answer(b"")
    def get_open(self): gate.set(); self.answer(b"")
    def get_slow(self): self.answer(b"%r" % gate.wait(10))
    def get_big(self): self.answer(b"a" * 20000000)
    def get_limit(self):
        told, tell = os.pipe()
        if not os.fork():
            os.write(tell, b"%d" % resource.getrlimit(resource.RLIMIT_NOFILE)[0]); os._exit(0)
        self.answer(os.read(told, 99))
    def get_rest(self): self.answer(repr([self.command, self.path]).encode())
    def do_HEAD(self): self.answer(b"body of a HEAD")
    def do_UNREAD(self): self.answer(b"unread")
    def do_LINE(self): self.rfile.readline(); self.answer(b"a line")
    def do_MUTE(self): pass
    def do_ROUND(self): self.connection.sendmsg([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"])
    def get_more(self, chunk=b"0\r\n\r\n"):
        self.begin("Transfer-Encoding: chunked").write(
            b"2\r\nok\r\n" + chunk + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    def get_worse(self): self.get_more(b"zz\r\n")
    def do_POST(self): self.answer(self.rfile.read(int(self.headers["Content-Length"])))
    def do_RAW(self): self.answer(self.rfile.read())
    def do_CHUNKS(self, body=b""):
        while True:
            size = int(self.rfile.readline().split(b";")[0], 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size: return self.answer(body)
    def do_BEGIN(self):
        self.begin("Content-Length: 3").write(b"y")
        self.rfile.read(); self.wfile.write(b"es")
    def do_STREAM(self):
        self.begin("Connection: close")
        for line in self.rfile: self.wfile.write(line.upper())
    def do_HIDE(self):
        try: self.rfile.read()
        except OSError: pass
        gate.set()
server = AuthServer(("127.0.0.1", 0), protect(Echo, passwords, qop=["auth", "auth-int"]))
'''
HANDLED = rows([200], True, {
    "an answer without a length": head("/endless"), "an exception in its middle": head("/late"),
    "fewer bytes than announced": head("/short"), "more bytes than announced": head("/long"),
    "more after the last chunk": head("/more"), "a chunk without a size": head("/worse"),
    "no chunk in a body, too late": head("/", "BEGIN", JIM, CHUNKED) + b"x\r\n",
    "a body after a HEAD": head("/", "HEAD")}) + rows([200], False, {
        "a body that nobody has read": head("/", "UNREAD", JIM, LENGTH) + SMUGGLED,
        "a body of which a line was read": head("/", "LINE", JIM, "Content-Length: %d" % (
            len(SMUGGLED) + 3)) + b"a\r\n" + SMUGGLED,
        "a body by length": head("/", "POST", JIM, "Content-Length: 3") + b"abc",
        "a body in chunks": head("/", "CHUNKS", JIM, CHUNKED) + CHUNKS}) + rows([500], True, {
            "no answer": head("/none"), "an exception": head("/raise"), "exit()": head("/exit"),
            "a body, and no answer": head("/", "MUTE", JIM, LENGTH) + SMUGGLED}) + [
    ("a body after 204", head("/no204"), [204], True),
    ("a connection that was closed", head("/close"), [], True)] + rows([401], False, {
        "no password: " + method: head("/", method, "", EMPTY)
        for method in ("GET", "POST", "UNREAD", "NONE")})


class HttpHandlers(HttpTest):
    """Any BaseHTTPRequestHandler runs on AuthServer, and may wait"""
    settings = """
files = resource.RLIMIT_NOFILE
resource.setrlimit(files, (200, resource.getrlimit(files)[1]))
"""
    script = HANDLERS

    def ask(self, path: str, method: str = "GET", *fields: str, data: bytes = b"") -> Answer:
        """Send one request of jim's on a connection of its own."""
        return request(self.at, path, method, JIM, *fields, data=data)

    def test_one_answer_to_each_request(self) -> None:
        """Exactly one; what cannot be followed ends the connection, with nothing added."""
        self.check(HANDLED + [("an answer past us, and a body",
                               head("/", "ROUND", JIM, LENGTH) + SMUGGLED, [200], True)], False)
        for line in ("KeyError: 'late'", "sent less than it announced", "sent more than it announ",
                     r"(?m)^127\.0\.0\.1 - jim \[\d\d/\w{3}/\d{4}(:\d\d){3} [+-]\d{4}\] "
                     r'"GET /short HTTP/1\.1" 200 5 "-" "-"$'):
            self.logged(line)
        self.assertEqual(self.log().count("KeyError: 'on purpose'"), 1)
        self.check([("too large: " + field, head("/", "CHUNKS", JIM, field) + data, [413], True)
                    for field, data in (("Content-Length: %d" % (authserver.MAX_BODY + 1), b""),
                                        (CHUNKED, b"1\r\na\r\n%x\r\n" % authserver.MAX_BODY))])

    def test_broken_chunks_are_no_body(self) -> None:
        """A chunk without size, end or sense: one answer at most, and nothing after it is read."""
        for chunks in BROKEN_CHUNKS[:4]:
            for method, want in (("RAW", [[], [200], [400]]), ("CHUNKS", [[], [400], [500]]),
                                 ("UNREAD", [[200]])):
                with self.subTest(chunks[:20], method=method):
                    data = head("/", method, JIM, CHUNKED) + chunks + head("/")
                    self.assertIn(statuses(self.say(data)), want)
        self.assertNotIn("BadRequest", self.log())

    def test_bodies_arrive_whole(self) -> None:
        """By length or in chunks, 0 to 3,000,000 bytes, or byte by byte; and the next request."""
        for size in (0, 1, 65536, 65537, 3000000):
            body = (bytes(range(256)) * (size // 256 + 1))[:size]
            pieces = [body[i:i + 50000] for i in range(0, size, 50000)] + [b""]
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            with self.subTest(size), Wire(self.at) as wire:
                length = "Content-Length: %d" % size
                self.assertEqual(wire.ask("/", "POST", JIM, length, data=body).body, body)
                self.assertEqual(wire.ask("/", "CHUNKS", JIM, CHUNKED, data=chunks).body, body)
                self.assertEqual(wire.ask("/").status, 200)
        with Wire(self.at) as wire:
            wire.sendall(head("/", "CHUNKS", JIM, CHUNKED))
            self.assertEqual(self.trickle(wire, b"3\r\nabc\r\n1;x\r\nd\r\n0\r\n\r\n").body, b"abcd")

    def test_auth_int_signs_the_body(self) -> None:
        """A body that was signed arrives; another is 401, one too large to look at 413."""
        for auth in (JIM, digest(self.at, "/", "POST", body=b"hello")):
            with self.subTest(auth[:6]), Wire(self.at) as wire:     # each is asked for it once
                wire.sendall(head("/", "POST", auth, "Content-Length: 5", "Expect: 100-continue"))
                self.assertEqual(wire.recv(4096), b"HTTP/1.1 100 Continue\r\n\r\n")
                self.assertEqual(wire.exchange(b"hello").body, b"hello")
        for sent, signed, field, want in (
                (b"hello", b"hello", "Content-Length: 5", 200), (b"", b"", EMPTY, 200),
                (b"hellO", b"hello", "Content-Length: 5", 401), (b"x\r\n", b"", CHUNKED, 400),
                (b"%x\r\n" % 70000 + b"a" * 70000, b"", CHUNKED, 413),
                (b"1;%s\r\na\r\n" % (b"x" * 8000) * 20 + b"0\r\n\r\n", b"a" * 20, CHUNKED, 413)):
            with self.subTest(field, want=want):
                auth = digest(self.at, "/", "POST", body=signed)
                self.assertEqual(request(self.at, "/", "POST", auth, field, data=sent).status, want)
        # The handler reads it again, as it came: with its chunks, without the next request. And
        # nobody is asked for a body that is there.
        auth = digest(self.at, "/", "RAW", body=b"abcd")
        said = self.say(head("/", "RAW", auth, CHUNKED, "Expect: 100-continue") + CHUNKS
                        + head("/", "GET", JIM, CLOSE))
        self.assertEqual(statuses(said), [200, 200])
        self.assertIn(b"\r\n\r\n" + CHUNKS + b"HTTP/1.1 ", said)

    def test_a_handler_streams_both_ways(self) -> None:
        """What is written is sent at once, what is sent can be read at once."""
        with Wire(self.at) as wire, wire.makefile("rb") as file:
            wire.sendall(head("/", "STREAM", JIM, "Content-Length: 8") + b"one\n")
            fields = list(iter(file.readline, b"\r\n"))
            self.assertEqual(fields.count(b"Connection: close\r\n"), 1)
            self.assertEqual(file.readline(), b"ONE\n")
            wire.sendall(b"two\n")
            self.assertEqual(file.read(), b"TWO\n")

    def test_slow_handlers_do_not_hold_up_others(self) -> None:
        """Ten wait for what an eleventh request brings: that is answered, then they are."""
        self.ask("/shut")
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(self.at)) for _ in range(10)]
            for wire in wires:
                wire.sendall(head("/slow"))
            self.assertEqual(self.ask("/open").status, 200)
            self.assertEqual({wire.exchange(b"").body for wire in wires}, {b"True"})

    def test_a_client_that_leaves_is_no_error(self) -> None:
        """In the middle of a body, or of 20 MB, which reach a slow reader: no word of ours."""
        with Wire(self.at) as wire:
            wire.sendall(head("/big"))
            self.assertEqual(self.ask("/shut").status, 200)
            self.assertEqual(len(wire.exchange(b"").body), 20000000)
        before = self.log()
        self.leave(head("/", "HIDE", JIM, "Content-Length: 100") + b"a")
        self.leave(head("/big"), 1000)
        self.assertEqual(self.ask("/slow").status, 200)
        self.assertNotIn("authserver.py", self.log()[len(before):])

    @unittest.skipIf(sys.version_info < (3, 7), "needs os.register_at_fork")
    def test_a_child_of_a_handler_has_the_old_limit_of_files(self) -> None:
        """The server may have more open files than it was started with; what it starts may not."""
        self.assertEqual(self.ask("/limit").body, b"200")


class HttpPages(HttpTest):
    """A page is a function in the loop: request in; status, fields and body out"""
    settings = "authserver.MAX_CONNECTIONS = 16"
    LARGE = ("/big", "/file0-20000000")
    script = r'''
with open("a file", "wb") as file: file.write(b"0123456789" * 2000000)
def page(request):
    if request.path == "/big": return authserver.Answer(200, [], b"a" * 20000000)
    if request.path == "/raise": raise KeyError("on purpose")
    if request.path == "/none": return None
    if request.path == "/304": return authserver.Answer(304, [("ETag", '"x"')], b"")
    if request.path == "/204": return authserver.Answer(204, [], b"HTTP/1.1 200 OK\r\n\r\n")
    if request.path == "/204f":     # in our own text there is the beginning of an answer
        return authserver.Answer(204, [], authserver.FilePart(
            open(__file__, "rb", buffering=0), 0, os.path.getsize(__file__)))
    if request.path == "/299": return authserver.Answer(299, [], b"")
    if request.path.startswith("/file"):
        part = open("a file", "rb", buffering=0), *map(int, request.path[5:].split("-"))
        return authserver.Answer(200, [], authserver.FilePart(*part))
    said = [request.method, request.target, request.path, request.values.get("x-test"),
            request.username]
    return authserver.Answer(200, [("Content-Type", "text/plain")], repr(said).encode())
server = AuthServer(("127.0.0.1", 0), page, authenticator=Authenticator(passwords))
'''

    def test_gets_what_was_asked(self) -> None:
        """Method, target, path, fields and user."""
        for target, fields, path, values in (
                ("//a%20b?c", ["X-Test: 1", "X-test: 2"], "/a%20b?c", ["1", "2"]),
                ("http://host/a", [], "/a", None)):
            said = request(self.at, target, "GET", JIM, *fields).body.decode()
            self.assertEqual(said, repr(["GET", target, path, values, "jim"]))
        self.assertEqual(request(self.at, "/a", "GET", "").status, 401)

    def test_one_answer_to_each_request(self) -> None:
        """A page that raises, or answers nothing, is 500; 304 has no body; others are served on."""
        self.check([(word, head(path, method), [status], False) for word, path, method, status in (
            ("a page that raises", "/raise", "GET", 500), ("no answer", "/none", "GET", 500),
            ("a status without a body", "/304", "GET", 304), ("no status", "/299", "GET", 500),
            ("a body where none belongs", "/204", "GET", 204), ("... a file", "/204f", "GET", 204),
            ("HEAD of a large answer", "/big", "HEAD", 200),
            ("HEAD of a file", "/file0-20000000", "HEAD", 200))])
        for line in ("KeyError: 'on purpose'", '"GET /204f HTTP/1.1" 204 0 ',
                     '"HEAD /file0-20000000 HTTP/1.1" 200 0 '):
            self.logged(line)

    def test_a_part_of_a_file_is_sent(self) -> None:
        """Offset and length as asked, empty ones too; who ends early breaks off."""
        for start, length in ((3, 19999997), (5, 10), (19999999, 1), (7, 0)):
            with self.subTest(start, length=length), Wire(self.at) as wire:
                body = wire.ask("/file%d-%d" % (start, length)).body
                self.assertEqual(len(body), length)
                self.assertEqual(body[:5], (b"0123456789" * 2)[start % 10:][:min(5, length)])
                self.assertEqual(wire.ask("/").status, 200)
        self.assertEqual(statuses(self.say(head("/file19999990-20") + head("/"))), [200])

    def test_a_large_answer_is_sent_at_the_pace_of_its_reader(self) -> None:
        """Piece by piece: others are served meanwhile, the next request waits; one may leave."""
        for path in self.LARGE:
            with self.subTest(path), Wire(self.at) as wire:
                wire.sendall(head(path) + head("/next"))
                self.assertEqual(request(self.at, "/").status, 200)
                self.assertEqual(len(wire.exchange(b"").body), 20000000)
                self.assertIn(b"/next", wire.exchange(b"").body)
                self.leave(head(path), 1000)
        self.assertEqual(request(self.at, "/").status, 200)
        self.assertNotIn("ConnectionResetError", self.log())

    def test_at_the_limit_of_connections_the_oldest_idle_one_goes(self) -> None:
        """With more than MAX_CONNECTIONS that say nothing a new one is served."""
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(self.at)) for _ in range(40)]
            self.assertEqual(request(self.at, "/").status, 200)
            self.assertEqual(wires[0].recv(1), b"")


# -- 2.1 The idioms of handlers, on the stock server and on ours ------------------------


class StockServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """http.server.ThreadingHTTPServer, which 3.6 has not."""
    daemon_threads = True


@contextlib.contextmanager
def serving(server: Any) -> Iterator[str]:
    """Run a server in a thread; the body gets its address."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    with contextlib.redirect_stderr(io.StringIO()):
        thread.start()
        try:
            yield "127.0.0.1:%d" % getattr(server, "sockets", [server.socket])[0].getsockname()[1]
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


Base: Any = http.server.BaseHTTPRequestHandler
Simple: Any = http.server.SimpleHTTPRequestHandler
USERS = Passwords({"jim": "secret"}, realm="files")


class Idiom(http.server.BaseHTTPRequestHandler):
    """A handler that answers `ok`; made(function) is one that answers by a function of its own."""
    protocol_version = "HTTP/1.1"
    ASKED = head("/a?b", "GET", JIM, "X-Test: 1") + head("/next")
    WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine"

    @classmethod
    def made(cls, function: Callable[[Any], Any]) -> Any:
        """Return a subclass with this do_GET."""
        return type("Made", (cls,), {"do_GET": function})

    def do_GET(self) -> None:
        self.answer(b"ok")

    def begin(self, *fields: str, status: int = 200, reason: Optional[str] = None) -> Any:
        """Send the head of an answer; return where its body goes."""
        self.send_response(status, reason)
        for field in fields:
            self.send_header(*field.split(": "))
        self.end_headers()
        return self.wfile

    def answer(self, body: bytes, *fields: str) -> None:
        self.begin(*fields, "Content-Length: %d" % len(body)).write(body)


# Each is a handler that somebody has written: what it does, and what it is asked.
IDIOMS = r'''
class AskedThings(Idiom):
    def do_GET(self): self.answer(repr([
        self.command, self.path, self.request_version, self.requestline, self.headers["X-Test"],
        self.client_address[0], self.address_string(), self.close_connection]).encode())
class Overrides(Idiom):
    def parse_request(self): self.before = self.raw_requestline; return Base.parse_request(self)
    def log_request(self, code="-", size="-"): self.seen = code; Base.log_request(self, code, size)
    def send_header(self, name, value): name == "X-A" or Base.send_header(self, name, value)
    def end_headers(self): self.send_header("X-Own", "yes"); Simple.end_headers(self)
    def do_GET(self):
        self.begin("X-A: 1", "Content-Length: %d" % (3 + len(self.before)))
        self.wfile.write(b"%d%b" % (self.seen, self.before))
    def finish(self): self.wfile.flush(); Base.finish(self)
class HasTimeouts(Idiom):
    timeout = 60
    def setup(self): self.request.settimeout(60); Base.setup(self); self.request.settimeout(50)
    def do_GET(self):
        self.connection.settimeout(5)
        self.answer(b"%r" % self.connection.gettimeout())
class SetsATimeoutFirst(Idiom):
    def setup(self): self.request.settimeout(60); super().setup()
class OwnLoop(Idiom):
    def handle_one_request(self):
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline: self.close_connection = True
        elif self.parse_request(): self.answer(b"own " + self.command.encode())
class ByAttribute(Idiom):
    ASKED = head("/", "BREW", JIM) + head("/", "TEA", JIM)
    def __getattr__(self, name):
        if not name.startswith("do_"): raise AttributeError(name)
        return lambda: self.answer(name.encode())
class InInit(Idiom):
    ASKED = head("/", "SET") + head("/", "BREW")
    def __init__(self, *arguments): self.do_SET = self.do_GET; super().__init__(*arguments)
class BodyFromTheSocket(Idiom):
    ASKED, rbufsize = head("/", "POST", JIM, "Content-Length: 3") + b"abc", 0
    def do_POST(self):
        select.select([self.connection], [], [], 9)
        self.answer(self.request.recv(3))
class ReadsLate(Idiom):
    ASKED = head("/", "POST", JIM, "Content-Length: 3") + b"abc" + head("/", "GET", JIM)
    def do_POST(self): self.answer(b"ok"); ReadsLate.seen = self.rfile.read(3)
    def do_GET(self): self.answer(self.seen)
class Expects(Idiom):
    ASKED, do_POST = head("/", "POST", JIM, "Expect: 100-continue", EMPTY), Idiom.do_GET
    def handle_expect_100(self): self.send_error(417); return False
class Old(Idiom): protocol_version = "HTTP/1.0"
class Files(Simple):
    ASKED = head("/five") + head("/", "HEAD") + head("/") + head("/none")
    protocol_version = "HTTP/1.1"
class Flushes(Idiom):
    def do_GET(self):
        self.send_response(200)
        self.flush_headers()
        self._headers_buffer.append(b"X: y\r\n")
        self.begin("Content-Length: 2").write(b"ok")
class OnTheConnection(Idiom):
    def do_GET(self): self.connection.sendall(self.WHOLE[:9]); self.request.send(self.WHOLE[9:])
class MakesFiles(Idiom):
    def do_GET(self):
        with self.connection.makefile("wb") as file: file.write(self.WHOLE[:-2])
        text = io.TextIOWrapper(self.wfile, "utf-8", write_through=True)
        text.write("\xe4")
        text.detach()
class Subprocess(Idiom):
    ASKED = head()  # who else holds the connection nobody knows: it ends
    def do_GET(self): subprocess.call(["printf", self.WHOLE.decode()], stdout=self.wfile)
class WithTheConnection(Idiom):
    ASKED = head()
    def do_GET(self):
        with self.connection as connection: connection.sendall(self.WHOLE)
class SendsFiles(Idiom):
    def do_GET(self):
        self.begin("Content-Length: 14")
        with open("five", "rb") as file:
            self.connection.sendfile(file)
            self.connection.sendfile(file, 1, 3)
            self.wfile.write(b"%d" % file.tell())
            file.seek(0)
            shutil.copyfileobj(file, self.wfile)
class OwnStatuses(Idiom):
    def do_GET(self):
        if self.path == "/next": self.send_error(404, "Gone fishing", "until <evening>")
        else: self.begin("Location: /x", EMPTY, status=302, reason="Over there")
class Odd(Idiom):
    def do_GET(self): self.begin(EMPTY, status=299, reason="Quite Fine")
class Closes(Idiom):
    def do_GET(self): self.answer(b"ok", CLOSE)
class ChunksOut(Idiom):
    def do_GET(self):
        self.begin(CHUNKED)
        for piece in (b"one", b"two", b""): self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
class Interim(Idiom):
    def do_GET(self): self.send_response_only(103); self.end_headers(); self.answer(b"ok")
class Buffered(Idiom):
    wbufsize = -1
    def do_GET(self):
        self.begin("Content-Length: 6").writelines([b"ab", b"cd"])
        self.wfile.write(memoryview(b"ef"))
        self.wfile.flush()
'''


class HttpIdioms(SharedBoxTest):
    """What handlers do on the stock server, they do on AuthServer, byte for byte"""

    def bytes_of(self, server: Any, asked: bytes) -> bytes:
        """Return what a server says, but what may differ."""
        with serving(server) as at:
            said = talk(at, asked, True)
        return re.sub(rb"(?im)^(date|server|connection): [^\r]*\r\n", b"", said)

    def test_the_same_bytes(self) -> None:
        """Two requests to each handler behind protect(): Date, Server and Connection apart."""
        known = dict(globals())
        exec(IDIOMS, known)
        handlers: Dict[str, Any] = {name: value for name, value in known.items()
                                    if name not in globals() and isinstance(value, type)}
        self.assertGreater(len(handlers), 20)
        rows: List[Any] = [(name, handler, protect(handler, USERS), handler.ASKED, b"HTTP/1")
                           for name, handler in handlers.items()]
        if sys.version_info >= (3, 7):
            here: Dict[str, Any] = {"directory": self.box.make("pub")}
            self.box.write("pub/public", "12345")
            partial = functools.partial(Simple, **here)
            rows += [(name, partial, guarded, head("/public"), b"12345") for name, guarded in (
                ("protect(partial(Handler))", protect(partial, USERS)),
                ("partial(protect(Handler))", functools.partial(protect(Simple, USERS), **here)))]
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.box.make("folder"))
        self.box.write("folder/five", "12345")
        for name, handler, guarded, asked, word in rows:
            with self.subTest(name):
                bare, stock, ours = (self.bytes_of(kind(("127.0.0.1", 0), which), asked)
                                     for kind, which in ((StockServer, handler),
                                                         (StockServer, guarded), (AuthServer, guarded)))
                self.assertNotIn(statuses(bare)[:1], ([], [401]))
                self.assertIn(word, bare)
                self.assertEqual((bare, bare), (stock, ours))

    def test_a_handler_may_fork(self) -> None:
        """Its client hears the end though a child holds the socket; a child that comes back ends."""
        for server, stays, threads in ((StockServer, True, False), (AuthServer, True, False),
                                       (AuthServer, True, True), (AuthServer, False, False)):
            children: List[int] = []
            gate, key = os.pipe()

            def answer(handler: Any) -> None:
                children.append(os.fork())
                if not children[-1] and threads:
                    threading.Thread(target=os.read, args=(gate, 1)).start()
                elif not children[-1]:
                    sys.exit(int(not stays) or len(os.read(gate, 1)))   # which it waits for
                else:
                    handler.answer(b"ok", CLOSE)

            with self.subTest(server, stays=stays, threads=threads), serving(
                    server(("127.0.0.1", 0), protect(Idiom.made(answer), USERS))) as at:
                self.assertTrue(talk(at, head()).endswith(b"ok"))
                if stays:
                    self.assertEqual(os.waitpid(children[0], os.WNOHANG)[0], 0)
                os.write(key, b"x")
                until(lambda: os.waitpid(children[0], os.WNOHANG)[0], "the end of the child")
            os.close(gate)
            os.close(key)

    def test_a_handler_may_end_the_server(self) -> None:
        """By shutdown(), which waits for the loop, and not for handlers: its answer arrives."""
        def answer(handler: Any) -> None:
            handler.server.shutdown()
            handler.answer(b"ok", CLOSE)
        for server in (StockServer, AuthServer):
            with serving(server(("127.0.0.1", 0), protect(Idiom.made(answer), USERS))) as at:
                self.assertTrue(talk(at, head()).endswith(b"ok"), server)

    def test_a_handler_may_end_lines_with_line_feeds(self) -> None:
        """Nobody agrees on where such a head ends: nothing is added to it, or held back."""
        said = b"HTTP/1.0 200 OK\nX: y\n\nbody\r\n\r\nmore"
        server = AuthServer(("127.0.0.1", 0), protect(Idiom.made(
            lambda handler: handler.wfile.write(said)), USERS))
        with serving(server) as at:
            self.assertEqual(talk(at, head()), said)

    def test_a_handler_may_wrap_its_socket(self) -> None:
        """Behind protect() nobody is asked twice for a proof, which would be a replay."""
        class Wraps(Idiom):
            def setup(self) -> None:
                self.request: Any = mock.Mock(wraps=self.request)
                super().setup()

        class OwnSetup(protect(Idiom, USERS)):      # type: ignore[misc]
            def setup(self) -> None:
                Base.setup(self)                    # which goes round protect()'s
        for server in (AuthServer(("127.0.0.1", 0), Wraps, authenticator=Authenticator(USERS)),
                       AuthServer(("127.0.0.1", 0), protect(Wraps, USERS)),
                       AuthServer(("127.0.0.1", 0), OwnSetup)):
            with serving(server) as at:
                self.assertEqual(enters(at, "jim", "secret"), [200, 200])

    def test_a_handler_may_switch_protocols(self) -> None:
        """101 passes with its Connection field; then the connection is the handler's."""
        def answer(handler: Any) -> None:
            handler.begin("Connection: keep-alive, Upgrade", status=101)
            for line in iter(handler.rfile.readline, b"bye\n"):
                handler.wfile.write(line.upper())
        server = AuthServer(("127.0.0.1", 0), protect(Idiom.made(answer), USERS))
        with serving(server) as at, Wire(at) as wire, wire.makefile("rb", 0) as file:
            wire.sendall(head("/", "GET", JIM, "Upgrade: echo", "Connection: Upgrade") + b"first\n")
            text = b"".join(iter(file.readline, b"\r\n"))
            self.assertIn(b"\r\nConnection: keep-alive, Upgrade\r\n", text)
            self.assertEqual(file.readline(), b"FIRST\n")
            wire.sendall(head("/not/a/request"))
            self.assertEqual(file.readline(), b"GET /NOT/A/REQUEST HTTP/1.1\r\n")
            wire.sendall(b"bye\n")
            self.assertEqual(len(file.read().split(b"\n")), 4)


class HttpHooks(AuthTestCase):
    """A program's own AuthServer: what socketserver calls is called, or refused"""

    def protected(self, handler: Any = Idiom, kind: Any = AuthServer, **guard: Any) -> Any:
        """Return a server with a handler that was protected."""
        return kind(("127.0.0.1", 0), protect(handler, USERS, **guard))

    def ours(self, handler: Any = Idiom, kind: Any = AuthServer, **settings: Any) -> Any:
        """Return a server with an authenticator of its own, closed after the test."""
        authenticator = settings.pop("authenticator", None) or Authenticator(USERS, **settings)
        server = kind(("127.0.0.1", 0), handler, authenticator=authenticator)
        self.addCleanup(server.server_close)
        return server

    def ask(self, server: Any, auth: str = JIM) -> List[int]:
        """Return the statuses of what a server answers."""
        with serving(server) as at:
            return statuses(talk(at, head("/a", "GET", auth, CLOSE), True))

    def test_what_a_program_overrides_is_called_or_refused(self) -> None:
        """As on the stock server; what would never be called is a TypeError that names it."""
        seen: List[Any] = []
        other = protect(Idiom.made(lambda handler: handler.begin(EMPTY, status=299)), USERS)

        def noted(name: str) -> Any:
            def own(*words: Any) -> Any:
                seen.append(name)
                return getattr(AuthServer, name)(*words)
            return own
        for hook in ("process_request", "get_request", "shutdown_request", "close_request"):
            with self.assertRaisesRegex(TypeError, hook):
                self.protected(kind=type("Own", (AuthServer,), {hook: noted(hook)}))
        for hook, function, handler, said, sees in (
                ("verify_request", lambda *_: False, Idiom, [], None),
                ("finish_request", noted("finish_request"), Idiom, [200], "finish_request"),
                ("finish_request", lambda own, *asked: other(*asked, own), Idiom, [299], None),
                ("handle_error", lambda *_: seen.append(sys.exc_info()[0]),
                 Idiom.made(lambda handler: handler.on_purpose), [500], AttributeError)):
            with self.subTest(hook, said=said):
                seen.clear()
                kind = type("Own", (AuthServer,), {hook: function})
                self.assertEqual(self.ask(self.protected(handler, kind)), said)
                self.assertEqual(set(seen), {sees} - {None})

    def test_no_way_in_without_a_password(self) -> None:
        """handle_request(), a handler class set later: 401 or nothing, never a page.

        And what other loops call on a server of socketserver serves nobody who was not asked.
        """
        server = self.ours()
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        at = "127.0.0.1:%d" % server.server_address[1]
        self.assertEqual(statuses(talk(at, head("/", "GET", "", CLOSE), True)), [401])
        thread.join()
        for way in ("finish_request", "process_request", "_handle_request_noblock"):
            with self.subTest(way), Wire(at) as wire, contextlib.redirect_stderr(io.StringIO()):
                wire.sendall(head("/", "GET", "", CLOSE))
                if way[0] == "_":
                    server._handle_request_noblock()
                else:
                    with server.socket.accept()[0] as sock, contextlib.suppress(PermissionError):
                        getattr(server, way)(sock, ("192.0.2.1", 1))
                self.assertEqual(wire.hear(), b"")
        with contextlib.suppress(AttributeError, TypeError):
            server.RequestHandlerClass = Idiom
        self.assertEqual(self.ask(server, ""), [401])

    def test_a_protected_handler_is_not_served_for_another_password(self) -> None:
        """By a server that asks for none, or for that of another dictionary."""
        secret = protect(Idiom, Passwords({"ann": "hers"}, realm="files"))
        kind = type("Own", (AuthServer,), {"finish_request": lambda own, *asked: secret(*asked, own)})
        for server in (kind(("127.0.0.1", 0), Idiom), self.protected(kind=kind)):
            self.assertEqual(self.ask(server), [500])

    def test_a_handler_with_a_loop_of_its_own_gets_one_request(self) -> None:
        """It has read a line of the body, and asks for the next: the rest of the body is none."""
        kind = Idiom.made(lambda handler: handler.rfile.readline() and handler.begin(EMPTY))
        kind.handle = lambda handler: [handler.handle_one_request() for _ in range(2)]
        body = b"a\r\n" + SMUGGLED
        data = head("/", "GET", JIM, "Content-Length: %d" % len(body)) + body
        with mock.patch.object(kind, "parse_request", autospec=True,
                               side_effect=Base.parse_request) as parsed, \
                serving(self.ours(kind)) as at:
            self.assertEqual(statuses(talk(at, data + head("/", "GET", "", CLOSE))), [200, 401])
        self.assertEqual(parsed.call_count, 1)

    def test_a_handler_knows_who_asks(self) -> None:
        """Behind protect(), or where the server asks; an heir of it, too, says where it listens."""
        table = authserver.SharedTable()
        table.add("workers")        # of another one
        kind = Idiom.made(lambda handler: handler.answer(
            ("%s %s" % (handler.remote_user, handler.auth_type)).encode()))
        for server in (self.protected(kind), self.ours(kind, table=table)):
            with mock.patch.object(authserver.Log, "error") as said, serving(server) as at:
                self.assertEqual(request(at, "/").body, b"jim Basic")
            self.assertEqual(str(said.call_args_list).count("listening on"), 1)

    def test_an_address_is_as_on_the_stock_server(self) -> None:
        """One that is taken is EADDRINUSE. One that a network reaches offers Digest alone."""
        with taken_port() as port, self.assertRaises(OSError) as caught:
            AuthServer(("127.0.0.1", port), protect(Idiom, USERS))
        self.assertEqual(caught.exception.errno, errno.EADDRINUSE)
        for host, offer, want in (("127.0.0.1", {}, [200]), ("", {}, [401]),
                                  ("", {"schemes": ["digest", "basic"]}, [200])):
            with self.subTest(host, offer=offer):
                server = AuthServer((host, 0), protect(Idiom, USERS, **offer))
                self.assertEqual(self.ask(server), want)

    def drain(self, server: Any) -> None:
        """Have a server drain, and wait until its loop has heard of it; or until there is none."""
        heard = threading.Event()
        server.drain()
        server.call_soon(heard.set)
        until(lambda: heard.is_set() or server.stopped.is_set(), "that")

    def test_drain_ends_whatever_became_of_a_connection(self) -> None:
        """A handler closed it, or its number; an answer, or the rest of a body, was under way."""
        def large(request: Any) -> Any:
            return authserver.Answer(200, (), b"a" * 20000000)
        # It looks for who is overdue in each turn, and not once a second.
        kind = type("Own", (AuthServer,), {"walked": property(lambda _: 0.0, lambda *_: None)})
        for handler, data, rest in (
                (Idiom.made(lambda handler: handler.connection.close()), head(), b""),
                (Idiom.made(lambda handler: os.close(handler.connection.fileno())), head(), b""),
                (Idiom.made(lambda handler: os.close(handler.connection.detach())), head(), b""),
                (large, head(), b""),
                (large, head("/", "POST", JIM, "Content-Length: 4"), b"late")):
            server = self.ours(handler, kind)
            with self.subTest(data, rest=rest), serving(server) as at, Wire(at) as wire, \
                    mock.patch.object(authserver, "DRAIN_SECONDS", 0.1):
                wire.sendall(data)
                select.select([wire], [], [], PATIENCE)
                self.drain(server)
                wire.sendall(rest)
                wire.hear()
                self.assertTrue(server.stopped.wait(SOON))
        server = self.ours(large, kind)     # handle_request() ends so, too
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with Wire("127.0.0.1:%d" % server.server_address[1]) as wire, \
                mock.patch.object(authserver, "DRAIN_SECONDS", 0.1):
            self.assertEqual(len(wire.ask("/").body), 20000000)
            self.assertEqual(wire.hear(), b"")
            thread.join()

    def test_whom_a_reload_has_deleted_gets_no_last_answer(self) -> None:
        """A worker that drains has the new passwords: on a kept connection, too, 401."""
        server = self.ours(lambda _: authserver.Answer(200, ()))
        ann = Passwords({"ann": "other"}, realm="files")
        server.reread = lambda: setattr(server.authenticator, "passwords", ann)
        with mock.patch.object(authserver, "DRAIN_SECONDS", PATIENCE), \
                serving(server) as at, Wire(at) as jim:
            self.assertEqual(jim.ask("/").status, 200)
            self.drain(server)
            self.assertEqual(jim.ask("/").status, 401)

    def test_no_field_of_a_page_splits_its_answer(self) -> None:
        """A line feed, or another control character, in a name or a value: 500, and logged."""
        fields: List[Tuple[str, str]] = []
        server = self.ours(lambda _: authserver.Answer(200, tuple(fields), b"page"))
        with mock.patch.object(authserver.Log, "error") as said, serving(server) as at:
            for name, value, status in (
                    ("X", "a\r\nSet-Cookie: b=c", 500), ("X", "a\r\n\r\n<p>", 500),
                    ("X", "a\nb", 500), ("X", "a\rb", 500), ("X", "a\0b", 500), ("X", "\x7f", 500),
                    ("X\r\nY", "a", 500), ("X: a\nY", "b", 500), ("X", "a\tb \xe4", 200),
                    ("X", "", 200)):
                with self.subTest(name, value=value):
                    fields[:], before = [("A", "b"), (name, value)], said.call_count
                    answer = talk(at, head("/", "GET", JIM, CLOSE), True)
                    self.assertEqual((statuses(answer), b"Set-Cookie" in answer), ([status], False))
                    lines = [call[0][0] for call in said.call_args_list[before:]]
                    self.assertEqual(["GET / HTTP/1.1" in line for line in lines
                                      if line.startswith("error")], [True] * (status == 500))

    def test_an_idle_server_does_what_the_stock_one_does(self) -> None:
        """handle_request() times out, however often; service_actions() is called."""
        acted, called = threading.Event(), threading.Event()
        hooks = {"handle_timeout": lambda _: called.set(), "service_actions": lambda _: acted.set()}
        server = self.protected(kind=type("Own", (AuthServer,), hooks))
        authserver.raise_file_limit.cache_clear()
        with mock.patch.object(os, "register_at_fork", create=True) as forks:
            for server.timeout in (0.1, 0, 0):
                called.clear()
                began = time.monotonic()
                thread = threading.Thread(target=server.handle_request, daemon=True)
                thread.start()
                self.assertTrue(called.wait(SOON))
                self.assertGreaterEqual(time.monotonic() - began, server.timeout)
                thread.join()
        self.assertLessEqual(forks.call_count, 1)
        acted.clear()
        with serving(server) as at:
            self.assertTrue(acted.wait(SOON))
            self.assertEqual([request(at, "/").status for _ in range(3)], [200] * 3)

    def test_large_answers_of_handlers(self) -> None:
        """A file goes in pieces; chunks never end; who kept the connection writes no more to it."""
        file, kept = mock.Mock(wraps=io.BytesIO(b"a" * 1000000)), []

        def answer(handler: Any) -> None:
            kept.append(handler.connection)
            handler.begin(CHUNKED)
            for piece in [b"a" * 900] * 10 + [b""]:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

        def send(handler: Any) -> None:
            handler.begin("Content-Length: 1000000")
            handler.connection.sendfile(file)
        with mock.patch.object(authserver, "MAX_BODY", 5000), \
                serving(self.ours(Idiom.made(answer))) as at:
            self.assertEqual(talk(at, head() + head("/", "GET", JIM, CLOSE)).count(b"a" * 900), 20)
        with self.assertRaises(BrokenPipeError):
            kept[0].sendall(b"late")
        with serving(self.ours(Idiom.made(send))) as at:
            self.assertEqual(len(request(at).body), 1000000)
        self.assertTrue(all(0 < call[0][0] < 200000 for call in file.read.call_args_list))

    def test_nothing_is_kept_in_memory(self) -> None:
        """No Request, with its password, after its answer; nor what a stranger says at length."""
        with serving(self.ours(lambda _: authserver.Answer(200, ()))) as at, Wire(at) as wire:
            self.addCleanup(gc.enable)
            gc.collect()
            gc.disable()        # it would hide what keeps them
            for _ in range(20):
                answer = wire.ask("/", "GET", JIM, "Content-Length: 3", data=b"abc")
                self.assertEqual(answer.status, 200)
            left = [item for item in gc.get_objects() if isinstance(item, authserver.Request)]
            self.assertLess(len(left), 5)
        for trusted, count in (("192.0.2.1", 0), ("127.0.0.1", 1)):
            server = self.ours()
            server.proxies = authserver.TrustedProxies([trusted])
            find = server.proxies.find_client = mock.Mock(wraps=server.proxies.find_client)
            with serving(server) as at:
                request(at, "/", "GET", JIM, "X-Forwarded-For: %s, 192.0.2.7" % ("x" * 9000))
            said = [call[0][1] for call in find.call_args_list if len(call[0]) > 1]
            self.assertEqual([len(text) < 2000 for text in said], [True] * count)

    def test_who_is_held_accepts_nobody_until_released(self) -> None:
        """After hold() a client waits in the queue of the kernel, and is served after release()."""
        server = self.protected()
        server.hold()
        with serving(server) as at, Wire(at) as wire:
            wire.sendall(head("/x"))
            self.assertEqual(select.select([wire], [], [], 0.1)[0], [])
            server.release()
            self.assertEqual(wire.exchange(b"").status, 200)

    @contextlib.contextmanager
    def hashing(self, **pool: Any) -> Iterator[Any]:
        """Serve who has a slow hash; the body gets server, address, begun, go: that ends hashes."""
        path = self.write("jim:%s\n" % crypted("secret", "$6$rounds=1000$saltsalt$"))
        asks = Authenticator(Passwords.read(path, "files"), schemes=["basic"])
        function, begun, go = authserver.load_crypt()[0], threading.Event(), threading.Event()

        def slow(phrase: bytes, setting: bytes) -> Any:
            begun.set()
            go.wait(PATIENCE)
            return function(phrase, setting)
        pool["load_crypt"] = lambda: (slow, threading.Semaphore(2))
        with mock.patch.multiple(authserver, **pool):
            server = self.ours(authenticator=asks)
            with serving(server) as at:
                yield server, at, begun, go

    @needs_crypt
    def test_slow_hashes_are_bounded_and_keep_nobody_waiting(self) -> None:
        """Two are made at a time, two more wait, the next is told 503 at once."""
        with self.hashing(SLOW_QUEUE=2) as (server, at, _, go), contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(at)) for _ in range(6)]
            for number, wire in enumerate(wires):
                wire.sendall(head("/x", "GET", basic("jim", "w%d" % number)))
            until(lambda: len(select.select(wires, [], [], 0)[0]) > 1, "two refusals")
            busy = select.select(wires, [], [], 0)[0]
            self.assertEqual([wire.exchange(b"").status for wire in busy], [503, 503])
            self.assertEqual(request(at, "/x", "GET", basic("ann", "wrong")).status, 503)
            self.assertEqual(server.status()["busy"], 3)
            go.set()
            others = [wire for wire in wires if wire not in busy]
            self.assertEqual({wire.exchange(b"").status for wire in others}, {401})

    @needs_crypt
    def test_a_deleted_user_is_out_whatever_is_under_way(self) -> None:
        """New passwords while a slow hash of the old ones is computed: no later request gets in."""
        with self.hashing() as (server, at, begun, go), Wire(at) as wire:
            wire.sendall(head("/x"))
            begun.wait(PATIENCE)
            server.authenticator.passwords = Passwords({"ann": "other"}, realm="files")
            go.set()
            wire.exchange(b"")
            self.assertEqual([request(at, "/x").status for _ in range(4)], [401] * 4)


def make_certificate(box: Box, name: str = "cert.pem") -> str:
    """Return the path of a file with a new key and a certificate for localhost."""
    path = box.path(name)
    run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", path, "-out", path + ".crt", "-days", "2", "-subj", "/CN=localhost"], 0)
    return box.write(name, read(path) + read(path + ".crt"), 0o600)


def trusting() -> ssl.SSLContext:
    """Return a client's TLS settings that ask for no name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)   # whom the default one trusts takes 20 ms to read
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def offered(answer: Answer) -> List[str]:
    """Return the schemes that an answer offers."""
    return [value.split()[0] for name, value in answer.fields if name == "www-authenticate"]


# -- 2.2 protect() and protect_wsgi() under other people's servers --------------


class Echo(Idiom):
    """Answers who asked, and how much was sent"""

    def do_GET(self) -> None:
        length = len(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        self.answer(("%s %s %d" % (getattr(self, "remote_user", ""), getattr(self, "auth_type", ""), length)).encode())

    do_POST = do_GET


Old: Any = type("Old", (Echo,), {"protocol_version": "HTTP/1.0"})      # as http.server's default is


def echo(environ: Dict[str, Any], start: Any) -> List[bytes]:
    """Do as Echo does, as a WSGI application."""
    length = len(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
    start("200 OK", [("Content-Type", "text/plain")])
    return [("%s %s %d" % (environ["REMOTE_USER"], environ["AUTH_TYPE"], length)).encode()]


class GuardTest(AuthTestCase):
    """What the subjects below share."""

    def setUp(self) -> None:
        """Keep the logs out of the way."""
        self.said: List[str] = []
        self.errors: List[str] = []
        self.stack = contextlib.ExitStack()
        self.addCleanup(self.stack.close)
        for name, patch in (("logging.Logger.warning", lambda log, form, *words: self.said.append(form % words)),
                            ("http.server.BaseHTTPRequestHandler.log_message", lambda *_: None)):
            self.stack.enter_context(mock.patch(name, patch))

    def serve(self, handler: Any, host: str = "127.0.0.1", kind: Any = StockServer) -> str:
        """Run a handler, or a WSGI application, in a thread; return its address."""
        is_handler = isinstance(handler, (type, functools.partial))
        server: Any = kind((host, 0), handler) if is_handler else wsgiref.simple_server.make_server(host, 0, handler)
        server.handle_error = lambda *_: self.errors.append("%s" % sys.exc_info()[1])
        return self.stack.enter_context(serving(server))

    def hosts(self, **offer: Any) -> Dict[str, str]:
        """Return names and addresses of the three kinds of hosts."""
        return {name: self.serve(handler) for name, handler in (
            ("stock 1.1", protect(Echo, users(), **offer)), ("stock 1.0", protect(Old, users(), **offer)),
            ("wsgiref", protect_wsgi(echo, users(), **offer)))}

    def continues(self, wire: Wire, auth: str, *fields: str) -> None:
        """Send the head of a client that waits for 100 Continue, which comes; then its body."""
        wire.sendall(head("/", "POST", auth, "Content-Length: 1", "Expect: 100-continue", *fields))
        self.assertEqual(wire.recv(4096), b"HTTP/1.1 100 Continue\r\n\r\n")
        wire.sendall(b"x")


class Bodies(GuardTest):
    """A refused body is neither lost on the client nor the next request"""

    INNER = head("/inner", "GET", JIM, EMPTY)
    UNCLEAR = ("Content-Length: \xb2", "Content-Length: +5", "Content-Length: 5 5", "Content-Length: 5,5",
        "Content-Length: 5|Content-Length: 5", "Content-Length: 0x5", "Content-Length: 1_0", "Content-Length: -1",
        "Content-Length: ", "Content-Length: 5|Transfer-Encoding: chunked", "no colon|Content-Length: 5",
        "Transfer-Encoding: chunked, identity", "Content-Length:\t5\x0b", "A: b\rContent-Length: 5")

    def test_passwords_are_asked_for_everywhere(self) -> None:
        """Also on AuthServer, and where one thread serves all, as in http.server's examples."""
        hosts = dict(self.hosts(), ours=self.serve(protect(Echo, users()), kind=AuthServer),
                     alone=self.serve(protect(Old, users()), kind=http.server.HTTPServer))
        for name, at in hosts.items():
            with self.subTest(name):
                for auth, status, body in (("", 401, b""), (WRONG, 401, b""), (JIM, 200, b"jim Basic 0"),
                                           (digest(at, "/"), 200, b"jim Digest 0")):
                    answer = request(at, "/", "GET", auth, CLOSE)
                    self.assertEqual((answer.status, offered(answer)),
                                     (status, ["Digest", "Basic"] if status == 401 else []))
                    self.assertIn(body, answer.body)

    def test_a_length_is_read_strictly(self) -> None:
        """What could be read in two ways is 400, once, without a traceback; so are lost fields."""
        rows = [(name, fields, auth, 400) for name in ("stock 1.1", "stock 1.0") for fields in self.UNCLEAR
                for auth in (JIM, "")]
        rows += [("wsgiref", "Content-Length: " + length, "", 401) for length in ("\xb2", "+5", "5")]  # told as it came
        hosts = self.hosts()
        for name, fields, auth, status in rows:
            with self.subTest(name, fields=fields, auth=auth):
                said = talk(hosts[name], head("/", "POST", auth, *fields.split("|")) + self.INNER, True)
                self.assertEqual(statuses(said), [status])
        self.assertEqual(self.errors, [])

    def test_no_byte_of_it_is_the_next_request(self) -> None:
        hosts = self.hosts()
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.INNER), self.INNER)
        for field, body in (("Content-Length: %d" % len(self.INNER), self.INNER), (CHUNKED, chunk)):
            for name, method in [(name, method) for name in hosts for method in ("POST", "PUT", "HEAD", "GET")]:
                with self.subTest(name, method=method, field=field):
                    said = talk(hosts[name], head("/", method, "", field) + body, True)
                    self.assertEqual(statuses(said), [401])
                    self.assertEqual(name != "wsgiref", b"\r\nConnection: close\r\n" in said)
                    self.assertEqual(method == "HEAD", said.endswith(b"\r\n\r\n"))
        auths = ("", JIM, "", JIM, digest(hosts["stock 1.1"], "/"), "")
        with Wire(hosts["stock 1.1"]) as wire:      # without a body the connection stays
            answers = [wire.ask("/", "GET", auth) for auth in auths]
            self.assertEqual([answer.status for answer in answers], [401, 200, 401, 200, 200, 401])
            # The proof of who came before is in no other answer; that to a HEAD has no body.
            self.assertEqual([bool(answer.field("Authentication-Info")) for answer in answers], [False] * 4 + [True, False])
            wire.sendall(head("/", "HEAD", "") + head("/", "GET", JIM, CLOSE))
            said = wire.hear()
        self.assertEqual((statuses(said), said.partition(b"HTTP/1.1 200")[0][-4:]), ([401, 200], b"\r\n\r\n"))

    def test_fifty_megabytes_read_their_401(self) -> None:
        """http.client sends all of it before it reads."""
        body = b"0" * 50000000
        for name, at in self.hosts().items():
            with contextlib.closing(http.client.HTTPConnection(at, timeout=30)) as client:
                client.request("POST", "/", body)
                self.assertEqual(client.getresponse().status, 401, name)

    def test_a_small_body_that_comes_late(self) -> None:
        """Who is refused and said close, or is in HTTP/1.0, reads its 401 while it still sends."""
        with serving(AuthServer(("127.0.0.1", 0), protect(Echo, users()))) as at:
            for version, fields in ((b"1.1", [CLOSE]), (b"1.0", [])):
                asked = head("/", "POST", "", "Content-Length: 30000", *fields)
                for _ in range(5):
                    with self.subTest(version), Wire(at) as wire:
                        wire.sendall(asked.replace(b"1.1", version, 1))
                        wire.sendall(b"x" * 10000)
                        first = wire.recv(9)        # the answer has begun
                        for _ in range(2):
                            wire.sendall(b"x" * 10000)
                        self.assertEqual(statuses(first + wire.hear()), [401])

    def test_a_child_writes_all_that_it_has(self) -> None:
        """It is given the descriptor of one who reads slowly: the child waits for it."""
        def answer(handler: Any) -> None:
            handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
            subprocess.call(["head", "-c", "6000000", "/dev/zero"], stdout=handler.wfile)
        kind = type("Child", (http.server.BaseHTTPRequestHandler,), {"do_GET": answer})
        with serving(AuthServer(("127.0.0.1", 0), protect(kind, users()))) as at, Wire(at) as wire:
            wire.sendall(head("/", "GET", JIM, CLOSE))
            wire.recv(1)
            select.select([], [], [], 0.3)      # all buffers are full by now
            self.assertGreater(len(wire.hear()), 6000000)

    def test_who_never_stops_is_left(self) -> None:
        with mock.patch.object(authserver, "LINGER_SECONDS", 0.2):
            for name, at in self.hosts().items():
                with self.subTest(name), Wire(at) as wire, self.assertRaises(ConnectionError):
                    wire.sendall(head("/", "POST", "", "Content-Length: 900000000"))
                    end = time.monotonic() + SOON
                    while time.monotonic() < end:
                        wire.sendall(b"x" * 65536)

    def test_a_body_is_asked_for_after_the_password(self) -> None:
        """100 Continue comes after 401 would have, once, and for that request alone."""
        at = self.hosts(qop=["auth", "auth-int"])["stock 1.1"]
        fields = ["Content-Length: 5", "Expect: 100-continue"]
        began = time.monotonic()        # the end of the answer is seen before the end of patience
        self.assertEqual(statuses(talk(at, head("/", "POST", "", *fields))), [401])
        self.assertLess(time.monotonic() - began, SOON)
        with Wire(at) as wire:
            self.continues(wire, JIM)
            wire.sendall(head("/", "POST", JIM, "Content-Length: 5") + b"12345" + head("/", "GET", JIM, CLOSE))
            said = wire.hear()
        self.assertEqual((statuses(said), re.findall(b"jim Basic .", said)),
                         ([200] * 3, [b"jim Basic 1", b"jim Basic 5", b"jim Basic 0"]))
        with Wire(at) as wire:
            self.continues(wire, digest(at, "/", "POST", body=b"x"), CLOSE)
            self.assertEqual(statuses(wire.hear()), [200])

    def test_auth_int_signs_it_whole_or_says_413(self) -> None:
        """Up to 64 KiB the body is signed; what would be cut, or comes in chunks, is no wrong password."""
        hosts = self.hosts(qop=["auth", "auth-int"])
        for name, at in hosts.items():
            for size, status in ((0, 200), (5, 200), (65536, 200), (65537, 413), (200000, 413)):
                for signed, want in ((b"x" * size, status), (b"x" * size + b"y", 401 if status == 200 else status)):
                    with self.subTest(name, size=size, want=want):
                        auth = digest(at, "/", "POST", body=signed)
                        answer = request(at, "/", "POST", auth, "Content-Length: %d" % size, CLOSE, data=b"x" * size)
                        self.assertEqual(answer.status, want)
                        self.assertEqual(answer.body == b"jim Digest %d" % size, want == 200)
        at = hosts["stock 1.1"]
        answer = request(at, "/", "GET", digest(at, "/", body=b""))
        self.assertEqual((answer.status, (answer.field("Authentication-Info") or "")[:9]), (200, 'rspauth="'))
        auth = digest(at, "/", "POST", body=b"x")
        self.assertEqual(request(at, "/", "POST", auth, CHUNKED, data=b"1\r\nx\r\n0\r\n\r\n").status, 411)

    def test_a_bad_head_has_one_answer_and_no_challenge(self) -> None:
        """An endless one is not waited for; what http.server refuses, it refuses as it does without us."""
        hosts = self.hosts()
        for name in ("stock 1.1", "stock 1.0"):
            for octets, status in ((G + b"X: y\r\n" * 6000, 431), (G + b"X: y\r\n" * 150 + b"\r\n", 431),
                                   (b"GET / HTTP/9.9\r\n\r\n", 505)):
                with self.subTest(name, size=len(octets)), Wire(hosts[name]) as wire:
                    wire.sendall(octets)
                    said = wire.hear()      # HTTP/9.9 is answered as 0.9 is, without a status line
                    self.assertEqual((statuses(said), b"WWW-Authenticate" in said), ([status] * (status == 431), False))
                    self.assertIn(b"%d" % status, said)


def called_page(application: Any, field: Optional[str] = None, **environ: str) -> Tuple[int, List[str]]:
    """Call a WSGI application; return the status and the schemes that it offers."""
    said: List[Any] = []
    given = {"REQUEST_METHOD": "GET", "PATH_INFO": "/x", "wsgi.url_scheme": "http", "REMOTE_ADDR": "192.0.2.1"}
    given.update({name.replace("_url", ".url"): value for name, value in environ.items()})
    given.update({} if field is None else {"HTTP_AUTHORIZATION": field})
    application(dict(given, **{"wsgi.input": io.BytesIO()}), lambda *words: said.extend(words))
    return int(said[0][:3]), [value.partition(" ")[0] for name, value in said[1] if name == "WWW-Authenticate"]


class Callers(GuardTest):
    """Whom the library locks out, and what it offers where"""

    def test_nobody_locks_out_everybody(self) -> None:
        """Ten guesses of a stranger: who else is refused, by peer, its X-Forwarded-For, and whom we trust."""
        spared = ["172.18.0.2", "10.1.2.3", "fd00::2", "fe80::2%eth0", "127.0.0.1", "", "100.64.0.9"]
        for peer, his, mine, trusted, status in [(peer, "", "", None, 200) for peer in spared] + [
                ("172.18.0.2", "203.0.113.9", "203.0.113.5", None, 200), ("203.0.113.9", "", "", None, 429),
                ("203.0.113.9", "10.0.0.1", "10.0.0.2", None, 429), ("2001:db8::1", "", "", None, 429),
                ("10.1.2.3", "", "", [], 429), ("127.0.0.1", "", "", [], 200),
                ("172.18.0.2", "203.0.113.9", "203.0.113.5", ["172.16.0.0/12"], 200),
                ("172.18.0.2", "203.0.113.9", "203.0.113.9", ["172.16.0.0/12"], 429),
                ("172.18.0.2", "203.0.113.5, 203.0.113.9", "203.0.113.5", ["172.16.0.0/12"], 200),
                ("", "203.0.113.9", "203.0.113.9", ["unix:"], 429)]:
            with self.subTest(peer, his=his, mine=mine, trusted=trusted):
                passwords = users(ann="%s%s%s%s" % (peer, his, mine, trusted))      # a table of its own
                application = protect_wsgi(echo, passwords, trusted, schemes=["basic"])
                for _ in range(10):
                    called_page(application, WRONG, REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=his)
                found = called_page(application, JIM, REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=mine)[0]
                self.assertEqual(found, status)

    def test_a_lock_out_works_on_a_stock_server(self) -> None:
        far = {"get_request": lambda server: (server.socket.accept()[0], ("192.0.2.1", 1))}
        at = self.serve(protect(Echo, users()), kind=type("Far", (StockServer,), far))
        self.assertEqual([request(at, "/", "GET", auth, CLOSE).status for auth in [WRONG] * 10 + [JIM]], [401] * 10 + [429])

    def test_a_stranger_fills_no_memory(self) -> None:
        """Of X-Forwarded-For no more than its end is looked at, or remembered, on each host."""
        seen: List[int] = []

        def find(proxies: Any, peer: str, forwarded: str = "") -> Tuple[str, None]:
            seen.append(len(forwarded))
            return peer, None
        with mock.patch.object(authserver.TrustedProxies, "_find_client", find):
            for at in self.hosts().values():
                request(at, "/", "GET", JIM, "X-Forwarded-For: %s, 192.0.2.7" % ("x" * 9000), EMPTY)
        self.assertEqual([0 < size < 2000 for size in seen], [True] * 3)

    def test_basic_is_not_offered_to_a_network(self) -> None:
        """Digest alone, unless TLS or a loopback lies between, or schemes says so; Basic is not accepted either."""
        application = protect_wsgi(echo, users(), max_failures=(0, 1.0))
        chosen = protect_wsgi(echo, users(), schemes=["basic", "digest"], max_failures=(0, 1.0))
        for environ, schemes in (({}, ["Digest"]), ({"REMOTE_ADDR": "10.0.0.1"}, ["Digest"]),
                                 ({"REMOTE_ADDR": "::ffff:127.0.0.1"}, ["Digest", "Basic"]),
                                 ({"REMOTE_ADDR": ""}, ["Digest", "Basic"]), ({"REMOTE_ADDR": "?"}, ["Digest"]),
                                 ({"wsgi_url_scheme": "https"}, ["Digest", "Basic"])):
            self.assertEqual(called_page(application, **environ), (401, schemes), environ)
            self.assertEqual(called_page(application, JIM, **environ)[0], 200 if "Basic" in schemes else 401)
            self.assertEqual(called_page(chosen, **environ), (401, ["Basic", "Digest"]))
        for host, offer, schemes in (("0.0.0.0", {}, ["Digest"]), ("127.0.0.1", {}, ["Digest", "Basic"]),
                                     ("0.0.0.0", {"schemes": ["basic"]}, ["Basic"])):
            at = self.serve(protect(Echo, users(), **offer), host)
            self.assertEqual(offered(request(at, "/", "GET", "", EMPTY)), schemes)
            self.assertEqual(request(at, "/", "GET", JIM, EMPTY).status, 200 if "Basic" in schemes else 401)

    @needs("openssl")
    def test_basic_is_offered_under_tls(self) -> None:
        box = Box()
        self.addCleanup(box.close)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(make_certificate(box))

        def activate(server: Any) -> None:
            StockServer.server_activate(server)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        at = self.serve(protect(Echo, users()), "0.0.0.0", type("Secure", (StockServer,), {"server_activate": activate}))
        for auth, size, status in ((JIM, 5, 200), ("", 5, 401), ("", 5000000, 401)):
            with contextlib.closing(http.client.HTTPSConnection(at, context=trusting(), timeout=20)) as client:
                client.request("POST", "/", b"x" * size, {"Authorization": auth} if auth else {})
                self.assertEqual(client.getresponse().status, status)

    def test_the_log_has_refusals_and_nothing_else(self) -> None:
        table = authserver.SharedTable()    # that a program brings: it is the one that counts
        application = protect_wsgi(echo, users(log="x"), table=table, schemes=["basic"], max_failures=(2, 60.0))
        for field, line in ((None, ""), (JIM, ""), (WRONG, "192.0.2.1: refused jim: bad password"),
                            (basic("a b\u2028", "x"), r"192.0.2.1: refused a%20b\S+: unknown user"),
                            (JIM, "192.0.2.1: refused -: locked out")):
            self.said.clear()
            called_page(application, field)
            self.assertRegex("\n".join(self.said), "^%s$" % line)
        self.assertEqual(table.statistics()["failures"], 2)
        self.said.clear()
        request(self.serve(protect(Echo, users())), "/", "GET", basic("bob", "x"), EMPTY)
        self.assertEqual(self.said, ["127.0.0.1: refused bob: unknown user"])

    def test_a_clock_that_was_set_is_followed(self) -> None:
        """With a secret that machines share, under WSGI, too: what one whose clock is right has signed is good."""
        real, secret = time.time, {"nonce_secret": b"s" * 32}   # type: Any, Any
        application = protect_wsgi(echo, users(), table=authserver.SharedTable(), **secret)
        with mock.patch("time.time", lambda: real() + 3600):
            called_page(application)
            other = Authenticator(users(), **secret)
            field = Client(other, now=other.clock() + 1).field()
            self.assertEqual(called_page(application, field)[0], 200)


class Spellings(GuardTest):
    """A Digest proof opens the resource that it names, however that is spelt, and no other"""

    SAME = ("/x", "/x?", "/a%2Cb", "/a%40b", "/a%3Ab", "/caf%c3%a9", "/caf%C3%A9", "/a%2Fb", "/%7Ejim/", "/~jim/",
            "/a[1]", "/a|b", "//x", "/x?a=%2C&b", "/x%20y?", "/%", "/a%zz", "/a+b?c+d", "/x;p=1,2", "/a%00b", "/?q?r")
    OTHER = (("/x", "/y"), ("/x", "/x/"), ("/x", "/X"), ("/x", "/x?a"), ("/x?a", "/x"), ("/x?a", "/x?b"),
             ("/x?a=%2C", "/x?a=,"), ("/a%20b", "/a+b"), ("/a%2520b", "/a%20b"), ("/a/../b", "/b"), ("/x%3Fa", "/x?a"),
             ("x", "/x"), ("//x//y", "/x/y"), ("/caf%e9", "/caf%c3%a9"), ("http://h/x", "/y"))

    def test_on_every_host(self) -> None:
        """By the target where the server tells it, decoded where it does not (wsgiref)."""
        for name, at in self.hosts(max_failures=(0, 1.0)).items():
            for uri, target in [(target, target) for target in self.SAME] + list(self.OTHER):
                with self.subTest(name, uri=uri, target=target):
                    said = request(at, target, "GET", digest(at, target, uri=uri), EMPTY, CLOSE)
                    self.assertEqual(said.status, 200 if uri == target else 400)

    def test_two_fields_are_none(self) -> None:
        for name, at in self.hosts().items():
            one, two = digest(at, "/"), digest(at, "/")
            for first, second in ((JIM, JIM), (one, two), (JIM, one), (one, JIM), (JIM, WRONG)):
                said = talk(at, head("/", "GET", first, "Authorization: " + second, CLOSE))
                self.assertEqual(statuses(said), [400], (name, first, second))
            for glue in (",", ", ", ";", " "):
                self.assertIn(request(at, "/", "GET", one + glue + JIM, CLOSE).status, (400, 401), (name, glue))


class Construction(GuardTest):
    """What cannot be protected says so by name, and at once"""

    def test_mistakes(self) -> None:
        def deaf(self: Any) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        Deaf, Blind = (type("Deaf", (Echo,), {name: deaf}) for name in ("handle", "handle_one_request"))
        hashes = Passwords.read(self.write("ann:%s\n" % SHA), "files")      # which cannot serve Digest
        not_protected = [("no handler", object, "object"), ("nothing", None, "None"), ("a method", Echo.do_GET, "do_GET"),
            ("a partial of no handler", functools.partial(int, base=2), "int"), ("a name", "Echo", "Echo"),
            ("a loop that never asks", Deaf, r"Deaf: its handle\(\)"),
            ("another", Blind, r"Deaf: its handle_one_request\(\)"),
            ("protected twice", protect(Echo, users()), "Echo.*not protected yet"), ("a partial of what is protected",
            functools.partial(protect(functools.partial(Simple, ""), users()).func), "not protected yet")]
        rows: List[Any] = [(what, "unable to protect .*" + said, protect, (thing, users()), {}) for what, thing, said in not_protected]
        rows += [("no passwords", "as passwords", guard, (thing, passwords), {})
                 for guard, thing in ((protect, Echo), (protect_wsgi, echo)) for passwords in ({"jim": "x"}, None, "users")]
        rows += [("no application", "unable to protect 'app'", protect_wsgi, ("app", users()), {}),
            ("a misspelt argument", "tables", protect, (Echo, users()), {"tables": 1}),
            ("two authenticators", "two authenticators", AuthServer, (("127.0.0.1", 0), protect(Echo, users())),
             {"authenticator": Authenticator(users())}),
            ("a proxy without an address", "unable to trust proxy", protect, (Echo, users(), ["proxy.example"]), {}),
            ("hashes for Digest", "--schemes basic", protect, (Echo, hashes), {})]
        for what, said, function, arguments, keys in rows:
            with self.subTest(what), self.assertRaisesRegex(
                    Refusal if what in ("a proxy without an address", "hashes for Digest") else TypeError, said):
                function(*arguments, **keys)

    def test_a_partial_of_a_handler_is_one_that_is_protected(self) -> None:
        """As http.server tells a handler its folder: the argument arrives."""
        handler = protect(functools.partial(Simple, "folder"), users())
        self.assertEqual((handler.args, issubclass(handler.func, http.server.SimpleHTTPRequestHandler)), (("folder",), True))

    def test_loops_of_ones_own_that_ask(self) -> None:
        """A handle() that calls the next one, a copy of handle_one_request, a parse_request: asked, and served."""
        class Polite(Echo):
            """Catches what the client does, reads less than http.server, closes after each request"""

            def handle(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle()

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    self.do_GET()

            def parse_request(self) -> bool:
                found = super().parse_request()
                self.close_connection = True
                return found
        at = self.serve(protect(Polite, users()))
        self.assertEqual([statuses(talk(at, head("/", "GET", auth, EMPTY))) for auth in (JIM, "")], [[200], [401]])

    def test_an_unprotected_handler_is_served_to_everybody(self) -> None:
        server = AuthServer(("127.0.0.1", 0), Idiom)
        with serving(server) as at:
            self.assertEqual(request(at, "/", "GET", "").body, b"ok")
            self.assertIn("addresses", server.status())


class Processes(GuardTest):
    """Processes that know nothing of one another share nonces, counts and failures"""

    CODE = r'''
import io, sys
sys.path.insert(0, sys.argv[1])
import authserver
def hello(environ, start):
    start("200 OK", [])
    return []
passwords = authserver.Passwords({"jim": sys.argv[2]}, realm=sys.argv[3])
application = authserver.protect_wsgi(hello, passwords)
for line in sys.stdin:
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/x", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO()}
    if line.strip():
        environ["HTTP_AUTHORIZATION"] = line.strip()
    application(environ, lambda status, fields: print(status[:3], fields, flush=True))
'''

    def start(self, password: str = "processes", realm: str = "files") -> Callable[[str], str]:
        child: Any = subprocess.Popen([PYTHON, "-c", self.CODE, HERE, password, realm], env=ENVIRONMENT,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.stack.enter_context(child)
        self.stack.callback(child.kill)
        self.last = child

        def ask(line: str) -> str:
            child.stdin.write((line + "\n").encode())
            child.stdin.flush()
            return str(child.stdout.readline().decode())
        return ask

    def test_a_nonce_is_good_in_all_and_a_proof_once(self) -> None:
        """A third process, another realm and another password have to do with it what they should."""
        one = self.start()
        client = Digest(one(""), "jim", "processes")
        two, realm, other = self.start(), self.start(realm="b"), self.start("another")
        third = None
        for ask in (two, one, two):
            field = client.field()
            self.assertEqual(ask(field)[:3], "200")
            third = third or self.start()       # who comes later knows it, too
            for again in (one, two, third):
                self.assertIn("stale=true", again(field))
        self.assertEqual((realm(client.field())[:3], other(client.field())[:3]), ("401", "401"))
        stranger = Digest(one(""), "jim", "another")
        self.assertIn("stale=true", other(stranger.field()))    # right there, but no nonce of theirs

    @unittest.skipUnless(os.access("/dev/shm", os.W_OK), "needs /dev/shm")
    def test_where_they_meet_is_theirs_alone(self) -> None:
        # Found by its name: others, of other runs of these tests, may lie there.
        folder, secret = "/dev/shm/authserver-%d" % os.geteuid(), "one of " + self.folder()
        name = authserver.LAYOUT + Passwords({"jim": secret}, realm="files").fingerprint()
        path = os.path.join(folder, name.hex())
        self.assertFalse(os.path.exists(path))
        self.start(secret)("")
        first = self.last
        self.assertEqual([stat.S_IMODE(os.stat(one).st_mode) for one in (folder, path)], [0o700, 0o600])
        self.start("unique two")("")
        self.assertTrue(os.path.exists(path))
        first.kill()
        first.wait()
        self.start("unique three")("")
        self.assertFalse(os.path.exists(path))

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[str]:
        """Let processes meet in a place of the test's own; give the body the name of their folder."""
        base = self.folder()
        with mock.patch("os.access", return_value=False), mock.patch("tempfile.gettempdir", lambda: base):
            yield os.path.join(base, "authserver-%d" % os.geteuid())

    def test_a_trap_is_not_stepped_into(self) -> None:
        """Nothing is shared then, the log says so, and nothing is made in there; it is served all the same."""
        own = self.folder()
        passwords = users(trap=own)
        name = (authserver.LAYOUT + passwords.fingerprint()).hex()

        def make(path: str, mode: int = 0o700, owner: int = -1, link: str = "") -> None:
            os.mkdir(path)
            os.chmod(path, mode)
            os.chown(path, owner, owner)
            if link:
                os.symlink(link, os.path.join(path, name))
        traps: List[Tuple[str, Callable[[str], None]]] = [
            ("a link", lambda path: os.symlink("/", path)),
            ("a link to a folder of ours", lambda path: os.symlink(own, path)),
            ("a folder that others may enter", lambda path: make(path, 0o755)),
            ("a link as the file", lambda path: make(path, link=own + "/x")),
            ("somebody else's folder", lambda path: make(path, owner=NOBODY))]
        for trap, lay in traps[:4 + ROOT]:
            with self.subTest(trap), self.elsewhere() as path:
                lay(path)
                self.said.clear()
                application = protect_wsgi(echo, passwords)
                self.assertRegex(self.said[0], "unable to share nonces with other processes: ")
                self.assertEqual(called_page(application, JIM, REMOTE_ADDR="")[0], 200)
                self.assertEqual(os.listdir(own), [])

    def test_who_comes_at_the_same_time_waits(self) -> None:
        """The folder is locked while a file is made; and a disk that is full is found, not mapped."""
        with self.elsewhere() as path:
            os.mkdir(path, 0o700)
            folder = os.open(path, os.O_RDONLY)
            fcntl.flock(folder, fcntl.LOCK_EX)
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                opened = pool.submit(authserver.open_shared_file, "name", 4096)
                self.assertEqual(concurrent.futures.wait([opened], 0.2).done, set())
                os.close(folder)
            with open(opened.result(), "rb") as file:
                self.assertEqual(os.fstat(file.fileno()).st_size, 4096)
            with mock.patch("os.pwrite", return_value=5), self.assertRaises(OSError):
                authserver.open_shared_file("other", 4096)

    def test_two_dictionaries_in_one_process(self) -> None:
        """To open the second one's file gives back no lock of the first."""
        first = authserver.shared_table(users(first=TOKEN))
        row = first._own_row()
        self.assertIsNot(first, authserver.shared_table(users(second=TOKEN)))
        child = os.fork()
        if not child:
            os._exit(first._own_row() == row)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertIs(first, authserver.shared_table(users(first=TOKEN)))


# -- 2.3 At the limits ---------------------------------------------------------


class HttpHostile(HttpTest):
    """Slow, greedy and hostile clients move nobody else"""
    settings = '''
authserver.WAITS.update((name, 1) for name in authserver.WAITS if name != "thread")
authserver.PACE_SECONDS = 1
'''
    script = HANDLERS
    pages = r'''
def page(request): return authserver.Answer(200, [], b"a" * 20000000 if request.path == "/big" else b"")
server = AuthServer(("127.0.0.1", 0), page, authenticator=Authenticator(passwords))
'''
    loop: str

    @classmethod
    def set_up(cls) -> None:
        cls.loop = cls.box.launch(PYTHON, cls.box.write("pages.py", PRELUDE + cls.settings + cls.pages + LIBRARY_END))
        super().set_up()

    def test_a_head_has_one_deadline_as_a_whole(self) -> None:
        with Wire(self.at) as wire:
            wire.sendall(b"GET / HTTP/1.1\r\nX: ")
            began, octets = time.monotonic(), b""
            while not octets:
                with contextlib.suppress(OSError):
                    wire.sendall(b"a")
                if select.select([wire], [], [], 0.1)[0]:
                    octets = wire.recv(4096) or b"closed"
            self.assertEqual(statuses(octets), [408])
            self.assertLess(time.monotonic() - began, SOON)

    def test_who_says_nothing_is_closed(self) -> None:
        """Before the first request and between two without an answer; in a body: its handler's thread is free."""
        rows = ((b"", 0), (head("/"), 1), (head("/", "POST", JIM, "Content-Length: 5") + b"a", None))
        began = time.monotonic()
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(self.at)) for _ in rows]
            for wire, (data, _) in zip(wires, rows):
                wire.sendall(data)
            for wire, (data, count) in zip(wires, rows):
                with self.subTest(data):
                    self.assertIn(len(statuses(wire.hear())), (0, 1) if count is None else (count,))
        self.assertLess(time.monotonic() - began, SOON)

    @needs_linux
    def test_an_answer_that_is_not_read_is_cut_off(self) -> None:
        with contextlib.ExitStack() as stack:
            held = []
            for at, trickle in [(at, trickle) for at in (self.at, self.loop) for trickle in (0, 1)]:
                wire = stack.enter_context(Wire(at))
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                wire.sendall(head("/big"))
                held.append((wire, trickle))
            until(lambda: not [one for one in held if self.is_held(*one)], "an end of them", SOON)

    def is_held(self, wire: Wire, trickle: int) -> bool:
        """Read a little; tell whether the server has the other end (the kernel may still be sending)."""
        with contextlib.suppress(OSError):
            wire.recv(trickle)
            ports = wire.getpeername()[1], wire.getsockname()[1]
            return bool(re.search(":%04X [0-9A-F]{8}:%04X 01 " % ports, read("/proc/net/tcp")))
        return False

    @needs_linux
    def test_a_frozen_process_answers_what_has_come(self) -> None:
        pid = self.box.server.pid
        with Wire(self.at) as silent, Wire(self.at) as half, contextlib.ExitStack() as stack:
            half.sendall(head()[:20])
            self.assertEqual(request(self.at).status, 200)  # both are accepted by now
            os.kill(pid, signal.SIGSTOP)
            try:
                late = stack.enter_context(Wire(self.at))
                for wire, data in ((silent, head()), (half, head()[20:]), (late, head())):
                    wire.sendall(data)
                select.select([], [], [], 1.6)
            finally:
                os.kill(pid, signal.SIGCONT)
            self.assertEqual([wire.exchange(b"").status for wire in (silent, half, late)], [200] * 3)


class HttpStreams(HttpTest):
    """Handlers that wait are bounded, and keep no page waiting"""
    settings = r'''
real, refusals = threading.Thread.start, []
def start(self):
    if refusals: refusals.pop(); raise RuntimeError("can't start new thread")
    real(self)
threading.Thread.start = start
'''
    script = HANDLERS.replace("gate.wait(10)", "gate.wait(3)").replace("def get_shut", r'''def get_full(self): refusals.extend(range(50)); self.answer(b"")
    def get_calm(self): refusals.clear(); self.answer(b"")
    def get_search(self):
        gc.collect()  # of what has failed, tracebacks may be left
        secret, found, todo = self.path.partition("?")[2][::-1], 0, gc.get_objects()
        for depth in range(3):
            todo = [part for one in todo for part in gc.get_referents(one) if depth == 0 or type(one) in (tuple, dict)]
            found += sum(secret in part for part in todo if isinstance(part, str) and part is not secret)
            found += sum(secret.encode() in part for part in todo if isinstance(part, (bytes, bytearray)))
        self.answer(b"%d" % found)
    def get_shut''').replace('"auth-int"]))', '"auth-int"]), stream_threads=20)')

    @needs_linux
    def test_beyond_the_bound_is_503(self) -> None:
        request(self.at, "/shut")
        with contextlib.ExitStack() as stack:
            for _ in range(19):
                stack.enter_context(Wire(self.at)).sendall(head("/slow"))
            self.assertEqual(request(self.at, "/x").status, 200)
            stack.enter_context(Wire(self.at)).sendall(head("/slow"))
            busy = until(lambda: [answer for answer in [request(self.at, "/x")] if answer.status == 503], "a 503", SOON)
            self.assertEqual(busy[0].field("Retry-After"), "1")
        until(lambda: request(self.at, "/open").status == 200, "room")

    def test_a_full_process_table_is_survived(self) -> None:
        request(self.at, "/full")
        for _ in range(60):
            with contextlib.suppress(OSError, IndexError, ValueError):
                request(self.at, "/x")
        threads(20, lambda _: until(lambda: request(self.at, "/x").status == 200, "an answer", SOON))
        self.assertEqual(request(self.at, "/calm").status, 200)

    @needs_linux
    def test_no_password_stays_in_memory(self) -> None:
        secret, ann = JIM[6:][::-1], basic("ann", "other")  # reversed: the question has not what it looks for
        with Wire(self.at) as wire:
            self.assertEqual({wire.ask("/x").status for _ in range(4)}, {200})
        self.assertEqual(request(self.at, "/x", "GET", ann).status, 200)
        until(lambda: request(self.at, "/search?" + secret, "GET", ann).body == b"0",
              "the end of jim's connection, and of his password", SOON)


# -- 2.4 HTTPS -----------------------------------------------------------------


def secure(address: str, context: Optional[ssl.SSLContext] = None, **settings: Any) -> Any:
    """Return a connection over TLS; it raises when it is cut off instead of closed."""
    context = context or trusting()
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)     # which Python sets since 3.10
    return context.wrap_socket(Wire(address), suppress_ragged_eofs=False, **settings)


def https(address: str, *words: str) -> Answer:
    """Send one request over TLS, and read the answer."""
    with secure(address) as wire:
        return Wire.exchange(wire, head(*words))


def client_hello(version: int) -> bytes:
    """Return the first message of a client that speaks TLS 1.`version` at most."""
    hello = b"\x03%c" % (version + 1) + bytes(32) + b"\0\0\x04\xc0\x14\x00\x35\x01\0"
    return b"\x16\x03\x01\0%c\x01\0\0%c" % (len(hello) + 4, len(hello)) + hello


class Records:
    """A client whose TLS records the test carries to the server, in pieces of its choice."""

    def __init__(self, address: str) -> None:
        self.coming, self.going, self.wire = ssl.MemoryBIO(), ssl.MemoryBIO(), Wire(address)
        self.wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.tls = trusting().wrap_bio(self.coming, self.going)

    def do(self, step: Callable[[], Any], size: int = 1 << 20) -> Any:
        """Call step until nothing is missing; what it has to say goes in pieces of `size` bytes."""
        while True:
            result, done = None, False
            with contextlib.suppress(ssl.SSLWantReadError):
                result, done = step(), True
            octets = self.going.read()
            for start in range(0, len(octets), size):
                self.wire.sendall(octets[start:start + size])
            if done:
                return result
            if not self.coming.write(self.wire.recv(65536)):
                self.coming.write_eof()


class HttpsTest(HttpTest):
    """A server with a certificate that tests of a class share."""
    settings = "authserver.WAITS.update(handshake=3)"

    @classmethod
    def set_up(cls) -> None:
        make_certificate(cls.box)
        super().set_up()

    def say(self, data: bytes) -> bytes:
        """Send bytes; return all that comes until the server closes, as TLS does."""
        with secure(self.at) as wire:
            wire.sendall(data)
            return Wire.hear(wire)


@needs("openssl")
class Https(HttpsTest):
    """HTTPS: the same HTTP, for all that comes over TLS and whatever else comes"""
    big: bytes

    @classmethod
    def set_up(cls) -> None:
        cls.options = ["--root", cls.box.make("root"), "--tls-cert", cls.box.path("cert.pem")]
        cls.big = Random(SEED).getrandbits(8 * 16000000).to_bytes(16000000, "big")
        for name in ("big", "cut"):
            with open(cls.box.path("root", name), "wb") as file:
                file.write(cls.big)
        super().set_up()

    def test_it_is_the_same_http(self) -> None:
        """Each request that is read or refused in clear is so under TLS, to the close_notify at the end."""
        self.check([row for row in SYNTAX + BODIES if b"/example/" not in row[1]])

    def test_versions(self) -> None:
        for name in ["TLSv1.2"] + ["TLSv1.3"] * ssl.HAS_TLSv1_3:
            context = trusting()
            context.options |= ssl.OP_NO_TLSv1_3 if name == "TLSv1.2" else 0
            with self.subTest(name), secure(self.at, context) as wire:
                self.assertEqual((wire.version(), wire.compression()), (name, None))
                self.assertEqual(Wire.exchange(wire, head("/")).status, 200)
        for version in (0, 1):
            with self.subTest("TLS 1.%d" % version):
                before = self.log().count("refused -: TLS: ")
                self.assertRegex(talk(self.at, client_hello(version)), rb"(?s)^\x15\x03.\0\x02\x02[\x46\x28]$")
                self.assertEqual(len(self.logged("refused -: TLS: ", before + 1)), before + 1)

    def test_noise_is_a_line_of_the_log_and_nothing_else(self) -> None:
        hello, plain = client_hello(2), "plain HTTP, where HTTPS is spoken$"
        for data, line in ((b"\x16\x03\x01", ""), (b"\0" * 500, ""), (hello[:30], ""), (hello + b"\xff" * 99, ""),
                           (hello + b"\x15\x03\x03\0\x02\x02\x30", ""), (b"\xff" * 3000, ""),
                           (b"GET / HTTP/1.1\r\n\r\n", plain), (b"PUT / HTTP/1.1\r\n\r\n" + b"a" * 500000, plain)):
            with self.subTest(data[:40]):
                before = self.log().count("\n")
                said = talk(self.at, data, True)
                self.assertEqual((statuses(said), b"https" in said), ([400] * bool(line == plain), line == plain))
                self.assertEqual(https(self.at, "/").status, 200)
                until(lambda: self.log().count("\n") >= before + 2, "both lines")
                lines = sorted(self.log().split("\n")[before:])    # which is written first is not promised
                self.assertEqual(len(lines), 3, lines)
                self.assertIn('"GET / HTTP/1.1" 200', lines[1])
                self.assertRegex(lines[2], r"127\.0\.0\.1: refused -: .*" + line)
        with self.assertRaises(ssl.SSLError):       # it does not trust our certificate
            secure(self.at, ssl.create_default_context(), server_hostname="localhost")
        self.logged("refused -: TLS: .*UNKNOWN_CA\n")
        with secure(self.at) as wire:               # noise where the handshake is over
            socket.socket.sendall(wire, b"\xff" * 100)
            with contextlib.suppress(OSError):
                self.assertEqual(wire.recv(100), b"")
        self.assertEqual(re.findall("Traceback(?:\n.*){9}", self.log()), [])

    def test_a_look_at_the_port_is_no_error(self) -> None:
        os.kill(self.box.server.pid, signal.SIGSTOP)
        try:
            for _ in range(5):
                Wire(self.at).abort()
        finally:
            os.kill(self.box.server.pid, signal.SIGCONT)
        self.assertEqual(https(self.at, "/").status, 200)
        with Wire(self.at) as wire:
            wire.sendall(head("/", "GET", JIM, "X: " + "a" * 5000))
            self.assertEqual(statuses(b"".join(iter(lambda: wire.recv(65536), b""))), [400])
        self.assertNotIn("Traceback", self.log())

    def test_records_and_requests_have_nothing_to_do_with_each_other(self) -> None:
        for sentence, size, pieces in (("one record", 1 << 20, [head("/") * 150]), ("cut in two", 33, [head("/") * 9]),
                                       ("a packet a byte", 1, [head("/") * 2]),
                                       ("a record a byte", 1 << 20, [b"%c" % octet for octet in head("/")])):
            client = Records(self.at)
            with self.subTest(sentence), client.wire:
                def begin() -> None:    # what the handshake ends with goes in the same packets
                    client.tls.do_handshake()
                    client.tls.write(pieces[0])
                client.do(begin, size)
                for piece in pieces[1:]:
                    client.do(lambda: client.tls.write(piece))
                want, said = b"".join(pieces).count(b"GET"), b""
                while len(statuses(said)) < want or not said.endswith(b"</table>\n"):
                    said += client.do(lambda: client.tls.read(65536))
                self.assertEqual(statuses(said), [200] * want)

    def test_a_handshake_that_stalls_keeps_nobody_waiting(self) -> None:
        with contextlib.ExitStack() as stack:
            stalled = [stack.enter_context(Wire(self.at)) for _ in range(20)]
            for number, wire in enumerate(stalled):
                wire.sendall(client_hello(2)[:number * 2])
            self.assertEqual([https(self.at, "/").status for _ in range(5)], [200] * 5)
            self.assertEqual([wire.recv(1) for wire in stalled], [b""] * 20)

    @needs_linux
    def test_large_files_at_the_pace_of_their_readers(self) -> None:
        """16 slow readers of 16 MB, and others: each byte arrives, nobody waits, nothing is kept; a cut file ends."""
        before = memory(self.box.server.pid)
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(secure(self.at)) for _ in range(16)]
            for wire, name in zip(slow, ["/cut"] + ["/big"] * 15):
                wire.sendall(head(name, "GET", JIM, CLOSE))
                self.assertEqual(wire.recv(12), b"HTTP/1.1 200")
            self.assertEqual([https(self.at, "/").status for _ in range(5)], [200] * 5)
            self.assertLess(memory(self.box.server.pid) - before, 16)
            self.assertEqual(https(self.at, "/big", "GET", JIM, "Range: bytes=9000000-").body, self.big[9000000:])
            self.assertTrue(Wire.hear(slow[1]).partition(b"\r\n\r\n")[2] == self.big)
            os.truncate(self.box.path("root", "cut"), 1000000)
            with contextlib.suppress(ssl.SSLError):
                self.assertLess(len(Wire.hear(slow[0])), len(self.big))
        self.assertEqual(https(self.at, "/").status, 200)


@needs("openssl")
class HttpsHandlers(HttpsTest):
    """Handlers in threads, under TLS by server.socket = context.wrap_socket(...)"""

    @classmethod
    def set_up(cls) -> None:
        cls.script = HANDLERS + '''
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(%r)
server.socket = context.wrap_socket(server.socket, server_side=True)
''' % cls.box.path("cert.pem")
        super().set_up()

    def test_they_are_run_as_in_clear(self) -> None:
        """Bodies, chunks, and answers that are too short, too long, or none; large ones both ways."""
        large = head("/", "POST", JIM, "Content-Length: 300000", CLOSE) + b"a" * 300000
        for sentence, data, want, closes in HANDLED:
            with self.subTest(sentence):
                self.assertEqual(statuses(self.say(data + head("/", "GET", JIM, CLOSE))), want + [200] * (not closes))
        for data, size in ((large, 300000), (head("/big", "GET", JIM, CLOSE), 20000000)):
            self.assertEqual(len(self.say(data).partition(b"\r\n\r\n")[2]), size)

    def test_they_stream_both_ways(self) -> None:
        with secure(self.at) as wire:
            wire.sendall(head("/", "POST", JIM, "Content-Length: 3", "Expect: 100-continue"))
            self.assertEqual(wire.recv(100), authserver.CONTINUE)
            self.assertEqual(Wire.exchange(wire, b"abc").body, b"abc")
            wire.sendall(head("/", "STREAM", JIM, CHUNKED))
            for line in (b"one\n", b"two\n", b"three\n"):
                wire.sendall(b"%x\r\n%s\r\n" % (len(line), line))
                said = b""
                while line.upper() not in said:
                    said += wire.recv(100)
            wire.sendall(b"0\r\n\r\n")
            Wire.hear(wire)

    def test_an_answer_that_our_end_cuts_off_does_not_look_whole(self) -> None:
        # Tries: once in some thirty runs on a busy machine it ended in good order, we know not why.
        for tries_left in (2, 1, 0):
            with secure(self.at) as wire:
                wire.sendall(head("/", "STREAM", JIM, CHUNKED) + b"2\r\na\n\r\n")
                said = b""
                while b"A\n" not in said:
                    said += wire.recv(100)
                self.box.server.send_signal(signal.SIGINT)
                try:
                    while wire.recv(100):
                        pass
                except OSError:             # no close_notify
                    tries_left = -1
            self.box.server.wait(PATIENCE)
            self.set_up()
            if tries_left < 0:
                return
        self.fail("it looks whole")


@needs("openssl")
class HttpsCommand(BoxTest):
    """--tls-cert and --tls-key"""
    KEY = "[A-Z ]*KEY"

    def setUp(self) -> None:
        super().setUp()
        self.pem = make_certificate(self.box)
        passwords = self.box.write("passwords", "jim:plain:secret\n", 0o600)
        self.common = ["--passwords", passwords, "--bind", "127.0.0.1:0"]

    def part(self, name: str, pattern: str = KEY, mode: int = 0o600, source: str = "") -> str:
        """Write what matches, of the certificate and its key, to a file of its own."""
        found = re.findall("(?s)-----BEGIN %s-----.*?-----END [^\n]*\n" % pattern, read(source or self.pem))
        return self.box.write(name, found[0], mode)

    def test_mistakes_at_start(self) -> None:
        """Each is a line that names the file, exit status 2; nobody is asked for a key's password."""
        cert, key, none = self.part("a.crt", "CERTIFICATE"), self.part("a.key"), self.box.path("none")
        other = self.part("b.key", source=make_certificate(self.box, "b.pem"))
        worldly, locked = self.part("w.key", mode=0o644), self.box.path("l.key")
        run(["openssl", "pkey", "-aes128", "-passout", "pass:x", "-in", key, "-out", locked], 0)
        person, terminal = pty.openpty()
        self.addCleanup(os.close, person)
        self.addCleanup(os.close, terminal)
        for files, line in (
                ([cert, other], "b.key: it is not that of .*a.crt"), ([cert], "a.crt: "), ([none, key], "none: No such file"),
                ([cert, none], "none: No such file"), ([key], "a.key: "), (["", key], "--tls-cert is missing"),
                ([os.devnull, key], os.devnull + ": "), ([self.box.folder, key], ": Is a directory"), ([cert, locked], "l.key: "),
                ([cert, worldly], r"w.key: everybody.*\ntry: chmod 600 .*w.key")):
            words = self.common + [word for pair in zip(("--tls-cert", "--tls-key"), files) for word in pair if pair[1]]
            with self.subTest(line):
                if files[1:] in ([locked], [worldly]):      # with a terminal, where one could be asked
                    code, _, said, _ = run([PYTHON, AUTHSERVER] + words, stdin=terminal, start_new_session=True,
                                           preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))
                    self.assertEqual(select.select([person], [], [], 0)[0], [])
                else:
                    code, said = told(*words)
                self.assertEqual(code, 2)
                self.assertRegex(said, "(?s)^authserver: fatal: unable to .*" + line)
                self.assertNotRegex(said, "(?i)traceback|substring|_ssl.c")
        run(["sh", "-c", re.findall("(?m)^try: (.*)$", said)[0]], 0)
        authserver.tls_context(cert, worldly)
        if ROOT:        # as containers are given their secrets: root's, 0444, which nobody can change
            with mock.patch.object(os, "geteuid", return_value=NOBODY):
                authserver.tls_context(cert, self.part("c.key", mode=0o444))

    def test_an_expired_certificate_is_a_warning(self) -> None:
        """It is served, with a warning; one that lasts for decades without."""
        der = ssl.PEM_cert_to_DER_cert(read(self.part("a.crt", "CERTIFICATE")))
        first, last = re.findall(rb"\x17\r\d{12}Z", der)
        for end, warns in ((b"200101000000Z", True), (b"491231235959Z", False)):
            changed = ssl.DER_cert_to_PEM_cert(der.replace(first + last, first + b"\x17\r" + end))
            path = self.box.write("dated.pem", read(self.part("a.key")) + changed, 0o600)
            with self.subTest(end), contextlib.redirect_stderr(io.StringIO()) as said:
                with serving(authserver.bind(contract(self.common + ["--tls-cert", path]))) as at:
                    self.assertEqual(https(at, "/").status, 200)
                self.assertEqual("dated.pem has expired\n" in said.getvalue(), warns)

    def test_a_reload_takes_a_new_certificate(self) -> None:
        """For who spoke TLS; a unix socket stays plain."""
        place = "unix:" + self.box.path("sock")
        at = self.box.address(self.box.start(*self.common, "--bind", place, "--tls-cert", self.pem))
        first = shown(at)
        make_certificate(self.box)
        self.box.command("reload")
        until(lambda: shown(at) != first, "the new one")    # an old worker may answer for a moment
        self.assertEqual(request(place, "/", "GET", "").status, 401)

    @needs_linux
    def test_a_session_goes_on_in_another_worker(self) -> None:
        """And a reload finds the certificate, though its name was relative."""
        at = self.box.address(self.box.start(
            *self.common, "--tls-cert", os.path.relpath(self.pem, self.box.folder), "--workers", "2"))
        workers = family(self.box.pid())[1:3]
        for old in (0, getattr(ssl, "OP_NO_TLSv1_3", 0)):
            context, session = trusting(), None
            context.options |= old
            for stopped in workers + workers[:1]:
                os.kill(stopped, signal.SIGSTOP)
                until(lambda: read("/proc/%d/stat" % stopped).rpartition(")")[2].split()[0] == "T", "a stop")
                with self.subTest(old, stopped=stopped), secure(at, context, session=session) as wire:
                    self.assertEqual(Wire.exchange(wire, head("/")).status, 200)
                    self.assertEqual(wire.session_reused, session is not None)
                    session = wire.session
                os.kill(stopped, signal.SIGCONT)
        self.box.command("reload")


PUBLIC = r'''
class Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_OPTIONS(self):
        self.send_response(204); self.send_header("Access-Control-Allow-Origin", "*"); self.end_headers()
os.chdir(%r)
AuthServer = functools.partial(AuthServer, public=["/open", "/healthz"])
server = AuthServer(("127.0.0.1", 0), protect(Handler, passwords))
'''
NAMES = ("open", "open", "closed", "page", "page", "..", ".", "%2e%2e", "%2E", ".%2e", "", "%2f", "..%2f", "%5c..", "..\\",
         "%00", ";", "..;", "%252e%252e", "OPEN", "open%20", "open.", "%6fpen", "%6Fpe%6e", "link", "?", "%3f..", "%23")


class Public(HttpTest):
    """--public: no password below it, and no way from it to the rest, as page and as handler"""
    pages: str

    @classmethod
    def set_up(cls) -> None:
        for name in ("", "open", "closed", "opened", "open/sub", "open ", "Open", "open\\..", "open\udce4"):
            cls.box.write(os.path.join(cls.box.make("root/" * bool(name) + (name or "root")), "page"), name or "closed")
        cls.box.write("root/healthz", "open")
        os.symlink("../open/sub", cls.box.path("root", "closed", "link"))
        cls.pages = cls.box.serve("--root", cls.box.path("root"), "--passwords", cls.box.write(
            "passwords", "jim:plain:secret\n", 0o600), "--public", "/open", "--public", "/healthz", "--public", "/openä",
            "--max-failures", "3/60", "--trusted-proxy", "127.0.0.1")
        cls.script = PUBLIC % cls.box.path("root")
        super().set_up()

    def test_its_border(self) -> None:
        for want, paths in (
                (200, ("/open/page", "/open/", "/healthz?x=/../y", "//open/page", "/%6Fpen/p%61ge", "http://x/open/page")),
                (401, ("/opened/page", "/open%20/page", "/Open/page", "/open;/page", "/open/../closed/page", "/open/%00",
                       "/open/%2e%2E/closed/page", "/open/..%2fclosed/page", "/open%2f../closed/page", "/open%5c../page",
                       "/open//../closed/page", "/open/sub/../../closed/page", "/closed/page?/open/page", "/open/.%2e/",
                       "/closed/link/page", "/", "/open/..", "http://open/closed/page", "/open%e4/page", "/open/..\\page"))):
            for path, at in [(path, at) for path in paths for at in (self.at, self.pages)]:
                with self.subTest(path, page=at == self.pages):
                    own = 404 if path[:8] == "http://x" and at == self.at else want     # http.server's own
                    self.assertEqual(request(at, path, "GET", "").status, own)

    def test_no_walk_crosses_it(self) -> None:
        """300 paths of tricks: nobody sees what is not public, and everybody all that is, where a page tells."""
        chance, wires = Random(SEED), {}  # type: Random, Dict[str, Wire]
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)

        def walk(at: str, path: str, auth: str) -> Answer:
            """Ask on a connection as long as it lasts."""
            if at not in wires:
                wires[at] = stack.enter_context(Wire(at))
            answer = wires[at].ask(path, "GET", auth)
            if answer.field("Connection") == "close":
                wires.pop(at).close()
            return answer
        for _ in range(300):
            path = "/".join([chance.choice(("", "http://open", "/"))] + chance.choices(NAMES, k=chance.randrange(1, 7)))
            for at in (self.at, self.pages):
                known, unknown = (walk(at, path, auth) for auth in (JIM, ""))
                which = (path, at == self.pages, SEED)
                self.assertIn(unknown.status, (known.status, 401), which)
                if unknown.status == 200:
                    self.assertRegex(unknown.body, b"^open(/sub)?$|<title>", which)
                    self.assertNotIn(b"healthz", unknown.body, which)
                elif at == self.pages and "link" not in path:
                    self.assertNotEqual(known.body, b"open", which)

    def test_preflights_and_health_checks(self) -> None:
        for at in (self.at, self.pages):
            for path, want in (("/open/page", [204, 200, 200]), ("/closed/page", [401] * 3)):
                said = [request(at, path, method, "", body=method == "GET") for method in ("OPTIONS", "HEAD", "GET")]
                self.assertEqual([answer.status for answer in said], want)
        kept = [request(self.pages, path).field("cache-control") for path in ("/open/page", "/closed/page")]
        self.assertEqual(kept, [None, "private"])
        client = "X-Forwarded-For: 192.0.2.9"
        said = [request(self.pages, "/open/page", "GET", WRONG, client) for _ in range(9)]
        said.append(request(self.pages, "/closed/page", "GET", JIM, client))
        self.assertEqual([answer.status for answer in said], [200] * 10)
        self.assertEqual(self.logged(r'192\.0\.2\.9 - (\S+) .*page HTTP/1.1" 200', 10), ["-"] * 9 + ["jim"])


class HttpCommand(BoxTest):
    """authserver.py on the command line"""
    log, logged = HttpTest.log, HttpTest.logged

    def serve(self, *options: str, **popen: Any) -> str:
        return self.box.serve("--passwords", self.passwords(), *options, **popen)

    def passwords(self, stored: str = "plain:secret") -> str:
        return self.box.write("passwords", "jim:%s\n" % stored, 0o600)

    def argv(self, *options: str) -> List[str]:
        return [PYTHON, AUTHSERVER, "--passwords", self.passwords(), *options]

    def test_addresses_of_every_form(self) -> None:
        """HOST:PORT, [V6]:PORT, :PORT for both families, unix:PATH, which stays plain; Basic where no network hears it."""
        place = "unix:" + self.box.path("sock")
        for encrypts in [False] + [True] * bool(shutil.which("openssl")):
            tls = ["--tls-cert", make_certificate(self.box)] if encrypts else []
            self.serve("--bind", "[::1]:0", "--bind", place, "--bind", ":0", *tls)
            found = self.logged(r"listening on (.+) \(([^)]*)\)", 4)
            self.assertEqual([schemes for _, schemes in found], ["digest, basic"] * 3 + ["digest, basic" if tls else "digest"])
            urls = [found[0][0], found[1][0], place] + [found[3][0].replace("[::]", host) for host in ("[::1]", "127.0.0.1")]
            for url, (_, schemes) in zip(urls, found + found[3:]):
                with self.subTest(url, tls=bool(tls)):
                    asking: Any = https if tls and url != place else request
                    at = url.replace("https://", "").strip("/") if tls else url
                    challenge = asking(at, "/", "GET", "")
                    self.assertEqual((challenge.status, offered(challenge)), (401, schemes.title().split(", ")))
                    self.assertEqual(asking(at, "/").status, 200 if "basic" in schemes else 401)
                    proof = Digest(challenge.field("WWW-Authenticate") or "", uri="/").field()
                    self.assertEqual(asking(at, "/", "GET", proof).status, 200)
            self.box.kill(self.box.server)

    @needs("openssl")
    def test_what_a_network_reads_is_told_once(self) -> None:
        self.serve("--bind", "0.0.0.0:0", "--bind", ":0", "--bind", "127.0.0.1:0")
        said = self.logged(r"warning: (a network reaches .+), without TLS: Basic is off there.*\ntry: (.+)   # .*(--.+)\n")
        self.assertEqual((len(said), self.log().count("try:"), said[0][0].count("http://")), (1, 1, 2))
        run(["sh", "-c", "cd %s && %s" % (shlex.quote(self.box.folder), said[0][1])], 0)
        self.box.kill(self.box.server)
        self.serve("--bind", "0.0.0.0:0", "--tls-cert", self.box.path(said[0][2].split()[1]))
        self.assertNotIn("try:", self.log())

    def test_a_unix_socket_is_replaced_when_nobody_listens(self) -> None:
        place, passwords = "unix:" + self.box.path("sock"), self.passwords()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(place[5:])
        with authserver.bind(contract(["--passwords", passwords, "--bind", place])):
            code, said = told("--passwords", passwords, "--bind", place)
            self.assertEqual((code, "unable to bind unix:" in said, reach(place)), (1, True, None))

    def test_a_probe_is_counted_as_nobody(self) -> None:
        with authserver.bind(contract(self.argv("--bind", "127.0.0.1:0")[2:])) as server:
            server.probe()
            assert server.authenticator
            self.assertFalse(any(server.authenticator.table.statistics().values()))

    def test_mistakes_are_named(self) -> None:
        """Exit 2 for a wrong option, 1 for what cannot be bound; one line that says which."""
        precious = self.box.write("precious", "precious")
        for code, line, said in (
                (2, "--bind x", "x"), (2, "--bind 127.0.0.1:99999", "99999"), (2, "--nonsense", "nonsense"),
                (2, "--schemes tea", "tea"), (2, "--schemes ''", "scheme"), (2, "--schemes digest,tea", "tea"),
                (2, "--schemes basic,basic", "basic"), (2, "--realm 'a\"b'", "realm"), (2, "--max-failures x", "max-failures"),
                (2, "--trusted-proxy x", "proxy"), (2, "--nonce-lifetime 0", "nonce-lifetime"),
                (2, "--nonce-lifetime nan", "nonce-lifetime"), (2, "--stream-threads -1", "stream-threads"),
                (2, "--stream-threads 0", "stream-threads 0: expected at least 1"),
                (2, "--forward-auth x", "answer at x"), (2, "--allow-partial", "partial"),
                (2, "--forward-auth /x --qop auth-int", "without the body"),
                (2, "--forward-auth /x --qop auth,Auth-Int", "without the body"),
                (2, "--bind %s:0" % ("x" * 64), "unable to bind"), (2, "--root '\x1b[31m'", "\\x1b[31m"),
                (1, "--bind " + shlex.quote("unix:" + precious), "unable to bind unix:"),
                (1, "--bind " + self.serve("--stream-threads", "1", "--nonce-lifetime", "1e6"),
                 "unable to bind 127.0.0.1:"),
                # Prefixes that no path can lie below, as it would be spelled.
                *((2, "--public '%s'" % prefix, "fatal: unable to make %s public" % prefix)
                  for prefix in ("", "open", "/a//b", "/../a", "/a/./b", "/a\\b"))):
            with self.subTest(line):
                found = told(*self.argv(*shlex.split(line))[2:])
                self.assertEqual(found[0], code)
                self.assertIn(said, found[1])
        self.assertEqual(read(precious), "precious")
        with mock.patch("signal.signal"), mock.patch.object(
                AuthServer, "serve_forever", side_effect=OSError(errno.EMFILE, "too many")):
            self.assertEqual(called(authserver.main, self.argv("--bind", "127.0.0.1:0")[2:]),
                             (1, "authserver: fatal: [Errno %d] too many\n" % errno.EMFILE))
        hashes = ["--passwords", self.passwords(SHA), "--bind", "127.0.0.1:0"]
        for words, said in (([], "try: .*authserver.py'? passwd"), (hashes, "line 1: user 'jim' .*cannot answer Digest MD5")):
            code, text = told(*words)
            self.assertEqual(code, 2)
            self.assertRegex(text, said)

    def test_a_locked_out_address_is_told_429_also_with_the_right_password(self) -> None:
        at = self.serve("--trusted-proxy", "127.0.0.0/8", "--max-failures", "3/60")
        said = [request(at, "/", "GET", auth, "X-Forwarded-For: 192.0.2.7").status
                for auth in [JIM] * 4 + [WRONG] * 3 + [JIM, ""]]
        self.assertEqual(said, [200] * 4 + [401] * 3 + [429, 401])
        self.assertEqual(request(at).status, 200)
        self.logged("192.0.2.7 - jim")

    def test_the_log_has_one_word_per_column(self) -> None:
        place = "unix:" + self.box.path("sock")
        at = self.serve("--bind", place)
        for auth in [basic(user, "wrong") for user in ("jim", "a b\"", "ü\u2028", "", "-", " ")] + [""]:
            request(at, "/", "GET", auth, "X-Forwarded-For: 192.0.2.7")     # which nobody here may say
        request(place, "/")
        lines = self.logged(r'(?m)^(\S+) - (\S+) \[.*\] "GET / HTTP/1.1" (\d+) ', 8)
        self.assertEqual({host for host, _, _ in lines[:7]}, {"127.0.0.1"})
        self.assertRegex(lines[7][0], r"^(-|[0-9.:a-f]+)$")
        names = [user for _, user, _ in lines]
        self.assertEqual(names[:3] + names[6:], ["jim", "a%20b%22", "%C3%BC%E2%80%A8", "-", "jim"])
        self.assertEqual((len(set(names[:6])), "-" in names[3:6]), (6, False))
        self.logged("refused jim: bad password")
        self.assertNotIn("refused -", self.log())       # who has shown nothing yet

    def test_TERM_and_INT_end_it(self) -> None:
        """With exit status 0 and the last line in the log; its passwords came from standard input."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number), open(self.passwords(), "rb") as pipe:
                at = self.box.serve("--passwords", "-", stdin=pipe)
                self.assertEqual(request(at, "/last").status, 404)
                self.box.server.send_signal(number)
                self.assertEqual(self.box.server.wait(PATIENCE), 0)
                self.assertIn("GET /last", self.log())
                remove(self.box.output)

    @needs_linux
    def test_a_log_that_cannot_be_written_stops_nothing(self) -> None:
        at = "127.0.0.1:%d" % free_port()
        with open("/dev/full", "wb") as full:
            self.box.spawn(*self.argv("--bind", at), stdout=full)
        until(lambda: not reach(at), "a server")
        self.assertEqual([request(at, "/", "GET", auth).status for auth in (JIM, JIM, WRONG)], [200, 200, 401])
        self.logged(r"authserver: warning: \d+ lines of the log lost\n")

    @needs_linux
    def test_at_the_limit_of_files_the_oldest_idle_connections_make_room(self) -> None:
        path = self.box.write("few.py", PRELUDE + '''
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
authserver.SPARE_FILES = 0
sys.exit(authserver.main(sys.argv[1:]))''')
        at = self.box.launch(PYTHON, path, *self.argv("--bind", "127.0.0.1:0")[2:])
        with contextlib.ExitStack() as stack:
            for _ in range(300):
                stack.enter_context(Wire(at))
            self.assertEqual([request(at).status for _ in range(5)], [200] * 5)
            for _ in range(150):        # in the middle of a head: these are not idle
                stack.enter_context(Wire(at)).sendall(b"GET / HTTP/1.1\r\n")
            before = cpu_seconds(self.box.server.pid)
            select.select([], [], [], 1.0)
            self.assertLess(cpu_seconds(self.box.server.pid) - before, 0.3)
        until(lambda: request(at).status == 200, "recovery")

    def test_a_start_that_failed_takes_the_first_password_back(self) -> None:
        path = self.box.path("x.passwords")
        more: Dict[str, Any] = {"may_create": True, "config_prefix": self.box.path("x.")}
        server = authserver.bind(contract(["--bind", "127.0.0.1:0"], **more))
        self.assertIn("password: ", server.greeting)
        self.assertTrue(os.path.exists(path))
        server.abandon()
        server.server_close()
        self.assertFalse(os.path.exists(path))
        with taken_port() as port, self.assertRaises(Refusal):
            authserver.bind(contract(["--bind", "127.0.0.1:%d" % port], **more))
        self.assertFalse(os.path.exists(path))


def contract(words: Sequence[str], **more: Any) -> Any:
    """Return what daemonize.py gives to bind(): the application's options, and those of the contract."""
    parser = argparse.ArgumentParser()
    authserver.add_arguments(parser)
    options = parser.parse_args(list(words))
    vars(options).update(dict(action="start", name="x", sockets=[], legacy=None, uid=None, gid=None, config_prefix="",
                              may_create=False, chroot=None, workers=None), **more)
    return options


class HttpRoot(HttpTest):
    """--root serves a folder to the programs that people use"""
    options = ["--root", "tree", "--public", "/open"]
    tree: Dict[str, bytes]

    @classmethod
    def set_up(cls) -> None:
        sizes = {"a b.txt": 10, "sub/ü.bin": 3000000, "sub/deep/small": 1, "open/free": 5, "index/index.html": 7}
        cls.tree = {name: Random(name).getrandbits(8 * size).to_bytes(size, "big") for name, size in sizes.items()}
        for name, content in cls.tree.items():
            path = cls.box.path("tree", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
            os.utime(path, (OLD, OLD))      # a young file has another tag a moment later
        super().set_up()

    def test_answers_over_a_socket(self) -> None:
        big, content = "/sub/%C3%BC.bin", self.tree["sub/ü.bin"]
        with Wire(self.at) as wire:
            whole = wire.ask(big)
            self.assertEqual((whole.status, whole.body), (200, content))
            part = wire.ask(big, "GET", JIM, "Range: bytes=1000-2499999")
            self.assertEqual((part.status, part.body), (206, content[1000:2500000]))
            again = wire.ask(big, "GET", JIM, "If-None-Match: " + str(whole.field("ETag")), body=False)
            self.assertEqual(again.status, 304)
            self.assertEqual(wire.ask(big, "HEAD", body=False).field("Content-Length"), "3000000")
            self.assertEqual(wire.ask("/sub").field("Location"), "/sub/")
            self.assertIn(b'href="deep/"', wire.ask("/sub/").body)
            self.assertEqual(wire.ask("/open/free", "GET", "").body, self.tree["open/free"])
            refused = [wire.ask(path, "GET", "") for path in ("/a%20b.txt", "/nothing")]
        self.assertEqual(*[(one.status, one.body, len(one.fields)) for one in refused])

    @needs_crypt
    def test_files_that_are_asked_for_ahead_leave_one_after_the_other(self) -> None:
        line = "jim:%s\n" % crypted("secret", "$6$rounds=1000$saltsalt$")
        passwords = Passwords(None, "files", authserver.parse_passwords(line, "files")[0])
        with serving(AuthServer(("127.0.0.1", 0), authserver.Files(self.box.path("tree")),
                                authenticator=Authenticator(passwords, schemes=("basic",)))) as at:
            said = talk(at, head("/sub/%C3%BC.bin") + head("/a%20b.txt", "GET", JIM, CLOSE), True)
        pieces = [self.tree[name] for name in ("sub/ü.bin", "a b.txt")]
        self.assertEqual([said.count(piece) for piece in pieces], [1, 1])
        self.assertLess(said.index(pieces[0]), said.index(pieces[1]))

    @needs("curl")
    def test_curl_resumes(self) -> None:
        part = self.box.path("part")
        with open(part, "wb+") as file:
            file.write(self.tree["sub/ü.bin"][:1234567])
            file.flush()
            run(["curl", "-sf", "-C", "-", "-u", "jim:secret", "-o", part, "http://%s/sub/%%C3%%BC.bin" % self.at], 0)
            file.seek(0)
            self.assertEqual(file.read(), self.tree["sub/ü.bin"])

    @needs("wget")
    def test_wget_mirrors(self) -> None:
        run(["wget", "-q", "-r", "-np", "-nH", "--user=jim", "--password=secret", "-P", self.box.make("mirror"),
             "http://%s/" % self.at])
        for name, content in self.tree.items():
            with open(self.box.path("mirror", name), "rb") as file:
                self.assertEqual(file.read(), content, name)


# -- 2.9 The clients and hosts of other people ---------------------------------
#
# Each is skipped where it is not installed.  PEER_PYTHON names a Python that
# has requests, httpx, aiohttp, waitress and gunicorn (.ci/run makes one).

PEER_PYTHON = os.environ.get("PEER_PYTHON") or sys.executable
PYTHON_CLIENTS = {  # of kind and password they make answers
    "requests": '''
import requests, requests.auth
kinds = {"digest": requests.auth.HTTPDigestAuth, "basic": requests.auth.HTTPBasicAuth}
with requests.Session() as session:
    session.auth = kinds[kind]("jim", password)
    answers = [session.get(url) for _ in range(3)]
''',
    "httpx": '''
import httpx
kinds = {"digest": httpx.DigestAuth, "basic": httpx.BasicAuth}
with httpx.Client(auth=kinds[kind]("jim", password)) as session:
    answers = [session.get(url) for _ in range(3)]
''',
    "aiohttp": '''
import aiohttp, asyncio
async def main():
    options = ({"middlewares": (aiohttp.DigestAuthMiddleware("jim", password),)} if kind == "digest"
               else {"auth": aiohttp.BasicAuth("jim", password)})
    async with aiohttp.ClientSession(**options) as session:
        async def ask():
            async with session.get(url) as answer:
                return Answer(answer.status, await answer.text())
        return [await ask()] + await asyncio.gather(*[ask() for _ in range(20)])
answers = asyncio.run(main())
''',
    "urllib": '''
import urllib.request
manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
manager.add_password(None, url, "jim", password)
kinds = {"digest": urllib.request.HTTPDigestAuthHandler, "basic": urllib.request.HTTPBasicAuthHandler}
opener = urllib.request.build_opener(kinds[kind](manager), urllib.request.ProxyHandler({}))
try:
    answers = [Answer(200, opener.open(url, timeout=9).read().decode()) for _ in range(3)]
except urllib.error.HTTPError as error:
    answers = [Answer(error.code, "")]
'''}
CLIENT = '''
import collections, sys
Answer = collections.namedtuple("Answer", "status_code text")
code, url, *kinds_of_it = sys.argv[1:]
for kind in kinds_of_it:
    for password in ("secret", "wrong"):
        exec(code, globals())
        print(kind, *{answer.status_code for answer in answers}, "for jim" in answers[-1].text)
'''
PERL = '''
use LWP::UserAgent; my ($url, $user, $password) = @ARGV;
my $agent = LWP::UserAgent->new(timeout => 10); my ($host) = $url =~ m{//([^/]+)};
$agent->credentials($host, "authserver", $user, $password);
my $answer = $agent->get($url); print $answer->code, " ", $answer->decoded_content;
'''
COMMANDS = [  # URL and PASSWORD stand for themselves
    *(["curl", "-s", "-u", "jim:PASSWORD", kind, "URL"] for kind in ("--basic", "--digest", "--anyauth")),
    ["wget", "-q", "-O", "-", "--user=jim", "--password=PASSWORD", "URL"],
    ["perl", "-e", PERL, "URL", "jim", "PASSWORD"]]


@functools.lru_cache(maxsize=None)
def peer_has(module: str) -> bool:
    """Tell whether PEER_PYTHON can import a module."""
    return run([PEER_PYTHON, "-c", "import " + module]).code == 0


def browse(box: Box, url: str) -> str:
    """Return a page as Chromium has it when it is loaded."""
    argv = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--ignore-certificate-errors", "--dump-dom",
            "--user-data-dir=" + box.path("profile")]
    page = run(argv + [url], env=box.env).out
    if not page and "hello" not in run(argv + ["data:text/html,hello"], env=box.env).out:
        raise unittest.SkipTest("needs a Chromium that starts")
    return page


class RealClients(HttpTest):
    """Programs that people use get in with the right password, and only with it"""

    @property
    def url(self) -> str:
        return "http://%s/example/foo" % self.at

    def test_python_clients(self) -> None:
        for name, code in PYTHON_CLIENTS.items():
            with self.subTest(name):
                if not peer_has(name):
                    self.skipTest("needs " + name)
                # urllib reads the first challenge only, which is Digest
                kinds = ["digest"] if name == "urllib" else ["digest", "basic"]
                said = run([PEER_PYTHON, "-c", CLIENT, code, self.url, *kinds], 0).out
                self.assertEqual(said, "".join("%s 200 True\n%s 401 False\n" % (kind, kind) for kind in kinds))

    def test_commands(self) -> None:
        for argv in COMMANDS:
            with self.subTest(" ".join(argv[:-1])[:40]):
                if not shutil.which(argv[0]) or argv[0] == "perl" and run(["perl", "-MLWP::UserAgent", "-e", "1"]).code:
                    self.skipTest("needs " + argv[0].replace("perl", "LWP"))
                for password, right in (("secret", True), ("wrong", False)):
                    said = run([word.replace("URL", self.url).replace("PASSWORD", password) for word in argv]).out
                    self.assertEqual("for jim" in said, right, said)

    @needs("git")
    def test_git(self) -> None:
        """git gets past the password to a 404: that there is no repository is another matter."""
        for password, right in (("secret", True), ("wrong", False)):
            url = self.url.replace("//", "//jim:%s@" % password)
            said = run(["git", "ls-remote", url], env=dict(self.box.env, GIT_TERMINAL_PROMPT="0")).err
            self.assertEqual("is this a git repository" in said, right, said)

    @needs("ab")
    def test_ab(self) -> None:
        """ApacheBench, which speaks HTTP/1.0 with keep-alive."""
        said = run(["ab", "-q", "-k", "-n", "200", "-c", "4", "-A", "jim:secret", self.url], 0).out
        self.assertRegex(said, r"Failed requests: +0\n(?s:.*)Keep-Alive requests: +200\n")
        self.assertNotIn("Non-2xx", said)

    @needs("fail2ban-regex")
    def test_fail2ban_bans_whom_it_should(self) -> None:
        for auth in (JIM, WRONG, basic("a b", "wrong"), basic("", "x"), ""):
            request(self.at, "/banned", "GET", auth)
        log = self.box.write("banned.log", "".join(self.logged(".*/banned.*\n", 5)))
        self.assertIn("Failregex: 3 total", run(["fail2ban-regex", log, "traefik-auth"], 0).out)


class RealHosts(BoxTest):
    """protect_wsgi() under the WSGI servers that people use, with several processes and no option"""

    HOSTS = {"gunicorn": "-m gunicorn -w 4 -b ADDRESS --log-level error app",
        "waitress": "-m waitress --listen=ADDRESS app:application",
        "cheroot": "-m cheroot --bind ADDRESS app:application",
        "uwsgi": "--http-socket ADDRESS --lazy-apps --processes 3 --master --wsgi-file app.py --disable-logging --die-on-term"}
    APPLICATION = '''
import sys
sys.path.insert(0, %r)
from authserver import *
def hello(environ, start):
    start("200 OK", [("Content-Length", "2")])
    return [b"ok"]
application = protect_wsgi(hello, Passwords({"jim": "secret"}, realm="files"))
''' % HERE

    def test_forty_of_forty(self) -> None:
        """All log-ins succeed, no proof is good twice; a large refused body reads its 401; a chunked one is skipped."""
        self.box.write("app.py", self.APPLICATION)
        inner = head("/", "GET", "", EMPTY)
        chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner)
        for name, words in self.HOSTS.items():
            with self.subTest(name):
                program = os.path.join(os.path.dirname(PEER_PYTHON), "uwsgi") if name == "uwsgi" else PEER_PYTHON
                if not os.path.exists(program) or name != "uwsgi" and not peer_has(name):
                    self.skipTest("needs " + name)
                at = "127.0.0.1:%d" % free_port()
                server = self.box.spawn(program, *words.replace("ADDRESS", at).split())
                self.addCleanup(server.wait)
                self.addCleanup(server.terminate)
                until(lambda: not reach(at), name, 15)
                fields = [digest(at, "/a%2Cb?c") for _ in range(40)]    # each of a challenge of its own
                for status in (200, 401):
                    said = [request(at, "/a%2Cb?c", "GET", field, CLOSE).status for field in fields]
                    self.assertEqual(said, [status] * 40)
                with contextlib.closing(http.client.HTTPConnection(at, timeout=30)) as client:
                    client.request("POST", "/", b"0" * 50000000)
                    self.assertEqual(client.getresponse().status, 401)
                self.assertEqual(statuses(talk(at, head("/", "POST", "", CHUNKED) + chunks, True)), [401])


# -- 3. The applications that the daemon tests host --------------------------
#
# APP answers questions: one line in, one line of JSON out.  Text appended to
# it changes it: APP + "def bind(options): raise RuntimeError('boom')".

APP = r'''
import contextlib, json, os, select, signal, socket, stat, subprocess, sys, threading, time

VERSION = "first"
CHILDREN = {
    "one": "exec sleep 6000",
    "two": "sleep 6000 & sleep 6000",
    "stubborn": "trap '' TERM; while :; do sleep 6000; done",
    "own session": "exec setsid sleep 6000",
}

def add_arguments(parser):
    parser.add_argument("--bind", default="127.0.0.1:0", help="address (127.0.0.1:0)")
    parser.add_argument("--word", default="", help="a word to say in status")

def works(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return False
    return True

def descriptors():
    found = {}
    for fd in range(256):
        with contextlib.suppress(OSError):
            found[fd] = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "other"
            if found[fd] == "other":
                found[fd] = os.readlink("/proc/self/fd/%d" % fd)
    return found

def facts():
    umask = os.umask(0)
    os.umask(umask)
    return dict(pid=os.getppid(), worker=os.getpid(), pgid=os.getpgrp(), sid=os.getsid(0),
                uids=os.getresuid(), gids=os.getresgid(), groups=os.getgroups(),
                umask=umask, cwd=os.getcwd(), root=os.listdir("/"), env=dict(os.environ),
                fds=descriptors(), argv=sys.argv, name=__name__, version=VERSION,
                tty=works(os.open, "/dev/tty", os.O_RDWR), can_be_root=works(os.setuid, 0),
                ignored=[n for n in range(1, 32) if signal.getsignal(n) == signal.SIG_IGN],
                blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
                reloads=Server.reloads)

class Server:
    reloads = 0
    def __init__(self, options):
        self.word, self.draining, self.waker = options.word, False, None
        host, port = options.bind.split(":")
        fitting = [sock for sock in options.sockets if sock.getsockname()[0] == host
                   and port in ("0", str(sock.getsockname()[1]))]
        self.sockets = fitting[:1] or [self.listen(host, int(port))]
        for sock in set(options.sockets) - set(self.sockets):
            sock.close()
    def listen(self, host, port):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
            sock.listen(128)
        except OSError as error:
            raise OSError("unable to bind %s:%d: %s" % (host, port, error.strerror))
        return sock
    def serve_forever(self):
        listener, (wake, self.waker) = self.sockets[0], socket.socketpair()
        listener.setblocking(False)
        print("listening on %s:%d" % listener.getsockname(), flush=True)
        with wake, self.waker:
            while not self.draining:
                if wake in select.select([listener, wake], [], [])[0]:
                    wake.recv(1)
                else:
                    with contextlib.suppress(BlockingIOError):  # a sibling was faster
                        self.answer(listener.accept()[0])
    def answer(self, sock):
        sock.setblocking(True)
        with contextlib.suppress(OSError), sock, sock.makefile("rw") as file:
            word, _, rest = file.readline().strip().partition(" ")
            file.write(json.dumps(getattr(self, "do_" + (word or "facts"))(rest)) + "\n")
    def do_facts(self, rest):
        return facts()
    def do_sleep(self, rest):
        print("sleeping", flush=True)
        time.sleep(float(rest))
        return os.getppid()
    def do_run(self, rest):
        return subprocess.Popen(["sh", "-c", CHILDREN[rest]]).pid
    def do_orphan(self, rest):
        return subprocess.call(["sh", "-c", "sleep 0.01 &"])
    def do_processes(self, rest):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    def do_print(self, rest):
        print(rest, flush=True)
        os.write(2, b"raw " + rest.encode() + b"\n")
        return True
    def probe(self):
        pass
    def drain(self):
        self.draining = True
        self.waker.send(b"x")
    def status(self):
        return {"addresses": ["127.0.0.1:%d" % sock.getsockname()[1] for sock in self.sockets],
                "word": self.word}
    def reload(self):
        Server.reloads += 1
    def server_close(self):
        for sock in self.sockets:
            sock.close()

def bind(options):
    return Server(options)

'''


def strays(box: Box) -> List[int]:
    """Return the processes of a box that are neither its daemon nor a child of it."""
    return [pid for pid in box.processes() if pid != box.pid() and parent(pid) != box.pid()]


def parent(pid: int) -> int:
    """Return the parent of a process, 0 when it has ended."""
    return int((read("/proc/%d/stat" % pid).rpartition(")")[2].split() + [0, 0])[1])


def fds_of(pid: int) -> List[str]:
    """Return what the descriptors of a process lead to."""
    folder, found = "/proc/%d/fd/" % pid, []
    for fd in sorted(os.listdir(folder), key=int):
        with contextlib.suppress(FileNotFoundError):    # it was closed just now
            found.append(os.readlink(folder + fd))
    return found


def ask(address: str, question: str = "") -> Any:
    """Put a question to APP and return its answer."""
    return json.loads(talk(address, question.encode() + b"\n").decode())


def drop(uid: int) -> Callable[[], None]:
    """Return what a child calls between fork and exec to become `uid` for good."""
    def become() -> None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    return become


def python_runs_as(uid: int) -> bool:
    """Tell whether `uid` can execute this Python and read daemonize.py."""
    try:
        return run([PYTHON, "-c", "import sys; open(sys.argv[1])", DAEMONIZE],
                   preexec_fn=drop(uid)).code == 0
    except OSError:
        return False


needs_other_user = unittest.skipUnless(ROOT and python_runs_as(NOBODY), "needs root, and a Python "
                                       "and daemonize.py that user %d can run" % NOBODY)
# An application that is not ready as long as there is a file; its path comes behind this text.
UNREADY = APP + ("Server.probe = lambda self: [time.sleep(0.01) for _ in iter("
                 "lambda: os.path.exists(WAIT), False)]\nWAIT = ")
NAP = ("--", "sleep", "600")    # a program that does no harm
PROMPT = r"""
import json, os, resource, sys, tempfile, traceback
sys.path.insert(0, %r)
import daemonize

def obey(code, words):
    status = 1
    try:
        for fd, file in enumerate(files):
            os.dup2(file.fileno(), fd)
            file.close()
        sys.argv[1:] = words
        exec(code, dict(globals()))
        status = 0
    except SystemExit as end:
        status = daemonize.exit_status(end)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)

for line in sys.stdin:
    files = open(os.devnull), tempfile.TemporaryFile(), tempfile.TemporaryFile()
    result = os.waitpid(os.fork() or obey(*json.loads(line)), 0)[1]
    said = [file.seek(0) or file.read().decode(errors="backslashreplace") for file in files[1:]]
    print(json.dumps([-(result & 127) or result >> 8] + said), flush=True)
"""


class Prompt(Box):
    """A Box whose commands are forks of one process: to start Python costs twice what they do."""
    prompt: Any = None

    def python(self, code: str, *argv: str, want: Optional[int] = 0, **popen: Any) -> Result:
        """Run Python code beside daemonize.py; in a process of its own if that is a special one."""
        if popen:
            return super().python(code, *argv, want=want, **popen)
        began = time.monotonic()
        self.prompt = self.prompt or self.spawn(PYTHON, "-c", PROMPT % HERE, stdin=subprocess.PIPE,
                                                stdout=subprocess.PIPE)
        self.prompt.stdin.write(json.dumps([code, argv]).encode() + b"\n")
        self.prompt.stdin.flush()
        if not select.select([self.prompt.stdout], [], [], PATIENCE)[0]:
            raise AssertionError("no end within %s s: %s" % (PATIENCE, " ".join(argv)))
        status, out, err = json.loads(self.prompt.stdout.readline().decode())
        result = Result(status, out, err, time.monotonic() - began)
        if want not in (None, result.code):
            raise AssertionError("exit status %s, not %s: %s\n%s%s" % (
                result.code, want, " ".join(argv), result.out, result.err))
        return result

    def daemonize(self, *argv: str, want: Optional[int] = 0, **popen: Any) -> Result:
        """Run `daemonize.py ARGV...`; from its very beginning for a special caller."""
        if popen:
            return super().daemonize(*argv, want=want, **popen)
        return self.python("sys.exit(daemonize.main(sys.argv[1:]))", *argv, want=want)

    def processes(self) -> List[int]:
        """Return the living processes of this box, but for the one that waits for commands."""
        return [pid for pid in super().processes() if not self.prompt or pid != self.prompt.pid]

    def end(self) -> None:
        """End every process of this box."""
        super().end()
        if self.prompt:
            self.prompt.stdin.close()
            self.prompt.stdout.close()


class CommandTest(BoxTest):
    """Tests of commands, most of which are forks of one process."""
    box: Prompt

    def setUp(self) -> None:
        self.box = Prompt()
        self.addCleanup(self.box.close)

    def starting(self, *options: str, app: str = APP) -> List[str]:
        """Return the command line of a start, of an application unless it is none."""
        hosted = ["--app", self.box.write("app.py", app)] if app else []
        return self.box.argv("start", "--logfile", self.box.log, *hosted, *options)

    def shell(self, script: str, *argv: str, want: int = 0, zero: str = "sh") -> Result:
        """Run a line of shell, whose $@ is argv, and $0 zero."""
        return run(["sh", "-c", script, zero, *argv], want, env=self.box.env, cwd=self.box.folder)

    def says(self, words: str, *argv: str, want: int = 0, **popen: Any) -> None:
        """Run a command on the box's pidfile (start: and log); look at what it says, and where."""
        act = self.box.start if argv[0] == "start" else functools.partial(self.box.command, argv[0])
        result = act(*argv[1:], want=want, **popen)
        self.assertRegex(result.out + result.err, words)
        self.assertNotIn("Traceback", result.err)
        complains = ["daemonize: " in text for text in (result.out, result.err)]
        self.assertEqual(complains, [False, bool(result.err)])

    def patched(self, code: str, *argv: str, want: int = 0) -> Result:
        """Run a command where that code has changed daemonize.py."""
        return self.box.python(code + "\nsys.exit(daemonize.main(sys.argv[1:]))", *argv, want=want)

    @contextlib.contextmanager
    def busy(self, address: str, seconds: str = "600") -> Iterator[Wire]:
        """Keep a worker of APP busy with a request."""
        def count() -> int:
            return (read(self.box.log) + read(self.box.output)).count("sleeping")
        with connect(address) as wire:
            before = count()
            wire.sendall(b"sleep %s\n" % seconds.encode())
            until(lambda: count() > before, "a busy worker")
            yield wire

    @contextlib.contextmanager
    def locked(self, byte: int, kind: int = fcntl.LOCK_EX) -> Iterator[None]:
        """Hold a byte of the lock file."""
        with open(self.box.pidfile + ".lock", "rb+") as lock:
            fcntl.lockf(lock, kind, 1, byte)
            yield

    def control(self) -> Any:
        """Return a connection to the daemon's control socket."""
        def dialled() -> Optional[Wire]:
            with contextlib.suppress(BlockingIOError):      # eight are waiting to be accepted
                return connect("unix:d.pid.sock")
            return None
        here = os.getcwd()
        os.chdir(self.box.folder)       # its address holds 107 bytes
        try:
            return until(dialled, "a place in the queue")
        finally:
            os.chdir(here)


class CommandLine(CommandTest):
    """The command line of daemonize.py"""
    FILES = ["--pidfile", "d.pid", "--logfile", "d.log"]

    def refused(self, *argv: str) -> str:
        """Run a command that must be refused as usage, with nothing made; return what it says."""
        before = set(os.listdir(self.box.folder)) | {"__pycache__", "output"}
        result = self.box.daemonize(*argv, want=2)
        self.assertLessEqual(set(os.listdir(self.box.folder)), before)
        self.assertNotIn("Traceback", result.err)
        return result.err

    def test_help_and_version(self) -> None:
        """-h of start, or of nothing, has the application's options, too, and defaults."""
        app = self.box.write("app.py", APP)
        of_start = ("--word --bind --uid --gid --umask (027) --chroot --rundir --logfile --workers "
                    "--start-timeout (30) --log-bytes (10485760) --log-keep (5) --quiet --app ")
        for action in ("start", "stop", "restart", "reload", "status", "run"):
            text = self.box.daemonize(action, "--app", app, "-h").out
            words = of_start * (action == "start") + "--pidfile --name --timeout (10)"
            self.assertEqual([word for word in words.split() if word not in text], [], action)
        self.assertIn("--realm", self.box.daemonize("-h").out)      # of authserver.py
        self.assertNotIn("--realm", self.box.daemonize("start", "-h", "--", "sleep").out)
        for argv in (["--version"], ["stop", "--version"]):
            self.assertRegex(self.box.daemonize(*argv).out, r"\Adaemonize\.py \d+\.\d+\n\Z")

    def test_a_wrong_command_line_is_refused_before_anything_happens(self) -> None:
        numbers = ("workers -1", "workers=0", "workers=1025", "umask 9", "umask=1000",
                   "timeout soon", "timeout=nan", "timeout=-1", "timeout=inf", "start-timeout=1e7",
                   "log-bytes=-1", "log-keep many", "log-keep=1001")
        rows = [("expected one of start, ", "|begin"), ("unable to name it", "APP --name a/b"),
                ("no COMMAND after --", "start --pidfile d.pid --"),
                ("unable to read ", "APP @none"),
                ("invalid number value", "|".join("APP --" + words for words in numbers)),
                ("unrecognized arguments: --word x\n", "start --pidfile d.pid --word x -- sleep 9"),
                ("unrecognized arguments: ", "APP --pidfle x|APP --wrod x|APP --wor x|APP stray|"
                 "restart --pidfile d.pid --logfile d.log hello"),
                ("try: daemonize.py -h\n", "stop --bind=:1|status --bind=:1|reload --bind=:1")]
        rows += [("try: daemonize.py %s --name hello\n" % action, action + " --pidfile d.pid hello")
                 for action in ("stop", "status", "reload")]     # the --name that was meant
        app = " ".join(["start", *self.FILES, "--app", self.box.write("app.py", APP)[-6:]])
        for said, typed in rows:
            for words in typed.replace("APP", app).split("|"):
                with self.subTest(words):
                    self.assertIn(said, self.refused(*words.split()))
        self.assertIn("--chroot is empty", self.refused("start", *self.FILES, "--chroot", "", *NAP))
        for word in (".", "..", "...", "", "a b", "a/b", "a\n", "\u00e9", "$x"):
            with self.subTest(name=word):
                said = self.refused("start", "--pidfile", "d.pid", "--name", word, *NAP)
                self.assertIn("unable to name it", said)

    def test_options_can_stand_in_a_file(self) -> None:
        """Quoting, comments, UTF-8; a pipe's words are noted, a file is read again at a restart."""
        name = os.fsdecode(b"opti\xc3\xb6ns")
        self.box.write(name, "# the mask\n--umask\n'077'  # of them\n")
        pipe = '5<<E\n--word "fr\u00f6m # a pipe"#1 # no word\nE\n'
        self.shell('exec "$@" "@$0" @/dev/fd/5 ' + pipe, *self.starting(), zero=name)
        for umask in (0o077, 0o007):
            self.assertEqual((self.box.status()["word"], ask(self.box.address())["umask"]),
                             ("fr\u00f6m # a pipe#1", umask))
            self.box.write(name, "--umask 007\n")
            self.box.command("restart")

    def test_one_options_file_serves_all_verbs(self) -> None:
        """stop, status and reload pass over what is not theirs, and import no application."""
        self.box.start(app=APP)
        self.box.write("broken.py", "import no_such_module")
        self.box.write("options", "--pidfile d.pid --word x --uid 12 --unheard-of y stray\n"
                                  "--app broken.py --workers 3")
        for action, want in (("status", 0), ("reload", 0), ("stop", 0),
                             ("status", 3), ("reload", 3), ("stop", 0)):
            with self.subTest(action, want=want):
                self.assertNotIn("Traceback", self.box.daemonize(action, "@options", want=want).err)

    def test_foreign_text_is_printed_escaped(self) -> None:
        """No control character comes out; and a letter that ASCII (env -i) lacks does no harm."""
        red = ["--pidfile", "x/\x1b[31mred.pid", "--logfile", "l", "--app", "\x1b[31mred.py"]
        for action in ("start", "status", "stop"):
            result = self.box.daemonize(action, *red, want=None)
            self.assertIn("\\x1b[31mred", result.out + result.err)
            self.assertNotRegex(result.out + result.err, "\x1b|Traceback")
        self.box.pidfile = self.box.path(os.fsdecode(b"n\xc3\xb6"), "d.pid")
        said = self.box.start(app=APP, env={}, want=1).err
        self.assertRegex(said, "\\Adaemonize: fatal: unable to .*n\u00f6")
        self.assertNotIn("Traceback", said)

    def test_a_python_that_does_not_know_where_it_lies(self) -> None:
        """Found by no path, as under env -i: then it cannot begin again, and need not."""
        for action in ("start", "stop"):
            options = ["--logfile", self.box.log, *NAP] if action == "start" else []
            argv = ["python3", SOURCES[0], *self.box.argv(action, *options)[2:]]
            run(argv, 0, env={"DAEMONIZE_TEST": self.box.folder}, executable=sys.executable)

    def test_a_user_that_it_cannot_be(self) -> None:
        """No such name; 2^32 - 1, to the kernel "leave it", or more; for an ordinary user root."""
        numbers = ["--gid 4294967295", "--gid 4294967296", "--uid 4294967295",
                   "--uid 4294967295 --gid 1", "--uid %s --gid 1" % ("9" * 30)]
        unable = r"\Adaemonize: fatal: unable to switch to [^\n]+\n(try: .*\n)?\Z"
        names = ["--uid no-such-name", "--gid no-such-name"]
        for options in names + (numbers if ROOT else ["--uid 0"]):
            with self.subTest(options):
                said = self.box.start(*options.split(), app=APP, want=1).err
                self.assertRegex(said, unable)
                self.assertIn("no-such-name" * (options in names), said)
        self.assertEqual(self.box.processes(), [])

    def test_a_script_is_a_program(self) -> None:
        """--app of what has no top-level bind: refused before it runs; the line that runs it."""
        files = ["start", *self.FILES, "--app"]
        script, other = "try: daemonize.py start -- python3 %s\n", "%s: its bind is no function"
        for text, words in (
                ("open('a', 'w')\n", script), ("def f():\n    bind = 1\n", script),
                ("import socket\nsocket.socket().bind(('127.0.0.1', 0))\n", script),
                ("bind = 'x'\n", other), ("bind: int = 3\n", other),
                ("if True:\n    bind = (1, 2)\n", other)):
            with self.subTest(text):
                app = self.box.write("app%d.py" % len(text), text)
                self.assertIn(words % app, self.refused(*files, app))
        self.box.write("app0.py", APP)
        attempt = ("try:\n    from nowhere import bind\nexcept ImportError:\n"
                   "    def bind(options): return")
        attempt = APP.replace("def bind(options):\n    return", attempt)
        for text in ("from app0 import *\n", attempt):
            self.box.daemonize(*files, self.box.write("app1.py", text))
            self.box.command("stop")

    def test_the_name_is_that_of_what_is_hosted(self) -> None:
        """The program's, the FILE's of an interpreter, else --name.  Which restart is bare."""
        rows = {"start -- /bin/sleep 9": "sleep", "start -- python3 -u x/b.py c": "b",
                "start -- sh run.sh": "run", "start -- sh -c x": "sh",
                "start -- node srv.js": "srv", "start -- python3.9 -m a": "python3",
                "start --name n -- perl a.pl": "n",
                "start": "authserver", "run --quiet": "authserver",
                "restart": "True", "restart --quiet --timeout 10": "True",
                # These are the defaults; but they were typed.
                "restart --umask 027": "False", "restart --log-keep 5": "False"}
        said = self.box.python(
            "for words in sys.argv[1:]:\n    action, *options = words.split()\n"
            "    plan = daemonize.parse([action, '--pidfile=p'] + options)\n"
            "    print(plan.is_bare if action == 'restart' else plan.name)", *rows).out
        self.assertEqual(said.split(), list(rows.values()))

    def test_a_name_that_is_in_use(self) -> None:
        """By another program: exit 1; with other options: how to have them."""
        nap = "import time\ntime.sleep(600)\n"
        one, two = self.box.write("1.py", nap), self.box.write("2.py", nap)
        self.box.start("--name", "n", "--", PYTHON, one)
        self.says(r"held by pid %d, which hosts .*1\.py\ntry: --name\n\Z" % self.box.pid(),
                  "start", "--name", "n", "--", PYTHON, two, want=1)
        self.says(r"already running with pid %d\n.*\ntry: daemonize\.py restart .*--umask 0 -- "
                  % self.box.pid(), "start", "--name", "n", "--umask", "0", "--", PYTHON, one)
        for action, want in (("status", 0), ("stop", 0), ("status", 3), ("stop", 0)):
            self.says(r"(?s)\A(?!.*authserver)", action, want=want)     # by the pidfile alone


class Start(SharedBoxTest):
    """A daemon after `start` by a careless parent: signals ignored and blocked, a pipe open"""
    leak: bool
    before: Tuple[str, float]  # the pidfile's text, and when it was written
    result: Result
    address: str
    facts: Dict[str, Any]
    pid: int

    @classmethod
    def set_up(cls) -> None:
        """Start APP from a parent with a pipe and a million (or all that it may) descriptors."""
        def careless() -> None:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])
            os.umask(0)
            for limit in (1000000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
                with contextlib.suppress(ValueError, OSError):
                    return resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        reader, writer = os.pipe()
        careless_parent = {"pass_fds": [writer], "preexec_fn": careless}
        cls.result = cls.box.start("--word", "hello", app=APP, **careless_parent)
        cls.address = cls.box.address(cls.result)
        os.close(writer)
        cls.leak = not select.select([reader], [], [], 0)[0]
        os.close(reader)
        cls.before = read(cls.box.pidfile), os.stat(cls.box.pidfile).st_mtime
        cls.facts, cls.pid = ask(cls.address), cls.box.pid()

    def test_the_files_have_their_modes_under_any_umask(self) -> None:
        modes = {name: os.stat(self.box.path(name)).st_mode & 0o7777
                 for name in os.listdir(self.box.folder) if name not in ("app.py", "__pycache__")}
        self.assertEqual((modes.pop("d.pid"), modes.pop("d.log")), (0o644, 0o640))
        self.assertEqual(set(modes.values()), {0o600})

    def test_daemon_and_worker_lead_groups_but_no_session(self) -> None:
        """Theirs has no leader and no terminal; the daemon's parent is gone."""
        facts = self.facts
        self.assertEqual((os.getpgid(self.pid), facts["pgid"]), (self.pid, facts["worker"]))
        self.assertEqual(os.getsid(self.pid), facts["sid"])
        self.assertNotIn(facts["sid"], [os.getsid(0), self.pid, facts["worker"]])
        self.assertFalse(facts["tty"] or is_alive(facts["sid"]))
        self.assertNotEqual(parent(self.pid), os.getpid())

    def test_nothing_of_the_callers_is_left(self) -> None:
        """In /, umask 027, no signal blocked or ignored, no pipe (cron would wait), no folder."""
        facts, fds = self.facts, self.facts["fds"]
        self.assertEqual((facts["cwd"], facts["umask"], facts["blocked"], self.leak),
                         ("/", 0o027, [], False))
        self.assertFalse(set(facts["ignored"]) & {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1})
        self.assertNotIn("folder", fds.values())    # one would undo a jail
        if LINUX:
            self.assertEqual([fds[n] for n in "012"], ["/dev/null", self.box.log, self.box.log])

    @needs_linux
    def test_what_is_open(self) -> None:
        """The lock, in the daemon alone, which cannot write it; the log as stdout and stderr."""
        lock, theirs = self.box.pidfile + ".lock", list(self.facts["fds"].values())
        fd, = [fd for fd in glob.glob("/proc/%d/fd/*" % self.pid) if os.readlink(fd) == lock]
        flags = re.findall(r"flags:\s+(\d+)", read(fd.replace("/fd/", "/fdinfo/")))
        self.assertEqual(int(flags[0], 8) & os.O_ACCMODE, os.O_RDONLY)
        self.assertEqual([name for name in theirs if name.startswith(self.box.pidfile)], [])
        # A third one would keep the space of a log that is gone.
        for names in (fds_of(self.pid), theirs):
            self.assertEqual((names.count(self.box.log), names.count("/dev/null")), (2, 1))
        # A worker's listener, a pair of its own, this connection, its channel: no end that the
        # daemon has, too, for whose EOF somebody could wait.
        self.assertEqual(sum("socket:" in name for name in theirs), 5)

    def test_start_again_says_so_and_changes_nothing(self) -> None:
        self.assertLess(self.result.seconds, SOON)      # no loop over all numbers of descriptors
        said = "app is running with pid %d, listening on %s\n" % (self.pid, self.address)
        self.assertEqual((self.result.out, self.result.err), (said, ""))
        self.assertEqual(self.before[0], "%d\n" % self.facts["pid"])    # it was complete
        self.assertIn("already running with pid %d" % self.pid, self.box.start(app=APP).out)
        self.assertEqual((read(self.box.pidfile), os.stat(self.box.pidfile).st_mtime), self.before)
        self.assertEqual(ask(self.address)["pid"], self.pid)
        self.assertEqual(self.box.start("--quiet", app=APP)[1:3], ("", ""))

    def test_status_is_for_a_person_or_a_program(self) -> None:
        """First line: name, pid, uptime, addresses; then a row each for what else is known."""
        first, *rows = self.box.command("status").out.splitlines()
        running = r"\Aapp is running: pid %d, up 0:00:\d\d, on %s\Z" % (self.pid, self.address)
        self.assertRegex(first, running)
        facts = dict(re.split(r"  +", row.strip(), 1) for row in rows)
        columns = {row.index(value) for row, value in zip(rows, facts.values())}
        self.assertEqual(len(columns), 1, "aligned")
        self.assertEqual([facts[name] for name in ("word", "workers", "restarts", "log", "user")],
                         ["hello", str(self.facts["worker"]), "0", self.box.log,
                          "%s (%d)" % (pwd.getpwuid(os.getuid()).pw_name, os.getuid())])
        report = json.loads(self.box.command("status", "--json", env={}, cwd="/").out)
        self.assertEqual([report[name] for name in ("pid", "uid", "word", "addresses")],
                         [self.pid, os.getuid(), "hello", [self.address]])
        self.assertLess(report["uptime"], 60)


class Starting(CommandTest):
    """Ways to call `start`"""

    @needs_linux
    def test_streams_may_be_closed_and_others_open(self) -> None:
        """0 to 2 are /dev/null and the log, and bind may use them; what a shell left is closed."""
        app = self.starting(app=APP + "def bind(options):\n    print('x' + sys.stdin.read())\n"
                            "    sys.stderr.write('y')\n    return Server(options)\n")
        program = self.starting(
            "--", "sh", "-c", "echo printed; echo also >&2; exec sleep 600", app="")
        # What is hosted is asked later than the streams: either will do, but where all are closed.
        for number, argv in enumerate([program, app] * 4 + [program]):
            closed = [text for bit, text in ((1, "<&-"), (2, ">&-"), (4, "2>&-"))
                      if min(number, 7) & bit]
            with self.subTest(closed, program=argv is program):
                self.shell('exec "$@" 3<"$0" 4<"$0" 9<"$0" ' + " ".join(closed), *argv, zero=README)
                self.assertRegex(read(self.box.pidfile), r"\A\d+\n\Z")
                child, = [pid for pid in self.box.processes() if parent(pid) == self.box.pid()]
                for names in map(fds_of, (child, self.box.pid())):
                    self.assertEqual(names[:3], ["/dev/null"] + [self.box.log] * 2)
                    self.assertNotIn(README, names)
                self.box.command("stop")
        printed = [read(self.box.log).count(word) for word in ("printed\n", "also\n")]
        self.assertEqual(printed, [5, 5])

    def test_the_order_of_the_steps(self) -> None:
        """bind is root's, with the terminal; workers and probe the user's; the pid is last."""
        steps, folder = self.box.path("steps"), self.box.folder
        self.box.start("--workers", "1", *AS_USER, app=APP + """
steps = os.open(%r, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def first(step, function):
    def noted(*arguments):
        with open(%r) if os.path.exists(%r) else open(os.devnull) as pidfile:
            facts = [step, os.getuid(), os.getcwd(), os.getsid(0), pidfile.read()]
        os.write(steps, json.dumps(facts).encode() + b"\\n")
        return function(*arguments)
    return noted
bind = first("bind", bind)
Server.serve_forever = first("serve", Server.serve_forever)
Server.probe = first("probe", Server.probe)
""" % (steps, self.box.pidfile, self.box.pidfile))
        until(lambda: read(steps).count("\n") == 3, "three notes")  # a worker may be slow to enter
        bind, *others = [json.loads(line) for line in read(steps).splitlines()]
        uid, sid = NOBODY if ROOT else os.getuid(), os.getsid(self.box.pid())
        self.assertEqual(bind, ["bind", os.getuid(), folder, os.getsid(0), ""])
        self.assertEqual(sorted(note[:4] for note in others),
                         [["probe", uid, "/", sid], ["serve", uid, "/", sid]])
        self.assertEqual([note[4] for note in others if note[0] == "probe"], [""])
        self.assertNotEqual(sid, os.getsid(0))
        self.assertEqual(read(self.box.pidfile), "%d\n" % self.box.pid())

    def test_the_callers_folder_is_no_place_for_modules(self) -> None:
        for name in "socket json typing argparse marshal os traceback symtable authserver".split():
            self.box.write(name + ".py", "open('imported', 'a').close()\nraise SystemExit(9)\n")
        self.box.start(*NAP, cwd=self.box.folder)
        for action in ("status", "restart", "stop"):
            self.box.command(action, cwd=self.box.folder)
        self.assertFalse(os.path.exists(self.box.path("imported")))

    def test_a_callers_folder_that_is_gone(self) -> None:
        """One can start and stop there, and is told that d.pid means nothing."""
        refusal = "daemonize: fatal: unable to resolve d.pid: the current directory is gone\n"
        for argv, want, said in ((self.starting(), 0, ""), (self.box.argv("stop"), 0, ""),
                                 ([PYTHON, DAEMONIZE, "stop", "--pidfile", "d.pid"], 1, refusal)):
            gone = self.box.make("gone")
            result = self.shell('cd "$0" && rmdir "$0" && exec "$@"', *argv, want=want, zero=gone)
            self.assertEqual((result.err, bool(self.box.pid())), (said, "start" in argv))
        self.assertEqual(self.box.processes(), [])

    def test_relative_paths_are_the_callers(self) -> None:
        """They are resolved once against the caller's directory, whatever --rundir is."""
        self.box.write("app.py", APP)
        sub = self.box.make("sub")
        words = "--pidfile ../d.pid --logfile ../d.log --rundir ../sub --app ../app.py".split()
        result = self.box.daemonize("start", *words, cwd=sub)
        self.assertEqual(ask(self.box.address(result))["cwd"], sub)
        self.box.command("stop", cwd="/")
        self.assertEqual(set(os.listdir(self.box.folder)) & {"d.pid", "d.log"}, {"d.log"})

    def test_what_bind_knows_and_makes(self) -> None:
        """It knows our own files.  A file of import or worker has --umask, one of bind 0600."""
        said = self.box.start("--umask", "002", "--log-keep", "2", app=APP + (
            "made = lambda name: open(%r + name, 'w').close()\nmade('import')\ndef bind(options):\n"
            "    made('bind')\n    print(*options.private_files, sep='\\n', flush=True)\n"
            "    return Server(options)\nServer.reload = lambda self: made('reload')\n"
            % self.box.path("made-"))).out.splitlines()
        self.assertEqual(said[:6], [self.box.pidfile + end for end in ("", ".lock", ".sock")]
                         + [self.box.log + end for end in ("", ".1", ".2")])
        self.box.command("reload")
        modes = [os.stat(self.box.path("made-" + name)).st_mode & 0o777
                 for name in ("import", "bind", "reload")]
        self.assertEqual(modes, [0o664, 0o600, 0o664])

    @needs_home
    def test_the_default_files_depend_on_user_and_name_only(self) -> None:
        """Without --pidfile a login shell and `env -i` find the same daemon by its name."""
        name = self.own_name()
        paths = ["/run/NAME.pid", "/var/log/NAME/NAME.log"] if ROOT else [
            HOME + "/.NAME/pid", HOME + "/.NAME/log"]
        paths = [path.replace("NAME", name) for path in paths]
        misleading = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "TMPDIR"), self.box.folder)
        self.box.daemonize("start", "--name", name, "--app", self.box.write("app.py", APP),
                           env=dict(self.box.env, **misleading))
        self.assertEqual([os.path.exists(path) for path in paths], [True, True])
        for action in ("status", "stop"):
            self.box.daemonize(action, "--name", name, env={}, cwd="/")
        self.assertFalse(os.path.exists(paths[0]))

    @needs_other_user
    def test_no_usable_home_is_said(self) -> None:
        """Who has none, or may not write there, also when only --logfile is missing."""
        start = ["start", "--app", self.box.write("app.py", APP)]
        theirs = ["--pidfile", self.box.path(self.box.make("theirs", 0o755, OTHER), "d.pid")]
        lacks, denied = "try: .*--pidfile", (r"\A.*unable to use the home directory of uid %d: "
                                             r"Permission denied\ntry: --pidfile --logfile" % OTHER)
        for uid, argv, want, words in (
                (NOBODY, start, 1, lacks), (54321, ["status"], 4, lacks),
                (OTHER, start, 1, denied), (OTHER, start + theirs, 1, denied)):
            with self.subTest(uid, argv=argv[2:]):
                said = self.box.daemonize(*argv, want=want, cwd="/", preexec_fn=drop(uid))
                self.assertRegex(said.err, "(?m)" + words)
                self.assertNotIn("KeyError", said.out + said.err)

    @needs_other_user
    def test_a_caller_that_may_not_read_its_own_folder(self) -> None:
        """`su nobody` in root's home: start, status and stop work from there."""
        self.box.move("theirs", 0o755, NOBODY)
        sealed = {"cwd": self.box.make("sealed", 0o700), "preexec_fn": drop(NOBODY)}
        self.box.start(app=APP, **sealed)
        for action in ("status", "stop"):
            self.box.command(action, **sealed)

    def test_the_folder_may_be_a_link(self) -> None:
        """Absolute and relative; a restart means the pidfile that was typed, wherever they lead."""
        pidfile, link = os.path.join(self.box.move("real"), "d.pid"), self.box.path("link")
        os.symlink(os.path.dirname(pidfile), self.box.path("absolute"))
        os.symlink("absolute", link)
        self.box.pidfile, self.box.log = (os.path.join(link, name) for name in ("d.pid", "d.log"))
        address = self.box.host("--word", "linked")
        self.box.command("restart")
        self.assertEqual(self.box.status()["word"], "linked")
        self.assertEqual(ask(address)["pid"], self.box.pid())
        old = read(pidfile)
        os.unlink(link)
        os.symlink(self.box.make("other"), link)
        self.box.pidfile = pidfile
        self.box.command("restart")
        self.assertNotIn(read(pidfile), ("", old))
        self.assertLessEqual(set(os.listdir(link)), {"d.log"})      # that was typed at the start
        self.stops()
        self.assertEqual(set(os.listdir(self.box.path("real"))), {"d.log", "d.pid.lock"})


class StartFailure(CommandTest):
    """A start that fails says why, at once, and leaves nothing behind"""

    def fails(self, app: str, *options: str, want: int = 1) -> str:
        """Start `app`, which must fail and leave no process and no pid; return what was said."""
        result = self.box.start(*options, app=app, want=want)
        self.assertEqual((self.box.processes(), read(self.box.pidfile)), ([], ""))
        self.assertLess(result.seconds, SOON)
        self.assertRegex(result.err, r"(?m)^daemonize: fatal: (unable to |no licence$)")
        return result.err

    def test_an_application_that_fails_says_why(self) -> None:
        """At import, in bind, in probe: a traceback, or its own words; no stale pid stays."""
        fail = "def fail(*whatever):\n    raise ValueError('the very %s' % 'reason')\n"
        raised = r"(?s)raise ValueError\('the very %s' % 'reason'\).*ValueError: the very reason"
        refuse = ("class Refusal(ValueError):\n    status = 2\ndef refuse(whatever):\n"
                  "    raise Refusal('unable to read the word: too odd\\ntry: another word')\n")
        refused = "fatal: unable to read the word: too odd\ntry: another word\n"
        deep = ("sys.setrecursionlimit(3000)\ndef one(n): two(n)\ndef two(n): one(n)\n"
                + "#" * 60 + "\nbind = one\n")
        probe = "Server.probe = lambda self: "
        for text, words, want, *options in (
                (fail + "def bind(o): pass\nfail()\n", raised, 1), ("def bind(:\n", r"bind\(:", 1),
                (APP + fail + "bind = fail\n", raised, 1),
                (APP + fail + "Server.probe = fail\n", raised, 1),
                (APP + "def bind(o):\n    sys.exit('no licence')\n", "fatal: no licence\n", 1),
                (APP + refuse + "bind = refuse\n", refused, 2),     # as for a wrong command line
                (APP + refuse + "Server.probe = refuse\n", refused, 1),     # which was right
                (APP + "class Gone(BaseException): pass\ndef fail(_): raise Gone('for good')\n"
                 "Server.probe = fail\n", "Gone: for good", 1),         # as asyncio's CancelledError
                (APP + deep, "RecursionError", 1),      # of a hundred KiB the end says most
                # ... and of a reason the beginning, in characters that JSON makes twelve bytes of
                (APP + "def bind(o):\n    raise ValueError('\\U0001f600' * 70000)\n", "\U0001f600{99}", 1),
                (APP + probe + "time.sleep(600)\n", "not ready after", 1, "--start-timeout", "0.5"),
                # It closes its end, and goes on; a killed daemon has a worker with a child.
                (APP + probe + "os.closerange(3, 256) or time.sleep(600)\n", "before it was", 1),
                (APP + probe + "time.sleep(0.3) or os.kill(os.getppid(), 9)\n"
                 "Server.serve_forever = lambda self: os.system('sleep 600')\n", "signal 9", 1)):
            with self.subTest(text[-20:]):
                self.box.write("d.pid", "4711\n" * text.startswith(APP))
                self.assertRegex(self.fails(text, *options, want=want), words)

    def test_what_bind_prints_is_printed_once(self) -> None:
        """Though standard output is no terminal, and Python keeps what is printed for a while."""
        for bind, want in (("raise ValueError", 1), ("", 0)):
            path = self.box.write("app.py", APP + "well = bind\ndef bind(options):\n    print('a word')\n"
                                  "    %s\n    return well(options)\n" % bind)
            said = run(self.box.argv("start", "--logfile", self.box.log, "--app", path), want, env=self.box.env)
            self.assertEqual((said.out + read(self.box.log)).count("a word\n"), 1)

    def test_who_is_killed_before_it_is_ready_is_noticed_at_once(self) -> None:
        """The starter (in bind), the daemon (workers, status) or a worker (probe)."""
        # Who is met by a SIGKILL in the middle of exit(2) is said to have died of that (wait(2)).
        deaths = (("os._exit(4)", "status 4|signal 9"), ("os.kill(os.getpid(), 9)", "signal 9"),
                  ("sys.exit(3)", "3"))
        for place, count in (("bind = %s", 3), ("Server.probe = %s", 3), ("Server.status = %s", 2),
                             ("Server.workers = property(%s)", 2)):     # it survives SystemExit
            for death, words in deaths[:count]:
                with self.subTest(place % death):
                    text = APP + place % ("lambda *x: " + death) + "\n"
                    self.assertRegex(self.fails(text), words)

    def test_what_cannot_be_used_is_named(self) -> None:
        """A port in use; a folder that is missing or sealed; a log that is no file, or a link."""
        target, sealed = self.box.write("target", "precious"), self.box.make("sealed", 0o555)
        missing, path_of = self.box.path("missing", "x"), self.box.path
        os.mkfifo(path_of("fifo"))
        os.symlink(target, path_of("a symlink"))
        os.symlink("nowhere", path_of("a dangling"))
        os.link(target, path_of("a hardlink"))
        with taken_port() as port:
            rows = [("--bind", "127.0.0.1:%d" % port), ("--logfile", self.box.folder)]
            logs = [path_of(name) for name in ("fifo", "/dev/full", "a symlink", "a dangling",
                                             "a hardlink")]
            rows += [("--logfile", path) for path in logs]
            rows += [(option, missing) for option in ("--pidfile", "--logfile", "--rundir")]
            rows += [("--chroot", missing)] if ROOT else [(option, os.path.join(sealed, "x"))
                                                          for option in ("--pidfile", "--logfile")]
            for option, path in rows:
                with self.subTest(option, path=path):
                    said = self.fails(APP, option, path)
                    self.assertIn(path[-8:].replace("/x", ""), said)
                    self.assertFalse(option == "--logfile" and "Traceback" in said, said)
        self.assertEqual((read(target), os.path.exists(path_of("missing"))), ("precious", False))

    def test_a_program_that_ends_at_once_has_not_started(self) -> None:
        """Even with 0: its last words are shown; one that the kernel refuses is named, and why."""
        script = self.box.write("s.py", "import sys\nprint('short')\nsys.exit('no ' + 'licence')\n")
        plain, torn, text = (self.box.write(name, content, mode) for name, content, mode in (
            ("plain", "", 0o644), ("torn", "#!/no/such\n", 0o755), ("text", "text\n", 0o755)))
        detached = "try: its option for the foreground"
        for hosted, words in (
                ([PYTHON, script], "(?s)short.*no licence.*status 1"),
                ([PYTHON, "-c", "def f():\n    return 1 / 0\nf()\n"], "ZeroDivisionError"),
                (["true"], "status 0.*\n" + detached), (["sh", "-c", "sleep 9 & exit 0"], detached),
                (["sh", "-c", "kill -9 $$"], "signal 9"), (["sh", "-c", "exit 7"], "7"),
                (["no-such-program"], "no-such-program: no such program"),
                ([plain], "plain: Permission denied"),
                ([torn], "unable to execute .*torn: No such file"),
                ([text], "unable to execute .*text: Exec format error")):
            with self.subTest(hosted[-1]):
                self.assertRegex(self.fails("", "--name", "p", "--", *hosted), words)
        self.assertIn("short", read(self.box.log))      # a log that says something stays

    @needs_root
    def test_a_full_disk_leaves_nothing_half_made(self) -> None:
        small = self.small_disk("16k")
        self.fill(small)
        said = self.fails(APP, "--pidfile", self.box.path("small", "d.pid"))
        self.assertIn("No space left", said)
        self.assertEqual(set(os.listdir(small)) - {"d.pid.lock"}, {"filler"})

    def test_what_a_file_is_not(self) -> None:
        """There, or called .py, or beside daemonize.py: what an application should be is said."""
        self.box.write("app.text", APP)
        shutil.copy(DAEMONIZE, self.box.folder)
        for program, app, words in (
                (DAEMONIZE, "--app nothing.py", r"unable to load .*nothing\.py: "),
                (DAEMONIZE, "--app app.text", r"app\.text: its name does not end in \.py"),
                ("daemonize.py", "", r"unable to load .*authserver\.py: no such file\n\Z")):
            argv = [PYTHON, program] + ("start --pidfile d.pid --logfile d.log " + app).split()
            said = self.shell('exec "$@"', *argv, want=1).err
            self.assertRegex(said, "^daemonize: fatal: .*" + words)
            self.assertNotIn("Traceback", said)


class Stop(CommandTest):
    """`stop` returns when nothing of the daemon is left"""

    def test_children_and_grandchildren_end_with_the_daemon(self) -> None:
        """By stop, twice, SIGTERM, SIGINT: the application is told, the port free, no pid left."""
        app = APP + "Server.server_close = lambda self: print('closed', flush=True)\n"
        address = "127.0.0.1:%d" % free_port()
        for count, number in enumerate((0, 0, signal.SIGTERM, signal.SIGINT), 1):
            with self.subTest(number):
                self.assertEqual(self.box.host("--bind", address, app=app), address)
                ask(address, "run one" if number else "run two")    # a shell's & ignores SIGINT
                until(lambda: self.box.processes()[2 if number else 4:], "all of them")
                if number:
                    os.kill(self.box.pid(), number)
                    until(lambda: not self.box.processes(), "the end of all")
                    self.assertEqual(read(self.box.pidfile), "")
                    # Who is in exit(2) has no command line any more, but its lock for a moment.
                    until(lambda: self.box.command("status", want=None).code == 3, "no daemon")
                else:
                    self.stops()
                self.assertEqual(read(self.box.log).count("closed\n"), count)

    def test_who_does_not_end_is_killed_after_the_timeout(self) -> None:
        """And stop says so.  Who was stopped by SIGSTOP, or needs a moment, is not killed."""
        ignore = ("Server.serve_forever = lambda self: ignore()\n"
                  "def ignore():\n    signal.signal(15, signal.SIG_IGN)\n    time.sleep(600)\n")
        slow = "trap 'sleep 1.2; echo ended; exit' TERM; while :; do sleep 0.05; done"
        killed, stopped = "did not end within 0.4 s: killed", r"\A\w+ is stopped"
        for name, app, timeout, words in (
                ("ignores", APP + ignore, "0.4", killed), ("child", APP, "0.4", killed),
                ("stopped", APP, "8", stopped), ("slow", "", "8", stopped)):
            with self.subTest(name):
                started = self.box.start(*([] if app else ["--", "sh", "-c", slow]), app=app)
                if name == "child":
                    ask(self.box.address(started), "run stubborn")
                if words == stopped:
                    for process in self.box.processes():
                        with contextlib.suppress(ProcessLookupError):   # a sleep of the loop
                            os.kill(process, signal.SIGSTOP)
                result = self.box.command("stop", "--timeout", timeout)
                self.assertRegex(result.out, words)
                self.assertEqual(self.box.processes(), [])
                self.assertLess(result.seconds, SOON)
        self.assertIn("ended\n", read(self.box.log))

    @needs_other_user
    def test_a_stranger_has_no_permission(self) -> None:
        address, stranger = self.box.host(), drop(NOBODY)
        self.assertRegex(self.box.command("stop", want=1, preexec_fn=stranger).err, "(?i)permi")
        self.assertEqual(ask(address)["pid"], self.box.pid())
        self.assertIn(self.box.command("status", want=None, preexec_fn=stranger).code, (0, 4))

    def test_whom_it_finds_and_signals(self) -> None:
        """What a moment decides, played: whose group it is in, who forks, what time is left."""
        for code, said in ((    # Between fork(2) and its setpgid(2) a child is in our group.
                "import signal\nos.setsid()\nchild = os.fork() or signal.pause()\n"
                "daemonize.signal_each([daemonize.look_at(child)], 9, True)\n"
                "print(os.wait() == (child, 9))", "True"), (
                # What the daemon has used up of --timeout its children do not get again.
                "import time\nclass Target:\n    pid, leader, members = 0, 0, 0\n"
                "    send = send_all = lambda *a: 0\nseconds = []\n"
                "def end_all(members, kill, timeout):\n    seconds.append(timeout)\n"
                "    time.sleep(0.3)\ndaemonize.end_all = end_all\n"
                "daemonize.end_daemon(Target(), 1)\nprint(seconds[0] == 1, 0 < seconds[1] <= 0.7)",
                "True True"), (     # A child that is listed before its parent; a session's orphan.
                "me = os.getpid()\nfamily = [(14, 13, 9), (13, 12, 9), (12, 11, 9), (11, me, 9), "
                "(15, 1, 7), (7, 1, 7), (16, 1, 8), (me, 1, 7)]\ndaemonize.processes = lambda: "
                "[daemonize.Process(p, pp, p, s, '') for p, pp, s in family]\n"
                "print(*[[p.pid for p in daemonize.family(s)] for s in (None, 7)])",
                "[14, 13, 12, 11] [14, 13, 12, 11, 15]"), (     # Each look is followed by a kill.
                "left = [3, 2, 1]\nprint(daemonize.end_all(lambda: left, left.pop, 0), left)",
                "True []")):
            with self.subTest(said):
                self.assertEqual(self.box.python(code).out, said + "\n")

    def test_an_heir_ends_as_quickly_as_any(self) -> None:
        """The sockets of who was restarted are its own, not systemd's: stop waits for no answer."""
        self.box.start(app=APP)
        self.box.command("restart")
        with self.busy(self.box.address()):
            result = self.box.command("stop", "--timeout", "15", "--quiet")
            self.assertEqual((result.out, result.seconds < SOON), ("", True))

    def test_no_name_of_it_stays(self) -> None:
        """Of one that lives, or was killed (status 1); a folder in a file's place is let be."""
        names = [self.box.pidfile, self.box.pidfile + ".sock"]
        for kills in (False, True):
            self.box.start(*NAP)
            if kills:
                self.assertEqual(self.box.slay(), self.box.pid())
                self.says("is dead", "status", want=1)
                self.says('"state": "dead"', "status", "--json", want=1)
            self.stops()
            self.assertEqual([os.path.exists(name) for name in names], [False, False])
        for name in names:
            os.mkdir(name)
        self.box.command("stop")
        self.assertEqual([os.path.isdir(name) for name in names], [True, True])


class Status(CommandTest):
    """`status` has the exit codes of LSB"""

    def test_never_started_is_3(self) -> None:
        """Without a pidfile, with an empty one, without its folder: stop is 0, reload 3."""
        self.box.write("empty.pid", "")
        for name in ("d.pid", "empty.pid", os.path.join("fresh", "d.pid")):
            self.box.pidfile = self.box.path(name)
            for action, want in (("status", 3), ("stop", 0), ("stop", 0), ("reload", 3)):
                self.says("not running", action, want=want)
            self.says(r"\A\Z", "stop", "--quiet")
        self.assertFalse(os.path.exists(self.box.path("fresh")))

    def test_what_the_application_raises_refuses_that_call_and_no_more(self) -> None:
        """status() and reload() that raise, SystemExit too, cost one answer."""
        broken = self.box.path("broken")
        self.box.start(app=APP + "Server.status = Server.reload = lambda self: "
                       "exec(open(%r).read()) if os.path.exists(%r) else {}\n" % (broken, broken))
        for error in ("1 / 0", "sys.exit('why')", "os.strerror(None)", "raise KeyboardInterrupt"):
            with self.subTest(error):
                self.box.write("broken", error)
                self.assertIn("unable to ask the application", self.box.status()["note"])
                self.box.command("reload", want=1)
                os.unlink(broken)
                facts = self.box.status()
                self.assertIn("reload refused", facts["last_error"])
                self.assertNotIn("note", facts)
                self.box.command("reload")

    def test_a_command_that_hangs_up_or_talks_nonsense_is_no_harm(self) -> None:
        """Half a line, no JSON, an unknown word, a question whose answer nobody reads."""
        for app in (APP, ""):
            self.box.start(*([] if app else NAP), app=app)
            for said in (b"{", b"[]\n", b"\xff\n", b'{"event": 7}\n', b'{"event": "tea"}\n',
                         b"[" * 60000 + b"\n", b'{"event": "status"}\n' * 50,
                         b'{"event": "sockets"}\n', b'{"event": "reclaim"}\n'):
                with self.subTest(said[:20], app=app[:9]):
                    with self.control() as control:
                        control.sendall(said)
                    self.assertTrue(is_alive(self.box.pid()))
            with self.control() as control:
                control.sendall(b'{"event": ')
                facts = self.box.status()       # is asked after all of them, and forgets no error
                control.sendall(b'"status"}\n')     # a line may come in pieces
                self.assertIn('"said"', control.makefile().readline())
            self.assertEqual((facts["pid"], facts["last_error"]), (self.box.pid(), ""))
            self.assertNotIn("Traceback", read(self.box.log))
            self.box.command("stop")

    @needs_linux
    def test_descriptors_that_nobody_asked_for_are_closed(self) -> None:
        """They came with a question, or half of one: when the caller is gone, so are they."""
        self.box.start(app=APP)
        before, cargo = len(fds_of(self.box.pid())), array.array("i", [0] * 20)
        for said in (b'{"event": "status"}\n', b"{", b"tea\n"):
            with self.control() as control:
                control.sendmsg([said], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, cargo)])
        self.box.status()       # is answered after them
        until(lambda: len(fds_of(self.box.pid())) == before, "as few descriptors as before")

    def test_who_asks_and_reads_nothing_holds_nobody_up(self) -> None:
        """Questions without end, no answer read: it is hung up, and the next one is heard."""
        much = "daemonize.Program.facts = lambda self: {'x': 'y' * 60000}"
        self.patched("daemonize.ANSWER = 0.3\n" + much, *self.starting(*NAP, app="")[2:])

        def is_hung_up() -> bool:
            try:
                end.send(b'{"event": "status"}\n')
            except OSError as error:
                return not isinstance(error, BlockingIOError)
            return False
        with self.control() as end:
            end.setblocking(False)
            until(is_hung_up, "a hang-up")
        self.assertNotIn("note", self.box.status())

    def test_the_daemon_overrules_nothing_that_the_kernel_says(self) -> None:
        """An answer that claims another pid, state or uid, or is none: status says what is so."""
        self.box.start("--name", "n", *NAP)
        lies = {"pid": 1, "state": "dead", "name": "x", "uid": 77, "user": "x", "uptime": 1e9}
        for said in (lies, [7], 7, "x", None):
            with self.subTest(said=said):
                facts = json.loads(self.patched("daemonize.ask = lambda *a: {'said': %r}" % (said,),
                                                *self.box.argv("status", "--json")[2:]).out)
                self.assertEqual([facts[name] for name in ("pid", "state", "name", "uid")],
                                 [self.box.pid(), "running", "n", os.getuid()])
                self.assertLess(facts["uptime"], 1000)
        silence = "daemonize.ANSWER = 0.2\nos.kill(%d, 19)" % self.box.pid()
        for code in ("daemonize.Channel.take = lambda self: b''", silence):
            said = self.patched(code, *self.box.argv("status")[2:]).out
            self.assertRegex(said, r"(?s)\An is running: .*unable to ask it: it does not answer\n")

    def test_what_is_said_looks_like_no_line_of_ours(self) -> None:
        """Facts with names that we use, or line ends: a row is one line.  And so is a reason's."""
        said = {"event": "a", "self": "b", "one": "a\nb", "two": ["c\nd", "e"],
                "addresses": ["f\ng"], "x\nb is running: pid 1": "y\nc is running: pid 2"}
        self.box.start(app=APP + "Server.status = lambda self: %r\n" % said)
        self.assertLessEqual(said.items(), self.box.status().items())
        first, *rows = self.box.command("status").out.splitlines()
        self.assertIn("on f\\ng", first)
        self.assertEqual([row for row in rows if not row.startswith("  ")], [])
        self.assertIn("b is running: pid 1", "".join(rows))
        values = [row.split(None, 1)[1] for row in rows if row.split()[0] in ("one", "two")]
        self.assertEqual(values, ["a\\nb", "c\\nd e"])
        # No reason may look like our line; the cure in it names this daemon.
        reason = "no \ud800\ndaemonize: fatal: lost\ntry: daemonize.py restart"
        code = "daemonize.ask = lambda *words: {'reason': %r}" % reason
        self.assertEqual(self.patched(code, *self.box.argv("reload")[2:], want=1).err,
                         "daemonize: fatal: unable to reload app: no ?\n  daemonize: fatal: lost\n"
                         "try: daemonize.py restart --pidfile '%s'\n" % self.box.pidfile)

    def test_silent_conversations_keep_nobody_out(self) -> None:
        """Nine callers: status works, the longest silent are hung up, an heir is not."""
        wait = self.box.path("wait")
        self.box.start(app=UNREADY + repr(wait))
        old = self.box.pid()
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(self.control()) for _ in range(9)]
            self.assertIn("word", self.box.status())
            self.assertEqual([end.recv(1) for end in ends[:2]], [b""] * 2)
            self.box.write("wait", "")
            child = self.box.spawn(*self.box.argv("restart"))
            until(lambda: len(self.box.processes()) >= 6, "an heir, its worker, its prober")
            for _ in range(9):
                stack.enter_context(self.control())
            os.unlink(wait)
            self.assertEqual(child.wait(PATIENCE), 0)
            self.assertEqual((is_alive(old), strays(self.box)), (False, []))
            self.assertIn("word", self.box.status())
        self.assertNotIn("warning", read(self.box.output))

    @needs_linux
    def test_an_heir_that_fails_late_leaves_the_old_one_in_its_place(self) -> None:
        """It had control socket and pidfile; then it hung up: both are the old daemon's again."""
        self.box.start(app=APP)
        pid = self.box.pid()
        self.box.python("plan = daemonize.parse(['restart', '--pidfile', 'd.pid'])\n"
                        "kept = daemonize.take_over(plan, int(sys.argv[1]))\n"
                        "daemonize.write_pidfile(os.open('d.pid', os.O_RDWR), 1)", str(pid))
        until(lambda: self.box.pid() == pid, "its pid")
        with self.control() as end:
            peer = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            self.assertEqual(struct.unpack("3i", peer)[0], pid)


class Restart(CommandTest):
    """`restart` with new code, on the old one's sockets"""

    def test_restart_repeats_the_last_start(self) -> None:
        """Its options, its port, with new code and environment; any options are a whole new set."""
        address, old = self.box.host("--word", "kept", "--umask", "077"), self.box.pid()
        self.box.write("app.py", APP.replace('"first"', '"another"'))
        self.box.command("restart", env=dict(self.box.env, FRESH="yes"), cwd="/")
        facts = ask(address)
        self.assertEqual([facts[name] for name in ("version", "umask", "pid")],
                         ["another", 0o077, self.box.pid()])
        self.assertEqual(facts["env"].get("FRESH"), "yes")
        self.assertEqual((self.box.status()["word"], is_alive(old)), ("kept", False))
        self.box.command("restart", "--app", "app.py", "--logfile", self.box.log, "--bind", address,
                         "--word", "new")
        self.assertEqual((ask(address)["umask"], self.box.status()["word"]), (0o027, "new"))

    def test_restart_of_nothing_is_start(self) -> None:
        """Also with the options of the last one, whose folder is gone: relative paths mean /."""
        words = "--logfile", self.box.log, "--app", self.box.write("app.py", APP), "--word", "first"
        self.box.command("restart", *words, cwd=self.box.make("sub"))
        self.box.command("stop")
        os.rmdir(self.box.path("sub"))
        gone = "warning: the folder of the last start is gone: .*sub; relative paths mean /"
        for state in ("stopped", "running"):
            with self.subTest(state):
                self.says(gone, "restart")
                self.assertEqual(self.box.status()["word"], "first")

    def test_broken_new_code_leaves_the_old_one_serving(self) -> None:
        address = self.box.host("--start-timeout", "3")
        pid, fds = self.box.pid(), len(ask(address)["fds"])
        probe = APP + "Server.probe = lambda self: "
        for broken, words in (("def bind(:", "def bind"), (APP + "bind = 1 / 0", "ZeroDivision"),
                              (APP + "Server.__init__ = lambda *x: 1 / 0", "ZeroDivision"),
                              (probe + "1 / 0", "ZeroDivision"),
                              (probe + "os.kill(os.getpid(), 9)", "signal 9"),
                              (probe + "time.sleep(600)", "not ready after 3 s")):
            with self.subTest(broken[-40:]):
                self.box.write("app.py", broken)
                self.assertRegex(self.box.command("restart", want=1).err, words)
                self.assertEqual((ask(address)["pid"], self.box.pid()), (pid, pid))
        self.assertEqual(len(ask(address)["fds"]), fds)
        self.box.write("app.py", APP)
        self.box.command("restart")
        self.assertNotEqual(ask(address)["pid"], pid)

    def test_an_answer_spans_a_restart(self) -> None:
        """It is the old one's.  That has no lock meanwhile: the heir's workers need not wait."""
        address, old = self.box.host(), self.box.pid()
        with self.busy(address, "1") as sock:
            self.box.command("restart")
            self.assertEqual(json.loads(sock.makefile().readline()), old)
        heir = ask(address)["pid"]
        self.assertNotEqual(heir, old)
        with self.busy(address):
            self.box.spawn(*self.box.argv("restart", "--timeout", "60"))
            if LINUX:
                until(lambda: " %d " % heir not in read("/proc/locks"), "an end of its lock", SOON)
            self.assertTrue(is_alive(heir))

    def test_the_new_one_begins_when_the_old_one_has_stopped(self) -> None:
        """No client meets both: release() comes after each drain(); server_close() last of all."""
        say = "Server.%s = lambda self: print('%s', flush=True)\n"
        says = (("hold", "held"), ("release", "released"), ("server_close", "closed"))
        self.box.start("--workers", "2", app=APP + "".join(say % words for words in says) + (
            "well = Server.drain\nServer.drain = lambda self: "
            "time.sleep(0.5) or print('drained', flush=True) or well(self)\n"))
        self.box.command("restart")
        until(lambda: read(self.box.log).count("released") == 2, "both released")
        self.box.command("stop")
        self.assertEqual(re.findall("held|drained|released|closed", read(self.box.log)),
                         ["held"] + ["drained"] * 2 + ["released"] * 2 + ["closed"])

    def test_commands_at_once_take_turns(self) -> None:
        """Three restarts leave a daemon, two stops none, one of each either."""
        both = (["restart", "stop"], (True, False))
        for actions, lives in ((["restart"] * 3, (True,)), both, (["stop"] * 2, (False,)), both):
            self.box.start(app=APP)
            rest = self.box.argv("")[3:]
            children = [self.box.spawn(PYTHON, LEAN, action, *rest) for action in actions]
            ends = [child.wait(PATIENCE) for child in children]
            self.assertEqual(ends, [0] * len(actions), read(self.box.output))
            runs = bool(self.box.pid())
            self.assertEqual((strays(self.box), bool(self.box.processes())), ([], runs))
            self.assertIn(runs, lives)
            if runs:
                self.assertEqual(ask(self.box.address())["pid"], self.box.pid())
        self.assertNotIn("Traceback", read(self.box.output))

    def test_a_program_is_looked_up_before_the_old_one_is_stopped(self) -> None:
        """In an application's place it has no port; one that is missing leaves the old one."""
        address = self.box.host("--name", "n")
        program = self.box.write("program", "#!/bin/sh\nexec sleep 600\n", 0o755)
        self.box.command("restart", "--name", "n", "--logfile", self.box.log, "--", program)
        self.assertIsInstance(reach(address), ConnectionRefusedError)
        old = self.box.pid()
        self.box.command("restart")
        pid = self.box.pid()
        self.assertNotEqual(pid, old)
        os.rename(program, program + ".away")
        self.says("program", "restart", want=1)
        self.assertEqual((self.box.pid(), is_alive(pid)), (pid, True))
        self.box.write("program", "#!/bin/sh\nexit 5\n", 0o755)
        self.says("nothing runs|not running", "restart", want=1)
        self.assertEqual(self.box.processes(), [])

    def test_who_does_not_go_is_killed_after_the_timeout(self) -> None:
        """A long answer, a script that ignores TERM: after what was typed now; that is said."""
        script = "--", "sh", "-c", "trap '' TERM; while :; do sleep 1; done"
        for app, hosted, word in ((APP, (), "drain"), ("", script, "end")):
            with self.subTest(word), contextlib.ExitStack() as stack:
                result = self.box.start("--timeout", "60", *hosted, app=app)
                old = self.box.pid()
                if app:
                    stack.enter_context(self.busy(self.box.address(result)))
                said = self.box.command("restart", "--timeout", "0.4").err
                self.assertIn("pid %d did not %s within 0.4 s: killed" % (old, word), said)
                self.assertEqual((is_alive(old), is_alive(self.box.pid())), (False, True))
                self.box.command("stop", "--timeout", "0")

    def test_an_application_that_cannot_drain_is_ended(self) -> None:
        """As by SIGTERM, once the new one is ready; workers, too."""
        address = self.box.host("--workers", "2", app=APP + "del Server.drain\n")
        old = self.box.processes()
        self.assertEqual(self.box.command("restart").err, "")
        self.assertEqual(set(old) & set(self.box.processes()), set())
        self.assertIn(ask(address)["pid"], self.box.processes())


class Reload(CommandTest):
    """`reload` and SIGHUP"""

    def test_reload_asks_the_application_once(self) -> None:
        """And keeps the pid, and opens the log again; SIGHUP does, too, and logs it."""
        address, pid = self.box.host(), self.box.pid()
        os.rename(self.box.log, self.box.path("old.log"))
        self.box.command("reload")
        ask(address, "print after")
        self.assertEqual((ask(address)["reloads"], self.box.pid()), (1, pid))
        self.assertIn("after\n", read(self.box.log))
        self.assertNotIn("after", read(self.box.path("old.log")))
        before = len(read(self.box.log))
        os.kill(pid, signal.SIGHUP)
        until(lambda: ask(address)["reloads"] == 2, "a reload")
        until(lambda: "reload" in read(self.box.log)[before:], "a line in the log")

    def test_a_reload_that_is_refused_changes_nothing(self) -> None:
        """Its reason is told, and logged; one that an application does not know is none."""
        refuse = "def no(self):\n    raise ValueError('line 7: no colon')\nServer.reload = no\n"
        for text, want, words in ((refuse, 1, "line 7: no colon"),
                                  ("del Server.reload\n", 0, "reloaded")):
            address = self.box.host(app=APP + text)
            self.says(words, "reload", want=want)
            self.assertEqual(ask(address)["pid"], self.box.pid())
            before = len(read(self.box.log))
            os.kill(self.box.pid(), signal.SIGHUP)
            until(lambda: words in read(self.box.log)[before:], "the reason in the log")
            self.box.command("stop")

    def test_a_probe_that_hangs_at_reload_leaves_no_process(self) -> None:
        hangs = "Server.probe = lambda self: os.path.exists(%r) and time.sleep(600)\n"
        self.box.start("--start-timeout", "1", app=APP + hangs % self.box.path("hang"))
        before = sorted(self.box.processes())
        self.box.write("hang", "")
        self.says("not ready after 1 s", "reload", want=1)
        self.assertEqual(sorted(self.box.processes()), before)

    def test_reload_again_and_again(self) -> None:
        """Three times: the same daemon, fresh workers, no descriptor is left."""
        def kinds() -> List[str]:
            return sorted(re.sub(r"\d+", "", name) for name in ask(address)["fds"].values())
        for workers, again in ((1, False), (2, False), (1, True), (3, True)):
            address = self.box.host("--workers", str(workers))
            if again:
                self.box.command("restart")
            pid, before, first = self.box.pid(), len(fds_of(self.box.pid())), kinds()
            for number in (1, 2, 3):
                with self.subTest(workers, again=again, number=number):
                    self.box.command("reload")
                    until(lambda: ask(address)["reloads"] == number, "a fresh one")
                    self.assertEqual(ask(address)["pid"], pid)
                    until(lambda: len(self.box.processes()) == 1 + workers, "the end of the old")
            # No end of the talk that asked for it: its caller would wait.  Nor a second log.
            self.assertEqual((self.box.status()["restarts"], kinds()), (0, first))
            until(lambda: len(fds_of(self.box.pid())) <= before, "as few descriptors as at first")
            self.box.command("stop")
        self.assertEqual(read(self.box.log).count("reloaded\n"), 12)

    def test_reload_of_a_program_is_SIGHUP(self) -> None:
        """Who handles SIGHUP gets it; for any other program reload is refused, and it lives on."""
        hears = "trap 'echo got it' HUP; while :; do sleep 0.05; done"
        self.box.start("--name", "p", "--", "sh", "-c", hears)
        for _ in range(2):
            self.says("p is reloaded", "reload")
        os.kill(self.box.pid(), signal.SIGHUP)
        until(lambda: "got it" in read(self.box.log), "its word")
        self.box.command("restart", "--logfile", self.box.log, *NAP)
        pid = self.box.pid()
        self.says("does not handle SIGHUP", "reload", want=1)
        os.kill(pid, signal.SIGHUP)
        said = until(lambda: self.box.status()["last_error"], "a word on it")
        self.assertIn("does not handle SIGHUP", said)
        self.assertEqual((self.box.pid(), self.box.status()["restarts"]), (pid, 0))


class Run(CommandTest):
    """`run`: the same life in the foreground, for systemd, containers and debugging"""

    def argv(self, *options: str, app: str = APP) -> List[str]:
        """Return the command line of `run`, of an application unless it is none."""
        hosted = ["--app", self.box.write("app.py", app)] if app else []
        return self.box.argv("run", *hosted, *options)

    def foreground(self, *options: str, app: str = APP, **popen: Any) -> "subprocess.Popen[bytes]":
        """Start `run` and wait until the pidfile, which comes last, is written."""
        child = self.box.spawn(*self.argv(*options, app=app), **popen)
        until(lambda: self.box.pid() or child.poll() is not None, "a pidfile")
        self.assertIsNone(child.poll(), read(self.box.output))
        return child

    def notified(self) -> Tuple[socket.socket, Dict[str, str]]:
        """Return a supervisor's socket, and an environment that names it.  See: sd_notify(3)."""
        path = tempfile.mktemp(prefix="n", dir=TEMP)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(notify.close)
        notify.bind(path)
        self.addCleanup(os.unlink, path)
        notify.settimeout(PATIENCE)
        return notify, dict(self.box.env, NOTIFY_SOCKET=path)

    def address(self) -> str:
        """Return the address that status says once the pidfile is written."""
        until(self.box.pid, "a pidfile")
        return self.box.address()

    def terminal(self, script: str, *argv: str) -> BinaryIO:
        """Run a shell script, its $0 the box's folder, in a terminal; return our end of that."""
        shell, end = pty.fork()
        if shell == 0:
            os.execve("/bin/sh", ["sh", "-c", script, self.box.folder, *argv], self.box.env)
        terminal = os.fdopen(end, "wb", 0)
        self.addCleanup(terminal.close)
        self.addCleanup(os.waitpid, shell, 0)
        self.addCleanup(os.kill, shell, signal.SIGKILL)
        return terminal

    def test_the_process_is_the_daemon(self) -> None:
        """Pid, session and streams are the caller's; so is its restart, and it is the only one."""
        child = self.foreground("--word", "front")
        facts = ask(self.address())
        self.assertEqual((facts["pid"], self.box.pid()), (child.pid, child.pid))
        self.assertEqual(facts["sid"], os.getsid(0))
        self.assertEqual(self.box.status()["word"], "front")
        ask(self.address(), "print seen")
        self.assertIn("seen\nraw seen\n", read(self.box.output))
        self.assertIn("try: systemctl restart", self.box.command("restart", want=1).err)
        second = run(self.argv(), 1, env=self.box.env).err
        self.assertIn("already running with pid %d" % child.pid, second)
        self.assertIn('"pid": %d,' % child.pid, read(self.box.pidfile + ".lock"))
        self.assertEqual((child.poll(), strays(self.box)), (None, []))
        self.assertLess(self.box.command("stop").seconds, SOON)  # a zombie counts as stopped
        self.assertEqual(child.wait(PATIENCE), 0)

    def test_TERM_and_INT_end_it(self) -> None:
        """And its children, and grandchildren that left everything behind; no pid is left."""
        # What a shell starts by & ignores SIGINT: that is killed.  SIGTERM is obeyed by all.
        rows = [(signal.SIGTERM, "60", "", 5), (signal.SIGINT, "0.5", "", 5)]
        if LINUX and not run([PYTHON, "-c", "import ctypes"]).code:
            orphans = "(setsid sleep 600 & setsid sh -c 'sleep 600 & sleep 600' &); sleep 600"
            rows.append((signal.SIGTERM, "60", orphans, 6))
        for number, timeout, script, count in rows:
            with self.subTest(number, script=script):
                hosted = ["--", "sh", "-c", script] if script else []
                child = self.foreground("--timeout", timeout, *hosted, app="" if script else APP)
                if not script:
                    ask(self.address(), "run two")
                until(lambda: len(self.box.processes()) >= count, "all of them")
                child.send_signal(number)
                self.assertEqual((child.wait(PATIENCE), self.box.processes()), (0, []))
                self.assertEqual(read(self.box.pidfile), "")
                self.box.command("status", want=3)

    def test_its_exit_status_is_the_programs(self) -> None:
        ends = {"exit 5": 5, "sleep 0.5; exit 7": 7, "kill -9 $$": 137, "true": 0}
        for code, status in ends.items():
            self.box.command("run", "--", "sh", "-c", code, want=status)
        self.assertEqual(read(self.box.pidfile), "")
        # Also when it is told to end; but to die of what it is told is no failure.
        for code, status in (("trap 'exit 5' TERM; echo set", 5), ("trap '' TERM; echo set", 137),
                             ("echo set", 0)):
            child = self.foreground("--timeout", "0.5", "--", "sh", "-c",
                                    code + "; while :; do sleep 0.05; done", app="")
            until(lambda: "set" in read(self.box.output), "its word")
            program, = self.box.status()["program_pid"]
            os.kill(child.pid, signal.SIGSTOP)      # both are told, as by systemd; it looks later
            for told in (child.pid, program):
                os.kill(told, signal.SIGTERM)
            until(lambda: status == 137 or not is_alive(program), "the end of the program")
            os.kill(child.pid, signal.SIGCONT)
            self.assertEqual(child.wait(PATIENCE), status, code)

    def test_a_failure_is_told_like_at_start(self) -> None:
        """A NOTIFY_SOCKET that leads nowhere, a bind() that fails, a pidfile that is none."""
        nowhere = r"\Adaemonize: fatal: unable to connect to NOTIFY_SOCKET .+: %s\n\Z"
        for notify, reason in ((self.box.path("nobody"), "No such file or directory"),
                               ("@" + TOKEN, "Connection refused")):    # an abstract name
            env = dict(self.box.env, NOTIFY_SOCKET=notify)
            self.assertRegex(run(self.argv(), 1, env=env).err, nowhere % reason)
            self.assertFalse(os.path.exists(self.box.pidfile))
        said = run(self.argv(app=APP + "bind = 1 / 0\n"), 1, env=self.box.env).err
        self.assertIn("ZeroDivisionError", said)
        self.assertEqual(read(self.box.pidfile), "")
        os.mkfifo(self.box.path("fifo"))    # seen after bind(): what that made is taken back
        self.box.pidfile = self.box.path("fifo")
        app = APP + "Server.abandon = lambda self: open('taken back', 'w')\n"
        self.box.python("sys.exit(daemonize.main(sys.argv[1:]))", *self.argv(app=app)[2:], want=1)
        left = [os.path.exists(self.box.path(name)) for name in ("taken back", "fifo.lock")]
        self.assertEqual(left, [True, False])

    def test_a_supervisor_that_reads_nothing(self) -> None:
        """Its socket is full after some words: nobody waits for it."""
        child = self.foreground(env=self.notified()[1])
        for _ in range(9):
            self.box.command("reload")
        child.terminate()
        self.assertEqual(child.wait(PATIENCE), 0)

    def test_a_signal_before_it_is_ready(self) -> None:
        """HUP and USR1, which supervisors pass on, have nothing to do yet; they end nothing."""
        os.mkfifo(self.box.path("gate"))
        script = "well = bind\ndef bind(options): open(%r).read(); return well(options)\n"
        child = self.box.spawn(*self.argv(app=APP + script % self.box.path("gate")), start_new_session=True)
        with open(self.box.path("gate"), "w"):      # which waits for bind()
            for number in (signal.SIGHUP, signal.SIGUSR1):
                child.send_signal(number)
        self.assertEqual(ask(self.address())["pid"], child.pid)
        child.terminate()
        self.assertEqual(child.wait(PATIENCE), 0)

    def test_systemd_is_told(self) -> None:
        """The notify socket hears READY, RELOADING with its time, READY again, and STOPPING."""
        notify, env = self.notified()
        child, heard = self.foreground(env=env), ""
        self.assertNotIn("NOTIFY_SOCKET", ask(self.address())["env"])
        for word, number in (("READY=1", signal.SIGHUP), ("RELOADING=1", 0),
                             ("READY=1", signal.SIGTERM), ("STOPPING=1", 0)):
            said = ""
            while word not in said.split("\n"):
                said = notify.recv(4096).decode()
                heard += said + "\n"
            child.send_signal(number)
        self.assertEqual(child.wait(PATIENCE), 0)
        self.assertRegex(heard, r"(?s)STATUS=.*RELOADING=1\nMONOTONIC_USEC=\d+\n"
                         r"READY=1\nSTATUS=reloaded\n")

    def test_systemd_is_told_of_a_program(self) -> None:
        """READY, for a program as well: a unit with Type=notify waits for it."""
        notify, env = self.notified()
        self.foreground("--", "sleep", "600", app="", env=env)
        self.assertIn("READY=1", notify.recv(4096).decode())

    def test_TERM_with_sockets_of_systemd_drains(self) -> None:
        """They are served; what was accepted is answered, what waits is the next one's."""
        child, address = self.activated(*self.argv())
        self.assertEqual(self.address(), address)
        self.assertEqual([name for name in ask(address)["env"] if name.startswith("LISTEN_")], [])
        with self.busy(address, "0.7") as busy, connect(address) as queued:
            child.send_signal(signal.SIGTERM)
            self.assertEqual(json.loads(busy.makefile().readline()), child.pid)
            self.assertEqual(child.wait(PATIENCE), 0)
            self.assertEqual(select.select([queued], [], [], 0)[0], [])
        self.assertEqual(self.box.processes(), [])

    def test_a_program_gets_the_sockets_of_systemd(self) -> None:
        """As if systemd had started it: LISTEN_PID is its own; under start as under run."""
        script = ("import os, socket\nsock = socket.socket(fileno=3)\n"
                  "names = ['LISTEN_FDS', 'LISTEN_FDNAMES', 'LISTEN_PID']\n"
                  "said = ' '.join(map(os.environ.get, names)) + ' %d' % os.getpid()\n"
                  "while True:\n    peer = sock.accept()[0]\n"
                  "    peer.sendall(said.encode())\n    peer.close()")
        for action in ("run", "start"):
            address = self.activated(*self.box.argv(
                action, "--logfile", self.box.log, "--", PYTHON, "-c", script))[1]
            with self.subTest(action):
                said = talk(address, b"").decode()
                self.assertRegex(said, r"\A1 web (\d+) \1\Z")
            until(self.box.pid, "a pidfile")
            self.box.command("stop")

    def test_a_second_TERM_waits_for_no_answer(self) -> None:
        """The first one drains, with sockets of systemd; that ends long before --timeout."""
        child, address = self.activated(*self.argv())
        self.address()
        with self.busy(address):
            child.send_signal(signal.SIGTERM)
            until(lambda: self.box.status()["workers"] == [], "a drain")
            child.send_signal(signal.SIGTERM)
            self.assertEqual(child.wait(SOON), 0)

    def test_descriptors_that_are_not_meant_are_not_served(self) -> None:
        """LISTEN_PID another's: let be.  Descriptor 3 /dev/null: closed.  It is none: refused."""
        child, address = self.activated(*self.argv(), pid="1")
        self.assertNotEqual(self.address(), address)
        self.box.kill(child)
        remove(self.box.pidfile)
        script = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" '
        self.assertEqual(self.shell(script + "3<&-", *self.argv(), want=1).err, "daemonize: fatal: "
                         "unable to take over the 1 fds of LISTEN_FDS: Bad file descriptor\n")
        self.box.spawn("sh", "-c", script + "3</dev/null", "sh", *self.argv())
        fds = ask(self.address())["fds"].items()
        self.assertNotIn("/dev/null", [path for fd, path in fds if int(fd) > 2])

    def test_what_ends_its_group_ends_it(self) -> None:
        """timeout, a supervisor's killpg: run, its program and its workers stay in that group."""
        program = self.argv("--", "sh", "-c", "sleep 600 & sleep 600", app="")
        for number in (signal.SIGTERM, signal.SIGKILL):
            for argv, count in ((self.argv(), 3), (program, 5)):
                with self.subTest(number, count=count):
                    script = ["sh", "-c", '"$@"; true', "sh", *argv]
                    shell = self.box.spawn(*script, start_new_session=True)
                    until(lambda: len(self.box.processes()) >= count and self.box.pid(), "all")
                    os.killpg(shell.pid, number)
                    shell.wait()
                    until(lambda: not self.box.processes(), "the end of all", SOON)
                    remove(self.box.pidfile)

    @needs_linux
    def test_its_streams_are_the_callers(self) -> None:
        """By any name of theirs that start refuses as a log; closed ones are /dev/null."""
        os.symlink("/dev/stdout", self.box.path("link.log"))
        for log in ("-", "/dev/stdout", "/dev/stderr", "link.log"):
            words = "--logfile", log, "--", "cat"
            self.assertEqual(self.box.command("run", *words, data=b"from stdin").out, "from stdin")
            self.assertIn("try: daemonize.py run", self.box.command("start", *words, want=2).err)
        self.assertFalse(os.path.exists(self.box.path("-")))
        self.box.spawn("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *self.argv(*NAP, app=""))
        until(self.box.pid, "a pidfile")
        for pid in self.box.status()["program_pid"] + [self.box.pid()]:
            self.assertEqual(fds_of(pid)[:3], ["/dev/null"] * 3)

    def test_nohup_means_it(self) -> None:
        """A SIGHUP that the caller ignored stays so, in the program, too; reload works."""
        child = self.foreground(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        self.assertIn(signal.SIGHUP, ask(self.address())["ignored"])
        child.send_signal(signal.SIGHUP)
        self.box.command("reload")
        self.assertEqual((ask(self.address())["reloads"], child.poll()), (1, None))

    def test_its_terminal_ends_it(self) -> None:
        """A hang-up, or Ctrl-C below a script that called it.  A program is interrupted once."""
        script = ("import time\ntry:\n    print('begun', flush=True)\n    time.sleep(600)\n"
                  "except KeyboardInterrupt:\n    print('interrupted', flush=True)\n"
                  "    time.sleep(0.3)\n    print('cleaned', flush=True)\n")
        careful = self.argv("--logfile", self.box.log, "--", PYTHON, "-c", script, app="")
        for program, end in ((False, "hang-up"), (False, "Ctrl-C"),
                             (True, "Ctrl-C"), (True, "INT")):
            with self.subTest(end, program=program):
                argv = careful if program else self.argv()
                terminal: Any = None if end == "INT" else self.terminal('"$@"; :', *argv)
                if end == "INT":
                    self.box.spawn(*argv)
                pid = until(self.box.pid, "a pidfile")
                if program:
                    until(lambda: "begun" in read(self.box.log), "its word")
                else:
                    self.assertTrue(ask(self.address())["tty"])
                if program and end == "Ctrl-C":
                    os.kill(pid, signal.SIGSTOP)    # the program shall be the first to hear of it
                    terminal.write(b"\x03")
                    until(lambda: "interrupted" in read(self.box.log), "its word")
                    os.kill(pid, signal.SIGCONT)
                elif end == "Ctrl-C":
                    terminal.write(b"\x03")
                elif program:
                    os.kill(pid, signal.SIGINT)
                else:
                    terminal.close()                # then it has none any more that could be asked
                until(lambda: not is_alive(pid), "the end")
                self.assertEqual(read(self.box.pidfile), "")
                if program:
                    said = re.findall("cleaned|Traceback", read(self.box.log))
                    self.assertEqual(said, ["cleaned"])
                    os.unlink(self.box.log)

    @needs_linux
    def test_stop_leaves_the_neighbours_alone(self) -> None:
        """In a shell's foreground group: the shell, and what it runs beside, go on."""
        def program_of(pid: int) -> str:
            return read("/proc/%d/cmdline" % pid).partition("\0")[0]
        self.terminal('sleep 600 & "$@"; touch "$0/next"; wait', *self.argv())
        ask(self.address(), "run two")
        until(lambda: len(self.box.processes()) == 7, "shell, sleep, run, worker, its family")
        self.box.command("stop")
        until(lambda: os.path.exists(self.box.path("next")), "the shell's next command")
        until(lambda: sorted(map(program_of, self.box.processes())) == ["sh", "sleep"], "the end")

    @needs_root
    @needs("unshare")
    def test_as_the_first_process_of_a_container_it_reaps(self) -> None:
        """As pid 1 it reaps orphans, ends on SIGTERM, and takes its children along."""
        unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
        if run(unshare + ["true"]).code:
            self.skipTest("needs the right to unshare")
        child = self.box.spawn(*unshare, *self.argv())
        until(self.box.pid, "a pidfile")
        address = self.box.address_in(until(lambda: read(self.box.output), "an address"))
        inside = {1, ask(address)["worker"]}
        self.assertIn(self.box.pid(), inside)
        ask(address, "orphan")
        until(lambda: set(ask(address, "processes")) == inside, "an orphan reaped")
        ask(address, "run one")
        os.kill(family(child.pid)[1], signal.SIGTERM)   # its pid 1
        self.assertEqual((child.wait(PATIENCE), self.box.processes()), (0, []))


class Pidfile(CommandTest):
    """Every odd pidfile is recovered from or refused; nobody is signalled, no link followed"""

    def setUp(self) -> None:
        super().setUp()
        self.stranger = self.box.stranger()
        self.theirs = "%d\n" % self.stranger.pid

    def test_nobody_is_signalled_whatever_the_pidfile_says(self) -> None:
        """A stale, foreign or senseless one: status is 1, or 3 when it is empty; start starts."""
        dead = self.box.spawn("true")
        dead.wait()
        own, gone = "%d\n" % os.getpid(), "%d\n" % dead.pid
        # The mode of those that a start takes over: it becomes ours, so that monitors can read it.
        rows = [(self.theirs, 0o666), (self.theirs, 0o600), ("", 0o600), (gone, 0o600),
                ("abc", 0o644), ("-1\n", 0o644), ("1\n", 0o644)]
        rows += [(text, 0) for text in (own, "12abc", "0\n", "99999999999\n", "-" + self.theirs,
                                        " +" + self.theirs, "\0" * 32, "7" * 1000000)]
        for text, mode in rows:
            self.box.write("d.pid", text, mode or 0o644)
            lives = "(?=.*to a stranger)" if text in (self.theirs, own, "1\n") else "(?!.*stranger)"
            status = (1, "is dead" + lives) if text else (3, "not running")
            for action, (want, words) in (("status", status), ("stop", (0, "not running"))):
                with self.subTest(text[:20].strip(), action=action):
                    self.says(r"(?s)\A(?=.{1,1000}\Z).*" + words, action, want=want)
            if mode:
                self.box.write("d.pid", text, mode)
                self.box.start(app=APP)
                self.assertEqual(self.box.status()["pid"], self.box.pid())
                self.assertEqual(os.stat(self.box.pidfile).st_mode & 0o777, 0o644)
                self.box.slay()
            self.assertIsNone(self.stranger.poll())

    def test_what_is_no_regular_file_is_refused(self) -> None:
        """A folder, a FIFO, a symlink, a hard link as pidfile: one clear line, no waiting."""
        target = self.box.write("target", self.theirs + "SECRET\n", 0o600)
        before, path = os.stat(target), self.box.path
        os.mkdir(path("folder"))
        os.mkfifo(path("fifo"))
        os.link(target, path("hardlink"))
        os.symlink(target, path("symlink"))
        os.symlink(path("nowhere"), path("dangling"))
        os.symlink("itself", path("itself"))
        for name in ("folder", "fifo", "hardlink", "dangling", "itself", "symlink"):
            self.box.pidfile = path(name)
            with self.subTest(name):
                said = self.box.start(*NAP, want=1).err
                self.assertRegex(said, "^daemonize: fatal: unable to .*" + name)
                if name in ("fifo", "symlink"):
                    results = [self.box.command(action, want=None) for action in ("status", "stop")]
                    self.assertEqual([result.code for result in results], [1, 0])
                    said += "".join(result.out + result.err for result in results)
                self.assertNotRegex(said, "Traceback|SECRET")
                self.assertIn("is a symbolic link" * (name == "symlink"), said)
        after = os.stat(target)
        self.assertEqual((read(target), after.st_mode, after.st_uid, after.st_mtime),
                         (self.theirs + "SECRET\n", before.st_mode, before.st_uid, before.st_mtime))
        self.assertFalse(os.path.exists(path("nowhere")))
        self.assertEqual((self.stranger.poll(), self.box.processes()), (None, [self.stranger.pid]))

    def test_a_pidfile_deleted_or_replaced_while_running_misleads_nobody(self) -> None:
        """The lock tells who it is; and who ends empties no pidfile that names somebody else."""
        for text, end in (("", 0), (self.theirs, 0), (self.theirs, signal.SIGTERM)):
            self.box.start(app=APP)
            pid = self.box.pid()
            if not end:
                remove(self.box.pidfile)
            if text:
                self.box.write("d.pid", text)
            self.box.command("status")
            self.assertIn("already running with pid %d" % pid, self.box.start(app=APP).out)
            if end:
                os.kill(pid, end)
                until(lambda: not is_alive(pid), "its end")
                self.assertEqual(read(self.box.pidfile), text)
            else:
                self.box.command("stop")
            self.assertEqual((is_alive(pid), self.stranger.poll()), (False, None))

    def test_the_same_pid_again_is_no_other_daemon(self) -> None:
        """A pidfile that names the very command (containers recycle pids) does not block it."""
        argv = self.starting(*NAP, app="")
        self.shell('echo $$ > "$0"; exec "$@"', *argv, zero=self.box.pidfile)
        self.box.command("status")

    def test_what_is_in_the_place_of_socket_or_lock_is_refused(self) -> None:
        """A folder: what is in it stays.  A lock that others can open they could hold."""
        self.box.make("d.pid.sock")
        precious = self.box.write("d.pid.sock/precious", "precious")
        for words in (r"(?m)^daemonize: fatal: unable to bind .*d\.pid\.sock: .+\n\Z",
                      r"d\.pid\.lock: others can read it"):
            self.assertRegex(self.box.start(app=APP, want=1).err, words)
            self.box.command("stop", want=None)
            self.assertEqual(read(precious), "precious")
            self.assertEqual(self.box.processes(), [self.stranger.pid])
            self.box.write("d.pid.lock", "{}", 0o644)

    def test_a_pid_is_never_half_written(self) -> None:
        """Over a longer text: who reads in between finds the new pid in the first line."""
        self.box.write("d.pid", "99999999999\n")
        said = self.box.python(
            "fd, real = os.open('d.pid', os.O_RDWR), os.ftruncate\ndef ftruncate(*to):\n"
            "    print(os.pread(fd, 9, 0).split()[:1])\n    real(*to)\nos.ftruncate = ftruncate\n"
            "daemonize.write_pidfile(fd, 77)").out
        self.assertEqual((said, read(self.box.pidfile)), ("[b'77']\n", "77\n"))

    def test_who_comes_second_writes_no_pid(self) -> None:
        """Somebody took the instance lock while our probe was at work: the pidfile is theirs."""
        mine, wait = "%d\n" % os.getpid(), self.box.write("wait", "")
        self.box.write("d.pid", mine)
        child = self.box.spawn(*self.starting(app=UNREADY + repr(wait)))
        until(lambda: "listening" in read(self.box.log), "a worker")
        with self.locked(1, fcntl.LOCK_SH):
            os.unlink(wait)
            self.assertEqual((child.wait(PATIENCE), read(self.box.pidfile)), (1, mine))
        self.assertIn("already running with pid " + mine, read(self.box.output))

    @needs_other_user
    def test_a_pidfile_of_roots_that_a_user_may_write(self) -> None:
        """Prepared by root for a user: taken as it is."""
        self.box.move("theirs", 0o755, NOBODY)
        self.box.write("theirs/d.pid", "", 0o666)
        self.box.start(*NAP, preexec_fn=drop(NOBODY), cwd="/")
        mode = os.stat(self.box.pidfile).st_mode & 0o777
        self.assertEqual((mode, bool(self.box.pid())), (0o666, True))


class Lock(CommandTest):
    """The lock decides who is the daemon"""
    SHORT = ["--timeout", "0.1", "--start-timeout", "0.1"]
    BUSY = "unable to lock .*: pid %d is still busy with it"

    def test_of_twenty_starts_at_once_one_wins(self) -> None:
        argv = [PYTHON, LEAN] + self.starting()[2:]
        starts = [self.box.spawn(*argv) for _ in range(20)]
        ends = [start.wait(PATIENCE) for start in starts]
        self.assertEqual(ends, [0] * 20, read(self.box.output))
        self.assertEqual(strays(self.box), [])
        others = read(self.box.output).count("already running with pid %d\n" % self.box.pid())
        self.assertEqual(others, 19)

    def test_after_SIGKILL_the_next_start_works_at_once(self) -> None:
        """Nothing is left on the port; no worker, no child with its own session, has the lock."""
        options = "--bind", "127.0.0.1:%d" % free_port(), "--workers", "2"
        ask(self.box.host(*options), "run own session")
        until(lambda: len(self.box.processes()) == 4, "a child")
        os.kill(self.box.pid(), signal.SIGKILL)
        address = self.box.host(*options)
        until(lambda: len(self.box.processes()) == 4, "the end of the old workers")
        self.assertEqual(ask(address)["pid"], self.box.pid())

    def test_a_command_that_waits_says_for_whom(self) -> None:
        """stop during a start waits for its turn, and then stops."""
        app = APP + "Server.probe = lambda self: time.sleep(600)\n"
        first = self.box.spawn(*self.starting(app=app))
        until(lambda: read(self.box.log), "the first word of the application")
        second = self.box.spawn(*self.box.argv("stop"))
        waits = "waiting for pid %d, " % first.pid
        until(lambda: waits in read(self.box.output), "whom it waits for")
        first.terminate()
        self.assertEqual((first.wait(PATIENCE), second.wait(PATIENCE)), (130, 0))
        self.assertEqual(self.box.processes(), [])

    def test_a_turn_that_never_comes_is_given_up(self) -> None:
        """A command, or a starter that undoes what it made, is busy: its pid is said."""
        self.box.start(*NAP)
        for action, byte, kind in (("stop", 0, fcntl.LOCK_EX), ("restart", 0, fcntl.LOCK_EX),
                                   ("stop", 2, fcntl.LOCK_SH)):
            with self.locked(byte, kind):
                argv = self.box.argv(action, *self.SHORT)[2:]
                said = self.patched("daemonize.TICK = 0.1", *argv, want=1).err
                self.assertRegex(said, self.BUSY % os.getpid())
                self.box.command("status")
        self.box.command("stop")

    @needs_other_user
    def test_root_that_is_busy_is_waited_for(self) -> None:
        """The turn of a user's own daemon, held by a command of root's: the user's wait, too."""
        self.box.move("theirs", 0o755, NOBODY)
        user: Any = {"preexec_fn": drop(NOBODY), "cwd": "/"}
        self.box.start(*NAP, **user)
        with self.locked(0):
            self.says(self.BUSY % os.getpid(), "stop", *self.SHORT, want=1, **user)

    @needs_linux
    def test_a_daemon_is_no_second_one(self) -> None:
        """Who finds the instance lock with another than its predecessor gives its own back."""
        self.box.write("d.pid.lock", "")
        with self.locked(1, fcntl.LOCK_SH):
            said = self.box.python(
                "for old in None, 1, int(sys.argv[1]):\n    fd = os.open('d.pid.lock', 0)\n"
                "    try: daemonize.take_instance(fd, old)\n"
                "    except daemonize.Fatal as error: print(error)\n"
                "    print(' %d ' % os.getpid() in open('/proc/locks').read())\n",
                str(os.getpid())).out
        refusal = "unable to start: already running with pid %d" % os.getpid()
        self.assertEqual(said.splitlines(), [refusal, "False", refusal, "False", "True"])

    def test_what_changes_between_two_looks(self) -> None:
        """Played: a daemon comes to its place, a start succeeds, or fails and tidies up."""
        self.box.start(app=APP)
        status, start = self.box.argv("status")[2:], self.starting(*NAP, app="")[2:]
        # status has seen no lock: the daemon that listens is no orphan for that.
        self.patched("real, seen = daemonize.lock_holder, []\ndaemonize.lock_holder = "
                     "lambda *args: real(*args) if seen else seen.append(1)\n"
                     "daemonize.Lock.record = lambda self: None", *status)
        # It had found no lock file, and is refused now: that file is another's, and stays.
        said = self.patched("real = daemonize.exists\ndaemonize.exists = "
                            "lambda path: path[-5:] != '.lock' and real(path)", *start, want=1).err
        self.assertIn("the name is held", said)
        self.box.command("status")
        self.box.command("stop")
        # The file is removed between our open(2) and our lock: we lock the new one.
        said = self.box.python(
            "import fcntl\nreal, gone = fcntl.lockf, []\ndef lockf(*words):\n"
            "    if not gone:\n        gone.append(os.unlink('d.pid.lock'))\n"
            "    return real(*words)\nfcntl.lockf = lockf\n"
            "with daemonize.Turn(daemonize.parse(['stop', '--pidfile', 'd.pid'])) as turn:\n"
            "    print(os.fstat(turn.fd).st_nlink, gone)").out
        self.assertEqual(said, "1 [None]\n")


import daemonize  # called in parts where no command can bring about what shall be seen

ME = NOBODY if ROOT else os.getuid()        # whose a daemon of AS_USER is


class DaemonTest(BoxTest):
    """What the subjects below share."""

    def app(self, text: str = "", name: str = "app.py") -> List[str]:
        """Return the options that host APP with this text, and log."""
        self.box.starts += 1        # see Box.start
        hosted = self.box.write(name, APP + text + "#" * self.box.starts)
        return ["--logfile", self.box.log, "--app", hosted]

    def calling(self, action: str, *options: str, **popen: Any) -> "subprocess.Popen[bytes]":
        """Call an action, and return at once."""
        return self.box.spawn(*self.box.argv(action, *options), **popen)

    def changed(self, hook: str, action: str, *options: str, **keys: Any) -> Result:
        """Run a command, in whose processes lines of Python have changed daemonize (`d`)."""
        code = ("import os, signal, sys\nsys.path.insert(0, %r)\nimport daemonize as d\n%s\n"
                "sys.exit(d.main(sys.argv[1:]))" % (HERE, hook))
        argv = [PYTHON, "-c", code, *self.box.argv(action, *options)[2:]]
        return run(argv, **dict(dict(env=self.box.env, cwd=self.box.folder), **keys))

    def plan(self, *options: str, hosted: Sequence[str] = ("--", "sleep", "600")) -> Any:
        """Return the plan of a start."""
        return daemonize.parse(["start", "--pidfile", self.box.pidfile, "--logfile", self.box.log,
                                *options, *hosted])

    def left_alone(self, count: int = 0) -> None:
        """Wait until the box has no other processes than so many."""
        until(lambda: len(self.box.processes()) == count, "the end of the others")

    def files(self) -> List[str]:
        """Return which files of the daemon there are."""
        return [name for name in os.listdir(self.box.folder) if name[:2] == "d."]


@needs_root
class Privilege(DaemonTest):
    """A daemon that root started for another user"""

    def low_port(self) -> int:
        """Return a free port that only root may bind."""
        for port in random.SystemRandom().sample(range(600, 1024), 424):    # others test, too
            with socket.socket() as sock, contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                return port
        raise unittest.SkipTest("needs a free port below 1024")

    def test_a_life_in_a_folder_that_only_root_may_enter(self) -> None:
        """It is the user and nothing else, on a low port; its files are whose they should be."""
        self.box.move("sealed", 0o700)
        options = [*AS_NOBODY, "--gid", str(OTHER), "--bind", "127.0.0.1:%d" % self.low_port()]
        said = self.box.start(
            *options, "--workers", "1", app=APP + "print('first byte', flush=True)\n",
            preexec_fn=lambda: os.setgroups([0, 4, 27]))
        address, user = self.box.address(said), pwd.getpwuid(NOBODY)
        rotation = r"(?m)^daemonize: warning: unable to rotate .*d\.log.*\ntry: --log-bytes 0"
        self.assertRegex(said.err, rotation)
        for action in ("status", "restart"):
            with self.subTest(action):
                self.assertIn("rotat", self.box.command("status").out)
                self.box.command(action)
                facts = ask(address)
                groups = sorted(os.getgrouplist(user.pw_name, OTHER))
                self.assertEqual((facts["uids"], facts["gids"], sorted(facts["groups"])),
                                 ([NOBODY] * 3, [OTHER] * 3, groups))
                self.assertEqual([facts["env"].get(name) for name in ("HOME", "USER", "LOGNAME")],
                                 [user.pw_dir, user.pw_name, user.pw_name])
                self.assertEqual((self.box.status()["uid"], facts["pid"], facts["can_be_root"]),
                                 (NOBODY, self.box.pid(), False))
                # Root's are pidfile and lock: no user leads a stop astray, or keeps it waiting.
                for name, uid, mode in (("d.pid", 0, 0o644), ("d.log", NOBODY, 0o640),
                                        ("d.pid.lock", 0, 0o600)):
                    info = os.stat(self.box.path("sealed", name))
                    self.assertEqual((info.st_uid, info.st_mode & 0o777), (uid, mode), name)
                ask(address, "print after " + action)
        self.assertRegex(said.out + read(self.box.log),
                         "(?s)first byte.*after status.*after restart")
        os.kill(self.box.pid(), signal.SIGTERM)
        self.left_alone()
        self.assertEqual(read(self.box.pidfile), "")
        self.box.command("status", want=3)
        self.stops()

    def test_whom_the_options_mean(self) -> None:
        """A name goes before a number, as for chown(1); groups are the user's in that group."""
        users = {name: pwd.struct_passwd((name, "x", uid, uid, "", "/home", ""))
                 for name, uid in (("4711", 1002), ("bin", 2), ("root", 0))}
        with mock.patch("pwd.getpwnam", users.__getitem__), \
                mock.patch("pwd.getpwuid",
                           {user.pw_uid: user for user in users.values()}.__getitem__), \
                mock.patch("os.getgrouplist", lambda name, gid: [gid, 7]):
            for user, group, identity in (
                    ("4711", None, (1002, 1002, "4711", "/home", [1002, 7])),
                    ("2", None, (2, 2, "bin", "/home", [2, 7])),
                    ("bin", "77", (2, 77, "bin", "/home", [77, 7])),
                    ("4712", "5", (4712, 5, "", "/", [5])),
                    (None, "77", (0, 77, "root", "/home", [77, 7])), (None, None, None)):
                with self.subTest(user, group=group):
                    self.assertEqual(daemonize.look_up_identity(user, group), identity)
            with self.assertRaisesRegex(daemonize.Fatal,
                                        "4712: no user has that number\ntry: --gid"):
                daemonize.look_up_identity("4712", None)

    def test_a_program_is_the_user_too(self) -> None:
        """By numbers that no database knows, and none of the caller's groups; root stays root."""
        for uid, gid, ids, said in (("54321", "54322", "id -u; id -G", "54321\n54322\n"),
                                    ("root", "root", "id -u; id -g", "0\n0\n")):
            with self.subTest(uid):
                self.box.start("--uid", uid, "--gid", gid, "--", "sh", "-c", ids + "; sleep 600",
                               preexec_fn=lambda: os.setgroups([0, 4, 27]))
                self.box.logged(said)
                self.box.command("stop")
                remove(self.box.log)

    def test_root_is_given_up_in_this_order_and_that_is_proved(self) -> None:
        """Groups, gid, uid; where setuid(0) still succeeds nothing starts."""
        calls: List[str] = []
        names = ("setgroups", "setresgid", "setresuid", "setgid", "setuid")
        for missing, order in (([], "setgroups setresgid setresuid setuid"),
                               (["setresuid"], "setgroups setgid setuid setuid")):
            spies: Any = {name: functools.partial(lambda name, *ids: calls.append(name), name)
                          for name in names}
            with self.subTest(order), mock.patch.multiple(os, **spies):
                for name in missing:
                    delattr(os, name)
                with self.assertRaisesRegex(daemonize.Fatal, r"root: setuid\(0\) still succeeds$"):
                    daemonize.switch_user(USER)
            self.assertEqual(" ".join(calls), order)
            calls.clear()


USER = daemonize.Identity(NOBODY, OTHER, "", "/", [OTHER])


@needs_root
class Chroot(DaemonTest):
    """--chroot: a jail without /dev/null, /etc/passwd and Python's library"""

    def test_the_whole_life_in_a_jail(self) -> None:
        """Files are outside; what a reload does not see in there needs a restart."""
        jail = self.box.make("jail")
        said = self.box.start("--chroot", jail, *AS_NOBODY, "--workers", "1",
                              app=APP + "Server.reload = lambda self: open('/users').close()\n")
        self.assertIn("d.log: it is outside the chroot\ntry: --log-bytes 0", said.err)
        address = self.box.address(said)
        self.assertIn("try: daemonize.py restart", self.box.command("reload", want=1).err)
        self.box.write("jail/users", "")
        for action in ("status", "restart", "reload"):
            with self.subTest(action):
                self.box.command(action)
                facts = ask(address)
                self.assertEqual((facts["root"], facts["cwd"], facts["uids"]),
                                 (["users"], "/", [NOBODY] * 3))
                self.assertNotIn("folder", facts["fds"].values())   # one would undo a jail
                daemon = "/proc/%d/" % self.box.pid()
                self.assertEqual(os.readlink(daemon + "root"), jail)
                self.assertEqual([fd for fd in os.listdir(daemon + "fd")
                                  if os.path.isdir(daemon + "fd/" + fd)], [])
                ask(address, "print jailed after " + action)
                self.assertIn("raw jailed after %s\n" % action, read(self.box.log))
        self.stops()
        self.assertEqual(os.listdir(jail), ["users"])

    def test_what_is_outside_is_looked_up_there(self) -> None:
        """--rundir, and the user's supplementary groups: the jail has no database of these."""
        member, gid = next(((group.gr_mem[0], group.gr_gid) for group in grp.getgrall()
                            if group.gr_mem), ("root", 0))
        jail, self.box.log = self.box.make("jail"), os.devnull
        facts = ask(self.box.host("--chroot", jail, "--rundir", self.box.make("jail/inner"),
                                  "--uid", member))
        self.assertEqual((facts["root"], facts["cwd"], gid in facts["groups"]),
                         (["inner"], "/inner", True))

    def test_a_program_that_the_jail_has_not_is_a_failed_start(self) -> None:
        """What is executed is the jail's /bin/sh."""
        said = self.box.start("--chroot", self.box.make("jail"), "--", "/bin/sh", "-c", "sleep 60",
                              want=1).err
        self.assertRegex(said, "(?m)^daemonize: fatal: unable to .*/bin/sh")
        self.assertEqual((self.box.processes(), read(self.box.pidfile)), ([], ""))


class Logfile(DaemonTest):
    """The log and its rotation"""

    def started(self, *options: str, app: str = "") -> str:
        """Start APP with its log in a folder that belongs to its user; return the address."""
        remove(self.box.path("logs"))
        self.box.move("logs", 0o755, NOBODY if ROOT else -1)
        self.box.pidfile = self.box.path("d.pid")
        return self.box.host(*AS_USER, *options, app=APP + app)

    def logs(self) -> List[str]:
        """Return the names of all logs."""
        return sorted(os.listdir(self.box.path("logs")))

    def nudge(self) -> None:
        """Have the daemon look at its log now: after its second answer it has done so."""
        with connect("unix:%s.sock" % self.box.pidfile) as control:
            for _ in range(2):
                control.sendall(b'{"event": "status"}\n')
                self.assertTrue(control.recv(65536))

    def test_rotation_by_size_loses_no_line(self) -> None:
        """Several workers and clients beyond --log-bytes: each line once across the files."""
        address = self.started("--log-bytes", "1000", "--log-keep", "50", "--workers", "2")
        words = ["line-%d" % number for number in range(150)]
        with meanwhile(self.nudge):
            threads(3, lambda client: [ask(address, "print " + word) for word in words[client::3]])
        until(lambda: len(self.logs()) > 1, "rotated logs")
        lines = [line for name in self.logs()
                 for line in read(self.box.path("logs", name)).splitlines()]
        self.assertEqual(sorted(line for line in lines if line.startswith("line-")), sorted(words))
        self.assertEqual({entry.stat().st_uid for entry in os.scandir(self.box.path("logs"))}, {ME})

    def test_as_many_as_log_keep_are_kept(self) -> None:
        """The last one is .1, the one before is .2, no older one; with 0 a full log is deleted."""
        for keep, begin in (("0", []), ("2", ["2 2", "1 1"])):
            with self.subTest(keep):
                address = self.started("--log-bytes", "1200", "--log-keep", keep)
                for number in range(3):
                    ask(address, "print " + "%d " % number * 350)   # twice: one alone fills no log
                    self.nudge()
                    self.assertLess(os.stat(self.box.log).st_size, 500)
                self.assertEqual(self.logs(), ["d.log", "d.log.1", "d.log.2"][:1 + int(keep)])
                self.assertEqual([read("%s.%d" % (self.box.log, n + 1))[:3]
                                  for n in range(int(keep))], begin)
                self.box.command("stop")

    def test_what_logrotate_does(self) -> None:
        """copytruncate leaves no hole; after a rename USR1, or a refused reload, opens it again."""
        address = self.started("--workers", "2", app="Server.reload = lambda self: 1 / 0\n")
        old = self.box.path("logs", "old.log")
        ask(address, "print " + "x" * 1000)
        os.truncate(self.box.log, 0)
        ask(address, "print at the beginning")
        self.assertEqual(read(self.box.log), "at the beginning\nraw at the beginning\n")

        def all_in_the_new_one() -> bool:
            size = len(read(old))
            for _ in range(12):
                ask(address, "print after")
            return len(read(old)) == size
        for reopen in (lambda: os.kill(self.box.pid(), signal.SIGUSR1),
                       lambda: self.box.command("reload", want=1)):
            os.rename(self.box.log, old)
            ask(address, "print before")
            reopen()
            until(lambda: os.path.exists(self.box.log), "a new log")
            self.assertIn("before\nraw before\n", read(old))
            until(all_in_the_new_one, "every worker writing to the new log")
            self.assertIn("after\nraw after\n", read(self.box.log))
            info = os.stat(self.box.log)
            self.assertEqual((info.st_mode & 0o777, info.st_uid), (0o640, ME))

    @needs_root
    def test_a_log_that_cannot_be_opened_again_goes_on(self) -> None:
        """In a root-only folder USR1 cannot open a new log: the old one is kept; that is said."""
        old = os.path.join(self.box.move("sealed", 0o700), "old.log")
        address = self.box.host(*AS_NOBODY)
        os.rename(self.box.log, old)
        os.kill(self.box.pid(), signal.SIGUSR1)
        until(lambda: re.search("(?i)unable to .*log", read(old)), "a word on it")
        ask(address, "print still")
        self.assertIn("still\n", read(old))

    @needs_root
    def test_a_log_on_a_full_disk_does_not_end_the_daemon(self) -> None:
        """It says so when it can again."""
        small = self.small_disk("64k")
        self.box.log = os.path.join(small, "d.log")
        address = self.box.host()
        self.fill(small)
        for _ in range(40):
            with contextlib.suppress(ValueError):   # no answer
                ask(address, "print " + "y" * 200)
        self.assertEqual(ask(address)["pid"], self.box.pid())
        self.box.command("status")
        os.unlink(os.path.join(small, "filler"))
        ask(address, "print again")
        self.assertIn("again\n", read(self.box.log))

    @needs_root
    def test_roots_reload_makes_the_log_where_the_user_may_not(self) -> None:
        """In /var/log: root's reload makes the file, the user's, and hands it over."""
        self.box.move("sealed")
        address = self.box.host(*AS_NOBODY, "--gid", str(OTHER), "--workers", "2")
        old = self.box.log + ".1"
        words, text = [], ""  # type: List[str], str

        def client() -> None:
            words.append("line-%d" % len(words))
            ask(address, "print " + words[-1])
        with meanwhile(client):
            for _ in range(3):
                os.rename(self.box.log, old)
                self.box.command("reload")
                text += read(old)
                info = os.stat(self.box.log)
                self.assertEqual((info.st_uid, info.st_gid, info.st_mode & 0o777),
                                 (NOBODY, OTHER, 0o640))
        text += read(self.box.log)
        self.assertEqual([text.count("raw %s\n" % word) for word in words], [1] * len(words))
        self.assertGreater(len(words), 5)

    def test_a_rotation_that_fails_is_said_and_tried_no_more(self) -> None:
        """A folder where the oldest log should go: the log grows on, status has the reason."""
        address = self.started("--log-bytes", "500", "--log-keep", "1")
        os.mkdir(self.box.path("logs", "d.log.1"))
        ask(address, "print " + "x" * 500)
        until(lambda: self.box.status()["log_rotation"], "the reason in status")
        self.assertIn("unable to rotate", self.box.status()["last_error"])
        ask(address, "print after")
        self.assertIn("after\n", read(self.box.log))

    def test_who_may_rotate(self) -> None:
        """Who has its place, a full log and no obstacle; not after a log that was not reopened."""
        service, renamed = daemonize.Service.__new__(daemonize.Service), []  # type: Any, List[Any]
        service.plan = self.plan("--log-bytes", "9", "--log-keep", "1")
        service.reopen = lambda fds: "not reopened"
        for service.is_owner, service.obstacle, size, count in (
                (False, "", 9, 0), (True, "obstacle", 9, 0), (True, "", 8, 0), (True, "", 9, 1)):
            with self.subTest(is_owner=service.is_owner, obstacle=service.obstacle, size=size), \
                    mock.patch("os.rename", lambda *names: renamed.append(names)), \
                    mock.patch("os.fstat", lambda fd: mock.Mock(st_size=size)):
                service.rotate()
                service.rotate()
                self.assertEqual(len(renamed), count)
        self.assertEqual(service.obstacle, "not reopened")


@needs_root
class HostileDaemon(DaemonTest):
    """An attacker with the daemon's uid owns the folder of its files; root does not suffer"""

    def setUp(self) -> None:
        super().setUp()
        self.box.move("theirs", 0o755, NOBODY)
        self.precious = self.box.write("precious", "precious\n", 0o600)
        self.before = os.stat(self.precious)
        self.stranger = self.box.spawn("sleep", "600")  # root's

    def tearDown(self) -> None:
        """Whatever happened: root's file and root's process are as they were."""
        after = os.stat(self.precious)
        self.assertEqual(read(self.precious), "precious\n")
        self.assertEqual((after.st_mode, after.st_uid, after.st_nlink, after.st_ino),
                         (self.before.st_mode, self.before.st_uid, 1, self.before.st_ino))
        self.assertIsNone(self.stranger.poll(), "root's process was signalled")

    def as_nobody(self, function: Callable[[], Any]) -> int:
        """Run it in a child of uid NOBODY, which stays until the test ends; return its pid."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reader)
                drop(NOBODY)()
                function()
                os.write(writer, b"x")
                signal.pause()
            finally:
                os._exit(1)
        os.close(writer)
        self.addCleanup(os.waitpid, child, 0)
        self.addCleanup(os.kill, child, signal.SIGKILL)
        self.assertEqual(os.read(reader, 1), b"x", "the attacker failed")
        os.close(reader)
        return child

    def replace(self, make: Callable[[str], Any], *names: str) -> None:
        """Let NOBODY replace files of its folder."""
        def swap() -> None:
            for path in (self.box.path("theirs", name) for name in names):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                make(path)
        self.as_nobody(swap)

    def all_commands(self, *actions: str) -> List[Result]:
        """Run commands with any exit status; none may wait long, crash, or print raw bytes."""
        results = []
        extra = {"start": [*AS_NOBODY, *self.app()],
                 "stop": ["--timeout", "0.5"], "restart": ["--timeout", "0.5"]}
        for action in actions or ("status", "reload", "restart", "status", "stop", "start", "stop"):
            results.append(self.box.command(action, *extra.get(action, []), want=None))
            self.assertNotIn("Traceback", results[-1].err, action)
            self.assertNotIn("\x1b", results[-1].out + results[-1].err, action)
            self.assertLess(results[-1].seconds, 12, action)
        return results

    def test_only_a_way_that_nobody_else_could_change_is_trusted(self) -> None:
        """The pidfile's folder may be the user's, but not its way: in /tmp it could be moved."""
        for name, mode, owner in (
                ("plain", 0o755, 0), ("group", 0o775, 0), ("others", 0o757, 0),
                ("sticky", 0o1777, 0),
                ("theirs/sub", 0o755, 0), ("group/sub", 0o755, 0), ("sticky/sub", 0o755, 0),
                ("sticky/theirs", 0o755, NOBODY), ("group/theirs", 0o755, NOBODY)):
            self.box.make(name, mode, owner)
        for name, target, owner in (("good", "plain", 0), ("bad", "plain", NOBODY),
                                    ("group/bad", "../plain", 0),
                                    ("to-group", "group/sub", 0), ("to-theirs", "theirs", 0)):
            os.symlink(target, self.box.path(name))
            os.lchown(self.box.path(name), owner, owner)
        for name, is_trusted, is_accepted in (
                ("plain", True, True), ("good", True, True), ("sticky", True, True),
                ("sticky/sub", True, True),
                ("theirs", False, True), ("group", False, True), ("others", False, True),
                ("theirs/sub", False, False), ("sticky/theirs", False, False),
                ("group/theirs", False, False),
                ("group/sub", False, False), ("bad", False, False), ("group/bad", False, False),
                ("to-group", False, False), ("to-theirs", False, False)):
            with self.subTest(name):
                self.assertEqual(daemonize.is_trusted(self.box.path(name)), is_trusted)
                try:
                    daemonize.check_folder(self.box.path(name))
                    self.assertTrue(is_accepted)
                except daemonize.Fatal as error:
                    self.assertEqual(("unable to trust" in str(error), is_accepted), (True, False))
        self.box.pidfile = self.box.path("sticky", "theirs", "d.pid")
        self.assertIn("unable to trust", self.box.start(*AS_NOBODY, app=APP, want=1).err)
        self.assertEqual(os.listdir(self.box.path("sticky", "theirs")), [])

    def test_a_file_that_is_another_users_is_not_opened(self) -> None:
        """Or root's, and moved here, or a log behind a linked folder: refused, and as it was."""
        self.box.make("sticky", 0o1777)
        sealed = self.box.make("sealed", 0o700)
        self.replace(lambda path: os.symlink(sealed, path), "logs")

        def open_log(path: str) -> int:
            return int(daemonize.open_log(path, USER))

        def open_lock(path: str) -> int:
            return int(daemonize.open_regular(path, os.O_RDWR, daemonize.PRIVATE))
        pidfile_owner = "it belongs to uid %d\ntry: as that user, or another --pidfile" % NOBODY
        log_owner = "it belongs to uid %d\ntry: another --logfile" % OTHER
        for name, text, mode, owner, open_it, why in (
                ("theirs/d.pid", "", 0o644, NOBODY, daemonize.open_pidfile, pidfile_owner),
                ("theirs/d.pid.lock", "", 0o600, NOBODY, open_lock, pidfile_owner),
                ("theirs/d.pid.lock", "", 0o640, 0, open_lock, "others can read it"),
                ("theirs/d.log", "", 0o666, OTHER, open_log, log_owner),
                ("sticky/d.log", "", 0o666, OTHER, open_log, log_owner),
                ("theirs/d.pid", "root:x:0\n", 0o600, 0, daemonize.open_pidfile,
                 "it is no pidfile"),
                ("theirs/d.pid", "1\n" * 40, 0o600, 0, daemonize.open_pidfile, "it is no pidfile")):
            path = self.box.write(name, text, mode, owner)
            with self.subTest(name, text=text, why=why):
                self.assertRaisesRegex(daemonize.Fatal, why, open_it, path)
                self.assertEqual((read(path), os.stat(path).st_mode & 0o777), (text, mode))
        with self.assertRaisesRegex(daemonize.Fatal, "Permission denied"):
            open_log(self.box.path("theirs", "logs", "d.log"))
        self.assertEqual(os.listdir(sealed), [])
        # Only what root has made changes its owner; a pidfile that another tool made its mode.
        fds = [open_log(self.box.write("old.log", "", 0o640)), open_log(self.box.path("new.log")),
               daemonize.open_pidfile(self.box.write("old.pid", "77\n", 0o600)),
               daemonize.open_pidfile(self.box.write("odd.pid", "words\n", 0o644))]
        facts = [(info.st_uid, info.st_gid, info.st_mode & 0o777) for info in map(os.fstat, fds)]
        self.assertEqual(facts, [(0, 0, 0o640), (NOBODY, OTHER, 0o640)] + [(0, 0, 0o644)] * 2)
        for fd in fds:
            os.close(fd)

    def test_odd_files_in_the_place_of_ours(self) -> None:
        """The pid of root's process, a link to root's file, FIFOs: not believed, not waited for."""
        pid = self.box.write("pid", "%d\n" % self.stranger.pid)

        def link(path: str) -> None:
            os.symlink(self.precious, path)
        for make, *names in ((lambda path: shutil.copy(pid, path), "d.pid"), (link, "d.pid"),
                             (link, "d.log"),
                             (os.mkfifo, "d.pid", "d.log", "d.pid.lock", "d.pid.sock")):
            with self.subTest(make, names=names):
                self.replace(make, *names)
                self.all_commands("start", "status", "stop")
                self.replace(lambda path: None, *names)
                self.box.host(*AS_NOBODY)
                daemon = self.box.pid()
                self.replace(make, *names)
                os.kill(daemon, signal.SIGUSR1)
                self.all_commands()
                self.replace(lambda path: None, *names)

    def test_a_lock_held_by_the_attacker_does_not_stop_root(self) -> None:
        """The user locks every file that it can open: root's commands end in time and say whom."""
        self.box.host(*AS_NOBODY)

        def lock_all() -> None:
            for name in os.listdir(self.box.path("theirs")):
                for mode, kind in ((os.O_RDWR, fcntl.LOCK_EX), (os.O_RDONLY, fcntl.LOCK_SH)):
                    with contextlib.suppress(OSError):
                        fd = os.open(self.box.path("theirs", name), mode | os.O_NONBLOCK)
                        fcntl.flock(fd, kind | fcntl.LOCK_NB)
                        fcntl.lockf(fd, kind | fcntl.LOCK_NB)
        self.as_nobody(lock_all)
        self.box.command("status")
        self.assertIn("try: ", self.box.command("restart", want=1).err)  # options from there: never
        self.box.command("restart", *AS_NOBODY, *self.app())
        self.box.command("stop")
        self.assertEqual(self.box.processes(), [self.stranger.pid])

    def test_options_planted_in_the_lock_file_are_not_obeyed(self) -> None:
        """What restart repeats is read only in folders of root's: never in the attacker's."""
        self.box.host(*AS_NOBODY)
        executed, text = self.box.path("executed"), read(self.box.pidfile + ".lock")
        self.box.write("evil.py", APP + "open(%r, 'w').close()\n" % executed)
        self.assertIn("app.py", text, "the lock file tells the last start's options")

        def plant(path: str) -> None:
            with open(path, "w") as file:
                file.write(text.replace("app.py", "evil.py").replace(str(NOBODY), "0"))
            os.chmod(path, 0o600)
        for actions in (["restart", "stop"], ["restart", "status", "stop"]):
            self.replace(plant, "d.pid.lock")
            self.all_commands(*actions)
        self.assertFalse(os.path.exists(executed))

    def test_who_listens_on_the_control_socket_in_its_place_is_not_asked(self) -> None:
        """Whatever that one says, the commands end, stop stops, and the next start starts."""
        self.box.host(*AS_NOBODY)
        pid, attack = self.box.pid(), USURPER + "usurp(%r)\n" % self.box.path("theirs")
        self.as_nobody(lambda: exec(attack, {}))
        said = self.all_commands("status", "reload", "restart", "stop")[0].out
        self.assertIn("unable to ask it: another process listens there", said)
        self.assertFalse(is_alive(pid))
        os.unlink(self.box.pidfile + ".lock")
        self.box.command("status", want=3)
        self.box.host(*AS_NOBODY)

    def test_what_a_failed_start_finds_behind_a_link_is_roots(self) -> None:
        """The log's folder became a link during bind: no log there is removed, or shown."""
        for text in ("", "TOP SECRET\n"):
            logs = self.box.move("theirs/logs", 0o755, NOBODY)
            sealed, self.box.pidfile = self.box.make("sealed" + text[:1],
                                                     0o700), self.box.path("d.pid")
            victim = self.box.write(os.path.join(sealed, "d.log"), text, 0o600)
            app = APP + """
import shutil
def bind(options):
    shutil.rmtree(%r)
    os.symlink(%r, %r)
    sys.exit("on purpose")
""" % (logs, sealed, logs)
            said = self.box.start(*AS_NOBODY, app=app, want=1).err
            with self.subTest(text):
                self.assertEqual(("on purpose" in said, "SECRET" in said), (True, False))
                self.assertEqual((os.path.exists(victim), read(victim)), (True, text))
            os.unlink(logs)

    def test_a_daemon_that_was_taken_over_is_replaced(self) -> None:
        """It says and hands over what it likes, holds the turn by its own fd: bounded."""
        order = self.box.path("theirs", "order")
        self.box.start(*AS_NOBODY, app=APP + USURPER + TAKEN_OVER
                       % (order, order, self.box.path("theirs")))
        self.box.write(order, "")
        self.box.command("status")
        self.assertFalse(os.path.exists(order), "nobody obeyed")
        pid = self.box.pid()
        self.all_commands("status")
        said = self.changed("d.ANSWER = 0.5", "restart", "--logfile", self.box.log, *AS_NOBODY,
                            "--app", "app.py", "--timeout", "0.3", want=0).err
        for warning in ("no command, holds the turn", "(hands nothing over|did not drain)"):
            self.assertRegex(said, r"warning: pid %d,? %s" % (pid, warning))
        self.assertNotIn("Traceback", said)
        self.assertFalse(is_alive(pid))
        self.all_commands("stop")
        self.assertEqual(self.box.processes(), [self.stranger.pid])

    def ids(self) -> List[Any]:
        """Return the ids of this process, as JSON has them."""
        return [list(os.getresuid()), list(os.getresgid()), os.getgroups()]

    def test_root_acts_as_the_user_in_each_id_and_then_no_more(self) -> None:
        """Effective ids for the user's files, and root's again; all three for a signal."""
        self.addCleanup(os.setgroups, os.getgroups())
        os.setgroups([0, 4, 27])
        with daemonize.acting_as(USER):
            acting = self.ids()
        self.assertEqual(acting, [[0, NOBODY, 0], [0, OTHER, 0], [OTHER]])
        self.assertEqual(self.ids(), [[0] * 3, [0] * 3, [0, 4, 27]])
        with tempfile.TemporaryFile("w+") as said:
            daemonize.as_user(USER, lambda: print(json.dumps(self.ids()), file=said, flush=True))
            said.seek(0)
            self.assertEqual(json.load(said), [[NOBODY] * 3, [OTHER] * 3, [OTHER]])

    def test_who_is_signalled(self) -> None:
        """As the user, and only who holds the lock, and was born as it was when that was proved."""
        target, sent = self.as_nobody(int), tempfile.TemporaryFile("w+", 1)
        self.addCleanup(sent.close)

        def spy(*arguments: int) -> None:
            print(self.ids()[0], *arguments, file=sent)
        for holder, birth, has_pidfd, number in ((target, "", True, 2), (target, "", False, 2),
                                                 (target, "other", False, 0), (None, "", True, 0)):
            lock = mock.Mock(holder=lambda: holder, record=lambda: None)
            opened = daemonize.pidfd_open if has_pidfd else None
            with self.subTest(holder=holder, birth=birth, has_pidfd=has_pidfd), \
                    mock.patch.object(daemonize, "pidfd_open", opened), mock.patch("os.kill",
                                                                                   spy), \
                    mock.patch.object(daemonize, "pidfd_send_signal", spy):
                one = daemonize.Target(lock, target)
                one.birth = birth or one.birth
                sent.truncate(0)
                one.send(15)
                one.send_all(9)
                sent.seek(0)
                self.assertEqual(sent.read().count(str([NOBODY] * 3)), number)
                self.assertEqual(len(one.members()), 1 if number else 0)
        # Root's own process gets none of the user's; and that nobody is left to get it is as good.
        self.assertRaises(PermissionError, daemonize.as_user, USER,
                          lambda: os.kill(self.stranger.pid, 15))
        for user in (USER, None):
            daemonize.as_user(user, mock.Mock(side_effect=ProcessLookupError(errno.ESRCH, "gone")))

    def test_a_stranger_who_reaches_the_control_socket_is_hung_up(self) -> None:
        """Where the socket's mode keeps nobody out (older BSDs): for root and its user alone."""
        self.box.host(*AS_NOBODY)
        os.chmod(self.box.pidfile + ".sock", 0o666)
        for uid, heard in ((OTHER, b""), (NOBODY, b"{"), (0, b"{")):
            self.addCleanup(os.seteuid, 0)
            os.seteuid(uid)
            with self.subTest(uid), connect("unix:%s.sock" % self.box.pidfile) as end:
                os.seteuid(0)
                if heard:
                    end.sendall(b'{"event": "status"}\n')
                self.assertEqual(end.recv(1), heard)


# Of a script; with two blanks to fill: the folder of daemonize.py, and what startstop() gets.
SCRIPT = """
import os, sys, time
sys.path.insert(0, %r)
from daemonize import startstop
startstop(%s)
"""

# A part of APP, or what another process executes: it listens in place of a daemon's control socket.
USURPER = r'''
import array, contextlib, fcntl, os, socket, threading


def talk(peer):
    fds = array.array("i", [peer.fileno()] * 9 + [0] * 191)
    said = b'{"event": "sockets", "said": "\x1b[31m", "addresses": ["\\u001b]0;x"]}\n'
    said += b"\x1b[2J\x00{]" * 4096
    with contextlib.suppress(OSError), peer:
        while True:
            peer.sendmsg([said], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def usurp(folder):
    os.chdir(folder)
    path, = [name for name in os.listdir(".") if name.endswith(".sock")]
    os.unlink(path)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(16)

    def serve():
        while True:
            threading.Thread(target=talk, args=(server.accept()[0],), daemon=True).start()
    threading.Thread(target=serve, daemon=True).start()
'''
TAKEN_OVER = r'''
def status(self, well=Server.status):
    if os.path.exists(%r):
        os.unlink(%r)
        lock, = [fd for fd, name in descriptors().items() if name.endswith(".lock")]
        fcntl.lockf(lock, fcntl.LOCK_SH, 1, 0)
        usurp(%r)
    return well(self)
Server.status = status
'''


class Channels(unittest.TestCase):
    """What two processes say to one another: the other end may lie, or be dead"""

    def pair(self) -> Tuple[Any, socket.socket]:
        """Return a channel, and the socket at its other end."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            self.addCleanup(end.close)
        return daemonize.Channel(ours), theirs

    def test_what_is_heard(self) -> None:
        """A line of JSON that has an event; for anything else, and too much of it, the end."""
        late = daemonize.LATE
        for octets, event in (
                (b'{"event": "x"}\n', "x"), (b'{"event": "x"}\n{"event": "y"}\n', "x"),
                (b'{"eve', late),
                (b'{"event": 7}\n', ""), (b'["event"]\n', ""), (b'"event"\n', ""), (b"{}\n", ""),
                (b"\xff\n", ""), (b"[" * 60000 + b"\n", ""), (b"x" * 70000, ""),
                (b"x" * 60000, late),
                (b'{"event": "\\u0000late"}\n', late)):
            channel, end = self.pair()
            with self.subTest(octets[:30]):
                end.sendall(octets)
                self.assertEqual(channel.receive(0)["event"], event)
        for is_reset in (False, True):
            channel, end = self.pair()
            if is_reset:
                channel.tell("x")
            end.close()     # with something unread, or not
            self.assertEqual((channel.receive(0)["event"], channel.tell("y")), ("", False))

    def test_what_comes_along(self) -> None:
        """Descriptors, which no program that another thread executes gets; not too many."""
        for number, event in ((0, daemonize.LATE), (24, daemonize.LATE), (25, "")):
            channel, end = self.pair()
            for count in (40, number):
                fds = array.array("i", [0] * count)
                end.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if count else [])
            with self.subTest(number):
                self.assertEqual(channel.receive(0)["event"], event)
                self.assertEqual({os.get_inheritable(fd) for fd in channel.fds}, {False})
            for fd in channel.fds:
                os.close(fd)

    def test_a_failure_that_is_told_has_the_status_of_a_failure(self) -> None:
        """Who says "fatal" may have been taken over: 1, or 2 for usage.  A long trace arrives."""
        for status, want in ((0, 1), (1, 1), (2, 2), (3, 1), (130, 1), ("2", 1), (None, 1)):
            said = daemonize.failure(mock.Mock(), {"event": "fatal", "text": "why", "status": status})
            self.assertEqual((said.status, str(said)), (want, "why"))
        channel, end = self.pair()
        channel.fail(daemonize.Fatal("why", trace="\x01" * 100000 + "end"))
        heard = daemonize.Channel(end).receive(0)
        self.assertEqual((heard["event"], heard["text"], heard["trace"][-3:]),
                         ("fatal", "why", "end"))
        self.assertIn("the command that asked for it is gone",
                      str(daemonize.failure(channel, {"event": ""})))

    def test_how_a_child_ends(self) -> None:
        """With what it said of it: that is heard once, its end again and again."""
        def leave(code: Any) -> Callable[[Any], None]:
            return lambda channel: sys.exit(code)
        for life, result, event, text in (
                (leave(3), 3, "", None), (leave(0), 0, "", None), (leave(None), 0, "", None),
                (str, 0, "", None), (leave("why"), 1, "fatal", "why"),
                (lambda channel: 1 / 0, 1, "fatal",
                 "unable to start: ZeroDivisionError: division by zero")):
            with self.subTest(result, text=text), mock.patch.object(daemonize, "log"):
                child = daemonize.fork(life)
                heard = child.receive(SOON)
                self.assertEqual((heard["event"], heard.get("text")), (event, text))
                self.assertEqual([child.wait(), child.wait()], [result << 8] * 2)
                child.kill()                    # nobody, by now
                self.assertEqual(child.fileno(), -1)

    def test_who_hung_up_and_goes_on_is_killed(self) -> None:
        """Who else has to go on is watched, and all have one deadline."""
        def hang_up(channel: Any) -> None:
            channel.end.close()
            signal.pause()
        child = daemonize.fork(hang_up)
        with self.assertRaisesRegex(daemonize.Fatal,
                                    "it was killed by signal 9 before it was ready"):
            daemonize.expect([child], "able", PATIENCE)
        (one, end), (other, end2) = self.pair(), self.pair()
        end.sendall(b'{"event": "able", "pid": 7}\n')
        self.assertEqual(daemonize.expect([one], "able", PATIENCE, [other])["pid"], 7)
        self.assertRaisesRegex(daemonize.Fatal, "not ready", daemonize.expect, [one], "able", 0)
        end2.close()
        self.assertRaisesRegex(daemonize.Fatal, "is gone", daemonize.expect, [], "able", 0, [other])
        end.sendall(b'{"event": "no"}\n')
        self.assertRaisesRegex(daemonize.Fatal, "is gone", daemonize.expect, [one], "able",
                               PATIENCE)

    def test_who_talks_without_end_is_heard_no_longer(self) -> None:
        """Words that nobody waits for do not renew the deadline of the one that is waited for."""
        def talk(channel: Any) -> None:
            while channel.tell("noise"):
                select.select([], [], [], 0.02)
        child, began = daemonize.fork(talk), time.monotonic()
        self.assertEqual(child.hear("word", 0.2), daemonize.LATE)
        self.assertLess(time.monotonic() - began, 2)
        child.kill()

    def test_a_fork_has_no_moment_with_its_parents_handlers(self) -> None:
        """Blocked while it forks; then parent and child get them, each by handlers of its own."""
        fork, seen = os.fork, []

        def blocked() -> int:
            return len(daemonize.HANDLED & signal.pthread_sigmask(signal.SIG_BLOCK, []))
        self.addCleanup(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, print))

        def spied() -> int:
            seen.append(blocked())
            return fork()
        with mock.patch("os.fork", spied):
            child = daemonize.fork(lambda channel: channel.tell(
                "seen", blocked=blocked(),
                reset=signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL))
        seen.append(blocked())
        self.assertEqual(seen, [len(daemonize.HANDLED), 0])
        self.assertEqual(child.receive(SOON), {"event": "seen", "blocked": 0, "reset": True})
        child.wait()


class Workers(DaemonTest):
    """--workers: processes that the daemon keeps alive"""

    def test_as_many_as_the_application_wants(self) -> None:
        """Each of them serves; one that dies is replaced, and the daemon's pid stays."""
        address, seen = self.box.host(app=APP
                                      + "Server.workers = 2\n"), set()  # type: Any, Set[int]
        pid = self.box.pid()

        def both() -> bool:
            with connect(address) as slow:
                slow.sendall(b"sleep 0.05\n")
                seen.add(ask(address)["worker"])
            return len(seen) == 2
        for _ in range(2):
            until(both, "answers of both workers")
            self.assertEqual((seen | {pid}, seen),
                             (set(self.box.processes()), set(self.box.status()["workers"])))
            old = seen.pop()
            os.kill(old, signal.SIGKILL)
            until(lambda: {old} | seen != set(self.box.status()["workers"]) >= seen, "a new worker")
            self.assertIn(" %d was killed by signal 9" % old, read(self.box.log))
        self.assertEqual((self.box.pid(), ask(address)["pid"]), (pid, pid))

    def test_a_pause_is_for_who_dies_young(self) -> None:
        """It doubles, up to 30 s; none after SIGKILL, from outside, or a second of life."""
        host, child, pauses = daemonize.Host.__new__(daemonize.Host), mock.Mock(pid=7), []
        vars(host).update(plan=self.plan(), pause=0, complain=len, is_over=False)
        with mock.patch("time.monotonic", lambda: 100.0):
            deaths = [(1 << 8, 0)] * 3 + [(15, 0), (9, 0), (0, 0), (1 << 8, 2)] + [(11, 0.9)] * 10
            for status, age in deaths:
                child.born = 100 - age
                host.on_death(child, status)
                pauses.append(round(host.next_start - 100, 1))
        self.assertEqual(pauses, [0.1, 0.2, 0.4, 0.8, 0, 0.1, 0,
                                  0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30])

    def test_nobody_is_started_before_the_pause_is_over(self) -> None:
        """A worker, a program; one that cannot be started is tried after 30 s."""
        for kind, error, times in ((daemonize.Service, None, [100, 101, 129, 130]),
                                   (daemonize.Service, OSError(), [100, 101, 129, 130]),
                                   (daemonize.Program, OSError(), [100, 130])):
            host, tries = kind.__new__(kind), []  # type: Any, List[float]

            def spawn() -> None:
                tries.append(time.monotonic())
                if error:
                    raise error
            vars(host).update(plan=self.plan(), size=1, leaving=[], is_over=False, is_owner=False,
                              restarts=0, next_start=100, spawn=spawn, rest=list)
            for now in (99, 100, 101, 129, 130):
                host.children = []
                with mock.patch("time.monotonic", lambda: now), contextlib.suppress(OSError):
                    host.tend()
            self.assertEqual((tries, host.restarts), (times, 0 if error else len(times)))
            for is_over, size in ((False, 0), (True, 1)):       # it leaves; all are told to end
                host.children, host.size, host.is_over, host.next_start = [], size, is_over, 0
                host.tend()
                self.assertEqual(len(tries), len(times))

    def test_a_fresh_worker(self) -> None:
        """The old one's last word is in the log, without a line's end, too; signals are its own."""
        address = self.box.host("--workers", "1", app=APP + """
well = Server.serve_forever
def serve(self):
    well(self)
    print("last word", end="")
Server.serve_forever = serve
""")
        self.box.command("reload")
        self.box.logged("last word")
        worker = ask(address)["worker"]
        for number in (signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker, number)
        self.assertEqual(ask(address)["worker"], worker)
        self.assertNotIn("wakeup", read(self.box.log))

    def test_a_second_TERM_does_not_cut_the_end_short(self) -> None:
        """Told twice, and by SIGINT: each `finally` of the application comes to its end."""
        self.box.start("--workers", "1", app=APP + """
def serve(self):
    try:
        time.sleep(600)
    finally:
        print("ending", flush=True)
        time.sleep(0.3)
        print("cleaned", flush=True)
Server.serve_forever = serve
""")
        worker, = self.box.status()["workers"]
        os.kill(worker, signal.SIGTERM)
        self.box.logged("ending")
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
        self.box.logged("cleaned")

    def test_without_a_probe_workers_that_enter_are_ready(self) -> None:
        """When serve_forever raises, or returns, that is a failed start, and told at once."""
        app = APP + "del Server.probe\n"
        self.assertEqual(ask(self.box.host("--workers", "2", app=app))["pid"], self.box.pid())
        self.box.command("stop")
        for workers, body, said in (("1", "never_defined()", "never_defined"),
                                    ("2", "never_defined()", "never_defined"),
                                    ("1", "None", "it exited with status 0 before it was ready")):
            with self.subTest(body, workers=workers):
                result = self.box.start("--workers", workers, want=1,
                                        app=app + "Server.serve_forever = lambda self: %s\n" % body)
                self.assertIn(said, result.err)
                self.assertLess(result.seconds, SOON)
                self.assertEqual((self.box.processes(), read(self.box.pidfile)), ([], ""))

    def test_a_worker_that_does_not_drain_is_killed(self) -> None:
        """After a reload the old worker has --timeout seconds for its last answer."""
        address = self.box.host("--workers", "1", "--timeout", "0.4")
        old = ask(address)["worker"]
        with connect(address) as sock:
            sock.sendall(b"sleep 600\n")
            self.box.command("reload")
            until(lambda: not is_alive(old), "the end of the old worker", SOON)
        self.assertNotEqual(ask(address)["worker"], old)


RECIPE = r'''
import os, signal, subprocess, sys, threading, time
sys.path.insert(0, %(home)r)
from daemonize import startstop

SIGTERM_SENT = False


def sigterm_handler(signum, frame):
    print("SIGTERM handler.  Shutting Down.", file=sys.stderr, flush=True)
    global SIGTERM_SENT
    if not SIGTERM_SENT:
        SIGTERM_SENT = True
        print("Sending TERM to PG", file=sys.stderr, flush=True)
        os.killpg(0, signal.SIGTERM)
    sys.exit()


def work():
    subprocess.Popen(["sleep", "6000"]).communicate()


def main():
    %(setsid)s
    %(handler)s
    threading.Thread(target=work, daemon=True).start()
    print("main", os.getpid(), os.getpgrp(), os.getsid(0), os.getcwd(), flush=True)
    while True:
        work()


if __name__ == "__main__":
    startstop(%(arguments)s)
    main()
'''
FREE_SCRIPT = '''
os.fstat(before)
if not os.fork():
    sys.exit()
os.wait()
%s
fds = [os.open("data%%d" %% n, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for n in range(12)]
for fd in fds:
    os.write(fd, b"%%d\\n" %% os.getpid())
print("open", flush=True)
while not os.path.exists("end"):
    time.sleep(0.01)
'''


class Library(DaemonTest):
    """startstop(...): the third article's recipe on Python 3"""

    def setUp(self) -> None:
        super().setUp()
        self.box.pidfile, self.box.log = self.box.path("pid.txt"), self.box.path("out.log")

    def recipe(self, setsid: str = "os.setsid()",
               arguments: str = "stdout='out.log', stderr='err.log'",
               handler: str = "signal.signal(signal.SIGTERM, sigterm_handler)") -> None:
        """Write the recipe in one of its forms."""
        self.box.write("recipe.py", RECIPE % {
            "home": HERE, "setsid": setsid, "handler": handler, "arguments": arguments})

    def script(self, text: str, arguments: str = "stdout='out.log'") -> None:
        """Write a recipe of one's own, which works in the box's folder."""
        opened = "before = os.pipe()[1]\nos.set_inheritable(before, True)\nstartstop("
        begin = (SCRIPT % (HERE, arguments)).replace("startstop(", opened)
        self.box.write("recipe.py", begin + "os.chdir(%r)\n%s" % (self.box.folder, text))

    def action(self, *argv: str, want: Optional[int] = 0, **popen: Any) -> Result:
        """Run recipe.py with an action."""
        return run([PYTHON, "recipe.py", *argv], want, env=self.box.env, cwd=self.box.folder,
                   **popen)

    def test_start_and_stop_in_its_three_forms(self) -> None:
        """With os.setsid() in main, without it, without a handler of TERM or (reload) of HUP."""
        errors, guard = self.box.path("err.log"), "signal.signal(signal.SIGTERM, sigterm_handler)"
        hup = guard + "; signal.signal(signal.SIGHUP, lambda *_: print('hup', flush=True))"
        for setsid, handler in (("os.setsid()", hup), ("pass", guard), ("pass", "pass")):
            with self.subTest(setsid=setsid, handler=handler):
                self.recipe(setsid, handler=handler)
                said = "".join(self.action("start")[1:3])
                self.left_alone(3)      # with two sleeping children
                self.assertIn("started with pid %d\n" % self.box.pid(), said + read(errors))
                self.assertNotIn("running", said)
                self.action("reload", want=int(handler != hup))
                self.action("status")
                self.assertLess(self.action("stop").seconds, SOON)
                self.assertEqual((self.box.processes(), os.path.exists(self.box.pidfile)),
                                 ([], False))
                self.assertEqual(read(errors).count("Sending TERM to PG"), int(handler != "pass"))
                os.unlink(errors)
        self.assertIn("hup\n", read(self.box.log))

    def test_start_with_closed_streams_does_no_harm(self) -> None:
        """With fds 0, 1 and 2 closed it starts as ever; no file can be written by others."""
        self.recipe()
        run(["sh", "-c", 'exec "$0" recipe.py start <&- >&- 2>&-', PYTHON], 0, env=self.box.env,
            cwd=self.box.folder)
        self.assertRegex(read(self.box.pidfile), r"\A\d+\n\Z")
        modes = {name: os.lstat(self.box.path(name)).st_mode
                 for name in os.listdir(self.box.folder)}
        self.assertEqual([name for name, mode in modes.items() if mode & 0o022], [])
        self.assertEqual(modes["pid.txt"] & 0o777, 0o644)
        self.action("stop")

    @needs_other_user
    def test_status_that_cannot_know_is_4(self) -> None:
        """Another user's status of root's daemon is neither 0 nor 1."""
        self.recipe()
        self.action("start")
        self.action("status", want=4, preexec_fn=drop(NOBODY))

    def test_paths_are_relative_to_the_caller(self) -> None:
        """The default pid.txt lies where start was called; stop finds it there."""
        self.recipe(arguments="stdout='out.log'")
        self.action("start")
        self.box.logged("main %d" % self.box.pid())
        self.assertIn("already", "".join(self.action("start", want=None)[1:3]))
        for action, want in (("status", 0), ("restart", 0), ("stop", 0), ("status", 3)):
            self.action(action, want=want)
        self.assertEqual(self.box.processes(), [])

    def test_what_is_called_wrongly(self) -> None:
        """No action, or no such: usage, 2, nothing made; a keyword: TypeError."""
        known = ("stdout='out.log', startmsg='off we go', umask=0o22, timeout=5, start_timeout=5, "
                 "rundir='/tmp', uid=None")
        self.recipe(arguments=known + ", nonsense=1")
        for argv in ((), ("begin",), ("now", "start")):
            result = self.action(*argv, want=2)
            self.assertIn("usage: recipe.py start|stop|restart|reload|status\n",
                          result.out + result.err)
        self.assertEqual(set(os.listdir(self.box.folder)) - {"__pycache__"}, {"recipe.py"})
        said = self.action("start", want=1).err
        self.assertIn("TypeError: startstop() got an unexpected keyword argument 'nonsense'", said)
        self.recipe(arguments=known)
        # What follows the action is the script's own.
        self.assertIn("off we go\n", self.action("start", "--port", "80").out)
        self.assertIn(" /tmp\n", self.box.logged("main"))
        self.action("status")
        self.action("stop")

    def test_what_a_script_has_made_is_the_daemons(self) -> None:
        """Its launcher flushes, removes and waits for nothing; one that finds a daemon does."""
        self.script("print(os.path.isdir(folder.name), flush=True)\nlines.close()\ntime.sleep(600)\n")
        made = ("import tempfile, threading, time\nfolder = tempfile.TemporaryDirectory(dir=%r)\n"
                "lines = open('lines', 'a')\nlines.write('a line\\n')\n"
                "threading.Thread(target=time.sleep, args=(%s,)).start()\n")
        text = read(self.box.path("recipe.py")).replace("before = ", made + "before = ")
        self.box.write("recipe.py", text % (self.box.make("temporary"), 60))
        self.assertLess(self.action("start").seconds, SOON)
        self.assertEqual(self.box.logged("\n"), "True\n")
        self.assertEqual(read(self.box.path("lines")), "a line\n")
        self.box.write("recipe.py", text % (self.box.path("temporary"), 0))
        self.action("start")
        self.assertEqual(len(os.listdir(self.box.path("temporary"))), 1)    # not its own, too
        self.action("stop")

    def test_what_a_script_has_done_and_does(self) -> None:
        """Buffered text comes once, a child's end is not the daemon's, every fd may be closed."""
        self.box.make("folder")
        os.chmod(self.box.folder, 0o775)
        for closes, log, want in (("", "folder", 1), ("", "out.log", 0),
                                  ("os.closerange(3, 256)", "out.log", 0)):
            self.script(FREE_SCRIPT % closes, "stdout=%r" % log)
            said = "print('but once')\nstartstop(s"
            self.box.write("recipe.py",
                           read(self.box.path("recipe.py")).replace("startstop(s", said))
            with self.subTest(log, closes=closes):
                self.assertEqual(self.action("start", want=want).out.count("but once"), 1)
                if want:
                    continue
                self.box.logged("open")
                pid = read(self.box.pidfile)
                self.assertRegex(pid, r"\A\d+\n\Z")
                self.action("status")
                self.assertIn("already running", self.action("start").out)
                self.box.write("end", "")
                self.left_alone()
                # Emptied at its end; but no other file that has that descriptor, and the pid in it.
                self.assertEqual(read(self.box.pidfile), pid if closes else "")
                self.assertEqual({read(self.box.path("data%d" % n)) for n in range(12)}, {pid})
                remove(self.box.path("end"), self.box.log)
        self.action("start")
        self.action("stop")
        self.assertEqual(self.box.processes(), [])

    def test_a_call_in_a_thread_is_refused_in_words(self) -> None:
        """Only the main thread can handle signals."""
        self.script("")
        text = read(self.box.path("recipe.py"))
        self.box.write("recipe.py", text.replace("startstop(std", "import threading\n"
                       "threading.Thread(target=startstop, args=('out.log',)).start() and dict(std"))
        self.assertRegex(self.action("start").err, r"\Adaemonize: fatal: .*main thread only\n\Z")

    def test_a_recycled_pid_is_nobody(self) -> None:
        """A record whose pid was born at another time names nobody: stop signals no stranger."""
        self.script("os.closerange(3, 256)\nprint('closed', flush=True)\ntime.sleep(600)\n")
        stranger = self.box.spawn("sleep", "600")   # first: not born in one hundredth with it
        self.action("start")
        self.box.logged("closed")
        pid = self.box.pid()
        record = json.loads(read(self.box.path("pid.txt.lock")))
        for change in ({"pid": stranger.pid}, {"birth": record["birth"] + "1"},
                       {"pidfile": "/elsewhere"}):
            with open(self.box.path("pid.txt.lock"), "r+") as lock:
                lock.truncate()
                json.dump(dict(record, **change), lock)
            self.action("status", want=1)
            self.action("stop")
            self.assertEqual((stranger.poll(), is_alive(pid)), (None, True))
            self.box.write("pid.txt", "%d\n" % pid)

    def test_its_restart_is_its_own(self) -> None:
        """daemonize.py restart puts no authserver.py in its place: `try:` the script's own."""
        self.recipe()
        self.action("start")
        pid = self.box.pid()
        for words in ([], ["--logfile", "l", "--", "sleep", "9"]):
            said = self.box.daemonize("restart", "--pidfile", "pid.txt", *words, want=1).err
            self.assertIn("try: python3 %s restart\n" % self.box.path("recipe.py"), said)
        self.assertTrue(is_alive(pid))
        self.action("restart")
        self.assertNotEqual(self.box.pid(), pid)

    def test_each_verb_under_an_ignored_SIGCHLD(self) -> None:
        """As ever, where its caller ignores SIGCHLD."""
        self.script("time.sleep(600)\n", "stdout='out', uid=%r" % (NOBODY if ROOT else None))
        for action in ("start", "status", "restart", "stop"):
            ignore = functools.partial(signal.signal, signal.SIGCHLD, signal.SIG_IGN)
            self.assertEqual(self.action(action, preexec_fn=ignore).err, "")
        self.assertEqual(self.box.processes(), [])


class Programs(DaemonTest):
    """Programs (-- COMMAND), and so scripts, are the daemon's children"""

    def program(self, *options: str, **facts: Any) -> Any:
        """Return a program that was never started."""
        program = daemonize.Program.__new__(daemonize.Program)
        vars(program).update(dict(dict.fromkeys(("pause", "restarts", "next_start", "result"), 0),
                                  plan=self.plan(*options), is_over=False, complain=len), **facts)
        return program

    def test_what_lives_for_a_moment_has_started(self) -> None:
        """What ends earlier has failed, but under `run`; if well, it may only have detached."""
        early = "unable to start: it exited with status %d before it was ready"
        cure = "\ntry: its option for the foreground"
        for result, report, said in ((0, 1, early % 0 + cure), (768, 1, early % 3),
                                     (768, daemonize.NOBODY, ""), (None, 1, "")):
            child = mock.Mock(result=result, wait=mock.Mock(side_effect=[None] + [result] * 99))
            program = self.program(start=mock.Mock(report=report), spawn=lambda: child,
                                   on_death=mock.Mock())
            with self.subTest(said, report=report), \
                    mock.patch.multiple(daemonize, ALIVE=0.05, POLL=0.01):
                try:
                    self.assertEqual(program.fresh(), [child] * (result is None))
                    self.assertFalse(said)
                except daemonize.Fatal as error:
                    self.assertEqual(str(error), said)
                self.assertEqual(program.on_death.call_count, int(report is daemonize.NOBODY))

    def test_one_that_cannot_be_executed_is_not_kept(self) -> None:
        """Its child is waited for, and has said why; nor is any file of its name a program."""
        child = mock.Mock(receive=lambda seconds: {"event": "fatal", "text": "why"})
        program = self.program(fork=lambda life: child, children=[])
        self.assertRaisesRegex(daemonize.Fatal, r"\Awhy\Z", program.spawn)
        self.assertEqual(child.kill.call_count, 1)
        for name, mode in (("bin/two", 0o755), ("sbin/one", 0o644), ("bin/no", 0o644)):
            os.makedirs(os.path.dirname(self.box.path(name)), exist_ok=True)
            self.box.write(name, "", mode)
        self.box.make("sbin/two")
        path = {"PATH": "%s:%s" % (self.box.path("sbin"), self.box.path("bin"))}
        for name, found in (("two", "bin/two"), (self.box.path("bin/two"), "bin/two"),
                            ("no", "Permission denied"),
                            ("one", "Permission denied"), ("three", "no such program"),
                            (self.box.path("sbin"), "no such program"),
                            (self.box.path("two"), "no such program")):
            with self.subTest(name), mock.patch.dict(os.environ, path):
                try:
                    self.assertEqual(daemonize.find_program(name), self.box.path(found))
                except daemonize.Fatal as error:
                    self.assertEqual(str(error), "unable to execute %s: %s" % (name, found))

    def test_what_a_dead_program_has_left_ends_before_the_next_one(self) -> None:
        """With --respawn: its children, which may hold a port; who is deaf has --timeout."""
        self.box.start("--respawn", "--timeout", "0.5", "--", "sh", "-c",
                       "echo $$ >> begun; (trap '' TERM; echo $PPID; exec sleep 6000) & sleep 6000 & "
                       "test -e end || { : > end; sleep 0.5; exit 3; }; wait".replace(
                           "begun", shlex.quote(self.box.path("begun"))).replace(
                           " end", " " + shlex.quote(self.box.path("end"))))
        until(lambda: read(self.box.path("begun")).count("\n") == 2, "the second one")
        self.assertEqual(self.box.status()["restarts"], 1)
        # The daemon, the shell and its two children: of the first three nobody is left.
        until(lambda: len(self.box.processes()) == 4, "four processes")

    def test_who_was_there_before_is_not_what_it_has_left(self) -> None:
        """A container's entry point that began something, and became `run`: that goes on."""
        argv = self.box.argv("run", "--respawn", "--", "sh", "-c", "sleep 0.1; exit 1")
        child = self.box.spawn("sh", "-c", 'sleep 6001 & exec "$@"', "sh", *argv)
        until(self.box.pid, "a pidfile")
        sleeper, = [pid for pid in self.box.processes()
                    if "6001" in read("/proc/%d/cmdline" % pid).split("\0")]
        until(lambda: self.box.status()["restarts"] > 1, "the third one")
        self.assertTrue(is_alive(sleeper))
        child.terminate()
        child.wait(PATIENCE)

    def test_how_it_ends_is_how_the_daemon_ends(self) -> None:
        """With its exit status, or 128 and the signal's number; not at all with --respawn."""
        for options, status, over, result in (([], 768, True, 3), ([], 9, True, 137),
                                              (["--respawn"], 768, False, 0)):
            program = self.program(*options, children=[], start=mock.Mock(session=None))
            with mock.patch.object(daemonize, "family", lambda session: []):
                program.on_death(mock.Mock(pid=7, born=0), status)
            self.assertEqual((program.is_over, program.result, program.next_start > 0),
                             (over, result, True))

    def test_it_gets_SIGHUP_if_it_handles_that(self) -> None:
        """The reason is said else."""
        for pids, handles, said in (([7], True, ""), ([], True, "it does not run: it is to be started again"),
                                    ([7], False, "it does not handle SIGHUP, and would end")):
            program = self.program(children=[mock.Mock(pid=pid) for pid in pids])
            with mock.patch.object(daemonize, "handles",
                                   lambda *of: handles), mock.patch("os.kill") as kill:
                self.assertEqual((program.reload(), kill.call_count), (said, int(not said)))

    def test_a_program_gets_its_arguments_untouched(self) -> None:
        """What follows -- is never looked at: options, @names, another --."""
        words = ["--pidfile", "@x", "--", "-h", "two words"]
        self.box.start("--", "sh", "-c", 'for word; do echo "<$word>"; done; sleep 600', "sh",
                       *words)
        self.box.logged("<--pidfile>\n<@x>\n<-->\n<-h>\n<two words>\n")

    def test_a_script_that_is_not_in_rundir(self) -> None:
        """Typed where FILE.py is, while the daemon's folder is /: a command that works is said."""
        self.box.write("nap.py", "import time\ntime.sleep(600)\n")
        said = self.box.start("--", PYTHON, "-u", "nap.py", want=1).err
        self.assertIn("unable to start nap.py: it is in %s, the daemon in / (--rundir)\n"
                      "try: daemonize.py start " % self.box.folder, said)
        self.assertEqual((self.box.processes(), self.files()), ([], []))
        self.box.daemonize(*shlex.split(said.rpartition("try: daemonize.py ")[2]))
        # In a jail the path is the jail's.
        plan = daemonize.parse(["start", "--pidfile", self.box.pidfile, "--logfile", self.box.log,
                                "--", PYTHON, "nap.py"], self.box.folder)
        self.assertRaises(daemonize.Fatal, daemonize.check_script, daemonize.Start(plan))
        daemonize.check_script(daemonize.Start(plan._replace(chroot="/jail")))

    @needs("setsid")
    def test_a_program_may_restart_itself(self) -> None:
        """In a session of its own, as the refusal says; else the command would end half-way."""
        restart = " ".join(map(shlex.quote, self.box.argv("restart")))
        begun = shlex.quote(self.box.path("begun"))
        self.box.start("--", "sh", "-c", "echo $$ >> %s; sleep 0.5; test -e said || { %s 2> said; "
                       "eval \"$(sed -n 's/^try: setsid -f python3/setsid -f %s/p' said)\"; }; sleep 6000"
                       .replace("said", shlex.quote(self.box.path("said")))
                       % (begun, restart, PYTHON.replace("/", "\\/")))
        until(lambda: read(self.box.path("begun")).count("\n") == 2, "the second one")
        self.assertRegex(read(self.box.path("said")), "unable to restart sh: this command is a part of it")
        until(lambda: len(self.box.processes()) == 3, "the new one alone")

    def test_stop_in_a_pause_of_respawn(self) -> None:
        """Nobody is started any more once all were told to end: stop takes no --timeout."""
        self.box.start("--respawn", "--timeout", "9", "--", "sh", "-c",
                       "test -e %s && exec sleep 600; touch %s; sleep 0.5; exit 3"
                       % ((shlex.quote(self.box.path("once")),) * 2))
        self.box.logged("exited with status 3")
        self.assertIn("is stopped", self.box.command("stop", "--timeout", "9").out)

    @needs_linux
    def test_a_program_is_the_daemons_child(self) -> None:
        """It leads a group, in /, with /dev/null and the log twice, and ends with all."""
        self.box.start("--", "sh", "-c", "sleep 6000 & sleep 6000 & echo $$; wait")
        pid, child, report = self.box.pid(), int(self.box.logged("\n")), self.box.status()
        self.assertEqual((parent(child), os.getpgid(child), os.getpgid(pid)), (pid, child, pid))
        self.assertEqual([report[name] for name in ("pid", "uid", "program_pid")],
                         [pid, os.getuid(), [child]])
        self.assertLess(report["uptime"], 60)
        self.assertEqual(fds_of(child), ["/dev/null", self.box.log, self.box.log])
        masks = re.findall(r"Sig(?:Blk|Ign):\s*(\w+)", read("/proc/%d/status" % child))
        self.assertEqual([int(mask, 16) & 0x7fffffff for mask in masks],
                         [0, 0])  # 32 is the C library's
        self.assertEqual((os.readlink("/proc/%d/cwd" % child), read("/proc/%d/comm" % child)),
                         ("/", "sh\n"))
        self.stops()

    @needs_linux
    def test_a_caller_that_ignores_and_blocks_signals(self) -> None:
        """CHLD ignored: wait(2) would find nobody; TERM blocked: a stop is disobeyed."""
        def careless() -> None:
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK,
                                   [signal.SIGTERM, signal.SIGUSR2, signal.SIGWINCH])
        for hosted in (self.app(), ["--logfile", self.box.log, "--", "sleep", "600"]):
            self.box.command("start", *AS_USER, *hosted, preexec_fn=careless)
            masks = [re.findall(r"SigBlk:\s*(\w+)", read("/proc/%d/status" % pid))
                     for pid in self.box.processes()]
            self.assertEqual([int(mask, 16) & 0x7fffffff for mask, in masks], [0, 0])
            for action in ("restart", "stop"):
                self.assertLess(self.box.command(action, preexec_fn=careless).seconds, SOON)
            self.assertEqual((self.box.processes(), os.path.exists(self.box.pidfile)), ([], False))

    def test_a_program_is_told_once(self) -> None:
        """stop: one SIGTERM, though its clean-up needs a moment."""
        self.box.start("--", "sh", "-c", "trap 'echo told; sleep 0.2; end=1' TERM; "
                       "until [ $end ]; do sleep 0.05; done; sleep 0.2")
        self.box.command("stop")
        self.assertEqual(read(self.box.log).count("told"), 1)


class SlowTest(DaemonTest):
    """What the next two share: an application that takes its time."""
    # bind() makes a file that abandon() removes; probe() waits for `ready`, drain() for `drained`
    SLOW = """
bind_well, folder = bind, os.path.dirname(__file__)
def bind(options):
    server, made = bind_well(options), os.path.join(folder, "passwords")
    if options.action == "start":
        open(made, "w").close()
        server.abandon = lambda: os.unlink(made)
    return server
def wait_for(name):
    while not os.path.exists(os.path.join(folder, name)):
        time.sleep(0.01)
drain_well = Server.drain
Server.probe = lambda self: wait_for("ready")
Server.drain = lambda self: wait_for("drained") or drain_well(self)
"""

    def slowly(self, action: str = "start", **popen: Any) -> "subprocess.Popen[bytes]":
        """Call start, or restart, of an application that takes its time."""
        return self.calling(action, *self.app(self.SLOW), **popen)

    def reloading(self) -> None:
        """Start it, and have it hang in the probe of a reload."""
        self.box.write("ready", "")
        self.box.start("--workers", "1", app=APP + self.SLOW)
        self.box.write("drained", "")
        remove(self.box.path("ready"))
        self.reload = self.calling("reload", "--start-timeout", "60")
        # The command, the daemon, its worker, a fresh one, and who probes that.
        until(lambda: len(self.box.processes()) == 5, "a probe")

    def draining(self) -> Tuple[int, "subprocess.Popen[bytes]"]:
        """Return the old daemon, which drains, and the restart that waits for it."""
        old, child = self.box.pid(), self.calling("restart")
        until(lambda: self.box.pid() not in (0, old) and child.poll() is None and is_alive(old),
              "a new daemon")
        return old, child


class PointOfNoReturn(SlowTest):
    """Before it all that a start has made is undone, after it nothing is; whatever interrupts it"""

    def test_stop_waits_for_no_reload(self) -> None:
        """One that hangs in a probe is given up: nobody is killed."""
        self.reloading()
        self.box.command("stop")
        self.reload.wait(PATIENCE)
        self.assertEqual(self.box.processes(), [])
        self.assertNotIn("was killed", read(self.box.log))

    def test_a_start_that_is_interrupted_before_it(self) -> None:
        """While the probe waits: nothing runs, no file stays, an older pidfile is emptied."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
            with self.subTest(number):
                self.box.write("d.pid", "4711\n")
                child = self.slowly()
                self.box.logged("listening")
                child.send_signal(number)
                self.assertEqual(child.wait(PATIENCE), -9 if number == signal.SIGKILL else 130)
                self.left_alone()
                self.assertEqual((os.path.exists(self.box.path("passwords")),
                                  read(self.box.pidfile)), (False, ""))
                os.unlink(self.box.log)
        self.box.write("ready", "")
        self.slowly().wait()
        self.box.command("status")

    def test_a_start_that_is_interrupted_after_it(self) -> None:
        """A blocked terminal, then a hang-up or kill -9: the daemon runs, nothing is removed."""
        for name in ("ready", "drained"):
            self.box.write(name, "")
        for number in (signal.SIGHUP, signal.SIGKILL):
            with self.subTest(number):
                reader, writer = os.pipe()
                os.set_blocking(writer, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(writer, b"x" * 4096)
                os.set_blocking(writer, True)
                child = self.slowly(stdout=writer)
                until(lambda: self.box.pid() and self.box.command("status", want=None).code == 0,
                      "a daemon")
                child.send_signal(number)
                child.wait(PATIENCE)
                os.close(reader)
                os.close(writer)
                self.assertEqual((self.box.status()["pid"], strays(self.box)), (self.box.pid(), []))
                self.box.command("stop")
                self.assertTrue(os.path.exists(self.box.path("passwords")))

    def test_a_restart_waits_for_a_reload(self) -> None:
        """As long as a start may take: who is busy with that is not taken for hung."""
        for name in ("ready", "drained"):
            self.box.write(name, "")
        address = self.box.host(app=APP + self.SLOW)
        os.unlink(self.box.path("ready"))
        reload = self.calling("reload")
        until(lambda: len(self.box.processes()) >= 4, "a fresh worker, and who waits for it")
        restart = self.box.spawn(PYTHON, "-c", "import sys; sys.path.insert(0, %r)\nimport daemonize\n"
                                 "daemonize.ANSWER = 0.1\n"
                                 "daemonize.converse.__defaults__ = (0.1, (), '')\nsys.exit(daemonize.main(sys.argv[1:]))"
                                 % HERE, *self.box.argv("restart")[2:])
        until(lambda: "waiting up to 30 s for pid" in read(self.box.output), "its word")
        self.assertIsNone(restart.poll())
        self.box.write("ready", "")
        self.assertEqual((reload.wait(PATIENCE), restart.wait(PATIENCE)), (0, 0))
        self.assertNotIn("hands nothing over", read(self.box.output))
        self.assertEqual(ask(address)["pid"], self.box.pid())

    def test_a_restart_that_is_interrupted(self) -> None:
        """Before it the old one serves on; after it the new one does, though nobody waits."""
        self.box.write("ready", "")
        address = self.box.host(app=APP + self.SLOW)
        for number in (signal.SIGINT, signal.SIGKILL):
            with self.subTest(number, after=False):
                old = self.box.pid()
                os.unlink(self.box.path("ready"))
                child = self.calling("restart")
                until(lambda: len(self.box.processes()) >= 7, "an heir, its worker, its prober")
                child.send_signal(number)
                child.wait(PATIENCE)
                self.box.write("ready", "")
                self.left_alone(2)
                self.assertEqual((self.box.pid(), ask(address)["pid"], self.box.status()["pid"]),
                                 (old,) * 3)
            with self.subTest(number, after=True):
                old, child = self.draining()
                child.send_signal(number)
                self.assertEqual(child.wait(PATIENCE), -9 if number == signal.SIGKILL else 130)
                self.box.write("drained", "")
                until(lambda: not is_alive(old), "the end of the old one")
                self.assertEqual((ask(address)["pid"], strays(self.box)), (self.box.pid(), []))
                os.unlink(self.box.path("drained"))
        # Who gives up waiting for it says who serves, too.
        os.unlink(self.box.path("ready"))
        said = self.box.command("restart", *self.app(self.SLOW), "--start-timeout", "0.5",
                                want=1).err
        self.assertRegex(said, r"the old one keeps serving with pid %d\n(?s:.*)not ready after 0.5 s\n"
                         % self.box.pid())
        self.assertEqual(ask(address)["pid"], self.box.pid())

    @needs_root
    def test_a_full_disk_stops_a_restart_before_it(self) -> None:
        """When the lock file cannot hold the new options, the old one serves on with its own."""
        small = self.small_disk("24k")
        self.box.pidfile = os.path.join(small, "d.pid")
        address, pid = self.box.host("--word", "old"), self.box.pid()
        self.fill(small)
        said = self.box.command("restart", *self.app(), "--word", "x" * 9000, want=1).err
        self.assertRegex(said, r"keeps serving with pid %d\n(?s:.*)unable to write "
                         r".*d\.pid\.lock: No space left on device\n" % pid)
        self.assertEqual((ask(address)["pid"], self.box.pid()), (pid, pid))
        self.box.command("restart")
        self.assertEqual(self.box.status()["word"], "old")

    def test_a_bare_restart_keeps_its_turn(self) -> None:
        """Though only the pidfile was typed: what the lock file says it reads by the fd it has."""
        self.box.host()
        plan = daemonize.parse(["restart", "--pidfile", self.box.pidfile])
        with daemonize.Turn(plan) as turn:
            again = daemonize.repeat(plan, turn.record())
            self.assertEqual(again.name, "app")
            child = os.fork()
            if not child:       # F_GETLK tells of others' locks only
                os._exit(daemonize.lock_holder(turn.fd, daemonize.TURN) != os.getppid())
            self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_stop_ends_whoever_holds_the_lock(self) -> None:
        """A restart was killed while the old one hung: both are there, and both are ended."""
        self.box.host()
        old = self.box.pid()
        child = self.calling("restart", "--timeout", "60")
        until(lambda: self.box.pid() not in (0, old), "a new daemon")
        with contextlib.suppress(ProcessLookupError):   # it was too fast
            os.kill(old, signal.SIGSTOP)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        self.assertIn("stopped", self.box.command("stop", "--timeout", "5").out)
        with contextlib.suppress(ProcessLookupError):   # it had given the lock up before it hung
            os.kill(old, signal.SIGCONT)
        self.left_alone()

    def test_nonsense_after_go_is_not_waited_for(self) -> None:
        """A daemon that was taken over says what it likes, and its starter never ends."""
        def life(channel: Any) -> None:
            channel.tell("ready", pid=1)
            channel.receive(SOON)
            channel.end.sendall(b"nonsense\n")
            signal.pause()
        starter = daemonize.fork(life)
        turn, began = mock.Mock(), time.monotonic()
        turn.read.return_value = b""
        with mock.patch.multiple(daemonize, ANSWER=0.2, fork=lambda life: starter,
                                 lock_holder=lambda *of: 1), \
                self.assertRaisesRegex(daemonize.Fatal, "was killed by signal 9"):
            daemonize.launch(daemonize.Start(self.plan()), turn)
        self.assertLess(time.monotonic() - began, SOON)

    def test_who_cannot_be_told_is_not_told(self) -> None:
        """A restart that hears no "done" does not claim that the old one serves, or nobody."""
        for heir in (daemonize.Start(self.plan(), talk=mock.Mock()), daemonize.Start(self.plan())):
            launch = mock.Mock(side_effect=daemonize.Unknown("cannot tell"))
            with mock.patch.multiple(daemonize, check_outside=mock.Mock(), Target=mock.Mock(),
                                     see_out=mock.Mock(), take_over=lambda *words: heir, launch=launch):
                with self.assertRaisesRegex(daemonize.Unknown, r"\Acannot tell\Z"):
                    daemonize.replace(self.plan(), mock.Mock(), 1, True)

    def test_who_serves_after_a_failure_is_said(self) -> None:
        """By the lock alone; after Ctrl-C nothing is claimed where both may hold it."""
        serves, nothing = ["the old one keeps serving with pid 7"], ["nothing runs now"]
        for error, holder, said in ((daemonize.Fatal("why", 2), 7, serves),
                                    (daemonize.Fatal("why", 2), None, nothing),
                                    (KeyboardInterrupt(), None, nothing),
                                    (KeyboardInterrupt(), 7, [])):
            warned: List[str] = []
            with self.subTest(error=error, holder=holder), mock.patch.multiple(
                    daemonize, check_outside=mock.Mock(), Target=mock.Mock(), see_out=mock.Mock(),
                    warn=warned.append, lock_holder=lambda *words: holder, launch=mock.Mock(side_effect=error)):
                with self.assertRaises(type(error)):
                    daemonize.replace(self.plan(), mock.Mock(), 7, False)
                self.assertEqual(warned, said)

    def test_who_is_left_of_a_daemon_that_has_ended_is_told_too(self) -> None:
        """First the daemon, unless it knows; SIGKILL is for after the timeout."""
        for is_told, slow in ((False, 0), (True, 0), (True, 9)):
            target = mock.Mock(pid=7, leader=mock.Mock(side_effect=[[1]] * slow + [[]] * 99),
                               members=list)
            with self.subTest(is_told=is_told, slow=slow), \
                    mock.patch.object(daemonize, "POLL", 0.001):
                self.assertEqual(daemonize.end_daemon(target, 0, is_told), bool(slow))
                calls = [(name, *words) for name, words, _ in target.method_calls
                         if name != "leader"]
                told = [("send", signal.SIGTERM), ("send", signal.SIGCONT)] * (not is_told)
                killed = [("send", signal.SIGKILL)] * bool(slow)
                self.assertEqual(list(dict.fromkeys(calls)),
                                 told + killed + [("send_all", signal.SIGTERM)])

    def test_who_took_the_place_and_says_nothing_keeps_it(self) -> None:
        """A daemon that never says "done": exit 1, `try: status`; it is not undone."""
        hook = ("d.ANSWER, real = 0.3, d.Channel.tell\nd.Channel.tell = lambda self, word, *fds, "
                "**facts: word == 'done' or real(self, word, *fds, **facts)")
        said = self.changed(hook, "start", "--logfile", self.box.log, "--", "sleep", "600",
                            want=1).err
        self.assertIn("daemonize: fatal: unable to tell whether sleep has started\n"
                      "try: daemonize.py status\n", said)
        self.box.command("status")

    def test_no_place_is_taken_without_a_word(self) -> None:
        """The command died between "ready" and "go", or said another thing."""
        for last in (b"", b'{"event": "no"}\n'):
            ours, theirs = socket.socketpair()
            start = daemonize.Start(self.plan(), report=daemonize.Channel(ours))
            with ours, theirs, mock.patch.object(daemonize, "take_instance", side_effect=TypeError):
                theirs.sendall(last)
                theirs.shutdown(socket.SHUT_WR)
                with self.assertRaisesRegex(daemonize.Fatal,
                                            "^unable to start: the command .* is gone$"):
                    daemonize.take_place(start, print)

    def test_a_terminals_signal_reaches_both(self) -> None:
        """Ctrl-C, or a hang-up, for command and starter, while bind() is at work."""
        made = self.box.path("made")
        app = self.app("""
def bind(options):
    try:
        open(%r, "w").close()
        time.sleep(600)
    finally:
        os.unlink(%r)
""" % (made, made))
        for number in (signal.SIGINT, signal.SIGHUP):
            child = self.calling("start", *app, start_new_session=True)
            until(lambda: os.path.exists(made), "bind()")
            os.killpg(child.pid, number)
            with self.subTest(number):
                self.assertEqual((child.wait(PATIENCE), os.path.exists(made), self.box.processes()),
                                 (130, False, []))

    def test_what_is_taken_back_is_not_cut_short(self) -> None:
        """Ctrl-C again and again while abandon() is at work; the next command waits for it."""
        app = self.app("""
def abandon(self):
    open(BEGUN, "w").close()
    time.sleep(0.5)
    os.unlink(BEGUN)
Server.abandon, BEGUN = abandon, %r
Server.probe = lambda self: time.sleep(600)
""" % self.box.path("begun"))
        for log, numbers in ((self.box.make("folder"), [signal.SIGINT] * 2),
                             (self.box.log, [signal.SIGINT] * 3),
                             (self.box.log, [signal.SIGKILL])):
            child = self.calling("start", "--logfile", log, *app[2:])
            for at, number in enumerate(numbers):
                until(lambda: "listening" in read(log) if log == self.box.log and not at
                      else os.path.exists(self.box.path("begun")), "its work")
                child.send_signal(number)
                select.select([], [], [], 0.05)
            with self.subTest(log, numbers=numbers):
                self.assertEqual(child.wait(PATIENCE), 130 if signal.SIGINT in numbers else -9)
                if signal.SIGKILL in numbers:
                    self.box.command("stop")
                else:
                    self.assertEqual(glob.glob(glob.escape(self.box.pidfile) + "*"), [])
                self.assertEqual((self.box.processes(), os.path.exists(self.box.path("begun"))),
                                 ([], False))
                remove(self.box.log)


class Moments(SlowTest):
    """What comes at a bad moment, which a change to daemonize makes certain; what is odd"""
    SIGNAL = """
real = d.%s
def signalled(*args):
    %s
    os.kill(os.getpid(), signal.SIG%s)
d.%s = signalled
"""

    def test_a_signal_as_soon_as_the_pidfile_names_it(self) -> None:
        """To who has just been named, or to an heir for which the old one has left: obeyed."""
        for action, moment in (("start", "write_pidfile"), ("restart", "Service.settle")):
            for number in ("HUP", "USR1", "TERM"):
                with self.subTest(action, number=number):
                    if action == "restart":
                        self.box.start(app=APP)
                    hook = self.SIGNAL % (moment, "real(*args)", number, moment)
                    old = self.box.pid()
                    self.changed(hook, action, *self.app(), want=0)
                    if number == "TERM":
                        self.left_alone()
                        self.assertEqual(read(self.box.pidfile), "")
                    else:
                        self.assertTrue(self.box.status()["pid"] == self.box.pid() != old)
                        until(lambda: number != "HUP" or ": reloaded" in read(self.box.log),
                              "a reload")
                        self.box.command("stop")
                    remove(self.box.log)

    def test_an_heir_that_dies_in_its_place(self) -> None:
        """kill -9: neither "keeps serving" nor "nothing runs" is claimed."""
        for before, is_served in (("real(*args)", False), ("pass", True)):
            with self.subTest(before):
                address = self.box.host()
                old, moment = self.box.pid(), "Service.settle"
                hook = self.SIGNAL % (moment, before, "KILL", moment)
                said = self.changed(hook, "restart", want=1).err
                self.assertRegex(said,
                                 r"\ndaemonize: fatal: unable to tell whether app has started\n"
                                 r"try: daemonize.py status\n\Z")
                self.left_alone(2 * is_served)
                if is_served:
                    self.assertEqual((ask(address)["pid"], self.box.pid()), (old, old))
                    self.box.command("stop")

    def test_who_gives_up_waiting_leaves_the_lock(self) -> None:
        """Who found no lock file, and never had the turn, removes nobody's."""
        first = self.slowly()
        self.box.logged("listening")
        hook = "real = d.exists\nd.exists = lambda path: not path.endswith('.lock') and real(path)"
        said = self.changed(hook, "start", "--logfile", self.box.log, "--start-timeout", "0",
                            "--timeout", "0",
                            "--", "sleep", "600", want=1).err
        self.assertIn("pid %d is still busy with it" % first.pid, said)
        self.box.write("ready", "")
        self.assertEqual(first.wait(PATIENCE), 0)
        self.assertEqual(self.box.status()["pid"], self.box.pid())

    def test_two_first_starts_at_once_one_fails(self) -> None:
        """It takes nothing from under the one that waited for it: that runs, or leaves nothing."""
        bad = self.app("time.sleep(0.3)\nbind = 1 / 0\n", "bad.py")
        for hosted, want in ((self.app(), 0), (bad, 1)):
            first = self.calling("start", "--name", "n", *bad)
            until(lambda: os.path.exists(self.box.pidfile + ".lock"), "its lock")
            self.box.command("start", "--name", "n", *hosted, want=want)
            self.assertEqual(first.wait(PATIENCE), 1)
            if not want:
                self.stops()
                remove(self.box.pidfile + ".lock", self.box.log)
        self.assertEqual(self.files(), [])

    def test_a_lock_file_that_is_removed_just_before_it_is_opened(self) -> None:
        """By a first start that failed: what takes its place is ours, and goes when we fail."""
        lock, well = self.box.write("d.pid.lock", "", 0o600), daemonize.open_regular

        def removed(*words: Any) -> int:
            os.unlink(lock)
            return int(well(*words))
        with mock.patch.object(daemonize, "open_regular", removed):
            with self.assertRaises(KeyboardInterrupt), daemonize.Turn(self.plan()):
                raise KeyboardInterrupt
        self.assertFalse(os.path.exists(lock))

    def test_a_turn_that_is_given_back_between_two_looks(self) -> None:
        """lockf(2) says that another one has it, F_GETLK that nobody has: it is not ours yet."""
        asked, lockf = [], fcntl.lockf  # type: List[int], Any

        def taken(fd: int, how: int, *rest: int) -> Any:
            asked.append(how)
            if len(asked) == 1:
                raise BlockingIOError(errno.EAGAIN, "taken")
            return lockf(fd, how, *rest)
        with mock.patch("fcntl.lockf", taken), daemonize.Turn(self.plan()):
            self.assertEqual(asked, [fcntl.LOCK_EX | fcntl.LOCK_NB] * 2)

    def test_who_is_leaving(self) -> None:
        """While it drains every call is the new one's, and HUP and USR1 fork nobody."""
        self.box.write("ready", "")
        self.box.start(app=APP + self.SLOW)
        old, child = self.draining()
        with open(self.box.pidfile + ".lock") as lock:      # given up last of all
            until(lambda: daemonize.lock_holder(lock.fileno(), daemonize.INSTANCE) != old, "a leave")
        for _ in range(30):
            with connect("unix:%s.sock" % self.box.pidfile) as control:
                control.sendall(b'{"event": "status"}\n')
                workers = json.loads(control.recv(65536).decode())["said"]["workers"]
                self.assertEqual([parent(pid) for pid in workers], [self.box.pid()])
        for number in (signal.SIGHUP, signal.SIGUSR1):
            os.kill(old, number)
        self.box.logged("it is leaving")
        self.assertTrue(is_alive(old))
        self.box.write("drained", "")
        self.assertEqual((child.wait(PATIENCE), is_alive(old), strays(self.box)), (0, False, []))

    def test_a_signal_while_a_process_is_forked(self) -> None:
        """SIGTERM in fork(2) itself: the child is ended, and nothing is left."""
        hook = """
real, me = os.fork, os.getpid()
def fork():
    pid = real()
    if pid and (%s):
        os.kill(os.getpid(), signal.SIGTERM)
    return pid
os.fork = fork
"""
        bind = "well = bind\nbind = lambda options: wait_for('bound') or well(options)\n"
        deaf = ["--logfile", self.box.log, "--", "sh", "-c", "trap '' TERM; sleep 600 & sleep 600"]
        for who, hosted, want in (("os.getpid() == me", self.app(self.SLOW + bind), 130),
                                  ("os.getpid() == me", deaf, 130),
                                  ("os.getppid() == me and os.getsid(0) == os.getpid()", deaf, 1)):
            with self.subTest(who, hosted=hosted[-1]):
                said = self.changed(hook % who, "start", *hosted, want=want).err
                self.assertEqual((self.box.processes(), self.files()), ([], []), said)
                self.assertFalse(os.path.exists(self.box.path("passwords")))

    def test_a_failed_start_is_told_at_once(self) -> None:
        """What is left of one that failed, and is deaf to SIGTERM, keeps nobody waiting."""
        deaf = "trap '' TERM; echo deaf; exec sleep 600"
        app = self.app("Server.probe = lambda self: subprocess.Popen(['sh', '-c', %r]) and 1 / 0\n"
                       % deaf)
        for hosted in (["--logfile", self.box.log, "--", "sh", "-c", "(%s) & exit 3" % deaf], app):
            with self.subTest(hosted[-1]):
                said = self.box.command("start", *hosted, want=1)
                self.assertLess(said.seconds, SOON)
                self.assertEqual(self.box.processes(), [])

    @needs_linux
    def test_what_a_command_left_open_reaches_nobody(self) -> None:
        """A daemon, or script, has after a restart no more fds than after a start."""
        def kinds() -> Any:
            return collections.Counter(re.sub(r"\d+", "", fd) for one in family(self.box.pid())
                                       for fd in fds_of(one))
        script = self.box.write("script.py", SCRIPT
                                % (HERE, "stdout='out', pidfile=%r" % self.box.pidfile)
                                + "time.sleep(600)\n")
        daemon = [PYTHON, LEAN]
        for argv, hosted in (
                (daemon, ["--pidfile", self.box.pidfile, *self.app()]),
                (daemon,
                 ["--pidfile", self.box.pidfile, "--logfile", self.box.log, "--", "sleep", "600"]),
                ([PYTHON, script], [])):
            with self.subTest(hosted[-1:]):
                run([*argv, "start", *hosted], 0, env=self.box.env, cwd=self.box.folder)
                first = until(kinds, "its descriptors")
                run([*argv, "restart", *hosted[:2]], 0, env=self.box.env, cwd=self.box.folder)
                # What it said "done" by is closed a moment later.
                until(lambda: not kinds() - first, "no more descriptors than at first")
                run([*argv, "stop", *hosted[:2]], 0, env=self.box.env, cwd=self.box.folder)

    def test_an_exit_status_that_is_none(self) -> None:
        """A number beyond all: what Python makes of it, in bind() and in a worker."""
        leave = "sys.exit(%d)\n" % (1 << 70)
        want = "exited with status %d\n" % run([PYTHON, "-c", "import sys; " + leave]).code
        self.assertIn("it " + want,
                      self.box.start(app=APP + "def bind(options): " + leave, want=1).err)
        self.box.start(app=APP + "del Server.probe\n"
                       "Server.serve_forever = lambda self: time.sleep(0.4) or " + leave)
        self.box.logged(want)
        self.assertNotIn("Traceback", read(self.box.log))
        self.box.command("stop")

    def test_a_status_that_JSON_does_not_know(self) -> None:
        """A time is said as text; what cannot be said costs one answer, and a line in the log."""
        odd = self.box.path("odd")
        self.box.start(app=APP + """
import datetime
class Loud:
    def __str__(self): raise SystemExit("loud")
endless = []
endless.append(endless)
Server.status = lambda self: eval(open(%r).read() or "{}")
""" % odd)
        for text, said in (("{'when': datetime.date(2003, 4, 5)}", "2003-04-05"),
                           ("{'when': {1: b'x'}}", "{'1': \"b'x'\"}"), ("{(1, 2): 3}", ""),
                           ("{'when': endless}", ""), ("{'when': Loud()}", "")):
            with self.subTest(text):
                self.box.write("odd", text)
                result = self.box.command("status")
                self.assertIn("when       " + said if said else "it does not answer", result.out)
                self.assertLess(result.seconds, 4)      # of 5 for an answer
                self.box.write("odd", "")
                self.assertEqual("unable to answer" in self.box.status()["last_error"], not said)
                self.box.command("reload")

    def test_who_only_reads_makes_no_file(self) -> None:
        """What was removed meanwhile is not made by a failed start, or by status."""
        self.box.write("d.log", "old\n")
        bad = "def bind(options):\n    os.unlink(%r)\n    raise OSError('boom')\n" % self.box.log
        self.assertIn("boom", self.box.start(app=APP + bad, want=1).err)
        self.assertFalse(os.path.exists(self.box.log))
        self.box.start("--", "sleep", "600")
        hook = "d.is_unknown = lambda plan: os.rename(plan.files.lock, plan.files.lock + '.moved')"
        self.assertIn("d.pid.lock: No such file", self.changed(hook, "status", want=4).err)
        self.assertFalse(os.path.exists(self.box.pidfile + ".lock"))
        os.rename(self.box.pidfile + ".lock.moved", self.box.pidfile + ".lock")
        self.box.command("stop")


# What harmed a daemon that lived in the same process; as a program it does so to itself.
FREE_PROGRAM = r'''
import atexit, multiprocessing, os, pickle, signal, sys, threading, time


class State:
    pass


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    os.closerange(3, 256)
    files = [open("data%d" % n, "w") for n in range(12)]
    for file in files:
        print("precious", file=file, flush=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = multiprocessing.Process(target=time.sleep, args=(600,))
    child.start()
    time.sleep(0.1)
    child.terminate()
    child.join()
    assert child.exitcode == -15, child.exitcode
    for method in "fork", "spawn", "forkserver":
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(abs, [-1, -2]) == [1, 2]
    atexit.register(lambda: pickle.dump(State(), open("state", "wb")))
    if sys.argv[2:]:
        pool = multiprocessing.Pool(2)
        threading.Thread(target=time.sleep, args=(600,)).start()
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    print("still here", flush=True)
    while not sys.argv[2:]:
        time.sleep(0.1)
'''
FREE_HANDLERS = r'''
import multiprocessing


def do_pool(self, rest):
    for _ in range(40):     # one that is ended as it begins must not lose the signal
        with multiprocessing.Pool(2) as pool:
            pool.map(abs, [1, 2])
    return True


def do_handlers(self, rest):
    code = "import signal as s; print([n for n in (1, 2, 10, 15) if s.getsignal(n) == s.SIG_IGN])"
    reader, writer = os.pipe()
    if os.fork() == 0:
        found = [n for n in (1, 10, 15, 17) if signal.getsignal(n) != signal.SIG_DFL]
        os.write(writer, json.dumps(found + [signal.set_wakeup_fd(-1) != -1]).encode())
        os._exit(0)
    said = subprocess.check_output([sys.executable, "-c", code]).decode()
    return [json.loads(os.read(reader, 99).decode()), said]


def do_lock(self, rest):
    open(rest).close()
    return True


for function in (do_pool, do_handlers, do_lock):
    setattr(Server, function.__name__, function)
'''


class NothingOfYours(DaemonTest):
    """The daemon's own process runs no code of yours: no program does to it what it may"""

    def test_what_a_program_may_do(self) -> None:
        """Close every fd, kill children and its group, multiprocessing, threads, atexit."""
        script = self.box.write("free.py", FREE_PROGRAM)
        for words in ([], ["with a thread"]):
            with self.subTest(words):
                self.box.start("--", PYTHON, script, self.box.folder, *words)
                pid = self.box.pid()
                until(lambda: "still here" in read(self.box.log) or not is_alive(pid), "its word")
                self.assertEqual((self.box.status()["pid"], self.box.status()["last_error"]),
                                 (pid, ""))
                self.assertEqual(read(self.box.pidfile), "%d\n" % pid)
                self.stops()
                os.unlink(self.box.log)
        self.assertEqual([read(self.box.path("data%d" % n)) for n in range(12)],
                         ["precious\n"] * 12)
        self.assertGreater(os.path.getsize(self.box.path("state")), 10)

    def test_a_program_that_ends_takes_its_family_along(self) -> None:
        """How is in the log, after its last words; children are told; the pidfile is empty."""
        child = "trap 'echo told; exit' TERM; while :; do sleep 0.1; done"
        code = ("import os, subprocess, sys, time\nsubprocess.Popen(['sh', '-c', %r])\n"
                "time.sleep(0.6)\n" % child)
        for end, how in (("sys.exit('config went away')",
                          "(?s)config went away\n.*exited with status 1.*told"),
                         ("sys.exit()", "exited with status 0"),
                         ("os.kill(os.getpid(), 9)", "was killed by signal 9")):
            with self.subTest(end):
                self.box.start("--timeout", "60", "--", PYTHON, "-c", code + end)
                self.left_alone()
                self.assertRegex(read(self.box.log), how)
                self.assertNotIn("unable to start", read(self.box.log))
                self.assertEqual(read(self.box.pidfile), "")
                self.box.command("status", want=3)
                os.unlink(self.box.log)

    def test_respawn(self) -> None:
        """A program that ends is started again; status counts, and has the reason."""
        self.box.start("--respawn", "--", "sh", "-c", "echo begun; sleep 0.4; exit 3")
        pid = self.box.pid()
        self.box.logged("begun", 3)
        facts = self.box.status()
        self.assertEqual((facts["pid"], facts["restarts"] >= 2), (pid, True))
        self.assertRegex(facts["last_error"],
                         r"\A\d{4}-\d\d-\d\d \d\d:\d\d:\d\d sh \d+ exited with status 3\Z")
        self.stops()

    @needs_linux
    def test_a_killed_daemon_takes_its_program_along(self) -> None:
        """kill -9 of the daemon: nobody is left who could hold a port; another user's, too."""
        if run([PYTHON, "-c", "import ctypes"]).code:
            self.skipTest("needs ctypes")
        for user in [[], AS_NOBODY][:1 + ROOT]:
            self.box.start(*user, "--", "sleep", "600")
            os.kill(self.box.pid(), signal.SIGKILL)
            self.left_alone()
        self.box.start("--", "sleep", "600")
        for parents, leaves in (([7, 7], []),
                                ([7, 1], [mock.call(1)])):    # it may have been faster
            with mock.patch("os.getppid", side_effect=parents), mock.patch("os._exit") as leave, \
                    mock.patch.object(daemonize, "prctl"):
                daemonize.die_with_parent()
            self.assertEqual(leave.call_args_list, leaves)

    @needs_linux
    def test_who_lives_without_its_main_thread_is_no_zombie(self) -> None:
        """By its state it looks like one: it is dead when no other thread is left, either."""
        code = ("import ctypes, threading, time\n"
                "threading.Thread(target=time.sleep, args=(600,)).start()\n"
                "ctypes.CDLL(None).pthread_exit(None)")
        child = self.box.spawn(PYTHON, "-c", code)
        until(lambda: child.poll() or ") Z" in read("/proc/%d/stat" % child.pid),
              "its main thread's end")
        if child.poll():
            self.skipTest("needs ctypes")
        found = daemonize.look_at(child.pid)
        assert found and found.pid == child.pid, found
        child.kill()
        until(lambda: daemonize.look_at(child.pid) is None, "its end")

    def test_what_a_handler_may_do(self) -> None:
        """Children that are terminated, a Pool, killpg of its own group; its daemon lives."""
        address = self.box.host("--workers", "2", app=APP + FREE_HANDLERS)
        before = len(self.box.processes())
        if sys.version_info >= (3, 7):      # since then Python lets us prepare a fork
            self.assertTrue(ask(address, "pool"))
            self.assertEqual(ask(address, "handlers"), [[False], "[]\n"])
        self.box.command("restart")
        for _ in range(4):
            # It had no lock on it to lose.
            self.assertTrue(ask(address, "lock %s.lock" % self.box.pidfile))
        self.assertEqual(self.box.status()["pid"], self.box.pid())
        self.assertIn("already running", self.box.start(app=APP + FREE_HANDLERS).out)
        self.assertEqual((len(self.box.processes()), strays(self.box)), (before, []))

    def test_an_applications_options_are_its_own(self) -> None:
        """Options named kind, program, ... arrive; one that we give is refused by name."""
        def bound(*names: str) -> Any:
            def add_arguments(parser: Any) -> None:
                for name in names:
                    parser.add_argument("--" + name)
            words = [word for name in names for word in ("--" + name, "my " + name)]
            app, plan = mock.Mock(add_arguments=add_arguments), self.plan(*words, hosted=[])
            return daemonize.options_for(app, daemonize.Start(plan, legacy=7))
        names = ("kind", "program", "files", "cwd", "code", "plan", "server", "command")
        options = bound(*names)
        self.assertEqual([getattr(options, name) for name in names],
                         ["my " + name for name in names])
        self.assertEqual((options.action, options.legacy, options.sockets, options.may_create),
                         ("start", 7, [], True))
        self.assertEqual(options.private_files[:3],
                         [self.box.pidfile + end for end in ("", ".lock", ".sock")])
        for taken in ("legacy", "sockets", "may-create", "config-prefix"):
            why = "--%s is an option of daemonize.py" % taken
            with self.assertRaisesRegex(daemonize.Fatal, why) as refused:
                bound(taken)
            self.assertEqual(refused.exception.status, 2)


class CannotTell(DaemonTest):
    """Yes, no, and cannot tell: 4, or 1 with the reason; nobody claims what was not seen done"""

    def all_say(self, pattern: str, *prefix: str, actions: str = "status stop reload restart start",
                **popen: Any) -> None:
        """Every command but run must fail, with that reason; the daemon lives on."""
        pid = self.box.pid()
        for action in actions.split():
            hosted = ["--logfile", "/x", "--", "sleep", "600"] if action == "start" else []
            with self.subTest(action):
                argv = list(prefix) + self.box.argv(action) + hosted
                result = run(argv, 4 if action == "status" else 1,
                             **dict(dict(env=self.box.env, cwd="/"), **popen))
                self.assertRegex(result.err, pattern)
                self.assertEqual(result.out, "")
        self.assertTrue(is_alive(pid))

    @needs_other_user
    def test_a_folder_that_may_not_be_entered(self) -> None:
        """A stranger before a closed folder, with a daemon in it or without."""
        self.box.move("closed", 0o700)
        self.box.command("status", want=4, preexec_fn=drop(NOBODY))
        self.box.start("--", "sleep", "600")
        self.all_say(r"unable to (look at|use) \S.*closed\b.*: Permission denied",
                     preexec_fn=drop(NOBODY))

    @needs_root
    @needs("unshare")
    def test_a_lock_whose_holder_cannot_be_seen(self) -> None:
        """From another pid namespace, and where there is neither /proc nor ps."""
        self.box.start("--", "sleep", "600")
        if run(["unshare", "--pid", "--fork", "--mount-proc", "true"]).code:
            self.skipTest("needs the right to unshare")
        unseen = "unable to see who runs sleep: pid %d holds its lock"
        self.all_say(unseen % 0, "unshare", "--pid", "--fork", "--mount-proc")
        hidden = ["unshare", "--mount", "sh", "-c",
                  'mount -t tmpfs none /proc; PATH=/nowhere exec "$@"', "sh"]
        self.all_say(unseen % self.box.pid(), *hidden, actions="status stop")
        self.stops()

    def test_a_lock_that_was_removed(self) -> None:
        """By a cleaner of /run: everybody says who answers there; the daemon says it, too."""
        # Of the user's, too: in a folder of root's nobody else could listen there.
        for user in [[], AS_NOBODY][:1 + ROOT]:
            self.box.start(*user, "--name", "sleep", "--", "sleep", "600")
            pid = self.box.pid()
            remove(self.box.pidfile, self.box.pidfile + ".lock")
            self.box.logged("somebody removed")
            with mock.patch.object(self.box, "pid", lambda: pid):
                self.all_say(r"pid %d answers at .*\.sock, but its lock was removed\ntry: kill %d\n"
                             % (pid, pid))
            self.assertFalse(os.path.exists(self.box.pidfile))
            self.assertEqual(read(self.box.log).count("somebody removed"), 1)
            os.kill(pid, signal.SIGTERM)
            self.left_alone()
            remove(self.box.log)

    def test_a_record_that_tells_nothing(self) -> None:
        """Absent, empty, torn, or another one: found, stopped; a bare restart does not guess."""
        said = self.box.command("restart", "--quiet", want=1).err
        self.assertIn("unable to repeat the last start", said)
        self.assertIn("\ntry: daemonize.py start", said)
        self.assertEqual(os.listdir(self.box.folder), [])
        self.box.start("--", "sleep", "600")
        for text in ("", '{"pidfile": "', "[]", "{}", json.dumps({"pid": 1}), "\0" * 100):
            with self.subTest(text):
                with open(self.box.pidfile + ".lock", "r+") as lock:
                    lock.truncate()
                    lock.write(text)
                # Uptime is counted from the daemon's birth, whatever the file's time says.
                os.utime(lock.name, (4000000000, 60 * len(text)))
                self.assertTrue(0 <= self.box.status()["uptime"] < 100)
                self.assertIn("unable to repeat the last start",
                              self.box.command("restart", want=1).err)
        self.stops()

    def test_a_control_socket_that_is_gone_or_a_dead_ones(self) -> None:
        """A reload is refused, restart makes a new one; a dead daemon's misleads nobody."""
        address = self.box.host()
        os.unlink(self.box.pidfile + ".sock")
        self.assertRegex(self.box.command("reload", want=1).err,
                         "unable to reload app: No such file")
        self.assertIn("unable to ask it", self.box.command("status").out)
        self.assertIn("hands nothing over", self.box.command("restart").err)
        self.box.command("reload")
        os.kill(self.box.pid(), signal.SIGKILL)
        until(lambda: reach(address), "the end of the port")
        self.box.start("--name", "app", "--", "sh", "-c",
                       "trap 'echo got it' HUP; while :; do sleep 0.05; done")
        self.assertNotIn("note", self.box.status())
        self.box.command("reload")
        self.box.logged("got it")

    def test_reload_that_cannot_open_the_log_is_refused(self) -> None:
        """The log's folder was moved away: the reason is said, the old log is kept."""
        logs = self.box.move("logs")
        self.box.pidfile = self.box.path("d.pid")
        address = self.box.host()
        os.rename(logs, self.box.path("moved"))
        self.assertRegex(self.box.command("reload", want=1).err,
                         r"unable to open .*logs/d\.log: No such file")
        os.kill(self.box.pid(), signal.SIGHUP)
        self.assertIn("reload refused",
                      until(lambda: self.box.status()["last_error"], "the reason"))
        self.assertEqual(ask(address)["reloads"], 0)
        self.assertIn("d.log", read(self.box.path("moved", "d.log")))


FAILING = r'''
import errno, fcntl, json, os, signal, socket, sys
sys.path.insert(0, %r)
import daemonize


def become(call, words):
    if call:
        name, code = call.split(":")
        module, _, name = name.partition(".")

        def fail(*arguments, **keys):
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))
        setattr(globals()[module], name, fail)
    return daemonize.main(words)


for line in sys.stdin:
    with open("said", "w") as said:
        pid = os.fork()
        if not pid:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(said.fileno(), 2)
            sys.exit(become(*json.loads(line)))
    print(os.waitpid(pid, 0)[1], flush=True)
''' % HERE


class SystemCalls(DaemonTest):
    """Every system call that fails says `unable to VERB OBJECT: REASON`, and leaves nothing"""

    CALLS = ("os.fork:EAGAIN", "os.open:EMFILE", "os.fstat:EIO", "os.lstat:EACCES", "os.pread:EIO",
             "os.pwrite:ENOSPC", "os.pipe:EMFILE", "os.setsid:EPERM", "os.ftruncate:EIO",
             "os.fchmod:EPERM", "os.dup2:EBADF", "os.unlink:EROFS", "os.chdir:EACCES",
             "os.setpgid:EPERM", "fcntl.lockf:ENOLCK", "fcntl.fcntl:ENOLCK",
             "socket.socketpair:EMFILE", "socket.socket:EAFNOSUPPORT",
             "signal.pidfd_send_signal:EPERM")

    def test_each_call_in_each_command(self) -> None:
        """One after the other fails for good: the right words, and the daemon as it was."""
        hosted, popen = self.app(), dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None)
        helper = self.box.spawn(PYTHON, self.box.write("failing.py", FAILING), **popen)
        self.addCleanup(helper.communicate)

        def command(action: str, call: str = "") -> Tuple[int, str]:
            """Return the exit status and stderr of a command in which `call` fails."""
            assert helper.stdin and helper.stdout
            argv = self.box.argv(action, *hosted if action == "start" else [])[2:]
            helper.stdin.write(json.dumps([call, argv]).encode() + b"\n")
            helper.stdin.flush()
            status = int(helper.stdout.readline())
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -status
            return code, read(self.box.path("said"))
        for call in self.CALLS:
            for action in ("start", "status", "reload", "restart", "stop"):
                before = set(os.listdir(self.box.folder)) | {"d.log", "said"}
                with self.subTest(call + " " + action):
                    code, said = command(action, call)
                    self.assertTrue("Traceback" not in said or "app.py" in said, said)
                    self.assertIn(code, (0, 4) if action == "status" else (0, 1), said)
                    if code:
                        self.assertRegex(said, r"(?m)^daemonize: fatal: unable to \w+ \S.*: \S")
                    self.assertTrue("unable to start" not in said or action[-5:] == "start", said)
                    if code and action == "start" and call != "os.unlink:EROFS":
                        self.assertLessEqual(set(os.listdir(self.box.folder)), before)
                        self.assertEqual(self.box.processes(), [helper.pid])
                    if action == "start":
                        self.assertEqual(command("start")[0], 0)
                    if action != "stop":
                        said = read(self.box.log).rpartition("listening on")[2]
                        self.assertEqual(ask(self.box.address_in(said))["pid"], self.box.pid())
            self.assertEqual(command("stop")[0], 0)

    @needs_root
    @needs("setpriv")
    def test_root_without_capabilities(self) -> None:
        """A container that dropped them: a line with the cure, nothing left."""
        name = self.own_name()
        start = ["start", "--name", name, *AS_NOBODY, "--gid", str(OTHER), *self.app()[2:]]
        for dropped in ("-all", "-chown", "-setuid,-setgid", "-setuid", "-fowner,-chown"):
            with self.subTest(dropped):
                argv = ["setpriv", "--bounding-set=" + dropped, "--inh-caps=" + dropped, PYTHON,
                        DAEMONIZE, *start]
                said = run(argv, 1, env=self.box.env).err
                self.assertRegex(said,
                                 r"(?m)^.*: fatal: unable to \w+ \S.*: Operation not permitted\n"
                                 "try: with CAP_")
                self.assertNotIn("Traceback", said)
                self.assertEqual(glob.glob("/run/%s*" % name) + glob.glob("/var/log/%s*" % name),
                                 [])
        self.assertNotIn("warning", self.box.daemonize(*start).err)
        # It is the user's: who rotates has to rename there.
        facts = os.stat("/var/log/" + name)
        self.assertEqual((facts.st_mode & 0o7777, facts.st_uid, facts.st_gid),
                         (0o750, NOBODY, OTHER))
        self.box.daemonize("stop", "--name", name)

    @needs_root
    @needs("unshare")
    def test_a_file_system_that_is_read_only(self) -> None:
        """With / read-only each default file in turn is named."""
        script = ('mount --bind / / && mount -o remount,ro,bind / && '
                  '{ [ "$0" = run ] || mount -t tmpfs none /run; } && exec "$@"')
        if run(["unshare", "-m", "sh", "-c", script, "run", "true"]).code:
            self.skipTest("needs the right to mount")
        start = [PYTHON, DAEMONIZE, "start", "--name", TOKEN + "-ro", *self.app()[2:]]
        for word, said in (("run", "unable to open /run/"), ("log", "unable to make /var/log/")):
            result = run(["unshare", "-m", "sh", "-c", script, word, *start], 1, env=self.box.env)
            self.assertRegex(result.err, r"\Adaemonize: fatal: %s\S+: Read-only file system\n\Z"
                             % said)

    def test_a_new_folder_that_was_swapped_is_given_to_nobody(self) -> None:
        """Another put a link in its place: what that leads to stays as it is."""
        theirs = self.box.make("theirs")
        before = os.stat(theirs).st_mode
        with mock.patch("os.mkdir", lambda path, mode: os.symlink(theirs, path)), \
                self.assertRaisesRegex(daemonize.Fatal, "unable to make "):
            daemonize.make_folder(self.box.path("new"), 0o7777, None)
        self.assertEqual(os.stat(theirs).st_mode, before)

    def test_a_pidfile_with_a_long_name(self) -> None:
        """What start proved possible is so for restart; what is not is refused at start."""
        self.box.pidfile = self.box.path("a" * 99 + ".pid")
        self.assertRegex(self.box.start(app=APP, want=1).err,
                         r"unable to bind .*\.sock: .*too long")
        self.box.pidfile = self.box.path("a" * 98 + ".pid")
        self.box.start(app=APP)
        self.box.command("restart")
        self.box.command("stop")


class Deployment(DaemonTest):
    """What is typed is what is meant: links, relative paths, environments, what an heir gets"""

    def test_a_release_behind_a_link(self) -> None:
        """Then current leads to the next one: restart, from there or anywhere, runs that."""
        for number in "123":
            os.makedirs(self.box.path("rel", number))
            self.box.write("rel/%s/app.py" % number,
                           APP.replace('"first"', '"release %s"' % number) + "#" * int(number))
        restart, address = self.box.argv("restart"), ""
        start = self.box.argv("start", "--logfile", self.box.log, "--app", "app.py")
        for number, where, argv in (("1", "current", start), ("2", "current", restart),
                                    ("3", "/", restart)):
            os.symlink(os.path.join("rel", number), self.box.path("new"))
            os.rename(self.box.path("new"), self.box.path("current"))
            result = run(["sh", "-c", 'cd "$0" && exec "$@"', where, *argv], 0, env=self.box.env,
                         cwd=self.box.folder)
            address = address or self.box.address(result)
            self.assertEqual(ask(address)["version"], "release " + number)
            remove(self.box.path("rel", str(int(number) - 1)))

    def test_a_virtual_environment(self) -> None:
        """-- ve/bin/python3 and the absolute path: each finds its environment."""
        packages = self.box.path("ve", "lib", "python%d.%d" % sys.version_info[:2], "site-packages")
        for folder in (packages, self.box.path("ve", "bin")):
            os.makedirs(folder)
        os.symlink(os.path.realpath(PYTHON), self.box.path("ve", "bin", "python3"))
        shutil.copy(os.path.join(PROGRAMS, "pyvenv.cfg"), self.box.path("ve"))
        self.box.write(os.path.join(packages, "onlyhere.py"), "X = 'found'\n")
        script = self.box.write("a.py",
                                "import onlyhere, time\nprint(onlyhere.X)\ntime.sleep(600)\n")
        for python in ("ve/bin/python3", self.box.path("ve", "bin", "python3")):
            self.box.start("--", python, script)
            self.box.logged("found\n")  # unbuffered
            self.box.command("stop")
            os.unlink(self.box.log)

    def test_a_link_to_daemonize(self) -> None:
        """By a link from elsewhere, or a relative name, it hosts its own authserver.py."""
        os.symlink(DAEMONIZE, self.box.path("daemonize"))
        passwords = self.box.write("passwords", ha1_line("jim", "secret"), 0o600)
        start = self.box.argv("start", "--logfile", self.box.log, "--bind", "127.0.0.1:0",
                              "--passwords", passwords)
        run([PYTHON, self.box.path("daemonize"), *start[2:]], 0, env=self.box.env,
            cwd=self.box.folder)
        self.assertEqual(self.box.status()["name"], "authserver")
        run([PYTHON, "daemonize.py", *self.box.argv("restart")[2:]], 0, env=self.box.env, cwd=HERE)

    def test_an_ordinary_users_bare_restart_in_a_shared_folder(self) -> None:
        """Of mode 0775: root refuses to repeat what others could have swapped."""
        self.box.move("shared", 0o775)
        self.box.log = self.box.path("d.log")
        self.box.start("--word", "kept", app=APP)
        said = self.box.command("restart", want=1 if ROOT else 0).err
        self.assertEqual("others than root can write beside it" in said, ROOT)
        self.assertEqual(self.box.status()["word"], "kept")

    def test_a_start_that_changes_nothing_makes_nothing(self) -> None:
        """A second start with the default log makes no folder; one that fails leaves none."""
        name, has_home = self.own_name(), os.access(HOME, os.W_OK)
        folder = "/var/log/" + name if ROOT else os.path.join(HOME, "." + name)
        self.box.start("--name", name, "--", "sleep", "600")
        want = 0 if ROOT or has_home else None
        self.box.command("start", "--name", name, "--", "sleep", "600", want=want)
        self.assertFalse(os.path.exists(folder))
        if has_home:
            self.box.daemonize("start", "--name", name, *self.app("bind = len\n")[2:], want=1)
            self.assertFalse(os.path.exists(folder) or glob.glob("/run/%s*" % name))

    @unittest.skipUnless(hasattr(os, "memfd_create"), "needs memfd_create (Python 3.8)")
    def test_memory_is_handed_to_the_heir(self) -> None:
        """A sealed memfd arrives with its content; a file does not, and nobody has it."""
        app = r"""
import fcntl
def bind(options, file=FILE):
    server = Server(options)
    server.legacy = options.legacy
    if options.legacy is None:
        if file:
            server.legacy = os.open(file, os.O_RDWR | os.O_CREAT)
        else:
            server.legacy = os.memfd_create("x", os.MFD_ALLOW_SEALING)
            fcntl.fcntl(server.legacy, 1033, 2)
        os.write(server.legacy, b"0")
    os.pwrite(server.legacy, b"%d" % (int(os.pread(server.legacy, 9, 0)) + 1), 0)
    server.status = lambda: {"generation": int(os.pread(server.legacy, 9, 0))}
    return server
"""
        for file, generation in (("", 3), (self.box.path("file"), 1)):
            with self.subTest(file):
                port = free_port()
                self.box.start("--bind", "127.0.0.1:%d" % port,
                               app=APP + app.replace("FILE", repr(file)))
                for _ in range(2):
                    remove(file)
                    self.box.command("restart")
                self.assertEqual(self.box.status()["generation"], generation)
                kept = fds_of(self.box.pid()) + list(ask("127.0.0.1:%d" % port)["fds"].values())
                self.assertEqual([name for name in kept if name.endswith("file (deleted)")], [])
                self.box.command("stop")

    @needs_linux
    def test_where_a_command_was_typed(self) -> None:
        """$PWD where it names that folder; else, stale or unreadable, what the kernel says."""
        here = self.box.make("here")
        os.symlink(here, self.box.path("link"))
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(here)
        for typed, want in ((self.box.path("link"), self.box.path("link")), ("link", here),
                            (self.box.path("gone"), here), ("/", here), ("", here)):
            with self.subTest(typed), mock.patch.dict(os.environ, {"PWD": typed}):
                self.assertEqual(daemonize.caller_folder(), os.path.realpath(want)
                                 if want == here else want)
        os.rmdir(here)
        with mock.patch.dict(os.environ, {"PWD": here}):
            self.assertEqual(daemonize.caller_folder(), "")

    def test_who_rotates_no_log_is_not_warned(self) -> None:
        """A jail without a log, /dev/null, a program; of a log outside it is said."""
        for log, jail, said in ((None, "/jail", ""), (os.devnull, "/jail", ""),
                                ("/log", "/jail", "it is outside the chroot"), ("/tmp/l", None, "")):
            plan = self.plan(hosted=[])
            plan = plan._replace(files=plan.files._replace(logfile=log), chroot=jail)
            with mock.patch("os.access", return_value=True):
                self.assertEqual(daemonize.log_obstacle(plan), said, (log, jail))

    def test_what_is_taken_over_is_what_the_kernel_says(self) -> None:
        """Listening stream sockets; the control socket is the one at the path."""
        self.addCleanup(os.chdir, os.getcwd())
        files = daemonize.Files(self.box.pidfile, None, "")
        control = daemonize.bind_control(files.control)
        socks = []  # type: List[socket.socket]
        for kind, family, listens, is_adopted in (
                (socket.SOCK_DGRAM, socket.AF_INET, False, False),
                (socket.SOCK_STREAM, socket.AF_INET, False, False),
                (socket.SOCK_SEQPACKET, socket.AF_UNIX, True, False),
                (socket.SOCK_STREAM, socket.AF_INET, True, True),
                (socket.SOCK_STREAM, socket.AF_UNIX, True, True)):
            socks.append(socket.socket(family, kind))
            socks[-1].bind(("127.0.0.1", 0) if family == socket.AF_INET else "")
            if listens:
                socks[-1].listen(1)
            os.set_inheritable(socks[-1].fileno(), True)
            passed = daemonize.adopt(socks[-1].fileno())
            self.assertEqual((passed is not None, os.get_inheritable(socks[-1].fileno())),
                             (is_adopted, not is_adopted))
            if passed is not None:
                passed.detach()
        self.assertEqual([daemonize.is_control(sock, files) for sock in (*socks[3:], control)],
                         [False, False, True])
        for sock in (*socks, control):
            sock.close()

    @unittest.skipUnless(hasattr(os, "memfd_create"), "needs memfd_create (Python 3.8)")
    def test_memory_that_an_heir_can_map(self) -> None:
        """It is sealed: nobody can cut it under who has mapped it; and it is not too large."""
        with tempfile.TemporaryFile() as file:
            self.assertFalse(daemonize.is_legacy(file.fileno()))
        for seals, size, is_legacy in ((2, 64 << 20, True), (2, (64 << 20) + 1, False),
                                       (6, 9, True), (4, 9, False)):
            memory = os.memfd_create("x", 2)
            os.ftruncate(memory, size)
            fcntl.fcntl(memory, 1033, seals)
            self.assertEqual(daemonize.is_legacy(memory), is_legacy)
            os.close(memory)


POOR_SYSTEM = r'''
import os, signal, socket, sys
for module, name in ((os, "pidfd_open"), (signal, "pidfd_send_signal"), (socket, "SO_PEERCRED")):
    if hasattr(module, name):
        delattr(module, name)
sys.path.insert(0, %r)
import daemonize
daemonize.PROC = "/no-such-folder"
sys.exit(daemonize.main(sys.argv[1:]))
''' % HERE


@needs("ps")
class Fallbacks(DaemonTest):
    """A system without /proc, pidfd and SO_PEERCRED (macOS, the BSDs), played on this one"""

    def poor(self, action: str, *options: str, want: int = 0) -> Result:
        """Run an action as on a system that has none of these."""
        argv = self.box.argv(action, *options)[2:]
        return run([PYTHON, self.box.write("poor.py", POOR_SYSTEM), *argv], want, env=self.box.env,
                   cwd=self.box.folder)

    def test_the_life_of_a_daemon(self) -> None:
        """start, status, reload, restart and stop work, and end children and workers."""
        address = self.box.address(self.poor("start", *self.app(), "--workers", "1", *AS_USER))
        old = ask(address)["worker"]
        self.assertIn(" up 0:00:", self.poor("status").out)
        for action in ("reload", "restart"):
            self.poor(action)       # after which an old worker may answer once more
            until(lambda: ask(address)["worker"] != old, "a fresh worker")
        ask(address, "run two")
        self.poor("stop")
        self.assertEqual((self.box.processes(), os.path.exists(self.box.pidfile)), ([], False))
        self.poor("status", want=3)

    def test_what_ps_does_not_list_is_not_there(self) -> None:
        """Nor is a zombie; and nobody is where there is no ps."""
        me, row = os.getpid(), ["1", "7", "S", "0", "0"]
        with mock.patch.object(daemonize, "ask_ps",
                               lambda: {me: row, me + 1: ["1", "7", "Z", "0", "0"]}):
            self.assertEqual(list(daemonize.by_ps()), [me])
        with mock.patch.dict(os.environ, PATH="/nowhere"):
            self.assertEqual(daemonize.ask_ps(), {})

    def test_a_stranger_is_not_signalled(self) -> None:
        """A stale pidfile that names another program: status 1, stop signals nobody."""
        stranger = self.box.spawn("sleep", "600")
        self.box.write("d.pid", "%d\n" % stranger.pid)
        self.assertIn("belongs to a stranger", self.poor("status", want=1).out)
        self.poor("stop")
        self.assertIsNone(stranger.poll())

    def test_what_ignores_TERM_is_killed(self) -> None:
        """A program that ignores SIGTERM, with a child, is killed after the timeout."""
        self.poor("start", "--logfile", self.box.log, "--", "sh", "-c",
                  "trap '' TERM; sleep 600 & while :; do sleep 1; done")
        self.poor("stop", "--timeout", "0.3")
        self.assertEqual(self.box.processes(), [])


class House(DaemonTest):
    """The two program files"""

    def trees(self) -> List[ast.Module]:
        """Return the syntax trees of the program files."""
        return [ast.parse(read(path)) for path in SOURCES]

    def test_neither_does_what_is_the_others(self) -> None:
        """daemonize.py knows no HTTP, passwords or TLS; authserver.py no fork or kill."""
        imports, names = [], []  # type: List[Set[str]], List[Set[str]]
        for tree in self.trees():
            nodes = list(ast.walk(tree))
            modules = [alias.name for node in nodes if isinstance(node, ast.Import)
                       for alias in node.names]
            modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
            imports.append({name.partition(".")[0] for name in modules})
            names.append({node.attr for node in nodes if isinstance(node, ast.Attribute)
                          and getattr(node.value, "id", "") != "options"})
        functions = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        self.assertIn("signal", imports[0])
        web = {"http", "hashlib", "hmac", "base64", "email", "ssl", "urllib"}
        self.assertEqual(imports[0] & web, set())
        self.assertEqual(imports[1] & {"pwd", "grp", "daemonize", "multiprocessing"}, set())
        calls = {"fork", "setuid", "setgid", "setgroups", "setresuid", "setresgid", "initgroups",
                 "kill", "killpg", "setsid", "chroot"}
        self.assertEqual(names[1] & calls, set())
        self.assertLessEqual({"add_arguments", "bind", "serve_forever", "main"}, functions)

    def test_every_line_fits_and_every_function_is_annotated(self) -> None:
        """100 columns; each function says what it takes and returns."""
        for path in SOURCES:
            self.assertLessEqual(max(map(len, read(path).splitlines())), 100)
        functions = [node for tree in self.trees() for node in ast.walk(tree)
                     if isinstance(node, ast.FunctionDef)]
        arguments = [argument for node in functions for argument in node.args.args]
        self.assertEqual({one.arg for one in arguments if not one.annotation} - {"self", "cls"},
                         set())
        self.assertEqual({node.name for node in functions if not node.returns} - {"__init__"},
                         set())

    def test_the_examples_in_the_docstrings_are_true(self) -> None:
        """The doctests of both files pass."""
        for path in SOURCES:
            result = run([PYTHON, "-m", "doctest", path], cwd=HERE)
            self.assertEqual((result.code, result.out), (0, ""), result.err)
            self.assertIn(">>> ", read(path))

    def test_daemonize_works_alone_and_under_every_warning(self) -> None:
        """Copied into a folder without authserver.py; -X dev -bb -W error: not one is printed."""
        shutil.copy(SOURCES[0], self.box.folder)
        strict = [PYTHON, "-bb", "-W", "error"] + ["-X", "dev"] * (sys.version_info >= (3, 7))
        for action, options in (("start", self.app()), ("status", []), ("restart", []),
                                ("stop", [])):
            argv = [*strict, "daemonize.py", *self.box.argv(action, *options)[2:]]
            self.assertNotIn("Warning", run(argv, 0, env=self.box.env, cwd=self.box.folder).err)
        self.assertNotRegex(read(self.box.log), "Warning|Traceback")


# -- 5. Both programs together ------------------------------------------------


def ha1_line(user: str, password: str, realm: str = "authserver") -> str:
    """Return a line of a password file."""
    return "%s:%s:%s\n" % (user, realm, hashed("MD5", user, realm, password))


def enters(address: str, user: str = "jim", password: str = "secret") -> List[int]:
    """Return the statuses that somebody gets with Basic and with Digest."""
    challenge = request(address, "/example/foo", "GET", "").field("WWW-Authenticate") or ""
    fields = basic(user, password), Digest(challenge, user, password, uri="/example/foo").field()
    return [request(address, "/example/foo", "GET", field).status for field in fields]


def block(first: str, word: str = "") -> str:
    """Return what README indents by two spaces, from a line that begins with `first`, with `word` in it."""
    texts = re.findall(r"(?m)^  %s.*\n(?:  .*\n)*" % re.escape(first), read(README))
    found = [text for text in texts if word in text]
    assert found, "no block that begins with " + first
    return re.sub("(?m)^  ", "", found[0])


# -- 5.1 Beside other programs: proxies, several machines, hosts of many kinds --
#
# Real ones, where installed, with the blocks of README in a frame; what Traefik and Envoy send.
# Words in capitals are replaced.

NGINX = """daemon off; master_process off; pid nginx.pid; error_log error.log; events { worker_connections 1024; }
http { access_log access.log; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4;
scgi_temp_path t5; keepalive_requests 100000000; default_type text/html; sendfile on;
upstream nodes { NODES keepalive 8; } server { listen FRONT SSL; BLOCK } }
"""
HAPROXY = """global
 stats socket "STATS"
defaults
 mode http
 timeout connect 2s
 timeout client 20s
 timeout server 20s
frontend all
 bind FRONT
 default_backend authserver
BLOCK"""
CADDY = """{
 admin off
}
http://:PORT {
 bind 127.0.0.1
BLOCK}
"""
SERVERS = {"nginx": (NGINX, ["nginx", "-e", "stderr", "-p", "FOLDER", "-c", "FILE"]),
    "haproxy": (HAPROXY, ["haproxy", "-db", "-q", "-f", "FILE"]),
    "caddy": (CADDY, ["caddy", "run", "--adapter", "caddyfile", "--config", "FILE"]),
    "lighttpd": ("BLOCK", ["lighttpd", "-D", "-f", "FILE"]), "stock": ("BLOCK", [PYTHON, "FILE", "PORT"]),
    "http.server": ("", [PYTHON, "-m", "http.server", "--bind", "127.0.0.1", "--directory", "www", "PORT"]),
    "authserver": ("", [PYTHON, AUTHSERVER, "--bind", "FRONT"])}


def other(box: Box, program: str, text: str, options: Sequence[str] = (), popen: Optional[Dict[str, Any]] = None,
          **words: str) -> str:
    """Run a server with a block of its settings until it listens, and return its address."""
    words = dict({"BLOCK": text, "NODES": "server 127.0.0.1:1;", "SSL": ""}, **words)
    words.update(PORT=str(free_port()), STATS=box.path("stats"), FOLDER=box.folder)
    words["FRONT"] = front = "127.0.0.1:" + words["PORT"]
    frame, argv = SERVERS[program]
    words["FILE"] = box.write(program + ".conf", functools.reduce(
        lambda text, word: text.replace(word, words[word]), words, frame))
    box.server = box.spawn(*[words.get(word, word) for word in argv], *options, **popen or {})
    until(lambda: not reach(front) or box.server.poll() is not None, program)
    assert box.server.poll() is None, read(box.output)
    return front


BEHIND = r'''
import http.server, json
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        text = json.dumps([self.command, self.path, self.headers.items(), body]).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(text))); self.end_headers()
        self.wfile.write(text)
    do_POST = do_GET
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print("listening on 127.0.0.1:%d" % server.server_address[1], flush=True); server.serve_forever()
'''
ASKED = ["X-Original-Method: GET", "X-Original-URI: /a/x"]
SHAPES = {  # what is sent with METHOD of TARGET
    "nginx": "GET /auth|X-Original-Method: METHOD|X-Original-URI: TARGET",
    "Traefik": "GET /auth?query|X-Forwarded-Method: METHOD|X-Forwarded-Uri: TARGET|X-Forwarded-For: 192.0.2.1",
    "Envoy": "METHOD /authTARGET|Content-Length: 0|X-Forwarded-For: 192.0.2.1|X-Forwarded-Proto: https",
    "two that agree": "GET /auth/|X-Forwarded-Method: METHOD|X-Original-URI: TARGET|X-Forwarded-Uri: TARGET"}
UNCLEAR = {
    "nothing": [], "an URI without a method": ASKED[1:], "a method without an URI": ASKED[:1],
    "two URIs": ASKED + ["X-Original-URI: /y"], "two methods": ASKED + ["X-Original-Method: POST"],
    "an URI of two minds": ASKED + ["X-Forwarded-Uri: /y"], "a path and an URI": ASKED[1:], "a path and all": ASKED,
    "a method of two minds": ASKED + ["X-Forwarded-Method: POST"], "a path and a method": ASKED[:1],
    "an empty URI": ASKED[:1] + ["X-Original-URI:"], "an empty URI beside one": ASKED + ["X-Forwarded-Uri:"],
    "a path, in a whole URL": []}


class ForwardAuth(HttpTest):
    """--forward-auth: a proxy asks whether a request may pass"""
    options = ("--forward-auth", "/auth", "--trusted-proxy", "127.0.0.1")
    fronts: Dict[str, str]

    @classmethod
    def set_up(cls) -> None:
        super().set_up()
        behind, cls.fronts = cls.box.launch(PYTHON, cls.box.write("behind.py", BEHIND)), {}
        for program, first, word in (("nginx", "location / {", "auth_request"), ("caddy", "forward_auth", "")):
            if shutil.which(program) and os.path.exists(README):
                text = block(first, word).replace("127.0.0.1:8081", cls.at).replace("127.0.0.1:3000", behind)
                cls.fronts[program] = other(cls.box, program, text)

    @contextlib.contextmanager
    def through(self, program: str) -> Iterator[str]:
        """Give the body the address of a proxy, in a subTest."""
        with self.subTest(program):
            if program not in self.fronts:
                self.skipTest("needs %s, and README" % program)
            yield self.fronts[program]

    @needs("curl")
    def test_curl_gets_through(self) -> None:
        for program in ("nginx", "caddy"):
            with self.through(program) as at:
                for kind, data in [(kind, data) for kind in ("--digest", "--basic", "--anyauth") for data in ("", "a=b")]:
                    argv = ["curl", "-gs", "http://%s/a%%20[b]?c=d" % at, kind, "-w", "\n%{http_code}"]
                    argv += ["--data", data] * bool(data)
                    self.assertTrue(run(argv + ["-u", "jim:wrong"], 0).out.endswith("\n401"))
                    text = run(argv + ["-u", "jim:secret"], 0).out.replace("\n200", "")
                    method, path, fields, body = json.loads(text)
                    self.assertIn(["Remote-User", "jim"], fields)
                    self.assertEqual((method, urllib.parse.unquote(path), body),
                                     ("POST" if data else "GET", "/a [b]?c=d", data))

    @needs("chromium")
    def test_a_browser_gets_through(self) -> None:
        for program in ("nginx", "caddy"):
            with self.through(program) as at:
                self.assertIn('"Remote-User", "jim"', browse(self.box, "http://jim:secret@%s/page" % at))

    def test_each_challenge_arrives_and_each_proof_counts_once(self) -> None:
        for program in ("nginx", "caddy"):
            with self.through(program) as at:
                # nginx passes on both since 1.23
                old = program == "nginx" and re.search(r"/1\.(1?\d|2[0-2])\.", run(["nginx", "-v"]).err)
                self.assertEqual(offered(request(at, "/p", "GET", "")), ["Digest", "Basic"][:1 if old else 2])
                proof = digest(at, "/p")
                self.assertEqual([request(at, path, "GET", auth).status for path, auth in (
                    ("/p", proof), ("/p", proof), ("/q", digest(at, "/p")))], [200, 401, 403])

    def test_a_name_that_a_client_brings_reaches_nobody(self) -> None:
        for program in ("nginx", "caddy"):
            with self.through(program) as at:
                for name in ("Remote-User", "Remote_User", "REMOTE-USER", "X-Remote-User"):
                    fields = json.loads(request(at, "/p", "GET", JIM, name + ": root").body)[2]
                    self.assertEqual([value for field, value in fields if re.fullmatch(
                        "(?i)(x[-_])?remote[-_]user", field)], ["jim"], name)
                for name in ("X-Original-URI", "X-Forwarded-Uri"):
                    for auth in (digest(at, "/q"), ""):
                        self.assertIn(request(at, "/p", "GET", auth, name + ": /q").status, (401, 403))

    def test_what_proxies_send(self) -> None:
        for who, shape in SHAPES.items():
            for method, target in (("GET", "/"), ("POST", "/a%20b?c=d"), ("PROPFIND", "/auth/x/")):
                with self.subTest("%s %s %s" % (who, method, target)):
                    line, *fields = shape.replace("METHOD", method).replace("TARGET", target).split("|")
                    words = line.split()[::-1]
                    challenge = request(self.at, *words, "", *fields)
                    proof = Digest(challenge.field("WWW-Authenticate") or "", uri=target).field(method=method)
                    answers = [challenge] + [request(self.at, *words, auth, *fields) for auth in (
                        proof, proof, JIM, digest(self.at, "/other"))]
                    self.assertEqual([(answer.status, answer.field("Remote-User")) for answer in answers],
                                     [(401, None), (200, "jim"), (401, None), (200, "jim"), (403, None)])

    def test_what_is_unclear_is_refused(self) -> None:
        for sentence, fields in UNCLEAR.items():
            for auth in (JIM, ""):
                with self.subTest(sentence, auth=auth):
                    path = ("http://x" if "URL" in sentence else "") + "/auth" + ("/y" if "path" in sentence else "")
                    self.assertEqual(request(self.at, path, "GET", auth, *fields).status, 403)
        with Wire(self.at, source="127.0.0.2") as wire:
            self.assertEqual(wire.ask("/auth", "GET", JIM, *ASKED).status, 403)
        self.logged("refused .*forward-auth.* method", 2 * len(UNCLEAR))
        self.logged(r"127\.0\.0\.2: refused .*--trusted-proxy")
        self.assertEqual(request(self.at, "/authority", "GET", JIM, *ASKED).status, 404)

    def test_an_answer_is_framed_by_how_it_was_asked_for(self) -> None:
        """GET about a HEAD has a body, HEAD about a GET none: the next answer begins where it should."""
        for asked, about in (("GET", "HEAD"), ("HEAD", "GET")):
            with self.subTest(asked), Wire(self.at) as wire:
                wire.ask("/auth", asked, "", "X-Original-URI: /x", "X-Original-Method: " + about, body=asked == "GET")
                self.assertEqual(wire.ask("/auth", "GET", JIM, *ASKED).status, 200)

    def test_only_what_proxies_pass_on_is_answered(self) -> None:
        """A malformed field and a lock-out are 403: nginx makes 500 of 400 and 429."""
        def ask(auth: str, client: str = "192.0.2.1") -> int:
            return request(self.at, "/auth", "GET", auth, "X-Forwarded-For: " + client, *ASKED).status
        for auth in ("Basic %", "Basic amlt", *(digest(self.at, uri) for uri in ("/x", "/a%2Fx", "/a/x?"))):
            self.assertEqual(ask(auth), 403)
        self.assertEqual(ask(digest(self.at, "/a/%78")), 200)   # spelt anew, as Caddy does
        self.assertEqual([ask(WRONG, "192.0.2.9") for _ in range(10)], [401] * 10)
        self.assertEqual([ask(JIM, client) for client in ("192.0.2.9", "192.0.2.10")], [403, 200])


def hear_one(sock: socket.socket) -> Tuple[bytes, bytes]:
    """Return status and head of the one answer that comes, read in large pieces; b"" at the end."""
    octets = b""
    while True:
        piece = sock.recv(65536)
        octets += piece
        text, end, body = octets.partition(b"\r\n\r\n")
        length = re.search(br"(?i)\ncontent-length: *(\d+)", text)
        if not piece or end and length and len(body) >= int(length.group(1)):
            return text[9:12], text


class Caller(threading.Thread):
    """A client that asks until it is told to end; it knows its password, and counts what it hears."""

    def __init__(self, address: str, scheme: str, keeps: bool, end: threading.Event,
                 paths: Sequence[str] = ("/example/foo",), context: Any = None, pause: float = 0.01) -> None:
        super().__init__()
        self.address, self.keeps, self.end, self.paths, self.context = address, keeps, end, paths, context
        self.pause = pause      # the machine is there for others, too
        self.digest = Digest("") if scheme == "digest" else None
        self.answers = self.challenges = self.stale = 0
        self.asked = random.randrange(len(paths))
        self.failures: List[str] = []
        self.start()

    def run(self) -> None:
        while not self.end.wait(self.pause):
            try:
                plain = Wire(self.address)
                with self.context.wrap_socket(plain) if self.context else plain as wire:
                    while self.ask(wire) and not self.end.wait(self.pause):
                        pass
            except (OSError, ValueError) as error:
                self.failures.append(repr(error))

    def ask(self, wire: Any) -> bool:
        """Ask once and count the answer; tell whether the connection goes on."""
        path, field = self.paths[self.asked % len(self.paths)], JIM
        self.asked += 1
        if self.digest:
            self.digest.values["uri"] = path
            field = self.digest.field() if "nonce" in self.digest.values else ""
        wire.sendall(head(path, "GET", field, *[CLOSE] * (not self.keeps)))
        status, text = hear_one(wire)
        challenge = re.search(rb"(?i)\nwww-authenticate: *(digest[^\r]*)", text) if status == b"401" else None
        if self.digest and challenge:
            self.stale += b"stale=true" in challenge.group()
            self.challenges += b"stale=true" not in challenge.group()
            self.digest.hear(challenge.group(1).decode("latin-1"))
        elif status == b"200":
            self.answers += 1
        else:
            self.failures.append("status %r" % status)
        return self.keeps and b"\nconnection: close" not in text.lower()


@contextlib.contextmanager
def calling(*addresses: str, context: Any = None) -> Iterator[Tuple[List[Caller], Callable[[], None]]]:
    """Let clients of each kind ask; the body gets them, and a wait for another dozen answers each."""
    end = threading.Event()
    callers = [Caller(address, scheme, keeps, end, context=context) for address in addresses
               for scheme in ("basic", "digest") for keeps in (True, False)]

    def go_on() -> None:
        goals = [caller.answers + 12 for caller in callers]
        until(lambda: all(caller.answers >= goal for caller, goal in zip(callers, goals)), "answers")
    try:
        go_on()
        yield callers, go_on
        go_on()
    finally:
        end.set()
        for caller in callers:
            caller.join()


class Machines(SharedBoxTest):
    """Three machines (addresses of loopback) that share a password file and a nonce secret"""
    nodes, places, options = [], [], []  # type: List[Box], List[str], List[str]
    CHECKS = ("option httpchk GET /\n http-check expect status 401\n", "option httpchk GET /example/healthz\n")

    @classmethod
    def set_up(cls) -> None:
        cls.options = ["--public", "/example/healthz", "--workers", "1", "--passwords",
                       cls.box.write("passwords", ha1_line("jim", "secret"), 0o600),
                       "--nonce-secret", cls.box.path("secret"), "--trusted-proxy", "127.0.0.1"]
        cls.nodes = [Box() for _ in range(3)]
        cls.places = ["127.0.0.%d:%d" % (number, free_port()) for number in (1, 2, 3)]
        threads(3, cls.start)

    @classmethod
    def start(cls, number: int) -> None:
        cls.nodes[number].start("--bind", cls.places[number], *cls.options)

    @classmethod
    def tearDownClass(cls) -> None:
        for node in cls.nodes:
            node.close()
        super().tearDownClass()

    def balance(self, *programs: str, check: str = CHECKS[0]) -> List[str]:
        """Run the balancers that are installed until the test ends; return their addresses."""
        fronts = []
        for program in programs:
            with self.subTest(program):
                if not shutil.which(program) or not os.path.exists(README):
                    self.skipTest("needs %s, and README" % program)
                if program == "nginx":
                    text = block("location / {").replace("127.0.0.1:8081", "nodes")
                    nodes = " ".join("server %s max_fails=1 fail_timeout=1s;" % place for place in self.places)
                else:
                    text = block("backend authserver")
                    self.assertIn(self.CHECKS[0], text)
                    text = re.sub(" server .*\n", "", text).replace(self.CHECKS[0], check) + "NODES"
                    nodes = "".join(" server n%d %s check inter 100ms fall 2 rise 1\n" % pair
                                    for pair in enumerate(self.places))
                fronts.append(other(self.box, program, text, NODES=nodes))
                self.addCleanup(self.box.kill, self.box.server)
        return fronts

    def sees(self, *want: str) -> None:
        stats = "unix:" + self.box.path("stats")
        until(lambda: re.findall(r"(?m)^authserver,n\d,(?:[^,]*,){15}(\w+)",
                                 talk(stats, b"show stat\n").decode()) == list(want), "nodes %s" % (want,))

    def check(self, callers: Sequence[Caller], lost: int = 0) -> None:
        """Assert that no request was lost, and that nobody was asked for a password twice."""
        for caller in callers:
            self.assertLessEqual(len(caller.failures), lost, caller.failures)
            self.assertEqual(caller.challenges, 1 if caller.digest else 0)

    def test_any_node_answers_and_restarts_cost_nothing(self) -> None:
        before = [node.status()["requests"] for node in self.nodes]
        with calling(*self.balance("haproxy", "nginx")) as (callers, _):
            middle = [node.status()["requests"] for node in self.nodes]
            for node in self.nodes:
                node.command("restart")
        self.check(callers)
        if hasattr(os, "memfd_create"):  # without it no counts are handed over: `stale`, once a restart
            self.assertEqual(sum(caller.stale for caller in callers), 0)
        self.assertTrue(all(map(int.__lt__, before, middle)), (before, middle))

    def test_a_node_that_dies_costs_what_it_had_in_hand(self) -> None:
        """SIGKILL under load: a failure per client at most; when it is back nobody is asked, no replay accepted."""
        proof = digest(self.places[1], "/example/foo")
        self.assertEqual(request(self.places[1], "/example/foo", "GET", proof).status, 200)
        with calling(*self.balance("haproxy", "nginx")) as (callers, go_on):
            os.kill(self.nodes[1].pid(), signal.SIGKILL)
            go_on()
            self.start(1)
            self.assertEqual(request(self.places[1], "/example/foo", "GET", proof).status, 401)
        self.check(callers, 1)

    @needs("haproxy")
    def test_health_checks_see_a_node_go_and_come(self) -> None:
        """A public path, or the 401 itself, is up; a stop under load loses nothing and is seen, as is a start."""
        for check in self.CHECKS:
            with self.subTest(check), calling(*self.balance("haproxy", check=check)) as (callers, _):
                self.sees("UP", "UP", "UP")
                self.nodes[2].command("stop")
                self.sees("UP", "UP", "DOWN")
                self.start(2)
                self.sees("UP", "UP", "UP")
            self.check(callers)

    def test_a_proof_counts_once_on_each_machine(self) -> None:
        """What is promised, and what is not: a replay is refused where it was used, not elsewhere."""
        proof = digest(self.places[0], "/example/foo")
        said = [request(place, "/example/foo", "GET", proof).status for place in self.places * 2]
        self.assertEqual(said, [200, 200, 200, 401, 401, 401])


CONTAINER = r'''
mount -t tmpfs -o mode=1777 none "$1" && cp "$2" "$1/users" && chmod 0444 "$1/users" &&
mount -o remount,ro,bind "$1" && mount -t tmpfs -o mode=1777 none "$3" &&
mount -o remount,ro,bind / && shift 3 && exec "$@"
'''


@unittest.skipUnless(os.path.exists(README), "needs README")
class Supervisors(BoxTest):
    """What people run it under, as README says it"""

    def setUp(self) -> None:
        super().setUp()
        self.at = "127.0.0.1:%d" % free_port()
        self.passwords = self.box.write("passwords", ha1_line("jim", "secret"), 0o600)
        self.options = ["--bind", self.at, "--passwords", self.passwords, "--workers", "1"]

    def write(self, name: str, text: str, mode: int = 0o644) -> str:
        """Write a file of settings, with this box's paths and commands, as a shell and supervisord read them."""
        daemonize = "python3 /opt/d/daemonize.py "
        for word, argv in ((daemonize + "run @/etc/d.conf", self.box.argv("run", *self.options)),
                           (daemonize + "reload --quiet", self.box.argv("reload", "--quiet")),
                           ("/var/log/authserver.log", [self.box.log]), ("/run/authserver.pid", [self.box.pidfile])):
            text = text.replace(word, " ".join(map(shlex.quote, argv)))
        return self.box.write(name, text, mode)

    @needs_other_user
    @needs("logrotate")
    def test_logrotate_in_a_folder_of_roots(self) -> None:
        self.box.write("passwords", ha1_line("jim", "secret"), 0o640, NOBODY)
        self.box.start(*self.options, *AS_NOBODY, "--log-bytes", "0")
        rotate = ["logrotate", "-f", "-s", self.box.path("state"), self.write("rotate.conf", block("/var/log/authserver.log"))]
        with calling(self.at) as (callers, go_on):
            for _ in range(4):
                run(rotate, 0)
                go_on()
            self.box.write("passwords", "no colon\n", 0o640, NOBODY)  # a mistake refuses all but the log
            run(rotate, 1)
            size = os.stat(self.box.log + ".1").st_size
            go_on()
            self.assertEqual(os.stat(self.box.log + ".1").st_size, size)
        self.assertEqual([caller.failures for caller in callers], [[]] * 4)
        self.box.command("stop")
        logs = [read(path) for path in glob.glob(glob.escape(self.box.log) + "*")]
        lines = re.findall('"GET /example/foo .*" 200 ', "".join(logs))
        self.assertEqual((len(logs), len(lines)), (6, sum(caller.answers for caller in callers)))
        self.assertEqual(os.stat(self.box.log).st_uid, NOBODY)

    def test_supervisors(self) -> None:
        self.box.make("service")
        program = block("[program:")
        self.write("service/run", "#!/bin/sh\nexec 2>&1\nexec " + program.partition("command=")[2], 0o755)
        conf = self.write("s.conf", "[supervisord]\nnodaemon=true\nlogfile=s.log\npidfile=s.pid\n" + program)
        for argv in (["supervisord", "-c", conf], ["runsv", self.box.path("service")]):
            with self.subTest(argv[0]):
                if not shutil.which(argv[0]):
                    self.skipTest("needs " + argv[0])
                child, first = self.box.spawn(*argv), 0
                for kill in (True, False):
                    until(lambda: self.box.pid() not in (0, first) and not reach(self.at), "a daemon that answers")
                    self.assertEqual(request(self.at).status, 200)
                    first = self.box.slay() if kill else 0
                child.terminate()
                self.assertEqual((child.wait(PATIENCE), self.box.processes()), (0, []))

    @needs_other_user
    @needs("unshare")
    def test_a_container(self) -> None:
        """Its command is pid 1 of a user without a name; the root is read-only, the secret of mode 0444."""
        words = dict(re.findall(r"(?m)^([A-Z]+) (.*)$", block("FROM").replace("\\\n", "")))
        self.assertEqual(words["COPY"].split(), ["daemonize.py", "authserver.py", "/opt/d/"])
        secrets, temp, (uid, gid) = self.box.make("secrets"), self.box.make("tmp"), words["USER"].split(":")
        argv = [word.replace("/tmp", temp).replace("/run/secrets", secrets).replace(":8081", self.at)
                for word in json.loads(words["CMD"])]
        self.assertEqual(argv[:3], ["python3", "/opt/d/daemonize.py", "run"])
        child = self.box.spawn(
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", CONTAINER, "sh",
            secrets, self.passwords, temp, "setpriv", "--reuid", uid, "--regid", gid, "--clear-groups",
            PYTHON, DAEMONIZE, *argv[2:])
        until(lambda: not reach(self.at), "a container")
        self.assertEqual(request(self.at).status, 200)
        os.kill(family(child.pid)[1], signal.SIGTERM)  # its pid 1
        self.assertEqual(child.wait(PATIENCE), 0, read(self.box.output))


# -- 5.2 daemonize.py with authserver.py ----------------------------------------


def shown(address: str) -> bytes:
    """Return the certificate that a server shows."""
    with secure(address) as wire:
        return bytes(wire.getpeercert(True))


class Together(BoxTest):
    """daemonize.py with authserver.py"""

    def started(self, *options: str, text: str = "", **keys: Any) -> Result:
        """Start the authserver on a free port with a password file of root's."""
        self.box.write("passwords", text or ha1_line("jim", "secret"), 0o600)
        return self.box.start("--bind", "127.0.0.1:0", "--passwords", self.box.path("passwords"), *options, **keys)

    def serving(self, *options: str, text: str = "") -> str:
        return self.box.address(self.started(*options, text=text))

    def test_start_serves_basic_and_digest(self) -> None:
        at = self.serving(text=ha1_line("jim", "h0ly-secret") + ha1_line("ann", "x"))
        self.assertEqual((enters(at, "jim", "h0ly-secret"), enters(at, "jim", "h0ly-wrong")), ([200] * 2, [401] * 2))
        answer = request(at, "/example/<foo>", "GET", basic("jim", "h0ly-secret"))
        self.assertIn(b"&lt;foo&gt;", answer.body)
        self.box.logged('" 401 ', 4)
        until(lambda: re.search('"GET /example/(<|%3C)foo(>|%3E) HTTP/1.1" 200', read(self.box.log)), "its line")
        report = until(lambda: [r for r in [self.box.status()] if r["requests"] >= 7], "seven requests")[0]
        self.assertEqual(report["users"], 2)
        lines = [read("/proc/%d/cmdline" % pid) for pid in self.box.processes()]
        everything = "".join(lines) + read(self.box.log) + json.dumps(report)
        for secret in ("h0ly", base64.b64encode(b"jim:h0ly-secret").decode(), ha1_line("jim", "h0ly-secret").strip()[-32:]):
            self.assertNotIn(secret, everything)

    def test_what_cannot_be_served_is_told_at_start(self) -> None:
        with taken_port() as port:
            for options, text, want, said in (
                    (["--bind", "127.0.0.1:%d" % port], "", 1, r"unable to bind \S*127\.0\.0\.1:%d\S*: "
                     r"Address already in use\n(try: .*\n)?\Z" % port),
                    ([], "# users\njim:%s\n" % SHA, 2, r".*line 2.*jim.*[Dd]igest.*\ntry: "),
                    (["--passwords", self.box.path("none")], "", 2, r"unable to .*none.*\ntry: .*passwd")):
                with self.subTest(said):
                    err = self.started(*options, text=text, want=want).err
                    self.assertRegex(err, r"(?s)\Adaemonize: fatal: " + said)
                    self.assertEqual((self.box.processes(), read(self.box.pidfile)), ([], ""))

    def test_reload_reads_the_passwords_again(self) -> None:
        """With a --nonce-secret; a mistake refuses the whole and names its line."""
        secret = self.box.path("secret")
        at = self.serving("--workers", "1", "--nonce-secret", secret)
        self.assertEqual(os.stat(secret).st_mode & 0o777, 0o600)
        self.box.write("passwords", ha1_line("jim", "other"), 0o600)
        self.box.command("reload")
        self.assertEqual((enters(at, "jim", "other"), enters(at)), ([200] * 2, [401] * 2))
        self.box.write("passwords", ha1_line("jim", "third") + "no colon\n", 0o600)
        self.assertIn("line 2", self.box.command("reload", want=1).err)
        self.assertEqual(enters(at, "jim", "other"), [200] * 2)

    @needs_root
    @needs("openssl")
    def test_roots_files_serve_a_daemon_without_rights(self) -> None:
        """Passwords and key that only root can read are read before the drop; reload says `try: restart`."""
        if not python_runs_as(NOBODY):
            self.skipTest("needs a Python that user %d can run" % NOBODY)
        pem = make_certificate(self.box)
        at = self.serving(*AS_NOBODY, "--workers", "1", "--tls-cert", pem)
        first = shown(at)
        self.box.write("passwords", ha1_line("jim", "new"), 0o600)
        self.assertRegex(self.box.command("reload", want=1).err, "passwords.*\ntry: daemonize.py restart")
        os.chown(self.box.path("passwords"), NOBODY, NOBODY)
        make_certificate(self.box)
        self.assertRegex(self.box.command("reload", want=1).err, r"cert\.pem.*Permission denied\ntry: .*restart")
        self.assertEqual((shown(at), https(at).status), (first, 200))
        self.box.command("restart")
        self.assertNotEqual(shown(at), first)
        self.assertEqual([https(at, "/", "GET", auth).status for auth in (JIM, basic("jim", "new"))], [401, 200])

    @needs_root
    def test_it_serves_in_an_empty_jail(self) -> None:
        jail = self.box.make("jail")
        at = self.serving("--chroot", jail, *AS_NOBODY)
        self.assertEqual(enters(at), [200] * 2)
        self.box.command("restart")
        self.assertEqual(enters(at), [200] * 2)
        self.box.logged('" 200 ', 4)
        self.box.command("stop")
        self.assertEqual((self.box.processes(), os.listdir(jail)), ([], []))

    def test_no_request_is_lost_in_restarts_and_reloads(self) -> None:
        """Basic and Digest, kept and new connections; the new certificate is taken each time, a bad one refused."""
        for tls in [False] + [True] * bool(shutil.which("openssl")):
            pem = ["--tls-cert", make_certificate(self.box)] if tls else []
            at = self.serving("--workers", "2", *pem)
            seen = [shown(at)] if tls else []
            with self.subTest(tls=tls), calling(at, context=trusting() if tls else None) as (callers, go_on):
                for action in ("reload", "restart", "reload"):
                    if tls:
                        os.replace(make_certificate(self.box, "new.pem"), pem[1])
                    self.box.command(action)
                    seen += [shown(at)] if tls else []
                    go_on()
            self.assertEqual([caller.failures for caller in callers], [[]] * 4)
            self.assertEqual(len(set(seen)), 4 * tls)
            if tls:
                self.box.write("cert.pem", "nonsense", 0o600)
                self.assertIn("cert.pem", self.box.command("reload", want=1).err)
                self.assertEqual(shown(at), seen[-1])
            self.box.command("stop")
        self.assertEqual(re.findall("Traceback(?:\n.*){9}", read(self.box.log)), [])

    def test_a_restart_costs_a_digest_client_one_silent_stale(self) -> None:
        at = self.serving()
        proof, seen = digest(at, "/"), []
        for action in ("status", "restart"):
            self.box.command(action)
            seen.append(request(at, "/", "GET", proof))
        self.assertEqual([answer.status for answer in seen], [200, 401])
        self.assertRegex(seen[1].field("www-authenticate") or "", r"(?i)stale=true")

    def test_a_unix_socket_is_handed_over(self) -> None:
        first, second = ("unix:" + self.box.path(name) for name in ("one", "two"))
        self.started("--bind", first, "--workers", "1")
        inode = os.stat(first[5:]).st_ino
        self.box.command("restart")
        self.assertEqual(os.stat(first[5:]).st_ino, inode)
        self.box.command("restart", "--logfile", self.box.log, "--bind", second, "--passwords", "passwords")
        self.assertEqual(request(second, "/", "GET", "").status, 401)
        self.assertEqual(getattr(reach(first), "errno", 0), errno.ECONNREFUSED)

    def test_a_socket_of_systemd_is_served_wherever_it_is(self) -> None:
        passwords = self.box.write("passwords", ha1_line("jim", "secret"), 0o600)
        _, at = self.activated(*self.box.argv("run", "--passwords", passwords, "--workers", "1"))
        until(self.box.pid, "a pidfile")
        self.assertEqual(self.box.status()["addresses"], ["http://%s/" % at])
        self.assertEqual(enters(at), [200] * 2)

    def test_a_head_that_is_half_sent_spans_a_restart(self) -> None:
        at = self.serving("--workers", "1")
        old = self.box.pid()
        with Wire(at) as wire:
            wire.sendall(b"GET / HTTP/1.1\r\nHost:")
            restart = self.box.spawn(*self.box.argv("restart"))
            until(lambda: self.box.pid() not in (0, old), "a new daemon")
            self.assertEqual(wire.exchange(b" x\r\n\r\n").status, 401)
        self.assertEqual(restart.wait(PATIENCE), 0, read(self.box.output))
        self.assertFalse(is_alive(old))


@needs_home
class FirstStart(BoxTest):
    """The very first start, on a box that has nothing yet"""

    def setUp(self) -> None:
        super().setUp()
        self.name = self.own_name()
        self.passwords = "/etc/%s.passwords" % self.name if ROOT else os.path.join(HOME, "." + self.name, "passwords")
        self.box.write(os.path.join(self.box.make("shared"), "a b.txt"), "shared")

    def action(self, action: str, *options: str, **keys: Any) -> Result:
        """Run an action on the daemon of this name, with the default files; a start on a free port."""
        bind = ["--bind", "127.0.0.1:0"] * (action in ("start", "run") and "--bind" not in options)
        return self.box.daemonize(action, "--name", self.name, *bind, *options, **keys)

    def start(self, *options: str) -> Result:
        """Start on the folder `shared`; the environment holds what finds this test's processes, no more."""
        return self.action("start", "--root", "shared", *options, env={"DAEMONIZE_TEST": self.box.folder})

    def test_quiet_start_and_run_never_make_one(self) -> None:
        for argv in (["start", "--quiet"], ["run"]):
            for realm in ([], ["--realm", "c"]):
                err = self.action(*argv, *realm, want=2).err
                self.assertRegex(err, r"(?m)^try: .*authserver\.py passwd \S+ \S+%s$" % "".join(" " + word for word in realm))
                self.assertFalse(os.path.exists(self.passwords))

    @needs_root
    def test_the_file_is_for_the_daemons_group(self) -> None:
        self.action("start", *AS_NOBODY, "--gid", str(OTHER))
        info = os.stat(self.passwords)
        self.assertEqual((info.st_uid, info.st_gid, info.st_mode & 0o777), (0, OTHER, 0o640))
        self.action("reload")

    def test_restart_on_a_unix_socket_is_a_first_start(self) -> None:
        """restart of what never ran is start: with unix:PATH it prints a curl line with --unix-socket."""
        path = self.box.path("sock")
        said = self.action("restart", "--bind", "unix:" + path).out
        self.action("status")
        self.assertIn("\ntry: curl --digest -u admin --unix-socket %s http://localhost/example/foo\n" % (
            shlex.quote(path)), said)

    @needs("curl")
    def test_what_it_says_can_be_pasted(self) -> None:
        """user, password (once), kept in, change it, try: in these lines; the commands work as they stand."""
        said = self.start("--realm", "a b")
        url = "http://%s/" % self.box.address(said)
        found = re.search("(?m)^user: admin\npassword: (\\S{12,})\nkept in: (.*)\nchange it: (python3 .* passwd .* admin .*"
                          "&& python3 .* reload.*)\ntry: (curl --digest -u admin %s)\n\\Z" % url, said.out)
        self.assertTrue(found, said.out)
        password, path, change, again = found.groups() if found else ("",) * 4
        self.assertEqual((shlex.split(path), said.err), ([self.passwords], ""))
        self.assertEqual(os.stat(self.passwords).st_mode & 0o777, 0o600)
        self.action("restart", env={"DAEMONIZE_TEST": self.box.folder})
        for new in ("", "another one"):
            if new:  # asked twice, on the terminal, and there is none
                done = run(["sh", "-c", change], 0, ((new + "\n") * 2).encode(), env=self.box.env,
                           start_new_session=True, cwd="/")
                self.assertRegex(done.out, "changed.*(?s:.*)reloaded")
            command = again.replace("-u admin", "-u 'admin:%s' -sf --noproxy '*'" % (new or password))
            self.assertIn("a b.txt</a>", run(["sh", "-c", command], 0, cwd="/").out)
            self.assertIn("shared", run(["sh", "-c", command.replace(url, url + "a%20b.txt")], 0, cwd="/").out)
        self.assertNotIn(password, read(self.passwords) + self.start().out)

    @needs("openssl")
    def test_where_a_network_listens(self) -> None:
        said = self.start("--bind", ":0")
        self.assertRegex(said.err, r"\Aauthserver: warning: .*network.* http://\S+:\d+/.*Basic is off.*read.*\n(try: .*\n)?\Z")
        self.assertRegex(said.out, r"\ntry: curl --digest -u admin http://(\[::1\]|127\.0\.0\.1):\d+/\n\Z")
        self.action("stop")
        self.assertEqual(self.start("--bind", ":0", "--tls-cert", make_certificate(self.box)).err, "")

    def test_folders_that_cannot_be_served(self) -> None:
        self.box.make("closed", 0o700)
        self.box.make("jail")
        rows = [(2, ["none"], "none: No such file"), (2, ["shared/a b.txt"], "a b.txt: Not a directory")]
        rows += [(2, ["shared", "--chroot", "jail"], "shared: .*--chroot")] * ROOT
        if ROOT and python_runs_as(NOBODY):
            rows.append((1, ["closed", *AS_NOBODY, "--logfile", self.box.log], "closed: Permission denied"))
        for status, options, line in rows:
            with self.subTest(options):
                said = self.action("start", "--root", *options, want=status)
                self.assertRegex(said.err, r"(?m)^daemonize: fatal: unable to serve .*%s.*\n\Z" % line)
                self.assertEqual(said.err.count("\n") > 1, status == 1)
                self.assertEqual([path for place in ("/run/", "/etc/", "/var/log/", os.path.expanduser("~/."))
                                  for path in glob.glob(place + self.name + "*")] + self.box.processes(), [])

    @needs("openssl")
    def test_secrets_below_the_root(self) -> None:
        pem, secret, second = make_certificate(self.box), self.box.path("nonces"), self.box.path("shared", "second")
        passwords = self.box.write("passwords", "jim:plain:secret\n", 0o600)
        os.link(passwords, second)
        said = self.box.start("--root", self.box.folder, "--hidden", "--bind", "127.0.0.1:0", "--tls-cert", pem,
                              "--passwords", passwords, "--nonce-secret", secret)
        at = self.box.address(said)
        listings = https(at, "/").body + https(at, "/shared/").body
        for path in [passwords, secret, pem, second, self.box.pidfile, self.box.log, self.box.pidfile + ".lock"]:
            name = os.path.relpath(path, self.box.folder)
            with self.subTest(name):
                self.assertEqual(https(at, "/" + name).status, 404)
                self.assertNotIn(b'href="%s"' % os.path.basename(name).encode(), listings)
                self.assertEqual("/%s lies below" % name in said.err, path in (passwords, secret, pem))


@needs("openssl", "chromium")
class Browser(BoxTest):
    """Chromium"""

    def test_it_shows_a_listing_and_seeks_in_a_sound(self) -> None:
        self.box.write(os.path.join(self.box.make("root"), "<b> & ü.txt"), "x")
        with wave.open(self.box.path("root", "sound.wav"), "wb") as sound:
            sound.setparams((2, 2, 48000, 0, "NONE", ""))
            sound.writeframes(bytes(60 * 192000))
        self.box.write("root/seek.html", """<video id=v muted preload=auto src=sound.wav#t=55></video><script>
            v.onloadeddata = () => { document.title = "at " + Math.round(v.currentTime) }</script>""")
        at = "https://jim:secret@" + self.box.serve("--root", self.box.path("root"), "--tls-cert", make_certificate(
            self.box), "--passwords", self.box.write("passwords", "jim:plain:secret\n", 0o600))
        self.assertIn("&lt;b&gt; &amp; ü.txt</a>", browse(self.box, at))
        self.assertIn("<title>at 55</title>", browse(self.box, at + "/seek.html"))
        sizes = [int(size) for size in re.findall(r'"GET /sound.wav HTTP/1.1" 206 (\d+) ', read(self.box.output))]
        self.assertTrue(sizes and min(sizes) < 1000000, sizes)


@unittest.skipUnless(os.path.exists(README), "needs README")
class ReadmeTest(BoxTest):
    """What the subjects below share."""

    PAGES = {"/README": "daemonize.py and authserver.py", ":8082/": "Hello jim"}
    # What a daemon of the default name writes is the box's own, and so is every port.
    HIDE = ('{ cp -a /etc "$0/etc" || true; } && mount --bind "$0/etc" /etc && mount -t tmpfs -o mode=755 none /run && '
            'mount -t tmpfs -o mode=755 none /var/log && ip link set lo up && mkdir -m 777 /run/home && '
            'rm -f /etc/*.passwords && mkdir /run/d && cp "$0"/*.py /run/d && '
            'sed -i "s|^\\([^:]*:[^:]*:%d:.*:\\)[^:]*:|\\1/run/home:|" /etc/passwd && '
            'echo hidden && exec sleep 86400' % NOBODY)

    def setUp(self) -> None:
        super().setUp()
        self.name, self.ports = self.own_name(), {}  # type: str, Dict[str, str]
        for name in ("README", "daemonize.py", "authserver.py"):
            shutil.copy(os.path.join(HERE, name), self.box.path(name))
        os.chmod(self.box.folder, 0o777)

    def hide(self) -> List[str]:
        """Return what takes a command into namespaces of its own, with its own /etc, /run, loopback."""
        # "ip" is not there, or unshare(2) not allowed: that is no fault of README.
        child = self.box.spawn("unshare", "-m", "-n", "sh", "-c", self.HIDE, self.box.folder)
        until(lambda: "hidden" in read(self.box.output) or child.poll() is not None, "a hidden place")
        if child.poll() is not None:
            self.skipTest("needs unshare and ip, and the right to use them")
        return ["nsenter", "-t", str(child.pid), "-m", "-n"]

    def enter(self, *words: str, hidden: bool = True) -> Callable[..., Result]:
        """Return what runs a shell command, as root or another, in a place with files of its own.

        It is done in the box's folder, with this Python; what README has in /opt/d is in /run/d.
        """
        into, shims = self.hide() if hidden else [], self.box.make("bin")
        os.symlink(PYTHON, shims + "/python3")
        self.box.write("bin/curl", "#!/bin/sh\nexec %s --retry 9 --retry-connrefused --fail --silent "
                       "--show-error --noproxy '*' \"$@\"\n" % shutil.which("curl"), 0o755)
        env = {"PATH": shims + ":/usr/sbin:/usr/bin:/sbin:/bin", "DAEMONIZE_TEST": self.box.folder,
               "HOME": self.box.folder}
        self.addCleanup(remove, shims)

        def do(command: str, want: Optional[int] = 0, data: str = "") -> Result:
            return run(into + list(words) + ["sh", "-c", 'cd "$0" && eval "$1"', self.box.folder,
                                             command.replace("/opt/d", "/run/d")], want, data.encode(), env=env)
        return do


class Readme(ReadmeTest):
    """The commands of README"""

    def play(self, do: Callable[..., Result], change: Callable[[str], str] = str) -> None:
        """Do every command of README in order, in one folder; it succeeds, and curl gets its page."""
        password, places = "", []   # type: str, List[str]
        # What is indented by four spaces, with what follows a backslash.
        for command in re.findall(r"(?m)^ {4}(\S(?:.*\\\n)*.*)$", read(README)):
            with self.subTest(command):
                command = change(command.replace("-u admin ", "-u admin:%s " % password))
                done = do(command)
                password = "".join(re.findall(r"(?m)^password: (\S+)$", done.out)) or password
                places += re.findall(r"hello is running with pid \d+, listening on (\S+)", done.out)
                for place, page in self.PAGES.items():
                    if "curl" in command and change(place) in command:
                        self.assertIn(page, done.out)
        self.assertTrue(password)
        self.assertEqual([len(places), len(set(places))], [2, 1])      # a restart leaves no address

    @needs_root
    @needs("curl", "openssl", "nsenter")
    def test_its_commands_do_what_it_says(self) -> None:
        self.play(self.enter())

    @needs_other_user
    @needs("curl", "openssl", "nsenter")
    def test_its_commands_do_it_for_a_user_who_has_a_home(self) -> None:
        self.play(self.enter("-S", str(NOBODY), "-G", str(NOBODY)))

    @needs_user
    @needs_home
    @needs("curl", "openssl")
    def test_its_commands_do_it_under_other_names(self) -> None:
        self.box.write("README", self.unique(read(README)))
        self.play(self.enter(hidden=False), self.unique)

    def unique(self, text: str) -> str:
        """Return a command of README with names and ports of this run's own."""
        text = re.sub(r"\b8(?:08\d|443)\b", lambda found: self.ports.setdefault(
            found.group(), str(free_port())), text)
        if not text.startswith("python3 daemonize.py "):
            return text
        named = re.search(r" (?:--name|--app|-- python3|--) (\w+)", text)
        name = "--name %s-%s" % (self.name, named.group(1) if named else "authserver")
        if " start" in text and not named and "--bind" not in text:
            name += " --bind " + self.unique("127.0.0.1:8081")
        return re.sub(r"daemonize\.py \w+", lambda found: "%s %s" % (found.group(), name),
                      re.sub(r" --name \w+", "", text))


class ReadmeSays(ReadmeTest):
    """What README says of files, options, messages and hosts"""

    def section(self, title: str) -> str:
        text = read(README).split("\n%s\n%s\n" % (title, "-" * len(title)))[1]
        return re.split(r"\n.+\n[-=]{3,}\n", text)[0]

    def test_it_is_plain_text_of_72_columns(self) -> None:
        """At most 520 lines, no tabs, no markup."""
        lines = read(README).splitlines()
        self.assertLessEqual(len(lines), 520)
        for before, line in zip([""] + lines, lines):
            self.assertNotRegex(line, "^.{73}|\t|^#|^```")
            if re.fullmatch("[-=]{3,}", line):
                self.assertEqual(len(line), len(before), before)

    def test_it_names_what_there_is(self) -> None:
        """Each option of --help; what bind() gets; what a server may have; every keyword of startstop()."""
        helps = self.box.daemonize("start", "-h").out + run([PYTHON, AUTHSERVER, "--help"], 0, env=self.box.env).out
        known = set(re.findall(r"--[a-z][a-z-]+", helps))
        self.assertIn("--pidfile", known)
        self.assertLess(max(map(len, helps.splitlines())), 80)
        self.assertEqual(known - set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", read(README))), set())
        own, source = self.section("Your own application"), read(SOURCES[0])
        app = APP.replace("def bind(options):", "def bind(options):\n    print(sorted(vars(options)), flush=True)")
        said = self.box.start(app=app).out
        got = set(re.findall(r"'(\w+)'", said.partition("]")[0])) - {"bind", "word"}     # the application's own
        self.assertIn("sockets", got)
        self.assertEqual(got - set(re.findall(r"\w+", own.partition("bind gets")[2].partition("All that")[0])), set())
        names = re.findall(r"(?m)^  ([a-z_]+)(?:\(\))?  +\S", own)
        self.assertEqual(len(names), 12)
        for name in names:
            self.assertRegex(source, r'"%s"|\.%s\b' % (name, name))
        keywords = re.findall(r"(\w+):", re.findall(r"(?s)def startstop\((.*?)\*\*more", source)[0])
        keywords += re.findall(r'"(\w+)"', re.findall(r'names = \{("uid".*?)\}', source)[0])
        words = re.findall(r"\w+", own[own.index("More keywords"):].replace("stdout", ""))
        self.assertEqual(set(keywords) - set(words), {"stdout", "pidfile"})

    def test_each_message_is_one_of_the_code(self) -> None:
        nodes = [node for path in SOURCES for node in ast.walk(ast.parse(read(path)))]
        # Until Python 3.7 a string is ast.Str, with s; since then a Constant, with value.
        values = [vars(node).get("value", vars(node).get("s")) for node in nodes]
        texts = [text + " " for text in values if isinstance(text, str)]
        rows = re.findall(r"(?m)^  (\S.*?)(?:  |$)", self.section("When it does not work"))
        self.assertGreaterEqual(len(rows), 25)
        for row in rows:
            with self.subTest(row):
                deed = row.replace("unable to ", "", 1) + " "       # as trying_to() has it
                self.assertTrue([text for text in texts if row in text or text.startswith(deed)], row)

    def test_its_lines_for_the_library(self) -> None:
        """Those that serve a folder, and those that protect a handler, let in jim alone."""
        self.box.write("users", ha1_line("jim", "secret"), 0o600)
        self.box.write(os.path.join(self.box.make("srv"), "a"), "mine")
        handler = '''import http.server
class MyHandler(http.server.SimpleHTTPRequestHandler):
    def translate_path(self, path):
        return "srv/a"
'''
        for code in (block("from authserver import Auth").replace("/srv", self.box.path("srv")),
                     handler + block("from authserver import Passwords, protect\n")):
            port = free_port()
            at = "127.0.0.1:%d" % port
            self.box.spawn(PYTHON, "-c", re.sub(r"808\d", str(port), code))
            until(lambda: not reach(at), "a server")
            self.assertEqual(request(at, "/a", "GET", "").status, 401)
            self.assertEqual(request(at, "/a", "GET", digest(at, "/a")).body, b"mine")

    def prepare(self) -> Callable[..., Result]:
        """Return what runs a command where the files are that hosts are told of."""
        do = self.enter()
        conf = block("--uid").replace("www", "nobody", 1).replace("/srv/www", "'%s'" % self.box.folder)
        do("cat >/etc/d.conf", data=conf)
        for user in ("jim", "ann"):
            do("python3 authserver.py passwd --stdin /etc/authserver.passwords " + user, data="secret\n")
        do("chgrp %d /etc/authserver.passwords; chmod 640 /etc/authserver.passwords" % pwd.getpwnam("nobody").pw_gid)
        return do

    @needs_other_user
    @needs("nsenter", "curl")
    def test_what_it_says_of_cron_and_fail2ban(self) -> None:
        do = self.prepare()
        for line in block("@reboot").splitlines():
            command = re.sub(r"^(@\w+|(\S+ ){4}\S+) +root ", "", line)
            said = do("exec env -i \"PATH=$PATH\" HOME=/ LOGNAME=root sh -c '%s'" % command)
            self.assertEqual((said.out, said.err), ("", ""), line)
        do("curl -u jim:secret http://127.0.0.1:8081/README")
        if shutil.which("fail2ban-client"):
            do("cat >/etc/fail2ban/jail.d/authserver.local", data="[sshd]\nenabled = false\n" + block("[authserver]"))
            self.assertIn("OK", do("fail2ban-client -t").out)
        do("python3 daemonize.py stop")

    @needs_other_user
    @needs("nsenter")
    def test_what_it_says_of_the_night(self) -> None:
        do = self.prepare()
        do("python3 /opt/d/daemonize.py start @/etc/d.conf; mkdir new; cp *.py new")
        night = block("d() {").replace("\\\n", " ").splitlines()
        self.assertGreater(len(night), 10)
        for line in night[3:]:
            line = line.replace("a passwd $f", "echo battery | a passwd --stdin $f")
            with self.subTest(line):
                do("\n".join(night[:3] + [line]))
        self.assertEqual(do("ls -d /run/*pid* /run/d* /etc/d.conf /etc/*.passwords /var/log/auth*", None).out, "")

    @needs_other_user
    @needs("nsenter", "curl")
    def test_what_it_says_of_files(self) -> None:
        do = self.enter()
        do("python3 /opt/d/daemonize.py start --uid nobody --nonce-secret /run/FILE --log-bytes 300 "
           "--bind 127.0.0.1:8081 --bind unix:/run/PATH")
        do("curl http://127.0.0.1:8081/%s" % ("x" * 300), None)
        do("until test -e /var/log/authserver/authserver.log.1; do sleep 0.1; done")
        rows = re.findall(r"(?m)^  (.{19}) (\S+) +(0\d+) .* (\S+)$", self.section("Files and owners"))
        self.assertEqual(len(rows), 9)
        for name, owner, mode, folder in rows:
            path = name.strip().replace("NAME", "authserver").replace(", .2 ...", "").replace(
                "--nonce-secret ", "/run/").replace("--bind unix:", "/run/")
            path = "/var/log/authserver/" + path if path[0] != "/" else path.rstrip("/")
            said = do("stat -c '%%U 0%%a' %s; stat -c %%U %s" % (path, os.path.dirname(path))).out
            with self.subTest(path):
                self.assertEqual(said.split(), [word.replace("USER", "nobody") for word in (owner, mode, folder)])
        do("python3 /opt/d/daemonize.py stop")

    @needs_root
    @needs("systemd-analyze")
    def test_what_it_says_of_systemd(self) -> None:
        units = [self.box.write("authserver." + name, block(first, word).replace("/usr/bin/python3", PYTHON))
                 for name, first, word in (("service", "[Service]", "Type"), ("socket", "[Socket]", "Listen"))]
        said = run(["systemd-analyze", "verify"] + units)
        about = [line for line in said.err.splitlines() if "authserver." in line]
        self.assertEqual((said.code, about), (0, []))


# -- Bench: beside the servers that are installed here -----------------------
#
# One core for the server, another for this load generator, which saturates
# long before a server in C does: compare the CPU time per answer, read from
# /proc for the whole tree of the server's processes, not the answers a second.

STOCK = r"""
import base64, http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_GET(self):
        word, _, value = self.headers.get("Authorization", "").partition(" ")
        known = word == "Basic" and base64.b64decode(value) == b"jim:secret"
        body = b"foo ok" + b"x" * 94 if known else b""
        self.send_response(200 if known else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(http.server.socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 128
Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
BLOCKS = {"stock": STOCK, "nginx": """root www; auth_basic bench; auth_basic_user_file nginx.users;
ssl_certificate pem; ssl_certificate_key pem; location /example/ { try_files /foo =404; }""", "lighttpd": """
server.modules = ("mod_auth", "mod_authn_file", "mod_accesslog", "mod_rewrite")
server.document-root = "FOLDER/www"
server.port = PORT
server.bind = "127.0.0.1"
accesslog.filename = "FOLDER/access.log"
server.max-keep-alive-requests = 100000000
url.rewrite-once = ("^/example/" => "/foo")
auth.backend = "plain"
auth.backend.plain.userfile = "FOLDER/lighttpd.users"
auth.require = ("/" => ("method" => "SCHEME", "realm" => "bench", "require" => "valid-user"))
"""}


def load(address: str, scheme: str, seconds: float, connections: int = 16, keeps: bool = True,
         **caller: Any) -> Tuple[int, List[str]]:
    """Keep `connections` busy for some seconds; return the number of answers, and failures."""
    end = threading.Event()
    callers = [Caller(address, scheme, keeps, end, pause=0, **caller) for _ in range(connections)]
    end.wait(seconds)
    end.set()
    for one in callers:
        one.join()
    return sum(one.answers for one in callers), [failure for one in callers for failure in one.failures]


class Bench:
    """The servers that are installed here, what is asked of them, and what it costs."""

    def __init__(self, box: Box, seconds: float) -> None:
        self.box, self.seconds, self.rows = box, seconds, {}  # type: Box, float, Dict[Any, List[Any]]
        os.makedirs(box.path("www", "many"))
        self.passwords = box.write("users", ha1_line("jim", "secret"), 0o600)
        box.write("pem", read(make_certificate(box)) if shutil.which("openssl") else "", 0o600)
        for name, text in (("www/foo", "foo ok" + "x" * 94), ("www/1k", "x" * 1024),
                           ("nginx.users", "jim:{PLAIN}secret\n"), ("lighttpd.users", "jim:secret\n")):
            box.write(name, text)
        for number in range(10000):
            box.write("www/many/file-%d" % number, "")

    def measure(self, what: str, scheme: str, names: Sequence[str], options: Sequence[str] = (), **asked: Any) -> None:
        """Start each server on a core of its own, load it, and note what that cost."""
        for name in names:
            if name in ("nginx", "lighttpd") and not shutil.which(name):
                continue
            words = ["--passwords", self.passwords, *options] if name == "authserver" else []
            address = other(self.box, name, BLOCKS.get(name, ""), words, {"preexec_fn": pin(0)},
                            SCHEME=scheme, SSL="ssl" * ("--tls-cert" in options))
            load(address, scheme, 0.3, **asked)
            pid, began = self.box.server.pid, time.monotonic()
            before = cpu_seconds(pid)
            answers, failures = load(address, scheme, self.seconds, **asked)
            assert answers and not failures, "%s: %d answers, %s" % (name, answers, failures[:3])
            cost = 1e6 * (cpu_seconds(pid) - before) / answers
            self.note(what, scheme, name, cost, answers / (time.monotonic() - began), memory(pid))
            self.box.kill(self.box.server)

    def note(self, what: str, scheme: str, name: str, *values: float) -> None:
        self.rows.setdefault((what, scheme, name), []).append(values)

    def round(self) -> None:
        """Measure everything once; ours is the first of each kind."""
        many = ["/example/foo%d?a=b" % number for number in range(2000)]
        www, pem = ["--root", self.box.path("www")], self.box.path("pem")
        for scheme, names in (("basic", ["authserver", "stock", "nginx"]), ("digest", ["authserver", "lighttpd"])):
            self.measure("one URL", scheme, names)
            self.measure("2,000 URLs in turn", scheme, names, paths=many)
            self.measure("new connections", scheme, names, keeps=False)
        self.measure("file of 1 KiB", "basic", ["authserver", "nginx"], www, paths=["/1k"])
        self.measure("listing of 10,000", "basic", ["authserver", "http.server"], www,
                     paths=["/many/"], keeps=False, connections=2)
        if read(pem):
            tls: Any = ("basic", ["authserver", "nginx"], ["--tls-cert", pem])
            self.measure("TLS", *tls, context=trusting())
            self.measure("TLS, new connections", *tls, context=trusting(), keeps=False)
        self.life()

    def life(self) -> None:
        """Measure start to first answer, a daemon's memory, and status of nothing."""
        at = "127.0.0.1:%d" % free_port()
        real = [sys.executable, SOURCES[0]]     # not what was compiled for the tests
        start = real + self.box.argv("start", "--logfile", self.box.log, "--bind", at, "--workers", "1",
                                     "--passwords", self.passwords)[2:]
        first, began = "start to first answer, ms", time.monotonic()
        run(start, 0, env=self.box.env)
        request(at, "/", "GET", "")
        self.note(first, "", "daemonize", 1e3 * (time.monotonic() - began), 0.0, memory(self.box.pid()))
        self.box.command("stop")
        began = time.monotonic()
        request(other(self.box, "http.server", ""), "/", "GET", "")
        self.note(first, "", "http.server", 1e3 * (time.monotonic() - began), 0.0, memory(self.box.server.pid))
        self.box.kill(self.box.server)
        for name, argv in (("daemonize", real + self.box.argv("status")[2:]),
                           ("python3 -c pass", [sys.executable, "-c", "pass"])):
            self.note("status of nothing, ms", "", name, 1e3 * run(argv).seconds, 0.0, 0.0)

    def print_table(self) -> None:
        """Print where and when, and a line for each figure: medians, and ours in relation."""
        version = run([PYTHON, DAEMONIZE, "--version"]).out.split()[-1]
        print("%s, %s, %d cores, Python %s, version %s; medians of %d rounds" % (
            time.strftime("%Y-%m-%d"), platform.platform(), os.cpu_count() or 1,
            platform.python_version(), version, max(map(len, self.rows.values()))))
        print("%-26s %-7s %-16s %9s %10s %10s %8s" % (
            "what", "scheme", "server", "us CPU", "ours / it", "requests/s", "MiB PSS"))
        ours: Dict[Tuple[str, str], float] = {}
        for (what, scheme, name), rounds in sorted(self.rows.items(), key=lambda row: row[0][:2]):
            cost, speed, size = (statistics.median(column) for column in zip(*rounds))
            ratio = ours.setdefault((what, scheme), cost) / cost
            print("%-26s %-7s %-16s %9.1f %10.2f %10.0f %8.1f" % (what, scheme, name, cost, ratio, speed, size))


def pin(core: int) -> Callable[[], None]:
    """Return what a child calls to stay on one core."""
    def stay() -> None:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core]})
    return stay


def bench(argv: List[str]) -> int:
    """Print the table: CPU per answer, and ours in relation to others; then start and status."""
    parser = argparse.ArgumentParser(prog="test_all.py bench")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many (%(default)s)")
    options = parser.parse_args(argv)
    global DAEMONIZE
    DAEMONIZE = SOURCES[0]      # what a user starts
    SERVERS["authserver"] = ("", [PYTHON, SOURCES[1], "--bind", "FRONT"])
    pin(-1)()
    setUpModule()
    measured = Bench(Box(), options.seconds)
    for _ in range(options.rounds):  # interleaved: a slow minute hits everybody
        measured.round()
    measured.print_table()
    measured.box.close()
    return 0


# -- Soak: the long ones -----------------------------------------------------


@contextlib.contextmanager
def served(*options: str) -> Iterator[Tuple[Box, str]]:
    """Run authserver.py with jim; fail when it logged a traceback."""
    with contextlib.closing(Box()) as box:
        yield box, box.serve("--passwords", box.write("passwords", "jim:plain:secret\n", 0o600), *options)
        assert "Traceback" not in read(box.output), read(box.output)[-2000:]


class Questioner(Caller):
    """A client of APP"""

    def ask(self, wire: Any) -> bool:
        """Ask once; no answer is a ValueError."""
        wire.sendall(b"sleep 0\n")
        json.loads(wire.hear().decode())
        self.answers += 1
        return False


class LifeCycle:
    """Random steps of a daemon's life under load, and what must be true after each."""

    def __init__(self, random: Random) -> None:
        self.box, self.random, self.steps, self.end = Box(), random, 0, threading.Event()
        self.strangers = [self.box.stranger() for _ in range(3)]
        self.options = ["--bind", "127.0.0.1:%d" % free_port(), "--workers", "2"]
        self.load = [Questioner(self.options[1], "basic", False, self.end) for _ in range(2)]
        self.step_start()  # restart repeats the last start: there must have been one

    def step_start(self) -> None:
        self.box.start(*self.options, app=APP)
        self.answers()

    def step_stop(self) -> None:
        self.box.command("stop")
        assert not self.daemons(), self.daemons()

    def step_restart(self) -> None:
        self.lossless("restart", 0)

    def step_reload(self) -> None:
        self.lossless("reload", 0 if self.running() else 3)

    def step_broken_restart(self) -> None:
        """restart with broken code: the old one goes on; nothing is lost before the new one serves."""
        running = self.running()
        broken, status = self.random.choice([("1 / 0", 1), ("bind = 1", 2), ("Server.probe = 1", 1)])
        self.box.write("app.py", APP + broken)
        if "probe" in broken:  # APP takes requests at once; those that the new one took end with it
            self.box.command("restart", want=status)
        else:
            self.lossless("restart", status)
        self.box.write("app.py", APP)
        assert self.running() == running, "the pid changed"

    def step_kill(self) -> None:
        """SIGKILL to the daemon: its workers follow, the next start works at once."""
        if self.running():
            os.kill(self.box.pid(), signal.SIGKILL)
        if self.random.random() < 0.5:
            self.step_start()

    def step_kill_worker(self) -> None:
        """SIGKILL to a worker: the daemon stays."""
        pid, others = self.box.pid(), self.daemons()
        if pid and len(others) > 1:
            os.kill(self.random.choice([one for one in others if one != pid]), signal.SIGKILL)
            self.answers()
            assert self.box.pid() == pid

    def step_freeze(self) -> None:
        """SIGSTOP, some command, SIGCONT: bounded, and no second daemon."""
        pid = self.running()
        if pid:
            os.kill(pid, signal.SIGSTOP)
            self.box.command(self.random.choice(["status", "stop"]), "--timeout", "0.5", want=None)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)

    def step_crowd(self) -> None:
        """Several commands at once: they take turns."""
        actions = [self.random.choice(["start", "stop", "restart", "status"]) for _ in range(4)]
        extra = ["--logfile", self.box.log, "--app", self.box.path("app.py")] + self.options
        crowd = [self.box.spawn(*self.box.argv(action, *extra * (action == "start"))) for action in actions]
        for child, action in zip(crowd, actions):
            assert child.wait(60) in ((0, 1, 3) if action == "status" else (0,)), (action, read(self.box.output))

    def step_odd_pidfile(self) -> None:
        """A stranger's pid in the pidfile: nobody is signalled."""
        if not self.running():
            self.box.write("d.pid", "%d\n" % self.random.choice(self.strangers).pid)
            self.box.command(self.random.choice(["stop", "status", "reload"]), want=None)

    def running(self) -> int:
        return self.box.pid() if self.box.command("status", want=None).code == 0 else 0

    def daemons(self) -> List[int]:
        """Return the processes of the box that are no strangers."""
        return sorted(set(self.box.processes()) - {one.pid for one in self.strangers})

    def answers(self) -> None:
        until(lambda: not reach(self.options[1]) and ask(self.options[1]), "an answer")

    def lossless(self, action: str, status: int) -> None:
        """Run a command; when the daemon was running no client may notice."""
        running, lost = self.running(), [list(one.failures) for one in self.load]
        self.box.command(action, want=status)
        now = [list(one.failures) for one in self.load]
        assert not running or now == lost, now

    def check(self) -> None:
        """After each step: one daemon with two workers or none, no stranger hurt, nothing leaked."""
        running = self.running()
        until(lambda: set(self.daemons()) == set(family(running) if running else [])
              and len(self.daemons()) <= 3, "one daemon: %s" % running)
        assert all(one.poll() is None for one in self.strangers), "a stranger was signalled"
        assert len(os.listdir(self.box.folder)) <= 9, os.listdir(self.box.folder)

    def step(self) -> str:
        name = self.random.choice([name for name in dir(self) if name.startswith("step_")])
        try:
            getattr(self, name)()
            self.check()
        except AssertionError as error:
            raise AssertionError("step %d (%s): %s" % (self.steps, name, error))
        self.steps += 1
        return name[5:]

    def close(self) -> None:
        self.end.set()
        for one in self.load:
            one.join()
        self.box.close()


def soak_life_cycle(random: Random, deadline: float) -> str:
    """Take random steps until the deadline, at least one, and return what was done."""
    counts: Any = collections.Counter()
    with contextlib.closing(LifeCycle(random)) as life:
        while not life.steps or time.monotonic() < deadline:
            counts[life.step()] += 1
    return "%d steps, %d answers under way: %s" % (life.steps, sum(one.answers for one in life.load), ", ".join(
        "%s %d" % item for item in sorted(counts.items())))


def soak_credentials(random: Random, deadline: float) -> str:
    """Put 100,000 mutated Authorization fields to the authenticator; nobody is let in, nothing grows."""
    fuzz_credentials(20000, random)  # until the caches are full
    before, rounds = memory(os.getpid()), 20000
    while rounds < 100000 or time.monotonic() < deadline:
        fuzz_credentials(10000, random)
        rounds += 10000
    grown = memory(os.getpid()) - before
    assert grown < 4, "memory grew by %.1f MiB" % grown
    return "%d mutations, memory grew by %.1f MiB" % (rounds, grown)


def soak_requests(random: Random, deadline: float) -> str:
    """Put 5,000 mutated requests to a running server: no 5xx, no 200, memory flat."""
    seen, warm = collections.Counter(), 0.0  # type: Any, float
    fields = WRONG, Digest('realm="authserver", nonce="x"', uri="/example/foo").field()
    with served("--max-failures", "0") as (box, address):
        while sum(seen.values()) < 5000 or time.monotonic() < deadline:
            text = head("/example/foo", "GET", mutate(random.choice(fields), random), CLOSE)
            status = (statuses(talk(address, text, True)) or [0])[0]
            seen[status] += 1
            assert 400 <= status < 500, (status, text)
            warm = warm or memory(box.server.pid) * (sum(seen.values()) == 500)
        grown = memory(box.server.pid) - warm
    assert grown < 4, "memory grew by %.1f MiB" % grown
    return "answers %s, memory grew by %.1f MiB" % (dict(seen), grown)


def soak_timing(random: Random, deadline: float) -> str:
    """Compare how long the refusal of a known and of an unknown user takes, 2,000 samples each."""
    rows = compare_times(2000)
    for scheme, known, difference in rows:
        assert abs(difference) < 0.1 * known, (scheme, known, difference)
    return ", ".join("%s: known user %.1f us, unknown %+.2f us" % (
        scheme, 1e6 * known, 1e6 * difference) for scheme, known, difference in rows)


def p99(address: str, seconds: float) -> float:
    """Ask one question after the other, every tenth on a new connection; return the p99 in ms."""
    took = []  # type: List[float]
    end = time.monotonic() + seconds
    with Wire(address) as kept:
        while time.monotonic() < end:
            began = time.perf_counter()
            answer = kept.ask() if len(took) % 10 else request(address)
            took.append(1e3 * (time.perf_counter() - began))
            assert answer.status == 200, answer
            select.select([], [], [], 0.002)
    return sorted(took)[len(took) * 99 // 100]


@contextlib.contextmanager
def beside(function: Callable[..., None], *arguments: Any) -> Iterator[None]:
    """Have a child call a function of no end while the body runs."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    try:
        yield
        assert child.is_alive(), "the hostile clients gave up"
    finally:
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()


def drip(address: str) -> None:
    """500 connections that send a head at one byte a second, and come back when they are cut off."""
    wires = [Wire(address) for _ in range(500)]
    for wire in wires:
        wire.sendall(b"GET / HTTP/1.1\r\nX: ")
    while True:
        for index, wire in enumerate(wires):
            try:
                wire.sendall(b"a")
            except OSError:
                wire.close()
                wires[index] = Wire(address)
            select.select([], [], [], 1 / len(wires))


def reset(address: str) -> None:
    """1,000 connections a second that are opened and reset."""
    while True:
        for _ in range(10):
            wire = Wire(address)
            wire.sendall(b"GET / HTTP/1.1\r\n")
            wire.abort()
        select.select([], [], [], 0.01)


def never_read(address: str) -> None:
    """200 connections that ask for more and more, and read nothing; again when they are cut off."""
    host, port = address.split(":")
    while True:
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                sock = stack.enter_context(socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # before the window is offered
                sock.connect((host, int(port)))
                sock.setblocking(False)
                with contextlib.suppress(OSError):
                    while True:
                        sock.send(head() * 100)
            select.select([], [], [], 30)


def knock(address: str) -> None:
    """5,000 requests a second without credentials, 25 to a packet."""
    with Wire(address) as wire:
        while True:
            began, seen = time.monotonic(), b""
            wire.sendall(head(auth="") * 25)
            while seen.count(b"HTTP/1.1 401") < 25:
                seen += wire.recv(65536)
            select.select([], [], [], max(0.0, 0.005 - (time.monotonic() - began)))


def soak_hostile(random: Random, deadline: float) -> str:
    """Honest clients keep their p99 within 3 x of the calm, or 5 ms, whatever others do."""
    said = []  # type: List[str]
    with served() as (_, address):
        while not said or time.monotonic() < deadline:
            calm, times = p99(address, 5), {}
            for attacks in ([drip], [reset], [never_read], [knock], [drip, reset, never_read, knock]):
                with contextlib.ExitStack() as stack:
                    for attack in attacks:
                        stack.enter_context(beside(attack, address))
                    select.select([], [], [], 2)  # until they are all there
                    times["+".join(attack.__name__ for attack in attacks)] = p99(address, 8)
            said.append("p99 calm %.2f ms, %s" % (calm, ", ".join("%s %.2f" % item for item in times.items())))
            assert max(times.values()) < max(3 * calm, 5), said[-1]
    return "; ".join(said)


def soak_idle(random: Random, deadline: float) -> str:
    """10,000 idle connections: memory of 5,000, and an honest client's p99 within 2 x, or 5 ms."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 11000:
        return "not run: no more than %d open files are allowed" % hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with served() as (box, address), contextlib.ExitStack() as stack:
        calm, sizes, idle = p99(address, 10), [memory(box.server.pid)], []
        for _ in range(2):
            for _ in range(5000):
                idle.append(stack.enter_context(Wire(address)))
                idle[-1].ask()
            sizes.append(memory(box.server.pid))
        crowded = p99(address, 10)
        alive = sum(wire.ask().status == 200 for wire in idle)
    assert alive == len(idle) and crowded < max(2 * calm, 5), (alive, calm, crowded)
    return "p99 %.2f ms, with 10,000 idle %.2f; memory %.1f MiB, with 5,000 %+.1f, with 10,000 %+.1f" % (
        calm, crowded, sizes[0], sizes[1] - sizes[0], sizes[2] - sizes[0])


def soak(argv: List[str]) -> int:
    """Give each soak its share of the minutes; print what it did; exit status 1 when one failed."""
    soaks = {name[5:]: function for name, function in globals().items() if name.startswith("soak_")}
    parser = argparse.ArgumentParser(prog="test_all.py soak")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all together (%(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="repeats a run")
    parser.add_argument("only", nargs="*", metavar="SOAK", help="of %s (all)" % ", ".join(soaks))
    options = parser.parse_args(argv)
    for name in options.only:
        if name not in soaks:
            parser.error("no soak %s; there are: %s" % (name, ", ".join(soaks)))
    chosen = options.only or list(soaks)
    setUpModule()
    print("seed %d" % options.seed, flush=True)
    failed = 0
    for name in chosen:
        try:
            said = soaks[name](Random(options.seed), time.monotonic() + 60 * options.minutes / len(chosen))
        except Exception:
            failed, said = 1, traceback.format_exc()
        print("%s: %s" % (name, said), flush=True)
    return failed


# -- The run -----------------------------------------------------------------
#
# This process forks a child for each subject, at most PARTS at a time: most
# tests wait most of their time.  A child leads a process group of its own, so
# that Ctrl-C is for this process alone, which then ends the others.  What came
# of the tests goes as JSON into a nameless file, what they print into another.

PARTS = min(12, 3 * (os.cpu_count() or 1))
ENDINGS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def short_id(test: Any) -> str:
    """Return Class.test_name, of a subTest too."""
    return re.sub(r"\b(__main__|test_all)\.", "", getattr(test, "test_case", test).id())


def record_of(name: str, sentence: str, *faults: str) -> Dict[str, Any]:
    """Return the record of a test; faults: what it said when it failed, each with the subTest's own sentence."""
    return {"name": name, "sentence": sentence, "rows": [], "faults": [("", text) for text in faults],
            "skips": [], "skipped": ""}


def row_of(test: Any) -> str:
    """Return a subTest's own sentence, "" for a test."""
    text = test.id()[len(test.test_case.id()):] if hasattr(test, "test_case") else ""
    return text.replace("] (", " (", 1).strip("[] ")


class Sentences(unittest.TestResult):
    """What came of the tests of one subject: a record of each, in the words of JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.records: List[Dict[str, Any]] = []

    def record(self, test: Any) -> Dict[str, Any]:
        """Return the record of the test under way, which a subTest belongs to; or of setUpClass."""
        name = short_id(test)
        if [record["name"] for record in self.records[-1:]] != [name]:
            sentence = test.shortDescription() or name.rpartition(".test_")[2].replace("_", " ")
            self.records.append(record_of(name, sentence))
        return self.records[-1]

    def startTest(self, test: Any) -> None:
        super().startTest(test)
        self.record(test)

    def addError(self, test: Any, err: Any) -> None:
        """Keep what a test, or subTest, said when it failed."""
        self.record(test)["faults"].append((row_of(test), self._exc_info_to_string(err, test)))  # type: ignore[attr-defined]

    addFailure = addError

    def addUnexpectedSuccess(self, test: Any) -> None:
        self.record(test)["faults"].append(("", "It passed, which was not expected"))

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        """Keep the row's sentence, for -v."""
        self.record(test)["rows"].append("        " + row_of(subtest) + " FAILED" * bool(err))
        if err:
            self.addError(subtest, err)

    def addSkip(self, test: Any, reason: str) -> None:
        """Keep why a test, or only a row of it, was skipped."""
        self.record(test)["skips"].append(reason)
        self.record(test)["skipped"] = "" if hasattr(test, "test_case") else " (skipped: %s)" % reason


def tests_of(subject: Any) -> List[str]:
    """Return the names of a class's tests, in the order in which they are written."""
    names: Dict[str, None] = {}
    for base in reversed(subject.__mro__):
        names.update(dict.fromkeys(name for name in vars(base) if name.startswith("test_")))
    return list(names)


def subjects() -> Dict[str, Any]:
    """Return the test classes in the order of this file: cheap to dear."""
    return {name: value for name, value in globals().items() if isinstance(value, type)
            and issubclass(value, unittest.TestCase) and tests_of(value)}


def suite(subject: Any, names: Optional[List[str]] = None) -> unittest.TestSuite:
    """Return the tests of a subject, all or some."""
    return unittest.TestSuite(subject(name) for name in names or tests_of(subject))


def load_tests(loader: unittest.TestLoader, tests: Any, pattern: Any) -> unittest.TestSuite:
    """Keep the order of this file for `python3 -m unittest` (its own is the alphabet's)."""
    return unittest.TestSuite(map(suite, subjects().values()))


def choose(words: Sequence[str], patterns: Sequence[str]) -> Dict[Any, List[str]]:
    """Return the tests of each subject that was asked for; a wrong name is a ValueError."""
    known, chosen = subjects(), {}  # type: Dict[str, Any], Dict[Any, List[str]]
    for word in words or known:
        name, _, test = word.partition(".")
        if name not in known:
            raise ValueError("no subject %s; there are: %s" % (name, ", ".join(known)))
        if test and test not in tests_of(known[name]):
            raise ValueError("no %s in %s; there are: %s" % (test, name, ", ".join(tests_of(known[name]))))
        chosen.setdefault(known[name], []).extend([test] if test else tests_of(known[name]))
    patterns = [pattern if "*" in pattern else "*%s*" % pattern for pattern in patterns or ["*"]]
    for subject, names in list(chosen.items()):
        chosen[subject] = [name for name in names if any(
            fnmatch.fnmatchcase("%s.%s" % (subject.__name__, name), pattern) for pattern in patterns)]
    return {subject: names for subject, names in chosen.items() if names}


class Part:
    """A child that runs the tests of a subject."""

    def __init__(self, subject: Any, names: List[str]) -> None:
        self.subject, self.began = subject, time.monotonic()
        self.output, self.results = tempfile.TemporaryFile(), tempfile.TemporaryFile("w+")
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            self.work(names)
        with contextlib.suppress(OSError):  # the child did it, and has come to its end
            os.setpgid(self.pid, self.pid)

    def work(self, names: List[str]) -> None:
        """Run the tests and leave: nothing of the parent's is ours to clean up."""
        os.setpgid(0, 0)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        for fd in (1, 2):
            os.dup2(self.output.fileno(), fd)
        try:
            warnings.simplefilter("default")
            result = Sentences()
            suite(self.subject, names).run(result)
            gc.collect()  # a socket that nobody closed is told of now
            json.dump(result.records, self.results)
            self.results.flush()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)

    def report(self, verbose: bool) -> List[Dict[str, Any]]:
        """Print how the subject went, and return the records that its process made."""
        name, seconds = self.subject.__name__, time.monotonic() - self.began
        with self.output, self.results:
            self.output.seek(0)
            said = self.output.read().decode(errors="backslashreplace")
            self.results.seek(0)
            records: List[Dict[str, Any]] = json.loads(self.results.read() or "[]")
        for sentence, holds in (("The process that ran it reports what came of it.", records),
                                ("Everything that is opened is closed.", "ResourceWarning" not in said)):
            if not holds:
                records.append(record_of(name, sentence, said))
        if verbose:
            say("\n%s" % (self.subject.__doc__ or name).splitlines()[0])
            for record in records:
                ending = " FAILED" if record["faults"] else record["skipped"]
                say("\n".join(["    " + record["sentence"] + ending] + record["rows"]))
        failed = sum(bool(record["faults"]) for record in records)
        print("%s %d tests %.1f s%s" % (name, len(records), seconds, ", %d failed" % failed if failed else ""), flush=True)
        return records


def say(text: str, end: str = "\n") -> None:
    """Print text that may have anything in it, a lone surrogate or a NUL in a row's name, too."""
    encoding = sys.stdout.encoding or "ascii"
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda match: repr(match.group())[1:-1], text)
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end)


def run_parts(chosen: Dict[Any, List[str]], verbose: bool) -> List[Dict[str, Any]]:
    """Run the subjects in children, PARTS at a time; return their records."""
    waiting, running, records = list(chosen.items()), {}, []  # type: Any, Dict[int, Part], List[Dict[str, Any]]
    try:
        while waiting or running:
            while waiting and len(running) < PARTS:
                # Not now: an exception out of a fork hook (of logging) is lost, and so were our child.
                signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)
                part = Part(*waiting.pop(0))
                running[part.pid] = part
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDINGS)
            pid = os.wait()[0]
            if pid in running:  # as the first process of a container we inherit others
                records += running.pop(pid).report(verbose)
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return records


def summarize(records: List[Dict[str, Any]], left: List[str], verbose: bool) -> int:
    """Print failures, seed, skips and the three numbers; return the exit status."""
    reasons: Dict[str, List[str]] = {}
    records += [record_of("The run", "Nothing is left behind.", "\n".join(left))] * bool(left)
    for record in records:
        for row, text in record["faults"]:
            say("\nFAILED %s\n%s\n%s%s" % (record["name"], record["sentence"], row and "  %s\n" % row, text.rstrip()))
        for why in record["skips"]:
            reasons.setdefault(why, []).append(record["name"])
    print("\nseed %d" % SEED)
    for why, names in sorted(reasons.items()):
        print("skipped, %s: %d" % (why, len(names)))
        print("".join("    %s\n" % name for name in names) * verbose, end="")
    failed = sum(bool(record["faults"]) for record in records)
    skipped = sum(bool(record["skipped"]) for record in records if not record["faults"])
    print("%d passed, %d failed, %d skipped" % (len(records) - failed - skipped, failed, skipped), flush=True)
    return 1 if failed else 0


def run_tests(argv: List[str]) -> int:
    """Run the tests that the command line asks for; return the exit status."""
    global SEED, PARTS
    parser = argparse.ArgumentParser(
        prog="test_all.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-v", "--verbose", action="store_true", help="each behaviour in one sentence")
    parser.add_argument("-k", action="append", metavar="PATTERN", default=[],
                        help="only tests with this in their name; repeatable")
    parser.add_argument("--seed", type=int, default=SEED, help="repeats the dice of a run")
    parser.add_argument("--parts", type=int, default=PARTS, help="subjects at a time (%(default)s)")
    parser.add_argument("subject", nargs="*", help="Class or Class.test_name (all)")
    options = parser.parse_args(argv)
    SEED, PARTS = options.seed, options.parts
    try:
        chosen = choose(options.subject, options.k)
    except ValueError as error:
        parser.error(str(error))
    if not chosen:
        print("no test matches %s" % " ".join(options.k), file=sys.stderr)
        return 1
    return summarize(run_parts(chosen, options.verbose), clean_up(), options.verbose)


class Itself(BoxTest):
    """This file keeps its own word"""
    SELF = [PYTHON, "-m", "test_all"]   # -m: what was compiled once is used again

    def test_what_it_is_asked(self) -> None:
        """A wrong name lists the right ones, a pattern that nothing fits is a failure; the dice have a seed."""
        one = "Construction.test_an_unprotected_handler_is_served_to_everybody"
        for action, words, code, said in (
                (run_tests, ["Stopp"], 2, "no subject Stopp; there are: HeaderParsing, "),
                (run_tests, ["-k", "zzz"], 1, "no test matches zzz"), (run_tests, ["--help"], 0, "test_all.py bench"),
                (run_tests, ["Stop.test_x"], 2, "no test_x in Stop; there are: test_"),
                (run_tests, ["Construction", "Itself", "-k", "*unprotected*"], 0, "Construction 1 tests"),
                (run_tests, [one, "--seed", "5"], 0, "\nseed 5\n1 passed, 0 failed, 0 skipped\n"),
                (run_tests, [one, "-v"], 0, "by name, and at once\n    an unprotected handler is served to everybody\n"),
                (soak, ["x"], 2, "no soak x; there are: ")):
            with self.subTest(words), mock.patch.dict(globals(), SEED=SEED, PARTS=PARTS, clean_up=list):
                found, text = called(action, words)
                self.assertEqual(found, code)
                self.assertIn(said, text)

    def test_the_first_word_may_be_bench(self) -> None:
        self.assertIn("--rounds", run(self.SELF + ["bench", "--help"], 0, env=self.box.env, cwd=HERE).out)

    @needs_linux
    def test_ctrl_c_leaves_nothing(self) -> None:
        """Interrupted in the middle, with processes of its own: no process and no folder stays."""
        child = self.box.spawn(*self.SELF, "HttpPages", "HttpHandlers", cwd=HERE, env=dict(
            self.box.env, TMPDIR=self.box.make("tmp")))
        until(lambda: len(family(child.pid)) > 3, "a server of a test")
        everybody = family(child.pid)
        child.send_signal(signal.SIGINT)
        self.assertEqual(child.wait(PATIENCE), 130, read(self.box.output))
        until(lambda: not any(map(is_alive, everybody)), "the end of all of them")
        self.assertEqual(os.listdir(self.box.path("tmp")), [])


def main() -> int:
    """Run the tests, `bench` or `soak`; whatever ends it, nothing is left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
    action = {"bench": bench, "soak": soak}.get("".join(sys.argv[1:2]), run_tests)
    try:
        status = action(sys.argv[1 + (action is not run_tests):])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave daemons
        left = clean_up()
    if left and not status:
        print("left behind: %s" % left, file=sys.stderr)
    return status or bool(left)


if __name__ == "__main__":
    sys.exit(main())
