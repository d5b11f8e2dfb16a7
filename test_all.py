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
import io
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
import unittest
import urllib.error
import urllib.parse
import urllib.request
import warnings
import wave
import wsgiref.simple_server
from random import Random
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple, Union)
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
    """Return the verdict on a request with these Authorization fields."""
    found = authserver.Attempt(method, target, fields, client, now, schemes or authenticator.schemes)
    found.read_body = functools.partial(authserver.call_for, read_body)
    return authserver.at_once(authenticator.judge(found))


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

    def refuses(self, pattern: str, function: Callable[..., Any], *args: Any, **kw: Any) -> None:
        """Assert that function raises a Refusal whose text fits pattern."""
        with self.assertRaisesRegex(Refusal, pattern):
            function(*args, **kw)


class HeaderParsing(AuthTestCase):
    """An Authorization field is read strictly, and always by the same parser"""

    GOOD = ('username="a",realm="r",nonce="n",uri="/",qop=auth,nc=00000001,cnonce="c",' 'response="%s"' % ("0" * 32))

    def digest(self, params: str) -> Any:
        """Parse a whole Digest field."""
        return authserver.parse_digest(authserver.parse_authorization("Digest " + params)[2])

    def malformed(self, function: Callable[[str], Any], *texts: str) -> None:
        """Assert that each text is Malformed."""
        for text in texts:
            with self.subTest(text[:40]), self.assertRaises(authserver.Malformed):
                function(text)

    def test_reads_every_form_that_rfc_9110_allows(self) -> None:
        """Any case, blanks around "=", empty elements, tokens and quoted strings are read."""
        want = {"username": "a,b", "nc": "00000001", "qop": "auth"}
        for text in ('Digest username="a,b", nc=00000001, qop=auth', 'dIGEST USERNAME="a,b",NC=00000001,QoP="auth"',
                     'Digest  , ,username = "a,b" ,\t,nc\t=\t00000001,qop="auth" , ',
                     '  Digest username="a,b", nc="00000001", qop=auth  '):
            with self.subTest(text):
                self.assertEqual(("digest", "", want), authserver.parse_authorization(text))

    def test_refuses_what_breaks_the_grammar(self) -> None:
        """Whatever is not in the grammar raises Malformed, and nothing else."""
        self.malformed(lambda text: authserver.parse_digest(authserver.parse_authorization(text)[2]),
            "", " ", "=", ",", "Dig\xe9st a=b", "Basic\tabc", "Digest a", "Digest a=",
            "Digest a=b c=d", "Digest a=b;c=d", 'Digest a="b', 'Digest a=b"', "Digest =b",
            'Digest a="b\\"', 'Digest a="b"c', 'Digest a="\x00"', 'Digest a="\x7f"',
            'Digest a="b\nc"', "Digest a=b, A=c", 'Digest a="1", b=2, a="1"', "Digest a=\xe9",
            "Digest a=b,\n", "Digest " + "a" * 20000, 'Digest a="' + "\\\\" * 9000 + '"')

    def test_refuses_a_whole_field_for_one_fault(self) -> None:
        """Nothing is missing in it, so nothing else is the reason: each fault alone, beside all that Digest asks for."""
        self.digest(self.GOOD + ", ,\t,")
        self.malformed(self.digest, *[self.GOOD + fault for fault in (
            ",x", ",x=", ",x=y z=w", ';x=y', ',x="y', ',x=y"', ",=y", ',x="y"z', ',x="\x00"', ",x=\xe9", ",\n", "=", ",x=y=",
            ',nc=00000001', ',NC="00000001"', ',x="", X=y')])

    def test_refuses_what_a_pattern_nearly_fits(self) -> None:
        """Controls and a last backslash in a quotation, a digit too many, a comma in a token: each at its place."""
        self.malformed(self.digest, *[self.GOOD + fault for fault in (',x="\\"', ',x="\n"', ',x="\x7f"', ',x="\x08"', ',x="\\\x00"')])
        self.malformed(self.digest, self.GOOD.replace("nc=00000001", "nc=123456789"), self.GOOD.replace("0" * 32, "0" * 96),
                       self.GOOD.replace('username="a"', "username*=UTF-8''a'b"))
        self.malformed(authserver.parse_authorization, "Basic YTpi,YTpi", "Basic YTpi YTpi")
        for host in ("a/b", "u@b", "[]", "[::1]]", "[g]", "a:8o", "a:80:80"):
            self.assertRaises(authserver.BadRequest, authserver.parse_head, ("GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host).encode())
        for host in ("", "a", "[::1]", "[::1]:80", "a:", "127.0.0.1:80", "a_b.c-d~%20"):
            authserver.parse_head(("GET / HTTP/1.1\r\nHost: %s\r\n\r\n" % host).encode())

    def test_what_is_as_long_as_it_may_be_is_read(self) -> None:
        """A field, a name with its password, realm and nonce and cnonce together; one character more is refused."""
        basics = [lambda n: authserver.decode_basic(base64.b64encode(b"a:" + b"b" * (n - 2)).decode())]
        texts: List[Any] = [lambda n, name=name: self.digest(self.GOOD.replace(
            '%s="%s"' % (name, name[0]), '%s="%s"' % (name, "x" * (n - 2)))) for name in ("realm", "nonce", "cnonce")]
        whole = [lambda n: self.digest(self.GOOD + ",x=".ljust(n - len("Digest " + self.GOOD), "y"))]
        for limit, functions in ((authserver.MAX_TEXT, basics + texts), (authserver.MAX_CREDENTIALS, whole)):
            for function in functions:
                function(limit)
                with self.assertRaises(authserver.Malformed):
                    function(limit + 1)

    def test_a_field_takes_no_longer_than_its_length(self) -> None:
        """Of blanks, commas or letters: sixteen times the length costs sixteen times the CPU, not its square."""
        def cost(size: int, start: str, filling: str, end: str) -> float:
            began = time.process_time()
            with contextlib.suppress(authserver.Malformed):
                authserver.parse_authorization("Digest " + start + filling * size + end)
            return time.process_time() - began
        for form in (("x=y", "\t", "\xe9"), ("x=y", ", ", "\xe9"), ("", "z", "\t\xe9"), ("x=y,", "z", "?")):
            with self.subTest(form):
                self.assertLess(min(cost(7000, *form) for _ in range(5)), 80 * cost(437, *form) + 0.001)

    def test_decodes_basic_credentials(self) -> None:
        """The examples of RFC 7617, Latin-1, a colon in the password, composed Unicode."""
        for token, want in (("QWxhZGRpbjpvcGVuIHNlc2FtZQ==", ("Aladdin", "open sesame")),
                            ("dGVzdDoxMjPCow==", ("test", "123£")), ("dGVzdDoxMjOj", ("test", "123£")),
                            ("YTpiOmM=", ("a", "b:c")), ("Og==", ("", "")),
                            (basic("a", "u\u0308")[6:], ("a", "\xfc"))):
            with self.subTest(token):
                self.assertEqual(want, authserver.decode_basic(token))

    def test_refuses_basic_credentials_that_are_not_strict_base64(self) -> None:
        """Junk, missing or doubled padding, the URL alphabet, no colon, controls: Malformed."""
        self.malformed(authserver.decode_basic, "", "=", "====", "!!!", "QWxhZGRpbjpvcGVuIHNlc2FtZQ", "YTpi=",
            "YTpi==", "YTpiYw", "YTpiYx==", "YT pi", "YTpi!!!!", "YTpi-_-_", "YWxpY2U=",
            basic("a", "b\0c")[6:], basic("a\n", "b")[6:], basic("a", "\x7f")[6:])

    def test_refuses_digest_credentials_that_lack_or_garble_something(self) -> None:
        """Each of the parameters must be there, and have its form."""
        good = dict(part.split("=", 1) for part in self.GOOD.split(","))
        self.digest(self.GOOD)
        bad: List[Dict[str, Optional[str]]] = [{name: None} for name in good if name != "qop"]
        bad += [{"nc": nc} for nc in ("0", "1", "00000000", "000000001", "zzzzzzzz", "+0000001",
                                      '"0000 001"', "0000_001", '"%s"' % ("\xb2" * 8))]
        bad += [{"response": text} for text in ('""', '"%s"' % ("0" * 31), '"%s"' % ("g" * 32),
                                                '"\xe9\xe9"', '"%s"' % ("0" * 33))]
        bad += [{"username*": "UTF-8''a"}, {"username": None, "username*": "a"},
                {"username": None, "username*": "ISO-8859-1''a"}, {"cnonce": '""'}]
        for change in bad:
            params = {k: v for k, v in dict(good, **change).items() if v is not None}
            self.malformed(self.digest, ",".join(map("=".join, params.items())))

    def test_reads_a_user_name_in_every_way_it_may_be_meant(self) -> None:
        """Escaped and bare backslash, UTF-8 and Latin-1, percent, and username*."""
        for name, value, want in (("username", r"DOM\\jim", r"DOM\jim"), ("username", r"DOM\jim", r"DOM\jim"),
                ("username", "m\xc3\xbcller", "müller"), ("username", "m\xfcller", "müller"),
                ("username", "m%C3%BCller", "müller"), ("username", r"a\"b", 'a"b'),
                ("username*", "utf-8'de'm%C3%BCller", "müller")):
            with self.subTest(name + "=" + value):
                self.assertIn(want, authserver.read_usernames({name: value}))

    def test_refuses_names_that_cost_too_much(self) -> None:
        """To normalize 16 KiB of combining characters would take a tenth of a second."""
        long = "\u0315\u0300" * 300
        for field in (basic(long, "x"), basic("x", long), "Digest " + self.GOOD.replace(
                '"a"', '"%s"' % long.encode().decode("latin-1"))):
            self.assertIn(attempt(make(), field).status, (400, 413))


class DigestArithmetic(AuthTestCase):
    """The published examples come out to the letter"""

    def theirs(self, values: Dict[str, str], method: str = "GET", algorithm: str = "MD5",
               qop: str = "auth", body: Optional[bytes] = None) -> str:
        """Return the response as authserver's pure functions compute it."""
        ha1 = authserver.digest_ha1(values["username"], values["realm"], values["password"], algorithm)
        if algorithm.endswith("-sess"):
            ha1 = authserver.digest_ha1_session(ha1, values["nonce"], values["cnonce"], algorithm)
        return authserver.digest_response(ha1, values["nonce"], "00000001", values["cnonce"], qop,
            authserver.digest_ha2(method, values["uri"], algorithm, body), algorithm)

    def test_equals_the_vectors_of_the_rfcs(self) -> None:
        """RFC 2617, RFC 7616 (with errata 4495, 4897), -sess and auth-int forms of them."""
        for values, settings, want in VECTORS:
            with self.subTest(values["realm"], **settings):
                if settings.get("algorithm", "MD5") not in authserver.HASHES:
                    self.skipTest("this Python's hashlib lacks " + settings["algorithm"])
                self.assertEqual(want, self.theirs(values, **settings))
                self.assertEqual(want, respond(values, **settings))  # what the tests compute

    def test_makes_the_same_ha1_as_other_programs(self) -> None:
        """CherryPy's documented entry."""
        self.assertEqual("3238cdfe91a8b2ed8e39646921a02d4c",
                         authserver.digest_ha1("alice", "wonderland", "4x5istwelve"))

    def test_serves_where_fips_mode_refuses_hashes(self) -> None:
        """Both schemes and a lock-out, with hashlib as Red Hat's FIPS mode leaves it."""
        said = run([PYTHON, "-c", """
import hashlib, sys
def strict(real):
    def call(*data, usedforsecurity=True, **keys):
        if keys or real is not hashlib_md5: raise ValueError("disabled for FIPS")
        if usedforsecurity: raise ValueError("disabled for FIPS")
        return real(*data)
    return call
hashlib_md5 = hashlib.md5
hashlib.md5, hashlib.blake2s, hashlib.blake2b = map(strict, (hashlib.md5, hashlib.blake2s, hashlib.blake2b))
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import authserver
users = authserver.Authenticator(authserver.Passwords({"jim": "secret"}, realm="r"), max_failures=(1, 60.0))
nonce = users.challenge(users.clock())[0][1].split('"')[3]
proof = authserver.digest_response(authserver.digest_ha1("jim", "r", "secret"), nonce, "00000001", "c",
                                   "auth", authserver.digest_ha2("GET", "/"))
field = ('Digest username="jim", realm="r", nonce="%s", uri="/", qop=auth, nc=00000001, cnonce="c", '
         'response="%s"' % (nonce, proof))
print([authserver.at_once(users.judge(authserver.Attempt(
    "GET", "/", [one], "192.0.2.1", users.clock(), users.schemes))).status
       for one in (field, sys.argv[2], sys.argv[3], sys.argv[2])])
""", HERE, JIM, WRONG], 0).out
        self.assertEqual(said, "[200, 200, 401, 429]\n")


class Nonces(AuthTestCase):
    """A nonce cannot be forged, and each of its counts is good once"""

    def crowded(self, slots: int) -> Any:
        """Return a patch that makes all new nonces share so many places in the table."""
        real = os.urandom
        return mock.patch("os.urandom", lambda size: (
            real(size)[:-2] + bytes([0, real(1)[0] % slots]) if size == 6 else real(size)))

    def used(self, client: Client, *counts: int) -> List[str]:
        """Return what is said to these counts: "200", "replay" or "stale"."""
        verdicts = [client.ask(client.field("%08x" % count)) for count in counts]
        return [verdict.reason or str(verdict.status) for verdict in verdicts]

    def test_is_good_for_its_lifetime_only(self) -> None:
        """Made a little in the future (another machine's clock) it is good; expired it is stale."""
        for age, status in ((-29, 200), (0, 200), (299, 200), (300, 401), (3000, 401)):
            with self.subTest(age):
                verdict = Client(make()).ask(now=NOW + age)
                self.assertEqual((status, status == 401), (verdict.status, is_stale(verdict)))

    def test_cannot_be_forged(self) -> None:
        """Any changed character, another key, junk of any length: not ours."""
        client = Client(make())
        nonce = client.values["nonce"]
        bad = [nonce[:i] + ("A" if nonce[i] != "A" else "B") + nonce[i + 1:] for i in range(len(nonce))]
        bad += ["0" * 36, nonce + "=", nonce[:-1], "A" * 200, Client(make()).values["nonce"]]
        for text in bad:
            with self.subTest(text[:40]):
                self.assertTrue(is_stale(client.ask(client.field(nonce=text))))
        self.assertEqual(200, client.ask(client.field("00000001")).status)

    def test_window_accepts_each_count_once_in_any_order(self) -> None:
        """Shuffled counts pass once each, whatever overtook them; the second time is a replay."""
        client, counts = Client(make()), list(range(1, authserver.NC_WINDOW + 1))
        Random(SEED).shuffle(counts)
        self.assertEqual(["200"] * len(counts), self.used(client, *counts))
        self.assertEqual(["replay"] * len(counts), self.used(client, *counts))

    def test_window_is_unmoved_by_huge_counts(self) -> None:
        """ffffffff is accepted, costs no memory, and makes all small counts too old."""
        client, top = Client(make()), 0xffffffff
        self.assertEqual(["200", "200", "replay", "replay", "200"],
                         self.used(client, 1, top, 2, top - authserver.NC_WINDOW, top - 50))

    def test_no_shift_is_longer_than_the_window(self) -> None:
        """Whatever two counts a client chooses: to shift by their distance would take half a gigabyte."""
        class Short(int):
            def __lshift__(self, places: int) -> int:
                assert places < authserver.NC_WINDOW
                return int(self) << places
        for highest, nonce_count, want in ((0, 1 << 32, (1 << 32, 1)), (5, 5 + 64, (69, 1)), (5, 5 + 63, (68, 1 << 63 | 1)),
                                           (1 << 32, 1, None), (69, 5, None), (68, 5, (68, 1 << 63 | 1))):
            self.assertEqual(authserver.advance_window(highest, Short(1), nonce_count), want)

    def test_where_memory_has_no_descriptor(self) -> None:
        """A file without a name takes its place, written to its end, so that a full disk is found now; it works as well."""
        for error in (AttributeError, OSError(errno.ENOSYS, "")):
            with mock.patch.object(os, "memfd_create", side_effect=error, create=True):
                authenticator = make()
            found = os.fstat(authenticator.table.fd)
            self.assertEqual((found.st_nlink, found.st_size), (0, authserver.TABLE_SIZE))
            self.assertGreaterEqual(found.st_blocks * 512, authserver.TABLE_SIZE)
            self.assertEqual(["200", "replay"], self.used(Client(authenticator), 1, 1))

    @needs_linux
    def test_nobody_makes_the_memory_smaller(self) -> None:
        """Sealed: a page that is cut off under a process would kill it."""
        if not hasattr(os, "memfd_create"):
            self.skipTest("needs memfd_create (Python 3.8)")
        table = authserver.SharedTable()
        with self.assertRaises(PermissionError):
            os.ftruncate(table.fd, 0)

    def test_window_agrees_with_a_set(self) -> None:
        """Against a plain set of used counts, 5,000 random uses give the same answers."""
        chance, client = Random(SEED), Client(make())
        used: Set[int] = set()
        highest = 0
        for _ in range(5000):
            count = max(1, highest + chance.randint(-150, 20))
            expected = count not in used and count > highest - authserver.NC_WINDOW
            self.assertEqual(["200" if expected else "replay"], self.used(client, count))
            used.add(count)
            highest = max(highest, count)

    def test_no_use_counts_twice_however_small_the_table(self) -> None:
        """With nonces that push one another out, and a clock that is set: never one use twice."""
        with self.crowded(2):
            authenticator, chance, accepted = make(), Random(SEED), []  # type: Any, Random, List[str]
            now, clients = NOW, []  # type: float, List[Client]
            for _ in range(3000):
                now += chance.choice((0, 0, 0, 0.003, 0.01, 1, 20) * 20 + (-3600, 3600))
                authenticator.table.set_clock(now)
                if chance.random() < 0.3 or not clients:
                    clients = clients[-6:] + [Client(authenticator, now=now)]
                client = chance.choice(clients)
                field = client.field("%08x" % chance.randint(1, 6))
                accepted += [field] * (client.ask(field, now=now).status == 200)
        self.assertEqual(len(set(accepted)), len(accepted))
        self.assertGreater(len(accepted), 100)

    def test_a_newer_nonce_takes_the_place_and_an_older_one_never_does(self) -> None:
        """Of two nonces of one moment in one slot the second is stale; a later one evicts both."""
        with self.crowded(1):
            authenticator = make()
            first, second, late = (Client(authenticator, now=now) for now in (NOW, NOW, NOW + 1))
            said = [self.used(client, 1)[0] for client in (first, second, first, late, first, second)]
        self.assertEqual(["200", "stale", "replay", "200", "stale", "stale"], said)

    def test_one_of_many_processes_gets_the_same_count(self) -> None:
        """Eight forked processes use the same counts at once: exactly one gets each."""
        client = Client(make())
        fields = [client.field() for _ in range(100)]
        gate, opened = os.pipe()
        told, tell = os.pipe()
        children = []
        for _ in range(8):
            children.append(os.fork())
            if not children[-1]:
                os.close(opened)
                os.read(gate, 1)            # returns at end of file, for all at once
                os.write(tell, b"." * sum(client.ask(field).status == 200 for field in fields))
                os._exit(0)
        for fd in (opened, gate, tell):
            os.close(fd)
        with open(told, "rb") as file:
            self.assertEqual(100, len(file.read()))
        self.assertEqual([0] * 8, [os.waitpid(child, 0)[1] for child in children])

    def test_one_of_many_threads_gets_the_same_count(self) -> None:
        """Threads are kept apart too; record locks alone do not do that."""
        client, gate, real = Client(make()), threading.Barrier(8), authserver.advance_window
        fields = [client.field() for _ in range(20)]

        def slowly(*window: int) -> Any:
            select.select([], [], [], 0.001)  # others get their turn where it hurts most
            return real(*window)

        def race(_: int) -> int:
            gate.wait(PATIENCE)
            return sum(client.ask(field).status == 200 for field in fields)
        with mock.patch.object(authserver, "advance_window", slowly):
            self.assertEqual(20, sum(threads(8, race)))

    def test_an_heir_that_shares_the_memory_knows_what_was_used(self) -> None:
        """A nonce of the old one is good in the new one, no use twice, and a lock-out holds; with a secret, too."""
        for secret in (b"", b"s" * 32):
            with self.subTest(secret=secret):
                passwords = Passwords({"jim": "secret"}, realm="files")
                old = Authenticator(passwords, nonce_secret=secret, max_failures=(1, 60.0))
                heir = Authenticator(passwords, nonce_secret=secret, max_failures=(1, 60.0),
                                     table=authserver.SharedTable(os.dup(old.table.fd)))
                now = old.clock()
                client = Client(old, now=now)
                fields = [client.field() for _ in range(3)]
                said = [attempt(one, field, now=now).status for one, field in (
                    (old, fields[0]), (heir, fields[1]), (heir, fields[0]), (old, fields[1]), (old, fields[2]))]
                self.assertEqual(said, [200, 200, 401, 401, 200])
                attempt(old, WRONG, client="192.0.2.1", now=now)
                self.assertEqual(attempt(heir, JIM, client="192.0.2.1", now=now).status, 429)

    @needs_linux
    def test_challenges_leave_nothing_behind(self) -> None:
        """20,000 of them cost no memory, once the caches are full."""
        authenticator, sizes = make(), []
        for count in (5000, 20000):
            for _ in range(count):
                attempt(authenticator)
            sizes.append(int(re.findall(r"VmData:\s+(\d+)", read("/proc/self/status"))[0]))
        self.assertLess(sizes[1] - sizes[0], 1000)

    def test_machines_with_one_secret_accept_one_anothers_nonces(self) -> None:
        """Younger than their own start, that is: after a restart an old one is stale once."""
        first, second = (make(nonce_secret=b"s" * 32) for _ in range(2))
        client = Client(first)
        client.authenticator = second
        self.assertEqual(200, client.ask().status)
        client.authenticator = make(nonce_secret=b"s" * 32, now=NOW + 5)
        verdict = client.ask(now=NOW + 6)
        self.assertTrue(is_stale(verdict))
        client.hear(verdict.fields[0][1])
        self.assertEqual(200, client.ask(now=NOW + 7).status)
        client.authenticator = make(nonce_secret=b"t" * 32)
        self.assertTrue(is_stale(client.ask(now=NOW + 7)))

    def test_signs_whatever_this_hashlib_lacks(self) -> None:
        """No BLAKE2, one without keys, or one that is forbidden: 12 bytes that depend on key and data."""
        for error in (AttributeError, TypeError, ValueError):
            with self.subTest(error), mock.patch.object(hashlib, "blake2s", side_effect=error):
                sign = authserver.find_mac()
                made = {sign(key, data) for key in (b"k", b"l") for data in (b"", b"x")}
                self.assertEqual([len(mac) for mac in made], [12] * 4)

    def test_a_clock_that_is_right_begins_no_era(self) -> None:
        """Within CLOCK_SKEW of the time of day what was used stays used, and the nonce good; beyond, all are stale once."""
        client = Client(make())
        table, told = client.authenticator.table, []    # type: Any, List[str]
        for ahead in (0.0, authserver.CLOCK_SKEW - 1, 1 - authserver.CLOCK_SKEW):
            table.set_clock(table.now() + ahead)
            told += self.used(client, len(told) + 1)
        self.assertEqual(told + self.used(client, 1), ["200", "200", "200", "replay"])
        for ahead in (authserver.CLOCK_SKEW + 1, -authserver.CLOCK_SKEW - 1):
            client = Client(client.authenticator)
            table.set_clock(table.now() + ahead)
            self.assertEqual(self.used(client, 1), ["stale"])

    @needs_linux
    def test_a_table_is_closed_with_its_last_user(self) -> None:
        """No descriptor is left of those that are gone."""
        gc.collect()
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            make()
        gc.collect()
        self.assertEqual(os.listdir("/proc/self/fd"), before)

    def test_nonces_of_one_moment_have_places_of_their_own(self) -> None:
        """Of 300 that are made at once hardly any two want the same: else one of them is stale."""
        authenticator = make()
        clients = [Client(authenticator) for _ in range(300)]
        self.assertLess(sum(is_stale(client.ask()) for client in clients), 20)

    def test_an_era_begins_with_every_place_free(self) -> None:
        """When the clock was set back: what is new now is older than what was used, and good all the same."""
        with self.crowded(1):
            client = Client(make())
            self.assertEqual(self.used(client, 1), ["200"])
            table = client.authenticator.table
            table.set_clock(table.now() - 3600)
            self.assertEqual(Client(client.authenticator, now=NOW - 3600).ask(now=NOW - 3600).status, 200)

    def test_each_process_counts_in_a_row_of_its_own(self) -> None:
        """For as long as it lives; the sum is of all who ever counted."""
        table, rows, pids = authserver.SharedTable(), [], []    # type: Any, List[int], List[int]
        told, tell = os.pipe()
        for _ in range(3):
            pids.append(os.fork())
            if not pids[-1]:
                for _ in range(5):
                    table.add("busy")
                os.write(tell, b"%d\n" % table._own_row())
                signal.pause()
            rows.append(int(os.read(told, 9)))
        table.add("busy", 2)
        self.assertEqual(len({*rows, table._own_row()}), 4)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.assertEqual((table.statistics()["busy"], sum(table.statistics().values())), (17, 17))
        for fd in (told, tell):
            os.close(fd)

    def test_a_lock_is_given_back(self) -> None:
        """What one process has used and counted, another can at once; where the lock cannot be had, nothing is changed."""
        client = Client(make(max_failures=(1, 60.0)))
        self.assertEqual(["200"], self.used(client, 1))
        client.ask(WRONG, client="192.0.2.1")
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(5)
            said = self.used(client, 1, 2) + [str(client.ask(WRONG, client="192.0.2.2").status)]
            os._exit(said != ["replay", "200", "401"])
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        with mock.patch("fcntl.lockf", side_effect=[OSError(errno.ENOLCK, ""), None]), self.assertRaises(OSError):
            self.used(client, 3)
        self.assertEqual(["200"], self.used(client, 3))

    def test_a_lock_that_fails_is_held_by_nobody(self) -> None:
        """When the kernel refuses the lock of a file, the one between threads is free again."""
        table = authserver.SharedTable()
        with mock.patch("fcntl.lockf", side_effect=OSError(errno.EDEADLK, "")), self.assertRaises(OSError):
            table.count_failure("192.0.2.1", NOW, 10, 60.0)
        self.assertEqual(threads(1, lambda _: table._mutex.acquire(timeout=1)), [True])


LINE = "jim:files:" + hashed("MD5", "jim", "files", "secret")
SHA = "{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ="       # of `secret`
HEX = "0" * 32


def users(**more: str) -> Passwords:
    """Return a dictionary of realm files; one of this run, for who serves the same shares locks with us."""
    return Passwords(dict({"jim": "secret", "run": TOKEN}, **more), realm="files")


class PasswordFiles(AuthTestCase):
    """A password file is read as Apache reads it; a mistake names line, field and cure"""

    # A line of its own, after jim's; what is said of it; whether passwd cures it.
    MISTAKES = (
        ("bob", "user 'bob': expected user:realm:HA1.*a field is missing", True),
        ("bob:", "a field is missing", True), ("bob::" + HEX, "field 2: 00000... is no hash", True),
        ("bob:secret", "a field is missing", True), ("bob:plain:", "a field is missing", True),
        ("bob:%s:Bob" % SHA, "user 'bob': field 3: nothing may follow", True),
        ("bob:$2y$05$%s:Bob" % ("x" * 53), "user 'bob': field 3: nothing may follow", True),
        ("bob:$6$salt$%s:" % ("x" * 86), "user 'bob': field 3: nothing may follow", True),
        ("bob:files:%s0" % HEX, "user 'bob': field 3: neither 32 nor 64 hex digits", True),
        ("bob:files:%s:x" % HEX, "user 'bob': field 3: neither 32 nor 64 hex digits", True),
        ("bob:pass:word", "user 'bob': field 3: neither 32 nor 64 hex digits", False),
        ("bob:{MD5}x", "user 'bob': field 2: {MD5}... is no hash we know", True),
        ("bob:$apr1$a$b", "field 2: [$]apr1... is no hash we know", True),
        ("bob:$99$x$y", "field 2: the libcrypt of this machine does not know [$]99[$]", True),
        ("bob:" + crypted("x", "$6$rounds=1000$salt$")[:-1], "field 2: the libcrypt of this machine does not know .*of the wrong length", True),
        ("jim:plain:x", "user 'jim': again, after line 1", True),
        ("jim:" + SHA, "user 'jim': again, after line 1", True), (LINE, "again, after line 1", True),
        ("bob:{SHA}2jmj7l5rSw0yVb/vlWAYkK/YBwk=", "user 'bob': an empty password", True),
        ("bob:files:" + authserver.digest_ha1("bob", "files", ""), "user 'bob': an empty password", True),
        ("bob:plain:a\tb", "user 'bob': unable to use this password", True),
        ("bob:plain:" + "p" * 1021, "user 'bob': unable to use this password: .*too long", True),
        ("\u200bbob:plain:x", "unable to use user name '.u200bbob'", False),
        ("b\udce4b:plain:x", r"user 'b.udce4b': unable to use user name .* no UTF-8", False),
        ("bob:plain:b\udce4b", "unable to use this password: .*no UTF-8", True),
        ("bo\ufeffb:plain:x", "unable to use user name", False), ("bob\u00a0:plain:x", "unable to use user", False),
        ("bob :plain:x", "unable to use user name 'bob '", False), ("bob\\:" + SHA, "unable to use user", False),
        ("-:plain:x", "unable to use user name '-'", False), (":files:" + HEX, "unable to use user name ''", False),
        ("b" * 256 + ":plain:x", "unable to use user name", False))

    def test_names_line_field_and_cure(self) -> None:
        """Each mistake alone; the command that cures it can be pasted, and does."""
        for line, reason, curable in self.MISTAKES:
            with self.subTest(line[:40]):
                path = self.write("%s\n# x\n%s\n" % (LINE, line))
                with self.assertRaisesRegex(Refusal, "unable to use passwords .*: line 3: .*(?:%s)" % reason) as caught:
                    Passwords.read(path, "files")
                cure = str(caught.exception).partition("\ntry: ")[2]
                self.assertEqual(bool(cure), curable)
                if cure:
                    words = shlex.split(cure)
                    self.assertEqual(words[:3], ["python3", SOURCES[1], "passwd"])
                    self.assertEqual(told(*words[2:], "--stdin", typed=b"new\n")[0], 0)
                    self.assertTrue(Passwords.read(path, "files").check_password(line.partition(":")[0], "new"))

    def test_passes_over_what_does_not_matter(self) -> None:
        """Blanks at a line's ends, comments after blanks, CRLF, U+FEFF at the start, entries of other realms."""
        text = ("\ufeff# staff, M\udcfcller\r\n \t# more\r\n\r\n \t%s \t\r\nann:plain:se:cret \r\njim:other:%s\nbob:other:%s \n"
                "\tsha:%s\t" % (LINE, HEX, HEX * 2, SHA))
        passwords = Passwords.read(self.write(text), "files")
        self.assertEqual(["jim", "ann", "sha"], list(passwords.entries))
        for user, password in (("jim", "secret"), ("ann", "se:cret"), ("sha", "secret")):
            self.assertTrue(passwords.check_password(user, password))
        path = self.write("jim:other:%s\nbob:third:%s\n" % (HEX, HEX))
        self.refuses("no user of realm files in it, but of other, third\ntry: .* passwd .* admin --realm files",
                     Passwords.read, path, "files")

    def test_names_the_cure_of_the_whole_file(self) -> None:
        """Missing: passwd; open to all: chmod; both can be pasted. A folder, a pipe: no command helps."""
        missing = os.path.join(self.folder(), "it's new")
        for path, secret in ((missing, False), (self.write(LINE, 0o604), False), (self.write(LINE, 0o602), False),
                             (self.write("s" * 32, 0o644), True), (self.write("short"), True)):
            what: Callable[[], Any] = functools.partial(
                authserver.read_nonce_secret if secret else Passwords.read, path)
            with self.assertRaisesRegex(Refusal, "\ntry: ") as caught:
                what()
            cure = str(caught.exception).partition("\ntry: ")[2]
            run(["sh", "-c", cure + " --stdin" * ("passwd" in cure)], 0, b"new\n")
            if path != missing and not secret:
                with self.assertRaisesRegex(Refusal, "no user"):    # of the realm authserver
                    what()
            else:
                what()
        for path in (self.folder(), "/dev/null"):
            with self.assertRaises(Refusal) as caught:
                Passwords.read(path)
            self.assertNotIn("try:", str(caught.exception))

    def test_what_a_container_is_given_may_be_read_by_all(self) -> None:
        """0444 is accepted from root when we are not, and anything on a read-only mount; nothing else."""
        for mode, owner, uid, flags, exposed in (
                (0o444, 0, 1000, 0, False), (0o644, 0, 1000, 0, True), (0o444, 1000, 1000, 0, True),
                (0o444, 0, 0, 0, True), (0o644, 0, 1000, os.ST_RDONLY, False), (0o666, 0, 0, os.ST_RDONLY, False),
                (0o640, 0, 1000, 0, False), (0o602, 0, 1000, 0, True)):
            with self.subTest(oct(mode), owner=owner, uid=uid, flags=flags):
                found = mock.Mock(st_mode=stat.S_IFREG | mode, st_uid=owner)
                with mock.patch("os.fstat", return_value=found), mock.patch("os.geteuid", return_value=uid), \
                        mock.patch("os.fstatvfs", return_value=mock.Mock(f_flag=flags)):
                    self.assertEqual(authserver.is_exposed(0), exposed)

    def test_fips_mode_is_told_by_line(self) -> None:
        """Without MD5 or SHA-1 the entries that need them are refused, each by its line and field."""
        with mock.patch.dict(authserver.HASHES), mock.patch.object(authserver, "SHA1", None):
            del authserver.HASHES["MD5"]
            path = self.write("%s\nann:%s\nbob:plain:x\n" % (LINE, SHA))
            self.refuses("line 1: user 'jim': field 3: the hashlib of this Python lacks MD5; "
                         "line 2: user 'ann': field 2: .* lacks SHA-1", Passwords.read, path, "files")
            self.assertEqual(["SHA-256"], [name for name in users().entries["jim"].ha1 if name != "SHA-512-256"])

    def test_the_names_of_dictionaries_differ(self) -> None:
        """fingerprint() tells realm, users and passwords apart, but not the order of lines."""
        several = [users(), users(ann="x"), users(ann="y"), users(bob="x"), Passwords({"jim": "secret"}, realm="b")]
        self.assertEqual(len({item.fingerprint() for item in several}), len(several))
        self.assertEqual(users(ann="x").fingerprint(), Passwords({"ann": "x", "run": TOKEN, "jim": "secret"}, "files").fingerprint())

    def test_a_stored_hash_is_not_a_password(self) -> None:
        """Nobody logs in with what stands in the file."""
        passwords = Passwords.read(self.write("%s\nsha:%s\n" % (LINE, SHA)), "files")
        for user, password in (("jim", LINE[10:]), ("sha", SHA), ("sha", SHA[5:]), ("nobody", "")):
            self.assertFalse(passwords.check_password(user, password))
        self.assertNotIn("hunter2", repr(vars(users(ann="hunter2"))))

    def test_what_only_a_program_can_pass_is_wrong(self) -> None:
        """Lone surrogates, NUL, what is not composed: no exception, whatever the hash, by each way in."""
        passwords = Passwords.read(self.write("%s\nsha:%s\n" % (LINE, SHA)), "files")
        for user in ("jim", "sha", "nobody", "\ud800"):
            for password in ("\ud800", "secret\ud800", "\0", "secret\0", "a" * 5000, ""):
                self.assertEqual((passwords.check_password(user, password), passwords.verify(user, password)), (False, False))
        for one, other in ((("ju\u0308", "pa\u0308ss"), ("j\xfc", "p\xe4ss")), (("j\xfc", "p\xe4ss"), ("ju\u0308", "pa\u0308ss"))):
            self.assertTrue(Passwords(dict([one]), realm="files").check_password(*other))
        with mock.patch.object(authserver, "load_crypt", lambda: (lambda *_: None, threading.Semaphore(1))):
            self.assertFalse(authserver.matches(authserver.Entry("u", 1, {}, "$6$s$x"), "files", "too long for it"))
        with mock.patch.object(hashlib, "new", side_effect=ValueError), mock.patch.object(
                hashlib, "sha512_256", None, create=True), mock.patch.object(hashlib, "nosuch", side_effect=TypeError, create=True):
            self.assertIsNone(authserver.find_hash("sha512_256", "sha512-256", "nosuch"))

    def test_offering_digest_over_a_basic_only_entry_is_refused_at_start(self) -> None:
        """The mistake of the second article: named by line, user, scheme and cure."""
        path = self.write("%s\n\ncarol:%s\n" % (LINE, SHA))
        passwords = Passwords.read(path, "files")
        self.refuses(r"line 3: user 'carol' has only \{SHA\}: cannot answer Digest MD5\ntry: .*authserver.py "
                     "passwd .* carol --realm files", passwords.check_servable, ["digest", "basic"], ["MD5"])
        self.refuses("line 1: user 'jim' has only MD5 HA1: cannot answer Digest SHA-256",
                     passwords.check_servable, ["digest"], ["SHA-256"])
        passwords.check_servable(["basic"], ["MD5"])

    def test_the_fix_of_the_article_serves_both_schemes_from_one_dictionary(self) -> None:
        """Three users, one resource, Basic and Digest: every one gets in by either."""
        people = {"jim": "secret", "ann": "pa:ss", "üwe": "wörd"}
        authenticator = make(people)
        for user, password in people.items():
            for scheme, field in (("Basic", basic(user, password)), (
                    "Digest", Client(authenticator, user, password).field())):
                verdict = attempt(authenticator, field)
                self.assertEqual((200, user, scheme), verdict[:2] + (verdict.scheme,))

    def test_refuses_realms_that_clients_or_the_file_misread(self) -> None:
        """Quotes, backslashes, colons, controls, non-ASCII, and the words of the file."""
        for realm in ("", 'a"b', "a\\b", "a:b", "a\n", "ä", "plain", "{SHA}", "$6$", " a", "a "):
            with self.subTest(realm):
                self.refuses("realm", Passwords, {"a": "b"}, realm=realm)
        Passwords({"a": "b"}, realm="A-Za z09 (plain) !#$")
        with self.assertRaisesRegex(Refusal, "unable to use realm") as caught:
            Passwords.read(self.write(LINE), "a:b")
        self.assertNotIn("try:", str(caught.exception))
        self.refuses("too long", make, passwords=Passwords({"a": "b"}, realm="r" * 200))


class Limits(AuthTestCase):
    """What a scheme, a client or the file could not carry is refused where it is stored"""

    NAMES = ("", "-", "a:b", "a\n", "#a", 'a"', " a", "a ", "a\\", "\ufeffa", "a\u200b", "\u00a0", "a\x7f", "a\x85",
             "\ud800", "b" * 256)
    SECRETS = ("", "a\x1fb", "\0", "a\x7f", "\udcff", "p" * 1021, "ü" * 511)

    def test_in_the_library_and_by_passwd(self) -> None:
        """Names and passwords, at all three places where they can come from."""
        path = self.write("# precious\n")
        for name, secret in [(name, "x") for name in self.NAMES] + [("jim", secret) for secret in self.SECRETS]:
            with self.subTest(name, secret=secret[:5]):
                self.refuses("unable to use", Passwords, {name: secret})
                self.refuses("unable to use", authserver.change_password, path, name, "files", secret)
        self.assertEqual(read(path), "# precious\n")

    def test_what_is_accepted_gets_in(self) -> None:
        """The longest, and the strangest that are left, under both schemes."""
        for name, secret in (("jim", "p" * 1020), ("a", "ü" * 511), ("ü" * 127, "x"), ("DOM\\jim", "a:b\\\""),
                             ("a b", " blank "), ("50%", "%41"), ("ju\u0308rgen", "pa\u0308ss"), ("--", "-")):
            with self.subTest(name[:9], secret=secret[:9]):
                authenticator = authserver.Authenticator(Passwords({name: secret}, realm="files"))
                now = authenticator.clock()
                for field in (basic(name, secret), Client(authenticator, name.replace("u\u0308", "ü"), secret.replace(
                        "a\u0308", "ä"), now).field()):
                    self.assertEqual(attempt(authenticator, field, now=now).status, 200)

    @needs_crypt
    def test_bcrypt_knows_72_bytes(self) -> None:
        """A longer password is wrong, though bcrypt would not see the difference; that is told at start."""
        for setting in ("$2y$04$abcdefghijklmnopqrstuu", "$2b$04$abcdefghijklmnopqrstuu"):
            for most in ("a" * 72, "ü" * 36):
                passwords = Passwords.read(self.write("ann:%s\n" % crypted(most + "tail", setting)), "files")
                self.assertRegex(passwords.warnings[0], r"\$2.\$04\$ in .*72 bytes of a password")
                self.assertEqual([passwords.check_password("ann", password) for password in (
                    most, most + "tail", most + "x", most[:-1])], [True, False, False, False])
        self.assertEqual(users().warnings, [])

    def test_every_byte_of_a_sha_counts(self) -> None:
        """{SHA} and {SSHA}: any byte of the hash changed keeps the right password out."""
        for kind, octets in (("{SHA}", hashlib.sha1(b"secret").digest()),
                             ("{SSHA}", hashlib.sha1(b"secretsalt").digest() + b"salt")):
            for place in (None, 0, 7, 9, 10, 12, 19):
                stored = bytearray(octets)
                if place is not None:
                    stored[place] ^= 1
                line = "ann:%s%s" % (kind, base64.b64encode(bytes(stored)).decode())
                passwords = Passwords.read(self.write(line), "files")
                self.assertEqual(passwords.check_password("ann", "secret"), place is None, line)

    def test_strangers_are_nobody(self) -> None:
        """Who is not in the file does not get in with another one's password, whatever its kind."""
        lines = [LINE, "ann:" + SHA, "ann:plain:secret"]
        lines += ["ann:" + crypted("secret", setting) for setting in ("$6$rounds=1000$s$", "$5$s$")
                  if crypted("x", setting)[:3] == setting[:3]]
        for line in lines:
            passwords = Passwords.read(self.write(line), "files")
            self.assertTrue(passwords.check_password(line[:3], "secret"))
            for name in ("nobody", "", "ANN", "ann\0", line):
                self.assertFalse(passwords.check_password(name, "secret"), (name, line))

    @needs_crypt
    def test_strangers_take_the_slowest_way(self) -> None:
        """Wherever the slow entry stands in the file, it is what stands in for who is not there."""
        slow = "u0:" + crypted("hunter2", "$6$rounds=1000$salt$")
        for lines in ([slow, LINE], [LINE, slow], ["ann:" + SHA, slow, LINE]):
            passwords = Passwords.read(self.write("\n".join(lines)), "files")
            self.assertTrue(passwords.is_slow("nobody"))
            with mock.patch.object(authserver, "matches", return_value=True) as looked:
                self.assertFalse(passwords.verify("nobody", "hunter2"))
            self.assertEqual([call[0][0].is_slow for call in looked.call_args_list], [True])

    @needs_crypt
    def test_strangers_take_as_long(self) -> None:
        """is_slow() holds for strangers too, when it does for anybody."""
        text = "u0:%s\n%s" % (crypted("hunter2", "$6$rounds=1000$salt$"), LINE)
        passwords = Passwords.read(self.write(text), "files")
        self.assertEqual([passwords.is_slow(name) for name in ("u0", "nobody", "jim")], [True, True, False])
        self.assertFalse(users().is_slow("nobody"))


@needs_crypt
class SlowHashes(AuthTestCase):
    """The hashes of htpasswd and of the C library are verified, once per credential"""

    def passwords(self, *settings: str) -> Passwords:
        """Return a dictionary with one user per setting, u0, u1 ..., all `secret`."""
        lines = ["u%d:%s" % (number, crypted("secret", setting)) for number, setting in enumerate(settings)]
        return Passwords.read(self.write("\n".join(lines)), "files")

    def test_knows_what_the_c_library_knows(self) -> None:
        """$5$, $6$, $2y$ and $y$ entries, where this machine has them."""
        for setting in ("$5$rounds=1000$saltsalt$", "$6$rounds=1000$saltsalt$", "$6$s$",
                        "$2y$04$abcdefghijklmnopqrstuu", "$y$j75$saltsalt$"):
            with self.subTest(setting):
                if not crypted("x", setting).startswith(setting[:3]):
                    self.skipTest("needs a libcrypt that knows " + setting[:3])
                passwords = self.passwords(setting)
                self.assertEqual([True, False, False, False], [passwords.check_password(*pair) for pair in (
                    ("u0", "secret"), ("u0", "Secret"), ("u0", "secret\0x"), ("u1", "secret"))])

    def test_only_bcrypt_stops_reading(self) -> None:
        """A password of 200 bytes is right where all of it is hashed, and wrong without its last one."""
        for setting in ("$6$rounds=1000$saltsalt$", "$5$rounds=1000$saltsalt$", "{SHA}", "plain"):
            stored = ("plain:" + "p" * 200 if setting == "plain" else crypted("p" * 200, setting) if setting[0] == "$" else
                      setting + base64.b64encode(hashlib.sha1(b"p" * 200).digest()).decode())
            passwords = Passwords.read(self.write("u0:" + stored), "files")
            self.assertEqual([passwords.check_password("u0", "p" * size) for size in (200, 199, 72)], [True, False, False], setting)

    def test_a_bad_salt_is_the_fault_of_its_line_alone(self) -> None:
        """Another hash of that form, before or after it, is verified; also once the file has been mended."""
        good = crypted("secret", "$2y$04$abcdefghijklmnopqrstuu")
        bad = good[:7] + "#" + good[8:]
        with mock.patch.object(authserver, "FORMS", set()):
            path = self.write("bob:%s\nann:%s\n" % (bad, good))
            with self.assertRaisesRegex(Refusal, "line 1: user 'bob': field 2: .*does not know") as caught:
                Passwords.read(path, "files")
            self.assertNotIn("line 2", str(caught.exception))
            self.assertTrue(Passwords.read(self.write("ann:%s\n" % good), "files").check_password("ann", "secret"))

    def test_finds_crypt_by_whatever_name_it_has(self) -> None:
        """crypt_r for two at a time; crypt, one at a time; neither, and the file is refused, not the log-ins."""
        import ctypes
        plain, reentrant = mock.Mock(spec=["crypt"]), mock.Mock(spec=["crypt_r"])
        plain.crypt.return_value = reentrant.crypt_r.return_value = b"made"
        for libraries, made, count in (([OSError, reentrant], b"made", 2), ([plain], b"made", 1),
                                       ([mock.Mock(spec=[])] + [OSError] * 3, None, 1)):
            with mock.patch.object(ctypes, "CDLL", side_effect=libraries):
                function, turns = authserver.load_crypt.__wrapped__()
            self.assertEqual(made, function(b"phrase", b"setting"))
            self.assertEqual([True] * count + [False], [turns.acquire(blocking=False) for _ in range(count + 1)])
        with mock.patch.object(authserver, "load_crypt", lambda: (function, threading.Semaphore(1))), \
                mock.patch.object(authserver, "FORMS", set()):
            path = self.write("u0:$6$rounds=1000$saltsalt$" + "x" * 86)
            self.refuses("libcrypt", Passwords.read, path, "files")

    def test_a_right_password_is_hashed_once(self) -> None:
        """The verdict is remembered; a wrong one never is, another user's is not shared, and few are kept."""
        passwords = self.passwords("$6$rounds=1000$saltsalt$", "$6$rounds=1000$othersal$")
        authenticator = authserver.Authenticator(passwords, ["basic"], max_failures=(0, 1.0))
        calls = []
        function, turns = authserver.load_crypt()

        def counting(phrase: bytes, setting: bytes) -> Optional[bytes]:
            calls.append(phrase)
            return function(phrase, setting)

        def ask(user: str, password: str) -> Any:
            return attempt(authenticator, basic(user, password), now=authenticator.clock()).status
        with mock.patch.object(authserver, "load_crypt", lambda: (counting, turns)):
            for _ in range(3):
                self.assertEqual((ask("u0", "secret"), ask("u0", "wrong")), (200, 401))
            self.assertEqual(ask("u1", "secret"), 200)
            self.assertEqual(5, len(calls))
        with mock.patch.object(authserver, "REMEMBERED", 3), mock.patch.object(authserver, "load_crypt", lambda: (
                lambda phrase, setting: setting, threading.Semaphore(1))):
            self.assertEqual({200}, {ask("u0", "p%d" % number) for number in range(10)})
        self.assertLessEqual(len(passwords.granted), 3)
        self.assertNotIn(b"p9", b"".join(passwords.granted))

    def test_warns_of_a_mixed_file(self) -> None:
        """Equal time is promised for files of one kind; a mixed one is told so."""
        path = self.write("a:%s\nb:plain:x\n" % crypted("x", "$6$rounds=1000$saltsalt$"))
        self.assertIn("$6$rounds=1000$", Passwords.read(path, "files").warnings[0])


class PasswdVerb(AuthTestCase):
    """passwd changes one user, and leaves the rest of the file alone"""

    def test_adds_changes_and_deletes_in_place(self) -> None:
        """Comments, order, other users and other realms stay as they are."""
        other = "jim:other:" + "0" * 32
        path = self.write("# staff\njim:plain:old\n\n%s\nann:{SHA}x\njim:files:%s\n" % (other, HEX))
        self.assertEqual("changed", authserver.change_password(path, "jim", "files", "secret"))
        lines = authserver.password_lines("jim", "files", "secret")
        rest = "\n%s\nann:{SHA}x\n" % other
        self.assertEqual("# staff\n" + "\n".join(lines) + "\n" + rest, read(path))
        self.assertEqual("added", authserver.change_password(path, "bob", "files", "x"))
        self.assertEqual("deleted", authserver.change_password(path, "bob", "files", None))
        self.assertEqual("deleted", authserver.change_password(path, "jim", "files", None))
        self.assertEqual("# staff\n" + rest, read(path))
        self.refuses("not in", authserver.change_password, path, "jim", "files", None)

    def test_makes_a_file_that_serves_everything(self) -> None:
        """What it writes is read back, for both schemes and both algorithms; 0600."""
        path = os.path.join(self.folder(), "new")
        self.assertEqual("added", authserver.change_password(path, "müller", "files", "pä:ss"))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        passwords = Passwords.read(path, "files")
        passwords.check_servable(["digest", "basic"], ["MD5", "SHA-256"])
        self.assertTrue(passwords.check_password("müller", "pä:ss"))
        self.assertEqual(["new"], os.listdir(os.path.dirname(path)))

    def test_keeps_what_a_daemon_needs_to_read(self) -> None:
        """0640 stays 0640; anything more open becomes 0600; a link stays a link."""
        for before, after in ((0o640, 0o640), (0o600, 0o600), (0o644, 0o600), (0o666, 0o600)):
            path = self.write("# x\n", before)
            link = path + ".link"
            os.symlink(path, link)
            authserver.change_password(link, "jim", "files", "x")
            self.assertEqual(after, stat.S_IMODE(os.stat(path).st_mode))
            self.assertTrue(os.path.islink(link))

    def test_a_failure_leaves_the_old_file_whole(self) -> None:
        """A full disk in the middle of writing loses nothing, and leaves nothing."""
        path = self.write("# precious\n")
        with mock.patch("os.fsync", side_effect=OSError(28, "No space left")):
            self.refuses("unable to write", authserver.change_password, path, "jim", "files", "x")
        self.assertEqual("# precious\n", read(path))
        self.assertEqual(["passwords"], os.listdir(os.path.dirname(path)))

    def test_asks_twice_or_reads_one_line(self) -> None:
        """getpass twice, or --stdin; two different answers change nothing."""
        path = self.write("")
        with mock.patch("getpass.getpass", side_effect=["secret", "secret"]):
            self.assertIn("'jim' added", authserver.run_passwd(path, "jim", "files"))
        with mock.patch("getpass.getpass", side_effect=["secret", "secert"]):
            self.refuses("differ", authserver.run_passwd, path, "jim", "files")
        with mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(b"new one\nmore\n"))):
            self.assertIn("changed", authserver.run_passwd(path, "jim", "files", from_stdin=True))
        self.assertTrue(Passwords.read(path, "files").check_password("jim", "new one"))
        self.assertIn("deleted", authserver.run_passwd(path, "jim", "files", delete=True))

    def test_first_password_is_random_and_made_once(self) -> None:
        """80 bits, 0600, or 0640 for a group; never over an existing file."""
        path = os.path.join(self.folder(), "first")
        user, password = authserver.first_password(path, None, "files")
        self.assertEqual(("admin", 16), (user, len(password)))
        self.assertTrue(Passwords.read(path, "files").check_password(user, password))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        self.refuses("unable to make", authserver.first_password, path, None, "files")
        grouped = path + "2"
        authserver.first_password(grouped, os.getegid(), "files")
        self.assertEqual(0o640, stat.S_IMODE(os.stat(grouped).st_mode))

    @unittest.skipUnless(shutil.which("htpasswd"), "needs htpasswd")
    def test_reads_what_htpasswd_writes(self) -> None:
        """bcrypt, SHA-256, SHA-512 and SHA-1 entries of Apache's htpasswd let Basic in."""
        path = os.path.join(self.folder(), "htpasswd")
        users: List[str] = []
        for flag in ("-s", "-B", "-2", "-5"):
            done = subprocess.run(["htpasswd", "-b", flag] + ["-c"] * (not users)
                                  + [path, "u" + flag, "sécret".encode()], stderr=subprocess.PIPE)
            users += ["u" + flag] * (done.returncode == 0)
        os.chmod(path, 0o600)
        passwords = Passwords.read(path, "files")
        for user in users:
            with self.subTest(user):
                self.assertTrue(passwords.check_password(user, "sécret"))
                self.assertFalse(passwords.check_password(user, "secret"))

    @unittest.skipUnless(shutil.which("htdigest"), "needs htdigest")
    def test_shares_a_file_with_htdigest(self) -> None:
        """Apache's htdigest changes our entry and we its, in the same file."""
        path = os.path.join(self.folder(), "htdigest")
        authserver.change_password(path, "jim", "files", "one")
        # Without a terminal htdigest reads the password, twice, from standard input.
        subprocess.run(["htdigest", path, "files", "ann"], input=b"two\ntwo\n", timeout=20,
                       start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.chmod(path, 0o600)
        passwords = Passwords.read(path, "files")
        self.assertTrue(passwords.check_password("ann", "two"))
        self.assertTrue(passwords.check_password("jim", "one"))
        self.assertEqual("changed", authserver.change_password(path, "ann", "files", "three"))
        self.assertTrue(Passwords.read(path, "files").check_password("ann", "three"))
        # Of two lines of a user htdigest changes the first: that is the one that counts.
        subprocess.run(["htdigest", path, "files", "jim"], input=b"four\nfour\n", timeout=20,
                       start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.chmod(path, 0o600)
        passwords = Passwords.read(path, "files")
        self.assertEqual([True, False], [passwords.check_password("jim", password) for password in ("four", "one")])

    def test_the_command_adds_changes_and_deletes(self) -> None:
        """`authserver.py passwd FILE USER`: --stdin, --realm, --delete; a line says what was done."""
        path = self.write("ann:plain:x\n")
        argv = [PYTHON, AUTHSERVER, "passwd", path, os.fsdecode("müller".encode())]
        for options, done in ((["--stdin"], "added"), (["--stdin"], "changed"), (["--delete"], "deleted")):
            said = run(argv + options + ["--realm", "files"], 0, "pä:ss\n".encode()).out
            self.assertRegex(said, r"\Auser 'm.+ller' %s in .+ \(realm 'files'\)\n\Z" % done)
            known = Passwords.read(path, "files").check_password("müller", "pä:ss")
            self.assertEqual(known, done != "deleted")

    def test_a_mistake_of_the_command_is_one_line(self) -> None:
        """A wrong name, a password that is no text or has control characters: exit 2, nothing changed."""
        path = self.write("# precious\n")
        for user, option, typed in (("a:b", "--stdin", b"x\n"), ("a\tb", "--stdin", b"x\n"),
                                    ("jim", "--stdin", b"a\x1bb\n"),
                                    ("jim", "--stdin", b"x" * 2000), ("jim", "--stdin", b"\n"),
                                    ("jim", "--delete", b"")):
            with self.subTest(user, typed=typed[:9]):
                code, said = told("passwd", path, user, option, typed=typed)
                self.assertRegex(said, r"\Aauthserver: fatal: unable to [^\n]+\n\Z")
                self.assertEqual(code, 2)
        self.assertIn("usage", run([PYTHON, AUTHSERVER, "passwd", path], 2).err)
        self.assertEqual("# precious\n", read(path))

    def test_a_password_that_the_locale_cannot_read_is_refused(self) -> None:
        """In the locale of cron a typed umlaut is not mangled: the command says what to do instead."""
        path = self.write("")
        error = UnicodeDecodeError("ascii", b"\xc3", 0, 1, "ordinal not in range(128)")
        with mock.patch("getpass.getpass", side_effect=error):
            self.refuses("try: export LC_ALL=C.UTF-8", authserver.run_passwd, path, "jim", "files")
        self.assertEqual("", read(path))

    def test_eight_at_once(self) -> None:
        """On a file that is there, and on one that none of them has seen, all eight users are in it."""
        for text in ("# staff\nann:plain:x\n", None):
            path = self.write(text or "")
            if text is None:
                os.unlink(path)
            with multiprocessing.get_context("fork").Pool(8) as pool:
                pool.starmap(authserver.change_password, [(path, "u%d" % n, "files", "x") for n in range(8)], 1)
            names = sorted({line.partition(":")[0] for line in read(path).split("\n") if line})
            self.assertEqual(names, (["# staff", "ann"] if text else []) + ["u%d" % n for n in range(8)])
            self.assertEqual(os.listdir(os.path.dirname(path)), ["passwords"])

    def test_replaces_what_is_the_users_and_nothing_else(self) -> None:
        """Lines with blanks, in another normal form, of every kind; comments, other realms, order and CRLF stay."""
        kept = ["# jim:plain:x", "jimmy:files:" + HEX, "jim:other:" + HEX, "ann:%s\r" % SHA, "", "broken"]
        for line in ("jim:plain:x", " jim:files:%s \r" % HEX, "\tjim:" + SHA, "jim:$6$a$b:Jim", "jim:", "jim"):
            text = "".join(item + "\n" for item in kept[:3] + [line] + kept[3:])
            changed = authserver.edit_passwords(text, "jim", "files", ["NEW"])
            self.assertEqual(changed.split("\n"), kept[:3] + ["NEW"] + kept[3:] + [""], line)
        self.assertEqual(authserver.edit_passwords("ju\u0308:plain:x", "jü", "files", []), "")


class Addresses(AuthTestCase):
    """--bind takes what the kernel takes, and says what to do about the rest"""

    def test_what_is_wrong_with_an_address(self) -> None:
        """Form, port, taken, only root's."""
        for text in ("80", "a b:80", "[::1", "::1:80", "unix:", "host:", "h:-1", "h:8o",
                     "127.0.0.1:65536", ":99999", "[::1]:100000"):
            self.refuses("unable to bind .*: expected HOST:PORT.*ports are 0 to 65535", authserver.parse_bind, text)
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen(1)
            text = "127.0.0.1:%d" % taken.getsockname()[1]
            self.refuses(r"unable to bind %s: .*\ntry: ss -ltnp 'sport = :%s'" % (text, text[10:]),
                         authserver.open_socket, text, authserver.parse_bind(text))
        denied = OSError(errno.EACCES, "Permission denied")
        for text, advice in ((":80", "\ntry: --bind :8080"), ("127.0.0.1:443", "\ntry: --bind 127.0.0.1:8443"),
                             (":8000", ""), ("unix:/root/s", "")):
            said = authserver.bind_advice(text, authserver.parse_bind(text), denied)
            self.assertTrue(said.startswith(advice) and bool(said) == bool(advice), said)

    def test_keeps_the_scope_of_a_link_local_address(self) -> None:
        """The interface stands in the address to bind, in what fits it, and in the URL."""
        lo = socket.if_nametoindex("lo")
        place = authserver.parse_bind("[fe80::1%lo]:80")
        self.assertEqual(place.where[1:], (80, 0, lo))
        sock = mock.Mock(family=socket.AF_INET6)
        for where, fits in ((("fe80::1", 80, 0, lo), True), (("fe80::1", 80, 0, lo + 1), False),
                            (("fe80::1", 81, 0, lo), False), (("fe80::2", 80, 0, lo), False)):
            sock.getsockname.return_value = where
            self.assertEqual(place._replace(where=("fe80::1",) + place.where[1:]).fits(sock), fits, where)
        sock.getsockname.return_value = ("fe80::1", 443, 0, lo)
        self.assertEqual(authserver.address_of(sock, "https"), "https://[fe80::1%25lo]:443/")
        self.assertFalse(authserver.is_private(sock))
        sock.getsockname.return_value = ("::1", 80, 0, 0)
        self.assertEqual(authserver.address_of(sock), "http://[::1]:80/")

    @needs_root
    @needs("ip")
    def test_listens_on_a_link(self) -> None:
        """In a network of its own: bound, named, and reached by that URL."""
        code = ("import sys, subprocess; sys.path.insert(0, sys.argv[1]); import authserver as a\n"
                "s = a.open_socket('x', a.parse_bind('[fe80::1%lo]:0')); print(a.address_of(s))\n"
                "subprocess.Popen(['curl', '-s', '-m', '5', '-g', a.address_of(s)])\n"
                "c, who = s.accept(); print(c.recv(99)); c.close()")
        said = run(["unshare", "-n", "sh", "-c", "ip link set lo up && ip addr add fe80::1/64 dev lo nodad && "
                    "exec \"$@\"", "sh", PYTHON, "-c", code, HERE])
        if "Operation not permitted" in said.err:
            self.skipTest("needs a network namespace")
        self.assertRegex(said.out, r"\Ahttp://\[fe80::1%25lo\]:\d+/\nb'GET / HTTP")

    def test_a_kernel_without_ipv6(self) -> None:
        """:PORT and names mean IPv4 there; an IPv6 address is refused by name, with no traceback."""
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
        self.assertEqual(authserver.parse_bind(":0").where[0], "::" if authserver.has_ipv6() else "0.0.0.0")


class BasicScheme(AuthTestCase):
    """Basic, as RFC 7617 has it"""

    USERS = {"alice": "secret", "test": "123£", "col": "a:b"}

    def test_lets_the_right_password_in(self) -> None:
        """In any case of the word Basic, with more blanks, a colon, UTF-8 and Latin-1."""
        token = basic("alice", "secret")[6:]
        for field in (basic("alice", "secret"), "bAsIc " + token, "Basic   " + token,
                      basic("test", "123£"), basic("test", "123£", "latin-1"), basic("col", "a:b")):
            with self.subTest(field):
                verdict = attempt(make(self.USERS), field)
                self.assertEqual((200, "", "Basic", ()), (verdict.status, verdict.reason,
                                                          verdict.scheme, verdict.fields))

    def test_refuses_everything_else_alike(self) -> None:
        """Wrong password, unknown user, empty ones: 401, and only the log knows why."""
        for user, password, reason in (("alice", "wrong", "bad password"), ("nobody", "secret", "unknown user"),
                ("", "", "unknown user"), ("alice", "", "bad password"), ("ALICE", "secret", "unknown user")):
            with self.subTest(user + ":" + password):
                verdict = attempt(make(self.USERS), basic(user, password))
                self.assertEqual((401, None, user, reason), verdict[:4])

    def test_answers_400_to_what_is_malformed(self) -> None:
        """Bad base64, no colon, controls, parameters instead of a token, two fields."""
        good = basic("alice", "secret")
        for fields in (["Basic"], ["Basic ="], ["Basic !!!"], [good + "!!!"], ["Basic YWxpY2U="],
                       [basic("alice", "se\0cret")], ["Basic a=b"], [good, good], [""], ["Basic a b"]):
            with self.subTest(str(fields)):
                verdict = attempt(make(self.USERS), *fields)
                self.assertEqual((400, None), (verdict.status, verdict.log_user))

    def test_is_refused_where_it_is_not_offered(self) -> None:
        """On an address with Digest alone, even the right password is not looked at."""
        verdict = attempt(make(), JIM, schemes=["digest"])
        self.assertEqual((401, None, 1), (verdict.status, verdict.log_user, len(verdict.fields)))


# What a client does wrong, what it is told, and whether that is a wrong password: then the
# log has the name, and it counts towards the lock-out.  The same for a known and an unknown user.
REFUSALS: Sequence[Tuple[str, Dict[str, Any], int, bool]] = (("a wrong password", {}, 401, True),
    ("a response of zeros", {"response": '"%s"' % ("0" * 32)}, 401, True),
    ("a forged nonce", {"nonce": "0" * 36}, 401, True), ("another user's response", {"username": '"ann"'}, 401, True),
    ("another realm", {"realm": '"other"'}, 401, False),
    ("an algorithm that is not offered", {"algorithm": "SHA-256"}, 401, False),
    ("an algorithm that nobody knows", {"algorithm": "foo"}, 401, False),
    ("a session algorithm", {"algorithm": "MD5-sess"}, 401, False),
    ("auth-int, which is not offered", {"qop": "auth-int"}, 401, False),
    ("qop in capitals", {"qop": '"AUTH"'}, 401, False), ("no qop", {"drop": ["qop"]}, 401, False),
    ("RFC 2069", {"drop": ["qop", "nc", "cnonce"]}, 401, False), ("another path", {"uri": '"/y"'}, 400, False),
    ("another query", {"uri": '"/x?a"'}, 400, False), ("no nonce, as LWP does", {"drop": ["nonce"]}, 401, False),
    ("no uri", {"drop": ["uri"]}, 400, False), ("no response", {"drop": ["response"]}, 400, False),
    ("no user name", {"drop": ["username"]}, 400, False), ("no realm", {"drop": ["realm"]}, 400, False),
    ("no nc", {"drop": ["nc"]}, 400, False), ("no cnonce", {"drop": ["cnonce"]}, 400, False),
    ("a count of nothing", {"nc": "0"}, 400, False), ("a short response", {"response": "x"}, 400, False),
    ("a response that is no text", {"response": '"\xe9\xe9"'}, 400, False),
    ("two names", {"username_star": "UTF-8''jim"}, 400, False))


class DigestScheme(AuthTestCase):
    """Digest, as RFC 7616 has it"""

    def test_what_is_refused(self) -> None:
        """Each fault has its status, whoever is named; only a wrong password names and counts."""
        for sentence, change, status, wrong in REFUSALS:
            with self.subTest(sentence):
                said = []
                for user in ("jim", "nobody"):
                    authenticator = make(max_failures=(1, 60.0))
                    client = Client(authenticator, user, "wrong")
                    verdict = client.ask(client.field(**change), client="192.0.2.1", read_body=self.fail)
                    name = change.get("username", user).strip('"') if wrong else None
                    self.assertEqual((status, None, name), verdict[:3])
                    locked = attempt(authenticator, JIM, client="192.0.2.1").status == 429
                    self.assertEqual(wrong, locked)
                    said.append([(field, re.sub('nonce="[^"]*"', "", value)) for field, value in verdict.fields])
                self.assertEqual(said[0], said[1])
                self.assertNotIn("stale", str(said))

    def test_lets_the_right_response_in_and_proves_itself_too(self) -> None:
        """Every algorithm and qop that is offered, with Authentication-Info."""
        algorithms = [name for name in authserver.CANONICAL.values() if name in authserver.HASHES]
        authenticator = make(algorithms=algorithms, qop=["auth", "auth-int"])
        for algorithm in algorithms:
            for qop, body in (("auth", None), ("auth-int", b"hello")):
                with self.subTest(algorithm, qop=qop):
                    client = Client(authenticator, algorithm=algorithm, qop=qop)
                    verdict = client.ask(client.field(body=body, method="POST"), method="POST",
                                         read_body=lambda: b"hello")
                    self.assertEqual((200, "jim"), (verdict.status, verdict.username))
                    if qop == "auth":
                        proof = respond(client.values, "", algorithm)
                        self.assertEqual((("Authentication-Info", 'rspauth="%s", qop=auth, '
                                           'nc=00000001, cnonce="f2"' % proof),), verdict.fields)

    def test_each_digit_of_the_response_counts(self) -> None:
        """One digit changed, wherever it stands: refused, and the count stays free."""
        client = Client(make())
        field = client.field()
        start = field.index('response="') + 10
        for i in range(start, start + 32):
            digit = "0" if field[i] != "0" else "1"
            self.assertEqual("bad response", client.ask(field[:i] + digit + field[i + 1:]).reason, i)
        self.assertEqual(200, client.ask(field).status)

    def test_verifies_the_body_under_auth_int(self) -> None:
        """Another body than the one that was hashed is refused; with auth it is not read."""
        authenticator = make(qop=["auth", "auth-int"])
        client = Client(authenticator, qop="auth-int")
        field = client.field(body=b"hello")
        self.assertEqual(401, client.ask(field, read_body=lambda: b"hallo").status)
        self.assertEqual(200, client.ask(field, read_body=lambda: b"hello").status)
        self.assertEqual(200, Client(authenticator).ask(read_body=self.fail).status)

    def test_accepts_every_spelling_that_clients_use(self) -> None:
        """Bare and quoted values, any case and order, no algorithm, commas in the uri."""
        authenticator = make({"jim": "secret", "müller": "x", "DOM\\u": "x", "a,b": "x"})
        for change in (lambda text: text.replace('"', "").replace("/x", '"/x"'),
                       lambda text: text.replace("algorithm=MD5", 'algorithm="md5"'),
                       lambda text: text.replace(", algorithm=MD5", ""),
                       lambda text: text.replace("qop=auth", 'qop="auth"'),
                       lambda text: text.replace("nc=", 'NC = ').replace(", ", " ,\t, "),
                       lambda text: "digest " + ", ".join(reversed(text[7:].split(", ")))):
            client = Client(authenticator)
            with self.subTest(change(client.field("00000009"))):
                self.assertEqual(200, client.ask(change(client.field())).status)
        for user, spelling in (("müller", '"m\xfcller"'), ("DOM\\u", '"DOM\\\\u"'),
                               ("DOM\\u", '"DOM\\u"'), ("a,b", '"a,b"'), ("müller", '"m%C3%BCller"')):
            with self.subTest(spelling):
                client = Client(authenticator, user, "x")
                self.assertEqual(200, client.ask(client.field(username=spelling)).status)
        client = Client(authenticator, "müller", "x")
        field = client.field(drop=["username"], username_star="UTF-8''m%C3%BCller")
        self.assertEqual("müller", client.ask(field).username)

    def test_what_is_escaped_is_hashed_without_its_escapes(self) -> None:
        """Realm, nonce and cnonce in quoted pairs, digits of the response in capitals: right, in each as in all."""
        for changed in (["realm"], ["nonce"], ["cnonce"], ["response"], ["realm", "nonce", "cnonce", "response"]):
            client = Client(make())
            field = client.field()
            for name in changed:
                field = re.sub('( %s=")([^"]*)' % name, lambda found: found.group(1) + (
                    found.group(2).upper() if name == "response" else "\\" + found.group(2)), field)
            with self.subTest(field):
                self.assertEqual(200, client.ask(field).status)

    def test_a_cnonce_is_given_back_as_it_was_meant(self) -> None:
        """With a quotation mark or a backslash in it: in quoted pairs, and under the right proof."""
        for cnonce in ('a"b', "a\\b", 'a"b\\', "a'b"):
            client = Client(make())
            client.values["cnonce"] = cnonce
            quoted = '"%s"' % cnonce.replace("\\", "\\\\").replace('"', '\\"')
            verdict = client.ask(client.field(cnonce=quoted))
            self.assertEqual((verdict.status, dict(verdict.fields)), (200, {
                "Authentication-Info": 'rspauth="%s", qop=auth, nc=00000001, cnonce=%s' % (respond(client.values, ""), quoted)}))

    def test_what_is_signed_is_never_taken_for_what_is_not(self) -> None:
        """A proof without the body in credentials that promise it: refused, though a right one came before."""
        authenticator = make(qop=["auth", "auth-int"])
        client = Client(authenticator, qop="auth-int")
        self.assertEqual(200, client.ask(client.field(body=b"")).status)
        proof = respond(client.values, nc="00000002")
        self.assertEqual("bad response", client.ask(client.field(body=b"", response='"%s"' % proof)).reason)

    def test_a_right_field_of_any_length_is_right(self) -> None:
        """Up to MAX_CREDENTIALS, and again: whether it can be remembered changes nothing."""
        for size in (authserver.MAX_TEXT, authserver.MAX_TEXT + 1, authserver.MAX_CREDENTIALS):
            client = Client(make())
            for status in (200, 200):
                field = client.field() + ", x="
                self.assertEqual(status, client.ask(field.ljust(size, "y")).status, size)

    def test_proof_is_for_one_target_as_sent(self) -> None:
        """Another path, another query, a cleaned-up path: 400, `uri mismatch`."""
        for target in ("/y", "/x?a=1", "//x", "/x/", "/X", "*", "http://host/y", "http://host/x?a"):
            with self.subTest(target):
                self.assertEqual((400, "uri mismatch"), Client(make()).ask(target=target)[0:4:3])
        for uri, target in (("/x", "http://host/x"), ("http://host/x", "http://host/x"), ("*", "*"),
                            ("//a//b", "//a//b"), ("/x;p=1,2?q", "/x;p=1,2?q")):
            with self.subTest(uri):
                self.assertEqual(200, Client(make(), uri=uri).ask(target=target).status)
        self.assertEqual("bad response", Client(make()).ask(method="POST").reason)

    def test_an_empty_ha1_is_nobodys(self) -> None:
        """Who computes with no HA1, or one of zeros, is refused like any unknown user."""
        for ha1 in ("", "0" * 32):
            nobody = Client(make(), "nobody")
            response = hashed("MD5", ha1, nobody.values["nonce"], "00000001", "f2", "auth",
                              hashed("MD5", "GET", "/x"))
            verdict = nobody.ask(nobody.field("00000001", response='"%s"' % response))
            self.assertEqual((401, None, "nobody", "unknown user"), verdict[:4])

    def test_a_replay_is_refused_and_out_of_order_is_not(self) -> None:
        """Counts 1 3 2 5 4 pass, each once; the second time is `replay`, and stale."""
        client = Client(make())
        fields = [client.field("%08x" % nc) for nc in (1, 3, 2, 5, 4)]
        self.assertEqual({200}, {client.ask(field).status for field in fields})
        for field in fields:
            verdict = client.ask(field)
            self.assertEqual((401, None, None, "replay"), verdict[:4])
            self.assertTrue(is_stale(verdict))

    def test_a_nonce_that_is_not_good_is_stale_only_for_the_right_password(self) -> None:
        """Forged, expired, of another key: stale=true if the proof is right, else not."""
        authenticator = make()
        for nonce, now in (("0" * 36, NOW), (Client(make()).values["nonce"], NOW), ("x", NOW),
                           (Client(authenticator).values["nonce"], NOW + 301)):
            for password, want in (("secret", (401, True, "stale", None)),
                                   ("wrong", (401, False, "bad response", "jim"))):
                with self.subTest(nonce, password=password):
                    client = Client(authenticator, password=password)
                    verdict = client.ask(client.field(nonce=nonce), now=now)
                    self.assertEqual(want, (verdict.status, is_stale(verdict), verdict.reason, verdict.log_user))

    def test_recovers_from_stale_in_one_step(self) -> None:
        """The nonce that comes with stale is good: no client loops."""
        client = Client(make())
        verdict = client.ask(now=NOW + 301)
        self.assertTrue(is_stale(verdict))
        client.hear(verdict.fields[0][1])
        self.assertEqual(200, client.ask(now=NOW + 302).status)

    def test_an_old_nonce_brings_the_next_one(self) -> None:
        """In the last tenth of its life every answer carries nextnonce, which works."""
        client = Client(make())
        self.assertNotIn("nextnonce", client.ask(now=NOW + 269).fields[0][1])
        verdict = client.ask(now=NOW + 271)
        self.assertEqual(200, verdict.status)
        self.assertIn("nextnonce", verdict.fields[0][1])
        client.hear(verdict.fields[0][1])
        self.assertEqual(200, client.ask(now=NOW + 500).status)

    def test_a_clock_that_steps_costs_one_round_trip_at_most(self) -> None:
        """A day back or forth after many log-ins: everybody is in after one `stale`, and no proof is good twice."""
        real = time.time
        for step, secret in [(step, secret) for step in (-86400, -3600, 3600, 86400) for secret in (b"", b"s" * 32)]:
            with self.subTest(step, secret=secret):
                authenticator = Authenticator(Passwords({"jim": "secret"}, realm="files"), nonce_secret=secret)
                now = authenticator.clock()
                clients = [Client(authenticator, now=now + i / 40) for i in range(200)]
                fields = [client.field() for client in clients]
                self.assertEqual({200}, {client.ask(field, now=now + 6).status for client, field in zip(
                    clients[-1:], fields[-1:])})
                with mock.patch("time.time", lambda: real() + step):
                    if secret:
                        authenticator.table.set_clock(time.time())  # as the server does
                    now = authenticator.clock() + 6
                    self.assertNotEqual(200, clients[-1].ask(fields[-1], now=now).status)
                    for client in clients[:100:9] + [Client(authenticator, now=now)]:
                        now += 0.02  # two of one moment may want the same place in the table
                        verdict = client.ask(now=now)
                        if is_stale(verdict):
                            client.hear(verdict.fields[0][1])
                            verdict = client.ask(now=now)
                        self.assertEqual(200, verdict.status)

    def test_a_reload_keeps_the_nonces(self) -> None:
        """New passwords count at once, without a stale for those that stayed the same."""
        authenticator = make()
        clients = [Client(authenticator), Client(authenticator, "ann", "other")]
        self.assertEqual([200, 200], [client.ask().status for client in clients])
        authenticator.passwords = Passwords({"jim": "new", "ann": "other"}, realm="files")
        self.assertEqual(["bad response", ""], [client.ask().reason for client in clients])
        clients[0].values["password"] = "new"
        self.assertEqual(200, clients[0].ask().status)


class Challenges(AuthTestCase):
    """A 401 asks so that all clients understand"""

    def test_says_one_line_per_scheme_digest_first(self) -> None:
        """The order is that of the settings, and each line is whole."""
        fields = make(algorithms=["SHA-256", "MD5"]).challenge(NOW)
        self.assertEqual(["Digest", "Digest", "Basic"], [value.split()[0] for _, value in fields])
        self.assertEqual({"WWW-Authenticate"}, {name for name, _ in fields})
        fields = make(schemes=["basic"]).challenge(NOW)
        self.assertEqual((("WWW-Authenticate", 'Basic realm="files", charset="UTF-8"'),), fields)

    def test_quotes_as_the_rfc_says_and_is_short(self) -> None:
        """realm first; realm, nonce, qop quoted; algorithm, stale bare; under 256 characters."""
        sessions = [name for name in authserver.HASHES if name.endswith("-sess")]
        for _, line in make(algorithms=sessions, qop=["auth", "auth-int"], schemes=[
                "digest"]).challenge(NOW, stale=True):
            self.assertRegex(line, r'^Digest realm="files", nonce="[^"]{20,60}", qop="auth,auth-int", '
                                   r'algorithm=[\w-]+, charset=UTF-8, stale=true$')
            self.assertLess(len(line), 256)

    def test_first_challenges_count_as_nobodys_fault(self) -> None:
        """No credentials, another scheme: 401, "-" in the log, and no failure counted."""
        authenticator = make(max_failures=(1, 60.0))
        attempts: List[List[str]] = [[], ["Bearer abc"], ["Negotiate abc=="]]
        for fields in attempts:
            verdict = attempt(authenticator, *fields, client="192.0.2.1")
            self.assertEqual((401, None, None), verdict[:3])
        self.assertEqual(200, attempt(authenticator, JIM, client="192.0.2.1").status)

    def test_offers_basic_where_nobody_listens_or_somebody_asked_for_it(self) -> None:
        """By itself Basic is offered on safe addresses only; where schemes were chosen, those are, everywhere."""
        for schemes, safe, unsafe in ((None, ("digest", "basic"), ("digest",)), (["basic"], ("basic",), ("basic",)),
                                      (["digest", "basic"],) + (("digest", "basic"),) * 2):
            authenticator = make(schemes=schemes)
            self.assertNotIn("stale", str(authenticator.challenge(NOW)))
            self.assertEqual([tuple(authenticator.offered(is_safe)) for is_safe in (True, False)], [safe, unsafe])

    def test_counts_what_it_says(self) -> None:
        """Each answer adds to the counter that status shows for it, and to no other."""
        authenticator = make(max_failures=(2, 60.0))
        client = Client(authenticator)
        field = client.field()
        for fields, now, counted in (([], NOW, "challenges"), ([field], NOW, ""), ([field], NOW, "replays"),
                ([client.field()], NOW + 900, "stale"), (["Basic ="], NOW, "malformed"), ([JIM, JIM], NOW, "malformed"),
                ([WRONG], NOW, "failures"), ([client.field(response='"%s"' % ("0" * 32))], NOW, "failures lockouts"),
                ([JIM], NOW, ""), (["Bearer x"], NOW, "")):
            before = authenticator.table.statistics()
            attempt(authenticator, *fields, client="192.0.2.1", now=now)
            after = authenticator.table.statistics()
            self.assertEqual({name: after[name] - before[name] for name in after if after[name] != before[name]},
                             dict.fromkeys(counted.split(), 1), fields)

    def test_refuses_what_somebody_could_not_answer_or_would_crash_on(self) -> None:
        """Digest with an entry that has no HA1 of it; a challenge that is one character too long for wget."""
        passwords = Passwords(None, "files", {"jim": authserver.Entry("jim", 1, {}, SHA)})
        self.refuses("cannot answer Digest MD5", make, passwords=passwords)
        make(passwords=passwords, schemes=["basic"])
        longest = authserver.MAX_CHALLENGE - len(authserver.challenges("", "n" * 36, stale=True)[0])
        authenticator = make(passwords=Passwords({"jim": "x"}, realm="r" * longest))
        self.assertEqual(max(len(value) for _, value in authenticator.challenge(NOW, stale=True)), authserver.MAX_CHALLENGE)
        self.refuses("1 characters too long", make, passwords=Passwords({"jim": "x"}, realm="r" * (longest + 1)))

    def test_refuses_to_offer_what_does_not_exist(self) -> None:
        """Unknown, doubled, none at all, or lacking in this Python: a start-up error that names it."""
        with mock.patch.dict(authserver.HASHES):
            authserver.HASHES.pop("SHA-512-256", None)
            self.refuses("SHA-512-256: the hashlib of this Python lacks it", make, algorithms=["SHA-512-256"])
        wrong: List[Dict[str, List[str]]] = [{"algorithms": ["SHA-1"]}, {"algorithms": []}, {"qop": ["x"]},
            {"schemes": ["bearer"]}, {"schemes": ["basic", "basic"]}]
        for settings in wrong:
            self.refuses("unable to offer", make, **settings)


class LockOut(AuthTestCase):
    """Too many wrong passwords lock an address out, and nothing else does"""

    def guess(self, authenticator: Any, times: int, client: Optional[str] = "192.0.2.1", now: float = NOW) -> int:
        """Try wrong passwords; return the status of the last."""
        said: List[int] = [attempt(authenticator, basic("jim", "w%d" % number), client=client, now=now).status
                for number in range(times)]
        return said[-1]

    def status(self, authenticator: Any, client: Optional[str], now: float = NOW) -> int:
        """Return what the right password is told."""
        return int(attempt(authenticator, JIM, client=client, now=now).status)

    def test_answers_429_with_retry_after(self) -> None:
        """Even to the right password, until the time is over; others are not touched."""
        authenticator = make(max_failures=(3, 60.0))
        self.assertEqual(401, self.guess(authenticator, 3))
        verdict = attempt(authenticator, JIM, client="192.0.2.1", now=NOW + 1)
        self.assertEqual((429, None, "locked out"), (verdict.status, verdict.log_user, verdict.reason))
        self.assertIn(verdict.fields, [(("Retry-After", wait),) for wait in ("59", "60")])
        self.assertEqual(401, attempt(authenticator, client="192.0.2.1").status)
        for client, now in (("192.0.2.2", NOW), (None, NOW), ("192.0.2.1", NOW + 61)):
            self.assertEqual(200, self.status(authenticator, client, now))

    def test_counts_digest_and_unknown_users_alike(self) -> None:
        """Each wrong response counts, whoever it names."""
        for user in ("jim", "nobody"):
            client = Client(make(max_failures=(2, 60.0)), user, "wrong")
            self.assertEqual([401, 401, 429], [client.ask(client="192.0.2.1").status for _ in range(3)])

    def told(self, authenticator: Any, *fields: str) -> List[int]:
        """Send requests of one client whose slow hashes wait for a thread at the same time; return the statuses."""
        stories = [authenticator.judge(authserver.Attempt("GET", "/x", [field], "192.0.2.1", NOW, authenticator.schemes))
                   for field in fields]
        done = [work() for work in [story.send(None) for story in stories]]
        said = []
        for story, result in zip(stories, done):
            with self.assertRaises(StopIteration) as caught:
                story.send(result)
            said.append(caught.exception.value.status)
        return said

    @mock.patch.object(Passwords, "is_slow", lambda *_: True)
    def test_slow_hashes_that_are_made_together(self) -> None:
        """Twelve guesses, the right one last: after the limit 429. Eight requests of one browser: one hash for all."""
        guesses = [basic("jim", "w%d" % number) for number in range(11)]
        self.assertEqual(self.told(make(max_failures=(10, 60.0)), *guesses, JIM), [401] * 10 + [429] * 2)
        with mock.patch.object(Passwords, "verify", autospec=True, side_effect=Passwords.verify) as counted:
            self.assertEqual(self.told(make(), *[JIM] * 8), [200] * 8)
        self.assertEqual(counted.call_count, 1)

    def test_a_verdict_is_remembered_by_the_dictionary_that_gave_it(self) -> None:
        """A reload in the middle, by another thread: the deleted user is out, and not in the new one's memory."""
        authenticator = make()
        verify, new = Passwords.verify, Passwords({"ann": "other"}, realm="files")

        def reloading(passwords: Passwords, *words: str) -> bool:
            authenticator.passwords = new
            return verify(passwords, *words)
        with mock.patch.object(Passwords, "verify", reloading):
            self.assertEqual(self.status(authenticator, None), 401)
        self.assertEqual((new.granted, self.status(authenticator, None)), ({}, 401))

    def test_thousands_who_guess_lock_out_few_others(self) -> None:
        """4,000 addresses are locked out: of 1,000 innocents less than one in ten is, too."""
        table = authserver.SharedTable()
        for number in range(4000):
            table.count_failure("2001:db8:0:%x::/64" % number, NOW, 1, 60.0)
        hit = sum(table.lock_left("198.51.%d.%d" % divmod(number, 250), NOW, 1, 60.0) > 0 for number in range(1000))
        self.assertLess(hit, 100)

    def test_a_stale_or_replayed_proof_is_no_guess(self) -> None:
        """A right password at the wrong time does not count."""
        authenticator = make(max_failures=(1, 60.0))
        client = Client(authenticator)
        field = client.field()
        for _ in range(3):
            client.ask(field, client="192.0.2.1")
        client.ask(now=NOW + 400, client="192.0.2.1")
        self.assertEqual(200, self.status(authenticator, "192.0.2.1", NOW + 400))

    def test_slow_failures_do_not_add_up(self) -> None:
        """One mistyped password now and then never locks anybody out."""
        authenticator = make(max_failures=(2, 60.0))
        for minute in range(100):
            self.assertEqual(401, self.guess(authenticator, 1, now=NOW + 61 * minute))

    def test_fails_closed(self) -> None:
        """However full the table: no stranger's guesses free who is locked out, or hide who guesses."""
        with mock.patch.object(authserver, "CLIENT_BUCKETS", 16):
            authenticator = make(max_failures=(5, 600.0))
            self.guess(authenticator, 5, "192.0.2.1")
            for number in range(500):
                self.guess(authenticator, 1, "198.51.100.%d" % number, NOW + 1)
            self.assertEqual(429, self.status(authenticator, "192.0.2.1", NOW + 2))
            for number in range(60):  # two that guess in turn; some pairs share a place
                authenticator = make(max_failures=(5, 600.0))
                pair = "192.0.2.1", "198.51.100.%d" % number
                for _ in range(5):
                    for client in pair:
                        self.guess(authenticator, 1, client)
                self.assertEqual([429, 429], [self.status(authenticator, client) for client in pair])

    def test_can_be_switched_off_and_spares_who_has_no_address(self) -> None:
        """0 = off; None is never locked out."""
        self.assertEqual(401, self.guess(make(max_failures=(0, 60.0)), 50))
        self.assertEqual(401, self.guess(make(max_failures=(1, 60.0)), 50, None))

    def test_a_lock_out_has_one_beginning_and_one_end(self) -> None:
        """Failures count from the first of them; the last allowed one begins it, and what is told then does not prolong it."""
        authenticator = make(max_failures=(3, 60.0))
        for seconds, guesses, status in ((0, 1, 200), (40, 1, 200), (61, 1, 200), (62, 1, 200), (63, 1, 429), (122, 1, 429),
                                         (122.5, 5, 429), (123.5, 0, 200), (123.5, 2, 200), (184, 2, 200), (184.5, 1, 429), (244, 0, 429), (245, 0, 200)):
            self.guess(authenticator, guesses, now=NOW + seconds) if guesses else None
            self.assertEqual(self.status(authenticator, "192.0.2.1", NOW + seconds), status, seconds)
        self.assertEqual(authenticator.table.statistics()["lockouts"], 2)
        authenticator.table.set_clock(NOW - 3600)       # a time that lies ahead of now began no lock-out
        self.assertEqual(self.status(authenticator, "192.0.2.1", NOW - 3600), 200)

    def test_who_shares_one_place_is_free_when_either_is(self) -> None:
        """Locked out is who has two full buckets: another's, which is over, frees the one that lies beside."""
        table = authserver.SharedTable()
        buckets = [authserver.BUCKETS + authserver.BUCKET.size * number for number in range(3)]
        places = {"192.0.2.1": buckets[:2], "192.0.2.2": buckets[::2], "192.0.2.3": buckets[2:0:-1]}
        patch = mock.patch.object(authserver, "find_buckets", lambda salt, client: places[client])
        patch.start()
        self.addCleanup(patch.stop)
        for client, now, left in (("192.0.2.1", NOW, 60), ("192.0.2.2", NOW + 30, 30), ("192.0.2.3", NOW + 30, 30)):
            self.assertTrue(table.count_failure(client, now, 1, 60.0))
            self.assertEqual(table.lock_left(client, now, 1, 60.0), left)
        self.assertEqual([table.lock_left("192.0.2.%d" % number, NOW + 60, 1, 60.0) for number in (1, 2, 3)], [0, 0, 0])

    def test_what_stands_left_of_what_nobody_can_read(self) -> None:
        """Is not read, of a unix socket's proxy either; a network may be named by any address in it."""
        self.assertEqual(authserver.TrustedProxies(["unix:"]).find_client("", "6.6.6.6, unknown"), ("", None))
        self.assertTrue(authserver.TrustedProxies(["10.1.2.3/8"]).trusts(authserver.parse_address("10.9.9.9")))
        self.assertIsNone(authserver.parse_address("["))

    def test_off_is_off_whatever_was_counted_before(self) -> None:
        """0, on the table of one that counted: nobody is locked out, and no lock-out is counted."""
        before = make(max_failures=(1, 60.0))
        self.guess(before, 1)
        self.assertEqual(429, self.status(before, "192.0.2.1"))
        heir = Authenticator(before.passwords, table=before.table, max_failures=(0, 60.0))
        self.assertEqual([200, 401, 200], [self.status(heir, "192.0.2.1"), self.guess(heir, 3), self.status(heir, "192.0.2.1")])
        self.assertEqual(1, heir.table.statistics()["lockouts"])

    def test_the_option_is_read_strictly(self) -> None:
        """N/SECONDS or 0."""
        self.assertEqual((5, 300.0), authserver.parse_max_failures("5/300"))
        for text in ("", "5", "5/0", "/60", "-1/60", "5/60/7", "a/b", "00", "1e3/5"):
            self.refuses("max-failures", authserver.parse_max_failures, text)

    def test_finds_the_client_behind_trusted_proxies_only(self) -> None:
        """The rightmost address that is not a proxy's; nobody can choose his own."""
        one, own = ("192.0.2.1", "192.0.2.1"), ["127.0.0.1"]
        local, six = ("127.0.0.1", None), ("2001:db8::1", "2001:db8::/64")
        for options, peer, forwarded, want in (([], "192.0.2.1", [], one), ([], "192.0.2.1", ["198.51.100.1"], one),
                ([], "127.0.0.1", [], local), ([], "::1", [], ("::1", None)),
                ([], "::ffff:127.0.0.1", [], local), ([], "::ffff:192.0.2.1", [], one),
                ([], "2001:db8::1:2", [], ("2001:db8::1:2", "2001:db8::/64")),
                ([], "fe80::1%eth0", [], ("fe80::1", "fe80::/64")),
                ([], "", ["192.0.2.1"], ("", None)), (["unix:"], "", ["192.0.2.1"], one),
                (["127.0.0.0/8"], "127.0.0.1", ["6.6.6.6, 192.0.2.1"], one),
                (["127.0.0.0/8"], "::ffff:127.0.0.1", ["192.0.2.1:4711"], one),
                (own, "127.0.0.1", ["6.6.6.6", "[2001:db8::1]:80"], six),
                (own + ["10.0.0.0/8"], "127.0.0.1", ["192.0.2.1, 10.0.0.7"], one),
                (own, "127.0.0.1", ["192.0.2.1, unknown"], local),
                (["10.0.0.0/8"], "10.0.0.1", ["192.0.2.1" + ",10.0.0.7" * 3000], ("10.0.0.7", None)),
                (own, "127.0.0.1", ["192.0.2.1, "], local), (own, "127.0.0.1", [], local),
                (own, "192.0.2.9", ["192.0.2.1"], ("192.0.2.9", "192.0.2.9")),
                (own, "127.0.0.1", ["127.0.0.1"], local)):
            with self.subTest(peer, options=options, forwarded=forwarded):
                proxies = authserver.TrustedProxies(options)
                self.assertEqual(want, proxies.find_client(peer, ", ".join(forwarded)))
        for option in ("x", "10.0.0.0/33", "", "10.0.0.0/8/8", "unix"):
            self.refuses("unable to trust proxy", authserver.TrustedProxies, [option])


class Fuzz(AuthTestCase):
    """No sequence of bytes makes the authenticator raise, or let anybody in"""

    def test_mutated_credentials_are_refused(self) -> None:
        """2,000 seeded mutations; 100,000 in the soak."""
        fuzz_credentials(2000, Random(SEED))

    def test_what_is_remembered_changes_no_verdict(self) -> None:
        """Whoever was right before, and whatever a name looks like: judged as if for the first time."""
        fuzz_memory(300, Random(SEED))

    def test_only_what_a_proof_is_about_is_taken_for_it(self) -> None:
        """What looks like nc, uri or cnonce and is not: refused, by who remembers and who does not."""
        def craft(text: str, cnonce: str = "f2", nc: str = "00000002", ha1: str = "", uri: str = "/x") -> str:
            """Return credentials whose response is right for these values, wherever they stand in text."""
            values = client.values
            ha1 = ha1 or hashed("MD5", values["username"], "files", "secret")
            proof = hashed("MD5", ha1, values["nonce"], nc, cnonce, "auth", hashed("MD5", "GET", uri))
            return 'Digest username="%s", realm="files", nonce="%s", qop=auth, %s, response="%s"' % (
                values["username"], values["nonce"], text, proof)
        long = "/" + "x" * authserver.MAX_CREDENTIALS
        session = functools.partial(hashed, "MD5", hashed("MD5", "jim", "files", "secret"))
        for sentence, username, first, second, change, status in (
                ("a hole in an unknown parameter", "jim", 'x="a nc=00000001 b", uri="/x", cnonce="f2", nc=00000001',
                 'x="a nc=00000002 b", uri="/x", cnonce="f2", nc=00000001', {}, 401),
                ("a hole in the name", "j nc=00000001 m", 'uri="/x", cnonce="f2", nc = 00000001',
                 'uri="/x", cnonce="f2", nc = 00000001', {}, 401),
                ("two holes that have changed places", "jim", 'uri="/x", cnonce="f2", nc=00000001',
                 'cnonce="/x", uri="f2", nc=00000002', {}, 400),
                ("more than the limit", "jim", 'uri="/x", cnonce="f2", nc=00000001',
                 'uri="%s", cnonce="f2", nc=00000002' % long, {"uri": long}, 400),
                ("HA1 of another session", "jim", 'algorithm=MD5-sess, uri="/x", cnonce="f2", nc=00000001',
                 'algorithm=MD5-sess, uri="/x", cnonce="e3", nc=00000002', {"cnonce": "e3"}, 401)):
            with self.subTest(sentence):
                authenticator = make({username: "secret"}, algorithms=["MD5", "MD5-sess"])
                client = Client(authenticator, username)
                ha1 = session(client.values["nonce"], "f2") if "sess" in first else ""
                self.assertEqual(attempt(authenticator, craft(first, nc="00000001", ha1=ha1)).status, 200)
                field = craft(second, ha1=ha1, **change).replace("j nc=00000001", "j nc=00000002")
                for granted in (authenticator.passwords.granted, {}):
                    authenticator.passwords.granted = granted
                    verdict = attempt(authenticator, field, target=change.get("uri", "/x"))
                    self.assertEqual((verdict.status, is_stale(verdict)), (status, False))

    def test_who_was_right_is_recalled(self) -> None:
        """In any order of parameters, and for Basic: the second time nothing is parsed, nor is a password looked at."""
        for order in (1, -1):
            authenticator = make(algorithms=["MD5", "SHA-256"])
            clients = [Client(authenticator, algorithm=name) for name in ("MD5", "SHA-256")]
            fields: List[Any] = [
                lambda client=client: "Digest " + ", ".join(client.field()[7:].split(", ")[::order]) for client in clients]
            for field in fields + [lambda: JIM, lambda: JIM.replace("Basic", "basic")]:
                said = [attempt(authenticator, field())]
                for again in fields[:fields.index(field) + 1] if field in fields else [field]:
                    with mock.patch.object(authserver, "parse_authorization", side_effect=AssertionError):
                        said.append(attempt(authenticator, again()))
                self.assertEqual({verdict[:4] for verdict in said}, {(200, "jim", "jim", "")})

    def test_a_thread_is_for_slow_hashes_only(self) -> None:
        """The judge asks for one where a hash takes long, for strangers too where it does for anybody; else it answers."""
        for slow, field in [(slow, basic(user, word)) for slow in (True, False) for user in ("jim", "nobody") for word in ("x", "secret")]:
            with mock.patch.object(Passwords, "is_slow", lambda *_: slow), self.subTest(field, slow=slow):
                authenticator = make()
                story = authenticator.judge(authserver.Attempt("GET", "/x", [field], None, NOW, authenticator.schemes))
                ends: Any = contextlib.ExitStack() if slow else self.assertRaises(StopIteration)
                with ends:
                    self.assertTrue(callable(story.send(None)))

    def test_nothing_in_a_frame_is_passed_over(self) -> None:
        """In whatever order parameters stand: one that changes, or changes places with another, is another frame."""
        client, chance = Client(make()), Random(SEED)

        def frame(params: List[str]) -> Any:
            return client.authenticator._frame_of(authserver.split_frame("Digest " + ", ".join(params)))
        for _ in range(20):
            params = client.field()[7:].split(", ")
            chance.shuffle(params)
            frames = []
            for change, text in [(-1, "")] + list(enumerate(params)):
                if not text.startswith(("uri=", "cnonce=", "nc=", "response=")):
                    field = params[:max(0, change)] + [text[:-1] + "x" + text[-1:]] * bool(text) + params[change + 1:]
                    frames.append(frame(field))
            frames.append(frame(params[1:] + params[:1]))
            self.assertEqual(len(set(frames)), len(frames), params)

    def test_who_was_right_is_right_in_the_same_way_only(self) -> None:
        """With a scheme that is not offered here, beside a second field, or locked out: refused as anybody."""
        for scheme in ("basic", "digest"):
            authenticator = make(max_failures=(1, 60.0))
            client = Client(authenticator)
            make_field = client.field if scheme == "digest" else functools.partial(basic, "jim", "secret")
            for _ in range(2):
                self.assertEqual(client.ask(make_field(), client="192.0.2.1").status, 200)
            other = ("basic", "digest")[make_field().startswith("B")]
            self.assertEqual(client.ask(make_field(), schemes=(other,)).status, 401)
            self.assertEqual(attempt(authenticator, make_field(), make_field()).status, 400)
            self.assertEqual(client.ask(basic("jim", "wrong"), client="192.0.2.1").status, 401)
            self.assertEqual(client.ask(make_field(), client="192.0.2.1").status, 429)
            self.assertEqual(client.ask(make_field(), client="192.0.2.2").status, 200)

    def test_what_another_authenticator_granted_is_nothing_here(self) -> None:
        """It has the same dictionary, and other nonces, or it offers more: judged as if for the first time."""
        for settings, other, status in (({}, {}, 200), ({}, {"table": authserver.SharedTable()}, 401),
                                        ({}, {"algorithms": ["SHA-256"]}, 401), ({}, {"schemes": ["basic"]}, 401)):
            first = make(**settings)
            client = Client(first)
            self.assertEqual([client.ask().status for _ in range(2)], [200, 200])
            second = Authenticator(first.passwords, **dict({"table": first.table}, **other))
            self.assertEqual(attempt(second, client.field()).status, status)
        for authenticator in (first, Authenticator(first.passwords)):
            self.assertEqual(attempt(authenticator, JIM).status, 200)
        tokens = [key for key in first.passwords.granted if isinstance(key, bytes)]
        self.assertEqual(len(tokens), 2)        # hashes with a key: not to be found in a table of hashes

    def test_what_a_reload_took_is_not_given_back(self) -> None:
        """The dictionary is replaced in the middle of a judgement: the new one is told nothing by the old."""
        authenticator = make()
        old, new = authenticator.passwords, Passwords({"ann": "other"}, realm="files")
        client = Client(authenticator)

        def find(names: Any) -> Any:
            authenticator.passwords = new
            return Passwords.find(old, names)
        with mock.patch.object(old, "find", find):
            self.assertEqual(client.ask().status, 200)
        self.assertEqual((client.ask().status, new.granted), (401, {}))

    def test_what_is_too_long_is_not_remembered(self) -> None:
        """A parameter of 2,000 letters is no reason to refuse anybody, nor to keep it."""
        authenticator = make()
        client = Client(authenticator)
        self.assertEqual(client.ask(client.field() + ', x="%s"' % ("y" * 2000)).status, 200)
        self.assertEqual(authenticator.passwords.granted, {})

    def test_a_nonce_of_a_clock_ahead_of_ours(self) -> None:
        """It is good from CLOCK_SKEW before it was made; sooner, it is stale."""
        for ahead, stale in ((authserver.CLOCK_SKEW - 0.5, False), (authserver.CLOCK_SKEW + 0.5, True)):
            authenticator = make(nonce_secret=b"s" * 32)
            client = Client(authenticator, now=NOW + ahead)
            for _ in range(2):
                self.assertEqual(is_stale(client.ask()), stale)

    def test_mutated_password_files_are_read_or_refused(self) -> None:
        """2,000 seeded mutations of a password file: entries and mistakes, no exception."""
        chance = Random(SEED)
        text = ("jim:files:%s\nsha:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=\n# x\nann:plain:secret\n"
                "bob:$6$rounds=1000$abcdefgh$x\n" % hashed("MD5", "jim:files:secret"))
        for _ in range(2000):
            authserver.parse_passwords(mutate(text, chance), "files")


PIECES = ("username*=", "userhash=true", 'nc="', "auth-int", "MD5-sess", '\\"', "UTF-8''", '", "',
          "ffffffff", "00000000", "Basic ", "%C3%BC", "\r\n", "\x00", *"\",=\\ \t:;%'{}$#0aA-*")


def mutate(text: str, chance: Random) -> str:
    """Return text with some characters dropped, doubled, reversed or replaced."""
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(text) + 1)
        stop = start + chance.choice((0, 1, 1, 1, 2, 8, 40))
        piece = text[start:stop]
        new = chance.choice(("", piece * 2, piece[::-1], chr(chance.randrange(256)), chance.choice(PIECES)))
        text = text[:start] + new + text[stop:]
    return text


def fuzz_credentials(rounds: int, chance: Random) -> None:
    """Assert that mutated Authorization fields raise nothing and let nobody in.

    A mutation that leaves the meaning alone (blanks, case, an unknown parameter) may
    pass; so the password is wrong from the start.
    """
    authenticator = make(algorithms=["SHA-256", "MD5", "MD5-sess"], qop=["auth", "auth-int"], max_failures=(0, 60.0))
    client = Client(authenticator, password="wrong")
    for number in range(rounds):
        client.settings = {"algorithm": chance.choice(authenticator.algorithms),
                           "qop": chance.choice(("auth", "auth-int"))}
        field = chance.choice((client.field(), client.field(), basic("jim", "wrong"),
                               basic("ü" * chance.randrange(9), "x")))
        mutated = mutate(field, chance)
        fields = [mutated] if chance.random() < 0.98 else [mutated, field]
        verdict = attempt(authenticator, *fields, client="192.0.2.1")
        assert verdict.status in (400, 401), (number, mutated, verdict)
        assert all("\n" not in value and "\r" not in value for _, value in verdict.fields), mutated


def fuzz_memory(rounds: int, chance: Random) -> None:
    """Assert that who was found right before is judged as one of whom nothing is remembered."""
    settings: Dict[str, Any] = dict(nonce_secret=b"s" * 32, max_failures=(0, 60.0), algorithms=["MD5", "SHA-256", "MD5-sess"],
                                    qop=["auth", "auth-int"])
    twins = [make({"jim": "secret", "j nc=00000001 m": "x"}, **settings) for _ in range(2)]
    right = 0
    for number in range(rounds):
        client = Client(twins[0], **chance.choice((  # type: ignore[arg-type]
            {}, {}, {"algorithm": "SHA-256"}, {"algorithm": "MD5-sess"}, {"qop": "auth-int"},
            {"username": "j nc=00000001 m", "password": "x"})))
        for _ in range(4):
            client.values.update(cnonce=chance.choice(("f2", "a b", "c" * 300, "a,b", "e3")), uri=chance.choice(("/x", "/y")))
            nc = chance.choice(("", "", "00000001", "+0000002", "0000_003", "00000000", "2", "ffffffff"))
            body = b"" if client.settings.get("qop") else None
            field = client.field(nc=nc, body=body)
            field = mutate(field, chance) if chance.random() < 0.3 else field
            said = [attempt(twin, field) for twin in twins]
            twins[1].passwords.granted.clear()
            assert [str(verdict[:4]) + str(is_stale(verdict)) for verdict in said[:1]] == [
                str(verdict[:4]) + str(is_stale(verdict)) for verdict in said[1:]], (number, field, said)
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
        medians = [statistics.median(times[user]) for user in ("jim", "bob")]
        result.append((scheme, medians[0], medians[1] - medians[0]))
    return result


# -- 1.5 Files, a page that is called directly ---------------------------------

OLD = 1000000000        # Sun, 09 Sep 2001 01:46:40 GMT


class Asked(NamedTuple):
    """What a page may know of a request."""
    method: str
    target: str
    path: str
    values: Dict[str, List[str]]
    username: Optional[str]
    now: float


def works_elsewhere(work: Callable[[], bool], jail: Optional[str] = None) -> bool:
    """Return whether work returns True in a child: in a jail, or as a user to whom permissions apply."""
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
    """A folder `tree` is served; beside it lies what must not be: tree.txt, outside/secret.txt."""

    def setUp(self) -> None:
        self.folder = os.path.realpath(tempfile.mkdtemp(prefix="files-", dir=TEMP))
        self.addCleanup(shutil.rmtree, self.folder, True)
        os.chmod(self.folder, 0o755)
        self.root, self.outside = self.path("tree"), self.path("outside")
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

    def chmod(self, name: str, mode: int) -> None:
        """Change the mode of a folder, until the end of the test."""
        os.chmod(self.path(name), mode)
        self.addCleanup(os.chmod, self.path(name), 0o755)

    def get(self, path: str, files: Any = None, method: str = "GET", username: Optional[str] = "jim",
            now: Any = NOW, **fields: Any) -> Any:
        """Ask for a path, field names have _ for -; the body is read, as the server would."""
        values = {name.replace("_", "-"): [value] for name, value in fields.items()}
        page: Callable[[Any], Any] = files or self.files
        answer = page(Asked(method, path, path, values, username, now))
        self.kind = type(answer.body)
        if isinstance(answer.body, bytes):
            return answer
        with answer.body.file as file:
            octets = os.pread(file.fileno(), answer.body.length, answer.body.offset)
        return answer._replace(body=octets)

    def field(self, answer: "authserver.Answer", name: str) -> Optional[str]:
        """Return a field of an answer; fail if it is there twice."""
        values = [value for other, value in answer.fields if other == name]
        self.assertLess(len(values), 2, name)
        return values[0] if values else None

    def check_statuses(self, wanted: Dict[str, int], files: Any = None) -> None:
        """Check the statuses of paths, and that nothing from outside comes with them."""
        for path, status in wanted.items():
            with self.subTest(path=path):
                answer = self.get(path, files)
                self.assertEqual(answer.status, status)
                self.assertNotIn(b"OUTSIDE", answer.body)

    def links(self, path: str = "/", files: Any = None) -> List[str]:
        """Return the targets of the links of a page."""
        return [html.unescape(link) for link in re.findall('<a href="([^"]*)">', self.text(path, files))]

    def text(self, path: str = "/", files: Any = None) -> str:
        """Return a page."""
        return str(self.get(path, files).body, "utf-8")

    def meanwhile(self, function: str, when: Optional[bytes], act: Callable[[], Any]) -> Any:
        """Return a patch that makes os.FUNCTION act, once, after a call (for a name)."""
        real, acts = getattr(os, function), [act]

        def patched(first: Any, *rest: Any, **keys: Any) -> Any:
            result = real(first, *rest, **keys)
            if acts and (when is None or isinstance(first, bytes) and first == when):
                acts.pop()()
            return result
        return mock.patch.object(os, function, patched)


class FilesPathTests(FilesTest):
    """Which file a path leads to, and that none leads out."""

    # As the file system has them, whatever the locale.
    NAMES = [os.fsdecode(name.encode("utf-8", "surrogateescape")) for name in (
        "a.txt", "a b+c&d;e.txt", "ä ö.txt", "\udce4.txt", "%41.txt", "a:b", "javascript:x", "back\\slash", "~",
        "x..", "a\nb", "q?", "#", "a=b", "<b>", "a&amp;b", "\"'", "\u202egpj", "x" * 200)]

    def test_every_name(self) -> None:
        """A path is decoded once; each name can be asked for, and the listing's link does that."""
        for name in self.NAMES:
            self.write("tree/sub/" + name, os.fsencode(name))
            self.write("tree/sub/in %s/a" % name, os.fsencode(name))
            encoded = "/sub/" + urllib.parse.quote(os.fsencode(name))
            for path in (encoded, encoded + "?%2f../=//"):
                self.assertEqual(self.get(path).body, os.fsencode(name))
        # Bytes that are not encoded, as curl sends what was typed.
        self.assertEqual(self.get("/sub/\xc3\xa4 \xc3\xb6.txt").body, "ä ö.txt".encode())
        base = "http://host:1"
        targets = [urllib.parse.urljoin(base + "/sub/", link) for link in self.links("/sub/")]
        self.assertEqual(len(set(targets)), 2 * len(self.NAMES) + 1)
        bodies = {self.get(target[len(base):]).body for target in targets if target[-1] != "/"}
        self.assertEqual(bodies, set(map(os.fsencode, self.NAMES)))
        for target in targets:
            self.assertEqual((target[:len(base)], self.get(target[len(base):]).status), (base, 200), target)
        page = self.text("/sub/")
        self.assertIsNone(re.search("[\x00-\x09\x0b-\x1f\u202e]", page))
        self.assertLessEqual(set(re.findall("<([a-z0-9]+)", page)), set(
            "html meta link style title h1 table tr th td a i".split()))

    def test_no_path_crosses_a_line(self) -> None:
        """Dots, slashes, NULs and backslashes in any spelling are 404, in both directions."""
        self.write("tree/sub/a.txt", b"inside")
        self.write("tree/a.txt", b"inside")
        climbs = ("..", "%2e%2e", ".%2E", "..%2f", "..%5c", "..\\", "%252e%252e", "..%00", "..;", "\xc0\xae.")
        paths = [path.replace("^", climb) for climb in climbs
                 for path in ("/^/tree.txt", "/sub/^/a.txt", "/sub/^/^/tree.txt", "/^", "/sub/^/")] + [
            "/sub%2fa.txt", "/sub%2Fa.txt", "/sub//a.txt", "//a.txt", "/./a.txt", "/sub/./a.txt", "/.", "/sub/.",
            "/sub%5ca.txt", "/sub\\a.txt", "/a.txt%00", "/a.txt%00.html", "/%00", "/a.txt/", "/a.txt/b", "//",
            "/sub//", "/" + "x" * 256, "/" + "x/" * 3000, "/a.txt\0", "/tree.txt", "/../tree/a.txt"]
        self.check_statuses(dict.fromkeys(paths, 404))
        self.check_statuses(dict.fromkeys(paths, 404), self.serve(hidden=True))

    def test_hidden_names(self) -> None:
        """A name with a dot is there with `hidden` only: asked for, listed, or of a folder."""
        paths = dict.fromkeys(("/.git/config", "/.env", "/.git/", "/.git", "/sub/.x", "/%2eenv", "/..."), 404)
        for path in (".git/config", ".env", "sub/.x", "..."):
            self.write("tree/" + path)
        self.check_statuses(paths)
        self.assertEqual(self.links(), ["sub/"])
        everything = self.serve(hidden=True)
        self.check_statuses({path: 301 if path == "/.git" else 200 for path in paths}, everything)
        self.assertEqual(self.links("/", everything), [".git/", "sub/", "...", ".env"])

    def test_links(self) -> None:
        """Links that stay inside are followed, name by name; others are 404; the listing knows which."""
        for name in ("a.txt", "sub/deep/b.txt", "..data/c.txt"):
            self.write("tree/" + name, b"inside")
        root = self.root
        links = {200: {"same": "a.txt", "down": "sub/deep/b.txt", "sub/up": "../a.txt", "sub/far": "../sub/../a.txt",
                  "dots": "./sub/.//deep/./b.txt", "to-link": "same", "through": "folder/b.txt",
                  "mounted": "..data/c.txt", "sub/deep/top": "../../a.txt", "absolute": root + "/a.txt",
                  "absolute-up": root + "/sub/../a.txt", "slashes": root + "//a.txt", "sub/abs": root + "//a.txt"},
            301: {"folder": "sub/deep", "sub/self": ".", "sub/root": "..", "slash": "sub/", "all": root},
            404: {"out": "../tree.txt", "up": "..", "sub/up-up": "../../tree.txt", "abs": self.path("tree.txt"),
                  "back": "../tree/a.txt", "nothing": "nothing", "loop": "loop", "etc": "/etc/passwd",
                  "root": "/", "longer": root + "-a.txt", "climb": root + "/../tree.txt", "dev": "/dev/null",
                  "file-as-folder": "a.txt/b", "x": "y", "y": "x", "link-41": "link-40"}}
        links[200].update({"link-%d" % number: "link-%d" % (number - 1) for number in range(2, 41)}, **{"link-1": "a.txt"})
        for texts in links.values():
            for name, text in texts.items():
                os.symlink(text, self.path("tree/" + name))
        for status, texts in links.items():
            self.check_statuses({"/" + name: status for name in texts})
        for path in ("/folder/b.txt", "/sub/self/self/up", "/sub/root/sub/root/a.txt", "/all/all/same"):
            self.assertEqual(self.get(path).body, b"inside", path)
        self.assertEqual({name.rstrip("/") for name in self.links()}, {"a.txt"} | {
            name for name in ["sub", *links[200], *links[301]] if "/" not in name})

    def test_a_folder_that_is_exchanged(self) -> None:
        """A folder that moves outside, a link in its place, between two opens leads nowhere."""
        self.write("tree/secret.txt", b"inside")
        self.write("outside/secret.txt", b"OUTSIDE")

        def exchange() -> None:
            os.rename(self.path("tree/sub"), self.path("outside/sub"))
            os.symlink("../outside/sub", self.path("tree/sub"))
        for text in ("inner.txt", "../secret.txt"):
            with self.subTest(text=text):
                self.write("tree/sub/inner.txt", b"inside")
                os.symlink(text, self.path("tree/sub/link"))
                with self.meanwhile("open", b"sub", exchange):
                    self.assertEqual(self.get("/sub/link").body, b"inside")
                self.assertEqual(self.get("/sub/link").status, 404)
                os.unlink(self.path("tree/sub"))
                shutil.rmtree(self.path("outside/sub"))

    def test_a_race(self) -> None:
        """While a thread exchanges a folder and a link to outside, no answer is from outside."""
        self.write("tree/sub/secret.txt", b"inside")
        os.symlink(self.outside, self.path("tree/link"))
        done = threading.Event()

        def exchange() -> None:
            while not done.is_set():
                for source, target in (("sub", "away"), ("link", "sub"), ("sub", "link"), ("away", "sub")):
                    os.rename(self.path("tree/" + source), self.path("tree/" + target))
        thread = threading.Thread(target=exchange)
        thread.start()
        try:
            seen = {self.get("/sub/secret.txt").body[:6] for _ in range(2000)}
        finally:
            done.set()
            thread.join()
        self.assertLessEqual(seen, {b"inside", b"<!DOCT"})

    def test_what_is_no_file(self) -> None:
        """A FIFO, a socket and links to them are 404 at once, and not listed."""
        os.mkfifo(self.path("tree/fifo"))
        os.symlink("fifo", self.path("tree/link"))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(self.path("tree/socket"))
            self.check_statuses({"/fifo": 404, "/link": 404, "/socket": 404, "/fifo/": 404})
            self.assertEqual(self.links(), [])

    def test_secrets(self) -> None:
        """A secret is 404 under each of its names, also when it is replaced, or made, later."""
        inside, later = self.write("tree/users", b"OUTSIDE"), self.path("tree/log")
        outside = self.write("passwords", b"OUTSIDE")
        os.link(outside, self.path("tree/hard"))
        os.symlink("users", self.path("tree/link"))
        files = self.serve(secrets=(inside, outside, later, self.path("tree.txt")))
        names = dict.fromkeys(("/users", "/link", "/hard", "/log"), 404)
        self.assertEqual(files.exposed, [inside, later])
        self.check_statuses(names, files)
        for path in (inside, outside, later):
            os.rename(self.write("tree/new", b"OUTSIDE", OLD + 1), path)
        self.check_statuses(names, files)
        # ... and between our look at its place and the moment when it is opened.
        with self.meanwhile("stat", None, lambda: os.rename(self.write("tree/new", b"OUTSIDE", OLD + 3), inside)):
            self.check_statuses({"/users": 404}, files)
        found = os.stat(self.write("tree/plain", b"plain", OLD + 2))
        # As if the file system had given it the inode of the password file that was replaced.
        files.known[found.st_dev, found.st_ino] = outside, OLD * 10 ** 9
        self.assertEqual(self.get("/plain", files).body, b"plain")
        self.assertEqual(self.links("/", files), ["plain"])

    def test_a_secret_that_is_changed_where_it_lies(self) -> None:
        """It stays one: outside the tree with a link in it, also when its own path is gone; a new one is never listed."""
        outside, inside = self.write("passwords", b"OUTSIDE"), self.path("tree/users")
        os.link(outside, self.path("tree/hard"))
        files = self.serve(secrets=(os.path.relpath(outside), inside))
        for act in (lambda: None, lambda: self.write("passwords", b"OUTSIDE+", OLD + 1), lambda: os.unlink(outside)):
            act()
            self.check_statuses({"/hard": 404}, files)
            self.assertEqual(self.links("/", files), [])
        self.write("tree/users", b"OUTSIDE")
        self.assertEqual(self.links("/", files), [])
        os.rename(self.write("tree/new", b"OUTSIDE", OLD + 3), inside)
        self.assertEqual(self.links("/", files), [])
        # One that is a page now, in an inode that was once of a secret inside.
        found = os.stat(self.write("tree/plain", b"plain"))
        files.known[found.st_dev, found.st_ino] = "users", 0
        self.assertEqual(self.get("/plain", files).body, b"plain")

    def test_the_folder_by_other_names(self) -> None:
        """Served by a link, with secrets named by one: links in it are followed, no secret is; opened anew, nothing is left."""
        os.symlink("tree", self.path("link"))
        real = self.write("tree/users", b"OUTSIDE")
        self.write("tree/a.txt", b"inside")
        for name, text in (("one", self.root), ("two", self.path("link"))):
            os.symlink(text + "/a.txt", self.path("tree/" + name))
        for root in (self.root, self.path("link")):
            for secret in (real, self.path("link/users")):
                files = self.serve(root, secrets=(secret,))
                self.assertEqual((files.exposed, files.inside), ([secret], ["users"]))
                self.check_statuses({"/users": 404, "/one": 200, "/two": 200 if root != self.root else 404}, files)
        for chroot in (self.folder, self.root, self.path("link")):
            self.assertEqual(self.serve(self.path("link"), chroot=chroot).path, "/tree" if chroot == self.folder else "/.")
        with self.assertRaisesRegex(Refusal, "not below --chroot"):
            self.serve(self.path("link"), chroot=self.outside)
        self.assertRaises(Refusal, self.serve, self.path("none"))
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            files.open()
        self.assertEqual(os.listdir("/proc/self/fd"), before)
        files.close()
        self.assertEqual(len(os.listdir("/proc/self/fd")), len(before) - 1)

    def test_a_secret_that_is_being_written(self) -> None:
        """What `passwd` writes beside the file, before it takes its place, is neither listed nor served."""
        path, seen = self.write("tree/users", b"#"), []     # type: str, List[Any]
        files = self.serve(secrets=(path,))
        with mock.patch.object(os, "fsync", lambda _: seen.extend((self.links("/", files), os.listdir(self.root)))):
            authserver.change_password(path, "jim", "files", "x")
        self.assertEqual((seen[0], len(seen[1])), ([], 2))
        self.check_statuses({"/" + name: 404 for name in seen[1]}, files)

    def test_permissions(self) -> None:
        """What may not be read is 403 and not listed; on the way to a file, search is enough."""
        for name in ("shut.txt", "search/a.txt", "shut/a.txt"):
            self.write("tree/" + name)
        for name, mode in (("shut.txt", 0), ("search", 0o311), ("shut", 0)):
            self.chmod("tree/" + name, mode)
        wanted = {"/shut.txt": 403, "/search/a.txt": 200, "/search/": 403, "/shut/a.txt": 403, "/shut/": 403}
        self.assertTrue(works_elsewhere(
            lambda: {path: self.get(path).status for path in wanted} == wanted and self.links() == []))

    def test_what_its_owner_alone_may_read_is_listed_for_its_owner(self) -> None:
        """The mode says no to everybody; access(2), for the one who asks it, yes."""
        self.write("tree/sub/a.txt")
        for name, mode in (("sub/a.txt", 0o600), ("sub", 0o700)):
            self.chmod("tree/" + name, mode)
        self.assertEqual((self.links("/"), self.links("/sub/")), (["sub/"], ["../", "a.txt"]))

    def test_errors_of_the_system(self) -> None:
        """No descriptors left is 503; what nobody foresaw is raised."""
        self.get("/")       # opens the root
        for number in (errno.EMFILE, errno.ENFILE, errno.EAGAIN):
            with mock.patch.object(os, "open", side_effect=OSError(number, "")):
                self.assertEqual(self.get("/a.txt").status, 503)
        with mock.patch.object(os, "open", side_effect=OSError(errno.EIO, "")):
            self.assertRaises(OSError, self.get, "/a.txt")

    def test_an_index_that_may_not_be_read(self) -> None:
        """403, or 503 where it could not be opened just now: whoever put it there did not mean a listing."""
        self.write("tree/index.html")
        real = os.open
        for number, status in ((errno.EACCES, 403), (errno.EPERM, 403), (errno.EMFILE, 503), (errno.ESTALE, 503),
                               (errno.ENOENT, 200), (errno.ENXIO, 200)):
            def refuse(name: Any, *rest: Any, **keys: Any) -> int:
                if name == b"index.html":
                    raise OSError(number, "")
                return real(name, *rest, **keys)
            with mock.patch.object(os, "open", refuse):
                self.assertEqual(self.get("/").status, status, number)

    def test_no_descriptor_is_left_open(self) -> None:
        """After answers of all kinds as many files are open as before."""
        self.write("tree/sub/a.txt")
        self.write("tree/large", b"x" * 100000)
        for name, text in (("in", "sub/a.txt"), ("out", "../tree.txt"), ("loop", "loop"), ("sub/up", "../large"),
                           ("sub/abs", self.root + "/sub/../sub/a.txt"), ("climb", "sub/../..")):
            os.symlink(text, self.path("tree/" + name))
        os.mkfifo(self.path("tree/fifo"))
        self.get("/")
        before = os.listdir("/proc/self/fd")
        for path in ("/", "/sub", "/sub/", "/sub/a.txt", "/large", "/in", "/out", "/loop", "/sub/up", "/climb",
                     "/sub/abs", "/fifo", "/none/x", "/sub/a.txt/x", "/large/", "//", "/sub/none"):
            self.get(path)
            self.get(path, range="bytes=70000-", if_none_match="*")
        self.assertEqual(os.listdir("/proc/self/fd"), before)


class FilesAnswerTests(FilesTest):
    """What an answer says of a file."""

    def test_folders(self) -> None:
        """A folder without its slash is redirected, on this host; index.html stands for its folder."""
        for name in ("sub/a.txt", "a b/a.txt", os.fsdecode(b"\xe4/a.txt"), "http:/a.txt", "index/index.html",
                     "odd/index.html/a.txt", "bad/a.txt"):
            self.write("tree/" + name, b"body")
        os.symlink(self.path("tree.txt"), self.path("tree/bad/index.html"))
        for path, location in (("/sub", "/sub/"), ("/sub?a=//b&c", "/sub/?a=//b&c"), ("/a%20b?", "/a%20b/?"),
                               ("/%e4", "/%E4/"), ("/http:", "/http%3A/"), ("/index", "/index/")):
            answer = self.get(path)
            self.assertEqual((answer.status, self.field(answer, "Location")), (301, location), path)
        self.check_statuses(dict.fromkeys(("//sub", "///sub", "/\\sub", "/sub//", "/%2fsub", "/sub/a.txt/"), 404))
        self.assertEqual(self.get("/index/").body, b"body")
        self.assertEqual(self.field(self.get("/index/"), "Content-Type"), "text/html; charset=utf-8")
        self.assertEqual(self.links("/odd/") + self.links("/bad/"), ["../", "index.html/", "../", "a.txt"])

    def test_types(self) -> None:
        """A type is by the last extension, the same on each box; text is UTF-8; nobody shall guess."""
        for kind, names in {
                "text/html": "a.html A.HTM", "text/css": "a.css", "text/javascript": "a.js a.mjs", "text/plain": "a.txt a.py",
                "text/markdown": "a.md", "application/json": "a.json", "application/wasm": "a.wasm", "image/png": "a.png",
                "application/pdf": "a.pdf", "application/gzip": "a.tar.gz a.tgz a.html.gz", "font/woff2": "a.woff2",
                "image/svg+xml": "a.svg", "image/jpeg": "a.jpg a.JPEG", "video/mp4": "a.mp4", "audio/mpeg": "a.mp3",
                "application/postscript": "a.ps", "application/octet-stream": "README html a.unheard-of a."}.items():
            for name in names.split():
                self.write("tree/" + name)
                answer, charset = self.get("/" + name), "; charset=utf-8" if kind.startswith("text/") else ""
                for field, value in (("Content-Type", kind + charset), ("X-Content-Type-Options", "nosniff"),
                                     ("Content-Encoding", None)):
                    self.assertEqual(self.field(answer, field), value, name)

    def test_whose_it_is(self) -> None:
        """What a password was needed for is private; what is public says nothing of it."""
        self.write("tree/a.txt")
        os.mkdir(self.path("tree/sub"))
        for path, keys in (("/a.txt", {}), ("/", {}), ("/sub", {}), ("/none", {}), ("/a.txt", {"range": "bytes=0-0"}),
                           ("/a.txt", {"if_none_match": "*"}), ("/a.txt", {"range": "bytes=9-"})):
            for username, wanted in (("jim", ("private", "Authorization")), (None, (None, None))):
                answer = self.get(path, username=username, **keys)
                self.assertEqual((self.field(answer, "Cache-Control"), self.field(answer, "Vary")), wanted, path)

    def validator(self, name: str = "ETag", now: float = NOW) -> str:
        """Return a field of a.txt."""
        return str(self.field(self.get("/a.txt", now=now), name))

    def test_validators(self) -> None:
        """The tag changes with content, time and file; Last-Modified is no later than now."""
        path, tags = self.write("tree/a.txt", b"one"), set()
        for name, octets, mtime in (("a.txt", b"two", OLD), ("a.txt", b"three", OLD), ("a.txt", b"three", OLD + .001),
                                    ("b", b"three", OLD + .001)):
            os.rename(self.write("tree/" + name, octets, mtime), path)
            self.assertEqual(self.validator(), self.validator())
            self.assertRegex(self.validator(), '^"[0-9a-f-]+"$')
            tags.add(self.validator())
        self.assertEqual(len(tags), 4)
        for mtime, date in ((OLD, "Sun, 09 Sep 2001 01:46:40 GMT"), (-5, "Thu, 01 Jan 1970 00:00:00 GMT"),
                            (NOW + 9, "Wed, 18 May 2033 03:33:20 GMT"), (1 << 33, "Wed, 18 May 2033 03:33:20 GMT")):
            os.utime(path, (mtime, mtime))
            self.assertEqual(self.validator("Last-Modified"), date, mtime)
            self.assertIn("a.txt", self.text())

    def test_a_young_file(self) -> None:
        """While time alone may not tell a change, the tag is weak, and not the later one."""
        self.write("tree/a.txt", b"0123456789")
        young = self.validator(now=OLD + 1)
        self.assertRegex(young, '^W/"')
        self.assertNotIn(self.validator(), young)
        for now, fields, status in ((OLD, {"if_none_match": young}, 304), (NOW, {"if_none_match": young}, 200),
                                    (OLD, {"if_match": young}, 412), (OLD, {"if_match": young[2:]}, 412),
                                    (OLD, {"range": "bytes=1-"}, 206),
                                    (OLD, {"range": "bytes=1-", "if_range": young}, 200)):
            self.assertEqual(self.get("/a.txt", now=now, **fields).status, status, fields)

    def test_conditions(self) -> None:
        """If-Match, If-Unmodified-Since, If-None-Match, If-Modified-Since, Range: in this order."""
        self.write("tree/a.txt", b"0123456789")
        tag, old, date = self.validator(), "Sun, 09 Sep 2001 01:46:39 GMT", "Sun, 09 Sep 2001 01:46:40 GMT"
        cases: Dict[str, Any] = {
            "if_match": {tag: 200, '"x", ' + tag: 200, "*": 200, '"x"': 412, "W/" + tag: 412, "": 412},
            "if_unmodified_since": {date: 200, old: 412, "rubbish": 200},
            "if_none_match": {tag: 304, "W/" + tag: 304, '"x",W/%s ,"y"' % tag: 304, " * ": 304, '"x"': 200,
                              tag[1:-1]: 200, "": 200}, "if_modified_since": {
                date: 304, "Sun, 09 Sep 2001 01:46:41 GMT": 304, old: 200, "Sunday, 09-Sep-01 01:46:40 GMT": 304,
                "Sun Sep  9 01:46:40 2001": 304, "1": 200, " ": 200, "x" * 9999: 200,
                "Sun, 99 Xxx 99999999999999 01:46:40 GMT": 200}}
        table = [({name: text}, status) for name, texts in cases.items() for text, status in texts.items()] + [
            ({"if_match": tag, "if_unmodified_since": old}, 200), ({"if_match": '"x"', "if_none_match": tag}, 412),
            ({"if_none_match": '"x"', "if_modified_since": date}, 200),
            ({"if_match": tag, "if_none_match": tag}, 304), ({"if_none_match": tag, "range": "bytes=99-"}, 304),
            ({"if_match": '"x"', "range": "bytes=99-"}, 412), ({"if_match": tag, "range": "bytes=1-2"}, 206)]
        for fields, status in table:
            for method, wanted in (("GET", status), ("HEAD", 200 if status == 206 else status)):
                with self.subTest(fields=fields, method=method):
                    answer = self.get("/a.txt", method=method, **fields)
                    self.assertEqual(answer.status, wanted)
                    self.assertEqual(self.field(answer, "ETag"), None if status == 412 else tag)
                    if status == 304:
                        self.assertEqual((answer.body, self.field(answer, "Content-Type")), (b"", None))

    def test_ranges(self) -> None:
        """One range gives 206 or 416; several, and what is no range, the whole file; a HEAD has none."""
        self.write("tree/a.txt", b"0123456789")
        self.write("tree/empty", b"")
        whole = ("0-1,3-4", "5-2", "-", "", "a-b", "--1", "1-2-3", "+1-2", "1_0-", "\u0661-", "0x1-", "9" * 9999 + "-")
        for text, wanted in [("0-0", b"0"), ("2-5", b"2345"), ("2-", b"23456789"), ("9-99", b"9"), ("-3", b"789"),
                ("-99", b"0123456789"), (" 1-1 ", b"1"), ("1-" + "9" * 99, b"123456789"), ("10-", 416),
                ("99-100", 416), ("-0", 416)] + [(text, 200) for text in whole]:
            with self.subTest(text=text):
                answer = self.get("/a.txt", range="bytes=" + text)
                extent, status, body = None, wanted, b"0123456789"
                if isinstance(wanted, bytes):
                    start, status, body = body.index(wanted), 206, wanted
                    extent = "bytes %d-%d/10" % (start, start + len(wanted) - 1)
                if status == 416:
                    extent, body = "bytes */10", answer.body
                self.assertEqual((answer.status, answer.body), (status, body))
                self.assertEqual(self.field(answer, "Content-Range"), extent)
                self.assertEqual(self.get("/a.txt", method="HEAD", range="bytes=" + text).status, 200)
        for text, status in (("BYTES=1-1", 206), ("bytes", 200), ("lines=1-2", 200)):
            self.assertEqual(self.get("/a.txt", range=text).status, status)
        for text in ("bytes=0-", "bytes=-5", "bytes=3-4"):
            self.assertEqual(self.get("/empty", range=text).status, 200)
        tag = self.validator()
        for text, status in ((tag, 206), ("Sun, 09 Sep 2001 01:46:40 GMT", 206), ('"x"', 200), ("W/" + tag, 200),
                             ("Sun, 09 Sep 2001 01:46:41 GMT", 200), ("", 200), ("*", 200), (tag + "," + tag, 200)):
            self.assertEqual(self.get("/a.txt", range="bytes=1-2", if_range=text).status, status, text)
        self.assertEqual(self.get("/a.txt", if_range=tag).status, 200)

    def test_large_and_cut_files(self) -> None:
        """Large files are handed over open, small ones come as bytes; one that is cut meanwhile is 503."""
        octets = bytes(range(256)) * 400
        self.write("tree/large", octets)
        self.write("tree/small", octets[:authserver.IN_MEMORY])
        for path, fields, body in (("/large", {}, octets), ("/large", {"range": "bytes=1-70000"}, octets[1:70001]),
                                   ("/large", {"range": "bytes=70000-"}, octets[70000:]),
                                   ("/small", {}, octets[:authserver.IN_MEMORY])):
            self.assertEqual(self.get(path, **fields).body, body)
            self.assertIs(self.kind, bytes if len(body) <= authserver.IN_MEMORY else authserver.FilePart)
        with self.meanwhile("fstat", None, lambda: os.truncate(self.path("tree/small"), 5)):
            self.assertEqual(self.get("/small").status, 503)


class FilesPageTests(FilesTest):
    """Listings, refusals, and the folder itself."""

    def test_listing(self) -> None:
        """Folders come first, numbers by their value; size, date; a way up; an end that is told."""
        for name in ("b.txt", "a10", "a9", "B1", "z/x", "Y/x"):
            self.write("tree/" + name, b"x" * 1536)
        self.assertEqual(self.links(), ["Y/", "z/", "a9", "a10", "b.txt", "B1"])
        self.assertEqual(self.links("/z/"), ["../", "x"])
        for mtime, date in ((OLD, "2001-09-09<i> 01:46</i>"), (-5, "1970-01-01<i> 00:00</i>"),
                            (1 << 33, "2242-03-16<i> 12:56</i>")):
            for name, size in (("z", ""), ("b.txt", "1.5 KiB")):
                os.utime(self.path("tree/" + name), (mtime, mtime))
                self.assertIn("</a><td>%s<td>%s" % (size, date), self.text())
        self.assertNotIn(" of 6 names", self.text())
        with mock.patch.object(authserver, "MAX_LISTED", 3):
            self.assertEqual(len(self.links()), 3)
            self.assertIn("3 of 6 names", self.text())

    def test_pages(self) -> None:
        """All pages have one style, for phones and dark rooms; a 401 says how to try again."""
        bodies = [authserver.error_page(status) for status in (400, 401, 403, 404, 405, 429, 500, 503)]
        for body in bodies + [self.get("/").body]:
            for piece in ("<!DOCTYPE html>", "viewport", "color-scheme:light dark", authserver.STYLE):
                self.assertIn(piece, body.decode())
            self.assertNotIn(b"<script", body)
        self.assertTrue(all(len(body) < 1500 for body in bodies))
        self.assertRegex(bodies[1].decode(), "401 Unauthorized</h1>\n<p>This .* To try again, .*\\.")
        self.assertIs(authserver.error_page(401), bodies[1])
        self.assertIn(b'<a href="/">', bodies[3])

    def refusal(self, path: str, **options: Any) -> str:
        """Return why a folder cannot be served."""
        try:
            self.get("/", self.serve(path, **options))
        except authserver.Refusal as error:
            return str(error)
        return ""

    def test_refusals(self) -> None:
        """What cannot be served is told at once, in a line: missing, no folder, not to be read."""
        for path, reason in ((self.path("none"), "No such file or directory"), (self.path("tree.txt"), "Not a directory")):
            self.assertEqual(self.refusal(path), "unable to serve %s: %s" % (path, reason))
        self.assertIn("not below --chroot", self.refusal(self.root, chroot=self.outside))
        denied = "unable to serve %s: Permission denied" % self.root
        for mode in (0, 0o444, 0o111):
            self.chmod("tree", mode)
            self.assertTrue(works_elsewhere(lambda: self.refusal(self.root) == denied), oct(mode))

    def test_opened_by_who_serves(self) -> None:
        """The folder is opened at the first request, and again after close(): what then has its name."""
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
        self.write("tree/sub/a.txt", b"inside")
        os.symlink(self.root + "/sub/a.txt", self.path("tree/absolute"))
        secrets = [self.write("tree/users"), self.write("passwords")]
        os.link(secrets[1], self.path("tree/hard"))
        files = self.serve(chroot=self.folder, secrets=secrets)
        wanted = {"/sub/a.txt": 200, "/absolute": 200, "/users": 404, "/hard": 404, "/": 200}
        self.assertTrue(works_elsewhere(
            lambda: {path: self.get(path, files).status for path in wanted} == wanted, self.folder))


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
    """A server that tests of a class share: `script` makes it, or authserver.py runs with `settings`."""
    at: str
    script, settings = "", ""
    options: Sequence[str] = ()

    @classmethod
    def set_up(cls) -> None:
        passwords = cls.box.write("passwords", "jim:plain:secret\nann:plain:other\n", 0o600)
        main = "sys.exit(authserver.main(sys.argv[1:]))\n"
        path = cls.box.write("server.py", PRELUDE + cls.settings + "\n" + (
            cls.script + LIBRARY_END if cls.script else main))
        cls.at = cls.box.launch(PYTHON, path, "--passwords", passwords, "--bind", "127.0.0.1:0", *cls.options)

    def say(self, data: bytes) -> bytes:
        """Send bytes and the end of them; return all that comes back."""
        return talk(self.at, data, True)

    def check(self, rows: Sequence[Row]) -> None:
        """Send each row's bytes, then a request: it is answered, or the connection was closed."""
        for sentence, data, want, closes in rows:
            with self.subTest(sentence):
                said = self.say(data + head("/", "GET", JIM, CLOSE))
                self.assertEqual(statuses(said), want + [200] * (not closes))
                if want and closes:
                    self.assertIn(b"\r\nconnection: close\r\n", said.lower())

    def threads(self) -> int:
        """Return how many threads the server has besides its loop."""
        return len(os.listdir("/proc/%d/task" % self.box.server.pid)) - 1

    def log(self) -> str:
        """Return what the server has logged."""
        return read(self.box.output)

    def logged(self, pattern: str, count: int = 1) -> List[Any]:
        """Wait for `count` matches in the log, and return them."""
        return list(until(lambda: len(re.findall(pattern, self.log())) >= count
                          and re.findall(pattern, self.log()), "%d of %s" % (count, pattern)))


def refused(sentence: str, octets: bytes, status: int = 400) -> Row:
    """Return the row of a head (without the empty line) that ends the connection."""
    return sentence, octets + b"\r\n", [status], True


G, P = b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\n"
SYNTAX = [refused("two blanks before the target", b"GET  / HTTP/1.1\r\nHost: a\r\n"),
    refused("a blank after the version", b"GET / HTTP/1.1 \r\nHost: a\r\n"),
    refused("a no-break space", b"GET /\xa0 HTTP/1.1\r\nHost: a\r\n"),
    refused("NUL in the target", b"GET /\x00 HTTP/1.1\r\nHost: a\r\n"),
    refused("a control character in the method", b"G\x01T / HTTP/1.1\r\nHost: a\r\n"),
    refused("no Host", b"GET / HTTP/1.1\r\n"), refused("HTTP/0.9", b"GET /\r\n"),
    refused("a target without a slash", b"GET a HTTP/1.1\r\nHost: a\r\n"),
    refused("GET *", b"GET * HTTP/1.1\r\nHost: a\r\n"),
    refused("an URL without a host", b"GET http:// HTTP/1.1\r\nHost: a\r\n"),
    refused("an URL with a user", b"GET http://u@h/ HTTP/1.1\r\nHost: a\r\n"),
    refused("a fragment", b"GET /#x HTTP/1.1\r\nHost: a\r\n"),
    refused("http in small letters", b"GET / http/1.1\r\nHost: a\r\n"),
    refused("a Host with a blank", b"GET / HTTP/1.1\r\nHost: a b\r\n"),
    refused("two Hosts", G + b"Host: a\r\n"), refused("a blank before the colon", G + b"X : a\r\n"),
    refused("no colon", G + b"no colon\r\n"), refused("no name", G + b": a\r\n"),
    refused("a line that begins with a blank", G + b" folded\r\n"),
    refused("a folded line", G + b"X: a\r\n folded\r\n"), refused("a bare CR", G + b"X: a\rb\r\n"),
    refused("NUL in a field", G + b"X: a\x00b\r\n"), refused("a bare LF", G + b"X: a\nY: b\r\n"),
    refused("DEL in a name", G + b"X\x7f: a\r\n"),
    refused("two lengths", P + b"Content-Length: 1\r\nContent-Length: 1\r\n"),
    refused("a list of lengths", P + b"Content-Length: 1, 1\r\n"),
    refused("a signed length", P + b"Content-Length: +1\r\n"),
    refused("a negative length", P + b"Content-Length: -1\r\n"),
    refused("no length after all", P + b"Content-Length:\r\n"),
    refused("a hexadecimal length", P + b"Content-Length: 0x1\r\n"),
    refused("an underscore in a length", P + b"Content-Length: 1_0\r\n"),
    refused("a superscript length", P + b"Content-Length: \xb9\r\n"),
    refused("length and chunks", P + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n"),
    refused("identity", P + b"Transfer-Encoding: identity\r\n"),
    refused("an empty coding", P + b"Transfer-Encoding:\r\n"),
    refused("chunked before the last", P + b"Transfer-Encoding: chunked, gzip\r\n"),
    refused("chunked twice", P + b"Transfer-Encoding: chunked\r\n" * 2),
    refused("an unknown coding", P + b"Transfer-Encoding: xchunked\r\n"),
    refused("chunks in 1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n"),
    refused("a POST of 1.0 without a length", b"POST / HTTP/1.0\r\n", 411),
    refused("a length beyond all bounds", P + b"Content-Length: 9999999999999999\r\n", 413),
    refused("a long target", b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n", 414),
    refused("an expectation of tea", G + b"Expect: tea\r\n", 417),
    refused("a long field", G + b"X: " + b"a" * 40000 + b"\r\n", 431),
    refused("200 fields", G + b"X: a\r\n" * 200, 431),
    refused("gzip", P + b"Transfer-Encoding: gzip, chunked\r\n", 501),
    refused("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n", 505),
    refused("the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n", 505),
    ("an empty line before a request", b"\r\n" + head(), [200], False),
    ("a HEAD of what is not there", head("/none", "HEAD"), [404], False),
    ("a path and a query", head("/example/foo?a=b"), [200], False),
    ("two slashes", head("//example/foo"), [200], False),
    ("a whole URL", head("http://test/example/foo"), [200], False),
    ("a whole URL in capitals", head("HTTP://x:80/example/foo"), [200], False),
    ("an URL without a path", head("http://test"), [200], False),
    ("an URL without a path, with a query", head("http://test?x"), [200], False),
    ("OPTIONS *", head("*", "OPTIONS"), [204], False), ("CONNECT", head("x:80", "CONNECT"), [405], False),
    ("1.1 told to close", head("/", "GET", JIM, CLOSE), [200], True),
    ("1.1 told to close, among other things", head("/", "GET", JIM, "Connection: x, Close"), [200], True),
    ("1.0", b"GET / HTTP/1.0\r\n\r\n", [401], True),
    ("1.0 that keeps alive", b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", [401], False),
    ("1.0 of two minds", b"GET / HTTP/1.0\r\nConnection: keep-alive, close\r\n\r\n", [401], True)]
SMUGGLED = b"GET /example/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
LENGTH, CHUNKED = "Content-Length: %d" % len(SMUGGLED), "Transfer-Encoding: chunked"
CHUNKS = b"3;ext=1\r\nabc\r\n1\r\nd\r\n0\r\nTrailer: x\r\n\r\n"
BODIES = [("a small body of a refused request", head("/", "POST", "", LENGTH) + SMUGGLED, [401], False),
    ("a body that the method has not", head("/", "POST", JIM, LENGTH) + SMUGGLED, [405], False),
    ("chunks of a refused request", head("/", "POST", "", CHUNKED) + SMUGGLED, [401], True),
    ("a large body of a refused request", head("/", "POST", "", "Content-Length: 100000") + SMUGGLED, [401], True),
    ("who waits for 100 Continue and is refused", head(
        "/", "PUT", "", "Content-Length: 9", "Expect: 100-continue"), [401], True),
    ("a GET with a body", head("/", "GET", JIM, "Content-Length: 4") + b"abcd", [200], False),
    ("a GET with chunks", head("/", "GET", JIM, CHUNKED) + CHUNKS, [200], True),
    ("a GET with 64 KiB", head("/", "GET", JIM, "Content-Length: 65536") + b"a" * 65536, [200], False)]


class HttpSyntax(HttpTest):
    """A request is read by the letter of the RFC, or refused"""
    settings = "authserver.MAX_MEMOS = 8"

    def test_what_is_read_and_what_is_refused(self) -> None:
        """Each is answered as the RFC says; after what two programs could read differently, nothing is."""
        self.check(SYNTAX)

    def test_a_body_is_never_taken_for_a_request(self) -> None:
        """Skipped where its end is near and known, else the connection ends with the refusal."""
        self.check(BODIES)

    def test_where_a_chunked_body_ends(self) -> None:
        """At the empty line after its trailer; each fault alone is refused, as is what is too long, also before its end."""
        line = b"x" * authserver.MAX_LINE
        for octets, want in ((b"", b""), (b"0\r\n\r\n", b""), (b"a\r\n0123456789\r\n00 \t;x\r\nX: y\r\n\r\n", b"0123456789"),
                (b"F;x=\"y\"\r\n" + b"z" * 15 + b"\r\n0\r\n", b"z" * 15), (b"1;" + line[3:] + b"\r\na", b"a"),
                (b"1;" + line[1:] + b"\r\n", 400), (b"1;" + line[:-2], b""), (b"1;" + line, 400), (line + b"x", 400),
                (b"1\r\nab\r\n", 400), (b"1\r\n" + b"ab" + line, 400), (b"1\r\na\r\n\r\n", 400), (b"\r\n", 400), (b" 1\r\n", 400), (b"-1\r\n", 400),
                (b"+1\r\n", 400), (b"0x1\r\n", 400), (b"1_0\r\n", 400), (b"1 x\r\n", 400), (b"1\x00\r\n", 400), (b"1;\x00\r\n", 400),
                (b"g\r\n", 400), (b"0000000000000001\r\n", 400), (b"%x\r\n" % authserver.MAX_BODY, b""),
                (b"%x\r\n" % (authserver.MAX_BODY + 1), 413), (b"0\r\nX\r\n", 400), (b"0\r\nX : y\r\n", 400),
                (b"0\r\n" + b"X: y\r\n" * (authserver.MAX_HEAD // 6), b""), (b"0\r\n" + b"X: y\r\n" * (authserver.MAX_HEAD // 6 + 1), 400)):
            size = 1 + len(octets) // 99
            for pieces in ([octets], [octets[i:i + size] for i in range(0, len(octets), size)]):
                with self.subTest(octets[:40], pieces=len(pieces)):
                    body = authserver.Body(0, True)
                    try:
                        self.assertEqual((b"".join(map(body.feed, pieces)), body.take_rest() and b"", body.done),
                                         (want, b"", octets.endswith(b"\r\n\r\n")))
                    except authserver.BadRequest as error:
                        self.assertEqual(error.status, want)
        body = authserver.Body(0, True)
        for _ in range(2):
            body.feed(b"%x\r\n" % (authserver.MAX_BODY // 2))
            body.left = 0           # as if that had come
            body.feed(b"\r\n")
        with self.assertRaises(authserver.BadRequest):
            body.feed(b"1\r\n")
        self.assertEqual((authserver.Body(-1, False).done, authserver.Body(0, False).done, authserver.Body(1, False).done), (True, True, False))

    def test_methods_that_the_resource_has_not(self) -> None:
        """405 with Allow for a known method, 501 for an unknown one; strangers learn neither."""
        for method, status in (("POST", 405), ("DELETE", 405), ("TRACE", 405), ("BREW", 501)):
            with self.subTest(method), Wire(self.at) as wire:
                answer = wire.ask("/", method, JIM, EMPTY)
                self.assertEqual((answer.status, answer.field("Allow")), (status, "GET, HEAD, OPTIONS"))
                self.assertEqual(wire.ask("/", method, "").status, 401)

    def test_what_is_sent_first(self) -> None:
        """No byte of a file before the whole head; a file that was cut, or a client that has left, ends the connection."""
        for sent, took, called in ((2, 0, ["send", "wait_to_write"]), (3, 0, ["send", "send_part", "wait_to_write"]),
                (3, 4, ["send", "send_part", "wait_to_write"]), (3, 5, ["send", "send_part"]),
                (3, EOFError(), ["send", "send_part", "close"]), (3, ConnectionResetError(), ["send", "send_part", "close"]),
                (BrokenPipeError(), 0, ["send", "close"])):
            file = mock.Mock()
            channel = mock.Mock(output=b"abc", part=authserver.FilePart(file, 7, 5), closing=False, writes=False)
            channel.send.side_effect, channel.send_part.side_effect = [sent], [took]
            authserver.Channel.flush(channel)
            self.assertEqual([call[0] for call in channel.method_calls], called)
            self.assertEqual(file.close.called, took == 5)
            if took == 4:
                self.assertEqual((channel.part[1:], channel.wait_to_write.call_args[0]), ((11, 1), (7,)))

    def test_how_long_a_client_is_waited_for(self) -> None:
        """The deadline moves by what was taken, no further than a whole one; who may still be sending is heard to its end."""
        pace = authserver.PACE_SECONDS / authserver.IN_MEMORY
        for writes, sent, deadline in ((True, 0, 100.0), (True, 1000, 100.0 + 1000 * pace),
                                       (True, 10 ** 9, 95.0 + authserver.WAITS["write"]), (False, 0, 100.0)):
            channel = mock.Mock(writes=writes, deadline=100.0, server=mock.Mock(clock=95.0))
            authserver.Channel.wait_to_write(channel, sent)
            self.assertEqual(channel.deadline, deadline)
            self.assertEqual([call[0] for call in channel.method_calls], [] if writes else ["watch", "wait"])
        for stage, lingers, buffer, error, called in (
                ("linger", True, b"x", None, []), ("write", False, b"", None, ["close"]), ("write", True, b"", None, ["shut", "watch", "wait"]),
                ("write", False, b"x", None, ["shut", "watch", "wait"]), ("write", True, b"", OSError, ["shut", "close"])):
            channel = mock.Mock(stage=stage, lingers=lingers, buffer=buffer)
            channel.shut.side_effect = error
            authserver.Channel.hang_up(channel)
            self.assertEqual([call[0] for call in channel.method_calls], called)
            self.assertEqual(channel.buffer, buffer if stage == "linger" or error else b"")
        for stage, draining in (("idle", False), ("idle", True), ("first", False), ("first", True), ("head", True), ("write", True)):
            channel = mock.Mock(server=mock.Mock(clock=95.0, draining=draining))
            authserver.Channel.wait(channel, stage)
            soon = draining and stage in ("idle", "first")
            self.assertEqual((channel.stage, channel.deadline), (
                stage, 95.0 + (authserver.DRAIN_SECONDS if soon else authserver.WAITS[stage])))

    def test_a_lock_out_is_of_the_address_that_connected(self) -> None:
        """Or, where that is a trusted proxy, of the one that it names; nobody else shares it, with the same head neither."""
        with socket.socket() as sock:
            listener = authserver.Listener(sock, ("basic",), logs=False)
            with AuthServer(("127.0.0.1", 0), authserver.example, authenticator=make(max_failures=(2, 60.0)),
                            listeners=[listener]) as server:
                server.proxies = authserver.TrustedProxies(["192.0.2.9"])
                for peer, forwarded, auth, want in (
                        ("192.0.2.1", "", WRONG, 401), ("192.0.2.1", "", WRONG, 401), ("192.0.2.1", "", WRONG, 429),
                        ("192.0.2.2", "", WRONG, 401), ("192.0.2.2", "", JIM, 200), ("192.0.2.1", "", JIM, 429),
                        ("192.0.2.9", "192.0.2.1", JIM, 429), ("192.0.2.9", "192.0.2.3", JIM, 200), ("192.0.2.9", "", JIM, 200),
                        ("192.0.2.3", "192.0.2.1", JIM, 200), ("192.0.2.1", "192.0.2.3", JIM, 429), ("127.0.0.1", "", WRONG, 401),
                        ("127.0.0.1", "", WRONG, 401), ("127.0.0.1", "", JIM, 200)):
                    connection = authserver.Connection(server, listener, None, (peer, 4711))
                    octets = head("/", "GET", auth, *["X-Forwarded-For: " + forwarded] * bool(forwarded))
                    self.assertEqual(list(connection.answer(octets)), [])
                    self.assertEqual((statuses(connection.output), connection.host), ([want], peer), (peer, forwarded))

    def test_nothing_that_a_client_says_ends_a_quotation_in_the_log(self) -> None:
        """Neither target, Referer and User-Agent, nor what a proxy says that its client asked for."""
        with socket.socket() as sock:
            listener = authserver.Listener(sock, ("basic",))
            with AuthServer(("127.0.0.1", 0), authserver.example, authenticator=make(), listeners=[listener]) as server:
                server.proxies, server.forward_auth = authserver.TrustedProxies(["192.0.2.9"]), "/auth"
                for path, fields, said in (
                        ("/a\\", ['Referer: "\xe9', "User-Agent: \\\x80\t"], ('"GET /a\\x5c HTTP/1.1" 404', '"\\x22\\xe9" "\\x5c\\x80"')),
                        ("/auth", ["X-Original-Method: GET", 'X-Original-URI: /b"\xe9'], ('"GET /b\\x22\\xe9 HTTP/1.1" 200', '"-" "-"'))):
                    connection = authserver.Connection(server, listener, None, ("192.0.2.9", 4711))
                    self.assertEqual(list(connection.answer(head(path, "GET", JIM, *fields))), [])
                    line = server.log.waiting[1].pop()
                    self.assertRegex(line, r"\A192.0.2.9 - jim \[[^]]+\] %s \d+ %s\n\Z" % tuple(map(re.escape, said)))

    def test_what_was_read_of_a_signed_body_is_that_body(self) -> None:
        """As it came, for the handler to read again: with its chunks, without the next request."""
        for octets, length in ((b"1\r\na\r\n0\r\n\r\n", 0), (b"a", 1)):
            body = authserver.Body(length, not length)
            connection = mock.Mock(buffer=octets + SMUGGLED, output=b"")
            connection.take_buffer.side_effect = [connection.buffer]
            fields = authserver.NO_FIELDS._replace(length=length or -1, chunked=not length, expects=True)
            with self.assertRaises(StopIteration) as caught:
                next(authserver.Connection.read_body(connection, fields, body))
            self.assertEqual((caught.exception.value, body.taken, body.take_rest(), body.is_read, connection.output),
                             (b"a", octets, SMUGGLED, True, b""))

    def test_nothing_is_kept_of_who_has_been_refused(self) -> None:
        """It is read, so that it can read the answer; what it sends is dropped, and not our memory filled."""
        for closing, kept in ((True, b""), (False, b"ab")):
            connection = mock.Mock(writes=False, closing=closing, buffer=b"", server=mock.Mock(later={}))
            connection.receive.side_effect = [b"a", b"b", None, b""]
            for _ in range(4):
                authserver.Connection.ready(connection, 1)
            self.assertEqual((connection.buffer, connection.close.call_count), (kept, 1))

    def test_pipelined_requests_are_answered_in_order(self) -> None:
        """Requests that are sent together are answered one after the other, however many."""
        self.assertEqual(statuses(self.say(head() * 500)), [200] * 500)
        answer = self.say(head("/example/one") + b"\r\n" + head("/nothing") + head("/", "HEAD")
                          + head("/example/two", "GET", JIM, CLOSE) + head())
        self.assertEqual(statuses(answer), [200, 404, 200, 200])
        self.assertLess(answer.index(b"one"), answer.index(b"two"))

    def test_a_head_may_come_byte_by_byte(self) -> None:
        """However a head is cut into packets, it is the same head."""
        with Wire(self.at) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for octet in head()[:-1]:
                wire.sendall(bytes([octet]))
            self.assertEqual(wire.exchange(b"\n").status, 200)

    def test_head_has_the_fields_of_get_and_no_body(self) -> None:
        """HEAD is GET without the body, at 200, 401 and 404."""
        for path, auth in (("/", JIM), ("/", ""), ("/none", JIM)):
            with self.subTest(path, auth=auth), Wire(self.at) as wire:
                said = [wire.ask(path, method, auth, body=method == "GET") for method in ("GET", "HEAD", "GET")]
                fields = [[item for item in answer.fields if item[0] not in (
                    "date", "www-authenticate")] for answer in said]
                self.assertEqual(fields[0], fields[1])
                self.assertEqual([said[0].status] * 2, [answer.status for answer in said[1:]])

    def test_half_a_head_that_can_only_become_worse_is_refused(self) -> None:
        """431 or 414 before the end of an endless head, 400 for a line without CR: nobody waits."""
        for status, data in ((431, b"GET / HTTP/1.1\r\nX: " + b"a" * 40000),
                             (414, b"GET /" + b"a" * 9000), (400, b"GET / HTTP/1.1\nHost: a\r\n")):
            with self.subTest(status), Wire(self.at) as wire:
                wire.sendall(data)
                self.assertEqual(statuses(wire.hear()), [status])

    def test_a_client_that_still_sends_reads_the_refusal(self) -> None:
        """A client that sends 1 MiB to a 401 without looking reads the 401 afterwards."""
        data = head("/", "POST", "", "Content-Length: 1048576") + b"a" * 1048576
        self.assertEqual(statuses(talk(self.at, data)), [401])

    def test_a_remembered_head_is_no_free_pass(self) -> None:
        """A Digest head again, however often, or with another response, is 401 though it was right."""
        auth = digest(self.at, "/")
        forged = re.sub('response="[^"]*', 'response="%032d' % 0, auth)
        with Wire(self.at) as wire:
            said = [wire.ask("/", "GET", field).status for field in (auth, auth, auth, forged, auth)]
        self.assertEqual(said, [200, 401, 401, 401, 401])

    def test_a_client_that_counts_on_gets_in_each_time(self) -> None:
        """nc from 1 to 9 on one nonce, also out of order; each of them once."""
        client = Digest(request(self.at, "/", "GET", "").field("www-authenticate") or "", uri="/")
        fields = [client.field("%08x" % nc) for nc in (1, 2, 3, 4, 6, 5, 7, 8, 9)]
        with Wire(self.at) as wire:
            said = [wire.ask("/", "GET", field).status for field in fields + fields]
        self.assertEqual(said, [200] * 9 + [401] * 9)

    def test_a_remembered_head_has_the_host_of_its_sender(self) -> None:
        """The same head from two addresses: the log, and so a lock-out, has each with its own."""
        for _ in range(3):
            for source in ("127.0.0.1", "127.0.0.2"):
                with Wire(self.at, source=source) as wire:
                    self.assertEqual(wire.ask("/example/twins").status, 200)
        hosts = self.logged(r"(?m)^(\S+) - jim .*/example/twins", 6)
        self.assertEqual(hosts, ["127.0.0.1", "127.0.0.2"] * 3)

    def test_more_heads_than_are_remembered(self) -> None:
        """300 different heads, twice each, are all answered; no more than MAX_MEMOS are kept."""
        heads = [head("/", "GET", JIM, "X: %d" % number) for number in range(300)]
        self.assertEqual(statuses(self.say(b"".join(heads + heads + heads[:1]))), [200] * 601)
        reader = authserver.HeadReader()
        with mock.patch.object(authserver, "MAX_MEMOS", 8):
            for octets in heads + heads:
                reader.read(octets)
        self.assertLessEqual(max(len(kept) for kept in vars(reader).values() if isinstance(kept, dict)), 8)

    def test_a_head_is_read_as_if_it_were_the_first(self) -> None:
        """Whatever came before, and wherever credentials seem to stand: HeadReader reads as parse_head does."""
        for lines in ("AUTHORIZATION: %s\r\nContent-Length: 1%s", "Authorization: Digest a=%s\r\nReferer: %s", "Proxy-Authorization: Digest a=%s\r\nAuthorization: %s",
                      "X: uthorization: Digest %s\r\nUser-Agent: %s", "authorization: gest %s\r\nX: Authorization: %s",
                      'Connection: x uri="%s"\r\nAuthorization: %s', "authorization:%s \r\nAuthorization: %s",
                      "Authorization: %s\r\nConnection: %s"):
            reader = authserver.HeadReader()
            for pair in (("1", "2"), ("1", "2"), ("1", "3"), ("4", "2"), ("close", "5"), ("6", "7"), ("a,close", "8")):
                octets = b"GET / HTTP/1.1\r\nHost: a\r\n%s\r\n\r\n" % (lines % pair).encode()
                with self.subTest(octets):
                    self.assertEqual(*[(found.fields, found.line, [*found.authorization]) for found in (
                        reader.read(octets), authserver.parse_head(octets))])
        known = len(reader._known)
        reader.read(octets[:-2] + b"X: %s\r\n\r\n" % (b"a" * 5000))     # too long to be kept
        self.assertEqual(len(reader._known), known)

    def test_what_is_remembered_of_a_head(self) -> None:
        """From its third time a block of fields is not parsed; no credentials are kept; method and version count each time."""
        reader, parsed = authserver.HeadReader(), mock.Mock(side_effect=authserver.parse_head)
        with mock.patch.object(authserver, "parse_head", parsed):
            for number in range(5):
                found = reader.read(b"GET /%d HTTP/1.1\r\nHost: a\r\nAuthorization: Basic %d \t\r\n\r\n" % (number, number))
                self.assertEqual((found.path, [*found.authorization]), ("/%d" % number, ["Basic %d" % number]))
            for number in range(5):
                reader.read(b"GET /%s HTTP/1.0\r\n\r\n" % (b"long" * 50 * number))
        self.assertEqual(parsed.call_count, 4)
        self.assertNotIn(b"Basic", b"".join(reader._known))
        for method, minor, status in (("GET", 0, None), ("POST", 0, 411), ("PUT", 0, 411), ("PATCH", 0, 411), ("POST", 1, 400)):
            octets = b"%s / HTTP/1.%d\r\n\r\n" % (method.encode(), minor)
            for read in (reader.read, authserver.parse_head):
                said = None
                try:
                    read(octets)
                except authserver.BadRequest as error:
                    said = error.status
                self.assertEqual(said, status, octets)

    def test_what_a_head_means(self) -> None:
        """Path, length, chunks, and whether the connection stays; each bound is met exactly, one more is refused."""
        post, line = b"POST / HTTP/1.%d\r\n", b"GET /%s HTTP/1.1\r\n"
        long = authserver.MAX_LINE - len(line % b"") + 2
        filled = authserver.MAX_HEAD - len(G + b"X: \r\n\r\n")
        for octets, want in (
                (b"GET http://h?b HTTP/1.1\r\nHost: h\r\n", ("/?b", -1, False, True, False)),
                (b"GET http://h/?b HTTP/1.1\r\nHost: h\r\n", ("/?b", -1, False, True, False)),
                (b"GET http://h//a//b HTTP/1.1\r\nHost: h\r\n", ("/a//b", -1, False, True, False)),
                (b"GET http://h[/ HTTP/1.1\r\nHost: h\r\n", 400), (b"GET http://h:8o/ HTTP/1.1\r\nHost: h\r\n", 400),
                (b"GET / HTTP/1.0\r\nHost: a\r\nHost: a\r\n", 400), (b"GET / HTTP/1.0\r\n", ("/", -1, False, False, False)),
                (b"GET / HTTP/1.0\r\nConnection: x\r\n", ("/", -1, False, False, False)),
                (b"GET / HTTP/1.0\r\nConnection: x, Keep-Alive\r\n", ("/", -1, False, True, False)),
                (G + b"Connection: x\r\n", ("/", -1, False, True, False)),
                (post % 0 + b"Content-Length: 1\r\nExpect: 100-continue\r\n", ("/", 1, False, False, False)),
                (post % 0 + b"Content-Length: 0\r\n", ("/", 0, False, False, False)), (post % 0, 411),
                (P + b"Expect: 100-Continue\r\nTransfer-Encoding: Chunked\r\n", ("/", -1, True, True, True)),
                (P + b"Content-Length: 000000000000001\r\n", ("/", 1, False, True, False)),
                (P + b"Content-Length: 0000000000000001\r\n", 413),
                (G + b"X: y\r\n" * (authserver.MAX_FIELDS - 1), ("/", -1, False, True, False)),
                (G + b"X: y\r\n" * authserver.MAX_FIELDS, 431),
                (line % (b"x" * long) + b"Host: a\r\n", ("/" + "x" * long, -1, False, True, False)),
                (line % (b"x" * long + b"x") + b"Host: a\r\n", 414), (line % (b"x" * authserver.MAX_HEAD), 414),
                (G + b"X: " + b"y" * filled + b"\r\n", ("/", -1, False, True, False)),
                (G + b"X: y" + b"y" * filled + b"\r\n", 431)):
            with self.subTest(octets[:60]):
                try:
                    found = authserver.parse_head(octets + b"\r\n")
                    self.assertEqual((found.path,) + found.fields[1:5], want)
                    self.assertEqual(found.has_body(), found.fields.chunked or found.fields.length == 1)
                except authserver.BadRequest as error:
                    self.assertEqual(error.status, want)

    def test_a_field_that_looks_like_credentials_deceives_nobody(self) -> None:
        """A proof that was right once is 401 again, whatever nc stands in a field beside Authorization."""
        auth = "Authorization: " + digest(self.at, "/")
        said = []
        for number in (1, 1, 2):
            decoy = 'X-Authorization: Digest a=b, nc=%08x, response="0"' % number
            said.append(request(self.at, "/", "GET", "", decoy, auth).status)
        self.assertEqual(said, [200, 401, 401])


class Turns(unittest.TestCase):
    """What happens in one turn of the loop, and in which order"""

    def loop(self, page: Any = authserver.example, **settings: Any) -> Any:
        """Return a server without passwords whose turns the test makes."""
        for name, value in settings.items():
            patch = mock.patch.object(authserver, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        sock.listen(64)
        listener = authserver.Listener(sock, (), logs=False)
        server = AuthServer(sock.getsockname(), page, listeners=[listener])
        server.log.flush = server.log.waiting[2].clear      # type: ignore[method-assign]
        server.begin()
        self.addCleanup(server.server_close)
        self.addCleanup(server.close)
        return server

    def client(self, server: Any, data: bytes = b"") -> socket.socket:
        """Return a client that has sent something."""
        sock = socket.create_connection(server.socket.getsockname(), PATIENCE)
        self.addCleanup(sock.close)
        sock.sendall(data)
        return sock

    def test_who_asks_ahead_is_read_in_a_turn_of_its_own(self) -> None:
        """Of 20 that pipeline without end a turn answers one; who comes then is answered in the next."""
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
        """A program's verify_request raises for the third of three: the first two have their answers."""
        server = self.loop()
        with mock.patch.object(server, "verify_request", side_effect=[True, True, KeyError("no such country")]):
            clients = [self.client(server, head("/", auth="")) for _ in range(3)]
            for _ in range(3):
                server.turn(0)
        self.assertEqual([sock.recv(12) for sock in clients[:2]], [b"HTTP/1.1 200"] * 2)
        with contextlib.suppress(ConnectionResetError):     # what it asked for was not read
            self.assertEqual(clients[2].recv(12), b"")

    def test_an_answer_leaves_once(self) -> None:
        """SIGTERM comes between send(2) and the next line: what has left is not sent again at the end."""
        server, send = self.loop(), authserver.Channel.send
        client = self.client(server, head("/", auth=""))

        def send_and_die(connection: Any, octets: bytes) -> int:
            send(connection, octets)
            raise SystemExit
        with mock.patch.object(authserver.Channel, "send", send_and_die), self.assertRaises(SystemExit):
            for _ in range(100):
                server.turn(1)
        server.close()
        self.assertEqual(b"".join(iter(lambda: client.recv(65536), b"")).count(b"HTTP/1.1"), 1)

    def test_who_has_an_answer_coming_makes_room_for_nobody(self) -> None:
        """Its answer is ready and not sent, or its next request is in the buffer: it is not idle."""
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
            said = b"".join(iter(lambda: client.recv(65536), b""))
            self.assertEqual(statuses(said), [200] * requests)

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

    def test_a_place_is_free_before_anybody_hears_of_it(self) -> None:
        """Who is told that the only thread is done may lend it more at once."""
        pool, taken = authserver.Pool(1), []    # type: Any, List[bool]
        told = threading.Event()

        def tell() -> None:
            taken.append(pool.lend(lambda: lambda: None))
            told.set()
        pool.lend(lambda: tell)
        self.assertTrue(told.wait(PATIENCE))
        self.assertEqual(taken, [True])

    def test_the_overdue_are_looked_for_once_a_second(self) -> None:
        """However many quiet turns there are: with 10,000 connections it takes half a millisecond."""
        server, looks = self.loop(), []     # type: Any, List[int]

        class Idle:
            """A connection that notes when its deadline is looked at."""
            stage, output, part = "idle", b"", None

            @property
            def deadline(self) -> float:
                looks.append(1)
                return float("inf")
            close = staticmethod(lambda: None)
        server.connections.add(Idle())
        for _ in range(50):
            server.turn(0)
        self.assertIn(len(looks), (1, 2))


HANDLERS = r'''
gate = threading.Event()
class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        name = "get_" + self.path.partition("?")[0].strip("/")
        getattr(self, name, self.get_rest)()
    def get_raise(self): raise KeyError("on purpose")
    def get_exit(self): sys.exit(3)
    def get_none(self): pass
    def get_close(self): self.connection.close()
    def get_late(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\nx")
        raise KeyError("late")
    def get_short(self): self.answer(b"12345", 10)
    def get_long(self): self.answer(b"1234567890EXTRA", 10)
    def get_no204(self):
        self.send_response(204); self.end_headers(); self.wfile.write(b"deleted!")
    def get_endless(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"no length")
    def get_shut(self): gate.clear(); self.answer(b"")
    def get_open(self): gate.set(); self.answer(b"")
    def get_slow(self): self.answer(b"%r" % gate.wait(10))
    def get_big(self): self.answer(b"a" * 20000000)
    def get_limit(self):
        told, tell = os.pipe()
        if not os.fork():
            os.write(tell, b"%d" % resource.getrlimit(resource.RLIMIT_NOFILE)[0]); os._exit(0)
        self.answer(os.read(told, 99))
    def get_rest(self): self.answer(repr([self.command, self.path, self.client_address[0]]).encode())
    def do_HEAD(self): self.answer(b"body of a HEAD")
    def do_UNREAD(self): self.answer(b"unread")
    def do_LINE(self): self.rfile.readline(); self.answer(b"a line")
    def do_MUTE(self): pass
    def do_ROUND(self): self.connection.sendmsg([b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"])
    def get_more(self, chunk=b"0\r\n\r\n"):
        self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
        self.wfile.write(b"2\r\nok\r\n" + chunk + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    def get_worse(self): self.get_more(b"zz\r\n")
    def do_POST(self): self.answer(self.rfile.read(int(self.headers["Content-Length"])))
    def do_RAW(self): self.answer(self.rfile.read())
    def do_CHUNKS(self):
        body = b""
        while True:
            size = int(self.rfile.readline().split(b";")[0], 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size: return self.answer(body)
    def do_BEGIN(self):
        self.send_response(200); self.send_header("Content-Length", "3"); self.end_headers()
        self.wfile.write(b"y"); self.rfile.read(); self.wfile.write(b"es")
    def do_STREAM(self):
        self.send_response(200); self.send_header("Connection", "close"); self.end_headers()
        for line in self.rfile: self.wfile.write(line.upper())
    def do_HIDE(self):
        try: self.rfile.read()
        except OSError: pass
        gate.set()
    def answer(self, body, length=None):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
server = AuthServer(("127.0.0.1", 0), protect(Echo, passwords, qop=["auth", "auth-int"]))
'''
HANDLED = [("a body that the handler did not read", head("/", "UNREAD", JIM, LENGTH) + SMUGGLED, [200], False),
    ("an answer without a length", head("/endless"), [200], True),
    ("a handler that raises in the middle of its answer", head("/late"), [200], True),
    ("fewer bytes than announced", head("/short"), [200], True),
    ("more bytes than announced", head("/long"), [200], True),
    ("more after the last chunk", head("/more"), [200], True), ("a chunk without a size", head("/worse"), [200], True),
    ("a body of which the handler read a line", head("/", "LINE", JIM, "Content-Length: %d" % (len(SMUGGLED) + 3))
     + b"a\r\n" + SMUGGLED, [200], False), ("a body, and no answer", head("/", "MUTE", JIM, LENGTH) + SMUGGLED, [500], True),
    ("a body after a HEAD", head("/", "HEAD"), [200], True), ("a body after 204", head("/no204"), [204], True),
    ("no answer at all", head("/none"), [500], True),
    ("a handler that closes the connection", head("/close"), [], True),
    ("a body by length, and a request at once", head("/", "POST", JIM, "Content-Length: 3") + b"abc", [200], False),
    ("chunks, and a request at once", head("/", "CHUNKS", JIM, CHUNKED) + b"3\r\nabc\r\n0\r\n\r\n", [200], False)] + [
    ("a method that the handler has, without a password: " + method, head("/", method, "", EMPTY),
     [401], False) for method in ("GET", "POST", "UNREAD", "NONE")]
BROKEN_CHUNKS = (b"x\r\n", b"-1\r\na\r\n", b"0x1\r\na\r\n", b"1\r\nab\r\n", b" 1\r\na\r\n", b"1 \r\na\r\n0\r\n\r\n",
                 b"1 \n\r\na\r\n", b"1\r\naX\r\n", b"0\r\nno colon\r\n\r\n", b"1" * 20 + b"\r\n", b"1;" + b"x" * 9000)


class HttpHandlers(HttpTest):
    """Any BaseHTTPRequestHandler runs on AuthServer, and may wait"""
    settings = "resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"
    script = HANDLERS

    def ask(self, path: str, method: str = "GET", *fields: str, data: bytes = b"") -> Answer:
        """Send one request of jim's on a connection of its own."""
        return request(self.at, path, method, JIM, *fields, data=data)

    def test_one_answer_to_each_request(self) -> None:
        """Exactly one; what cannot be followed ends the connection, with nothing added."""
        for sentence, data, want, closes in HANDLED + [
                ("an answer past us, and a body", head("/", "ROUND", JIM, LENGTH) + SMUGGLED, [200], True)]:
            with self.subTest(sentence):
                said = statuses(self.say(data + head("/", "GET", JIM, CLOSE)))
                self.assertEqual(said, want + [200] * (not closes))
        for line in ("KeyError: 'late'", "sent less than it announced", "sent more than it announced"):
            self.logged(line)

    def test_a_handler_that_raises_is_logged_once(self) -> None:
        """One traceback for an exception; at most one answer, and no 200; the server lives."""
        for path in ("/raise", "/exit"):
            self.assertNotEqual(statuses(self.say(head(path) + head("/")))[:1], [200])
        self.assertEqual(self.ask("/fine").status, 200)
        self.logged("KeyError: 'on purpose'")
        self.assertEqual(self.log().count("KeyError: 'on purpose'"), 1)

    def test_broken_chunks_are_no_body(self) -> None:
        """A chunk without size, end or sense: one answer at most, and nothing after it is read."""
        for chunks in BROKEN_CHUNKS:
            for method, want in (("RAW", [[], [200], [400]]), ("CHUNKS", [[], [400], [500]]), ("UNREAD", [[200]])):
                with self.subTest(chunks[:20], method=method):
                    data = head("/", method, JIM, CHUNKED) + chunks + head("/")
                    self.assertIn(statuses(self.say(data)), want)
        self.assertNotIn("BadRequest", self.log())

    def test_an_answer_that_was_begun_has_no_second_head(self) -> None:
        """A handler that has begun to answer meets a malformed chunk: no second status line."""
        self.assertEqual(statuses(self.say(head("/", "BEGIN", JIM, CHUNKED) + b"x\r\n")), [200])

    def test_bodies_arrive_whole(self) -> None:
        """By length or in chunks, 0 to 3,000,000 bytes, and the next request after."""
        for size in (0, 1, 65536, 65537, 3000000):
            body = (bytes(range(256)) * (size // 256 + 1))[:size]
            pieces = [body[i:i + 50000] for i in range(0, size, 50000)] + [b""]
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            with self.subTest(size), Wire(self.at) as wire:
                length = "Content-Length: %d" % size
                self.assertEqual(wire.ask("/", "POST", JIM, length, data=body).body, body)
                self.assertEqual(wire.ask("/", "CHUNKS", JIM, CHUNKED, data=chunks).body, body)
                self.assertEqual(wire.ask("/").status, 200)

    def test_chunks_may_come_byte_by_byte(self) -> None:
        """However a chunked body is cut into packets, it is the same body."""
        with Wire(self.at) as wire:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.sendall(head("/", "CHUNKS", JIM, CHUNKED))
            for octet in b"3\r\nabc\r\n1;x\r\nd\r\n0\r\n\r":
                wire.sendall(bytes([octet]))
            self.assertEqual(wire.exchange(b"\n").body, b"abcd")

    def test_a_client_may_wait_for_100_continue(self) -> None:
        """It is asked for the body once; with auth-int, too, whose body is looked at first."""
        for auth in (JIM, digest(self.at, "/", "POST", body=b"hello")):
            with self.subTest(auth[:6]), Wire(self.at) as wire:
                wire.sendall(head("/", "POST", auth, "Content-Length: 5", "Expect: 100-continue"))
                self.assertEqual(wire.recv(4096), b"HTTP/1.1 100 Continue\r\n\r\n")
                self.assertEqual(wire.exchange(b"hello").body, b"hello")

    def test_auth_int_signs_the_body(self) -> None:
        """A body that was signed arrives; another is 401, one too large to look at 413."""
        for sent, signed, fields, want in ((b"hello", b"hello", ["Content-Length: 5"], 200), (b"", b"", [EMPTY], 200),
                (b"hellO", b"hello", ["Content-Length: 5"], 401),
                (b"%x\r\n" % 70000 + b"a" * 70000, b"", [CHUNKED], 413), (b"x\r\n", b"", [CHUNKED], 400),
                (b"1;%s\r\na\r\n" % (b"x" * 8000) * 20 + b"0\r\n\r\n", b"a" * 20, [CHUNKED], 413)):
            with self.subTest(fields[0], want=want):
                auth = digest(self.at, "/", "POST", body=signed)
                self.assertEqual(request(self.at, "/", "POST", auth, *fields, data=sent).status, want)

    def test_a_handler_streams_both_ways(self) -> None:
        """What is written is sent at once, what is sent can be read at once."""
        with Wire(self.at) as wire, wire.makefile("rb") as file:
            wire.sendall(head("/", "STREAM", JIM, "Content-Length: 8") + b"one\n")
            while file.readline() != b"\r\n":
                pass
            self.assertEqual(file.readline(), b"ONE\n")
            wire.sendall(b"two\n")
            self.assertEqual(file.read(), b"TWO\n")

    def test_slow_handlers_do_not_hold_up_others(self) -> None:
        """Ten handlers wait for what an eleventh request brings: that is answered, then they are."""
        self.ask("/shut")
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(self.at)) for _ in range(10)]
            for wire in wires:
                wire.sendall(head("/slow"))
            self.assertEqual(self.ask("/open").status, 200)
            self.assertEqual({wire.exchange(b"").body for wire in wires}, {b"True"})

    def test_a_large_answer_reaches_a_slow_reader(self) -> None:
        """20 MB to a client that starts late arrive whole."""
        with Wire(self.at) as wire:
            wire.sendall(head("/big"))
            self.assertEqual(self.ask("/x").status, 200)
            self.assertEqual(len(wire.exchange(b"").body), 20000000)

    def test_a_client_that_leaves_is_no_error(self) -> None:
        """A client that goes away in the middle of body or answer leaves no word of ours."""
        self.ask("/shut")
        before = self.log()
        for data in (head("/", "HIDE", JIM, "Content-Length: 100") + b"a", head("/big")):
            wire = Wire(self.at)
            wire.sendall(data)
            if b"big" in data:
                wire.recv(1000)
            wire.abort()
        self.assertEqual(self.ask("/slow").status, 200)
        self.assertNotIn("authserver.py", self.log()[len(before):])

    @unittest.skipIf(sys.version_info < (3, 7), "needs os.register_at_fork")
    def test_a_child_of_a_handler_has_the_old_limit_of_files(self) -> None:
        """The server may have more open files than what it was started with; what it starts may not."""
        self.assertEqual(self.ask("/limit").body, b"200")

    def test_the_log_has_every_answer(self) -> None:
        """One line in Combined format per answer, with the bytes of the body."""
        self.ask("/logged", "GET", 'Referer: a"b', "User-Agent: me\xff")
        line = self.logged(r".*\+.* \"GET /logged.*")[0]
        self.assertRegex(line, r'^127\.0\.0\.1 - jim \[\d\d/\w{3}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] '
                               r'"GET /logged HTTP/1\.1" 200 \d+ "a\\x22b" "me\\xff"$')

    def test_a_body_beyond_the_limits_is_refused(self) -> None:
        """More than MAX_BODY is 413, by length or in chunks."""
        length = "Content-Length: %d" % (authserver.MAX_BODY + 1)
        chunks = b"1\r\na\r\n%x\r\n" % authserver.MAX_BODY
        for field, data in ((length, b""), (CHUNKED, chunks)):
            with self.subTest(field):
                said = self.say(head("/", "CHUNKS", JIM, field) + data + head("/"))
                self.assertEqual(statuses(said), [413])
                self.assertIn(CLOSE.encode(), said)


class HttpPages(HttpTest):
    """A page is a function in the loop: request in; status, fields and body out"""
    settings = "authserver.MAX_CONNECTIONS = 16"
    script = r'''
with open("a file", "wb") as file: file.write(b"0123456789" * 2000000)
def page(request):
    if request.path == "/big": return authserver.Answer(200, [], b"a" * 20000000)
    if request.path == "/raise": raise KeyError("on purpose")
    if request.path == "/none": return None
    if request.path == "/304": return authserver.Answer(304, [("ETag", '"x"')], b"")
    if request.path[:5] == "/204/": return authserver.Answer(204, [], b"HTTP/1.1 200 OK\r\n\r\n")
    if request.path == "/204f": return authserver.Answer(204, [], authserver.FilePart(
        open(__file__, "rb", buffering=0), 0, os.path.getsize(__file__)))     # there is the beginning of an answer in it
    if request.path == "/299": return authserver.Answer(299, [], b"")
    if request.path.startswith("/file"):
        start, length = map(int, request.path[5:].split("-"))
        return authserver.Answer(200, [], authserver.FilePart(open("a file", "rb", buffering=0), start, length))
    said = [request.method, request.target, request.path, request.values.get("x-test"), request.username]
    return authserver.Answer(200, [("Content-Type", "text/plain")], repr(said).encode())
server = AuthServer(("127.0.0.1", 0), page, authenticator=Authenticator(passwords))
'''

    def test_gets_what_was_asked(self) -> None:
        """Method, target, path, fields and user; a HEAD as a GET, whose body is dropped."""
        answer = request(self.at, "//a%20b?c", "GET", JIM, "X-Test: 1", "X-test: 2")
        self.assertEqual(answer.body.decode(), repr(["GET", "//a%20b?c", "/a%20b?c", ["1", "2"], "jim"]))
        answer = request(self.at, "http://host/a", "GET")
        self.assertEqual(answer.body.decode(), repr(["GET", "http://host/a", "/a", None, "jim"]))
        self.assertEqual(request(self.at, "/a", "GET", "").status, 401)

    def test_one_answer_to_each_request(self) -> None:
        """A page that raises, or answers nothing, is 500; 304 has no body; others are served on."""
        self.check([("a page that raises", head("/raise"), [500], False),
                    ("a page that answers nothing", head("/none"), [500], False),
                    ("a status without a body", head("/304"), [304], False),
                    ("a body where none belongs", head("/204/"), [204], False),
                    ("a file where none belongs", head("/204f"), [204], False),
                    ("a status that nobody knows", head("/299"), [500], False),
                    ("HEAD of a large answer", head("/big", "HEAD"), [200], False),
                    ("HEAD of a file", head("/file0-20000000", "HEAD"), [200], False)])
        self.logged("KeyError: 'on purpose'")

    def test_a_part_of_a_file_is_sent(self) -> None:
        """Offset and length as asked, empty ones too; a file that ends early breaks off, not the framing."""
        for start, length in ((0, 20000000), (5, 10), (19999999, 1), (7, 0)):
            with self.subTest(start, length=length), Wire(self.at) as wire:
                body = wire.ask("/file%d-%d" % (start, length)).body
                self.assertEqual((len(body), body[:5]), (length, b"0123456789"[start % 10:][:5][:length]))
                self.assertEqual(wire.ask("/").status, 200)
        said = self.say(head("/file19999990-20") + head("/"))
        self.assertEqual(statuses(said), [200])

    def test_a_large_answer_is_sent_at_the_pace_of_its_reader(self) -> None:
        """20 MB leave the loop piece by piece: others are served meanwhile, the next request waits."""
        for path in ("/big", "/file0-20000000"):
            with self.subTest(path), Wire(self.at) as wire:
                wire.sendall(head(path) + head("/next"))
                self.assertEqual(request(self.at, "/").status, 200)
                self.assertEqual(len(wire.exchange(b"").body), 20000000)
                self.assertIn(b"/next", wire.exchange(b"").body)

    def test_a_client_that_leaves_a_large_answer_is_no_error(self) -> None:
        """A reset in the middle of an answer: no traceback, and others are served."""
        for path in ("/big", "/file0-20000000"):
            wire = Wire(self.at)
            wire.sendall(head(path))
            wire.recv(1000)
            wire.abort()
        self.assertEqual(request(self.at, "/").status, 200)
        self.assertNotIn("ConnectionResetError", self.log())

    def test_at_the_limit_of_connections_the_oldest_idle_one_goes(self) -> None:
        """With more than MAX_CONNECTIONS that say nothing a new one is served; the first is closed."""
        with contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(self.at)) for _ in range(40)]
            self.assertEqual(request(self.at, "/").status, 200)
            self.assertEqual(wires[0].recv(1), b"")


# -- 2.1 Thirty idioms, on the stock server and on ours ------------------------


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
        """Answer."""
        self.answer(b"ok")

    def answer(self, body: bytes, *fields: str) -> None:
        """Send an answer with a length."""
        self.send_response(200)
        for field in fields:
            self.send_header(*field.split(": "))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


IDIOMS = r'''
class AskedThings(Idiom):
    def do_GET(self): self.answer(repr([self.command, self.path, self.request_version, self.requestline,
        self.headers["X-Test"], self.client_address[0], self.address_string(), self.close_connection]).encode())
class NamesTheBase(Idiom):
    def end_headers(self): self.send_header("X-Own", "yes"); Simple.end_headers(self)
class FiltersFields(Idiom):
    def do_GET(self): self.answer(b"ok", "X-A: 1", "X-B: 2")
    def send_header(self, key, value):
        if key != "X-A": Base.send_header(self, key, value)
class SetsUp(Idiom):
    def setup(self): Base.setup(self); self.request.settimeout(60)
class SetsATimeoutFirst(Idiom):
    def setup(self): self.request.settimeout(60); super().setup()
class HasATimeout(Idiom):
    timeout = 60
class Flushes(Idiom):
    def do_GET(self): self.send_response(200); self.flush_headers(); self.wfile.write(b"Content-Length: 2\r\n\r\nok")
class KnowsTheBuffer(Idiom):
    def do_GET(self):
        self.send_response(200); self._headers_buffer.append(b"Content-Length: 2\r\n"); self.end_headers()
        self.wfile.write(b"ok")
class OnTheConnection(Idiom):
    def do_GET(self): self.connection.sendall(self.WHOLE)
class OnTheRequest(Idiom):
    def do_GET(self): self.request.send(self.WHOLE)
class MakesAFile(Idiom):
    def do_GET(self):
        with self.connection.makefile("wb") as file: file.write(self.WHOLE)
class Subprocess(Idiom):
    def do_GET(self): subprocess.call(["printf", self.WHOLE.decode()], stdout=self.wfile)
    ASKED = head()  # who else holds the connection nobody knows: it ends
class SendsAFile(Idiom):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "5"); self.end_headers()
        with open("five", "rb") as file: self.connection.sendfile(file)
class SendsAPart(Idiom):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "4"); self.end_headers()
        with open("five", "rb") as file: self.connection.sendfile(file, 1, 3); self.wfile.write(b"%d" % file.tell())
class WithTheConnection(Idiom):
    def do_GET(self):
        with self.connection as connection: connection.sendall(self.WHOLE)
    ASKED = head()
class AsksItsTimeout(Idiom):
    def do_GET(self): self.connection.settimeout(5); self.answer(repr(self.connection.gettimeout()).encode())
class CopiesAFile(Idiom):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "5"); self.end_headers()
        with open("five", "rb") as file: shutil.copyfileobj(file, self.wfile)
class OwnLoop(Idiom):
    def handle_one_request(self):
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline: self.close_connection = True
        elif self.parse_request(): self.answer(b"own " + self.command.encode())
class ByAttribute(Idiom):
    def __getattr__(self, name):
        if not name.startswith("do_"): raise AttributeError(name)
        return lambda: self.answer(name.encode())
    ASKED = head("/", "BREW", JIM) + head("/", "HEAD", JIM).replace(b"HEAD", b"TEA")
class InInit(Idiom):
    def __init__(self, *arguments): self.do_SET = lambda: self.answer(b"set"); super().__init__(*arguments)
    ASKED = head("/", "SET")
class LogsItself(Idiom):
    def log_request(self, code="-", size="-"): self.seen = code; Base.log_request(self, code, size)
    def do_GET(self): self.send_response(200); self.send_header("Content-Length", "3"); self.end_headers(); self.wfile.write(b"%d" % self.seen)
class ParsesItself(Idiom):
    def parse_request(self): self.before = self.raw_requestline; return Base.parse_request(self)
    def do_GET(self): self.answer(self.before)
class Errors(Idiom):
    def do_GET(self): self.send_error(404, "Gone fishing", "until <evening>")
class NoSuchMethod(Idiom):
    ASKED = head("/", "BREW")
class Redirects(Idiom):
    def do_GET(self): self.send_response(302, "Over there"); self.send_header("Location", "/x"); self.send_header("Content-Length", "0"); self.end_headers()
class ChunksOut(Idiom):
    def do_GET(self):
        self.send_response(200); self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
        for piece in (b"one", b"two", b""): self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
class ChunksIn(Idiom):
    def do_POST(self):
        body, size = b"", 1
        while size:
            size = int(self.rfile.readline(), 16); body += self.rfile.read(size); self.rfile.readline()
        self.answer(body)
    ASKED = (head("/", "POST", JIM, CHUNKED) + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n") * 2
class BodyIn(Idiom):
    def do_POST(self): self.answer(self.rfile.read(int(self.headers["Content-Length"])).upper())
    ASKED = (head("/", "POST", JIM, "Content-Length: 3") + b"abc") * 2 + head()
class BodyFromTheSocket(Idiom):
    rbufsize = 0
    def do_POST(self): select.select([self.connection], [], [], 9); self.answer(self.request.recv(3))
    ASKED = head("/", "POST", JIM, "Content-Length: 3") + b"abc"
class Interim(Idiom):
    def do_GET(self): self.send_response_only(103); self.send_header("Link", "</x>"); self.end_headers(); self.answer(b"ok")
class Expects(Idiom):
    def handle_expect_100(self): self.send_error(417); return False
    do_POST = Idiom.do_GET
    ASKED = head("/", "POST", JIM, "Expect: 100-continue", "Content-Length: 0")
class Upgrades(Idiom):
    def do_GET(self):
        self.send_response(101); self.send_header("Upgrade", "echo"); self.send_header("Connection", "Upgrade"); self.end_headers()
        self.wfile.write(self.rfile.read(5).upper()); self.close_connection = True
    ASKED = head("/", "GET", JIM, "Upgrade: echo", "Connection: Upgrade") + b"frame"
class NoLength(Idiom):
    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b"to the end"); self.close_connection = True
class Text(Idiom):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "3"); self.end_headers()
        text = io.TextIOWrapper(self.wfile, "utf-8", write_through=True); text.write("\xe4x"); text.detach()
class Odd(Idiom):
    def do_GET(self): self.send_response(299, "Quite Fine"); self.send_header("Content-Length", "0"); self.end_headers()
class Closes(Idiom):
    def do_GET(self): self.answer(b"ok", "Connection: close")
class Finishes(Idiom):
    def finish(self): self.wfile.flush(); Base.finish(self)
class Buffered(Idiom):
    wbufsize = -1
    def do_GET(self): self.answer(b"ok"); self.wfile.flush()
class Old(Idiom):
    protocol_version = "HTTP/1.0"
class Files(Simple):
    ASKED = head("/five") + head("/", "HEAD")
class Listing(Simple):
    ASKED = head("/")
class Missing(Simple):
    ASKED = head("/none")
class Pieces(Idiom):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "6"); self.end_headers()
        self.wfile.writelines([b"ab", b"cd"]); self.wfile.write(memoryview(b"ef"))
'''


class HttpIdioms(SharedBoxTest):
    """What handlers do on the stock server, they do on AuthServer, byte for byte"""

    def bytes_of(self, server: Any, asked: bytes) -> bytes:
        """Return what a server says, but what may differ."""
        with serving(server) as at:
            said = talk(at, asked, True)
        return re.sub(rb"(?im)^(date|server|connection): [^\r]*\r\n", b"", said)

    def test_the_same_bytes(self) -> None:
        """Two requests to each handler behind protect(): Date, Server and Connection apart, the same."""
        known = dict(globals())
        exec(IDIOMS, known)
        folder = self.box.make("folder")
        self.box.write("folder/five", "12345")
        handlers: Dict[str, Any] = {name: value for name, value in known.items() if name not in globals() and isinstance(value, type)}
        self.assertGreater(len(handlers), 30)
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(folder)
        for name, handler in handlers.items():
            with self.subTest(name):
                guarded = protect(handler, USERS)
                stock, ours = (self.bytes_of(kind(("127.0.0.1", 0), guarded), handler.ASKED)
                               for kind in (StockServer, AuthServer))
                self.assertNotIn(statuses(stock)[:1], ([], [401]))
                self.assertEqual(stock, ours)

    def test_a_handler_may_switch_protocols(self) -> None:
        """101 passes with its Connection field; from then on the connection is the handler's, to its end."""
        def answer(handler: Any) -> None:
            handler.send_response(101)
            handler.send_header("Connection", "keep-alive, Upgrade")
            handler.end_headers()
            for line in iter(handler.rfile.readline, b"bye\n"):
                handler.wfile.write(line.upper())
        with serving(AuthServer(("127.0.0.1", 0), protect(Idiom.made(answer), USERS))) as at, Wire(at) as wire:
            with wire.makefile("rb", 0) as file:
                wire.sendall(head("/", "GET", JIM, "Upgrade: echo", "Connection: Upgrade") + b"first\n")
                text = b"".join(iter(file.readline, b"\r\n"))
                self.assertIn(b"\r\nConnection: keep-alive, Upgrade\r\n", text)
                self.assertEqual(file.readline(), b"FIRST\n")
                wire.sendall(head("/not/a/request"))
                self.assertEqual(file.readline(), b"GET /NOT/A/REQUEST HTTP/1.1\r\n")
                wire.sendall(b"bye\n")
                self.assertEqual(len(file.read().split(b"\n")), 4)

    @unittest.skipIf(sys.version_info < (3, 7), "needs SimpleHTTPRequestHandler(directory=)")
    def test_a_handler_with_arguments(self) -> None:
        """protect(functools.partial(Handler, directory=...)) and partial(protect(Handler), ...)."""
        self.box.make("pub")
        self.box.write("pub/public", "12345")
        arguments: Dict[str, Any] = {"directory": self.box.path("pub")}
        for guarded in (protect(functools.partial(Simple, **arguments), USERS),
                        functools.partial(protect(Simple, USERS), **arguments)):
            for kind in (StockServer, AuthServer):  # type: Any
                said = self.bytes_of(kind(("127.0.0.1", 0), guarded), head("/public"))
                self.assertEqual((statuses(said), said[-5:]), ([200], b"12345"))


class HttpHooks(BoxTest):
    """A program's own AuthServer: what socketserver calls is called, or refused; nobody gets past"""

    def made(self, hook: str, function: Any, handler: Any = Idiom) -> Optional[Any]:
        """Return a server of a class with this hook of its own; None: refused, by name."""
        kind = type("Own", (AuthServer,), {hook: function})
        try:
            return kind(("127.0.0.1", 0), protect(handler, USERS))
        except (TypeError, Refusal) as error:
            self.assertIn(hook, str(error))
            return None

    def ask(self, server: Any, auth: str = JIM) -> List[int]:
        """Return the statuses of what a server answers."""
        with serving(server) as at:
            return statuses(talk(at, head("/a", "GET", auth, CLOSE), True))

    def test_verify_request_keeps_people_out(self) -> None:
        """False: no answer at all."""
        server = self.made("verify_request", lambda *_: False)
        self.assertEqual(self.ask(server) if server else [], [])

    def test_the_others_are_called(self) -> None:
        """finish_request, process_request, get_request, service_actions: each as on the stock server."""
        for hook in ("finish_request", "process_request", "get_request", "service_actions",
                     "shutdown_request", "close_request"):
            calls: List[str] = []

            def own(server: Any, *arguments: Any, hook: str = hook) -> Any:
                calls.append(hook)
                return getattr(AuthServer, hook)(server, *arguments)
            with self.subTest(hook):
                server = self.made(hook, own)
                if server:
                    self.assertEqual(self.ask(server), [200])
                    self.assertTrue(calls)

    def test_finish_request_chooses_the_handler(self) -> None:
        """The handler that finish_request makes answers, no other."""
        def answer(handler: Any) -> None:
            handler.send_response(299)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        other = protect(Idiom.made(answer), USERS)
        server = self.made("finish_request", lambda server, request, address: other(request, address, server))
        self.assertIn(self.ask(server) if server else [], ([299], []))

    def test_handle_error_hears_of_an_exception(self) -> None:
        """An exception of a handler arrives there, with its traceback at hand."""
        def answer(handler: Any) -> None:
            raise KeyError("on purpose")
        seen: List[Any] = []
        server = self.made("handle_error", lambda *_: seen.append(sys.exc_info()[0]), Idiom.made(answer))
        if server:
            self.ask(server)
            self.assertEqual(seen, [KeyError])

    def test_no_way_in_without_a_password(self) -> None:
        """handle_request(), a handler class set later: 401 or nothing, never a page."""
        for way in ("handle_request", "RequestHandlerClass"):
            authenticator = Authenticator(USERS)
            server = AuthServer(("127.0.0.1", 0), Idiom, authenticator=authenticator)
            with self.subTest(way), contextlib.redirect_stderr(io.StringIO()):
                if way == "handle_request":
                    def once() -> None:
                        with contextlib.suppress(Exception):  # refused: nobody is served
                            server.handle_request()
                        server.server_close()
                    thread = threading.Thread(target=once)
                    thread.start()
                    with contextlib.suppress(OSError):
                        said = talk("127.0.0.1:%d" % server.server_address[1], head("/", "GET", "", CLOSE), True)
                        self.assertIn(statuses(said), ([], [401]))
                    thread.join()
                else:
                    with contextlib.suppress(AttributeError, TypeError):
                        server.RequestHandlerClass = Idiom
                    self.assertEqual(self.ask(server, ""), [401])

    def test_a_handler_with_a_loop_of_its_own_gets_one_request(self) -> None:
        """It has read a line of the body, and asks for the next request: the rest of the body is none."""
        def answer(handler: Any) -> None:
            handler.rfile.readline()
            handler.send_response(200)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        kind = Idiom.made(answer)
        kind.handle = lambda handler: [handler.handle_one_request() for _ in range(2)]
        with serving(self.ours(kind)) as at:
            data = head("/", "GET", JIM, "Content-Length: %d" % (len(SMUGGLED) + 3)) + b"a\r\n" + SMUGGLED
            with mock.patch.object(kind, "parse_request", autospec=True, side_effect=kind.parse_request) as parsed:
                self.assertEqual(statuses(talk(at, data + head("/", "GET", "", CLOSE))), [200, 401])
        self.assertEqual(parsed.call_count, 1)

    def test_a_handler_knows_who_asks(self) -> None:
        """remote_user and auth_type: behind protect(), and where the server has the authenticator."""
        kind = Idiom.made(lambda handler: handler.answer(("%s %s" % (handler.remote_user, handler.auth_type)).encode()))
        for server in (AuthServer(("127.0.0.1", 0), protect(kind, USERS)), self.ours(kind)):
            with serving(server) as at:
                self.assertEqual(request(at, "/").body, b"jim Basic")

    def test_a_taken_port_is_an_OSError(self) -> None:
        """As on the stock server: EADDRINUSE."""
        with taken_port() as port, self.assertRaises(OSError) as caught:
            AuthServer(("127.0.0.1", port), protect(Idiom, USERS))
        self.assertEqual(caught.exception.errno, errno.EADDRINUSE)

    def test_a_network_is_offered_digest_alone(self) -> None:
        """On an address that a network reaches the right Basic password is 401, unless asked for."""
        for host, offer, want in (("127.0.0.1", {}, [200]), ("", {}, [401]),
                                  ("", {"schemes": ["digest", "basic"]}, [200])):
            with self.subTest(host, offer=offer):
                handler = protect(Idiom, USERS, **offer)
                self.assertEqual(self.ask(AuthServer((host, 0), handler)), want)

    def ours(self, handler: Any, **settings: Any) -> AuthServer:
        """Return a server with an authenticator of its own, closed after the test."""
        server = AuthServer(("127.0.0.1", 0), handler, authenticator=Authenticator(USERS, **settings))
        self.addCleanup(server.server_close)
        return server

    def drain(self, server: Any) -> None:
        """Have a server drain, and wait until its loop has heard of it; or until there is no loop."""
        heard = threading.Event()
        server.drain()
        server.call_soon(heard.set)
        until(lambda: heard.is_set() or server.stopped.is_set(), "that")

    def test_drain_ends_whatever_became_of_a_connection(self) -> None:
        """A handler closed it, or its number; an answer, or the rest of a body, was under way: serve_forever() ends."""
        def large(request: Any) -> Any:
            return authserver.Answer(200, (), b"a" * 20000000)
        for handler, data, rest in (
                (Idiom.made(lambda handler: handler.connection.close()), head(), b""),
                (Idiom.made(lambda handler: os.close(handler.connection.fileno())), head(), b""),
                (Idiom.made(lambda handler: os.close(handler.connection.detach())), head(), b""),
                (large, head(), b""), (large, head("/", "POST", JIM, "Content-Length: 4"), b"late")):
            server = self.ours(handler)
            with self.subTest(data, rest=rest), serving(server) as at, Wire(at) as wire:
                wire.sendall(data)
                select.select([wire], [], [], PATIENCE)
                self.drain(server)
                wire.sendall(rest)
                wire.hear()
                self.assertTrue(server.stopped.wait(SOON))

    def test_no_field_of_a_page_splits_its_answer(self) -> None:
        """A line feed, or another control character, in a name or a value: 500, and the log has it."""
        fields: List[Tuple[str, str]] = []
        server = self.ours(lambda _: authserver.Answer(200, tuple(fields), b"page"))
        with mock.patch.object(authserver.Log, "error") as said, serving(server) as at:
            for name, value, status in (("X", "a\r\nSet-Cookie: b=c", 500), ("X", "a\r\n\r\n<p>", 500), ("X", "a\nb", 500),
                                        ("X", "a\rb", 500), ("X", "a\0b", 500), ("X", "a\x7fb", 500), ("X\r\nY", "a", 500),
                                        ("X: a\nY", "b", 500), ("X", "a\tb \xe4", 200), ("X", "", 200)):
                with self.subTest(name, value=value):
                    fields[:], before = [("A", "b"), (name, value)], said.call_count
                    answer = talk(at, head("/", "GET", JIM, CLOSE), True)
                    self.assertEqual((statuses(answer), b"Set-Cookie" in answer), ([status], False))
                    lines = [call[0][0] for call in said.call_args_list[before:] if call[0][0].startswith("error")]
                    self.assertEqual(["GET / HTTP/1.1" in text for text in lines], [True] * (status == 500))

    def test_whom_a_reload_has_deleted_gets_no_last_answer(self) -> None:
        """A worker that drains has the new passwords: on a kept connection, too, 401."""
        server = self.ours(lambda _: authserver.Answer(200, ()))
        server.reread = lambda: setattr(server.authenticator, "passwords", Passwords({"ann": "other"}, realm="files"))
        with mock.patch.object(authserver, "DRAIN_SECONDS", PATIENCE), serving(server) as at, Wire(at) as jim:
            self.assertEqual(jim.ask("/").status, 200)
            self.drain(server)
            self.assertEqual(jim.ask("/").status, 401)

    def test_an_idle_server_does_what_the_stock_one_does(self) -> None:
        """handle_request() times out, however often, and then it serves; service_actions() is called with nobody there."""
        acted, called = threading.Event(), threading.Event()
        hooks = {"handle_timeout": lambda _: called.set(), "service_actions": lambda _: acted.set()}
        server = type("Own", (AuthServer,), hooks)(("127.0.0.1", 0), protect(Idiom, USERS))
        authserver.raise_file_limit.cache_clear()
        with mock.patch.object(os, "register_at_fork", create=True) as forks:
            for server.timeout in (1.01, 0, 0):
                called.clear()
                thread = threading.Thread(target=server.handle_request, daemon=True)
                thread.start()
                self.assertTrue(called.wait(SOON))
                thread.join()
        self.assertLessEqual(forks.call_count, 1)
        acted.clear()
        with serving(server) as at:
            self.assertTrue(acted.wait(SOON))
            self.assertEqual([request(at, "/").status for _ in range(3)], [200] * 3)

    def test_nobody_goes_round_the_loop(self) -> None:
        """What other loops call on a server of socketserver serves nobody who has not been asked."""
        server = self.ours(Idiom)
        for way in ("finish_request", "process_request", "_handle_request_noblock"):
            with self.subTest(way), Wire("127.0.0.1:%d" % server.server_address[1]) as wire:
                wire.sendall(head("/", "GET", "", CLOSE))
                with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
                    with contextlib.closing(server.socket.accept()[0] if way[0] != "_" else wire) as sock:
                        getattr(server, way)(*[sock, ("192.0.2.1", 1)] * (way[0] != "_"))
                self.assertEqual(b"" if wire.fileno() < 0 else wire.hear(), b"")

    def test_a_thread_that_could_not_be_started_is_not_waited_for(self) -> None:
        """With one busy thread and no second one: refused at once; and once there may be one, served."""
        pool, busy, done = authserver.Pool(5), threading.Event(), threading.Event()
        wait: Any = lambda: busy.wait() and (lambda: None)
        self.addCleanup(busy.set)
        self.assertTrue(pool.lend(wait))
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            self.assertFalse(pool.lend(wait))
        self.assertTrue(pool.lend(lambda: done.set) and done.wait(SOON))

    def test_an_heir_says_where_it_listens(self) -> None:
        """Also with a table in which others have counted."""
        table = authserver.SharedTable()
        table.add("workers")
        with mock.patch.object(authserver.Log, "error") as said, serving(self.ours(Idiom, table=table)) as at:
            self.assertEqual(request(at).status, 200)
        self.assertEqual(str(said.call_args_list).count("listening on"), 1)

    def test_large_answers_of_handlers(self) -> None:
        """A file goes in pieces; chunks never end; who has kept the connection writes no more to it."""
        file, kept = mock.Mock(wraps=io.BytesIO(b"a" * 1000000)), []

        def answer(handler: Any) -> None:
            kept.append(handler.connection)
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            for piece in [b"a" * 900] * 10 + [b""]:
                handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))

        def send(handler: Any) -> None:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            handler.connection.sendfile(file)
        with mock.patch.object(authserver, "MAX_BODY", 5000), serving(self.ours(Idiom.made(answer))) as at:
            self.assertEqual(talk(at, head() + head("/", "GET", JIM, CLOSE)).count(b"a" * 900), 20)
        with self.assertRaises(BrokenPipeError):
            kept[0].sendall(b"late")
        with serving(self.ours(Idiom.made(send))) as at:
            self.assertEqual(len(request(at).body), 1000000)
        self.assertTrue(all(0 < call[0][0] < 200000 for call in file.read.call_args_list))

    def test_nothing_of_a_request_is_left(self) -> None:
        """Without the garbage collector: no Request, with its password, outlives its answer."""
        with serving(self.ours(lambda _: authserver.Answer(200, ()))) as at, Wire(at) as wire:
            self.addCleanup(gc.enable)
            gc.collect()
            gc.disable()
            for _ in range(20):
                self.assertEqual(wire.ask("/", "GET", JIM, "Content-Length: 3", data=b"abc").status, 200)
            self.assertLess(sum(isinstance(item, authserver.Request) for item in gc.get_objects()), 5)

    def test_who_is_not_trusted_fills_no_memory(self) -> None:
        """X-Forwarded-For of a stranger is not looked at, and of a proxy no more than its end."""
        for trusted, count in (("192.0.2.1", 0), ("127.0.0.1", 1)):
            server = self.ours(Idiom)
            server.proxies = authserver.TrustedProxies([trusted])
            with mock.patch.object(server.proxies, "find_client", wraps=server.proxies.find_client) as asked, \
                    serving(server) as at:
                request(at, "/", "GET", JIM, "X-Forwarded-For: %s, 192.0.2.7" % ("x" * 9000))
            said = [call[0][1] for call in asked.call_args_list if len(call[0]) > 1]
            self.assertEqual([len(text) < 2000 for text in said], [True] * count)

    def test_who_is_held_accepts_nobody_until_released(self) -> None:
        """After hold() a client waits in the queue of the kernel, and is served after release()."""
        server = AuthServer(("127.0.0.1", 0), protect(Idiom, USERS))
        server.hold()
        with serving(server) as at, Wire(at) as wire:
            wire.sendall(head("/x"))
            self.assertEqual(select.select([wire], [], [], 0.3)[0], [])
            server.release()
            self.assertEqual(wire.exchange(b"").status, 200)

    @needs_crypt
    def test_slow_hashes_are_bounded_and_keep_nobody_waiting(self) -> None:
        """Two are made at a time, two more wait, the next is told 503 at once."""
        path = self.box.write("hashed", "jim:%s\n" % crypted("secret", "$6$rounds=1000$saltsalt$"), 0o600)
        authenticator = Authenticator(Passwords.read(path, "files"), schemes=["basic"])
        with mock.patch.object(authserver, "SLOW_QUEUE", 2):
            server = AuthServer(("127.0.0.1", 0), Idiom, authenticator=authenticator)
        go, function = threading.Event(), authserver.load_crypt()[0]

        def slow(phrase: bytes, setting: bytes) -> Any:
            go.wait(PATIENCE)
            return function(phrase, setting)
        with mock.patch.object(authserver, "load_crypt", lambda: (slow, threading.Semaphore(2))), serving(server) as at, \
                contextlib.ExitStack() as stack:
            wires = [stack.enter_context(Wire(at)) for _ in range(6)]
            for number, wire in enumerate(wires):
                wire.sendall(head("/x", "GET", basic("jim", "w%d" % number)))
            busy = until(lambda: len(select.select(wires, [], [], 0)[0]) > 1 and select.select(wires, [], [], 0)[0],
                         "two refusals")
            self.assertEqual([wire.exchange(b"").status for wire in busy], [503, 503])
            self.assertEqual(request(at, "/x", "GET", basic("ann", "wrong")).status, 503)
            self.assertEqual(server.status()["busy"], 3)
            go.set()
            self.assertEqual({wire.exchange(b"").status for wire in wires if wire not in busy}, {401})

    @needs_crypt
    def test_a_deleted_user_is_out_whatever_is_under_way(self) -> None:
        """New passwords while a slow hash of the old ones is computed: no later request gets in."""
        stored = crypted("secret", "$6$rounds=1000$saltsalt$")
        path = self.box.write("hashed", "jim:%s\nann:%s\n" % (stored, stored), 0o600)
        authenticator = Authenticator(Passwords.read(path, "files"), schemes=["basic"])
        server = AuthServer(("127.0.0.1", 0), Idiom, authenticator=authenticator)
        begun, go = threading.Event(), threading.Event()
        function, turns = authserver.load_crypt()

        def slow(phrase: bytes, setting: bytes) -> Any:
            begun.set()
            go.wait(PATIENCE)
            return function(phrase, setting)
        with mock.patch.object(authserver, "load_crypt", lambda: (slow, turns)), serving(server) as at:
            with Wire(at) as wire:
                wire.sendall(head("/x"))
                begun.wait(PATIENCE)
                authenticator.passwords = Passwords({"ann": "other"}, realm="files")
                go.set()
                wire.exchange(b"")
            self.assertEqual([request(at, "/x").status for _ in range(4)], [401] * 4)


def make_certificate(box: Box, name: str = "cert.pem", days: str = "2") -> str:
    """Return the path of a file with a new key and a certificate for localhost."""
    path = box.path(name)
    run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
         path, "-out", path + ".crt", "-days", days, "-subj", "/CN=localhost"], 0)
    box.write(name, read(path) + read(path + ".crt"), 0o600)
    return path


def trusting() -> ssl.SSLContext:
    """Return a client's TLS settings that ask for no name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)   # whom the default one trusts takes 20 ms to read
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class HttpStock(SharedBoxTest):
    """The same on AuthServer as under other servers"""
    addresses: Dict[str, str]
    HANDLER = 'Handler = protect(http.server.SimpleHTTPRequestHandler, passwords)\n'
    THREADS = 'type("S", (socketserver.ThreadingMixIn, http.server.HTTPServer), {"daemon_threads": True})'
    SERVERS = {"AuthServer": HANDLER + 'server = AuthServer(("127.0.0.1", 0), Handler)',
        "stock HTTPServer": HANDLER + 'server = http.server.HTTPServer(("127.0.0.1", 0), Handler)',
        "stock threads": HANDLER + 'Handler.protocol_version = "HTTP/1.1"\nserver = %s(("127.0.0.1", 0), Handler)' % (
            THREADS), "wsgiref": '''
import wsgiref.simple_server
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [(environ["REMOTE_USER"] + environ["AUTH_TYPE"] + " file").encode()]
server = wsgiref.simple_server.make_server("127.0.0.1", 0, protect_wsgi(app, passwords))'''}

    @classmethod
    def set_up(cls) -> None:
        cls.box.write("a file", "the file")
        cls.addresses = {name: cls.box.launch(PYTHON, cls.box.write(
            "on %s.py" % name, PRELUDE + script + LIBRARY_END)) for name, script in cls.SERVERS.items()}

    def test_passwords_are_asked_for_everywhere(self) -> None:
        """401 without, 200 with Basic or Digest, 401 with a wrong password, on each server."""
        for name, address in self.addresses.items():
            with self.subTest(name):
                for auth, status in (("", 401), (WRONG, 401), (JIM, 200), ("digest", 200)):
                    auth = digest(address, "/a%20file") if auth == "digest" else auth
                    answer = request(address, "/a%20file", "GET", auth, CLOSE)
                    self.assertEqual(answer.status, status)
                    self.assertEqual(b" file" in answer.body, status == 200)
                    asked = [value for name, value in answer.fields if name == "www-authenticate"]
                    self.assertEqual(len(asked), 2 * (status == 401))

    def test_a_refusal_says_nothing_of_the_request_before(self) -> None:
        """On one connection the proof for jim is not repeated to the next one, nor does a HEAD get a body."""
        at = self.addresses["stock threads"]
        auth = digest(at, "/a%20file")
        with Wire(at) as wire:
            granted = wire.ask("/a%20file", "GET", auth)
            refused = wire.ask("/", "HEAD", "", body=False)
            self.assertEqual((granted.status, refused.status, wire.ask("/a%20file").status), (200, 401, 200))
        self.assertIn("rspauth", granted.field("Authentication-Info") or "")
        self.assertIsNone(refused.field("Authentication-Info"))

    def test_a_lock_out_works_on_a_stock_server(self) -> None:
        """Ten wrong passwords from an address of the network: the right one is 429 then."""
        def get_request(server: Any) -> Any:
            return server.socket.accept()[0], ("192.0.2.1", 1)
        server = type("Far", (StockServer,), {"get_request": get_request})(("127.0.0.1", 0), protect(Idiom, USERS))
        with serving(server) as at:
            said = [request(at, "/", "GET", auth, CLOSE).status for auth in [WRONG] * 10 + [JIM]]
        self.assertEqual(said, [401] * 10 + [429])

    def test_nonsense_is_not_asked_for_a_password(self) -> None:
        """505 of http.server's own, without a challenge."""
        said = talk(self.addresses["stock threads"], b"GET / HTTP/9.9\r\n\r\n")
        self.assertIn(b"505", said)
        self.assertNotIn(b"WWW-Authenticate", said)

    def test_a_server_without_passwords_in_a_thread_of_a_program(self) -> None:
        """AuthServer serves an unprotected handler to everybody; shutdown() ends it from another thread."""
        server = AuthServer(("127.0.0.1", 0), Idiom)
        with serving(server) as at:
            self.assertEqual(request(at, "/", "GET", "").body, b"ok")
            self.assertIn("addresses", server.status())


# -- 2.2 protect() and protect_wsgi() under other people's servers --------------


class Echo(http.server.BaseHTTPRequestHandler):
    """Answers who asked, and how much was sent"""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        length = len(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
        text = ("%s %s %d" % (getattr(self, "remote_user", None), getattr(self, "auth_type", ""), length)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_GET


Old: Any = type("Old", (Echo,), {"protocol_version": "HTTP/1.0"})      # as http.server's default is


def echo(environ: Dict[str, Any], start: Any) -> List[bytes]:
    """Do as Echo does, as a WSGI application."""
    length = len(environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)))
    start("200 OK", [("Content-Type", "text/plain")])
    return [("%s %s %d" % (environ["REMOTE_USER"], environ["AUTH_TYPE"], length)).encode()]


class GuardTest(AuthTestCase):
    """What the subjects below share."""

    def serve(self, handler: Any, host: str = "127.0.0.1", server_class: Any = None) -> str:
        """Run a handler, or a WSGI application, in a thread; return its address."""
        if isinstance(handler, (type, functools.partial)):
            server: Any = (server_class or StockServer)((host, 0), handler)
        else:
            server = wsgiref.simple_server.make_server(host, 0, handler)
        self.errors: List[str] = []
        server.handle_error = lambda *_: self.errors.append("%s" % sys.exc_info()[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        for clean in (server.server_close, thread.join, server.shutdown):
            self.addCleanup(clean)
        return "127.0.0.1:%d" % server.server_address[1]

    def setUp(self) -> None:
        """Keep the logs out of the way."""
        self.said: List[str] = []
        for name, patch in (("logging.Logger.warning", lambda log, form, *words: self.said.append(form % words)),
                            ("http.server.BaseHTTPRequestHandler.log_message", lambda *_: None)):
            patcher = mock.patch(name, patch)
            patcher.start()
            self.addCleanup(patcher.stop)

    def hosts(self, **offer: Any) -> List[Tuple[str, str]]:
        """Return names and addresses of the three kinds of hosts."""
        return [(name, self.serve(handler)) for name, handler in (
            ("stock 1.1", protect(Echo, users(), **offer)), ("stock 1.0", protect(Old, users(), **offer)),
            ("wsgiref", protect_wsgi(echo, users(), **offer)))]


class Bodies(GuardTest):
    """A refused body is neither lost on the client nor the next request"""

    INNER = head("/inner", "GET", JIM, EMPTY)

    def test_a_length_is_read_strictly(self) -> None:
        """Whatever could be read in two ways is 400, once, without a traceback; so are lost fields."""
        for name, address in self.hosts()[:2]:
            for fields in (["Content-Length: \xb2"], ["Content-Length: +5"], ["Content-Length: 5 5"], [
                    "Content-Length: 5,5"], ["Content-Length: 5", "Content-Length: 5"], ["Content-Length: 0x5"], [
                    "Content-Length: 1_0"], ["Content-Length: -1"], ["Content-Length: "], [
                    "Content-Length: 5", "Transfer-Encoding: chunked"], ["no colon", "Content-Length: 5"], [
                    "Transfer-Encoding: chunked, identity"], ["Content-Length:\t5\x0b"], ["A: b\rContent-Length: 5"]):
                for auth in (JIM, ""):
                    with self.subTest(name, fields=fields, auth=auth):
                        said = talk(address, head("/", "POST", auth, *fields) + self.INNER, True)
                        self.assertEqual(statuses(said), [400])
        self.assertEqual(self.errors, [])
        for length, status in (("\xb2", 401), ("+5", 401), ("5", 401)):     # wsgiref tells it as it came
            said = talk(self.hosts()[2][1], head("/", "POST", "", "Content-Length: " + length) + b"12345", True)
            self.assertEqual(statuses(said), [status])

    def test_no_byte_of_it_is_the_next_request(self) -> None:
        """A body that looks like a request with the right password is answered by nobody."""
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(self.INNER), self.INNER)
        for name, address in self.hosts():
            for method in ("POST", "PUT", "HEAD", "GET"):
                for fields, body in ((["Content-Length: %d" % len(self.INNER)], self.INNER),
                                     (["Transfer-Encoding: chunked"], chunk)):
                    with self.subTest(name, method=method, fields=fields):
                        said = talk(address, head("/", method, "", *fields) + body, True)
                        self.assertEqual(statuses(said), [401])
                        self.assertEqual(name != "wsgiref", b"\r\nConnection: close\r\n" in said)
        with Wire(self.hosts()[0][1]) as wire:      # without a body the connection stays
            self.assertEqual([wire.ask("/", "GET", auth).status for auth in ("", JIM, "", JIM)], [401, 200, 401, 200])

    def test_fifty_megabytes_read_their_401(self) -> None:
        """http.client sends all of it before it reads: three times on each host."""
        body = b"0" * 50000000
        for name, address in self.hosts():
            for _ in range(3):
                with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as client:
                    client.request("POST", "/", body)
                    self.assertEqual(client.getresponse().status, 401, name)

    def test_who_never_stops_is_left(self) -> None:
        """After LINGER_SECONDS the connection is closed, on a stock server and under WSGI."""
        with mock.patch.object(authserver, "LINGER_SECONDS", 0.2):
            for name, address in self.hosts():
                with self.subTest(name), Wire(address) as wire:
                    wire.sendall(head("/", "POST", "", "Content-Length: 900000000"))
                    wire.setblocking(False)
                    end = threading.Event()
                    threading.Timer(15, end.set).start()
                    with contextlib.suppress(ConnectionError):
                        while not end.is_set():
                            with contextlib.suppress(BlockingIOError):
                                wire.send(b"x" * 65536)
                    self.assertFalse(end.is_set())

    def test_a_body_is_asked_for_after_the_password(self) -> None:
        """100 Continue comes after 401 would have, and once."""
        address = self.hosts()[0][1]
        fields = ["Content-Length: 5", "Expect: 100-continue"]
        with Wire(address) as wire:
            self.assertEqual(statuses(talk(address, head("/", "POST", "", *fields), True)), [401])
            wire.sendall(head("/", "POST", JIM, *fields, CLOSE))
            self.assertEqual(statuses(wire.recv(4096)), [100])
            wire.sendall(b"12345")
            self.assertEqual(wire.hear().rpartition(b"\n")[2], b"jim Basic 5")

    def test_auth_int_signs_it_whole_or_says_413(self) -> None:
        """Up to 64 KiB the body is signed; what would be cut is no wrong password."""
        for name, address in self.hosts(qop=["auth", "auth-int"]):
            for size, status in ((0, 200), (5, 200), (65536, 200), (65537, 413), (200000, 413)):
                with self.subTest(name, size=size):
                    body = b"x" * size
                    auth = digest(address, "/", "POST", body=body)
                    said = talk(address, head("/", "POST", auth, "Content-Length: %d" % size, CLOSE) + body)
                    self.assertEqual(statuses(said), [status])
                    self.assertEqual(said.endswith(b"jim Digest %d" % size), status == 200)
                    auth = digest(address, "/", "POST", body=body + b"y")
                    said = talk(address, head("/", "POST", auth, "Content-Length: %d" % size, CLOSE) + body)
                    self.assertEqual(statuses(said), [401 if status == 200 else status])


def called_page(application: Any, field: Optional[str] = None, **environ: str) -> Tuple[int, List[str]]:
    """Call a WSGI application; return the status and the schemes that it offers."""
    said: List[Any] = []
    given = {"REQUEST_METHOD": "GET", "PATH_INFO": "/x", "wsgi.url_scheme": "http", "REMOTE_ADDR": "192.0.2.1"}
    given.update({name.replace("_url", ".url"): value for name, value in environ.items()})
    if field is not None:
        given["HTTP_AUTHORIZATION"] = field
    with open(os.devnull, "rb") as nothing:
        application(dict(given, **{"wsgi.input": nothing}), lambda *words: said.extend(words))
    return int(said[0][:3]), [value.partition(" ")[0] for name, value in said[1] if name == "WWW-Authenticate"]


class Callers(GuardTest):
    """Whom the library locks out, and what it offers where"""

    def test_nobody_locks_out_everybody(self) -> None:
        """Ten guesses of a stranger: who else is refused, by peer, its X-Forwarded-For, and whom we trust."""
        wrong = basic("jim", "wrong")
        for peer, his, mine, trusted, status in (
                ("172.18.0.2", "", "", None, 200), ("172.18.0.2", "203.0.113.9", "203.0.113.5", None, 200),
                ("10.1.2.3", "", "", None, 200), ("fd00::2", "", "", None, 200), ("fe80::2%eth0", "", "", None, 200),
                ("127.0.0.1", "", "", None, 200), ("", "", "", None, 200), ("100.64.0.9", "", "", None, 200),
                ("203.0.113.9", "", "", None, 429), ("203.0.113.9", "10.0.0.1", "10.0.0.2", None, 429),
                ("2001:db8::1", "", "", None, 429), ("10.1.2.3", "", "", [], 429), ("127.0.0.1", "", "", [], 200),
                ("172.18.0.2", "203.0.113.9", "203.0.113.5", ["172.16.0.0/12"], 200),
                ("172.18.0.2", "203.0.113.9", "203.0.113.9", ["172.16.0.0/12"], 429),
                ("172.18.0.2", "203.0.113.5, 203.0.113.9", "203.0.113.5", ["172.16.0.0/12"], 200),
                ("", "203.0.113.9", "203.0.113.9", ["unix:"], 429)):
            with self.subTest(peer, his=his, mine=mine, trusted=trusted):
                passwords = users(ann="%s%s%s%s" % (peer, his, mine, trusted))      # a table of its own
                application = protect_wsgi(echo, passwords, trusted, schemes=["basic"])
                for _ in range(10):
                    called_page(application, wrong, REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=his)
                found = called_page(application, JIM, REMOTE_ADDR=peer, HTTP_X_FORWARDED_FOR=mine)[0]
                self.assertEqual(found, status)

    def test_the_log_has_refusals_and_nothing_else(self) -> None:
        """Who gets in and who has shown nothing yet is no news; a table that a program brings is the one that counts."""
        table = authserver.SharedTable()
        application = protect_wsgi(echo, users(), table=table)
        self.said.clear()
        for field, said in ((JIM, []), (None, []), (WRONG, ["127.0.0.1: refused jim: bad password"])):
            called_page(application, field, REMOTE_ADDR="127.0.0.1")
            self.assertEqual(self.said, said)
        self.assertEqual(table.statistics()["failures"], 1)

    def test_a_head_is_refused_once_and_before_it_is_endless(self) -> None:
        """On stock servers as well: nobody waits for the end of a long one, and what http.server refuses has one answer."""
        for name, address in self.hosts()[:2]:
            for octets, status in ((G + b"X: y\r\n" * 6000, 431), (G + b"X: y\r\n" * 150 + b"\r\n", 431)):
                with self.subTest(name, size=len(octets)), Wire(address) as wire:
                    wire.sendall(octets)
                    self.assertEqual(statuses(wire.hear()), [status])

    def test_a_stock_server_reads_no_more_than_it_was_sent(self) -> None:
        """A signed request without a body, one that waits for 100 Continue, chunks; a refused HEAD has no body either."""
        address = self.hosts(qop=["auth", "auth-int"])[0][1]
        answer = request(address, "/", "GET", digest(address, "/", body=b""))
        self.assertEqual((answer.status, (answer.field("Authentication-Info") or "")[:9]), (200, 'rspauth="'))
        self.assertEqual(request(address, "/", "POST", digest(address, "/", "POST", body=b"x"), CHUNKED,
                                 data=b"1\r\nx\r\n0\r\n\r\n").status, 411)
        with Wire(address) as wire:
            wire.sendall(head("/", "POST", digest(address, "/", "POST", body=b"x"), "Content-Length: 1", "Expect: 100-continue"))
            self.assertTrue(wire.recv(12).startswith(b"HTTP/1.1 100"))
            wire.sendall(b"x")
            self.assertEqual(statuses(wire.hear()), [200])
        said = talk(address, head("/", "HEAD", "") + head("/", "GET", JIM, CLOSE), True)
        self.assertEqual((statuses(said), said.partition(b"HTTP/1.1 200")[0][-4:]), ([401, 200], b"\r\n\r\n"))

    def test_a_partial_of_a_handler_is_one_that_is_protected(self) -> None:
        """As http.server tells a handler its folder: the password is asked for, and the argument arrives."""
        folder = self.folder()
        handler = protect(functools.partial(Simple, folder), users())
        self.assertEqual((handler.args, issubclass(handler.func, http.server.SimpleHTTPRequestHandler)), ((folder,), True))
        with self.assertRaises(TypeError):
            protect(functools.partial(handler.func), users())

    def test_each_request_waits_for_itself(self) -> None:
        """After one that waits for 100 Continue, one that does not is not told so, on the same connection."""
        address = self.hosts()[0][1]
        with Wire(address) as wire:
            wire.sendall(head("/", "POST", JIM, "Content-Length: 1", "Expect: 100-continue"))
            self.assertTrue(wire.recv(12).startswith(b"HTTP/1.1 100"))
            wire.sendall(b"x" + head("/", "POST", JIM, "Content-Length: 1") + b"y" + head("/", "GET", JIM, CLOSE))
            self.assertEqual(statuses(wire.hear()), [200, 200, 200])

    def test_a_stranger_fills_no_memory(self) -> None:
        """Of X-Forwarded-For no more than its end is looked at, or remembered, on each host."""
        seen: List[int] = []

        def find(proxies: Any, peer: str, forwarded: str = "") -> Tuple[str, None]:
            seen.append(len(forwarded))
            return peer, None
        with mock.patch.object(authserver.TrustedProxies, "_find_client", find):
            for _, address in self.hosts():
                request(address, "/", "GET", JIM, "X-Forwarded-For: %s, 192.0.2.7" % ("x" * 9000), EMPTY)
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
        for host, offer, count in (("0.0.0.0", {}, 1), ("127.0.0.1", {}, 2), ("0.0.0.0", {"schemes": ["basic"]}, 1)):
            address = self.serve(protect(Echo, users(), **offer), host)
            fields = request(address, "/", "GET", "", EMPTY).fields
            self.assertEqual(len([name for name, _ in fields if name == "www-authenticate"]), count)
            self.assertEqual(request(address, "/", "GET", JIM, EMPTY).status, 401 if not offer and count == 1 else 200)

    @needs("openssl")
    def test_basic_is_offered_under_tls(self) -> None:
        """On a stock server whose socket was wrapped; and a refused body is read there, too."""
        box = Box()
        self.addCleanup(box.close)
        pem = make_certificate(box)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)

        def activate(server: Any) -> None:
            StockServer.server_activate(server)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        address = self.serve(protect(Echo, users()), "0.0.0.0", type(
            "Secure", (StockServer,), {"server_activate": activate}))
        trusting = ssl.create_default_context(cafile=pem)
        trusting.check_hostname = False
        for auth, size, status in ((JIM, 5, 200), ("", 5, 401), ("", 5000000, 401)):
            client = http.client.HTTPSConnection(address, context=trusting, timeout=20)
            client.request("POST", "/", b"x" * size, {"Authorization": auth} if auth else {})
            self.assertEqual(client.getresponse().status, status)
            client.close()

    def test_refusals_are_logged(self) -> None:
        """Wrong credentials and lock-outs, with client and user; first challenges are not."""
        application = protect_wsgi(echo, users(log="x"), schemes=["basic"], max_failures=(2, 60.0))
        for field, line in ((None, None), (basic("jim", "wrong"), "192.0.2.1: refused jim: bad password"),
                            (basic("a b\u2028", "x"), r"192.0.2.1: refused a%20b\S+: unknown user"),
                            (JIM, "192.0.2.1: refused -: locked out")):
            self.said.clear()
            called_page(application, field)
            self.assertEqual(len(self.said), int(line is not None))
            self.assertRegex("".join(self.said), line or "^$")
        self.said.clear()
        request(self.serve(protect(Echo, users())), "/", "GET", basic("bob", "x"), EMPTY)
        self.assertEqual(self.said, ["127.0.0.1: refused bob: unknown user"])


class Spellings(GuardTest):
    """A Digest proof opens the resource that it names, however that is spelt, and no other"""

    SAME = ("/x", "/x?", "/a%2Cb", "/a%40b", "/a%3Ab", "/caf%c3%a9", "/caf%C3%A9", "/a%2Fb", "/%7Ejim/", "/~jim/",
            "/a[1]", "/a|b", "//x", "/x?a=%2C&b", "/x%20y?", "/%", "/a%zz", "/a+b?c+d", "/x;p=1,2", "/a%00b", "/?q?r")
    OTHER = (("/x", "/y"), ("/x", "/x/"), ("/x", "/X"), ("/x", "/x?a"), ("/x?a", "/x"), ("/x?a", "/x?b"),
             ("/x?a=%2C", "/x?a=,"), ("/a%20b", "/a+b"), ("/a%2520b", "/a%20b"), ("/a/../b", "/b"), ("/x%3Fa", "/x?a"),
             ("x", "/x"), ("//x//y", "/x/y"), ("/caf%e9", "/caf%c3%a9"), ("http://h/x", "/y"))

    def test_on_every_host(self) -> None:
        """By the target where the server tells it, decoded where it does not (wsgiref)."""
        for name, address in self.hosts(max_failures=(0, 1.0)):
            for target in self.SAME:
                with self.subTest(name, target=target):
                    said = request(address, target, "GET", digest(address, target), EMPTY, CLOSE)
                    self.assertEqual(said.status, 200)
            for uri, target in self.OTHER:
                with self.subTest(name, uri=uri, target=target):
                    said = request(address, target, "GET", digest(address, target, uri=uri), EMPTY, CLOSE)
                    self.assertEqual(said.status, 400)

    def test_two_fields_are_none(self) -> None:
        """Several Authorization fields, apart or joined by the server, let nobody in."""
        for name, address in self.hosts():
            one, two = digest(address, "/"), digest(address, "/")
            for fields in ((JIM, JIM), (one, two), (JIM, one), (one, JIM), (JIM, basic("jim", "wrong"))):
                said = talk(address, head("/", "GET", fields[0], "Authorization: " + fields[1], CLOSE))
                self.assertEqual(statuses(said), [400], (name, fields))
            for glue in (",", ", ", ";", " "):
                self.assertIn(request(address, "/", "GET", one + glue + JIM, CLOSE).status, (400, 401), (name, glue))


class Construction(GuardTest):
    """What cannot be protected says so by name, and at once"""

    def test_type_errors(self) -> None:
        """No handler, no application, no dictionary, protected twice, loops that never ask."""
        def deaf(self: Any) -> None:
            self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        Deaf, Blind = type("Deaf", (Echo,), {"handle": deaf}), type("Blind", (Echo,), {"handle_one_request": deaf})
        for thing, name in ((Deaf, r"Deaf: its handle\(\)"), (Blind, r"Blind: its handle_one_request\(\)"), (
                protect(Echo, users()), "Echo.*not protected yet"), (object, "object"), (None, "None"), (
                functools.partial(int, base=2), "int"), (Echo.do_GET, "do_GET"), ("Echo", "Echo")):
            with self.assertRaisesRegex(TypeError, "unable to protect .*" + name):
                protect(thing, users())
        with self.assertRaisesRegex(TypeError, "unable to protect 'app'"):
            protect_wsgi("app", users())
        for passwords in ({"jim": "secret"}, None, "users"):
            for make in (functools.partial(protect, Echo), functools.partial(protect_wsgi, echo)):
                with self.assertRaisesRegex(TypeError, "as passwords"):
                    make(passwords)
        with self.assertRaises(TypeError):
            protect(Echo, users(), tables=1)
        with self.assertRaisesRegex(TypeError, "two authenticators"):
            AuthServer(("127.0.0.1", 0), protect(Echo, users()), authenticator=Authenticator(users()))
        self.refuses("unable to trust proxy", protect, Echo, users(), ["proxy.example"])
        path = self.write("ann:%s\n" % SHA)     # whom Digest cannot serve
        self.refuses("--schemes basic", protect, Echo, Passwords.read(path, "files"))

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
        address = self.serve(protect(Polite, users()))
        self.assertEqual([statuses(talk(address, head("/", "GET", auth, EMPTY))) for auth in (JIM, "")], [[200], [401]])


class Processes(GuardTest):
    """Processes that know nothing of one another share nonces, counts and failures"""

    CODE = ("import io, sys; sys.path.insert(0, sys.argv[1]); import authserver as a\n"
            "def app(environ, start): start('200 OK', []); return []\n"
            "w = a.protect_wsgi(app, a.Passwords({'jim': sys.argv[2]}, realm=sys.argv[3]))\n"
            "for line in sys.stdin:\n"
            "    e = {'REQUEST_METHOD': 'GET', 'PATH_INFO': '/x', 'wsgi.url_scheme': 'http', 'wsgi.input': io.BytesIO()}\n"
            "    if line.strip(): e['HTTP_AUTHORIZATION'] = line.strip()\n"
            "    w(e, lambda s, f: print(s[:3], dict(f).get('WWW-Authenticate', ''), "
            "[v for n, v in f if v[:6] == 'Digest'], flush=True))\n")

    def start(self, password: str = "processes", realm: str = "files", **environ: str) -> Callable[[str], str]:
        """Start a process; return a function that asks it."""
        child = subprocess.Popen([PYTHON, "-c", self.CODE, HERE, password, realm],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 env=dict(os.environ, **environ))
        for clean in (functools.partial(child.__exit__, None, None, None), child.kill):
            self.addCleanup(clean)
        self.children.append(child)

        def ask(line: str) -> str:
            child.stdin.write((line + "\n").encode())       # type: ignore[union-attr]
            child.stdin.flush()                             # type: ignore[union-attr]
            return child.stdout.readline().decode()         # type: ignore[union-attr]
        return ask

    def setUp(self) -> None:
        """Forget the children of the last test."""
        super().setUp()
        self.children: List[Any] = []

    def test_a_nonce_is_good_in_all_and_a_proof_once(self) -> None:
        """A third process, another realm and another password have to do with it what they should."""
        one, two, realm, other = (self.start(), self.start(), self.start(realm="b"), self.start("another"))
        client = Digest(one(""), "jim", "processes")
        for ask in (two, one, self.start(), two):
            field = client.field()
            self.assertEqual(ask(field)[:3], "200")
            for again in (one, two, self.start()):
                self.assertIn("stale=true", again(field))
        self.assertEqual(realm(client.field())[:3], "401")
        self.assertEqual(other(client.field())[:3], "401")
        stranger = Digest(one(""), "jim", "another")
        self.assertIn("stale=true", other(stranger.field()))    # right there, but no nonce of theirs

    def test_where_they_meet_is_theirs_alone(self) -> None:
        """0700 and 0600; what nobody uses is removed, what somebody uses is not."""
        folder = "/dev/shm/authserver-%d" % os.geteuid()
        if not os.access("/dev/shm", os.W_OK):
            self.skipTest("needs /dev/shm")
        # Found by its name: others, of other runs of these tests, may lie there.
        secret = "one of %s" % self.folder()
        name = authserver.LAYOUT + Passwords({"jim": secret}, realm="files").fingerprint()
        path = os.path.join(folder, name.hex())
        self.assertFalse(os.path.exists(path))
        self.start(secret)("")
        self.assertEqual(stat.S_IMODE(os.stat(folder).st_mode), 0o700)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.start("unique two")("")
        self.assertTrue(os.path.exists(path))
        self.children[0].kill()
        self.children[0].wait()
        self.start("unique three")("")
        self.assertFalse(os.path.exists(path))

    def test_each_trap_alone(self) -> None:
        """A link to a folder of ours, somebody else's folder, a link in place of the file; and who is first waits for nobody."""
        for trap in ("folder", "file", "owner", ""):
            base = self.folder()
            path, own = os.path.join(base, "authserver-%d" % os.geteuid()), os.path.join(base, "own")
            os.mkdir(own, 0o700)
            os.mkdir(path, 0o700) if trap != "folder" else os.symlink("own", path)
            if trap == "owner" and ROOT:
                os.chown(path, NOBODY, NOBODY)
            if trap == "file":
                os.symlink("../own/x", os.path.join(path, "name"))
            with self.subTest(trap), mock.patch("os.access", return_value=False), mock.patch("tempfile.gettempdir", lambda: base):
                if trap and (ROOT or trap != "owner"):
                    self.assertRaises(OSError, authserver.open_shared_file, "name", 4096)
                else:
                    folder = os.open(path, os.O_RDONLY)
                    fcntl.flock(folder, fcntl.LOCK_EX)
                    with concurrent.futures.ThreadPoolExecutor(1) as pool:
                        opened = pool.submit(authserver.open_shared_file, "name", 4096)
                        self.assertEqual(concurrent.futures.wait([opened], 0.2).done, set())
                        os.close(folder)
                    self.assertEqual(os.fstat(opened.result()).st_size, 4096)
                    os.close(opened.result())
            self.assertEqual(os.listdir(own), [])

    def test_two_dictionaries_in_one_process(self) -> None:
        """To open the second one's file gives back no lock of the first; a disk that is full is found, not mapped."""
        first = authserver.shared_table(users(first=TOKEN))
        row = first._own_row()
        second = authserver.shared_table(users(second=TOKEN))
        child = os.fork()
        if not child:
            os._exit(first._own_row() == row)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertIsNot(first, second)
        self.assertIs(first, authserver.shared_table(users(first=TOKEN)))
        with mock.patch("os.pwrite", return_value=5), self.assertRaises(OSError):
            authserver.shared_table(users(third=TOKEN))

    def test_a_trap_is_not_stepped_into(self) -> None:
        """A folder that others may enter, a symlink in its place: nothing is shared, and the log says so."""
        def open_to_all(path: str) -> None:
            os.mkdir(path)
            os.chmod(path, 0o755)
        for trap in (open_to_all, functools.partial(os.symlink, "/")):
            folder = self.folder()
            trap(os.path.join(folder, "authserver-%d" % os.geteuid()))
            with mock.patch("os.access", return_value=False), mock.patch("tempfile.gettempdir", lambda: folder):
                self.said.clear()
                application = protect_wsgi(echo, users(trap=folder))
                self.assertRegex(self.said[0], "unable to share nonces with other processes: ")
            self.assertEqual(called_page(application, JIM, REMOTE_ADDR="")[0], 200)


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
        path = cls.box.write("pages.py", PRELUDE + cls.settings + cls.pages + LIBRARY_END)
        cls.loop = cls.box.launch(PYTHON, path)
        super().set_up()

    def test_a_head_has_one_deadline_as_a_whole(self) -> None:
        """A byte every 0.1 s does not keep a connection: 408 after the time for a head."""
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
        """Before the first request and between two, silence has an end, without an answer."""
        for data in (b"", head("/")):
            with self.subTest(data), Wire(self.at) as wire:
                wire.sendall(data)
                self.assertEqual(len(statuses(wire.hear())), bool(data))

    def test_a_body_that_does_not_come_frees_its_thread(self) -> None:
        """A handler that reads from a client that sends nothing gets an error in time."""
        with Wire(self.at) as wire:
            wire.sendall(head("/", "POST", JIM, "Content-Length: 5") + b"a")
            began = time.monotonic()
            wire.hear()
            self.assertLess(time.monotonic() - began, SOON)

    @needs_linux
    def test_an_answer_that_is_not_read_is_cut_off(self) -> None:
        """Who reads nothing, or a little now and then, does not keep a thread or the loop's memory."""
        for at in (self.at, self.loop):
            for trickle in (0, 1):
                with self.subTest("thread" if at == self.at else "loop", trickle=trickle), Wire(at) as wire:
                    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    ports = wire.getpeername()[1], wire.getsockname()[1]
                    wire.sendall(head("/big"))
                    until(lambda: not self.is_held(wire, trickle, *ports), "an end of it", SOON)

    def is_held(self, wire: Wire, trickle: int, *ports: int) -> bool:
        """Read a little; tell whether the server has the other end (the kernel may still be sending)."""
        with contextlib.suppress(ConnectionResetError):
            wire.recv(trickle)
        return bool(re.search(":%04X [0-9A-F]{8}:%04X 01 " % ports, read("/proc/net/tcp")))

    @needs_linux
    def test_a_frozen_process_answers_what_has_come(self) -> None:
        """After SIGSTOP for longer than every deadline: what is in the sockets is answered, not expired."""
        pid = self.box.server.pid
        with Wire(self.at) as silent, Wire(self.at) as half, contextlib.ExitStack() as stack:
            half.sendall(head()[:20])
            self.assertEqual(request(self.at).status, 200)  # both are accepted by now
            os.kill(pid, signal.SIGSTOP)
            try:
                late = stack.enter_context(Wire(self.at))
                silent.sendall(head())
                half.sendall(head()[20:])
                late.sendall(head())
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
        """More waiting handlers than --stream-threads: the next is told to come back; then it goes on."""
        request(self.at, "/shut")
        with contextlib.ExitStack() as stack:
            for _ in range(19):
                stack.enter_context(Wire(self.at)).sendall(head("/slow"))
            self.assertEqual(request(self.at, "/x").status, 200)
            stack.enter_context(Wire(self.at)).sendall(head("/slow"))
            busy = until(lambda: [answer for answer in [request(self.at, "/x")] if answer.status == 503],
                         "a 503", SOON)
            self.assertEqual(busy[0].field("Retry-After"), "1")
        until(lambda: request(self.at, "/open").status == 200, "room")

    def test_a_full_process_table_is_survived(self) -> None:
        """When no thread can be started for a while, requests fail; afterwards they do not."""
        request(self.at, "/full")
        for _ in range(60):
            with contextlib.suppress(OSError, IndexError, ValueError):
                request(self.at, "/x")
        threads(20, lambda _: until(lambda: request(self.at, "/x").status == 200, "an answer", SOON))
        self.assertEqual(request(self.at, "/calm").status, 200)

    @needs_linux
    def test_no_password_stays_in_memory(self) -> None:
        """After requests with Basic no container of the process holds the credentials."""
        secret = JIM[6:][::-1]  # so that the question has not what it looks for
        with Wire(self.at) as wire:
            self.assertEqual({wire.ask("/x").status for _ in range(4)}, {200})
        with Wire(self.at) as wire:
            self.assertEqual(wire.ask("/x", "GET", basic("ann", "other")).status, 200)
        until(lambda: request(self.at, "/search?" + secret, "GET", basic("ann", "other")).body == b"0",
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
    pem: str

    @classmethod
    def set_up(cls) -> None:
        cls.pem = make_certificate(cls.box)
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
        """TLS 1.2 and 1.3; 1.1 and 1.0 are told by an alert, and the log in one line."""
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
        """What is no handshake, or half of one: a line, no traceback, and the next client is served."""
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

    def test_records_and_requests_have_nothing_to_do_with_each_other(self) -> None:
        """Many requests in a record, one in many, the first with the handshake's end, bytes one by one."""
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
        """Who stops in the middle of it is closed after the time for it; others are served meanwhile."""
        with contextlib.ExitStack() as stack:
            stalled = [stack.enter_context(Wire(self.at)) for _ in range(20)]
            for number, wire in enumerate(stalled):
                wire.sendall(client_hello(2)[:number * 2])
            self.assertEqual([https(self.at, "/").status for _ in range(5)], [200] * 5)
            self.assertEqual([wire.recv(1) for wire in stalled], [b""] * 20)

    def test_a_look_at_the_port_is_no_error(self) -> None:
        """Who resets before he is accepted leaves no traceback; who speaks plain HTTP is told so, without a reset."""
        os.kill(self.box.server.pid, signal.SIGSTOP)
        try:
            for _ in range(5):
                Wire(self.at).abort()
        finally:
            os.kill(self.box.server.pid, signal.SIGCONT)
        self.assertEqual(https(self.at, "/").status, 200)
        self.assertNotIn("Traceback", self.log())
        with Wire(self.at) as wire:
            wire.sendall(head("/", "GET", JIM, "X: " + "a" * 5000))
            self.assertEqual(statuses(b"".join(iter(lambda: wire.recv(65536), b""))), [400])

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
            self.assertEqual(https(self.at, "/big").body, self.big)
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
        """100 Continue comes through; then each line is answered before the next is sent."""
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

    def test_nobody_gets_in_without_the_password(self) -> None:
        """401 without it; Basic and Digest with it; nothing is said in clear."""
        challenge = https(self.at, "/x", "GET", "").field("www-authenticate") or ""
        auths = ("", WRONG, JIM, Digest(challenge, uri="/x").field())
        self.assertEqual([https(self.at, "/x", "GET", auth).status for auth in auths], [401, 401, 200, 200])
        self.assertEqual(statuses(talk(self.at, head("/x"), True)), [400])


@needs("openssl")
class HttpsCommand(BoxTest):
    """--tls-cert and --tls-key"""

    def setUp(self) -> None:
        super().setUp()
        self.pem = make_certificate(self.box)
        self.passwords = self.box.write("passwords", "jim:plain:secret\n", 0o600, NOBODY if ROOT else -1)
        self.common = ["--passwords", self.passwords, "--bind", "127.0.0.1:0"]

    def part(self, name: str, pattern: str, mode: int = 0o600, source: str = "") -> str:
        """Write what matches, of the certificate and its key, to a file of its own."""
        found = re.findall("(?s)-----BEGIN %s-----.*?-----END [^\n]*\n" % pattern, read(source or self.pem))
        return self.box.write(name, found[0], mode)

    def shown(self, address: str) -> bytes:
        """Return the certificate that a server shows."""
        with secure(address) as wire:
            return bytes(wire.getpeercert(True))

    def test_mistakes_at_start(self) -> None:
        """Each is a line that names the file, exit status 2; nobody is asked for a key's password."""
        cert, key = self.part("a.crt", "CERTIFICATE"), self.part("a.key", "[A-Z ]*KEY")
        other = self.part("b.key", "[A-Z ]*KEY", 0o600, make_certificate(self.box, "b.pem"))
        worldly, locked, none = self.part("w.key", "[A-Z ]*KEY", 0o644), self.box.path("l.key"), self.box.path("none")
        run(["openssl", "pkey", "-aes128", "-passout", "pass:x", "-in", key, "-out", locked], 0)
        person, terminal = pty.openpty()
        self.addCleanup(os.close, person)
        self.addCleanup(os.close, terminal)
        rows: Sequence[Tuple[Optional[str], Optional[str], str]] = (
                (cert, other, "b.key: it is not that of .*a.crt"), (cert, None, "a.crt: "), (none, key, "none: No such file"),
                (cert, none, "none: No such file"), (key, None, "a.key: "), (cert, locked, "l.key: "),
                (None, key, "--tls-cert is missing"), (os.devnull, key, os.devnull + ": "),
                (self.box.folder, key, ": Is a directory"), (cert, worldly, r"w.key: everybody.*\ntry: chmod 600 .*w.key"))
        for first, second, said in rows:
            options = [word for option, path in (("--tls-cert", first), ("--tls-key", second)) if path
                       for word in (option, path)]
            with self.subTest(said):
                result = run([PYTHON, AUTHSERVER] + self.common + options, 2, stdin=terminal,
                             start_new_session=True, preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))
                self.assertRegex(result.err, "(?s)^authserver: fatal: unable to .*" + said)
                self.assertNotRegex(result.err, "(?i)traceback|substring|_ssl.c")
                self.assertEqual(select.select([person], [], [], 0)[0], [])
        run(["sh", "-c", re.findall("(?m)^try: (.*)$", result.err)[0]], 0)
        self.box.serve(*self.common[:2], "--tls-cert", cert, "--tls-key", worldly)
        if ROOT:        # as containers are given their secrets: root's, 0444, which nobody can change
            with mock.patch.object(os, "geteuid", return_value=NOBODY):
                authserver.tls_context(cert, self.part("c.key", "[A-Z ]*KEY", 0o444))

    def test_an_expired_certificate_is_a_warning(self) -> None:
        """It is served, with a warning; one that lasts for decades without."""
        der = ssl.PEM_cert_to_DER_cert(read(self.part("a.crt", "CERTIFICATE")))
        first, last = re.findall(rb"\x17\r\d{12}Z", der)
        for end, warns in ((b"200101000000Z", True), (b"491231235959Z", False)):
            changed = ssl.DER_cert_to_PEM_cert(der.replace(first + last, first + b"\x17\r" + end))
            path = self.box.write("dated.pem", read(self.part("a.key", "[A-Z ]*KEY")) + changed, 0o600)
            with self.subTest(end):
                self.assertEqual(https(self.box.serve(*self.common[:2], "--tls-cert", path), "/").status, 200)
                self.assertEqual("dated.pem has expired\n" in read(self.box.output), warns)
                self.box.kill(self.box.server)

    def test_every_address_speaks_it_and_offers_both_schemes(self) -> None:
        """Basic and Digest also where a network reaches; a unix socket stays plain."""
        place = "unix:" + self.box.path("sock")
        self.box.serve(*self.common[:2], "--bind", "[::1]:0", "--bind", ":0", "--bind", place, "--tls-cert", self.pem)
        found = re.findall(r"listening on (.+) \((.*)\)", read(self.box.output))
        self.assertEqual([schemes for _, schemes in found], ["digest, basic"] * 4)
        for url, _ in found[:-1]:
            with self.subTest(url):
                at = url.replace("https://", "").strip("/").replace("[::]", "127.0.0.1")
                offer = [value.split()[0] for name, value in https(at, "/", "GET", "").fields if name == "www-authenticate"]
                self.assertEqual((offer, https(at, "/").status), (["Digest", "Basic"], 200))
        self.assertEqual(request(place, "/").status, 200)

    @needs_linux
    def test_a_session_goes_on_in_another_worker(self) -> None:
        """What one worker began another resumes, in TLS 1.2 and 1.3, without a full handshake."""
        at = self.box.address(self.box.start(*self.common, "--workers", "2", "--tls-cert", self.pem))
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

    def test_a_renewed_certificate_and_a_restart_lose_nothing(self) -> None:
        """reload takes the new certificate, restart the new code: no request fails meanwhile, kept or new."""
        self.box.write("passwords", ha1_line(BENCH_USER, BENCH_PASSWORD), 0o600)
        at = self.box.address(self.box.start(*self.common, "--workers", "2", "--tls-cert", self.pem))
        end, shown = threading.Event(), [self.shown(at)]

        def part(number: int) -> Any:
            if number < 2:
                return load(at, ("basic", "digest")[number], PATIENCE, 2, number > 0, "authserver", end, context=trusting())
            try:
                for action in ("reload", "restart", "reload"):
                    os.replace(make_certificate(self.box, "new.pem"), self.pem)
                    self.box.command(action)
                    shown.append(self.shown(at))
            finally:
                end.set()
        counts = threads(3, part)[:2]
        self.assertEqual([(answers > 20, failures) for answers, failures in counts], [(True, 0)] * 2)
        self.assertEqual(len(set(shown)), 4)
        self.box.write("cert.pem", "nonsense", 0o600)
        self.assertIn("cert.pem", self.box.command("reload", want=1).err)
        self.assertEqual(self.shown(at), shown[-1])
        self.assertEqual(re.findall("Traceback(?:\n.*){9}", read(self.box.log)), [])

    @needs_root
    def test_a_key_of_roots_is_taken_by_restart(self) -> None:
        """After the drop to another user the key cannot be read again: `try: ... restart`; and that works."""
        if not python_runs_as(NOBODY):
            self.skipTest("needs a Python that user %d can run" % NOBODY)
        at = self.box.address(self.box.start(*self.common, "--uid", str(NOBODY), "--tls-cert", self.pem))
        before = self.shown(at)
        make_certificate(self.box)
        self.assertRegex(self.box.command("reload", want=1).err, r"cert\.pem.*Permission denied\ntry: .*restart")
        self.assertEqual(self.shown(at), before)
        self.box.command("restart")
        self.assertNotEqual(self.shown(at), before)


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
    """--public: no password below it, and no way from it to the rest"""
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
        """Each spelling of what lies below is served to everybody, nothing beside it, as page and as handler."""
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
        """600 paths of tricks: nobody sees what is not public, and everybody all that is, where a page tells."""
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
        for _ in range(600):
            path = "/".join([chance.choice(("", "http://open", "/"))] + chance.choices(NAMES, k=chance.randrange(1, 7)))
            for at in (self.at, self.pages):
                known, unknown = (walk(at, path, auth) for auth in (JIM, ""))
                with self.subTest(path, page=at == self.pages, seed=SEED):
                    self.assertIn(unknown.status, (known.status, 401))
                    if unknown.status == 200:
                        self.assertRegex(unknown.body, b"^open(/sub)?$|<title>")
                        self.assertNotIn(b"healthz", unknown.body)
                    elif at == self.pages and "link" not in path:
                        self.assertNotEqual(known.body, b"open")

    def test_preflights_and_health_checks(self) -> None:
        """OPTIONS, HEAD and GET without a password there, and with a wrong one, which is no failure; else 401."""
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

    def test_what_could_never_match_is_refused(self) -> None:
        """A prefix that no path can lie below, as it would be spelled, is a mistake at start: exit status 2."""
        for prefix in ("", "open", "/a//b", "/../a", "/a/./b", "/a\\b"):
            with self.subTest(prefix):
                code, said = told("--bind", "127.0.0.1:0", "--passwords", self.box.path("passwords"), "--public", prefix)
                self.assertRegex(said, "^authserver: fatal: unable to .*%s" % re.escape(prefix))
                self.assertEqual(code, 2)


class HttpCommand(BoxTest):
    """authserver.py on the command line"""

    def serve(self, *options: str) -> str:
        """Run authserver.py with one user."""
        return self.box.serve("--passwords", self.passwords(), *options)

    def passwords(self) -> str:
        """Return the path of a file with one user."""
        return self.box.write("passwords", "jim:plain:secret\n", 0o600)

    def argv(self, *options: str) -> List[str]:
        """Return the command line of a server."""
        return [PYTHON, AUTHSERVER, "--passwords", self.passwords()] + list(options)

    def logged(self, pattern: str, count: int = 1) -> List[Any]:
        """Wait for `count` matches in the log, and return them."""
        return list(until(lambda: len(re.findall(pattern, read(self.box.output))) >= count
                          and re.findall(pattern, read(self.box.output)), pattern))

    def test_addresses_of_every_form(self) -> None:
        """HOST:PORT, [V6]:PORT, :PORT for both families, and unix:PATH; Basic where no network hears it."""
        self.serve("--bind", "[::1]:0", "--bind", "unix:" + self.box.path("sock"), "--bind", ":0")
        found = self.logged(r"listening on (.+) \(([^)]*)\)", 4)
        self.assertEqual([schemes for _, schemes in found], ["digest, basic"] * 3 + ["digest"])
        wide = found[3][0]
        for address, want in [(found[0][0], 200), (found[1][0], 200), ("unix:" + self.box.path("sock"), 200),
                (wide.replace("[::]", "[::1]"), 401), (wide.replace("[::]", "127.0.0.1"), 401)]:
            with self.subTest(address):
                self.assertEqual(request(address, "/", "GET", "").status, 401)
                self.assertEqual(request(address, "/").status, want)
                self.assertEqual(request(address, "/", "GET", digest(address, "/")).status, 200)

    @needs("openssl")
    def test_what_a_network_reads_is_told_once(self) -> None:
        """One warning for all addresses without TLS; its try: line makes a certificate that is taken."""
        self.serve("--bind", "0.0.0.0:0", "--bind", ":0", "--bind", "127.0.0.1:0")
        said = self.logged(r"warning: (a network reaches .+), without TLS: Basic is off there.*\ntry: (.+)   # .*(--.+)\n")
        self.assertEqual(len(said), 1)
        self.assertEqual(len(re.findall(r"http://", said[0][0])), 2)
        self.assertEqual(read(self.box.output).count("try:"), 1)
        run(["sh", "-c", "cd %s && %s" % (shlex.quote(self.box.folder), said[0][1])], 0)
        self.box.kill(self.box.server)
        at = self.serve("--bind", "0.0.0.0:0", "--tls-cert", self.box.path(said[0][2].split()[1]))
        self.assertTrue(at)
        self.assertNotIn("try:", read(self.box.output))

    def test_a_unix_socket_is_replaced_when_nobody_listens(self) -> None:
        """A socket file of a dead server is no obstacle, one of a living server is."""
        place = "unix:" + self.box.path("sock")
        self.serve("--bind", place)
        self.assertIn("unable to bind unix:", run(self.argv("--bind", place), 1).err)
        self.box.kill(self.box.server)
        self.box.launch(*self.argv("--bind", place))
        self.assertEqual(request(place, "/", "GET", "").status, 401)

    def test_mistakes_are_named(self) -> None:
        """Exit 2 for a wrong option, 1 for what cannot be bound; one line that says which."""
        precious = self.box.write("precious", "precious")
        for code, options, said in ((2, ["--bind", "x"], "x"), (2, ["--bind", "127.0.0.1:99999"], "99999"),
                (2, ["--nonsense"], "nonsense"), (2, ["--schemes", "tea"], "tea"),
                (2, ["--schemes", ""], "scheme"), (2, ["--schemes", "digest,tea"], "tea"),
                (2, ["--schemes", "basic,basic"], "basic"), (2, ["--realm", 'a"b'], "realm"),
                (2, ["--max-failures", "x"], "max-failures"), (2, ["--trusted-proxy", "x"], "proxy"),
                (2, ["--nonce-lifetime", "0"], "nonce-lifetime"),
                (2, ["--stream-threads", "0"], "stream-threads 0: expected at least 1"),
                (2, ["--stream-threads", "-1"], "stream-threads"), (2, ["--public", "x"], "public"),
                (2, ["--forward-auth", "x"], "answer at x"),
                (2, ["--nonce-lifetime", "nan"], "nonce-lifetime"), (2, ["--allow-partial"], "partial"),
                (2, ["--bind", "x" * 64 + ":0"], "unable to bind"), (2, ["--root", "\x1b[31m"], "\\x1b[31m"),
                (1, ["--bind", "unix:" + precious], "unable to bind unix:"),
                (1, ["--bind", self.serve()], "unable to bind 127.0.0.1:")):
            with self.subTest(options):
                found = told(*self.argv(*options)[2:])
                self.assertEqual(found[0], code)
                self.assertIn(said, found[1])
        self.assertEqual(read(precious), "precious")
        self.assertRegex(run([PYTHON, AUTHSERVER], 2).err, "try: .*authserver.py passwd")

    def test_forwarded_addresses_are_believed_from_trusted_proxies_only(self) -> None:
        """X-Forwarded-For stands in the log when its sender is trusted, else not."""
        for options, shown in ((["--trusted-proxy", "127.0.0.0/8"], "192.0.2.7 - jim"), ([], "127.0.0.1 - jim")):
            with self.subTest(options):
                request(self.serve(*options), "/x", "GET", JIM, "X-Forwarded-For: 192.0.2.7")
                self.logged(shown)
                self.box.kill(self.box.server)

    def test_a_locked_out_address_is_told_429_also_with_the_right_password(self) -> None:
        """After N wrong passwords the address waits, even for heads that were right before."""
        at = self.serve("--trusted-proxy", "127.0.0.1", "--max-failures", "3/60")
        said = [request(at, "/", "GET", auth, "X-Forwarded-For: 192.0.2.7").status
                for auth in [JIM] * 4 + [WRONG] * 3 + [JIM, ""]]
        self.assertEqual(said, [200] * 4 + [401] * 3 + [429, 401])
        self.assertEqual(request(at).status, 200)

    def test_the_log_has_one_word_per_column(self) -> None:
        """The attempted name for wrong credentials, `-` for none, one word whatever it is; unix sockets too."""
        at = self.serve("--bind", "unix:" + self.box.path("sock"))
        for user in ("jim", "a b\"", "ü\u2028", "", "-", " "):
            request(at, "/", "GET", basic(user, "wrong"))
        request(at, "/", "GET", "")
        request("unix:" + self.box.path("sock"), "/")
        lines = self.logged(r'(?m)^(\S+) - (\S+) \[.*\] "GET / HTTP/1.1" (\d+) ', 8)
        users = [user for _, user, _ in lines]
        self.assertEqual(users[:3] + users[6:], ["jim", "a%20b%22", "%C3%BC%E2%80%A8", "-", "jim"])
        self.assertEqual(len(set(users[:6])), 6)
        self.assertNotIn("-", users[3:6])
        self.assertRegex(lines[7][0], r"^(-|[0-9.:a-f]+)$")
        self.logged("refused jim: bad password")

    def test_TERM_and_INT_end_it(self) -> None:
        """SIGTERM, and Ctrl-C, end it with exit status 0 and the last line in the log."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                self.assertEqual(request(self.serve(), "/last").status, 404)
                self.box.server.send_signal(number)
                self.assertEqual(self.box.server.wait(PATIENCE), 0)
                self.assertIn("GET /last", read(self.box.output))
                remove(self.box.output)

    @needs_crypt
    def test_a_slow_hash_is_verified_beside_the_loop(self) -> None:
        """A $6$ entry lets in and keeps out; where Digest is offered it is refused at start."""
        text = "jim:%s\n" % crypted("secret", "$6$rounds=1000$saltsalt$")
        options = ["--passwords", self.box.write("hashed", text, 0o600)]
        at = self.box.serve(*options, "--schemes", "basic")
        self.assertEqual([request(at, "/", "GET", auth).status for auth in (JIM, WRONG, JIM)], [200, 401, 200])
        self.assertRegex(run([PYTHON, AUTHSERVER] + options, 2).err,
                         "line 1: user 'jim' .*cannot answer Digest MD5")

    def test_passwords_may_come_from_standard_input(self) -> None:
        """--passwords - reads the dictionary from a pipe."""
        with open(self.passwords(), "rb") as pipe:
            at = self.box.serve("--passwords", "-", stdin=pipe)
        self.assertEqual(request(at, "/").status, 200)

    @needs_linux
    def test_a_log_that_cannot_be_written_stops_nothing(self) -> None:
        """With the access log on a full disk it serves on, and says how many lines were lost once it can."""
        port = free_port()
        with open("/dev/full", "wb") as full:
            self.box.spawn(*self.argv("--bind", "127.0.0.1:%d" % port), stdout=full)
        at = "127.0.0.1:%d" % port
        until(lambda: not reach(at), "a server")
        self.assertEqual([request(at, "/").status for _ in range(3)], [200] * 3)
        self.assertEqual(request(at, "/", "GET", WRONG).status, 401)
        self.logged(r"authserver: warning: \d+ lines of the log lost\n")

    @needs_linux
    def test_at_the_limit_of_files_the_oldest_idle_connections_make_room(self) -> None:
        """With 300 connections on 100 descriptors new clients are served, and no CPU is burnt."""
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
        """The file of a first start is removed by abandon(), and when bind() itself fails."""
        path = self.box.path("x.passwords")
        with taken_port() as port:
            for options, fails in ((["--bind", "127.0.0.1:0"], False), (["--bind", "127.0.0.1:%d" % port], True)):
                given = contract(options, may_create=True, config_prefix=self.box.path("x."))
                if fails:
                    self.assertRaises(Refusal, authserver.bind, given)
                else:
                    server = authserver.bind(given)
                    self.assertIn("password: ", server.greeting)
                    self.assertTrue(os.path.exists(path))
                    server.abandon()
                    server.server_close()
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

    @classmethod
    def set_up(cls) -> None:
        cls.tree = {"a b.txt": 10, "sub/ü.bin": 3000000, "sub/deep/small": 1, "open/free": 5, "index/index.html": 7}
        for name, size in cls.tree.items():
            path = cls.box.path("tree", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(Random(name).getrandbits(8 * size).to_bytes(size, "big"))
            os.utime(path, (OLD, OLD))      # a young file has another tag a moment later
        super().set_up()

    tree: Dict[str, int]

    def content(self, name: str) -> bytes:
        """Return what is in a file."""
        with open(self.box.path("tree", name), "rb") as file:
            return file.read()

    def test_answers_over_a_socket(self) -> None:
        """A file, parts of it, HEAD, a listing, a redirection; 401 alike for what exists and what does not."""
        with Wire(self.at) as wire:
            whole = wire.ask("/sub/%C3%BC.bin")
            self.assertEqual((whole.status, whole.body), (200, self.content("sub/ü.bin")))
            part = wire.ask("/sub/%C3%BC.bin", "GET", JIM, "Range: bytes=1000-2499999")
            self.assertEqual((part.status, part.body), (206, whole.body[1000:2500000]))
            again = wire.ask("/sub/%C3%BC.bin", "GET", JIM, "If-None-Match: " + str(whole.field("ETag")), body=False)
            self.assertEqual(again.status, 304)
            self.assertEqual(wire.ask("/sub/%C3%BC.bin", "HEAD", body=False).field("Content-Length"), "3000000")
            self.assertEqual(wire.ask("/sub").field("Location"), "/sub/")
            self.assertIn(b'href="deep/"', wire.ask("/sub/").body)
            self.assertEqual(wire.ask("/open/free", "GET", "").body, self.content("open/free"))
            refused = [wire.ask(path, "GET", "") for path in ("/a%20b.txt", "/nothing")]
        self.assertEqual(*[(one.status, one.body, len(one.fields)) for one in refused])

    @needs_crypt
    def test_files_that_are_asked_for_ahead_leave_one_after_the_other(self) -> None:
        """While the first waits for a slow hash, the next waits as well: no file is sent in another's place."""
        line = "jim:%s\n" % crypted("secret", "$6$rounds=1000$saltsalt$")
        passwords = Passwords(None, "files", authserver.parse_passwords(line, "files")[0])
        server = authserver.AuthServer(("127.0.0.1", 0), authserver.Files(self.box.path("tree")),
                                       authenticator=Authenticator(passwords, schemes=("basic",)))
        with serving(server) as address:
            said = talk(address, head("/sub/%C3%BC.bin") + head("/a%20b.txt", "GET", JIM, CLOSE), True)
        pieces = [self.content(name) for name in ("sub/ü.bin", "a b.txt")]
        self.assertEqual([said.count(piece) for piece in pieces], [1, 1])
        self.assertLess(said.index(pieces[0]), said.index(pieces[1]))

    @needs("curl")
    def test_curl_resumes(self) -> None:
        """curl -C - gets the rest of a file that was cut."""
        part = self.box.path("part")
        with open(part, "wb") as file:
            file.write(self.content("sub/ü.bin")[:1234567])
        run(["curl", "-sf", "-C", "-", "-u", "jim:secret", "-o", part, "http://%s/sub/%%C3%%BC.bin" % self.at], 0)
        with open(part, "rb") as file:
            self.assertEqual(file.read(), self.content("sub/ü.bin"))

    @needs("wget")
    def test_wget_mirrors(self) -> None:
        """wget -r finds every file by the listings, and its bytes are equal."""
        run(["wget", "-q", "-r", "-np", "-nH", "--user=jim", "--password=secret", "-P", self.box.make("mirror"),
             "http://%s/" % self.at])
        for name in self.tree:
            with open(self.box.path("mirror", name), "rb") as file:
                self.assertEqual(file.read(), self.content(name), name)

    @needs_linux
    def test_a_secret_below_the_root_is_not_served(self) -> None:
        """The password file in the folder is a warning at start, and 404."""
        passwords = self.box.write("tree/users", "jim:plain:secret\n", 0o600)
        at = self.box.launch(PYTHON, AUTHSERVER, "--bind", "127.0.0.1:0", "--passwords", passwords, "--root",
                             self.box.path("tree"))
        self.assertEqual(request(at, "/users").status, 404)
        self.assertNotIn(b"users", request(at, "/").body)
        self.assertRegex(self.log(), "warning: .*users")
        os.unlink(passwords)


# -- 2.9 The clients and hosts of other people ---------------------------------
#
# Each is skipped where it is not installed.  PEER_PYTHON names a Python that
# has requests, httpx, aiohttp, waitress and gunicorn (.ci/run makes one).

PEER_PYTHON = os.environ.get("PEER_PYTHON") or sys.executable
PYTHON_CLIENTS = {
    "requests": '''
import requests, requests.auth
kinds = {"digest": requests.auth.HTTPDigestAuth, "basic": requests.auth.HTTPBasicAuth}
with requests.Session() as session:
    session.auth = kinds[kind](user, password)
    answers = [session.get(url) for _ in range(3)]
''',
    "httpx": '''
import httpx
kinds = {"digest": httpx.DigestAuth, "basic": httpx.BasicAuth}
with httpx.Client(auth=kinds[kind](user, password)) as session:
    answers = [session.get(url) for _ in range(3)]
''',
    "aiohttp": '''
import aiohttp, asyncio, collections
Answer = collections.namedtuple("Answer", "status_code text")
async def main():
    options = ({"middlewares": (aiohttp.DigestAuthMiddleware(user, password),)} if kind == "digest"
               else {"auth": aiohttp.BasicAuth(user, password)})
    async with aiohttp.ClientSession(**options) as session:
        async def ask():
            async with session.get(url) as answer:
                return Answer(answer.status, await answer.text())
        return [await ask()] + await asyncio.gather(*[ask() for _ in range(20)])
answers = asyncio.run(main())
''',
    "urllib": '''
import collections, urllib.request
Answer = collections.namedtuple("Answer", "status_code text")
manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
manager.add_password(None, url, user, password)
kinds = {"digest": urllib.request.HTTPDigestAuthHandler, "basic": urllib.request.HTTPBasicAuthHandler}
opener = urllib.request.build_opener(kinds[kind](manager), urllib.request.ProxyHandler({}))
try:
    answers = [Answer(200, opener.open(url, timeout=9).read().decode()) for _ in range(3)]
except urllib.error.HTTPError as error:
    answers = [Answer(error.code, "")]
'''}
PERL = '''
use LWP::UserAgent; my ($url, $user, $password) = @ARGV;
my $agent = LWP::UserAgent->new(timeout => 10); my ($host) = $url =~ m{//([^/]+)};
$agent->credentials($host, "authserver", $user, $password);
my $answer = $agent->get($url); print $answer->code, " ", $answer->decoded_content;
'''
COMMANDS = [  # URL and PASSWORD stand for themselves
    ["curl", "-s", "-u", "jim:PASSWORD", "--basic", "URL"], ["curl", "-s", "-u", "jim:PASSWORD", "--digest", "URL"],
    ["curl", "-s", "-u", "jim:PASSWORD", "--anyauth", "URL"],
    ["wget", "-q", "-O", "-", "--user=jim", "--password=PASSWORD", "URL"],
    ["perl", "-e", PERL, "URL", "jim", "PASSWORD"]]


@functools.lru_cache(maxsize=None)
def peer_has(module: str) -> bool:
    """Tell whether PEER_PYTHON can import a module."""
    return run([PEER_PYTHON, "-c", "import " + module]).code == 0


def browse(box: Box, url: str) -> str:
    """Return the page that Chromium makes of an URL."""
    argv = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
            "--user-data-dir=" + box.path("profile")]
    page = run(argv + [url], env=box.env).out
    if not page and "hello" not in run(argv + ["data:text/html,hello"], env=box.env).out:
        raise unittest.SkipTest("needs a Chromium that starts")
    return page


class RealClients(HttpTest):
    """Programs that people use get in with the right password, and only with it"""

    @property
    def url(self) -> str:
        """Return the address of the example."""
        return "http://%s/example/foo" % self.at

    def test_python_clients(self) -> None:
        """urllib, requests, httpx and aiohttp (20 requests at once), each with Digest and with Basic."""
        for name, kind in [(name, kind) for name in PYTHON_CLIENTS for kind in ("digest", "basic")]:
            if (name, kind) == ("urllib", "basic"):
                continue  # it reads the first challenge only, which is Digest
            with self.subTest("%s %s" % (name, kind)):
                if not peer_has(name):
                    self.skipTest("needs " + name)
                code = ("import sys\nurl, kind, user, password = sys.argv[1:]\n" + PYTHON_CLIENTS[name]
                        + "print({answer.status_code for answer in answers}, answers[-1].text)\n")
                argv = [PEER_PYTHON, "-c", code, self.url, kind, "jim"]
                self.assertRegex(run(argv + ["secret"], 0).out, r"(?s)^\{200\} .*for jim")
                self.assertRegex(run(argv + ["wrong"], 0).out, r"^\{401\} ")

    def test_commands(self) -> None:
        """curl in each way, wget, and LWP, which the scripts of many an old box use."""
        for argv in COMMANDS:
            with self.subTest(" ".join(argv[:-1])[:40]):
                if not shutil.which(argv[0]) or argv[0] == "perl" and run(
                        ["perl", "-MLWP::UserAgent", "-e", "1"]).code:
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

    @needs("chromium")
    def test_a_browser(self) -> None:
        """Chromium, which is offered Digest and Basic, shows the page."""
        said = browse(self.box, self.url.replace("//", "//jim:secret@"))
        self.assertIn("This is foo, for jim.", said)

    @needs("ab")
    def test_ab(self) -> None:
        """ApacheBench, which speaks HTTP/1.0 with keep-alive."""
        said = run(["ab", "-q", "-k", "-n", "200", "-c", "4", "-A", "jim:secret", self.url], 0).out
        self.assertRegex(said, r"Failed requests: +0\n")
        self.assertRegex(said, r"Keep-Alive requests: +200\n")
        self.assertNotIn("Non-2xx", said)

    @needs("fail2ban-regex")
    def test_fail2ban_bans_whom_it_should(self) -> None:
        """The stock filter traefik-auth matches wrong credentials, whatever name, and no first challenge."""
        for auth in (JIM, WRONG, basic("a b", "wrong"), basic("", "x"), ""):
            request(self.at, "/banned", "GET", auth)
        log = self.box.write("banned.log", "".join(self.logged(".*/banned.*\n", 5)))
        said = run(["fail2ban-regex", log, "traefik-auth"], 0).out
        self.assertRegex(said, r"Failregex: 3 total")


class RealHosts(BoxTest):
    """protect_wsgi() under the WSGI servers that people use, with several processes and no option"""

    HOSTS = {"gunicorn": "-m gunicorn -w 4 -b ADDRESS --log-level error app",
        "waitress": "-m waitress --listen=ADDRESS app:application",
        "cheroot": "-m cheroot --bind ADDRESS app:application",
        "uwsgi": "--http-socket ADDRESS --lazy-apps --processes 3 --master --wsgi-file app.py --disable-logging --die-on-term"}

    def log_in(self, address: str) -> List[int]:
        """Log in forty times, each time with a challenge of its own; then send each proof again."""
        fields = [digest(address, "/a%2Cb?c") for _ in range(40)]
        fresh = [request(address, "/a%2Cb?c", "GET", field, CLOSE).status for field in fields]
        again = [request(address, "/a%2Cb?c", "GET", field, CLOSE).status for field in fields]
        return [fresh.count(200), again.count(401)]

    def test_forty_of_forty(self) -> None:
        """All log-ins succeed, no proof is good twice; a large refused body reads its 401; a chunked one is skipped."""
        for name, words in self.HOSTS.items():
            with self.subTest(name):
                program = [os.path.join(os.path.dirname(PEER_PYTHON), "uwsgi")] if name == "uwsgi" else [PEER_PYTHON]
                if not os.path.exists(program[0]) or name != "uwsgi" and not peer_has(name):
                    self.skipTest("needs " + name)
                self.box.write("app.py", "import sys\nsys.path.insert(0, %r)\nfrom authserver import *\n"
                               "def hello(e, start):\n    start('200 OK', [('Content-Length', '2')])\n    return [b'ok']\n"
                               "application = protect_wsgi(hello, Passwords({'jim': 'secret'}, realm='files'))\n"
                               % HERE)
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", 0))
                    address = "127.0.0.1:%d" % sock.getsockname()[1]
                server = self.box.spawn(*program, *words.replace("ADDRESS", address).split(), cwd=self.box.folder)
                self.addCleanup(server.wait)
                self.addCleanup(server.terminate)
                until(lambda: reach(address) is None, name, 15)
                self.assertEqual(self.log_in(address), [40, 40])
                with contextlib.closing(http.client.HTTPConnection(address, timeout=30)) as client:
                    client.request("POST", "/", b"0" * 50000000)
                    self.assertEqual(client.getresponse().status, 401)
                inner = head("/", "GET", "", EMPTY)
                said = talk(address, head("/", "POST", "", "Transfer-Encoding: chunked")
                            + b"%x\r\n%s\r\n0\r\n\r\n" % (len(inner), inner), True)
                self.assertEqual(statuses(said), [401])


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
    folder = "/proc/%d/fd/" % pid
    return [os.readlink(folder + fd) for fd in sorted(os.listdir(folder), key=int)]


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


class CommandLine(BoxTest):
    """The command line of daemonize.py"""

    def refused(self, *argv: str, **keys: Any) -> Result:
        """Run a command that must be refused as usage, with nothing made."""
        before = set(os.listdir(self.box.folder)) | {"__pycache__"}
        result = self.box.daemonize(*argv, want=2, **keys)
        self.assertLessEqual(set(os.listdir(self.box.folder)), before)
        self.assertNotIn("Traceback", result.err)
        return result

    def test_every_action_has_help(self) -> None:
        """-h on each names the daemon's options; that of start the application's, too, and defaults."""
        app = self.box.write("app.py", APP)
        of_start = ("--word --bind --uid --gid --umask --chroot --rundir --logfile --workers --start-timeout "
                    "--log-bytes --log-keep --quiet --app 027").split()
        for action in ("start", "stop", "restart", "reload", "status", "run"):
            text = self.box.daemonize(action, "--app", app, "-h").out
            for word in ["--pidfile", "--name", "--timeout"] + of_start * (action == "start"):
                with self.subTest(action, word=word):
                    self.assertIn(word, text)

    def test_a_wrong_command_line_is_refused_before_anything_happens(self) -> None:
        """Typos, abbreviations and impossible values in either half: exit status 2, nothing made."""
        app = ["start", "--app", self.box.write("app.py", APP), "--pidfile", "d.pid", "--logfile", "d.log"]
        for wrong in ("", "begin", "APP --pidfle x", "APP --wrod x", "APP --wor x", "APP --umask 9", "APP stray",
                      "APP --name a/b", "APP --workers -1", "APP --timeout soon", "APP --log-keep many", "APP @none"):
            with self.subTest(wrong):
                self.refused(*(one for word in wrong.split() for one in (app if word == "APP" else [word])))
        for wrong, words in (("", "no COMMAND after --"), ("--word x -- sleep 9", "unrecognized arguments: --word x")):
            self.assertIn(words, self.refused("start", "--pidfile", "d.pid", *(wrong or "--").split()).err)

    def test_options_can_stand_in_a_file(self) -> None:
        """@FILE reads options from FILE: shell quoting, # comments, UTF-8."""
        options = self.box.write(os.fsdecode(b"opti\xc3\xb6ns"), "# the word\n--word 'two wörds'  # of them\n--umask\n077\n")
        result = self.box.start("@" + options, app=APP)
        self.assertEqual(self.box.status()["word"], "two wörds")
        self.assertEqual(ask(self.box.address(result))["umask"], 0o077)

    def test_one_options_file_serves_all_verbs(self) -> None:
        """stop, status and reload pass over options that are not theirs, and import no application."""
        options = self.box.write("options", "--pidfile d.pid --word x --uid 12 --unheard-of y\n"
                                            "--app broken.py --workers 3")
        self.box.write("broken.py", "import no_such_module")
        for action, status in (("status", 3), ("stop", 0), ("reload", 3)):
            with self.subTest(action):
                self.assertNotIn("Traceback", self.box.daemonize(action, "@" + options, want=status).err)

    def test_foreign_text_is_printed_escaped(self) -> None:
        """A control character in a name cannot reach the terminal through a message."""
        for action in ("start", "status", "stop"):
            result = self.box.daemonize(action, "--pidfile", "x/\x1b[31mred.pid", "--logfile", "l",
                                        "--app", "\x1b[31mred.py", want=None)
            self.assertNotIn("\x1b", result.out + result.err, action)
            self.assertNotIn("Traceback", result.err, action)
        self.assertIn("\\x1bred", self.box.daemonize("start", "--app", "\x1bred.py", want=None).err)

    def test_messages_never_fail_on_encoding(self) -> None:
        """In an empty environment (ASCII) a name with an umlaut is still named in one clear line."""
        result = self.box.daemonize("start", "--pidfile", os.fsdecode(b"n\xc3\xb6/d.pid"), "--logfile",
                                    "log", "--app", self.box.write("app.py", APP), env={}, want=1)
        self.assertRegex(result.err, "^daemonize: fatal: unable to .*n\u00f6")
        self.assertNotIn("Traceback", result.err)

    def test_a_user_that_it_cannot_be(self) -> None:
        """No such name; 2^32 - 1, which means "leave it" to the kernel, or more; for an ordinary user root."""
        numbers = ["--gid 4294967295", "--gid 4294967296", "--uid 4294967295", "--uid 4294967295 --gid 1",
                   "--uid %s --gid 1" % ("9" * 30)]
        for options in ["--uid no-such-name", "--gid no-such-name"] + (numbers if ROOT else ["--uid 0"]):
            with self.subTest(options):
                said = self.box.start(*options.split(), app=APP, want=1).err
                self.assertRegex(said, r"\Adaemonize: fatal: unable to switch to [^\n]+\n(try: .*\n)?\Z")
                self.assertIn("no-such-name" * (options[-1] == "e"), said)
        self.assertEqual(self.box.processes(), [])

    def test_help_and_version(self) -> None:
        """-h without an action is the help of start; --version says it, with and without an action."""
        self.assertIn("authserver.py", self.box.daemonize("-h").out)
        for argv in (["--version"], ["stop", "--version"]):
            self.assertRegex(self.box.daemonize(*argv).out, r"\Adaemonize\.py \d+\.\d+\n\Z")

    def test_a_name_is_a_files_name(self) -> None:
        """No folder, no blank, nothing that a shell minds; nor a number that is none."""
        for name in (".", "..", "...", "", "a b", "a/b", "a\n", "\u00e9", "$x"):
            with self.subTest(name):
                self.assertIn("unable to name it", self.refused("start", "--pidfile", "d.pid", "--name", name, "--", "sleep", "9").err)
        for word in ("--timeout=nan", "--timeout=-1", "--timeout=inf", "--start-timeout=1e7", "--workers=0", "--workers=1025",
                     "--umask=1000", "--log-bytes=-1", "--log-keep=1001"):
            with self.subTest(word):
                self.assertIn("invalid number value", self.refused("start", "--pidfile", "d.pid", word, "--", "sleep", "9").err)

    def test_a_script_is_a_program(self) -> None:
        """--app of what has no top-level bind: refused before it runs, with the line that runs it."""
        files = ["start", "--pidfile", "d.pid", "--logfile", "l", "--app"]
        script, other = "try: daemonize.py start -- python3 %s\n", "%s: its bind is no function"
        for text, words in (("open('a', 'w')\n", script), ("def f():\n    bind = 1\n", script), ("bind = 'x'\n", other),
                            ("import socket\nsocket.socket().bind(('127.0.0.1', 0))\n", script),
                            ("bind: int = 3\n", other), ("if True:\n    bind = (1, 2)\n", other)):
            with self.subTest(text):
                app = self.box.write("app%d.py" % len(text), text)
                self.assertIn(words % app, self.refused(*files, app).err)
        self.box.write("app0.py", APP)
        attempt = "try:\n    from nowhere import bind\nexcept ImportError:\n    def bind(options): return"
        for text in ("from app0 import *\n", APP.replace("def bind(options):\n    return", attempt)):
            self.box.daemonize(*files, self.box.write("app1.py", text))
            self.box.command("stop")

    def test_a_foreign_word_that_was_typed_is_refused(self) -> None:
        """stop, status, reload and a bare restart: a stray word gets the --name that was meant; @FILE may have any."""
        self.box.start(app=APP)
        self.box.write("o", "--pidfile d.pid --unheard-of y stray")
        for action in ("stop", "status", "reload"):
            for word, cure in (("hello", "try: daemonize.py %s --name hello\n" % action), ("--bind=:1", "try: daemonize.py -h\n")):
                self.assertIn(cure, self.refused(action, "--pidfile", "d.pid", word).err)
        for action in ("status", "reload", "stop"):
            self.box.daemonize(action, "@o")

    def test_a_pipe_of_options_is_read_once(self) -> None:
        """@FILE of a pipe works, for the application's options too; a restart has the same; a file is read again."""
        argv = self.box.argv("start", "--logfile", self.box.log, "--app", self.box.write("app.py", APP))
        self.box.write("o", "--umask 077")
        script = 'exec "$0" "$@" @/dev/fd/5 @o 5<<E\n--word "from # a pipe"#1 # no word\nE\n'
        run(["sh", "-c", script, *argv], 0, env=self.box.env, cwd=self.box.folder)
        self.assertEqual(self.box.status()["word"], "from # a pipe#1")
        self.box.write("o", "--umask 007")
        self.box.command("restart")
        self.assertEqual((self.box.status()["word"], ask(self.box.address())["umask"]), ("from # a pipe#1", 0o007))

    def test_the_name_is_that_of_what_is_hosted(self) -> None:
        """The program's, the FILE's of an interpreter, else --name; a name in use by another program is exit 1."""
        rows = {"-- /bin/sleep 9": "sleep", "-- python3 -u x/b.py c": "b", "-- sh run.sh": "run", "-- sh -c x": "sh",
                "-- python3.9 -m a": "python3", "--name n -- perl a.pl": "n", "-- node srv.js": "srv"}
        said = self.box.python("for words in sys.argv[1:]:\n    print(daemonize.parse(['start', '--pidfile=p', "
                               "'--logfile=l'] + words.split()).name)\n", *rows).out
        self.assertEqual(said.split(), list(rows.values()))
        one, two = (self.box.write(name, "import time\ntime.sleep(600)\n") for name in ("one.py", "two.py"))
        self.box.start("--name", "n", "--", PYTHON, one)
        said = self.box.start("--name", "n", "--", PYTHON, two, want=1).err
        self.assertRegex(said, r"held by pid %d, which hosts .*one\.py\ntry: --name\n\Z" % self.box.pid())
        said = self.box.start("--name", "n", "--umask", "0", "--", PYTHON, one).out
        self.assertRegex(said, r"already running with pid %d\n.*\ntry: daemonize\.py restart .*--umask 0 -- " % self.box.pid())
        for action, want in (("status", 0), ("stop", 0), ("status", 3), ("stop", 0)):
            result = self.box.command(action, want=want)    # neither is "authserver" for another's pidfile
            self.assertNotIn("authserver", result.out + result.err)


class Start(SharedBoxTest):
    """A daemon after `start` by a careless parent (signals ignored and blocked, descriptors open)"""
    leak: bool
    before: Tuple[str, float]  # the pidfile's text, and when it was written
    address: str
    facts: Dict[str, Any]
    pid: int

    @classmethod
    def set_up(cls) -> None:
        """Start APP from a parent that ignores and blocks signals and has descriptor 9 open."""
        def careless() -> None:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD])
            os.umask(0)
        reader, writer = os.pipe()
        cls.address = cls.box.host("--word", "hello", pass_fds=[writer], preexec_fn=careless)
        os.close(writer)
        cls.leak = not select.select([reader], [], [], 0)[0]
        os.close(reader)
        cls.before = read(cls.box.pidfile), os.stat(cls.box.pidfile).st_mtime
        cls.facts, cls.pid = ask(cls.address), cls.box.pid()

    def test_the_files_have_their_modes_under_any_umask(self) -> None:
        """pidfile 0644, log 0640, everything else 0600, though the caller's umask was 0."""
        modes = {name: os.stat(self.box.path(name)).st_mode & 0o7777 for name in os.listdir(self.box.folder)}
        self.assertEqual((modes.pop("d.pid"), modes.pop("d.log")), (0o644, 0o640))
        self.assertEqual({modes[name] & 0o777 for name in set(modes) - {"app.py", "__pycache__"}}, {0o600})

    def test_the_pidfile_is_complete_when_start_returns(self) -> None:
        """The pidfile holds the daemon's pid and a newline when start returns."""
        self.assertEqual(self.before[0], "%d\n" % self.facts["pid"])

    def test_daemon_and_worker_lead_groups_but_no_session(self) -> None:
        """Each leads a group of its own in one session that has no leader and no terminal; the parent is gone."""
        self.assertEqual((os.getpgid(self.pid), self.facts["pgid"]), (self.pid, self.facts["worker"]))
        self.assertEqual(os.getsid(self.pid), self.facts["sid"])
        self.assertNotIn(self.facts["sid"], [os.getsid(0), self.pid, self.facts["worker"]])
        self.assertFalse(self.facts["tty"] or is_alive(self.facts["sid"]))
        self.assertNotEqual(parent(self.pid), os.getpid())

    def test_nothing_of_the_callers_is_left(self) -> None:
        """In /, umask 027, no signal blocked or ignored, /dev/null and the log; no pipe (cron would wait) or folder."""
        facts, fds = self.facts, self.facts["fds"]
        self.assertEqual((facts["cwd"], facts["umask"], facts["blocked"], self.leak), ("/", 0o027, [], False))
        self.assertEqual(set(facts["ignored"]) & {signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}, set())
        self.assertNotIn("folder", fds.values())    # one would undo a jail
        if LINUX:
            self.assertEqual([fds[number] for number in "012"], ["/dev/null", self.box.log, self.box.log])

    @needs_linux
    def test_the_lock_is_the_daemons_to_read(self) -> None:
        """The daemon has its lock open once, and cannot write it; a worker has neither lock nor pidfile."""
        files = "/proc/%d/fd/" % self.pid
        lock, = [fd for fd in os.listdir(files) if os.readlink(files + fd) == self.box.pidfile + ".lock"]
        flags = re.findall(r"flags:\s+(\d+)", read("/proc/%d/fdinfo/%s" % (self.pid, lock)))
        self.assertEqual(int(flags[0], 8) & os.O_ACCMODE, os.O_RDONLY)
        self.assertEqual([name for name in self.facts["fds"].values() if name.startswith(self.box.pidfile)], [])

    @needs_linux
    def test_a_worker_has_no_end_of_the_daemons(self) -> None:
        """Its listener, a pair of its own, this connection, its channel: nobody waits for an EOF that it keeps."""
        self.assertEqual(sum("socket:" in name for name in self.facts["fds"].values()), 5)

    @needs_linux
    def test_the_log_is_open_but_twice(self) -> None:
        """As stdout and stderr, in daemon and worker: a third descriptor would keep the space of a log that is gone."""
        for names in (fds_of(self.pid), list(self.facts["fds"].values())):
            self.assertEqual((names.count(self.box.log), names.count("/dev/null")), (2, 1))

    def test_start_again_says_so_and_changes_nothing(self) -> None:
        """A second start: exit status 0, "already running with pid N", the same daemon; silent with --quiet."""
        self.assertIn("already running with pid %d" % self.pid, self.box.start(app=APP).out)
        self.assertEqual((read(self.box.pidfile), os.stat(self.box.pidfile).st_mtime), self.before)
        self.assertEqual(ask(self.address)["pid"], self.pid)
        self.assertEqual(self.box.start("--quiet", app=APP)[1:3], ("", ""))

    def test_status_is_for_a_person(self) -> None:
        """First line: name, pid, uptime, addresses; then a row each for user, workers, log, what else is known."""
        first, *rows = self.box.command("status").out.splitlines()
        self.assertRegex(first, r"\Aapp is running: pid %d, up \d+ s, on %s\Z" % (self.pid, re.escape(self.address)))
        facts = dict(re.split(r"  +", row.strip(), 1) for row in rows)
        self.assertEqual(len({row.index(value) for row, value in zip(rows, facts.values())}), 1, "aligned")
        self.assertEqual((facts["word"], facts["workers"], facts["restarts"], facts["log"]),
                         ("hello", str(self.facts["worker"]), "0", self.box.log))
        self.assertEqual(facts["user"], "%s (%d)" % (pwd.getpwuid(os.getuid()).pw_name, os.getuid()))

    def test_status_is_json_for_programs(self) -> None:
        """status --json, from an empty environment: pid, uid, uptime, what start printed, what the application says."""
        report = json.loads(self.box.command("status", "--json", env={}, cwd="/").out)
        self.assertEqual([report[name] for name in ("pid", "uid", "word", "addresses")],
                         [self.pid, os.getuid(), "hello", [self.address]])
        self.assertLess(report["uptime"], 60)


class Starting(BoxTest):
    """Ways to call `start`"""

    def test_start_is_quick_with_a_high_limit_of_descriptors(self) -> None:
        """RLIMIT_NOFILE of a million (or what is allowed) does not slow start down."""
        def raise_limit() -> None:
            for limit in (1000000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
                with contextlib.suppress(ValueError, OSError):
                    return resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        result = self.box.start(app=APP, preexec_fn=raise_limit)
        self.assertLess(result.seconds, SOON)
        self.assertEqual(ask(self.box.address(result))["pid"], self.box.pid())

    @needs_linux
    def test_start_with_closed_streams_does_no_harm(self) -> None:
        """Any of descriptors 0, 1 and 2 closed at start: they are /dev/null and the log, also in a program."""
        app = self.box.write("app.py", APP)
        code = "import sys, time; print('printed'); print('also', file=sys.stderr); time.sleep(600)"
        for number in range(8):
            closed = " ".join(text for bit, text in ((1, "<&-"), (2, ">&-"), (4, "2>&-")) if number & bit)
            for hosted in (["--app", app], ["--", PYTHON, "-c", code]):
                with self.subTest(closed + hosted[0]):
                    argv = self.box.argv("start", "--logfile", self.box.log, *hosted)
                    run(["sh", "-c", 'exec "$@" ' + closed, "sh"] + argv, 0, env=self.box.env)
                    self.assertRegex(read(self.box.pidfile), r"\A\d+\n\Z")
                    child, = [pid for pid in self.box.processes() if parent(pid) == self.box.pid()]
                    for pid in (child, self.box.pid()):
                        self.assertEqual(fds_of(pid)[:3], ["/dev/null"] + [self.box.log] * 2)
                    self.box.command("stop")
        self.assertEqual([read(self.box.log).count(word) for word in ("printed\n", "also\n")], [8, 8])

    def test_a_pipe_behind_start_ends_with_start(self) -> None:
        """`start | cat` and $(start) return at once: no process keeps the caller's streams."""
        argv = self.box.argv("start", "--logfile", self.box.log, "--app", self.box.write("app.py", APP))
        script = 'text=$("$@" 2>&1 | cat); echo "said: $text"'
        said = run(["sh", "-c", script, "sh"] + argv, 0, env=self.box.env)
        self.assertEqual(ask(self.box.address(said))["pid"], self.box.pid())

    def test_the_order_of_the_steps(self) -> None:
        """bind is root's, with the terminal; workers and probe are the user's, detached; the pid comes last."""
        steps = self.box.path("steps")
        app = APP + """
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
""" % (steps, self.box.pidfile, self.box.pidfile)
        self.box.start("--workers", "1", *AS_USER, app=app)
        until(lambda: read(steps).count("\n") == 3, "three notes")  # a worker may be slow to enter
        seen = [json.loads(line) for line in read(steps).splitlines()]
        uid, sid = NOBODY if ROOT else os.getuid(), os.getsid(self.box.pid())
        self.assertEqual(seen[:1], [["bind", os.getuid(), self.box.folder, os.getsid(0), ""]])
        self.assertEqual(sorted(note[:4] for note in seen[1:]), [["probe", uid, "/", sid], ["serve", uid, "/", sid]])
        self.assertEqual([note[4] for note in seen if note[0] == "probe"], [""])
        self.assertNotEqual(sid, os.getsid(0))
        self.assertEqual(read(self.box.pidfile), "%d\n" % self.box.pid())

    def test_the_callers_folder_is_no_place_for_modules(self) -> None:
        """Files named socket.py, json.py, typing.py in the current directory are never imported."""
        for name in ("socket", "json", "typing", "argparse", "marshal", "os", "traceback", "symtable", "authserver"):
            self.box.write(name + ".py", "open(%r, 'a').close()\nraise SystemExit(9)\n" % self.box.path("imported"))
        self.box.start("--", "sleep", "600")
        for action in ("status", "restart", "stop"):
            self.box.command(action)
        self.assertFalse(os.path.exists(self.box.path("imported")))

    def test_a_callers_folder_that_is_gone(self) -> None:
        """A caller whose working directory is gone can start and stop, and is told that d.pid means nothing."""
        start = self.box.argv("start", "--logfile", self.box.log, "--app", self.box.write("app.py", APP))
        refusal = "daemonize: fatal: unable to resolve d.pid: the current directory is gone\n"
        for argv, want, said in ((start, 0, ""), ([PYTHON, DAEMONIZE, "stop", "--pidfile", "d.pid"], 1, refusal),
                                 (self.box.argv("stop"), 0, "")):
            gone = self.box.make("gone")
            result = run(["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', gone, *argv], want, env=self.box.env)
            self.assertEqual((result.err, bool(self.box.pid())), (said, "stop" not in argv or want == 1))
        self.assertEqual(self.box.processes(), [])

    def test_relative_paths_are_the_callers(self) -> None:
        """Relative paths are resolved once against the caller's directory, whatever --rundir is."""
        self.box.write("app.py", APP)
        self.box.make("sub")
        result = self.box.daemonize("start", "--pidfile", "../d.pid", "--logfile", "../d.log", "--rundir",
                                    "../sub", "--app", "../app.py", cwd=self.box.path("sub"))
        self.assertEqual(ask(self.box.address(result))["cwd"], self.box.path("sub"))
        self.box.command("stop", cwd="/")
        self.assertEqual(sorted(set(os.listdir(self.box.folder)) & {"d.pid", "d.log"}), ["d.log"])

    @needs_linux
    def test_what_a_shell_left_open_is_closed(self) -> None:
        """Descriptors 3, 4 and 9 of the caller: in no daemon, worker or program."""
        file, app = self.box.write("file", ""), self.box.write("app.py", APP)
        for hosted in (["--app", app], ["--", "sleep", "600"]):
            run(["sh", "-c", 'exec "$@" 3<"$0" 4<"$0" 9<"$0"', file, *self.box.argv("start"), "--logfile", self.box.log] + hosted, 0, env=self.box.env)
            self.assertEqual([file in fds_of(pid) for pid in self.box.processes()], [False, False])
            self.box.command("stop")

    def test_an_application_may_write_to_closed_streams(self) -> None:
        """bind() uses sys.stdin, stdout and stderr, all of which the caller has closed."""
        app = self.box.write("app.py", APP + "def bind(options):\n    sys.stdout.write('x' + sys.stdin.read())\n    sys.stderr.write('y')\n    return Server(options)\n")
        run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *self.box.argv("start"), "--logfile", self.box.log, "--app", app], 0, env=self.box.env)

    def test_the_application_knows_our_own_files(self) -> None:
        """options.private_files: pidfile, lock, socket, and the log with each name that a rotation gives it."""
        app = APP + "def bind(options):\n    print(*options.private_files, sep='\\n', flush=True)\n    return Server(options)\n"
        said = self.box.start("--log-keep", "2", app=app).out.splitlines()
        self.assertEqual(said[:6], [self.box.pidfile + end for end in ("", ".lock", ".sock")]
                         + [self.box.log + end for end in ("", ".1", ".2")])

    def test_what_bind_makes_is_private(self) -> None:
        """A file that the import makes has --umask, and so has a worker's; one that bind() makes is 0600."""
        app = "made = lambda name: open(%r + name, 'w').close()\n" % self.box.path("made-")
        app += "made('import')\nwell = bind\ndef bind(options):\n    made('bind')\n    return well(options)\nServer.reload = lambda self: made('reload')\n"
        self.box.start("--umask", "002", app=APP + app)
        self.box.command("reload")
        modes = [os.stat(self.box.path("made-" + name)).st_mode & 0o777 for name in ("import", "bind", "reload")]
        self.assertEqual(modes, [0o664, 0o600, 0o664])

    def test_a_stop_is_obeyed_though_the_caller_blocked_its_signals(self) -> None:
        """A daemon started with TERM ignored and blocked ends on `stop` as quickly as any."""
        def careless() -> None:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        self.box.start(app=APP, preexec_fn=careless)
        pid = self.box.pid()
        self.assertTrue(is_alive(pid))
        self.assertLess(self.box.command("stop").seconds, SOON)
        self.assertFalse(is_alive(pid))

    @needs_home
    def test_the_default_files_depend_on_user_and_name_only(self) -> None:
        """Without --pidfile a login shell and `env -i` find the same daemon by its name."""
        name = self.own_name()
        pidfile, log = ("/run/%s.pid", "/var/log/%s/%s.log") if ROOT else (HOME + "/.%s/pid", HOME + "/.%s/log")
        pidfile, log = (path.replace("%s", name) for path in (pidfile, log))
        env = dict(self.box.env, **dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "TMPDIR"), self.box.folder))
        self.box.daemonize("start", "--name", name, "--app", self.box.write("app.py", APP), env=env)
        self.assertEqual((os.path.exists(pidfile), os.path.exists(log)), (True, True))
        for action in ("status", "stop"):
            self.box.daemonize(action, "--name", name, env={}, cwd="/")
        self.assertFalse(os.path.exists(pidfile))

    @needs_other_user
    def test_no_usable_home_is_said(self) -> None:
        """Who has none, or may not write there, is told, also when only --logfile is missing; of status that is 4."""
        start = ["start", "--app", self.box.write("app.py", APP)]
        theirs, lacks = self.box.path(self.box.make("theirs", 0o755, OTHER), "d.pid"), "try: .*--pidfile"
        denied = r"\A.*unable to use the home directory of uid %d: Permission denied\ntry: --pidfile --logfile" % OTHER
        for uid, argv, want, words in ((NOBODY, start, 1, lacks), (54321, ["status"], 4, lacks),
                                       (OTHER, start, 1, denied), (OTHER, start + ["--pidfile", theirs], 1, denied)):
            with self.subTest(uid, argv=argv[2:]):
                said = self.box.daemonize(*argv, want=want, cwd="/", preexec_fn=drop(uid))
                self.assertRegex(said.err, "(?m)" + words)
                self.assertNotIn("KeyError", said.out + said.err)

    def test_the_folder_may_be_a_link_of_ones_own(self) -> None:
        """Pidfile and log below links, absolute and relative: start, restart with its options, and stop."""
        os.symlink(self.box.move("real"), self.box.path("absolute"))
        os.symlink("absolute", self.box.path("relative"))
        self.box.pidfile, self.box.log = self.box.path("relative", "d.pid"), self.box.path("relative", "d.log")
        address = self.box.host("--word", "linked")
        self.box.command("restart")
        self.assertEqual((self.box.status()["word"], ask(address)["pid"]), ("linked", self.box.pid()))
        self.box.command("stop")
        self.assertLessEqual(set(os.listdir(self.box.path("real"))), {"d.log", "d.pid.lock"})

    @needs_other_user
    def test_a_caller_that_may_not_read_its_own_folder(self) -> None:
        """`su nobody` in root's home: start, status and stop work from there."""
        self.box.move("theirs", 0o755, NOBODY)
        sealed = {"cwd": self.box.make("sealed", 0o700), "preexec_fn": drop(NOBODY)}
        self.box.start(app=APP, **sealed)
        for action in ("status", "stop"):
            self.box.command(action, **sealed)


class StartFailure(BoxTest):
    """A start that fails says why, at once, and leaves nothing behind"""

    def fails(self, app: str, *options: str, want: int = 1) -> str:
        """Start `app`, which must fail and leave no process and no pid; return what was said."""
        result = self.box.start(*options, app=app, want=want)
        self.assertEqual((self.box.processes(), read(self.box.pidfile)), ([], ""))
        self.assertLess(result.seconds, SOON)
        self.assertRegex(result.err, r"(?m)^daemonize: fatal: (unable to |no licence$)")
        return result.err

    def test_an_application_that_fails_says_why(self) -> None:
        """At import, in bind, in probe: a traceback, the wrong line, its own reason, `status` 2; no stale pid stays."""
        fail = "def fail(*whatever):\n    raise ValueError('the very %s' % 'reason')\n"
        raised = "(?s)raise ValueError\\('the very %s' % 'reason'\\).*ValueError: the very reason"
        refuse = ("class Refusal(ValueError):\n    status = 2\ndef bind(options):\n"
                  "    raise Refusal('unable to read the word: too odd\\ntry: another word')\n")
        app = APP + fail
        for text, words, want in ((fail + "def bind(o): pass\nfail()\n", raised, 1), ("def bind(:\n", r"bind\(:", 1),
                                  (app + "bind = fail\n", raised, 1), (app + "Server.probe = fail\n", raised, 1),
                                  (APP + "def bind(options):\n    sys.exit('no licence')\n", "fatal: no licence\n", 1),
                                  (APP + refuse, "fatal: unable to read the word: too odd\ntry: another word\n", 2)):
            with self.subTest(text[-20:]):
                self.box.write("d.pid", "4711\n" * text.startswith(APP))
                self.assertRegex(self.fails(text, want=want), words)

    def test_who_is_killed_before_it_is_ready_is_noticed_at_once(self) -> None:
        """The starter (in bind), the daemon (workers, status) or a worker (probe) ends or is killed: said, nothing hangs."""
        deaths = (("os._exit(4)", "4"), ("os.kill(os.getpid(), 9)", "signal 9"), ("sys.exit(3)", "3"))
        for place, count in (("bind = %s", 3), ("Server.probe = %s", 3),      # the daemon survives SystemExit
                             ("Server.workers = property(%s)", 2), ("Server.status = %s", 2)):
            for death, words in deaths[:count]:
                with self.subTest(place % death):
                    self.assertRegex(self.fails(APP + place % ("lambda *x: " + death) + "\n"), words)

    def test_what_bind_made_is_taken_back_in_peace(self) -> None:
        """An abandon() that needs a moment is not cut short by the command, which has heard why."""
        os.mkdir(self.box.log)
        self.fails(APP + "Server.abandon = lambda self: (time.sleep(0.3), os.mkdir('taken back'))\n")
        self.assertTrue(os.path.isdir(self.box.path("taken back")))

    def test_an_application_that_is_never_ready_is_given_up(self) -> None:
        """A probe that never comes back is ended at --start-timeout."""
        said = self.fails(APP + "Server.probe = lambda self: time.sleep(600)\n", "--start-timeout", "0.5")
        self.assertRegex(said, "ready|time")

    def test_what_cannot_be_used_is_named(self) -> None:
        """A port in use; a folder that is missing or read-only; a log that is a folder, a FIFO, /dev/full or a link."""
        target, sealed = self.box.write("target", "precious"), self.box.make("sealed", 0o555)
        missing = self.box.path("missing", "x")
        for name, make in (("fifo", os.mkfifo), ("a symlink", functools.partial(os.symlink, target)),
                           ("a hardlink", functools.partial(os.link, target))):
            make(self.box.path(name))
        with taken_port() as port:
            rows = [("--bind", "127.0.0.1:%d" % port), ("--logfile", self.box.folder)]
            rows += [("--logfile", self.box.path(name)) for name in ("fifo", "/dev/full", "a symlink", "a hardlink")]
            rows += [(option, missing) for option in ["--pidfile", "--logfile", "--rundir"] + ["--chroot"] * ROOT]
            rows += [(option, os.path.join(sealed, "x")) for option in ("--pidfile", "--logfile") if not ROOT]
            for option, path in rows:
                with self.subTest(option, path=path):
                    self.assertIn(path[-8:].replace("/x", ""), self.fails(APP, option, path))
        self.assertEqual((read(target), os.path.exists(os.path.dirname(missing))), ("precious", False))

    def test_a_program_that_ends_at_once_has_not_started(self) -> None:
        """Even with 0: its last words are shown; one that the kernel refuses is named, and why."""
        script = self.box.write("script.py", "import sys\nprint('so short')\nsys.exit('no ' + 'licence')\n")
        plain, torn, text = (self.box.write(name, content, mode) for name, content, mode in (
            ("plain", "", 0o644), ("torn", "#!/no/such\n", 0o755), ("text", "text\n", 0o755)))
        detached = "try: its option for the foreground"
        for hosted, words in (([PYTHON, script], "(?s)so short.*no licence.*status 1"), (["true"], "status 0.*\n" + detached),
                              (["sh", "-c", "sleep 600 & exit 0"], detached), (["sh", "-c", "kill -9 $$"], "signal 9"),
                              (["sh", "-c", "exit 7"], "7"), (["no-such-program"], "no-such-program: no such program"),
                              ([plain], "plain: Permission denied"), ([torn], "unable to execute .*torn: No such file"),
                              ([text], "unable to execute .*text: Exec format error"),
                              ([PYTHON, "-c", "def f():\n    return 1 / 0\nf()\n"], "ZeroDivisionError")):
            with self.subTest(hosted[-1]):
                self.assertRegex(self.fails("", "--name", "p", "--", *hosted), words)

    @needs_root
    def test_a_full_disk_leaves_nothing_half_made(self) -> None:
        """A pidfile on a full disk: exit status 1, nothing runs, no empty pidfile, one clear line."""
        small = self.small_disk("16k")
        self.fill(small)
        said = self.fails(APP, "--pidfile", self.box.path("small", "d.pid"))
        self.assertIn("No space left", said)
        self.assertEqual(set(os.listdir(small)) - {"d.pid.lock"}, {"filler"})

    def test_what_a_file_is_not(self) -> None:
        """An application that is missing, does not end in .py, or is not beside daemonize.py, is named."""
        app, files = self.box.write("app.text", APP), ["--pidfile", "d.pid", "--logfile", "d.log"]
        shutil.copy(DAEMONIZE, self.box.folder)
        for program, options, words in ((DAEMONIZE, ["--app", "nothing.py"], r"unable to load .*nothing\.py: "),
                                        (DAEMONIZE, ["--app", app], r"app\.text: its name does not end in \.py"),
                                        ("daemonize.py", [], r"unable to load .*authserver\.py: no such file\n\Z")):
            said = run([PYTHON, program, "start"] + files + options, 1, env=self.box.env, cwd=self.box.folder).err
            self.assertRegex(said, "^daemonize: fatal: .*" + words)
            self.assertNotIn("Traceback", said)

    def test_what_a_killed_daemon_has_started_is_ended(self) -> None:
        """kill -9 before it is ready: a child of its worker, which knows nothing of it, is not left behind."""
        self.fails(APP + "Server.serve_forever = lambda self: subprocess.call(['sleep', '600'])\n"
                         "Server.probe = lambda self: time.sleep(0.3) or os.kill(os.getppid(), 9)\n")

    def test_usage_is_a_word_for_bind(self) -> None:
        """A probe that raises with status 2: exit 1, for the command line was right."""
        self.assertIn("too odd", self.fails(APP + "class Odd(ValueError): status = 2\n"
                                            "def fail(self): raise Odd('unable to go on: too odd')\nServer.probe = fail\n"))

    def test_a_prober_that_hangs_up_is_ended(self) -> None:
        """It closes its end, and goes on: that is seen at once, and nobody is left."""
        self.fails(APP + "Server.probe = lambda self: os.closerange(3, 256) or time.sleep(600)\n")

    def test_a_traceback_without_end_is_cut(self) -> None:
        """Of a hundred KiB the end is told, which says most."""
        text = "def one(n): two(n)\ndef two(n): one(n)\nbind = one\n" + "#" * 60
        self.assertIn("RecursionError", self.fails(APP + "sys.setrecursionlimit(3000)\n" + text))


class Stop(BoxTest):
    """`stop` returns when nothing of the daemon is left"""

    def test_children_and_grandchildren_end_with_the_daemon(self) -> None:
        """stop ends daemon, children and theirs, at once, and the pidfile; the application is told, the port free."""
        app = APP + "Server.server_close = lambda self: print('closed', flush=True)\n"
        address = "127.0.0.1:%d" % free_port()
        for number in (1, 2):
            self.assertEqual(self.box.host("--bind", address, app=app), address)
            ask(address, "run two")
            until(lambda: self.box.processes()[4:], "five")
            self.stops()
            self.assertEqual(read(self.box.log).count("closed\n"), number)

    def test_a_daemon_that_ignores_TERM_is_killed_after_the_timeout(self) -> None:
        """What does not end is killed after --timeout, and stop says so."""
        ignore = ("Server.serve_forever = lambda self: ignore()\n"
                  "def ignore():\n    signal.signal(15, signal.SIG_IGN)\n    time.sleep(600)\n")
        for name, app in (("ignores", APP + ignore), ("stopped", APP), ("child", APP)):
            with self.subTest(name):
                address = self.box.host(app=app)
                if name == "stopped":
                    os.kill(self.box.pid(), signal.SIGSTOP)
                if name == "child":
                    ask(address, "run stubborn")
                result = self.box.command("stop", "--timeout", "0.4")
                if name != "stopped":  # SIGCONT lets it end of its own
                    self.assertRegex(result.out + result.err, "(?i)kill")
                self.assertEqual(self.box.processes(), [])
                self.assertLess(result.seconds, SOON)

    def test_stop_of_nothing_says_so(self) -> None:
        """stop without a daemon, and stop twice: exit status 0, "not running"."""
        for _ in range(2):
            result = self.box.command("stop")
            self.assertIn("not running", result.out + result.err)
        self.assertEqual(self.box.command("stop", "--quiet").out, "")

    def test_TERM_and_INT_end_the_daemon(self) -> None:
        """SIGTERM or SIGINT to the pid ends the daemon and its children, and empties the pidfile."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                ask(self.box.host(), "run one")
                os.kill(self.box.pid(), number)
                until(lambda: not self.box.processes(), "the end of all")
                self.assertEqual(read(self.box.pidfile), "")
                self.box.command("status", want=3)

    @needs_other_user
    def test_a_stranger_has_no_permission(self) -> None:
        """Another user's stop fails with exit status 1 and says permission; the daemon stays."""
        address = self.box.host()
        self.assertRegex(self.box.command("stop", want=1, preexec_fn=drop(NOBODY)).err, "(?i)permi")
        self.assertEqual(ask(address)["pid"], self.box.pid())
        self.assertIn(self.box.command("status", want=None, preexec_fn=drop(NOBODY)).code, (0, 4))

    def test_a_child_in_our_own_group_is_signalled_alone(self) -> None:
        """Between fork(2) and its setpgid(2) a child is in its parent's group: the parent lives on."""
        said = self.box.python("import signal\nos.setsid()\nchild = os.fork() or signal.pause()\n"
                               "daemonize.signal_each([daemonize.look_at(child)], 9, True)\nprint(os.wait() == (child, 9))\n").out
        self.assertEqual(said, "True\n")

    def test_one_timeout_is_for_all(self) -> None:
        """What the daemon has used up of --timeout its children do not get again."""
        said = self.box.python("import time\nclass Target:\n    pid, leader, members = 0, 0, 0\n    send = send_all = print\n"
                               "seconds = []\ndaemonize.end_all = lambda members, kill, timeout: seconds.append(timeout) or time.sleep(0.3)\n"
                               "daemonize.end_daemon(Target(), 1)\nprint(seconds[0] == 1, 0 < seconds[1] <= 0.7, end='')").out
        self.assertEqual(said.splitlines()[-1][-9:], "True True")

    def test_an_heir_ends_as_quickly_as_any(self) -> None:
        """The sockets of who was restarted are its own, not systemd's: stop waits for no answer."""
        self.box.start(app=APP)
        self.box.command("restart")
        with connect(self.box.address()) as sock:
            sock.sendall(b"sleep 600\n")
            until(lambda: "sleeping" in read(self.box.log), "a busy worker")
            self.assertLess(self.box.command("stop", "--timeout", "15").seconds, SOON)

    def test_who_was_stopped_goes_on_to_its_end(self) -> None:
        """SIGSTOP, then stop: SIGCONT lets it obey, and nobody is killed."""
        self.box.start("--", "sleep", "600")
        os.kill(self.box.pid(), signal.SIGSTOP)
        self.assertRegex(self.box.command("stop", "--timeout", "8").out, r"\A\w+ is stopped")

    def test_no_name_of_it_stays(self) -> None:
        """stop of a daemon that lives, or was killed: pidfile and socket are gone; a folder in their place is let be."""
        names = [self.box.pidfile, self.box.pidfile + ".sock"]
        for number in (0, signal.SIGKILL):
            self.box.start("--", "sleep", "600")
            os.kill(self.box.pid(), number)
            self.box.command("stop")
            self.assertEqual([os.path.exists(name) for name in names], [False, False])
        for name in names:
            os.mkdir(name)
        self.box.command("stop")
        self.assertEqual([os.path.isdir(name) for name in names], [True, True])

    def test_who_forks_while_it_is_looked_for_is_found(self) -> None:
        """A child that stands in the list before its parent, a session's orphan; and each look is followed by a kill."""
        said = self.box.python("me = os.getpid()\nfamily = [(14, 13, 9), (13, 12, 9), (12, 11, 9), (11, me, 9), (15, 1, 7), "
                               "(7, 1, 7), (16, 1, 8), (me, 1, 7)]\ndaemonize.processes = lambda: [daemonize.Process(p, pp, p, s, '') for p, pp, s in family]\n"
                               "print(*[[p.pid for p in daemonize.family(s)] for s in (None, 7)])\nleft = [1]\n"
                               "print(daemonize.end_all(lambda: left, lambda: left.append(left.pop() + 1) if left[0] < 3 else left.clear(), 0))").out
        self.assertEqual(said, "[14, 13, 12, 11] [14, 13, 12, 11, 15]\nTrue\n")


class Status(BoxTest):
    """`status` has the exit codes of LSB"""

    def test_never_started_is_3(self) -> None:
        """Without a pidfile, with an empty one, without its folder: nothing runs, stops, or can reload."""
        self.box.write("empty.pid", "")
        for name in ("d.pid", "empty.pid", os.path.join("fresh", "d.pid")):
            self.box.pidfile = self.box.path(name)
            for action, want in (("status", 3), ("stop", 0), ("reload", 3)):
                with self.subTest(name, action=action):
                    self.assertIn("not running", self.box.command(action, want=want).out)
        self.assertFalse(os.path.exists(self.box.path("fresh")))

    def test_dead_with_a_pidfile_is_1(self) -> None:
        """After SIGKILL the pidfile still names a pid: 1; stop has nothing to stop, and the pidfile goes."""
        self.box.start(app=APP)
        self.assertEqual(self.box.slay(), self.box.pid())
        self.box.command("status", want=1)
        self.assertIsInstance(json.loads(self.box.command("status", "--json", want=1).out), dict)
        self.stops()

    def test_status_says_whatever_the_application_says(self) -> None:
        """Facts with the names that we use ourselves do no harm."""
        self.box.start(app=APP + "Server.status = lambda self: dict(event='a', self='b', addresses=['c'])\n")
        report = self.box.status()
        self.assertEqual([report[name] for name in ("event", "self", "addresses")], ["a", "b", ["c"]])

    def control(self) -> socket.socket:
        """Return a connection to the daemon's control socket."""
        here = os.getcwd()
        os.chdir(self.box.folder)       # its address holds 107 bytes
        try:
            return connect("unix:d.pid.sock")
        finally:
            os.chdir(here)

    def test_what_the_application_raises_refuses_that_call_and_no_more(self) -> None:
        """status() and reload() that raise, SystemExit too, cost one answer; the daemon lives on."""
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
        """Half a line, no JSON, an unknown word, a question whose answer nobody reads: status works on."""
        for app, hosted in ((APP, []), ("", ["--", "sleep", "600"])):
            self.box.start(*hosted, app=app)
            for said in (b"{", b"[]\n", b"\xff\n", b'{"event": 7}\n', b'{"event": "tea"}\n', b"[" * 60000 + b"\n",
                         b'{"event": "status"}\n' * 50, b'{"event": "sockets"}\n', b'{"event": "reclaim"}\n'):
                with self.subTest(said[:20], app=app[:9]):
                    with self.control() as control:
                        control.sendall(said)
                    self.assertTrue(is_alive(self.box.pid()))
            facts = self.box.status()       # it is asked after all of them, and forgets no error
            self.assertEqual((facts["pid"], facts["last_error"]), (self.box.pid(), ""))
            self.assertNotIn("Traceback", read(self.box.log))
            self.box.command("stop")

    def test_silent_conversations_keep_nobody_out(self) -> None:
        """Nine callers who say nothing: status and restart work at once, and the longest silent are hung up."""
        self.box.start(app=APP)
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(self.control()) for _ in range(9)]
            self.assertIn("word", self.box.status())
            self.assertEqual([end.recv(1) for end in ends[:2]], [b""] * 2)
            self.assertEqual(self.box.command("restart").err, "")
            self.assertIn("word", self.box.status())

    @needs_linux
    def test_descriptors_that_nobody_asked_for_are_closed(self) -> None:
        """They came with a question, or half of one: when the caller is gone, so are they, and no child got any."""
        self.box.start(app=APP)
        before = len(fds_of(self.box.pid()))
        for said in (b'{"event": "status"}\n', b"{", b"tea\n"):
            with self.control() as control:
                control.sendmsg([said], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 20))])
        until(lambda: len(fds_of(self.box.pid())) == before, "as few descriptors as before")

    def test_who_asks_and_reads_nothing_holds_nobody_up(self) -> None:
        """Questions without end, no answer read: the caller is hung up, and the next one is heard."""
        code = "import sys, daemonize\ndaemonize.ANSWER = 0.3\nsys.exit(daemonize.main(sys.argv[1:]))"
        run([PYTHON, "-c", code] + self.box.argv("start")[2:] + ["--logfile", self.box.log, "--", "sleep", "600"], 0, env=self.box.env, cwd=HERE)

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
        """An answer that claims another pid, state or uid, or is no answer: status says what is so."""
        self.box.start("--name", "n", "--", "sleep", "600")
        for said in ({"pid": 1, "state": "dead", "name": "x", "uid": 77, "user": "x", "uptime": 1e9}, [7], 7, "x", None):
            code = "import sys, daemonize\ndaemonize.ask = lambda *a: {'said': %r}\nsys.exit(daemonize.main(sys.argv[1:]))" % (said,)
            with self.subTest(said=said):
                facts = json.loads(self.box.python(code, "status", "--json", "--pidfile", self.box.pidfile).out)
                self.assertEqual([facts[name] for name in ("pid", "state", "name", "uid")],
                                 [self.box.pid(), "running", "n", os.getuid()])
                self.assertLess(facts["uptime"], 1000)

    def test_what_an_application_says_looks_like_no_line_of_ours(self) -> None:
        """A line end in a fact, in a list, in an address: escaped, so that each row is one line."""
        self.box.start(app=APP + "Server.status = lambda self: {'one': 'a\\nb', 'two': ['c\\nd', 'e'], 'addresses': ['f\\ng']}\n")
        first, *rows = self.box.command("status").out.splitlines()
        self.assertIn("on f\\ng", first)
        self.assertEqual([row.split(None, 1)[1] for row in rows if row.split()[0] in ("one", "two")], ["a\\nb", "c\\nd e"])

    SLOW = APP + "Server.probe = lambda self: [time.sleep(0.01) for _ in iter(lambda: os.path.exists(WAIT), False)]\nWAIT = "

    def test_silent_conversations_do_not_drive_the_heir_out(self) -> None:
        """Nine silent callers during a restart: the heir's conversation is kept, and the old one leaves."""
        wait = self.box.path("wait")
        self.box.start(app=self.SLOW + repr(wait))
        old = self.box.pid()
        self.box.write("wait", "")
        child = self.box.spawn(*self.box.argv("restart"))
        until(lambda: len(self.box.processes()) >= 6, "an heir, its worker, its prober")
        with contextlib.ExitStack() as stack:
            for _ in range(9):
                stack.enter_context(self.control())
            os.unlink(wait)
            self.assertEqual((child.wait(PATIENCE), is_alive(old), strays(self.box)), (0, False, []))
        self.assertNotIn("warning", read(self.box.output))

    @needs_linux
    def test_an_heir_that_fails_late_leaves_the_old_one_in_its_place(self) -> None:
        """It had the control socket, and the pidfile; then it hung up: both are the old daemon's again."""
        self.box.start(app=APP)
        pid = self.box.pid()
        code = ("import sys, os, daemonize\nkept = daemonize.take_over(daemonize.parse(['restart', '--pidfile', sys.argv[1]]), %d)\n"
                "daemonize.write_pidfile(os.open(sys.argv[1], os.O_RDWR), 1)" % pid)
        self.box.python(code, self.box.pidfile)
        until(lambda: self.box.pid() == pid, "its pid")
        with self.control() as end:
            self.assertEqual(struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0], pid)


class Restart(BoxTest):
    """`restart` with new code, on the old one's sockets"""

    def test_restart_repeats_the_last_start(self) -> None:
        """Without options those of the last start, on its port, with new code and environment; any are a whole new set."""
        address, old = self.box.host("--word", "kept", "--umask", "077"), self.box.pid()
        self.box.write("app.py", APP.replace('"first"', '"another"'))
        self.box.command("restart", env=dict(self.box.env, FRESH="yes"), cwd="/")
        facts = ask(address)
        self.assertEqual((facts["version"], facts["umask"], facts["env"].get("FRESH"), facts["pid"]),
                         ("another", 0o077, "yes", self.box.pid()))
        self.assertEqual(self.box.status()["word"], "kept")
        self.assertFalse(is_alive(old))
        self.box.command("restart", "--app", "app.py", "--logfile", self.box.log, "--bind", address, "--word", "new")
        self.assertEqual((ask(address)["umask"], self.box.status()["word"]), (0o027, "new"))

    def test_an_option_with_its_default_is_an_option(self) -> None:
        """`restart --umask 027` is a new set, though 027 is what no --umask means."""
        said = self.box.python("for options in sys.argv[1:]:\n"
                               "    print(daemonize.parse(['restart', '--pidfile', 'p'] + options.split()).is_bare)\n",
                               "", "--quiet --timeout 10", "--umask 027", "--log-keep 5").out
        self.assertEqual(said.split(), ["True", "True", "False", "False"])

    def test_restart_of_nothing_is_start(self) -> None:
        """Not running: the same as start, also with the options of the last start."""
        app = self.box.write("app.py", APP)
        self.box.command("restart", "--logfile", self.box.log, "--app", app, "--word", "first")
        self.box.command("stop")
        self.box.command("restart")
        self.assertEqual(self.box.status()["word"], "first")

    def test_broken_new_code_leaves_the_old_one_serving(self) -> None:
        """Syntax errors, exceptions in bind or probe, never ready: exit 1, reason, the old stays."""
        address = self.box.host("--start-timeout", "3")
        pid, fds = self.box.pid(), len(ask(address)["fds"])
        for broken, words in (("def bind(:", "def bind"), (APP + "bind = 1 / 0", "ZeroDivision"),
                              (APP + "Server.probe = lambda self: 1 / 0", "ZeroDivision"),
                              (APP + "Server.__init__ = lambda *x: 1 / 0", "ZeroDivision"),
                              (APP + "Server.probe = lambda self: os.kill(os.getpid(), 9)", "9|KILL|killed"),
                              (APP + "Server.probe = lambda self: time.sleep(600)", "ready|time")):
            with self.subTest(broken[-40:]):
                self.box.write("app.py", broken)
                self.assertRegex(self.box.command("restart", want=1).err, words)
                self.assertEqual((ask(address)["pid"], self.box.pid()), (pid, pid))
        self.assertEqual(len(ask(address)["fds"]), fds)
        self.box.write("app.py", APP)
        self.box.command("restart")
        self.assertNotEqual(ask(address)["pid"], pid)

    def test_an_answer_spans_a_restart(self) -> None:
        """A request that is being answered when restart comes is answered by the old one."""
        address = self.box.host()
        old = self.box.pid()
        with connect(address) as sock:
            sock.sendall(b"sleep 1\n")
            self.box.command("restart")
            self.assertEqual(json.loads(sock.makefile().readline()), old)
        self.assertNotEqual(ask(address)["pid"], old)

    def test_the_new_one_begins_when_the_old_one_has_stopped(self) -> None:
        """No client meets both in turn: release() comes after each drain() of the old daemon's workers."""
        app = APP + ("Server.hold = lambda self: print('held', flush=True)\nServer.release = lambda self: print('released', flush=True)\n"
                     "well = Server.drain\nServer.drain = lambda self: time.sleep(0.5) or print('drained', flush=True) or well(self)\n")
        self.box.start("--workers", "2", app=app)
        self.box.command("restart")
        until(lambda: read(self.box.log).count("released") == 2, "both released")
        self.assertEqual(re.findall("held|drained|released", read(self.box.log)), ["held"] + ["drained"] * 2 + ["released"] * 2)

    def test_a_program_in_an_applications_place_has_no_port(self) -> None:
        """restart with a COMMAND: the application's sockets go with it."""
        address = self.box.address(self.box.start("--name", "n", app=APP))
        self.box.command("restart", "--name", "n", "--logfile", self.box.log, "--", "sleep", "600")
        with socket.socket() as sock:
            self.assertNotEqual(sock.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))), 0)

    def test_the_pidfile_is_the_one_that_was_typed(self) -> None:
        """The old words name it through a link, which leads elsewhere by now."""
        for name in ("real", "other"):
            self.box.make(name)
        os.symlink("real", self.box.path("link"))
        self.box.start("--pidfile", self.box.path("link", "d.pid"), app=APP)
        os.unlink(self.box.path("link"))
        os.symlink("other", self.box.path("link"))
        old = read(self.box.path("real", "d.pid"))
        self.box.daemonize("restart", "--pidfile", self.box.path("real", "d.pid"))
        self.assertNotIn(read(self.box.path("real", "d.pid")), ("", old))
        self.assertEqual(os.listdir(self.box.path("other")), [])

    def test_who_leaves_removes_nothing(self) -> None:
        """server_close() is for the end of the last: what it removes, a socket's name, is the heir's by now."""
        self.box.start(app=APP + "Server.server_close = lambda self: print('closed', flush=True)\n")
        self.box.command("restart")
        self.assertNotIn("closed", read(self.box.log))
        self.box.command("stop")
        self.assertEqual(read(self.box.log).count("closed"), 1)

    @needs_linux
    def test_who_drains_is_the_daemon_no_more(self) -> None:
        """While its last answer takes long the old one has no lock: the heir's workers need not wait for its end."""
        address, old = self.box.address(self.box.start(app=APP)), self.box.pid()
        with connect(address) as busy:
            busy.sendall(b"sleep 600\n")
            until(lambda: "sleeping" in read(self.box.log), "a busy worker")
            self.box.spawn(*self.box.argv("restart", "--timeout", "60"))
            until(lambda: " %d " % old not in read("/proc/locks"), "an end of its lock", SOON)
            self.assertTrue(is_alive(old))

    def test_no_connection_is_lost_under_load(self) -> None:
        """Clients that connect all the time through three restarts see no failure."""
        address, pids = self.box.host(), set()
        with meanwhile(*[lambda: pids.add(ask(address, "sleep 0"))] * 3):
            for _ in range(3):
                self.box.command("restart")
        self.assertGreaterEqual(len(pids), 3)
        self.assertEqual(strays(self.box), [])

    def test_commands_at_once_take_turns(self) -> None:
        """Three restarts leave a daemon, two stops none, one of each either; all succeed, the pidfile is true."""
        both = (["restart", "stop"], (True, False))
        for actions, lives in ((["restart"] * 3, (True,)), both, (["stop"] * 2, (False,)), both):
            self.box.start(app=APP)
            children = [self.box.spawn(*self.box.argv(action)) for action in actions]
            self.assertEqual([child.wait(PATIENCE) for child in children], [0] * len(actions), read(self.box.output))
            self.assertEqual((strays(self.box), bool(self.box.processes())), ([], bool(self.box.pid())))
            self.assertIn(bool(self.box.pid()), lives)
            if self.box.pid():
                self.assertEqual(ask(self.box.address())["pid"], self.box.pid())
        self.assertNotIn("Traceback", read(self.box.output))

    def test_a_program_is_looked_up_before_the_old_one_is_stopped(self) -> None:
        """restart of a program stops and starts it; one that is missing leaves the old running."""
        program = self.box.write("program", "#!/bin/sh\nexec sleep 600\n", 0o755)
        self.box.start("--", program)
        old = self.box.pid()
        self.box.command("restart")
        pid = self.box.pid()
        self.assertNotEqual(pid, old)
        os.rename(program, program + ".away")
        self.assertIn("program", self.box.command("restart", want=1).err)
        self.assertEqual((self.box.pid(), is_alive(pid)), (pid, True))
        self.box.write("program", "#!/bin/sh\nexit 5\n", 0o755)
        result = self.box.command("restart", want=1)
        self.assertRegex(result.out + result.err, "(?i)nothing (runs|is running)|not running")
        self.assertEqual(self.box.processes(), [])

    def test_the_folder_of_the_last_start_is_gone(self) -> None:
        """restart from anywhere works on, and says that relative paths mean / now."""
        self.box.start("--word", "kept", app=APP, cwd=self.box.make("sub"))
        os.rmdir(self.box.path("sub"))
        said = self.box.command("restart").err
        self.assertRegex(said, "warning: the folder of the last start is gone: .*sub; relative paths mean /")
        self.assertEqual(self.box.status()["word"], "kept")

    def test_who_does_not_go_is_killed_after_the_timeout(self) -> None:
        """A long answer, a script that ignores SIGTERM: killed after what was typed now, said, and replaced."""
        for app, word in ((APP, "drain"), ("", "end")):
            with self.subTest(word), contextlib.ExitStack() as stack:
                hosted = [] if app else ["--", "sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
                result = self.box.start("--timeout", "60", *hosted, app=app)
                old = self.box.pid()
                if app:
                    stack.enter_context(connect(self.box.address(result))).sendall(b"sleep 600\n")
                said = self.box.command("restart", "--timeout", "0.4").err
                self.assertIn("pid %d did not %s within 0.4 s: killed" % (old, word), said)
                self.assertEqual((is_alive(old), is_alive(self.box.pid())), (False, True))
                self.box.command("stop", "--timeout", "0")

    def test_an_application_that_cannot_drain_is_ended(self) -> None:
        """Without a drain() the old one ends as by SIGTERM, after the new one is ready; workers, too."""
        result = self.box.start("--workers", "2", app=APP + "del Server.drain\n")
        old = self.box.processes()
        self.assertEqual(self.box.command("restart").err, "")
        self.assertEqual(set(old) & set(self.box.processes()), set())
        self.assertIn(ask(self.box.address(result))["pid"], self.box.processes())


class Reload(BoxTest):
    """`reload` and SIGHUP"""

    def test_reload_asks_the_application_once(self) -> None:
        """reload calls the application's reload(), keeps the pid, opens the log again; SIGHUP does, and logs it."""
        address = self.box.host()
        pid = self.box.pid()
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
        """An application that refuses: exit status 1, its reason, the old stays in force."""
        refuse = APP + "def no(self):\n    raise ValueError('line 7: no colon')\nServer.reload = no\n"
        address = self.box.host(app=refuse)
        self.assertIn("line 7: no colon", self.box.command("reload", want=1).err)
        self.assertEqual(ask(address)["pid"], self.box.pid())
        os.kill(self.box.pid(), signal.SIGHUP)
        until(lambda: "line 7: no colon" in read(self.box.log), "the reason in the log")

    def test_a_probe_that_hangs_at_reload_leaves_no_process(self) -> None:
        """A reload whose probe never comes back is refused in time, and nobody is left of it."""
        hang = self.box.path("hang")
        self.box.start("--workers", "1", "--start-timeout", "1", app=APP + (
            "Server.probe = lambda self: os.path.exists(%r) and time.sleep(600)\n" % hang))
        before = sorted(self.box.processes())
        self.box.write("hang", "")
        self.assertIn("ready", self.box.command("reload", want=1).err)
        self.assertEqual(sorted(self.box.processes()), before)

    def test_reload_again_and_again(self) -> None:
        """Five reloads, after a start or a restart: in the same daemon, with fresh workers, no descriptor is left."""
        for workers, again in ((1, False), (2, False), (1, True), (2, True), (3, True)):
            address = self.box.host("--workers", str(workers))
            if again:
                self.box.command("restart")
            pid, first = self.box.pid(), len(fds_of(self.box.pid()))
            for number in range(5):
                with self.subTest(workers, again=again, number=number):
                    self.box.command("reload")
                    facts = ask(address)        # at once: who answers is a fresh one already
                    self.assertEqual((facts["reloads"], facts["pid"], self.box.pid()), (number + 1, pid, pid))
                    until(lambda: len(self.box.processes()) == 1 + workers, "the end of the old workers")
            self.assertEqual(self.box.status()["restarts"], 0)
            until(lambda: len(fds_of(self.box.pid())) <= first, "as few descriptors as at first")
            self.box.command("stop")
        self.assertEqual(read(self.box.log).count("reloaded\n"), 25)

    @needs_linux
    def test_fresh_workers_have_what_the_first_had(self) -> None:
        """No end of the conversation that asked for it: its caller would wait for it. Nor a log beside the log."""
        address = self.box.address(self.box.start("--workers", "1", app=APP))

        def kinds() -> List[str]:
            return sorted(re.sub(r"\d+", "", name) for name in ask(address)["fds"].values())
        first = kinds()
        self.box.command("reload")
        self.assertEqual(kinds(), first)

    def test_a_fact_looks_like_no_line_of_ours(self) -> None:
        """Whatever an application calls its facts, and says: each is one line, set in."""
        self.box.start(app=APP + "Server.status = lambda self: {'x\\nb is running: pid 1': 'y\\nc is running: pid 2'}\n")
        lines = self.box.command("status").out.splitlines()
        self.assertEqual([line for line in lines[1:] if not line.startswith("  ")], [])
        self.assertIn("b is running: pid 1", "".join(lines[1:]))

    def test_a_reason_looks_like_no_word_of_ours(self) -> None:
        """What a daemon gives as its reason: lines that begin as ours do are set apart; a cure names this daemon."""
        self.box.start("--", "sleep", "600")
        code = ("import sys, daemonize\ndaemonize.ask = lambda *words: {'reason': 'no\\ndaemonize: fatal: lost\\ntry: daemonize.py restart'}\n"
                "sys.exit(daemonize.main(sys.argv[1:]))")
        said = self.box.python(code, "reload", "--pidfile", self.box.pidfile, want=1).err
        self.assertEqual(said, "daemonize: fatal: unable to reload sleep: no\n  daemonize: fatal: lost\n"
                               "try: daemonize.py restart --pidfile '%s'\n" % self.box.pidfile)

    def test_an_application_without_reload_is_not_disturbed(self) -> None:
        """Without a reload() of its own an application only gets its log opened again."""
        address, pid = self.box.host(app=APP + "del Server.reload\n"), self.box.pid()
        self.box.command("reload")
        self.assertEqual(ask(address)["pid"], pid)

    def test_reload_of_a_program_is_SIGHUP(self) -> None:
        """A program that handles SIGHUP gets it; for any other one reload is refused, and it lives on."""
        self.box.start("--name", "p", "--", "sh", "-c", "trap 'echo got it' HUP; while :; do sleep 0.05; done")
        pid = self.box.pid()
        for _ in range(2):
            self.assertIn("p is reloaded", self.box.command("reload").out)
        os.kill(pid, signal.SIGHUP)
        until(lambda: read(self.box.log).count("got it") >= 1, "its word")
        self.box.command("restart", "--logfile", self.box.log, "--", "sleep", "600")
        pid = self.box.pid()
        self.assertIn("does not handle SIGHUP", self.box.command("reload", want=1).err)
        os.kill(pid, signal.SIGHUP)
        self.assertIn("does not handle SIGHUP", until(lambda: self.box.status()["last_error"], "a word on it"))
        self.assertEqual((self.box.pid(), self.box.status()["restarts"]), (pid, 0))


class Run(BoxTest):
    """`run`: the same life in the foreground, for systemd, containers and debugging"""

    def argv(self, *options: str, app: str = APP) -> List[str]:
        """Return the command line of `run` with the box's pidfile, and an application unless it is none."""
        return self.box.argv("run", *(["--app", self.box.write("app.py", app)] if app else []), *options)

    def foreground(self, *options: str, app: str = APP, **popen: Any) -> "subprocess.Popen[bytes]":
        """Start `run` with the box's pidfile and wait until the pidfile is written."""
        child = self.box.spawn(*self.argv(*options, app=app), **popen)
        until(lambda: self.box.pid() or child.poll() is not None, "a pidfile")
        self.assertIsNone(child.poll(), read(self.box.output))
        return child

    def address(self) -> str:
        """Return the address that status says once the pidfile, which comes last, is written."""
        until(self.box.pid, "a pidfile")
        return self.box.address()

    def terminal(self, script: str, *argv: str) -> int:
        """Run a shell script, its $0 the box's folder, in a terminal of its own; return our end of that."""
        shell, terminal = pty.fork()
        if shell == 0:
            os.execve("/bin/sh", ["sh", "-c", script, self.box.folder, *argv], self.box.env)
        self.addCleanup(os.close, terminal)
        self.addCleanup(os.waitpid, shell, 0)
        self.addCleanup(os.kill, shell, signal.SIGKILL)
        return terminal

    def test_the_process_is_the_daemon(self) -> None:
        """run does not fork: pid, session and streams are the caller's; so is its restart; a zombie counts as stopped."""
        child = self.foreground("--word", "front")
        facts = ask(self.address())
        self.assertEqual((facts["pid"], self.box.pid(), facts["sid"]), (child.pid, child.pid, os.getsid(0)))
        self.assertEqual(self.box.status()["word"], "front")
        ask(self.address(), "print seen")
        self.assertIn("seen\nraw seen\n", read(self.box.output))
        self.assertIn("try: systemctl restart", self.box.command("restart", want=1).err)
        self.assertIsNone(child.poll())
        self.assertLess(self.box.command("stop").seconds, SOON)  # nobody has waited for it yet
        self.assertEqual(child.wait(PATIENCE), 0)

    def test_TERM_and_INT_end_it(self) -> None:
        """SIGTERM and SIGINT end it and its children; the pidfile is empty or gone; status 3."""
        # What a shell starts by & ignores SIGINT: that is killed.  SIGTERM is told to all, and obeyed.
        for number, timeout in ((signal.SIGTERM, "60"), (signal.SIGINT, "0.5")):
            with self.subTest(number):
                child = self.foreground("--timeout", timeout)
                ask(self.address(), "run two")
                until(lambda: self.box.processes()[4:], "all five")
                child.send_signal(number)
                self.assertEqual((child.wait(PATIENCE), self.box.processes(), read(self.box.pidfile)), (0, [], ""))
                self.box.command("status", want=3)

    def test_stop_signals_nothing_but_its_pid(self) -> None:
        """stop ends run and what it started, never its neighbours in the caller's process group."""
        shell = self.box.spawn("sh", "-c", 'sleep 600 & "$@" & wait', "sh", *self.argv(), start_new_session=True)
        ask(self.address(), "run one")
        self.box.command("stop")
        left = [read("/proc/%d/cmdline" % pid) for pid in self.box.processes()]
        self.assertEqual(sorted(line.partition("\0")[0] for line in left), ["sh", "sleep"], left)
        os.killpg(shell.pid, signal.SIGKILL)

    def test_its_exit_status_is_the_programs(self) -> None:
        """run ends with the exit status of what it ran."""
        for code, status in (("exit 5", 5), ("sleep 0.5; exit 7", 7), ("kill -9 $$", 137), ("true", 0)):
            self.box.daemonize("run", "--pidfile", self.box.pidfile, "--", "sh", "-c", code, want=status)
        self.assertEqual(read(self.box.pidfile), "")

    def test_a_failure_is_told_like_at_start(self) -> None:
        """A NOTIFY_SOCKET that leads nowhere, an application that cannot bind: exit status 1, why, no pid left."""
        nowhere = r"\Adaemonize: fatal: unable to connect to NOTIFY_SOCKET .+: .+\n\Z"
        for end, notify, words in (("", self.box.path("nobody"), nowhere), ("", "@" + TOKEN, nowhere),
                                   ("bind = 1 / 0\n", "", "ZeroDivisionError")):
            argv = self.argv(app=APP + end)
            self.assertRegex(run(argv, 1, env=dict(self.box.env, NOTIFY_SOCKET=notify)).err, words)
            self.assertEqual((read(self.box.pidfile), os.path.exists(self.box.pidfile) and bool(notify)), ("", False))

    def test_what_bind_made_is_taken_back(self) -> None:
        """A pidfile that is a FIFO, seen after bind(): abandon() is called, and the lock is gone."""
        os.mkfifo(self.box.pidfile)
        app = self.box.write("app.py", APP + "Server.abandon = lambda self: open(%r, 'w')\n" % self.box.path("taken back"))
        self.box.command("run", "--app", app, want=1)
        self.assertEqual([os.path.exists(path) for path in (self.box.path("taken back"), self.box.pidfile + ".lock")], [True, False])

    @needs_linux
    def test_with_closed_streams(self) -> None:
        """Descriptors 0, 1 and 2 closed: its program has /dev/null there."""
        self.box.spawn("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *self.box.argv("run", "--", "sleep", "600"))
        until(self.box.pid, "a pidfile")
        for pid in self.box.status()["program_pid"] + [self.box.pid()]:
            self.assertEqual(fds_of(pid)[:3], ["/dev/null"] * 3)

    def test_a_second_TERM_waits_for_no_answer(self) -> None:
        """With sockets of systemd the first TERM drains; the second one ends it, long before --timeout."""
        child, address = self.activated(*self.argv())
        self.address()
        with connect(address) as busy:
            busy.sendall(b"sleep 600\n")
            until(lambda: "sleeping" in read(self.box.output), "a busy worker")
            child.send_signal(signal.SIGTERM)
            until(lambda: self.box.status()["workers"] == [], "a drain")
            child.send_signal(signal.SIGTERM)
            self.assertEqual(child.wait(SOON), 0)

    def test_a_second_one_is_refused(self) -> None:
        """run beside a running daemon does not start a second one: it names the first's pid."""
        self.box.start(app=APP)
        result = run(self.argv(), env=self.box.env)
        self.assertIn("already running with pid %d" % self.box.pid(), result.out + result.err)
        self.assertEqual(strays(self.box), [])

    def test_systemd_is_told(self) -> None:
        """The notify socket hears READY, RELOADING with its time, READY again, and STOPPING."""
        path = tempfile.mktemp(prefix="n", dir=TEMP)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(path)
            self.addCleanup(os.unlink, path)
            notify.settimeout(PATIENCE)
            heard: List[str] = []

            def hears(word: str) -> str:
                while word not in "\n".join(heard[-1:]).split("\n"):
                    heard.append(notify.recv(4096).decode())
                return heard[-1]
            child = self.foreground(env=dict(self.box.env, NOTIFY_SOCKET=path))
            hears("READY=1")
            address = self.address()
            self.assertNotIn("NOTIFY_SOCKET", ask(address)["env"])
            child.send_signal(signal.SIGHUP)
            self.assertRegex(hears("RELOADING=1"), r"(?m)^MONOTONIC_USEC=\d+$")
            hears("READY=1")
            child.send_signal(signal.SIGTERM)
            hears("STOPPING=1")
            self.assertEqual(child.wait(PATIENCE), 0)
            self.assertIn("STATUS=", "\n".join(heard))

    def test_sockets_meant_for_another_process_are_left_alone(self) -> None:
        """With LISTEN_PID another's the descriptor is not taken."""
        _, address = self.activated(*self.argv(), pid="1")
        self.assertNotEqual(self.address(), address)

    def test_what_ends_its_group_ends_it(self) -> None:
        """timeout, a supervisor's killpg with TERM or KILL: run, its program and its workers stay in that group."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for argv, count in ((self.argv(), 3), (self.argv("--", "sh", "-c", "sleep 600 & sleep 600", app=""), 5)):
                with self.subTest(number, count=count):
                    shell = self.box.spawn("sh", "-c", '"$@"; true', "sh", *argv, start_new_session=True)
                    until(lambda: len(self.box.processes()) >= count and self.box.pid(), "all")
                    os.killpg(shell.pid, number)
                    shell.wait()
                    until(lambda: not self.box.processes(), "the end of all", SOON)
                    remove(self.box.pidfile)

    def test_its_streams_are_the_callers(self) -> None:
        """stdin is the caller's; --logfile -, /dev/stdout, or a link there, mean its stdout; start refuses them."""
        os.symlink("/dev/stdout", self.box.path("link.log"))
        for log in ("-", "/dev/stdout", "/dev/stderr", "link.log"):
            result = self.box.daemonize("run", "--pidfile", self.box.pidfile, "--logfile", log, "--", "cat",
                                        data=b"from stdin")
            self.assertEqual(result.out, "from stdin")
            self.assertIn("try: daemonize.py run", self.box.command("start", "--logfile", log, "--", "cat", want=2).err)
        self.assertFalse(os.path.exists(self.box.path("-")))

    def test_nohup_means_it(self) -> None:
        """A SIGHUP that the caller ignored stays ignored, in the program, too; reload works all the same."""
        child = self.foreground(preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        self.assertIn(signal.SIGHUP, ask(self.address())["ignored"])
        child.send_signal(signal.SIGHUP)
        self.box.command("reload")
        self.assertEqual((ask(self.address())["reloads"], child.poll()), (1, None))

    INTERRUPTED = """import time
try:
    print('begun', flush=True); time.sleep(600)
except KeyboardInterrupt:
    time.sleep(0.3); print('cleaned', flush=True)
"""

    def test_an_interrupt_is_passed_on_as_one(self) -> None:
        """SIGINT to run: the program's KeyboardInterrupt runs to its end; in a terminal Ctrl-C comes but once."""
        script = self.box.write("s.py", self.INTERRUPTED)
        child = self.foreground("--", PYTHON, script, app="")
        until(lambda: "begun" in read(self.box.output), "its word")
        child.send_signal(signal.SIGINT)
        self.assertEqual((child.wait(PATIENCE), read(self.box.output).count("cleaned")), (0, 1))
        self.in_terminal(lambda terminal: os.write(terminal, b"\x03"), "--logfile", self.box.log, "--", PYTHON, script,
                         ready=lambda: "begun" in read(self.box.log))
        self.assertEqual((read(self.box.log).count("cleaned"), "Traceback" in read(self.box.log)), (1, False))

    def test_TERM_in_a_terminal_leaves_the_neighbours_alone(self) -> None:
        """stop of a run in a shell's foreground group: the shell and what it runs beside go on."""
        self.terminal('sleep 600 & "$@"; touch "$0/next"; wait', *self.argv())
        ask(self.address(), "run two")
        os.kill(self.box.pid(), signal.SIGTERM)
        until(lambda: os.path.exists(self.box.path("next")), "the shell's next command")
        until(lambda: len(self.box.processes()) == 2, "shell and neighbour alone")

    @needs_linux
    def test_orphans_end_with_it(self) -> None:
        """run has no session of its own: grandchildren that left everything behind are adopted, and ended."""
        if run([PYTHON, "-c", "import ctypes"]).code:
            self.skipTest("needs ctypes")
        child = self.foreground("--", "sh", "-c", "(setsid sleep 600 & setsid sh -c 'sleep 600 & sleep 600' &); sleep 600", app="")
        until(lambda: len(self.box.processes()) >= 6, "all of them")
        child.send_signal(signal.SIGTERM)
        child.wait(PATIENCE)
        self.assertEqual(self.box.processes(), [])

    def test_TERM_with_sockets_of_systemd_drains(self) -> None:
        """They are served, the variables gone; what was accepted is answered, what waits is the next one's."""
        child, address = self.activated(*self.argv())
        self.assertEqual(self.address(), address)
        self.assertEqual([name for name in ask(address)["env"] if name.startswith("LISTEN_")], [])
        with connect(address) as busy, connect(address) as queued:
            busy.sendall(b"sleep 0.7\n")
            until(lambda: "sleeping" in read(self.box.output), "a busy worker")
            child.send_signal(signal.SIGTERM)
            self.assertEqual(json.loads(busy.makefile().readline()), child.pid)
            self.assertEqual(child.wait(PATIENCE), 0)
            self.assertEqual(select.select([queued], [], [], 0)[0], [])
        self.assertEqual(self.box.processes(), [])

    def test_its_terminal_ends_it(self) -> None:
        """A hang-up, or Ctrl-C below a shell script that called it, as any program in a terminal."""
        self.in_terminal(lambda terminal: os.kill(self.box.pid(), signal.SIGHUP))
        self.in_terminal(lambda terminal: os.write(terminal, b"\x03"))

    def in_terminal(self, end: Callable[[int], Any], *hosted: str, ready: Callable[[], Any] = lambda: True) -> None:
        """Run `run` below a shell in a terminal of its own and check that `end` ends it."""
        terminal = self.terminal('"$@"; :', *self.argv(*hosted, app="" if hosted else APP))
        pid = until(self.box.pid, "a pidfile")
        self.assertTrue(hosted or ask(self.address())["tty"])
        until(ready, "a sign of it")
        end(terminal)
        until(lambda: not is_alive(pid), "the end")
        self.assertEqual(read(self.box.pidfile), "")

    @needs_root
    @needs("unshare")
    def test_as_the_first_process_of_a_container_it_reaps(self) -> None:
        """As pid 1 it reaps orphans, ends on SIGTERM, and takes its children along."""
        unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
        if run(unshare + ["true"]).code:
            self.skipTest("needs the right to unshare")
        child = self.box.spawn(*unshare, *self.argv())
        until(lambda: "listening on" in read(self.box.output), "an address in the output")
        address = self.box.address_in(read(self.box.output))
        until(self.box.pid, "a pidfile")
        inside = {1, ask(address)["worker"]}
        self.assertIn(self.box.pid(), inside)
        ask(address, "orphan")
        until(lambda: set(ask(address, "processes")) == inside, "an orphan reaped")
        ask(address, "run one")
        os.kill(family(child.pid)[1], signal.SIGTERM)   # its pid 1
        self.assertEqual((child.wait(PATIENCE), self.box.processes()), (0, []))

    def test_descriptors_that_are_no_sockets_are_not_served(self) -> None:
        """LISTEN_FDS with /dev/null as descriptor 3: closed, and a socket of its own; with none: refused."""
        script = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" '
        said = run(["sh", "-c", script + "3<&-", "sh", *self.argv()], 1, env=self.box.env).err
        self.assertEqual(said, "daemonize: fatal: unable to take over the 1 fds of LISTEN_FDS: Bad file descriptor\n")
        self.box.spawn("sh", "-c", script + "3</dev/null", "sh", *self.argv())
        self.assertNotIn("/dev/null", [path for fd, path in ask(self.address())["fds"].items() if int(fd) > 2])


class Pidfile(BoxTest):
    """Every odd pidfile is recovered from or refused; nobody is signalled, nothing behind a link touched"""

    def setUp(self) -> None:
        super().setUp()
        self.stranger, dead = self.box.spawn("sleep", "600"), self.box.spawn("true")
        dead.wait()
        pids = self.stranger.pid, os.getpid(), dead.pid, self.stranger.pid, self.stranger.pid
        self.contents = ("%d\n||abc|12abc|-1\n|0\n|1\n|%d\n|%d\n|99999999999\n|-%d\n| +%d" % pids).split("|")
        self.contents += ["\0" * 32, "7" * 100000]

    def test_nobody_is_signalled_whatever_the_pidfile_says(self) -> None:
        """A stale, foreign or senseless one: status is 1, or 3 when it is empty; stop: not running, no signal."""
        for text in self.contents:
            self.box.write("d.pid", text)
            for action, want in (("status", 1 if text else 3), ("stop", 0)):
                with self.subTest(text[:20].strip(), action=action):
                    result = self.box.command(action, want=want)
                    words = "is dead.*" + "to a stranger" * (text == self.contents[0]) if want == 1 else "not running"
                    self.assertRegex(result.out + result.err, "(?s)" + words)
                    self.assertNotIn("Traceback", result.err)
                    self.assertIsNone(self.stranger.poll())

    def test_start_is_never_blocked_by_a_stale_pidfile(self) -> None:
        """start on such a pidfile starts, and the pidfile is right afterwards."""
        for text in self.contents[:10:2]:
            with self.subTest(text[:20]):
                self.box.write("d.pid", text)
                self.assertEqual(ask(self.box.host())["pid"], self.box.pid())
                self.box.slay()
                self.assertIsNone(self.stranger.poll())

    def test_what_is_no_regular_file_is_refused(self) -> None:
        """A folder, a FIFO, a device, a symlink, a hard link as pidfile: one clear line, no waiting."""
        target, nowhere = self.box.write("target", "%d\n" % self.stranger.pid, 0o600), self.box.path("nowhere")
        before = os.stat(target)
        for name, make in (("folder", os.mkdir), ("fifo", os.mkfifo), ("itself", lambda path: os.symlink(path, path)),
                           ("symlink", lambda path: os.symlink(target, path)),
                           ("dangling", lambda path: os.symlink(nowhere, path)),
                           ("hardlink", lambda path: os.link(target, path))):
            self.box.pidfile = self.box.path(name)
            make(self.box.pidfile)
            with self.subTest(name):
                said = self.box.start("--", "sleep", "600", want=1).err
                self.assertRegex(said, "^daemonize: fatal: unable to .*" + name)
                for action, codes in (("stop", (0, 1)), ("status", (1, 3, 4))) * (name in ("fifo", "symlink")):
                    result = self.box.command(action, want=None)
                    self.assertIn(result.code, codes, result)
                    said += result.err
                self.assertNotIn("Traceback", said)
        after = os.stat(target)
        self.assertEqual((read(target), after.st_mode, after.st_uid, after.st_mtime, os.path.exists(nowhere)),
                         ("%d\n" % self.stranger.pid, before.st_mode, before.st_uid, before.st_mtime, False))
        self.assertEqual((self.stranger.poll(), self.box.processes()), (None, [self.stranger.pid]))

    def test_a_pidfile_that_all_can_write_names_nobody(self) -> None:
        """A world-writable pidfile with a stranger's pid: its owner's stop signals nobody."""
        self.box.write("d.pid", "%d\n" % self.stranger.pid, 0o666)
        result = self.box.command("stop", want=None)
        self.assertRegex(result.out + result.err, "not running|unable to trust")
        self.assertIsNone(self.stranger.poll())

    def test_a_pidfile_deleted_or_replaced_while_running_misleads_nobody(self) -> None:
        """The lock tells who it is: status 0, no second start, stop ends the daemon, not a stranger that is named."""
        for text in ("", "%d\n" % self.stranger.pid):
            self.box.start(app=APP)
            pid = self.box.pid()
            remove(self.box.pidfile)
            if text:
                self.box.write("d.pid", text)
            self.box.command("status")
            self.assertIn("already running with pid %d" % pid, self.box.start(app=APP).out)
            self.box.command("stop")
            self.assertEqual((is_alive(pid), self.stranger.poll()), (False, None))

    def test_the_same_pid_again_is_no_other_daemon(self) -> None:
        """A pidfile that holds the very pid of the command (containers recycle) does not block it."""
        argv = self.box.argv("start", "--logfile", self.box.log, "--", "sleep", "600")
        run(["sh", "-c", 'echo $$ > "$0"; exec "$@"', self.box.pidfile, *argv], 0, env=self.box.env)
        self.box.command("status")

    def test_a_folder_in_place_of_the_socket_is_refused(self) -> None:
        """PIDFILE.sock that is a folder: a start fails in one line, and what is in it stays."""
        self.box.make("d.pid.sock")
        precious = self.box.write(os.path.join("d.pid.sock", "precious"), "precious")
        said = self.box.start(app=APP, want=1).err
        self.assertRegex(said, r"(?m)^daemonize: fatal: unable to bind .*d\.pid\.sock: .+\n\Z")
        self.box.command("stop")
        self.assertEqual((read(precious), self.box.processes()), ("precious", [self.stranger.pid]))

    def test_a_lock_file_that_others_can_read_is_refused(self) -> None:
        """A file in place of the lock that is not 0600 is no lock: who can open it could hold it."""
        self.box.write("d.pid.lock", "{}", 0o644)
        self.assertIn("d.pid.lock: others can read it", self.box.start(app=APP, want=1).err)
        self.assertEqual(self.box.processes(), [self.stranger.pid])

    def test_a_pid_is_never_half_written(self) -> None:
        """Over a longer text: whoever reads in between finds the new pid in the first line, and then it alone."""
        said = self.box.python("fd = os.open(sys.argv[1], os.O_RDWR)\nreal = os.ftruncate\n"
                               "os.ftruncate = lambda *to: print(os.pread(fd, 9, 0).split()[:1]) or real(*to)\ndaemonize.write_pidfile(fd, 77)", self.box.write("d.pid", "99999999999\n")).out
        self.assertEqual((said, read(self.box.pidfile)), ("[b'77']\n", "77\n"))

    def test_a_pid_of_anothers_is_not_emptied(self) -> None:
        """The daemon ends, and its pidfile names somebody else by now: that stays."""
        self.box.start("--", "sleep", "600")
        pid = self.box.pid()
        self.box.write("d.pid", "4711\n")
        os.kill(pid, signal.SIGTERM)
        until(lambda: not is_alive(pid), "its end")
        self.assertEqual(read(self.box.pidfile), "4711\n")

    def test_who_comes_second_writes_no_pid(self) -> None:
        """Somebody took the instance lock while our probe was at work: the pidfile is that one's."""
        mine, wait = "%d\n" % os.getpid(), self.box.write("wait", "")
        self.box.write("d.pid", mine)
        app = self.box.write("app.py", Status.SLOW + repr(wait))
        child = self.box.spawn(*self.box.argv("start", "--logfile", self.box.log, "--app", app))
        until(lambda: "listening" in read(self.box.log), "a worker")
        with open(self.box.pidfile + ".lock", "rb") as lock:
            fcntl.lockf(lock, fcntl.LOCK_SH, 1, 1)
            os.unlink(wait)
            self.assertEqual((child.wait(PATIENCE), read(self.box.pidfile)), (1, mine))
        self.assertIn("already running with pid " + mine, read(self.box.output))

    def test_a_pidfile_of_another_tool_is_taken_over(self) -> None:
        """Of another mode, with a pid in it: it gets ours, so that monitors can read it."""
        self.box.write("d.pid", "4711\n", 0o600)
        self.box.start("--", "sleep", "600")
        self.assertEqual((os.stat(self.box.pidfile).st_mode & 0o777, read(self.box.pidfile)), (0o644, "%d\n" % self.box.pid()))

    @needs_other_user
    def test_a_pidfile_of_roots_that_a_user_may_write(self) -> None:
        """Prepared by root for a user: taken as it is."""
        self.box.make("theirs", 0o755, NOBODY)
        self.box.pidfile, self.box.log = self.box.write("theirs/d.pid", "", 0o666), self.box.path("theirs", "d.log")
        self.box.start("--", "sleep", "600", preexec_fn=drop(NOBODY), cwd="/")
        self.assertEqual((os.stat(self.box.pidfile).st_mode & 0o777, bool(self.box.pid())), (0o666, True))

    def test_a_link_is_not_read(self) -> None:
        """status of a pidfile that is a link: said, and nothing of what it leads to."""
        os.symlink(self.box.write("secret", "SECRET"), self.box.pidfile)
        said = self.box.command("status", want=1).out
        self.assertEqual(("SECRET" in said, "is a symbolic link" in said), (False, True))

    def test_what_is_no_pid_is_shown_in_short(self) -> None:
        """status of a pidfile that is a megabyte long: a line or two."""
        self.box.write("d.pid", "x" * 1000000)
        self.assertLess(len(self.box.command("status", want=1).out), 1000)


class Lock(BoxTest):
    """The lock decides who is the daemon"""

    def test_of_twenty_starts_at_once_one_wins(self) -> None:
        """20 concurrent starts: one daemon; the others say "already running with pid N"."""
        argv = self.box.argv("start", "--logfile", self.box.log, "--app", self.box.write("app.py", APP))
        starts = [self.box.spawn(*argv) for _ in range(20)]
        self.assertEqual([start.wait(PATIENCE) for start in starts], [0] * 20, read(self.box.output))
        self.assertEqual(strays(self.box), [])
        self.assertEqual(read(self.box.output).count("already running with pid %d\n" % self.box.pid()), 19)

    def test_after_SIGKILL_the_next_start_works_at_once(self) -> None:
        """kill -9 leaves nothing on the port, and neither a worker nor a child that left the session holds the lock."""
        address = "127.0.0.1:%d" % free_port()
        self.box.start("--bind", address, "--workers", "2", app=APP)
        ask(address, "run own session")
        until(lambda: len(self.box.processes()) == 4, "a child")
        os.kill(self.box.pid(), signal.SIGKILL)
        self.box.start("--bind", address, "--workers", "2", app=APP)
        until(lambda: len(self.box.processes()) == 4, "the end of the old workers")
        self.assertEqual(ask(address)["pid"], self.box.pid())

    def test_a_command_that_waits_says_for_whom(self) -> None:
        """stop during a start waits for its turn, names the pid that it waits for, and then stops."""
        app = self.box.write("app.py", APP + "Server.probe = lambda self: time.sleep(600)\n")
        first = self.box.spawn(*self.box.argv("start", "--logfile", self.box.log, "--app", app, "--start-timeout", "4"))
        until(lambda: read(self.box.log), "the first word of the application")
        result = self.box.command("stop")
        self.assertIn(str(first.pid), result.out + result.err)
        self.assertEqual((first.wait(PATIENCE), self.box.processes()), (1, []))

    def test_a_start_between_two_looks_is_no_orphan(self) -> None:
        """A daemon that has come to its place since status looked at its lock: it runs."""
        self.box.start(app=APP)
        self.box.python("real, seen = daemonize.lock_holder, []\n"
                        "daemonize.lock_holder = lambda *args: real(*args) if seen else seen.append(1)\n"
                        "daemonize.Lock.record = lambda self: None\nsys.exit(daemonize.main(sys.argv[1:]))",
                        "status", "--pidfile", self.box.pidfile)

    @needs_linux
    def test_a_daemon_is_no_second_one(self) -> None:
        """Who finds the instance lock with another than the one that it replaces gives its own back, and fails."""
        with open(self.box.write("lock", ""), "rb") as lock:
            fcntl.lockf(lock, fcntl.LOCK_SH, 1, 1)
            code = ("import sys, os, daemonize\nfor old in None, 1, int(sys.argv[1]):\n    fd = os.open(%r, 0)\n"
                    "    try: daemonize.take_instance(fd, old)\n    except daemonize.Fatal as error: print(error)\n"
                    "    print(' %%d ' %% os.getpid() in open('/proc/locks').read())" % lock.name)
            said = self.box.python(code, str(os.getpid())).out.splitlines()
        self.assertEqual(said, ["unable to start: already running with pid %d" % os.getpid(), "False"] * 2 + ["True"])

    def test_the_lock_of_a_file_that_is_gone_is_no_turn(self) -> None:
        """A failed start removes its lock file between our open(2) and our lock: we lock the new one."""
        code = ("import sys, os, daemonize, fcntl\nreal, gone = fcntl.lockf, []\ndef lockf(*words):\n    if not gone:\n"
                "        gone.append(os.unlink(sys.argv[1] + '.lock'))\n    return real(*words)\nfcntl.lockf = lockf\n"
                "with daemonize.Turn(daemonize.parse(['stop', '--pidfile', sys.argv[1]])) as turn:\n"
                "    print(os.fstat(turn.fd).st_nlink, gone)")
        said = self.box.python(code, self.box.pidfile).out
        self.assertEqual(said, "1 [None]\n")

    def test_who_takes_back_is_waited_for(self) -> None:
        """A starter whose command is dead undoes what it made, and holds byte 2 until it is done."""
        self.box.start("--", "sleep", "600")
        with open(self.box.pidfile + ".lock", "rb") as lock:
            fcntl.lockf(lock, fcntl.LOCK_SH, 1, 2)
            said = self.box.command("stop", "--timeout", "0.1", "--start-timeout", "0.1", want=1).err
            self.assertRegex(said, "unable to lock .*: pid %d is still busy with it" % os.getpid())
        self.box.command("stop")

    def test_who_waited_for_a_first_start_leaves_its_lock(self) -> None:
        """A start that found no lock file, waited for another, and is refused: that one's stays."""
        self.box.start(app=APP)
        argv = self.box.argv("start", "--logfile", self.box.log, "--", "sleep", "600")[2:]
        said = self.box.python("real = daemonize.exists\n"
                               "daemonize.exists = lambda path: path[-5:] != '.lock' and real(path)\n"
                               "sys.exit(daemonize.main(sys.argv[1:]))", *argv, want=1).err
        self.assertIn("the name is held", said)
        self.box.command("status")

    def test_a_turn_that_never_comes_is_given_up(self) -> None:
        """Another command that is busy longer than --start-timeout and --timeout: exit 1, and its pid."""
        self.box.start(app=APP)
        with open(self.box.pidfile + ".lock", "rb+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
            for action in ("stop", "restart"):
                said = self.box.command(action, "--timeout", "0.1", "--start-timeout", "0.1", want=1).err
                self.assertRegex(said, "unable to lock .*: pid %d is still busy with it" % os.getpid())
            self.box.command("status")
        self.box.command("stop")

    @needs_other_user
    def test_root_that_is_busy_is_waited_for(self) -> None:
        """The turn of a user's own daemon, held by a command of root's: the user's commands wait for it, too."""
        self.box.make("theirs", 0o755, NOBODY)
        self.box.pidfile, self.box.log = self.box.path("theirs", "d.pid"), self.box.path("theirs", "d.log")
        self.box.start("--", "sleep", "600", preexec_fn=drop(NOBODY), cwd="/")
        with open(self.box.pidfile + ".lock", "rb+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
            said = self.box.command("stop", "--timeout", "0.1", "--start-timeout", "0.1", want=1, preexec_fn=drop(NOBODY), cwd="/").err
            self.assertRegex(said, "unable to lock .*: pid %d is still busy with it" % os.getpid())


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
            spies = {name: functools.partial(lambda name, *ids: calls.append(name), name)
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
        until(lambda: len(self.logs()) > 2, "rotated logs")
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
            daemonize.as_user(USER, lambda: json.dump(self.ids(), said) or said.flush())
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
                (b'{"event": "\\u0000late"}\n', "")):
            channel, end = self.pair()
            with self.subTest(octets[:30]):
                end.sendall(octets)
                self.assertEqual(channel.receive(0)["event"], event)
        for is_reset in (False, True):
            channel, end = self.pair()
            channel.send("x") if is_reset else None
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
            said = daemonize.failure(None, {"event": "fatal", "text": "why", "status": status})
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
        child = daemonize.fork(lambda channel: channel.end.close() or signal.pause())
        with self.assertRaisesRegex(daemonize.Fatal,
                                    "it was killed by signal 9 before it was ready"):
            daemonize.expect([child], "able", PATIENCE)
        (one, end), (other, end2) = self.pair(), self.pair()
        end.sendall(b'{"event": "able", "pid": 7}\n')
        self.assertEqual(daemonize.expect([one], "able", PATIENCE, [other])["pid"], 7)
        self.assertRaises(daemonize.Late, daemonize.expect, [one], "able", 0)
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
        with mock.patch("os.fork", lambda: seen.append(blocked()) or fork()):
            child = daemonize.fork(lambda channel: channel.send(
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
        host.plan, host.pause, host.complain = self.plan(), 0, len
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
        for kind, word, times in ((daemonize.Service, "fork", [100, 101, 129, 130]),
                                  (daemonize.Program, "spawn", [100, 130])):
            host, tries = kind.__new__(kind), []  # type: Any, List[float]
            vars(host).update(plan=self.plan(), size=1, leaving=[], is_leaving=False, is_over=False,
                              is_owner=False, restarts=0, next_start=100, release=len)
            setattr(host, word, lambda *life: tries.append(time.monotonic()))
            for now in (99, 100, 101, 129, 130):
                host.children = []
                with mock.patch("time.monotonic", lambda: now):
                    host.tend()
            self.assertEqual((tries, host.restarts), (times, len(times)))
            host.children, host.is_over, host.is_leaving = [], True, True
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
fds = [os.open("data%%d" %% n, os.O_RDWR | os.O_CREAT) for n in range(12)]
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
        for argv in ((), ("begin",), ("start", "now")):
            result = self.action(*argv, want=2)
            self.assertIn("usage: recipe.py start|stop|restart|reload|status\n",
                          result.out + result.err)
        self.assertEqual(set(os.listdir(self.box.folder)) - {"__pycache__"}, {"recipe.py"})
        said = self.action("start", want=1).err
        self.assertIn("TypeError: startstop() got an unexpected keyword argument 'nonsense'", said)
        self.recipe(arguments=known)
        self.assertIn("off we go\n", self.action("start").out)
        self.assertIn(" /tmp\n", self.box.logged("main"))
        self.action("status")
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

    def test_a_recycled_pid_is_nobody(self) -> None:
        """A record whose pid was born at another time names nobody: stop signals no stranger."""
        self.script("os.closerange(3, 256)\ntime.sleep(600)\n")
        self.action("start")
        pid, stranger = self.box.pid(), self.box.spawn("sleep", "600")
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
        for result, report, said in ((0, 1, early % 0 + cure), (768, 1, early % 3), (768, None, ""),
                                     (None, 1, "")):
            child = mock.Mock(result=result, wait=mock.Mock(side_effect=[None] + [result] * 99))
            program = self.program(start=mock.Mock(report=report), children=[child], spawn=list,
                                   bury=mock.Mock())
            with self.subTest(said, report=report), \
                    mock.patch.multiple(daemonize, ALIVE=0.05, POLL=0.01):
                try:
                    program.bring_up()
                    self.assertFalse(said)
                except daemonize.Fatal as error:
                    self.assertEqual(str(error), said)
                self.assertEqual((program.children, program.bury.call_count),
                                 ([child] * (not said), report is None))

    def test_one_that_cannot_be_executed_is_not_kept(self) -> None:
        """Its child is waited for, and has said why; nor is any file of its name a program."""
        child = mock.Mock(receive=lambda seconds: {"event": "fatal", "text": "why"})
        program = self.program(fork=lambda life: child, children=[])
        self.assertRaisesRegex(daemonize.Fatal, r"\Awhy\Z", program.spawn)
        self.assertEqual((child.kill.call_count, program.children), (1, []))
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

    def test_how_it_ends_is_how_the_daemon_ends(self) -> None:
        """With its exit status, or 128 and the signal's number; not at all with --respawn."""
        for options, status, over, result in (([], 768, True, 3), ([], 9, True, 137),
                                              (["--respawn"], 768, False, 0)):
            program = self.program(*options)
            program.on_death(mock.Mock(pid=7, born=0), status)
            self.assertEqual((program.is_over, program.result, program.next_start > 0),
                             (over, result, True))

    def test_it_gets_SIGHUP_if_it_handles_that(self) -> None:
        """And if the log could be opened again: the reason is said else."""
        ignorant = "it does not handle SIGHUP, and would end"
        for pids, handles, reason, said in (([7], True, "", ""), ([7], True, "no log", "no log"),
                                            ([7], False, "", ignorant),
                                            ([7], False, "no log", ignorant),
                                            ([], True, "",
                                             "it does not run: it is to be started again")):
            program = self.program(children=[mock.Mock(pid=pid) for pid in pids],
                                   reopen=lambda fds: reason)
            with mock.patch.object(daemonize, "handles",
                                   lambda *of: handles), mock.patch("os.kill") as kill:
                self.assertEqual((program.reload([]), kill.call_count), (said, int(not said)))

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
        plan = daemonize.parse(["start", "--name", "x", "--", PYTHON, "nap.py"], self.box.folder)
        self.assertRaises(daemonize.Fatal, daemonize.check_script, plan, None)
        daemonize.check_script(plan._replace(chroot="/jail"), None)

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

    def draining(self) -> Tuple[int, "subprocess.Popen[bytes]"]:
        """Return the old daemon, which drains, and the restart that waits for it."""
        old, child = self.box.pid(), self.calling("restart")
        until(lambda: self.box.pid() not in (0, old) and child.poll() is None and is_alive(old),
              "a new daemon")
        return old, child


class PointOfNoReturn(SlowTest):
    """Before it all that a start has made is undone, after it nothing is; whatever interrupts it"""

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
        self.assertIn("not ready after 0.5 s\ndaemonize: fatal: the old one keeps serving with "
                      "pid %d\n" % self.box.pid(), said)
        self.assertEqual(ask(address)["pid"], self.box.pid())

    @needs_root
    def test_a_full_disk_stops_a_restart_before_it(self) -> None:
        """When the lock file cannot hold the new options, the old one serves on with its own."""
        small = self.small_disk("24k")
        self.box.pidfile = os.path.join(small, "d.pid")
        address, pid = self.box.host("--word", "old"), self.box.pid()
        self.fill(small)
        said = self.box.command("restart", *self.app(), "--word", "x" * 9000, want=1).err
        self.assertRegex(said, r"unable to write .*d\.pid\.lock: No space left on device\n"
                         r".*keeps serving with pid %d" % pid)
        self.assertEqual((ask(address)["pid"], self.box.pid()), (pid, pid))
        self.box.command("restart")
        self.assertEqual(self.box.status()["word"], "old")

    def test_who_cannot_be_told_is_not_told(self) -> None:
        """A restart that hears no "done" does not claim that the old one serves, or nobody."""
        for inherits in (daemonize.Inherited(talk=1), daemonize.Inherited()):
            launch = mock.Mock(side_effect=daemonize.Unknown("cannot tell"))
            with mock.patch.multiple(daemonize, Target=mock.Mock(),
                                     take_over=lambda *words: inherits,
                                     see_out=mock.Mock(), launch=launch):
                with self.assertRaisesRegex(daemonize.Unknown, r"\Acannot tell\Z"):
                    daemonize.replace(self.plan(), None, 1, True)

        for holder, outcome in ((7, "the old one keeps serving with pid 7"),
                                (None, "nothing runs now"),
                                (8, "nothing runs now")):
            said = daemonize.with_outcome(daemonize.Fatal("why", 2), 7, holder)
            self.assertEqual((str(said), said.status), ("why\ndaemonize: fatal: " + outcome, 2))

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
        said = self.changed("d.ANSWER = 0.3; d.report_done = lambda start: None", "start",
                            "--logfile", self.box.log, "--", "sleep", "600", want=1).err
        self.assertIn("daemonize: fatal: unable to tell whether sleep has started\n"
                      "try: daemonize.py status\n", said)
        self.box.command("status")

    def test_no_place_is_taken_without_a_word(self) -> None:
        """The command died between "ready" and "go", or said another thing."""
        for last in (b"", b'{"event": "no"}\n'):
            ours, theirs = socket.socketpair()
            opened = daemonize.Opened([], -1, None, -1, None, "")
            start = daemonize.Start(self.plan(), opened, daemonize.Inherited(),
                                    report=daemonize.Channel(ours))
            with ours, theirs, mock.patch.object(daemonize, "take_instance", side_effect=TypeError):
                theirs.sendall(last)
                theirs.shutdown(socket.SHUT_WR)
                with self.assertRaisesRegex(daemonize.Fatal,
                                            "^unable to start: the command .* is gone$"):
                    daemonize.take_place(start)

    def test_a_terminals_signal_reaches_both(self) -> None:
        """Ctrl-C, or a hang-up, for command and starter, while bind() is at work."""
        made = self.box.path("made")
        app = self.app("""
def bind(options):
    open(%r, "w").close()
    try:
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
        for action, moment in (("start", "write_pidfile"), ("restart", "replace_predecessor")):
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
                old, moment = self.box.pid(), "replace_predecessor"
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
        def kinds() -> List[str]:
            return sorted(re.sub(r"\d+", "", fd) for one in family(self.box.pid())
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
                found = []
                for action in ("start", "restart"):
                    words = hosted if action == "start" else hosted[:2]
                    run([*argv, action, *words], 0, env=self.box.env, cwd=self.box.folder)
                    found.append(until(kinds, "its descriptors"))
                self.assertEqual(*found)
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
        self.assertEqual(daemonize.look_at(child.pid).pid, child.pid)
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
            return daemonize.options_for(app, plan, daemonize.Inherited(legacy=7))
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
        self.all_say(r"unable to look at \S.*closed/d\.pid\.lock: Permission denied",
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
                             (is_adopted, False))
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
        self.assertIn(" up 0 s", self.poor("status").out)
        for action in ("reload", "restart"):
            self.poor(action)
            self.assertNotEqual(ask(address)["worker"], old)
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
    return "%s:%s:%s\n" % (user, realm, md5("%s:%s:%s" % (user, realm, password)))


def md5(text: str) -> str:
    """Return the MD5 of a text in hex (what a digest client needs)."""
    return hashlib.md5(text.encode()).hexdigest()


def fetch(address: str, scheme: str, user: str, password: str, path: str = "/example/foo") -> str:
    """Return a page as urllib's own client gets it; raise its HTTPError."""
    manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    manager.add_password(None, "http://%s/" % address, user, password)
    kinds = {"basic": urllib.request.HTTPBasicAuthHandler, "digest": urllib.request.HTTPDigestAuthHandler}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), kinds[scheme](manager))
    with opener.open("http://%s%s" % (address, path), timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def refusal(address: str, scheme: str, user: str, password: str) -> int:
    """Return the status with which a page is refused; 0 when it is not."""
    try:
        fetch(address, scheme, user, password)
    except urllib.error.HTTPError as error:
        if error.fp:
            error.close()
        return error.code
    return 0


# -- 5.1 Beside other programs: proxies, several machines, hosts of many kinds --
#
# Real ones, where installed; what Traefik and Envoy send.  Words in capitals are replaced.

NGINX_FRAME = """daemon off; master_process off; pid nginx.pid; error_log error.log; events { }
http { access_log off; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3;
uwsgi_temp_path t4; scgi_temp_path t5; %s }
"""
ASKING = {"nginx": NGINX_FRAME % """server { listen FRONT;
location / { auth_request /_auth; auth_request_set $user $upstream_http_remote_user;
  proxy_set_header Remote-User $user; proxy_set_header X-Remote-User ""; proxy_pass http://BEHIND; }
location = /_auth { internal; proxy_pass http://AT/auth; proxy_pass_request_body off;
  proxy_set_header Content-Length ""; proxy_set_header X-Forwarded-For $remote_addr;
  proxy_set_header X-Original-Method $request_method; proxy_set_header X-Original-URI $request_uri; } }""",
          "caddy": """{
 admin off
}
http://:PORT {
 bind 127.0.0.1
 forward_auth AT {
  uri /auth
  copy_headers Remote-User
 }
 request_header -Remote_User
 request_header -X-Remote-User
 reverse_proxy BEHIND
}
"""}
BALANCING = {"nginx": NGINX_FRAME % """upstream nodes { NODES keepalive 8; } server { listen FRONT; location / {
proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection "";
proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $remote_addr; } }""",
             "haproxy": """global
 stats socket "STATS"
listen nodes
 mode http
 bind FRONT
 timeout connect 2s
 option redispatch 1
 retry-on conn-failure empty-response
 balance roundrobin
 CHECK
NODES"""}
PROXIES = {"nginx": ["nginx", "-e", "stderr", "-p", "FOLDER", "-c", "FILE"],
           "haproxy": ["haproxy", "-db", "-q", "-f", "FILE"],
           "caddy": ["caddy", "run", "--adapter", "caddyfile", "--config", "FILE"]}


def proxy(box: Box, program: str, text: str, **words: str) -> str:
    """Run a proxy with a configuration until it listens, and return its address."""
    words.update(PORT=str(free_port()), STATS=box.path("stats"), FOLDER=box.folder)
    words["FRONT"] = front = "127.0.0.1:" + words["PORT"]
    text = functools.reduce(lambda all, word: all.replace(word, words[word]), words, text)
    words["FILE"] = box.write(program + ".conf", text)
    box.server = box.spawn(*[words.get(word, word) for word in PROXIES[program]])
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
    "an empty URI": ASKED[:1] + ["X-Original-URI:"], "an empty URI beside one": ASKED + ["X-Forwarded-Uri:"]}


class ForwardAuth(HttpTest):
    """--forward-auth: a proxy asks whether a request may pass"""
    options = ("--forward-auth", "/auth", "--trusted-proxy", "127.0.0.1")
    fronts: Dict[str, str]

    @classmethod
    def set_up(cls) -> None:
        super().set_up()
        behind = cls.box.launch(PYTHON, cls.box.write("behind.py", BEHIND))
        cls.fronts = {program: proxy(cls.box, program, text, AT=cls.at, BEHIND=behind)
                      for program, text in ASKING.items() if shutil.which(program)}

    @contextlib.contextmanager
    def through(self, program: str) -> Iterator[str]:
        """Give the body the address of a proxy, in a subTest."""
        with self.subTest(program):
            if program not in self.fronts:
                self.skipTest("needs " + program)
            yield self.fronts[program]

    @needs("curl")
    def test_curl_gets_through(self) -> None:
        """curl --digest, --basic and --anyauth, GET and POST with a body; with a wrong password 401."""
        for program in ASKING:
            with self.through(program) as at:
                for kind in ("--digest", "--basic", "--anyauth"):
                    for data in ("", "a=b"):
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
        """Chromium shows the page behind."""
        for program in ASKING:
            with self.through(program) as at:
                self.assertIn('"Remote-User", "jim"', browse(self.box, "http://jim:secret@%s/page" % at))

    def test_each_challenge_arrives_and_each_proof_counts_once(self) -> None:
        """Two WWW-Authenticate lines through the proxy; a replay is 401, another path 403."""
        for program in ASKING:
            with self.through(program) as at:
                offers = [value.split()[0] for name, value in request(at, "/p", "GET", "").fields
                          if name == "www-authenticate"]
                old = program == "nginx" and re.search(r"/1\.(1?\d|2[0-2])\.", run(["nginx", "-v"]).err)
                self.assertEqual(offers, ["Digest", "Basic"][:1 if old else 2])  # nginx passes on both since 1.23
                proof = digest(at, "/p")
                self.assertEqual([request(at, "/p", "GET", proof).status for _ in range(2)], [200, 401])
                self.assertEqual(request(at, "/q", "GET", digest(at, "/p")).status, 403)

    def test_a_name_that_a_client_brings_reaches_nobody(self) -> None:
        """Remote-User and its aliases never reach the backend; what a proxy would say opens nothing."""
        for program in ASKING:
            with self.through(program) as at:
                for name in ("Remote-User", "Remote_User", "REMOTE-USER", "X-Remote-User"):
                    fields = json.loads(request(at, "/p", "GET", JIM, name + ": root").body)[2]
                    self.assertEqual([value for field, value in fields if re.fullmatch(
                        "(?i)(x[-_])?remote[-_]user", field)], ["jim"], name)
                for name in ("X-Original-URI", "X-Forwarded-Uri"):
                    for auth in (digest(at, "/q"), ""):
                        self.assertIn(request(at, "/p", "GET", auth, name + ": /q").status, (401, 403))

    def test_what_proxies_send(self) -> None:
        """nginx, Traefik, Caddy, Envoy: a proof for the method and target that they say, once, as jim."""
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
        """Not one method and one URI, or a peer that nobody trusts: 403, whatever password, and a log line."""
        for sentence, fields in UNCLEAR.items():
            with self.subTest(sentence):
                for auth in (JIM, ""):
                    path = "/auth/y" if "path" in sentence else "/auth"
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
        def ask(auth: str, client: str) -> int:
            return request(self.at, "/auth", "GET", auth, "X-Forwarded-For: " + client, *ASKED).status
        for auth in ("Basic %", "Basic amlt", *(digest(self.at, uri) for uri in ("/x", "/a%2Fx", "/a/x?"))):
            self.assertEqual(ask(auth, "192.0.2.1"), 403)
        self.assertEqual(ask(digest(self.at, "/a/%78"), "192.0.2.1"), 200)  # spelt anew, as Caddy does
        self.assertEqual([ask(WRONG, "192.0.2.9") for _ in range(10)], [401] * 10)
        self.assertEqual([ask(JIM, client) for client in ("192.0.2.9", "192.0.2.10")], [403, 200])


class Caller(threading.Thread):
    """A client that asks until it is told to end; it knows its password, and counts what it hears."""

    def __init__(self, address: str, scheme: str, keeps: bool, end: threading.Event) -> None:
        super().__init__()
        self.address, self.keeps, self.end = address, keeps, end
        self.digest = Digest("", uri="/example/foo") if scheme == "digest" else None
        self.answers = self.challenges = self.stale = 0
        self.failures: List[str] = []
        self.start()

    def run(self) -> None:
        """Ask on one connection as long as it lasts, then on another."""
        while not self.end.wait(0.01):     # the machine is there for others, too
            try:
                with Wire(self.address) as wire:
                    while self.ask(wire) and not self.end.wait(0.01):
                        pass
            except (OSError, ValueError, IndexError) as error:
                self.failures.append(repr(error))

    def ask(self, wire: Wire) -> bool:
        """Ask once and count the answer; tell whether the connection goes on."""
        field = JIM if not self.digest else self.digest.field() if "nonce" in self.digest.values else ""
        answer = wire.ask("/example/foo", "GET", field, *[CLOSE] * (not self.keeps))
        self.answers += answer.status == 200
        challenge = answer.field("WWW-Authenticate") or ""
        if answer.status == 401 and self.digest:
            self.stale += "stale=true" in challenge
            self.challenges += "stale=true" not in challenge
            self.digest.hear(challenge)
        elif answer.status != 200:
            self.failures.append(str(answer.status))
        return self.keeps and (answer.field("Connection") or "").lower() != "close"


@contextlib.contextmanager
def calling(*addresses: str) -> Iterator[Tuple[List[Caller], Callable[[], None]]]:
    """Let clients of each kind ask; the body gets them, and a wait for another dozen answers each."""
    end = threading.Event()
    callers = [Caller(address, scheme, keeps, end) for address in addresses
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
        """Start the daemon of a node."""
        cls.nodes[number].start("--bind", cls.places[number], *cls.options)

    @classmethod
    def tearDownClass(cls) -> None:
        for node in cls.nodes:
            node.close()
        super().tearDownClass()

    def balance(self, *programs: str, check: str = "option httpchk GET /example/healthz") -> List[str]:
        """Run the balancers that are installed until the test ends; return their addresses."""
        lines = {"haproxy": " server n%d %s check inter 100ms fall 2 rise 1\n",
                 "nginx": "server %.0s%s max_fails=1 fail_timeout=1s;"}
        fronts = []
        for program in programs:
            with self.subTest(program):
                if not shutil.which(program):
                    self.skipTest("needs " + program)
                nodes = "".join(lines[program] % pair for pair in enumerate(self.places))
                fronts.append(proxy(self.box, program, BALANCING[program], NODES=nodes, CHECK=check))
                self.addCleanup(self.box.kill, self.box.server)
        return fronts

    def sees(self, *want: str) -> None:
        """Wait until HAProxy sees the nodes so."""
        stats = "unix:" + self.box.path("stats")
        until(lambda: re.findall(r"(?m)^nodes,n\d,(?:[^,]*,){15}(\w+)",
                                 talk(stats, b"show stat\n").decode()) == list(want), "nodes %s" % (want,))

    def check(self, callers: Sequence[Caller], lost: int = 0) -> None:
        """Assert that no request was lost, and that nobody was asked for a password twice."""
        for caller in callers:
            self.assertLessEqual(len(caller.failures), lost, caller.failures)
            self.assertEqual(caller.challenges, 1 if caller.digest else 0)

    def test_any_node_answers_and_restarts_cost_nothing(self) -> None:
        """Round-robin under load: one challenge to each Digest client; nothing lost in a rolling restart."""
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
        for check in ("option httpchk GET /example/healthz", "option httpchk GET /\n http-check expect status 401"):
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


LOGROTATE = 'LOG {\n rotate 9\n nocreate\n postrotate\n  RELOAD\n endscript\n}\n'
SUPERVISORD = "[supervisord]\nnodaemon=true\nlogfile=s.log\npidfile=s.pid\n[program:authserver]\ncommand=RUN\n"
CONTAINER = r'''
mount -t tmpfs -o mode=1777 none "$1" && cp "$2" "$1/users" && chmod 0444 "$1/users" &&
mount -o remount,ro,bind "$1" && mount -t tmpfs -o mode=1777 none "$3" &&
mount -o remount,ro,bind / && shift 3 && exec "$@"
'''


class Supervisors(BoxTest):
    """What people run it under, beyond what Readme tries"""

    def setUp(self) -> None:
        super().setUp()
        self.at = "127.0.0.1:%d" % free_port()
        self.passwords = self.box.write("passwords", ha1_line("jim", "secret"), 0o600)
        self.options = ["--bind", self.at, "--passwords", self.passwords, "--workers", "1"]

    def write(self, name: str, text: str, mode: int = 0o644) -> str:
        """Write a file of settings; each command as a shell and supervisord read it."""
        for word, argv in (("RUN", self.box.argv("run", *self.options)), ("LOG", [self.box.log]),
                           ("RELOAD", self.box.argv("reload", "--quiet"))):
            text = text.replace(word, " ".join(map(shlex.quote, argv)))
        return self.box.write(name, text, mode)

    def answers(self, after: int = 0) -> int:
        """Wait for a daemon other than `after`, see jim let in, and return its pid."""
        until(lambda: self.box.pid() not in (0, after) and not reach(self.at), "a daemon that answers")
        self.assertEqual(request(self.at).status, 200)
        return self.box.pid()

    @needs_other_user
    @needs("logrotate")
    def test_logrotate_in_a_folder_of_roots(self) -> None:
        """Rename and reload under load, the log in a folder where only root may create: no line lost."""
        self.box.write("passwords", ha1_line("jim", "secret"), 0o640, NOBODY)
        self.box.start(*self.options, "--uid", str(NOBODY), "--log-bytes", "0")
        conf = self.write("rotate.conf", LOGROTATE)
        with calling(self.at) as (callers, go_on):
            for _ in range(4):
                run(["logrotate", "-f", "-s", self.box.path("state"), conf], 0)
                go_on()
            self.box.write("passwords", "no colon\n", 0o640, NOBODY)  # a mistake refuses all but the log
            self.assertEqual(run(["logrotate", "-f", "-s", self.box.path("state"), conf]).code, 1)
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
        """supervisord and runit start it, start it again when it is killed, and end it."""
        self.box.make("service")
        self.write("service/run", "#!/bin/sh\nexec 2>&1\nexec RUN\n", 0o755)
        for argv in (["supervisord", "-c", self.write("s.conf", SUPERVISORD)],
                     ["runsv", self.box.path("service")]):
            with self.subTest(argv[0]):
                if not shutil.which(argv[0]):
                    self.skipTest("needs " + argv[0])
                child = self.box.spawn(*argv)
                first = self.answers()
                os.kill(first, signal.SIGKILL)
                self.answers(first)
                child.terminate()
                self.assertEqual((child.wait(PATIENCE), self.box.processes()), (0, []))

    @needs_other_user
    @needs("unshare")
    def test_a_container(self) -> None:
        """pid 1, a user without a name, a root that is read-only, a secret of mode 0444: it serves, and ends."""
        secrets, temp = self.box.make("secrets"), self.box.make("tmp")
        self.box.pidfile = self.box.path("tmp", "d.pid")
        argv = self.box.argv("run", "--bind", self.at, "--passwords", secrets + "/users")
        child = self.box.spawn(
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", CONTAINER,
            "sh", secrets, self.passwords, temp, "setpriv", "--reuid", "10001", "--regid", "10001",
            "--clear-groups", *argv)
        until(lambda: not reach(self.at), "a container")
        self.assertEqual(request(self.at).status, 200)
        os.kill(family(child.pid)[1], signal.SIGTERM)  # its pid 1
        self.assertEqual(child.wait(PATIENCE), 0, read(self.box.output))


# -- 5.2 daemonize.py with authserver.py ----------------------------------------


class Together(BoxTest):
    """daemonize.py with authserver.py"""

    def started(self, *options: str, text: str = "", **keys: Any) -> Result:
        """Start the authserver on a free port with a password file of root's."""
        self.box.write("passwords", text or ha1_line("jim", "secret"), 0o600)
        return self.box.start("--bind", "127.0.0.1:0", "--passwords", self.box.path("passwords"), *options, **keys)

    def test_start_serves_basic_and_digest(self) -> None:
        """urllib gets in with both, from one dictionary; that is counted; no password reaches log, status or ps."""
        address = self.box.address(self.started(text=ha1_line("jim", "h0ly-secret") + ha1_line("ann", "x")))
        for scheme in ("basic", "digest"):
            page = fetch(address, scheme, "jim", "h0ly-secret", "/example/<foo>")
            self.assertIn("&lt;foo&gt;", page)
            self.assertEqual(refusal(address, scheme, "jim", "h0ly-wrong"), 401)
        until(lambda: read(self.box.log).count('" 401 ') >= 3, "the access lines")
        self.assertIn('"GET /example/<foo> HTTP/1.1" 200', read(self.box.log).replace("%3C", "<").replace("%3E", ">"))
        report = until(lambda: [r for r in [self.box.status()] if r["requests"] >= 4], "four requests")[0]
        self.assertEqual(report["users"], 2)
        lines = [read("/proc/%d/cmdline" % pid) for pid in self.box.processes()]
        everything = "".join(lines) + read(self.box.log) + json.dumps(report)
        for secret in ("h0ly", base64.b64encode(b"jim:h0ly-secret").decode(), md5("jim:authserver:h0ly-secret")):
            self.assertNotIn(secret, everything)

    def test_what_cannot_be_served_is_told_at_start(self) -> None:
        """The port is taken: one line; an entry that cannot serve Digest, no password file: usage. Nothing is left."""
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
        """A new password counts after reload, with a --nonce-secret; a mistake refuses the whole and names its line."""
        secret = self.box.path("secret")
        address = self.box.address(self.started("--workers", "1", "--nonce-secret", secret))
        self.assertEqual(os.stat(secret).st_mode & 0o777, 0o600)
        self.box.write("passwords", ha1_line("jim", "other"), 0o600)
        self.box.command("reload")
        fetch(address, "digest", "jim", "other")
        self.box.write("passwords", ha1_line("jim", "third") + "no colon\n", 0o600)
        self.assertIn("line 2", self.box.command("reload", want=1).err)
        fetch(address, "basic", "jim", "other")

    @needs_root
    def test_roots_passwords_serve_a_daemon_without_rights(self) -> None:
        """A password file that only root can read is read before the drop; reload says `try: restart`."""
        address = self.box.address(self.started("--uid", str(NOBODY), "--workers", "1"))
        fetch(address, "digest", "jim", "secret")
        self.box.write("passwords", ha1_line("jim", "new"), 0o600)
        self.assertIn("try: daemonize.py restart", self.box.command("reload", want=1).err)
        fetch(address, "basic", "jim", "secret")
        self.box.command("restart")
        fetch(address, "digest", "jim", "new")

    @needs_root
    def test_it_serves_in_an_empty_jail(self) -> None:
        """--chroot with an empty folder and --uid: served, logged, restarted, stopped."""
        jail = self.box.make("jail")
        address = self.box.address(self.started("--chroot", jail, "--uid", str(NOBODY)))
        fetch(address, "digest", "jim", "secret")
        self.box.command("restart")
        fetch(address, "basic", "jim", "secret")
        until(lambda: '" 200 ' in read(self.box.log), "an access line")
        self.box.command("stop")
        self.assertEqual((self.box.processes(), os.listdir(jail)), ([], []))

    def test_no_request_is_lost_in_restarts_and_reloads(self) -> None:
        """Basic and Digest, kept and new connections, through restart and reload: no failed request."""
        address = self.box.address(self.started("--workers", "2", text=ha1_line(BENCH_USER, BENCH_PASSWORD)))
        end = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(load, address, scheme, PATIENCE, 2, keep, "authserver", end)
                       for scheme in ("basic", "digest") for keep in (True, False)]
            try:
                for action in ("restart", "reload", "restart"):
                    self.box.command(action)
            finally:
                end.set()
        for client in clients:
            answers, failures = client.result()
            self.assertEqual((failures, answers > 20), (0, True), answers)

    def test_a_restart_costs_a_digest_client_one_silent_stale(self) -> None:
        """After a restart an old nonce gets `stale=true` once, and is never accepted twice."""
        address = self.box.address(self.started())
        proof, seen = digest(address, "/"), []
        for action in ("status", "restart"):
            self.box.command(action)
            seen.append(request(address, "/", "GET", proof))
        self.assertEqual([answer.status for answer in seen], [200, 401])
        self.assertRegex(seen[1].field("www-authenticate") or "", r"(?i)stale=true")

    def test_a_unix_socket_is_handed_over(self) -> None:
        """restart keeps a unix socket that is still asked for, and closes one that is not."""
        first, second = ("unix:" + self.box.path(name) for name in ("one", "two"))
        self.started("--bind", first, "--workers", "1")
        inode = os.stat(first[5:]).st_ino
        self.box.command("restart")
        self.assertEqual(os.stat(first[5:]).st_ino, inode)
        self.box.command("restart", "--logfile", self.box.log, "--bind", second, "--passwords", "passwords")
        self.assertEqual(request(second, "/", "GET", "").status, 401)
        with socket.socket(socket.AF_UNIX) as sock:
            self.assertEqual(sock.connect_ex(first[5:]), errno.ECONNREFUSED)

    def test_a_socket_of_systemd_is_served_wherever_it_is(self) -> None:
        """With LISTEN_FDS and no --bind the handed socket is served, and no other one is opened."""
        passwords = self.box.write("passwords", ha1_line("jim", "secret"), 0o600)
        _, address = self.activated(*self.box.argv("run", "--passwords", passwords, "--workers", "1"))
        until(self.box.pid, "a pidfile")
        self.assertEqual(self.box.status()["addresses"], ["http://%s/" % address])
        fetch(address, "digest", "jim", "secret")

    def test_a_head_that_is_half_sent_spans_a_restart(self) -> None:
        """Who is in the middle of a request when restart comes gets the answer, from the old one."""
        address = self.box.address(self.started("--workers", "1"))
        old = self.box.pid()
        with connect(address) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost:")
            restart = self.box.spawn(*self.box.argv("restart"))
            until(lambda: self.box.pid() not in (0, old), "a new daemon")
            self.assertEqual(exchange(sock, b" x\r\n\r\n").status, 401)
        self.assertEqual(restart.wait(PATIENCE), 0, read(self.box.path("output")))
        self.assertFalse(is_alive(old))


class DefaultFilesTest(BoxTest):
    """A test of daemons with their default files, under names of its own."""

    def setUp(self) -> None:
        super().setUp()
        self.name = self.own_name()
        self.passwords = "/etc/%s.passwords" % self.name if ROOT else os.path.join(HOME, "." + self.name, "passwords")

    def action(self, action: str, *options: str, **keys: Any) -> Result:
        """Run an action on the daemon of this name, with the default files."""
        return self.box.daemonize(action, "--name", self.name, *options, **keys)


@needs_home
class FirstStart(DefaultFilesTest):
    """The very first start"""

    def test_the_command_that_changes_it_knows_the_realm(self) -> None:
        """What the first start says changes that user in that realm and reloads that daemon; restart keeps it."""
        result = self.action("start", "--bind", "127.0.0.1:0", "--realm", "a b")
        address = self.box.address(result)
        self.assertIn("\ntry: curl --digest -u admin http://%s/example/foo\n" % address, result.out)
        password, change, reload = re.findall(r"(?m)^password: (.+)\n.*\nchange it: (.+) && (.+)$", result.out)[0]
        self.action("restart")
        fetch(address, "digest", "admin", password)
        self.assertIn("changed", run(["sh", "-c", change + " --stdin"], 0, b"new\n").out)
        self.assertIn("reloaded", run(["sh", "-c", reload], 0).out)
        for scheme in ("digest", "basic"):
            fetch(address, scheme, "admin", "new")
        self.assertRegex(self.box.daemonize("start", "--quiet", "--name", self.name + "2", "--realm", "c", want=2).err,
                         "(?m)^try: .* --realm c$")

    @needs_root
    def test_the_file_is_for_the_daemons_group(self) -> None:
        """With --uid the first password file is root:GROUP 0640, so that reload can read it."""
        self.action("start", "--bind", "127.0.0.1:0", "--uid", str(NOBODY), "--gid", str(OTHER))
        info = os.stat(self.passwords)
        self.assertEqual((info.st_uid, info.st_gid, info.st_mode & 0o777), (0, OTHER, 0o640))
        self.action("reload")

    def test_a_start_that_fails_takes_the_file_away(self) -> None:
        """When the first start fails no password file stays."""
        with taken_port() as port:
            self.action("start", "--bind", "127.0.0.1:%d" % port, want=1)
        self.assertFalse(os.path.exists(self.passwords))

    def test_quiet_start_and_run_never_make_one(self) -> None:
        """start --quiet and run without a password file: exit status 2, `try: authserver.py passwd`."""
        for argv in (["start", "--quiet"], ["run"]):
            result = self.action(*argv, "--bind", "127.0.0.1:0", want=2)
            self.assertRegex(result.err, r"(?m)^try: .*authserver\.py passwd \S+ \S+$")
            self.assertFalse(os.path.exists(self.passwords))

    def test_restart_on_a_unix_socket_is_a_first_start(self) -> None:
        """restart of what never ran is start: with unix:PATH it prints a curl line with --unix-socket."""
        path = self.box.path("sock")
        said = self.action("restart", "--bind", "unix:" + path).out
        self.action("status")
        self.assertIn("\ntry: curl --digest -u admin --unix-socket %s http://localhost/example/foo\n" % (
            shlex.quote(path)), said)


@needs_home
class FirstMinute(DefaultFilesTest):
    """start --root . on a box that has nothing yet"""

    def setUp(self) -> None:
        super().setUp()
        self.box.write(os.path.join(self.box.make("shared"), "a b.txt"), "shared")

    def start(self, *options: str) -> Result:
        """Start on the folder `shared`; the environment holds what finds this test's processes, no more."""
        return self.action("start", "--root", "shared", *options, env={"DAEMONIZE_TEST": self.box.folder})

    @needs("curl")
    def test_what_it_says_can_be_pasted(self) -> None:
        """user, password (once), kept in, change it, try: in these lines; the commands work as they stand."""
        said = self.start("--bind", "127.0.0.1:0")
        url = "http://%s/" % self.box.address(said)
        found = re.search("(?m)^user: admin\npassword: (\\S{12,})\nkept in: (.*)\nchange it: (python3 .* passwd .* admin "
                          "&& python3 .* reload.*)\ntry: (curl --digest -u admin %s)\n\\Z" % url, said.out)
        self.assertTrue(found, said.out)
        password, path, change, again = found.groups() if found else ("",) * 4
        self.assertEqual((shlex.split(path), said.err), ([self.passwords], ""))
        self.assertEqual(os.stat(self.passwords).st_mode & 0o777, 0o600)
        for new in ("", "another one"):
            if new:  # asked twice, on the terminal, and there is none
                run(["sh", "-c", change], 0, ((new + "\n") * 2).encode(), env=self.box.env, start_new_session=True, cwd="/")
            command = again.replace("-u admin", "-u 'admin:%s' -sf --noproxy '*'" % (new or password))
            self.assertIn("a b.txt</a>", run(["sh", "-c", command], 0, cwd="/").out)
            self.assertIn("shared", run(["sh", "-c", command.replace(url, url + "a%20b.txt")], 0, cwd="/").out)
        self.assertNotIn(password, read(self.passwords) + self.start("--bind", "127.0.0.1:0").out)

    def test_where_a_network_listens(self) -> None:
        """Without TLS one line says that Basic is off, and what can be read; with TLS there is none."""
        said = self.start("--bind", ":0")
        self.assertRegex(said.err, r"\Aauthserver: warning: .*network.* http://\S+:\d+/.*Basic is off.*read.*\n(try: .*\n)?\Z")
        self.assertRegex(said.out, r"\ntry: curl --digest -u admin http://(\[::1\]|127\.0\.0\.1):\d+/\n\Z")
        self.action("stop")
        self.assertEqual(self.start("--bind", ":0", "--tls-cert", make_certificate(self.box)).err, "")

    def test_folders_that_cannot_be_served(self) -> None:
        """Missing, no folder, outside the jail; closed to the daemon's user, which shows later: said, nothing left."""
        self.box.make("closed", 0o700)
        self.box.make("jail")
        rows = [(2, ["none"], "none: No such file"), (2, ["shared/a b.txt"], "a b.txt: Not a directory")]
        rows += [(2, ["shared", "--chroot", "jail"], "shared: .*--chroot")] * ROOT
        if ROOT and python_runs_as(NOBODY):
            rows.append((1, ["closed", "--uid", str(NOBODY), "--logfile", self.box.log], "closed: Permission denied"))
        for status, options, line in rows:
            with self.subTest(options):
                said = self.action("start", "--bind", "127.0.0.1:0", "--root", *options, want=status)
                self.assertRegex(said.err, r"(?m)^daemonize: fatal: unable to serve .*%s.*\n\Z" % line)
                self.assertEqual(said.err.count("\n") > 1, status == 1)
                self.assertEqual([path for place in ("/run/", "/etc/", "/var/log/", os.path.expanduser("~/."))
                                  for path in glob.glob(place + self.name + "*")] + self.box.processes(), [])

    def test_secrets_below_the_root(self) -> None:
        """Password file, nonce secret, key, pidfile, lock, log: each a warning, none is served, by no name."""
        pem, secret, second = make_certificate(self.box), self.box.path("nonces"), self.box.path("shared", "second")
        passwords = self.box.write("passwords", "jim:plain:secret\n", 0o600)
        os.link(passwords, second)
        said = self.box.start("--root", self.box.folder, "--hidden", "--bind", "127.0.0.1:0", "--tls-cert", pem,
                              "--passwords", passwords, "--nonce-secret", secret)
        at = self.box.address(said)
        for path in [passwords, secret, pem, second, self.box.pidfile, self.box.log, self.box.pidfile + ".lock"]:
            name = os.path.relpath(path, self.box.folder)
            with self.subTest(name):
                self.assertEqual(https(at, "/" + name).status, 404)
                self.assertNotIn(b'href="%s"' % os.path.basename(name).encode(), https(at, "/").body + https(at, "/shared/").body)
                self.assertEqual("/%s lies below" % name in said.err, path != second)


@needs("openssl", "chromium")
class Browser(BoxTest):
    """Chromium"""

    def look(self, url: str) -> str:
        """Return a page as the browser has it when it is loaded."""
        return run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--ignore-certificate-errors",
                    "--user-data-dir=" + self.box.path("profile"), "--dump-dom", url], 0, env=self.box.env).out

    def test_it_shows_a_listing_and_seeks_in_a_sound(self) -> None:
        """Over HTTPS, with the password in the URL: names are shown as they are; 5 of 60 s are fetched by ranges."""
        self.box.write(os.path.join(self.box.make("root"), "<b> & ü.txt"), "x")
        with wave.open(self.box.path("root", "sound.wav"), "wb") as sound:
            sound.setparams((2, 2, 48000, 0, "NONE", ""))
            sound.writeframes(bytes(60 * 192000))
        self.box.write("root/seek.html", """<video id=v muted preload=auto src=sound.wav#t=55></video><script>
            v.onloadeddata = () => { document.title = "at " + Math.round(v.currentTime) }</script>""")
        at = "https://jim:secret@" + self.box.serve("--root", self.box.path("root"), "--tls-cert", make_certificate(
            self.box), "--passwords", self.box.write("passwords", "jim:plain:secret\n", 0o600))
        self.assertIn("&lt;b&gt; &amp; ü.txt</a>", self.look(at))
        self.assertIn("<title>at 55</title>", self.look(at + "/seek.html"))
        sizes = [int(size) for size in re.findall(r'"GET /sound.wav HTTP/1.1" 206 (\d+) ', read(self.box.output))]
        self.assertTrue(sizes and min(sizes) < 1000000, sizes)


@unittest.skipUnless(os.path.exists(README), "needs README")
class Readme(DefaultFilesTest):
    """README"""

    PAGES = {"/README": "daemonize.py and authserver.py", ":8082/": "Hello jim"}
    # What a daemon of the default name writes is the box's own, and so is every port.
    HIDE = ('{ cp -a /etc "$0/etc" || true; } && mount --bind "$0/etc" /etc && mount -t tmpfs -o mode=755 none /run && '
            'mount -t tmpfs -o mode=755 none /var/log && ip link set lo up && mkdir -m 777 /run/home && '
            'rm -f /etc/*.passwords && mkdir /run/d && cp "$0"/*.py /run/d && '
            'sed -i "s|^\\([^:]*:[^:]*:%d:.*:\\)[^:]*:|\\1/run/home:|" /etc/passwd && '
            'echo hidden && exec sleep 86400' % NOBODY)

    def setUp(self) -> None:
        super().setUp()
        self.ports: Dict[str, str] = {}
        for name in ("README", "daemonize.py", "authserver.py"):
            shutil.copy(os.path.join(HERE, name), self.box.path(name))
        os.chmod(self.box.folder, 0o777)

    def commands(self) -> List[str]:
        r"""Return the commands of README: what is indented by four spaces, with what follows a \."""
        return re.findall(r"(?m)^ {4}(\S(?:.*\\\n)*.*)$", read(README))

    def hide(self) -> List[str]:
        """Return what takes a command into namespaces of its own, with its own /etc, /run, loopback."""
        # "ip" is not there, or unshare(2) not allowed: that is no fault of README.
        child = self.box.spawn("unshare", "-m", "-n", "sh", "-c", self.HIDE, self.box.folder)
        until(lambda: "hidden" in read(self.box.output) or child.poll() is not None, "a hidden place")
        if child.poll() is not None:
            self.skipTest("needs unshare and ip, and the right to use them")
        return ["nsenter", "-t", str(child.pid), "-m", "-n"]

    def section(self, title: str) -> str:
        """Return the text under a heading."""
        text = read(README).split("\n%s\n%s\n" % (title, "-" * len(title)))[1]
        return re.split(r"\n.+\n[-=]{3,}\n", text)[0]

    def block(self, first: str, word: str = "") -> str:
        """Return what is indented by two spaces, from a line that begins with `first`, with `word` in it."""
        found = [text for text in re.findall(r"(?m)^  %s.*\n(?:  .*\n)*" % re.escape(first), read(README))
                 if word in text]
        assert found, "no block that begins with " + first
        return re.sub("(?m)^  ", "", found[0])

    def enter(self, *words: str, hidden: bool = True) -> Callable[..., Result]:
        """Return what runs a shell command, as root or another, in a place with files of its own.

        It is done in the box's folder, with this Python; what README has in /opt/d is in /run/d.
        """
        into, shims = self.hide() if hidden else [], self.box.make("bin")
        os.symlink(PYTHON, shims + "/python3")
        self.box.write("bin/curl", "#!/bin/sh\nexec %s --retry 9 --retry-connrefused --fail --silent "
                       "--show-error --noproxy '*' \"$@\"\n" % shutil.which("curl"), 0o755)
        env = {"PATH": shims + ":/usr/sbin:/usr/bin:/sbin:/bin", "DAEMONIZE_TEST": self.box.folder}
        self.addCleanup(remove, shims)

        def do(command: str, want: Optional[int] = 0, data: str = "") -> Result:
            return run(into + list(words) + ["sh", "-c", 'cd "$0" && eval "$1"', self.box.folder,
                                             command.replace("/opt/d", "/run/d")], want, data.encode(), env=env)
        return do

    def play(self, do: Callable[..., Result], change: Callable[[str], str] = str) -> None:
        """Do every command of README in order, in one folder; it succeeds, and curl gets its page."""
        password, places = "", []   # type: str, List[str]
        for command in self.commands():
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
        """Every command runs as it stands there, with exit status 0: as root."""
        self.play(self.enter())

    @needs_other_user
    @needs("curl", "openssl", "nsenter")
    def test_its_commands_do_it_for_a_user(self) -> None:
        """Every command runs as it stands there: as a user who has a home."""
        self.play(self.enter("-S", str(NOBODY), "-G", str(NOBODY)))

    @needs_user
    @needs_home
    @needs("curl", "openssl")
    def test_its_commands_do_it_under_other_names(self) -> None:
        """Every command runs for whoever cannot hide: with names and ports of this run's own."""
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

    def test_it_is_plain_text_of_72_columns(self) -> None:
        """README has at most 520 lines of 72 columns, no tabs, no markup."""
        lines = read(README).splitlines()
        self.assertLessEqual(len(lines), 520)
        for number, line in enumerate(lines, 1):
            self.assertLessEqual(len(line), 72, "line %d: %s" % (number, line))
            self.assertNotIn("\t", line)
            self.assertFalse(line.startswith(("#", "```")), line)
            if re.fullmatch("[-=]{3,}", line):
                self.assertEqual(len(line), len(lines[number - 2]), lines[number - 2])

    def test_every_option_stands_in_it(self) -> None:
        """Every option of --help stands in README."""
        texts = [self.box.daemonize("start", "-h").out,
                 run([PYTHON, AUTHSERVER, "--help"], 0, env=self.box.env).out]
        known = set(re.findall(r"--[a-z][a-z-]+", "".join(texts)))
        told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", read(README)))
        self.assertIn("--pidfile", known)
        self.assertEqual(known - told, set())

    def test_each_message_is_one_of_the_code(self) -> None:
        """Each of 25 messages that README explains is in a string of the programs."""
        nodes = [node for path in SOURCES for node in ast.walk(ast.parse(read(path)))]
        # Until Python 3.7 a string is ast.Str, with s; since then a Constant, with value.
        texts = [text for text in (vars(node).get("value", vars(node).get("s")) for node in nodes)
                 if isinstance(text, str)]
        rows = re.findall(r"(?m)^  (\S.*?)(?:  |$)", self.section("When it does not work"))
        self.assertGreaterEqual(len(rows), 25)
        for row in rows:
            with self.subTest(row):
                deed = row.replace("unable to ", "", 1) + " "       # as trying_to() has it
                self.assertTrue([text for text in texts if row in text or (text + " ").startswith(deed)], row)

    def test_bind_gets_what_it_says(self) -> None:
        """The options of ours that an application gets are those that README names."""
        app = APP.replace("def bind(options):", "def bind(options):\n    seen(options)") + '''
def seen(options):
    print(sorted(vars(options)), flush=True)
'''
        said = self.box.start(app=app).out
        got = set(re.findall(r"'(\w+)'", said.partition("]")[0]))
        text = self.section("Your own application").partition("bind gets")[2].partition("All that")[0]
        told = {word for word in re.findall(r"\w+", text)}
        own = set(re.findall(r'add_argument\("--([\w-]+)', app))
        self.assertIn("sockets", got)
        self.assertEqual(got - told - {name.replace("-", "_") for name in own}, set())

    def test_the_server_may_have_what_it_says(self) -> None:
        """Each attribute of a server that README names is one that daemonize.py looks for."""
        names = re.findall(r"(?m)^  ([a-z_]+)(?:\(\))?  +\S", self.section("Your own application"))
        self.assertEqual(len(names), 12)
        for name in names:
            self.assertRegex(read(SOURCES[0]), r'"%s"|\.%s\b' % (name, name))

    def test_startstop_takes_what_it_says(self) -> None:
        """README names every keyword of startstop()."""
        text = self.section("Your own application")
        words = set(re.findall(r"\w+", text[text.index("More keywords"):].replace("stdout", "")))
        keywords = re.search(r"(?s)def startstop\((.*?)\*\*more", read(SOURCES[0]))
        more = re.search(r'name not in \((.*?)\)', read(SOURCES[0]))
        assert keywords and more
        names = set(re.findall(r"(\w+):", keywords.group(1)) + re.findall(r'"(\w+)"', more.group(1)))
        self.assertEqual(names - words, {"stdout", "pidfile"})

    def test_a_folder_by_the_library(self) -> None:
        """The lines that serve a folder serve it to jim alone."""
        folder = self.box.make("srv")
        self.box.write("srv/a", "it is here")
        code = self.block("from authserver import Auth").replace("8083", "0").replace("/srv", folder)
        at = self.box.launch(PYTHON, "-c", code, cwd=self.box.folder)
        at = at.replace("0.0.0.0", "127.0.0.1")
        self.assertEqual(request(at, "/a", "GET", "").status, 401)
        self.assertEqual(request(at, "/a", "GET", digest(at, "/a")).body, b"it is here")

    def test_a_handler_by_the_library(self) -> None:
        """The lines that protect a handler protect it, under the server of the standard library."""
        self.box.write("users", ha1_line("jim", "secret"), 0o600)
        port = str(free_port())
        code = '''import http.server
class MyHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"mine")
''' + self.block("from authserver import Passwords, protect\n").replace("8084", port)
        self.box.spawn(PYTHON, "-c", code)
        at = "127.0.0.1:" + port
        until(lambda: not reach(at), "a server")
        self.assertEqual(request(at, "/a", "GET", "").status, 401)
        self.assertEqual(request(at, "/a", "GET", digest(at, "/a")).body, b"mine")

    def prepare(self) -> Callable[..., Result]:
        """Return what runs a command where the files are that hosts are told of."""
        do = self.enter()
        conf = self.block("--uid").replace("www", "nobody", 1).replace("/srv/www", "'%s'" % self.box.folder)
        do("cat >/etc/d.conf", data=conf)
        for user in ("jim", "ann"):
            do("python3 authserver.py passwd --stdin /etc/authserver.passwords " + user, data="secret\n")
        do("chgrp %d /etc/authserver.passwords; chmod 640 /etc/authserver.passwords"
           % pwd.getpwnam("nobody").pw_gid)
        return do

    @needs_other_user
    @needs("nsenter", "curl")
    def test_what_it_says_of_cron_logrotate_and_fail2ban(self) -> None:
        """The crontab starts and restarts without a word; logrotate loses no line; the jail is one."""
        do = self.prepare()
        for line in self.block("@reboot").splitlines():
            command = re.sub(r"^(@\w+|(\S+ ){4}\S+) +root ", "", line)
            said = do("exec env -i \"PATH=$PATH\" HOME=/ LOGNAME=root sh -c '%s'" % command)
            self.assertEqual((said.out, said.err), ("", ""), line)
        for word in ("wrong", "wrong", "secret"):
            do("curl -u jim:%s http://127.0.0.1:8081/README" % word, None)
        if shutil.which("fail2ban-client"):
            do("cat >/etc/fail2ban/jail.d/authserver.local",
               data="[sshd]\nenabled = false\n" + self.block("[authserver]"))
            self.assertIn("OK", do("fail2ban-client -t").out)
            self.assertIn("2 total", do("fail2ban-regex /var/log/authserver.log traefik-auth").out)
        if shutil.which("logrotate"):
            do("cat >/etc/logrotate.d/authserver",
               data=self.block("/var/log/authserver.log").replace("/opt/d", "/run/d"))
            do("logrotate -f -s /run/state /etc/logrotate.d/authserver")
            do("curl -u jim:secret http://127.0.0.1:8081/LICENSE", None)
            counts = do("cd /var/log; grep -c GET authserver.log; grep -c GET authserver.log.1").out
            self.assertEqual(counts.split(), ["1", "3"])
        do("python3 daemonize.py stop")

    @needs_other_user
    @needs("nsenter")
    def test_what_it_says_of_the_night(self) -> None:
        """Each line of "At three in the morning" does what stands beside it; the last leaves nothing."""
        do = self.prepare()
        do("python3 /opt/d/daemonize.py start @/etc/d.conf; mkdir new; cp *.py new")
        night = self.block("d() {").replace("\\\n", " ").splitlines()
        for line in night[3:]:
            line = line.replace("a passwd $f", "echo battery | a passwd --stdin $f")
            with self.subTest(line):
                do("\n".join(night[:3] + [line]))
        self.assertEqual(do("ls -d /run/*pid* /run/d* /etc/d.conf /etc/*.passwords /var/log/auth*", None).out, "")
        self.assertGreater(len(night), 10)

    @needs_other_user
    @needs("nsenter", "curl")
    def test_what_it_says_of_files(self) -> None:
        """Each file of the table has the owner and the mode that stand there, in a folder of whose it says."""
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
        """systemd itself finds nothing wrong in the units."""
        units = [self.box.write("authserver." + name, self.block(first, word).replace(
            "/usr/bin/python3", PYTHON)) for name, first, word in (
                ("service", "[Service]", "Type"), ("socket", "[Socket]", "Listen"))]
        said = run(["systemd-analyze", "verify"] + units)
        about = [line for line in said.err.splitlines() if "authserver." in line]
        self.assertEqual((said.code, about), (0, []))

    @needs_other_user
    @needs("nsenter", "supervisord")
    def test_what_it_says_of_supervisord(self) -> None:
        """supervisord keeps it running, and ends it."""
        do = self.prepare()
        self.box.write("s.conf", "[supervisord]\nnodaemon=true\nuser=root\n"
                       + self.block("[program:").replace("/opt/d", "/run/d"))
        said = do("supervisord -c s.conf & until python3 daemonize.py status; do sleep 0.1; done; "
                  "kill $!; wait; python3 daemonize.py status", 3).out
        self.assertIn("authserver is running", said)

    @needs_root
    @needs("nsenter", "curl", "nginx")
    def test_what_it_says_of_nginx(self) -> None:
        """nginx hands on, and asks --forward-auth, as README has it, and passes the user on."""
        do = self.enter()
        do("python3 authserver.py passwd --stdin /etc/authserver.passwords jim", data="secret\n")
        do("python3 daemonize.py start --forward-auth /auth --trusted-proxy 127.0.0.1")
        frame = ("pid nginx.pid; error_log error.log; events { } http { access_log off; "
                 "client_body_temp_path a; proxy_temp_path b; fastcgi_temp_path c; uwsgi_temp_path d; "
                 "scgi_temp_path e; server { listen 127.0.0.1:80; %s } server { listen 127.0.0.1:81; %s } "
                 "server { listen 127.0.0.1:3000; location / { return 200 'for $http_remote_user'; } } }")
        self.box.write("nginx.conf", frame % (self.block("location / {", "auth_request"),
                                              self.block("location / {", "X-Forwarded-For")))
        do('nginx -e stderr -p "$PWD" -c "$PWD/nginx.conf"')
        for scheme in ("--digest", "--basic"):
            for url in ("http://127.0.0.1/a%20b?c", "http://127.0.0.1:81/example/foo?c"):
                self.assertIn("for jim", do("curl %s -u jim:secret %s" % (scheme, url)).out)
                self.assertNotEqual(do("curl %s -u jim:wrong %s" % (scheme, url), None).code, 0)
        do('kill "$(cat nginx.pid)"; python3 daemonize.py stop')

    def test_what_it_says_of_haproxy_and_caddy(self) -> None:
        """Both find nothing wrong in their blocks."""
        defaults = ("defaults\n mode http\n timeout connect 1s\n timeout client 1s\n timeout server 1s\n"
                    "frontend all\n bind 127.0.0.1:8080\n default_backend authserver\n")
        for argv, text in ((["haproxy", "-c", "-f"], defaults + self.block("backend authserver")),
                           (["caddy", "adapt", "--adapter", "caddyfile", "--config"],
                            ":8080 {\n%s}\n" % self.block("forward_auth"))):
            with self.subTest(argv[0]):
                if not shutil.which(argv[0]):
                    self.skipTest("needs " + argv[0])
                run(argv + [self.box.write(argv[0] + ".conf", text)], 0, env=dict(self.box.env, HOME=self.box.folder))

    @needs_other_user
    @needs("nsenter")
    def test_what_it_says_of_containers(self) -> None:
        """The Dockerfile copies what there is; its command is pid 1 as an ordinary user, and serves."""
        do = self.enter()
        words = dict(re.findall(r"(?m)^([A-Z]+) (.*)$", self.block("FROM").replace("\\\n", "")))
        self.assertEqual(words["COPY"].split(), ["daemonize.py", "authserver.py", "/opt/d/"])
        do("mkdir /run/secrets; echo secret | python3 authserver.py passwd --stdin /run/secrets/users jim; "
           "chmod 444 /run/secrets/users")
        uid, gid = words["USER"].split(":")
        argv = " ".join(json.loads(words["CMD"])).replace("/tmp/pid", "/run/home/pid")
        said = do("unshare -p -f --mount-proc setpriv --reuid %s --regid %s --clear-groups %s & "
                  "curl --digest -u jim:secret http://127.0.0.1:8081/example/foo; "
                  "kill $(cat /proc/$!/task/$!/children); wait $!" % (uid, gid, argv))
        self.assertIn("for jim", said.out, said.err)


# -- Bench: beside the servers that are installed here -----------------------
#
# One core for the server, another for this load generator, which saturates
# long before a server in C does: compare the CPU time per answer, read from
# /proc for the whole tree of the server's processes, not the answers a second.

BENCH_USER, BENCH_PASSWORD, BENCH_REALM, BENCH_PATH = "user", "secret", "bench", "/example/foo"
STOCK = r"""
import base64, http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def do_GET(self):
        word, _, value = self.headers.get("Authorization", "").partition(" ")
        known = word == "Basic" and base64.b64decode(value) == b"user:secret"
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
NGINX = """daemon off; worker_processes 1; pid FOLDER/nginx.pid; error_log /dev/null crit;
events { worker_connections 1024; }
http { access_log FOLDER/nginx.log; keepalive_requests 100000000; default_type text/html;
sendfile on; client_body_temp_path FOLDER/1; proxy_temp_path FOLDER/2;
fastcgi_temp_path FOLDER/3; uwsgi_temp_path FOLDER/4; scgi_temp_path FOLDER/5;
server { listen 127.0.0.1:PORT SSL; root FOLDER/www; auth_basic bench; ssl_certificate FOLDER/pem;
ssl_certificate_key FOLDER/pem; auth_basic_user_file FOLDER/nginx.users;
location /example/ { try_files /foo =404; } } }
"""
LIGHTTPD = """server.modules = ("mod_auth", "mod_authn_file", "mod_accesslog", "mod_rewrite")
server.document-root = "FOLDER/www"
server.port = PORT
server.bind = "127.0.0.1"
accesslog.filename = "FOLDER/lighttpd.log"
server.max-keep-alive-requests = 100000000
url.rewrite-once = ("^/example/" => "/foo")
auth.backend = "plain"
auth.backend.plain.userfile = "FOLDER/lighttpd.users"
auth.require = ("/" => ("method" => "SCHEME", "realm" => "bench", "require" => "valid-user"))
"""


def hear_one(sock: socket.socket) -> Tuple[bytes, bytes]:
    """Return status and head of the one answer that comes, read in large pieces."""
    octets = b""
    while True:
        piece = sock.recv(65536)
        octets += piece
        text, end, body = octets.partition(b"\r\n\r\n")
        length = re.search(br"(?i)\ncontent-length: *(\d+)", text)
        if not piece or end and length and len(body) >= int(length.group(1)):
            return text[9:12], text


def load(address: str, scheme: str, seconds: float, connections: int = 16, keep_alive: bool = True,
         realm: str = BENCH_REALM, end: Optional[threading.Event] = None,
         paths: Sequence[str] = (BENCH_PATH,), context: Any = None) -> Tuple[int, int]:
    """Keep `connections` busy for some seconds or to the `end`; return answers and failures."""
    deadline, counts = time.monotonic() + seconds, [0, 0]

    def client(number: int) -> None:
        client, sock = Digest('realm="%s", nonce=""' % realm, BENCH_USER, BENCH_PASSWORD), None  # type: Digest, Any
        while time.monotonic() < deadline and not (end and end.is_set()):
            sock = sock or (context.wrap_socket(Wire(address)) if context else Wire(address))
            number += 1
            client.values["uri"], field = paths[number % len(paths)], basic(BENCH_USER, BENCH_PASSWORD)
            if scheme == "digest":
                field = client.field() if client.values["nonce"] else ""
            sock.sendall(head(client.values["uri"], "GET", field, *[CLOSE] * (not keep_alive)))
            status, text = hear_one(sock)
            challenge = re.search(r"(?i)\nwww-authenticate: *(digest.*)", text.decode("latin-1"))
            if status == b"401" and scheme == "digest" and challenge:
                client.hear(challenge.group(1))
            else:
                counts[status != b"200"] += 1
            if not (status and keep_alive) or b"\nConnection: close" in text:
                sock = sock.close()
        if sock:
            sock.close()
    threads(connections, client)
    return counts[0], counts[1]


class Bench:
    """The servers that are installed here, what is asked of them, and what it costs."""

    def __init__(self, box: Box, seconds: float) -> None:
        self.box, self.seconds, self.rows = box, seconds, {}  # type: Box, float, Dict[Any, List[Any]]
        self.folder = tempfile.mkdtemp(dir=TEMP)  # no space, no umlaut: not every server can
        os.chmod(self.folder, 0o755)
        os.makedirs(self.folder + "/www/many")
        self.passwords = self.write("users", "user:bench:%s\n" % hashed("MD5", "user:bench:secret"))
        for name, text in (("www/foo", "foo ok" + "x" * 94), ("www/1k", "x" * 1024), ("stock.py", STOCK),
                           ("nginx.users", "user:{PLAIN}secret\n"), ("lighttpd.users", "user:secret\n"),
                           ("pem", read(make_certificate(box)) if shutil.which("openssl") else "")):
            os.chmod(self.write(name, text), 0o600 if name == "pem" else 0o644)
        for number in range(10000):
            self.write("www/many/file-%d" % number, "")

    def write(self, name: str, text: str) -> str:
        """Write a file; return its path."""
        with open(os.path.join(self.folder, name), "w") as file:
            file.write(text)
        os.chmod(file.name, 0o600)
        return os.path.join(self.folder, name)

    def argv(self, name: str, port: int, scheme: str, options: Sequence[str]) -> List[str]:
        """Return the command line of a server."""
        def filled(text: str) -> str:
            for word, value in (("FOLDER", self.folder), ("PORT", str(port)), ("SCHEME", scheme),
                                ("SSL", "ssl" * ("--tls-cert" in options))):
                text = text.replace(word, value)
            return text
        commands = {"authserver": [PYTHON, AUTHSERVER, "--bind", "127.0.0.1:PORT", "--realm",
                           BENCH_REALM, "--passwords", self.passwords, *options],
            "stock": [PYTHON, "FOLDER/stock.py", "PORT"],
            "http.server": [PYTHON, "-m", "http.server", "--bind", "127.0.0.1", "--directory",
                            "FOLDER/www", "PORT"],
            "nginx": ["nginx", "-c", self.write("nginx-%d" % port, filled(NGINX))],
            "lighttpd": ["lighttpd", "-D", "-f", self.write("lighttpd-%d" % port, filled(LIGHTTPD))]}
        return [filled(word) for word in commands[name]]

    def measure(self, what: str, scheme: str, name: str, options: Sequence[str] = (), **asked: Any) -> None:
        """Start a server on a core of its own, load it, and note what that cost."""
        if name in ("nginx", "lighttpd") and not shutil.which(name):
            return
        port = free_port()
        address = "127.0.0.1:%d" % port
        server = self.box.spawn(*self.argv(name, port, scheme, options), preexec_fn=pin(0))
        until(lambda: server.poll() is not None or not reach(address), "a listening server", 10)
        assert server.poll() is None, read(self.box.output)[-2000:]
        load(address, scheme, 0.3, **asked)
        began, before = time.monotonic(), cpu_seconds(server.pid)
        answers, failures = load(address, scheme, self.seconds, **asked)
        assert answers and not failures, "%s: %d answers, %d failures" % (name, answers, failures)
        cost = 1e6 * (cpu_seconds(server.pid) - before) / answers
        self.note(what, scheme, name, cost, answers / (time.monotonic() - began), memory(server.pid))
        server.terminate()  # nginx ends its worker
        server.wait()

    def note(self, what: str, scheme: str, name: str, *values: float) -> None:
        """Keep the figures of one round."""
        self.rows.setdefault((what, scheme, name), []).append(values)

    def round(self) -> None:
        """Measure everything once; ours is the first of each kind."""
        many = ["%s%d?a=b" % (BENCH_PATH, number) for number in range(2000)]
        www, pem = ["--root", self.folder + "/www"], self.folder + "/pem"
        tls, context = ["--tls-cert", pem, "--tls-key", pem], trusting()
        for scheme, others in (("basic", ["authserver", "stock", "nginx"]), ("digest", ["authserver", "lighttpd"])):
            for name in others:
                self.measure("one URL", scheme, name)
                self.measure("2,000 URLs in turn", scheme, name, paths=many)
                self.measure("new connections", scheme, name, keep_alive=False)
        for name in ("authserver", "nginx"):
            self.measure("file of 1 KiB", "basic", name, www, paths=["/1k"])
        for name in ("authserver", "http.server"):
            self.measure("listing of 10,000", "basic", name, www, paths=["/many/"], keep_alive=False, connections=2)
        if read(pem):
            for name in ("authserver", "nginx"):
                self.measure("TLS", "basic", name, tls, context=context)
                self.measure("TLS, new connections", "basic", name, tls, context=context, keep_alive=False)
        self.life()

    def life(self) -> None:
        """Measure start to first answer, a daemon's memory, and status of nothing."""
        real = [sys.executable, SOURCES[0]]     # not what was compiled for the tests
        port, began = free_port(), time.monotonic()
        at = "127.0.0.1:%d" % port
        run(real + self.box.argv("start")[2:] + ["--logfile", self.box.log, "--bind", at, "--workers", "1", "--realm",
                                                 BENCH_REALM, "--passwords", self.passwords], 0, env=self.box.env)
        request(at, "/", "GET", "")
        self.note("start to first answer, ms", "", "daemonize", 1e3 * (time.monotonic() - began), 0.0,
                  memory(self.box.pid()))
        self.box.command("stop")
        began = time.monotonic()
        server = self.box.spawn(sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port))
        until(lambda: not reach(at), "http.server")
        request(at, "/", "GET", "")
        self.note("start to first answer, ms", "", "http.server", 1e3 * (time.monotonic() - began), 0.0,
                  memory(server.pid))
        self.box.kill(server)
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
    global PYTHON, DAEMONIZE, AUTHSERVER
    PYTHON, (DAEMONIZE, AUTHSERVER) = sys.executable, SOURCES   # what a user starts
    pin(-1)()
    setUpModule()
    measured = Bench(Box(), options.seconds)
    for _ in range(options.rounds):  # interleaved: a slow minute hits everybody
        measured.round()
    measured.print_table()
    measured.box.close()
    remove(measured.folder)
    return 0


# -- Soak: the long ones -----------------------------------------------------


@contextlib.contextmanager
def served(*options: str) -> Iterator[Tuple[Box, str]]:
    """Run authserver.py with jim; fail when it logged a traceback."""
    box = Box()
    try:
        passwords = box.write("passwords", "jim:plain:secret\n", 0o600)
        yield box, box.serve("--passwords", passwords, *options)
        assert "Traceback" not in read(box.output), read(box.output)[-2000:]
    finally:
        box.close()


class Load:
    """Clients that never rest; each failure is kept with its moment."""

    def __init__(self, address: str, clients: int = 2) -> None:
        self.address, self.answers, self.end = address, 0, threading.Event()
        self.failures: List[str] = []
        self.threads = [threading.Thread(target=self.client) for _ in range(clients)]
        for thread in self.threads:
            thread.start()

    def client(self) -> None:
        """Ask again and again."""
        while not self.end.is_set():
            try:
                ask(self.address, "sleep 0")
                self.answers += 1
            except (OSError, ValueError) as error:
                self.failures.append(repr(error))
                select.select([], [], [], 0.01)

    def stop(self) -> None:
        """End the clients."""
        self.end.set()
        for thread in self.threads:
            thread.join()


class LifeCycle:
    """Random steps of a daemon's life under load, and what must be true after each."""

    def __init__(self, random: Random) -> None:
        self.box, self.random, self.steps = Box(), random, 0
        self.strangers = [self.box.stranger() for _ in range(3)]
        self.options = ["--bind", "127.0.0.1:%d" % free_port(), "--workers", "2"]
        self.box.write("app.py", APP)
        self.load = Load(self.options[1])
        self.step_start()  # restart repeats the last start: there must have been one

    def step_start(self) -> None:
        """start: afterwards it runs."""
        self.box.start(*self.options, app=APP)
        self.answers()

    def step_stop(self) -> None:
        """stop: afterwards nothing is left."""
        self.box.command("stop")
        assert not self.daemons(), self.daemons()

    def step_restart(self) -> None:
        """restart: nothing is lost when it was running."""
        self.lossless("restart")

    def step_reload(self) -> None:
        """reload: nothing is lost when it was running; 3 when not."""
        self.lossless("reload")

    def step_broken_restart(self) -> None:
        """restart with broken code: the old one goes on; nothing is lost before the new one serves."""
        running, never_served = self.running(), self.random.choice([True, False])
        broken = self.random.choice(["1 / 0", "bind = 1"]) if never_served else "Server.probe = 1"
        self.box.write("app.py", APP + broken)
        if never_served:
            self.lossless("restart", 2 if broken == "bind = 1" else 1)
        else:  # APP takes requests at once; those that the new one took end with it
            self.box.command("restart", want=1)
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
        """Return the pid of the daemon if it runs."""
        return self.box.pid() if self.box.command("status", want=None).code == 0 else 0

    def daemons(self) -> List[int]:
        """Return the processes of the box that are no strangers."""
        return sorted(set(self.box.processes()) - {one.pid for one in self.strangers})

    def answers(self) -> None:
        """Wait until the daemon answers."""
        until(lambda: not reach(self.options[1]) and ask(self.options[1]), "an answer")

    def lossless(self, action: str, failing: int = 0) -> None:
        """Run a command; when the daemon was running no client may notice."""
        running, lost = self.running(), len(self.load.failures)
        status = failing if failing else 0 if running or action == "restart" else 3
        self.box.command(action, want=status)
        assert not running or len(self.load.failures) == lost, self.load.failures[lost:]

    def check(self) -> None:
        """After each step: one daemon with two workers or none, no stranger hurt, nothing leaked."""
        running = self.running()
        until(lambda: set(self.daemons()) == set(family(running) if running else [])
              and len(self.daemons()) <= 3, "one daemon: %s" % running)
        assert all(one.poll() is None for one in self.strangers), "a stranger was signalled"
        assert len(os.listdir(self.box.folder)) <= 9, os.listdir(self.box.folder)

    def step(self) -> str:
        """Take one random step and return its name."""
        name = self.random.choice([name for name in dir(self) if name.startswith("step_")])
        try:
            getattr(self, name)()
            self.check()
        except AssertionError as error:
            raise AssertionError("step %d (%s): %s" % (self.steps, name, error))
        self.steps += 1
        return name[5:]

    def close(self) -> None:
        """End the load and the box."""
        self.load.stop()
        self.box.close()


def soak_life_cycle(random: Random, deadline: float) -> str:
    """Take random steps until the deadline, at least one, and return what was done."""
    life, counts = LifeCycle(random), collections.Counter()  # type: LifeCycle, Any
    with contextlib.closing(life):
        while not life.steps or time.monotonic() < deadline:
            counts[life.step()] += 1
    return "%d steps, %d answers under way: %s" % (life.steps, life.load.answers, ", ".join(
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
    fields = basic("jim", "wrong"), Digest('realm="authserver", nonce="x"', uri="/example/foo").field()
    with served("--max-failures", "0") as (box, address):
        while sum(seen.values()) < 5000 or time.monotonic() < deadline:
            text = head("/example/foo", "GET", mutate(random.choice(fields), random), CLOSE)
            status = (statuses(talk(address, text, True)) or [0])[0]
            seen[status] += 1
            assert 400 <= status < 500, (status, text)
            if sum(seen.values()) == 500:
                warm = memory(box.server.pid)
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
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        finally:
            os._exit(1)
    try:
        yield
        assert os.waitpid(child, os.WNOHANG)[0] == 0, "the hostile clients gave up"
    finally:
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


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
            began = time.monotonic()
            wire.sendall(head(auth="") * 25)
            seen = b""
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


class Sentences(unittest.TestResult):
    """What came of the tests of one subject, in sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: List[str] = []              # for -v
        self.rows: List[str] = []               # the subTests of the test under way
        self.before, self.passed = 0, 0

    def faults(self) -> List[Tuple[Any, str]]:
        """Return the tests that failed, and subTests, with what they said."""
        return self.failures + self.errors + [(test, "It passed, which was not expected")
                                              for test in self.unexpectedSuccesses]

    def startTest(self, test: unittest.TestCase) -> None:
        """Remember what had failed before."""
        super().startTest(test)
        self.before, self.rows = len(self.faults()) + len(self.whole_skips()), []

    def whole_skips(self) -> List[Tuple[Any, str]]:
        """Return the tests, not subTests, that were skipped."""
        return [(test, why) for test, why in self.skipped if not hasattr(test, "test_case")]

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        """Keep the row's sentence."""
        super().addSubTest(test, subtest, err)
        self.rows.append("        " + row_of(subtest) + " FAILED" * bool(err))

    def stopTest(self, test: unittest.TestCase) -> None:
        """Count the test, and keep its sentence."""
        bad, skips = self.faults(), self.whole_skips()
        passed = len(bad) + len(skips) == self.before
        self.passed += passed
        said = "" if passed else " (skipped: %s)" % skips[-1][1] if (skips and skips[-1][0] is test) else " FAILED"
        self.lines.append("    %s%s" % (test.shortDescription() or test.id(), said))
        self.lines += self.rows
        super().stopTest(test)

    def report(self) -> Dict[str, Any]:
        """Return everything in the words of JSON."""
        faults = [(short_id(test), test.shortDescription() or "", row_of(test), text) for test, text in self.faults()]
        skips = [(short_id(test), why) for test, why in self.skipped]
        return {"passed": self.passed, "faults": faults, "skips": skips, "lines": self.lines,
                "skipped": len(self.whole_skips())}


def short_id(test: Any) -> str:
    """Return Class.test_name, of a subTest too."""
    return re.sub(r"\b(__main__|test_all)\.", "", getattr(test, "test_case", test).id())


def row_of(test: Any) -> str:
    """Return a subTest's own sentence, "" for a test."""
    text = test.id()[len(test.test_case.id()):] if hasattr(test, "test_case") else ""
    return text.replace("] (", " (", 1).strip("[] ")


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


def load_tests(loader: unittest.TestLoader, tests: Any, pattern: Any) -> unittest.TestSuite:
    """Keep the order of this file for `python3 -m unittest` (its own is the alphabet's)."""
    return unittest.TestSuite(map(suite, subjects().values()))


def suite(subject: Any, names: Optional[List[str]] = None) -> unittest.TestSuite:
    """Return the tests of a subject, all or some."""
    return unittest.TestSuite(subject(name) for name in names or tests_of(subject))


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
    for subject, names in list(chosen.items()):
        chosen[subject] = [name for name in names if not patterns or any(
            fnmatch.fnmatchcase("%s.%s" % (subject.__name__, name), pattern if "*" in pattern
                                else "*%s*" % pattern) for pattern in patterns)]
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
        os.dup2(self.output.fileno(), 1)
        os.dup2(self.output.fileno(), 2)
        try:
            warnings.simplefilter("default")
            result = Sentences()
            suite(self.subject, names).run(result)
            gc.collect()  # a socket that nobody closed is told of now
            json.dump(result.report(), self.results)
            self.results.flush()
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)

    def report(self, verbose: bool) -> Dict[str, Any]:
        """Print how the subject went, and return what its process reported."""
        name, seconds = self.subject.__name__, time.monotonic() - self.began
        self.output.seek(0)
        said = self.output.read().decode(errors="backslashreplace")
        self.results.seek(0)
        report: Dict[str, Any] = json.loads(self.results.read() or "{}") or {
            "passed": 0, "skips": [], "skipped": 0, "lines": [],
            "faults": [(name, "The process that ran it reports what came of it.", "", said)]}
        if "ResourceWarning" in said:
            report["faults"].append((name, "Everything that is opened is closed.", "", said))
        self.output.close()
        self.results.close()
        failed = len({fault[0] for fault in report["faults"]})
        if verbose:
            say("\n%s" % (self.subject.__doc__ or name).splitlines()[0])
            say("".join(line + "\n" for line in report["lines"]), end="")
        print("%s %d tests %.1f s%s" % (name, report["passed"] + report["skipped"] + failed, seconds,
                                        ", %d failed" % failed if failed else ""), flush=True)
        return report


def say(text: str, end: str = "\n") -> None:
    """Print text that may have anything in it, a lone surrogate or a NUL in a row's name, too."""
    encoding = sys.stdout.encoding or "ascii"
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", lambda match: repr(match.group())[1:-1], text)
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end)


def run_parts(chosen: Dict[Any, List[str]], verbose: bool) -> List[Dict[str, Any]]:
    """Run the subjects in children, PARTS at a time; return their reports."""
    waiting, running, reports = list(chosen.items()), {}, []  # type: Any, Dict[int, Part], List[Dict[str, Any]]
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
                reports.append(running.pop(pid).report(verbose))
    finally:
        for pid in running:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return reports


def summarize(reports: List[Dict[str, Any]], left: List[str], verbose: bool) -> int:
    """Print failures, seed, skips and the three numbers; return the exit status."""
    faults = [fault for report in reports for fault in report["faults"]]
    if left:
        faults.append(("The run", "Nothing is left behind.", "", "\n".join(left)))
    for name, sentence, row, text in faults:
        say("\nFAILED %s\n%s\n%s%s" % (name, sentence, row and "  %s\n" % row, text.rstrip()))
    print("\nseed %d" % SEED)
    reasons: Dict[str, List[str]] = {}
    for report in reports:
        for name, why in report["skips"]:
            reasons.setdefault(why, []).append(name)
    for why, names in sorted(reasons.items()):
        print("skipped, %s: %d" % (why, len(names)))
        print("".join("    %s\n" % name for name in names) * verbose, end="")
    passed, skipped = (sum(report[word] for report in reports) for word in ("passed", "skipped"))
    failed = len({fault[0] for fault in faults})
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped), flush=True)
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
    reports = run_parts(chosen, options.verbose)
    return summarize(reports, clean_up(), options.verbose)


SELF = [PYTHON, "-m", "test_all"]  # -m: what was compiled once is used again


class Itself(BoxTest):
    """This file keeps its own word"""

    def test_what_it_is_asked(self) -> None:
        """A wrong name lists the right ones, a pattern that nothing fits is a failure."""
        for action, words, code, said in (
                (run_tests, ["Stopp"], 2, "no subject Stopp; there are: HeaderParsing, "),
                (run_tests, ["-k", "zzz"], 1, "no test matches zzz"), (run_tests, ["--help"], 0, "test_all.py bench"),
                (run_tests, ["Stop.test_x"], 2, "no test_x in Stop; there are: test_"),
                (soak, ["x"], 2, "no soak x; there are: ")):
            with self.subTest(words):
                found, text = called(action, words)
                self.assertEqual(found, code)
                self.assertIn(said, text)

    def test_what_it_does(self) -> None:
        """A run ends with its seed and three numbers; the first word may be bench."""
        for words, said in ((["bench", "--help"], "--rounds"),
                (["BasicScheme", "-v", "-k", "not_offered"], "even the right password is not looked at."),
                (["BasicScheme.test_is_refused_where_it_is_not_offered", "--seed", "5"],
                 "\nseed 5\n1 passed, 0 failed, 0 skipped\n")):
            with self.subTest(words):
                self.assertIn(said, run(SELF + words, 0, env=self.box.env, cwd=HERE).out)

    @needs_linux
    def test_ctrl_c_leaves_nothing(self) -> None:
        """Interrupted in the middle, with processes of its own: no process and no folder stays."""
        child = self.box.spawn(*SELF, "HttpPages", "HttpHandlers", cwd=HERE, env=dict(
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
