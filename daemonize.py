#!/usr/bin/env python3
# MIT licence.  One file, standard library only: copy it and run it.  After Clark Evans' recipe
# (2003), twistd's order of steps, and three articles that found out why the order matters.
"""Run an application or a program as a well-behaved Unix daemon.

    python3 daemonize.py start                      # authserver.py, which lies beside this file
    python3 daemonize.py start --app FILE.py        # your application: three names, see README
    python3 daemonize.py start -- COMMAND ARG ...   # any program; a script is a program
    python3 daemonize.py status | reload | restart | stop       (or `run`: in the foreground)

Or, in a script of your own: `from daemonize import startstop`.

The life of a daemon.  Three processes take part: the COMMAND that you typed, the STARTER that
it forks, and the DAEMON that the starter forks.  (`run` has one: it is the daemon.)  The daemon
runs no code of yours (but for startstop(), section 14): an application lives in WORKERS, a
program is the daemon's child.

    step                                process  uid     twistd's step (and its place)
    1 parse; make each path absolute    command  caller
    2 the turn: byte 0 of PIDFILE.lock; command  caller  checkPID (1)
      the first fork makes the starter
    3 lock; app.bind(): ports, keys;    starter  root    privilegedStartService (9),
      control, log, pidfile                              startLogger (3)
    4 setsid; the second fork makes     starter  root    daemonize (7)
      the daemon, which moves its stdio
    5 chroot, chdir, umask              daemon   root    setupEnvironment (4-6)
    6 groups, gid, uid; the proof       daemon   ->user  switchUidGid (10)
    7 children, probe, report ready;    daemon   user    startApplication (11),
      instance lock, pidfile                             openPIDFile (8)
    8 empty the pidfile                 daemon   user    removePIDFile (13)

The names are those of the first article; today's twistd has shedPrivileges (10) and removePID
(13) instead.  Where the order differs, it is for a reason.  We bind before detaching: "port
taken" reaches the terminal in full, where twistd sends it through a pipe, cut to 100 bytes.  We
chroot after the fork: the command stays outside, to tidy up.  The pidfile comes last: it is a
promise that somebody answers.  And step 8 does not unlink: unlink(2) needs a right on the FOLDER,
and step 6 gave that away (Twisted's issue 5297, open since 2011); ftruncate(2) needs only the fd
of step 3.

Vocabulary: pidfile, logfile, rundir as in twistd.  STALE is a pidfile whose process is dead.
The TURN is the right to change a daemon's state.  The INSTANCE LOCK is being the daemon.
READY is "it answers".  PREDECESSOR and HEIR are the old and the new daemon of a restart.  A
HOST is the daemon's half that keeps a program, or workers.  A CHANNEL carries lines of JSON between
two processes; a daemon's are the REPORT, to the command that started it, the LEASH, to the starter,
and a TALK with each command that calls.  The PLACE of a daemon is its lock, pidfile and control
socket: who has it is the daemon.  A LIBRARY'S DAEMON is a script that called startstop().  Where
Part I says heir, predecessor, LEGACY (memory that an application leaves to its heir) or leaving,
a restart is meant (section 17): pass over it at first.

What ps shows.  The session was made by the starter, which is gone.  The daemon leads a group of
its own but no session (so it can never acquire a terminal), and so does each child of it:

    $ ps -o pid,ppid,pgid,sid,tty,cmd -s $(ps -o sid= -p $(cat PIDFILE))
      PID  PPID  PGID   SID TT   CMD
     4243     1  4243  4242 ?    python3 daemonize.py start        the daemon
     4244  4243  4244  4242 ?    python3 daemonize.py start        a worker

(From Python 3.11 on, CMD is `python3 -P -c ... daemonize.py ... start`: the reason stands below.)

The file has two parts.  Part I, A DAEMON, stands alone: 1 messages, 2 who and where, 3 processes,
4 files, 5 the lock, 6 children and their words, 7 leaving the terminal, 8 giving up root, 9 being
the daemon, 10 a word with the daemon, 11 ending a daemon, 12 programs, 13 start, stop, status,
reload, run, 14 the library call.  Part II, A DAEMON THAT SERVES: 15 applications, 16 workers,
17 restart, 18 other systems, 19 the command line.  Part I calls Part II in three ways only: the
table HOSTS (what it hosts), section 18 (what a system lacks), and section 19 (what was typed).
"""
import os
import sys


def begin_again() -> None:
    """Begin again without the syntax tree.  (Saves memory; no part of the lesson: skip it.)

    Python keeps a script's syntax tree, here 8 MiB, for as long as the script runs: for a daemon,
    for ever.  So we put what was compiled into a memfd, and execute Python anew, which loads only
    that.  First in the file, since what is imported before is imported twice.
    """
    typed, module = list(sys.orig_argv), sys._getframe(1).f_code
    flags = typed[1:-len(sys.argv)]         # -X dev, -W error, ...
    is_daemon = sys.argv[1:2] in (["start"], ["restart"], ["run"])
    if not is_daemon or typed[-len(sys.argv):] != sys.argv or "-m" in flags:
        return
    import marshal
    try:
        fd = getattr(os, "memfd_create")("daemonize.py", 0)     # 0: not close-on-exec
        with open(fd, "wb", closefd=False) as memory:
            marshal.dump(module, memory)
        os.lseek(fd, 0, os.SEEK_SET)
        # -P: the path of -c would begin with the folder that we are called in.  Ours does not.
        text = ("lean = __file__ = %r; import marshal, os, sys; sys.path[:0] = %r; "
                "file = os.fdopen(%d, 'rb'); code = marshal.load(file); file.close(); exec(code)"
                % (__file__, sys.path[:1] * (not getattr(sys.flags, "safe_path", False)), fd))
        os.execv(sys.executable, [sys.executable] + flags + ["-P", "-c", text] + sys.argv[1:])
    # ValueError: env -i, and Python does not know where it lies.  Then with the tree: it costs
    # nothing but memory.
    except (AttributeError, OSError, ValueError):
        pass


if __name__ == "__main__" and "lean" not in globals() and sys.version_info >= (3, 11):
    begin_again()

import _thread
import argparse
import array
import atexit
import contextlib
import errno
import faulthandler
import json
import re
import select
import signal
import socket
import stat
import struct
import time
from types import FrameType, ModuleType
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, NamedTuple
from typing import NoReturn, Optional, Sequence, Set, Tuple, Union
try:
    import fcntl
    import grp
    import pwd
except ImportError:
    sys.exit("daemonize: fatal: unable to run here: this system has neither fork nor users")

# What only some commands need is imported where it is needed: `status` and `stop` are typed by
# people who wait, and a daemon keeps what it imported.

__version__ = "2.0"
__all__ = ["main", "startstop"]

# Hosted unless --app or -- names another.  Resolved on import: before Python 3.9 a script's
# __file__ may be relative, and a restart changes folder before it asks.
APPLICATION = os.path.join(os.path.dirname(os.path.abspath(__file__)), "authserver.py")
if not os.path.exists(APPLICATION):         # a link to this file, in ~/bin
    APPLICATION = os.path.join(os.path.dirname(os.path.realpath(__file__)), "authserver.py")
TIMEOUT = 10.0                  # seconds that stop and drain wait before SIGKILL
START_TIMEOUT = 30.0            # seconds after which a start that is not ready has failed
UMASK = 0o027                   # for the application's files: nothing for others
LOG_BYTES, LOG_KEEP = 10 << 20, 5       # size at which the log is rotated; rotated logs kept
ALIVE = 0.3                     # seconds a program must live to count as started
ANSWER = 5.0                    # seconds for one exchange over a channel
KILLED = 5.0                    # seconds that the kernel may need to end whom SIGKILL has met
GO = 30.0                       # seconds for a command to note a start, and say "go"
POLL = 0.02                     # seconds between two looks where there is nothing to wait on
TICK = 1.0                      # seconds between two looks of an idle daemon; a short patience
SETTLED = 1.0                   # seconds: the death of an older child is bad luck, not bad code
BACKOFF = (0.1, 30.0)           # seconds: first and longest pause before bad code is tried again
MAX_MESSAGE = 1 << 16           # bytes of one message
MAX_FDS = 64                    # descriptors in one message
MAX_TALKS = 8                   # conversations that a daemon has at a time
MAX_LEGACY = 64 << 20           # bytes of memory that a daemon may leave to its heir
PROC = "/proc"                  # where it is missing (macOS, BSD), ps(1) is asked
BOOT = ""                       # id of this boot: start times count from it, and could repeat
with contextlib.suppress(OSError), open(PROC + "/sys/kernel/random/boot_id") as boot_id:
    BOOT = boot_id.read().strip() + ":"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"   # under env -i there is none
IS_LINUX = sys.platform.startswith("linux")
# A pidfd is a handle, not a number: it cannot come to mean another process (pidfd_open(2)).
pidfd_open = getattr(os, "pidfd_open", None)                    # type: Any  # Linux, Python 3.9
pidfd_send_signal = getattr(signal, "pidfd_send_signal", None)  # type: Any
Message = Dict[str, Any]


# == PART I: A DAEMON ========================================================


# -- 1. Messages -------------------------------------------------------------

class Fatal(Exception):
    """The command cannot do as asked: words for a person, an exit status, maybe a traceback."""

    def __init__(self, message: str, status: int = 1, trace: str = "") -> None:
        super().__init__(message)
        self.status, self.trace = status, trace


class Unknown(Fatal):
    """It failed, or was late, after the point of no return: who serves now cannot be told."""


def because(error: BaseException) -> str:
    """Return the reason in an exception without Python's dressing.

    >>> because(OSError(errno.ELOOP, "Too many levels")), because(KeyError("x"))
    ('is a symbolic link', "KeyError: 'x'")
    """
    if isinstance(error, OSError):
        if error.errno == errno.ELOOP:          # that is what O_NOFOLLOW gives
            return "is a symbolic link"
        return error.strerror or str(error)     # "AF_UNIX path too long" has no number
    return "%s: %s" % (type(error).__name__, error)


@contextlib.contextmanager
def trying_to(deed: str, cure: str = "") -> Iterator[None]:
    """Put a system call that fails into words: unable to VERB OBJECT: REASON."""
    try:
        yield
    except OSError as error:
        raise Fatal("unable to %s: %s%s" % (deed, because(error), cure and "\ntry: " + cure))


def as_fatal(error: BaseException, deed: str = "start") -> Fatal:
    """Return any exception as a Fatal; with its traceback, unless it was raised for a person.

    An application marks such an error by an attribute `status`, 1 or 2.  And sys.exit("why") is
    for a person, too.
    """
    if isinstance(error, Fatal):
        return error
    if getattr(error, "status", None) in (1, 2):
        return Fatal(str(error), getattr(error, "status"))
    # argparse, too, and many a configuration reader end what is wrong by sys.exit().
    if isinstance(error, SystemExit):
        if isinstance(error.code, str):
            return Fatal(error.code)
        return Fatal("unable to %s: it exited with status %d" % (deed, exit_status(error)))
    import traceback
    # Three arguments: before Python 3.10 one, the exception, is not enough.
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Fatal("unable to %s: %s" % (deed, because(error)), trace=trace)


def exit_status(error: SystemExit) -> int:
    """Return what exit status sys.exit(code) means: None is 0, a text is 1.

    As Python itself does: os._exit() takes no other number, and would raise where nothing may.

    >>> [exit_status(SystemExit(code)) for code in (None, "why", -1, 256 + 7, 1 << 70)]
    [0, 1, 255, 7, 255]
    """
    if isinstance(error.code, int):
        return error.code & 255 if abs(error.code) < 1 << 63 else 255
    return int(error.code is not None)


def printable(text: str) -> str:
    r"""Return text that is safe on a terminal: what came from elsewhere may hold escape sequences.

    >>> printable("caf\xe9\x1b[2J\n"), printable("\udcc3\udca9")
    ('café\\x1b[2J\n', 'é')
    """
    # Bytes that did not decode are surrogates (PEP 383).  For 3.6 under env -i no UTF-8 decodes.
    text = re.sub("[\ud800-\udc7f\udd00-\udfff]", "?", text)
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode()
                   for c in text)


def emit(fd: int, text: str) -> None:
    """Write text to fd 1 or 2; as bytes, since sys.stdout may only know ASCII (env -i)."""
    data = printable(text).encode()
    with contextlib.suppress(OSError):      # closed, full, no reader: the exit status still tells
        # write(2) may take only a part.
        while data:
            data = data[os.write(fd, data):]


def warn(text: str) -> None:
    """Say what the caller should know, though the command goes on."""
    emit(2, "daemonize: warning: %s\n" % text)


def say(plan: "Plan", text: str) -> None:
    """Say what was done, unless cron is told only of failures (--quiet)."""
    if not plan.options.quiet:
        emit(1, text + "\n")


def log(text: str) -> None:
    """Write a line to the daemon's log, which is fd 2 since step 4."""
    emit(2, "%s daemonize[%d]: %s\n" % (time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid(), text))


def describe(status: int) -> str:
    """Return what wait(2) says of a dead process, in words.

    >>> describe(9), describe(3 << 8)
    ('was killed by signal 9', 'exited with status 3')
    """
    if os.WIFSIGNALED(status):
        return "was killed by signal %d" % os.WTERMSIG(status)
    return "exited with status %d" % os.WEXITSTATUS(status)


# -- 2. Who and where --------------------------------------------------------
# All of this is asked in step 1, and the answers travel in a Plan: later there are a jail, another
# user and another folder, in each of which the same question has another answer.

class Identity(NamedTuple):
    """The user that the daemon becomes; name is "" where the passwd database has no entry."""
    uid: int
    gid: int
    name: str
    home: str
    groups: List[int]           # looked up in step 1: a jail has no group database, either


MAX_ID = (1 << 32) - 2          # 2^32 - 1 is no id: to setresuid(2) it means "leave it as it is"


def look_up(by_name: Callable[[str], Any], by_number: Callable[[int], Any], text: str) -> Any:
    """Return a user's or group's entry in the database, or the number for which there is none.

    As chown(1) does it: the name first, though it may consist of digits.
    """
    with contextlib.suppress(KeyError):
        return by_name(text)
    # isdecimal(), not isdigit(): that one also accepts "²", which int() does not.
    if not text.isdecimal() or len(text) > 10 or int(text) > MAX_ID:
        raise Fatal("unable to switch to %s: there is no such name or number" % text)
    with contextlib.suppress(KeyError):
        return by_number(int(text))
    return int(text)


def look_up_identity(user: Optional[str], group: Optional[str]) -> Optional[Identity]:
    """Return whom --uid and --gid (names or numbers) ask for; None for: stay who you are.

    In step 1, since a jail has no passwd database.  See: getpwnam(3), getgrnam(3).
    """
    if user is None and group is None:
        return None
    if os.geteuid() != 0:
        raise Fatal("unable to switch to %s: only root may" % (user or group))
    gid = None if group is None else look_up(grp.getgrnam, grp.getgrgid, group)
    gid = getattr(gid, "gr_gid", gid)
    # --gid alone: root stays root, in that group.
    entry = look_up(pwd.getpwnam, pwd.getpwuid, "root" if user is None else user)
    if isinstance(entry, int):
        if gid is None:
            raise Fatal("unable to switch to %s: no user has that number\ntry: --gid" % user)
        return Identity(entry, gid, "", "/", [gid])
    gid = entry.pw_gid if gid is None else gid
    # Not initgroups(3): that would read the group database in the jail, where there is none.
    groups = os.getgrouplist(entry.pw_name, gid)
    if not IS_LINUX:
        groups = groups[:os.sysconf("SC_NGROUPS_MAX")]      # of more, setgroups(2) takes none
    return Identity(entry.pw_uid, gid, entry.pw_name, entry.pw_dir, groups)


class Files(NamedTuple):
    """The paths of one daemon: what no option names derives from the pidfile's path."""
    pidfile: str
    logfile: Optional[str]      # None: the output stays where it is (run); "": no place for it
    prefix: str                 # how the application's own files begin; "": no place for them

    @property
    def lock(self) -> str:
        return self.pidfile + ".lock"

    @property
    def control(self) -> str:
        return self.pidfile + ".sock"

    @property
    def folder(self) -> str:
        return os.path.dirname(self.pidfile)


class Plan(NamedTuple):
    """What a command is to do: made once, in step 1, from what was typed, and never changed.

    Command, starter, daemon and workers each have a copy: what one of them changed the others
    would not see.
    """
    # What was typed, and parsed:
    action: str
    words: List[str]            # between ACTION and --
    spoken: List[str]           # the same, with each @FILE read
    arguments: Optional[List[str]]      # after --; None: there was none
    cwd: str                    # the folder in which it was typed
    is_bare: bool               # of restart: with the options of the last start
    options: argparse.Namespace         # with defaults, as they are
    # What resolve() has found out of it:
    name: str = ""
    kind: str = "app"           # a key of HOSTS: "app", "program", "library"
    hosted: str = ""            # the file that is hosted, or the program as it was typed
    command: Tuple[str, ...] = ()       # of a program, with its path made absolute
    files: Files = Files("", None, "")
    identity: Optional[Identity] = None
    chroot: Optional[str] = None
    rundir: str = "/"           # as it is called inside the chroot
    # Of a script with startstop():
    stdin: str = os.devnull
    stderr: Optional[str] = None        # where it has a file of its own
    startmsg: str = ""


def default_files(name: str) -> Files:
    """Return the files that effective uid and name stand for, nothing else: cron must find them."""
    # The effective uid, since it decides what we may open.
    uid = os.geteuid()
    if uid == 0:
        # macOS and the BSDs have no /run.
        run = "/run" if os.path.isdir("/run") else "/var/run"
        return Files("%s/%s.pid" % (run, name), "/var/log/%s/%s.log" % (name, name),
                     "/etc/%s." % name)
    try:
        home = pwd.getpwuid(uid).pw_dir         # not $HOME: su may have left another's there
        # The "/." asks for a folder that we may enter: a file, or a closed folder, raises here.
        os.stat(home + "/.")
        if not os.access(home, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (KeyError, OSError) as error:
        reason = because(error) if isinstance(error, OSError) else "it has no passwd entry"
        raise Fatal("unable to use the home directory of uid %d: %s\n"
                    "try: --pidfile --logfile --passwords" % (uid, reason))
    folder = "%s/.%s/" % (home, name)
    return Files(folder + "pid", folder + "log", folder)


def caller_folder() -> str:
    """Return the current directory by the name that the caller has for it; "" when it is gone.

    A shell that went through a link (current -> release/1) says so in $PWD: believed where it is
    the same folder.  getcwd(3) says release/1, and a later restart would stay there for ever.
    """
    name = os.environ.get("PWD", "")
    with contextlib.suppress(OSError):
        if os.path.isabs(name) and os.path.samefile(name, "."):
            return name
    with contextlib.suppress(OSError):
        return os.getcwd()
    return ""


def absolute(path: str, folder: str) -> str:
    """Return path resolved against the caller's folder, once and for all (step 1).

    >>> absolute("x/../y", "/home/jim"), absolute("/y/.", "")
    ('/home/jim/y', '/y')
    """
    if not folder and not os.path.isabs(path):
        raise Fatal("unable to resolve %s: the current directory is gone" % path)
    return os.path.normpath(os.path.join(folder, path))


def inside(path: str, chroot: Optional[str]) -> Optional[str]:
    """Return what the path is called inside the jail, None if it is not there.

    >>> inside("/jail/log/a", "/jail"), inside("/jail2/a", "/jail"), inside("/a", None)
    ('/log/a', None, '/a')
    """
    if chroot is None or chroot == "/":
        return path
    return path[len(chroot):] or "/" if (path + "/").startswith(chroot + "/") else None


# -- 3. Processes ------------------------------------------------------------

class Process(NamedTuple):
    """What the kernel says of a living process: nothing that a file could forge."""
    pid: int
    ppid: int
    pgid: int
    sid: int
    birth: str                  # no two processes of one boot share pid and birth


def look_at(pid: int) -> Optional[Process]:
    """Return a living process; zombies are dead, unless only their main thread is.

    See: proc(5), /proc/pid/stat.
    """
    if not has_proc():
        return by_ps().get(pid)
    try:
        with open("%s/%d/stat" % (PROC, pid), "rb") as stream:
            # Field 2 is the name, which may hold spaces and brackets: count from the last one on.
            # There 0 is the state, 1 ppid, 2 pgrp, 3 session, 17 num_threads, 19 starttime.
            facts = stream.read().rpartition(b")")[2].split()
    except OSError:                             # there is none, or it ended while we read
        return None
    if not facts or facts[0] in (b"Z", b"X") and facts[17] == b"1":
        return None
    return Process(pid, int(facts[1]), int(facts[2]), int(facts[3]), BOOT + facts[19].decode())


def processes() -> List[Process]:
    """Return all living processes that we can see."""
    if not has_proc():
        return list(by_ps().values())
    found = [look_at(int(name)) for name in os.listdir(PROC) if name.isdigit()]
    return [process for process in found if process is not None]


def status_of(pid: int, field: str) -> List[str]:
    """Return a field of /proc/PID/status, [] where nobody tells.  See: proc(5)."""
    path = "%s/%d/status" % (PROC, pid)
    with contextlib.suppress(OSError), open(path, errors="replace") as stream:
        found = re.findall(r"^%s:\s+(.*)" % field, stream.read(), re.MULTILINE)
        return str(found[0]).split() if found else []
    return []


def ids_of(pid: int) -> Optional[Tuple[int, int]]:
    """Return real uid and gid of a process; None where nobody tells.

    Not the owner of /proc/PID: that is the effective uid, which a process can lend itself; and
    of one that is not dumpable (it has changed its uid) it can be root.  See: proc(5).
    """
    ids = [number for field in ("Uid", "Gid") for number in status_of(pid, field)[:1]]
    if not has_proc():
        ids = ask_ps().get(pid, [])[3:]
    return (int(ids[0]), int(ids[1])) if ids else None


def handles(pid: int, signum: int) -> bool:
    """Tell whether a process has a handler for the signal; where nobody tells, believe it."""
    caught = status_of(pid, "SigCgt")
    return not caught or bool(int(caught[0], 16) >> (signum - 1) & 1)


def age_of(process: Optional[Process]) -> float:
    """Return for how many seconds a process lives: by its birth, for the wall clock may jump."""
    with contextlib.suppress(OSError, ValueError, AttributeError), open(PROC + "/uptime") as uptime:
        ticks = int(process.birth.rpartition(":")[2])       # type: ignore[union-attr]
        age = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
        return max(0.0, round(age, 1))
    return 0.0


def family(session: Optional[int]) -> List[Process]:
    """Return what this process started and still lives: its descendants, and its session's.

    An orphan's parent is init: by its session we know it, where we have one of our own (None:
    `run` has none).  The session's leader is our starter, while that lives: not ours to end.
    """
    # From one listing: a second one could show a child whose parent the first has missed.
    everyone, mine, size = processes(), {os.getpid()}, 0
    # Again until nothing is new: a child may stand in the list before its parent.
    while size != len(mine):
        size = len(mine)
        mine |= {p.pid for p in everyone if p.ppid in mine}
    return [p for p in everyone if p.pid not in (os.getpid(), session)
            and (p.pid in mine or session is not None and p.sid == session)]


def signal_each(members: Iterable[Process], signum: int, by_group: bool) -> None:
    """Signal processes; their groups, where these are ours, since nobody escapes that by forking.

    Never our own group: we are in it, and under `run` others are (cron's shell, `| tee`).
    """
    # A set of groups first: one killpg(2) reaches a child that was forked since the listing, and
    # whose parent has had no time to hear of it.
    groups = {p.pgid for p in members if by_group and p.pgid != os.getpgrp()}
    sent = [(os.killpg, pgid) for pgid in groups]
    sent += [(os.kill, p.pid) for p in members if p.pgid not in groups]
    for send, number in sent:
        with contextlib.suppress(ProcessLookupError, PermissionError):      # one that became root
            send(number, signum)


def wait_until(is_so: Callable[[], Any], seconds: float) -> bool:
    """Look until it is so, or the time is up: for what gives no sign of its own."""
    deadline = time.monotonic() + seconds
    pause = POLL / 16               # most of what is waited for comes in a millisecond
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(2 * pause, POLL)
    return True


def end_all(members: Callable[[], List[Process]], kill: Callable[[], Any], timeout: float) -> bool:
    """Wait until there are no members; SIGKILL after timeout seconds.  True if that was needed."""
    # Polled: most of them are not our children, and wait(2) is for children only.
    began, is_late = time.monotonic(), False
    for left in iter(members, []):      # asks again and again, until the answer is []
        waited = time.monotonic() - began
        if waited > timeout + KILLED:
            pids = ", ".join(str(process.pid) for process in left)
            raise Fatal("unable to stop pids %s: SIGKILL had no effect" % pids)
        # Again and again: a member may have forked since the last look.
        is_late = waited > timeout
        if is_late:
            kill()
        time.sleep(POLL)
    return is_late


# -- 4. Files that root opens ------------------------------------------------
# Root opens files where others may write: that is how daemons become a way to root
# (CVE-2016-1247: nginx's log folder belonged to its user).  The rules: no symlink is followed
# (O_NOFOLLOW); nothing is opened but a regular file with one name (a FIFO would block, a hard
# link would be someone's file); only what we created changes its owner, and through the fd.

def exists(path: str) -> bool:
    """Tell whether there is such a name; raise Fatal where we may not look.

    Not os.path.lexists(), which takes "you may not enter this folder" for "no such file".
    """
    with trying_to("look at %s" % path), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)
        return True
    return False


APPENDING = os.O_WRONLY | os.O_APPEND       # how a log is opened
PRIVATE = 0o600             # for root, or us, alone: if others can read such a file it is refused


def looks_of(file: Union[str, int]) -> Optional[Tuple[int, int]]:
    """Return what tells a file from the next one of that name; None if there is none.

    Raises Fatal where we may not look.
    """
    with trying_to("look at %s" % file), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        facts = os.stat(file)
        return facts.st_ino, facts.st_mtime_ns
    return None


def open_regular(path: str, flags: int, mode: int, is_log: bool = False) -> int:
    """Open a regular file that has one name; to write, create it with exactly that mode.

    It must belong to root or us.  A log need not, and may be /dev/null.  Raises Fatal.
    """
    # O_NONBLOCK: open(2) of a FIFO would wait for its other end.  O_NOCTTY: a terminal, opened
    # for a log, must not become ours.
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    is_reader = not flags & (os.O_WRONLY | os.O_RDWR)       # who looks at a file makes none
    with trying_to("open %s" % path):
        try:
            # Two tries, to know who made it: only our own file gets its mode, past the umask.
            fd = os.open(path, flags if is_reader else flags | os.O_CREAT | os.O_EXCL, mode)
            if not is_reader:
                os.fchmod(fd, mode)
        except FileExistsError:
            fd = os.open(path, flags)
        facts = os.fstat(fd)
    # Asked of the fd: the path may mean another file by now.  The kind first: what is said of a
    # folder shall not be that it has several links.
    problem = ""
    if not stat.S_ISREG(facts.st_mode):
        problem = "" if is_log and path == os.devnull else "not a regular file"
    elif facts.st_nlink > 1:
        problem = "it has another name (a hard link)"
    elif not is_log and facts.st_uid not in (0, os.geteuid()):
        problem = "it belongs to uid %d\ntry: as that user, or another --pidfile" % facts.st_uid
    elif mode == PRIVATE and facts.st_mode & 0o077:     # a pidfile, renamed to be the lock file?
        problem = "others can read it (or modes do not work there)"
    if problem:
        os.close(fd)
        raise Fatal("unable to open %s: %s" % (path, problem))
    return fd


def is_trusted(folder: str) -> bool:
    """Tell whether only root and the caller can change what the path leads to.

    Each folder on the way, through links too, must be theirs, and closed to others or sticky (as
    /tmp is).
    """
    path = "/"                                  # of folders only, what links lead to
    with trying_to("look at %s" % folder):
        os.stat(folder)                         # a loop of links ends here
        for name in folder.split("/"):
            path = os.path.join(path, name)
            facts = os.lstat(path)
            if facts.st_uid not in (0, os.geteuid()):
                return False
            if stat.S_ISLNK(facts.st_mode):
                if not is_trusted(os.path.join(os.path.dirname(path), os.readlink(path))):
                    return False
                path = os.path.realpath(path)
            elif facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX:
                return False
    return True


def check_folder(folder: str) -> None:
    """Refuse, as root, a pidfile's folder in whose place others could put another one.

    The folder itself may be theirs: what root opens in it is checked file by file.  But the way
    to it must be root's.
    """
    with trying_to("use %s" % folder):
        os.stat(folder + "/.")
        if os.geteuid() != 0 or is_trusted(folder):
            return
        parent = os.path.dirname(folder)    # in a sticky one its owner could move the folder away
        if os.path.islink(folder) or not is_trusted(parent) or os.stat(parent).st_mode & 0o022:
            raise Fatal("unable to trust %s: others than root can change where it leads" % folder)


NEEDS_CAPABILITIES = "with CAP_SETUID, CAP_SETGID and CAP_CHOWN, or start as that user"


@contextlib.contextmanager
def acting_as(identity: Optional[Identity]) -> Iterator[None]:
    """Lend root the effective ids of the daemon's user, by which the kernel judges."""
    if identity is None:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    deed = "act as uid %d, gid %d" % identity[:2]
    # Outside of `try`: where this is refused (no CAP_SETGID), the way back would be refused, too.
    with trying_to(deed, NEEDS_CAPABILITIES):
        os.setgroups(identity.groups)
    try:
        # The uid last: with another effective uid than root's, groups and gid cannot be changed.
        with trying_to(deed, NEEDS_CAPABILITIES):
            os.setegid(identity.gid)
            os.seteuid(identity.uid)
        yield
    finally:
        # In reverse.  Each of these does no harm where the step that it undoes was never taken.
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


@contextlib.contextmanager
def careful(path: str, identity: Optional[Identity]) -> Iterator[bool]:
    """Have root's rights only where nobody else can change the path's folder; yields whether so.

    On the way to it a sticky folder will do, where nobody can move what is another's.  Not here:
    in that folder others could make the name first.
    """
    folder = os.path.dirname(path)
    with trying_to("look at %s" % folder):
        is_safe = os.path.isdir(folder) and is_trusted(folder)
        is_safe = is_safe and not os.stat(folder).st_mode & 0o022
    with acting_as(None if is_safe else identity):
        yield is_safe


def open_log(path: str, identity: Optional[Identity]) -> int:
    """Return the log's fd, for appending; a new log is the daemon user's from its first byte.

    Runs as: root; in a folder that others may change, with the user's rights.
    See: open(2) O_APPEND; twistd: startLogger.
    """
    # Asked before it is opened: only what we made is given away.  (In a safe folder nobody else
    # can have made it in between.)
    is_new, owner = not exists(path), identity.uid if identity else os.geteuid()
    with careful(path, identity) as is_safe:
        fd = open_regular(path, APPENDING, 0o640, is_log=True)
    if not is_safe and os.fstat(fd).st_uid not in (0, owner, os.geteuid()):
        raise Fatal("unable to open %s: it belongs to uid %d\ntry: another --logfile" % (
            path, os.fstat(fd).st_uid))
    if is_new and is_safe and identity is not None:
        with trying_to("give %s to uid %d" % (path, owner), NEEDS_CAPABILITIES):
            os.fchown(fd, identity.uid, identity.gid)
    return fd


def bind_control(path: str) -> socket.socket:
    """Return a unix socket bound at path, 0600, not listening yet.  See: unix(7)."""
    with trying_to("bind %s" % path), contextlib.ExitStack() as back:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # From inside its folder: addresses hold 108 bytes, on macOS and BSD 104.  Nobody goes
        # back: since step 1 nothing is relative.
        os.chdir(os.path.dirname(path))
        # Not by chmod(2): the name may be another's by then.
        back.callback(os.umask, os.umask(0o177))
        # A dead daemon's socket is still there, and bind(2) takes no name that exists.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.basename(path))
        control.bind(os.path.basename(path))
    return control


def open_files(start: "Start") -> "Start":
    """Step 3.  Open what the daemon's user could not open, or could be tricked with, later.

    All of it at once, and by descriptors from then on: a name is looked up by root once, when
    only root's and the caller's own hands can have been at it.

    Runs as: root.  See: open(2); twistd: startLogger, openPIDFile.
    """
    plan, files, control = start.plan, start.plan.files, start.control
    # An heir has its predecessor's: whoever dials the name finds one of the two at any moment.
    if control is NOBODY.end and plan.kind != "library":
        control = bind_control(files.control)
    output = open_log(files.logfile, plan.identity) if files.logfile else None
    pidfile = open_pidfile(files.pidfile)
    with trying_to("open %s" % plan.stdin):
        stdin = None if plan.action == "run" else os.open(plan.stdin, os.O_RDONLY | os.O_CLOEXEC)
    stderr = open_log(plan.stderr, plan.identity) if plan.stderr else output
    return start._replace(control=control, pidfile=pidfile, pidfile_stat=os.fstat(pidfile),
                          stdio=[stdin, output, stderr])


def open_pidfile(path: str) -> int:
    """Return the pidfile's fd.  A file that is no pidfile of ours stays as it is.

    Where the folder is the daemon user's, that user can give any file of root's the pidfile's
    name, and 0644 would show to all what was root's alone: so it must look like a pidfile first.
    """
    fd = open_regular(path, os.O_RDWR, 0o644)
    with trying_to("read %s" % path):
        content, facts = os.pread(fd, 33, 0), os.fstat(fd)
        # Of 0644 it is ours; or, if not, it hides nothing.
        if facts.st_mode & 0o777 == 0o644:
            return fd
        if re.fullmatch(rb"(\d{1,10}\n?)?", content) and facts.st_size <= 11:
            if facts.st_uid == os.geteuid():
                os.fchmod(fd, 0o644)            # made by another tool, under another umask
            return fd
    os.close(fd)
    raise Fatal("unable to open %s: it is no pidfile" % path)


def rewrite(fd: int, data: bytes, what: str) -> None:
    """Replace what stands in a small file."""
    # Written first, cut second: on a full disk the old text is not lost for nothing.  And whoever
    # reads a pidfile in between finds a pid in its first line.
    with trying_to("write %s" % what):
        if os.pwrite(fd, data, 0) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(fd, len(data))


def write_pidfile(fd: int, pid: int) -> None:
    """Name the daemon in the pidfile, through the fd that root opened.

    Monitors read it at any time, and know nothing of our locks: so at no moment is it half written.
    """
    rewrite(fd, b"%d\n" % pid, "the pidfile")


def read_pidfile(path: str) -> str:
    """Return what the pidfile says, "" if it is empty or absent.  It informs, it proves nothing.

    The folder may be another's: what root would not open is not read, either, but said.
    """
    if not exists(path):
        return ""
    try:
        with open(open_regular(path, os.O_RDONLY, 0o644, is_log=True), "rb") as stream:
            # A pid is short; that the file is, nobody promises.
            return stream.read(32).decode("latin-1").strip()
    except Fatal as error:
        return "(%s)" % error if exists(path) else ""       # a stop removed it just now


def make_folder(folder: str, mode: int, identity: Optional[Identity]) -> bool:
    """Make a folder of the default files, unless it is there; tell whether."""
    # 0700 until it is its owner's: between mkdir(2) and fchown(2) nobody else shall get in.
    with trying_to("make %s" % folder):
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            return False
        # By fd from here: what we made is what changes its owner, whoever swaps the names.
        fd = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with trying_to("give %s to its user" % folder, NEEDS_CAPABILITIES):
            # The mode first: afterwards it is another's, and that would need CAP_FOWNER, too.
            os.fchmod(fd, mode)
            if identity is not None:
                os.fchown(fd, identity.uid, identity.gid)
    except Fatal:
        os.rmdir(folder)
        raise
    finally:
        os.close(fd)
    return True


# -- 5. The lock -------------------------------------------------------------
# Who is the daemon?  Not whom a file names: a pid in a file outlives its process, the kernel
# gives it to a stranger, and whoever owns the file writes it.  (`start-stop-daemon --stop` on
# root's pidfile signals every process of the machine, if it holds "-1".)  The kernel knows.  A
# POSIX record lock (fcntl(2), "Advisory record locking") dies with its process, is not inherited
# over fork(2), and F_GETLK returns its holder's pid.  So there are three bytes, in PIDFILE.lock:
#
#   byte 0  the turn: a command holds a WRITE lock on it while it changes something
#   byte 1  the instance lock: the daemon holds a READ lock, through an fd opened read-only by root
#   byte 2  a starter holds a READ lock on it while it has something to undo: when its command is
#           killed, the next one waits until it is done
#
# It is 0600: nobody else can open it and keep root's commands waiting.  The daemon cannot write it:
# so it also holds, for `restart`, what the last start was asked for.  One trap: a process loses
# ALL its locks on a file when it closes ANY fd of it; so it opens it once.

TURN, INSTANCE, UNDOING = 0, 1, 2
FLOCK = struct.Struct("hhqqi" if IS_LINUX else "qqihhi")    # struct flock: Linux; macOS and BSD


def lock_holder(fd: int, byte: int) -> Optional[int]:
    """Return the pid of another process that holds a lock on the byte.

    It is 0 for a process that we cannot see (of another pid namespace), and -1 for a lock that
    has no process (an open file description's).  By hand: fcntl.lockf() cannot ask for F_GETLK.
    """
    # Asked for as a writer would: then readers are in the way, and are named, too.
    with trying_to("ask for the lock", "--pidfile on a local file system (NFS has no locks?)"):
        if IS_LINUX:
            asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            kind, _, _, _, pid = FLOCK.unpack_from(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        else:
            asked = FLOCK.pack(byte, 1, 0, fcntl.F_WRLCK, os.SEEK_SET, 0)
            _, _, pid, kind, _, _ = FLOCK.unpack_from(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else pid


def take_instance(fd: int, predecessor: Optional[int]) -> None:
    """Take the instance lock.  Read locks can be shared: but only with the one we replace."""
    # Take first, look second: two that looked first could both see nobody.
    with trying_to("take the instance lock"):
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, INSTANCE)
    holder = lock_holder(fd, INSTANCE)
    if holder not in (None, -1, predecessor):
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, INSTANCE)
        raise Fatal("unable to start: already running with pid %s" % holder)


class Record(NamedTuple):
    """What the lock file holds: what the last start, or run, was asked for, and whom it started."""
    pidfile: str                # whose record it is: a lock file can be moved, its text cannot
    name: str
    kind: str
    hosted: str
    words: List[str]
    arguments: Optional[List[str]]
    cwd: str
    logfile: Optional[str]
    detached: bool              # start made a session for it
    pid: int
    birth: str


class Lock(ContextManager["Lock"]):
    """PIDFILE.lock: who is the daemon, and what its last start was asked for.

    Opened once, and closed once: see the trap.  Read-only for `status` and `reload`, which change
    nothing and take no turn.
    """

    def __init__(self, plan: Plan, flags: int) -> None:
        check_folder(plan.files.folder)
        self.plan, self.path = plan, plan.files.lock
        self.fd = open_regular(self.path, flags, PRIVATE)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it, and so give up our locks on it; a library's daemon comes by here twice."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def holder(self) -> Optional[int]:
        """Return the pid of the running daemon, None if there is none; raise Fatal if unknown.

        A script with startstop() may close all its fds (daemons do), and the lock with them; then
        pid and time of birth, which its start noted, prove it as well: the file is 0600 and ours.
        """
        # Three answers: yes (the kernel names a living process), no, and cannot tell: Fatal.  Who
        # took the third one for the second would start a second daemon.
        pid, record = lock_holder(self.fd, INSTANCE), self.record()
        if pid not in (None, -1) and look_at(pid or 0) is None:
            # It ended just now; or else it is where we cannot see it.
            if not wait_until(lambda: lock_holder(self.fd, INSTANCE) != pid, TICK):
                raise Fatal("unable to see who runs %s: pid %s holds its lock, in another pid "
                            "namespace (a container), or without /proc" % (self.plan.name, pid))
            pid = None
        # The lock may be lost, the birth cannot: no process of this boot has both numbers again.
        if pid in (None, -1) and record and record.birth:
            process = look_at(record.pid)
            pid = record.pid if process and process.birth == record.birth else None
        if pid in (None, -1):
            check_orphan(self.plan, lambda: lock_holder(self.fd, INSTANCE) not in (None, 0, -1))
            pid = lock_holder(self.fd, INSTANCE)
        return None if pid == -1 else pid

    def record(self) -> Optional[Record]:
        """Return what was noted of the last start that succeeded, or of the last run; else None."""
        with contextlib.suppress(ValueError, TypeError, RecursionError):    # empty, torn, no record
            record = Record(**json.loads(self.read().decode("utf-8", "replace")))
            if record.pidfile == os.path.realpath(self.plan.files.pidfile):
                return record
        return None

    def read(self) -> bytes:
        """Return what stands in the file."""
        with trying_to("read %s" % self.path):
            # pread(2), not open().read(): to close a second fd would drop our locks (the trap).
            return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def note(self, plan: Plan, pid: int) -> None:
        """Note what a start was asked for, and whom it started."""
        record = Record(os.path.realpath(plan.files.pidfile), plan.name, plan.kind, plan.hosted,
                        plan.words, plan.arguments, plan.cwd, plan.files.logfile,
                        plan.action != "run", pid, getattr(look_at(pid), "birth", ""))
        # In the lock file itself, so that one name tells all, and one mode protects it.  Not a new
        # file and rename(2), which would be atomic: the locks are on this inode.
        rewrite(self.fd, json.dumps(record._asdict()).encode(), self.path)


def check_orphan(plan: Plan, is_locked: Callable[[], bool]) -> None:
    """Refuse to call a daemon dead that answers, though somebody removed its lock file.

    Where the folder is another user's, anybody of that user could answer there: not believed.
    is_locked looks once more whether a daemon has the lock: `status` takes no turn, so one may have
    taken its place since the caller looked.  Then this is no orphan, and the caller looks again.
    """
    with contextlib.suppress(OSError):
        pid, uid = listener_of(plan.files)
        is_ours = uid in (0, os.geteuid()) or is_trusted(plan.files.folder)
        if pid and look_at(pid) and is_ours and not is_locked():
            raise Fatal("unable to tell whether %s runs: pid %d answers at %s, but its lock "
                        "was removed\ntry: kill %d" % (plan.name, pid, plan.files.control, pid))


class Turn(Lock):
    """The right to change the state of one daemon: `with Turn(plan) as turn`.

    Runs as: caller.  See: fcntl(2); twistd: checkPID (without a lock: two in a race both start).
    """

    def __init__(self, plan: Plan) -> None:
        """Wait for it, and leave no file if it does not come."""
        self.made = [plan.files.folder] if make_own_folder(plan) else []
        self.is_free, before = True, looks_of(plan.files.lock)
        try:
            super().__init__(plan, os.O_RDWR)
        except Fatal:                   # a first start that failed has just removed the folder?
            if not make_own_folder(plan):
                raise
            super().__init__(plan, os.O_RDWR)
        # Not only where there was none: one may have been removed just before we opened ours.
        self.is_new = looks_of(self.fd) != before
        try:
            self.wait()
        except BaseException as error:
            self.__exit__(error)
            raise

    def __exit__(self, *error: object) -> None:
        """Give it back; who has failed before anything was started leaves no file.

        A lock file that was there is never removed: its inode is what all others wait on.  Nor is
        one removed under whoever has the turn.
        """
        # Whom we have waited for may have started a daemon, and noted it: then it is that one's.
        # (A library's daemon, which comes through here as well, has closed it.)
        if self.is_new and self.is_free and error[0] and self.fd >= 0 and not self.read():
            os.unlink(self.path)
            for folder in self.made:
                with contextlib.suppress(OSError):      # somebody else has a file in it
                    os.rmdir(folder)
        self.close()

    def wait(self) -> None:
        """Wait until it is ours, and say for whom: who has it may need a whole start and stop."""
        # After a moment, not at once: most waits are shorter than what there is to read.
        if wait_until(self.take, TICK):
            return
        holder = lock_holder(self.fd, TURN) or lock_holder(self.fd, UNDOING)
        warn("waiting for pid %s, which is busy with %s" % (holder, self.path))
        if not wait_until(self.take, self.plan.options.start_timeout + self.plan.options.timeout):
            raise Fatal("unable to lock %s: pid %s is still busy with it" % (self.path, holder))

    def take(self) -> bool:
        """Try to take the turn."""
        if self.is_removed():           # a first start failed, and took its files with it
            self.close()
            make_own_folder(self.plan)
            self.fd, self.is_new = open_regular(self.path, os.O_RDWR, PRIVATE), True
        with trying_to("lock %s" % self.path, "--pidfile on a local file system"):
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, TURN)
            except (BlockingIOError, PermissionError):      # EAGAIN, EACCES: POSIX allows either
                self.is_free = self.is_foreign(lock_holder(self.fd, TURN))
                if not self.is_free:    # it may have been given back just now: then the next time
                    return False
        holder = lock_holder(self.fd, UNDOING)
        self.is_free = holder is None or self.is_foreign(holder)
        # This may be the lock of a file that a failed start has just removed: of no use.
        return not self.is_removed() and self.is_free

    def is_removed(self) -> bool:
        """Tell whether the file has no name any more."""
        with trying_to("look at %s" % self.path):
            return os.fstat(self.fd).st_nlink == 0

    def is_foreign(self, holder: Optional[int]) -> bool:
        """Tell whether who holds a byte of ours is no command, and no starter.

        A process that we cannot see counts as one: it may be root's, in another pid namespace.
        """
        ids = ids_of(holder) if holder and holder > 0 else None
        if holder == -1 or ids and ids[0] not in (0, os.geteuid()):
            # Only a daemon that was taken over locks these bytes, through its fd: do not wait.
            warn("pid %d, no command, holds the turn of %s: ignored" % (holder or 0, self.path))
            return True
        return False


def make_own_folder(plan: Plan) -> bool:
    """Make an ordinary user's folder of the default files, ~/.NAME; tell whether."""
    is_own = os.geteuid() != 0 and plan.files.folder == plan.files.prefix.rstrip("/")
    return is_own and make_folder(plan.files.folder, 0o700, None)


# -- 6. Children and their words ---------------------------------------------
# A process that forks another one talks to it in lines of JSON, over a socket pair.  Who says
# what stands over the sections that speak: 7 (a start), 10 (a command and its daemon), 16 (the
# daemon and a worker).  The other end may lie, or be dead: so there is a limit to everything.
# A socket pair and not a pipe, since descriptors travel, too; and whoever dies is noticed by the
# end of it, at once, without a signal and without a look at a pid that could be another's.

# What receive() returns for want of a message.  Who sends one of them gets what it asks for.
ENDED, LATE = "", "\0late"


def peer_of(end: socket.socket) -> Tuple[Optional[int], Optional[int]]:
    """Return (pid, uid) of a unix socket's other side; (None, None) where no system call tells."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None, None
    pid, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def readable(ends: Iterable[Any], deadline: float) -> List[Any]:
    """Return which (sockets, channels) can be read, [] at the deadline.

    By poll(2): select(2) stops at fd 1023.
    """
    poll, by_fd = select.poll(), {end.fileno(): end for end in ends if end.fileno() >= 0}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    # poll(2) counts milliseconds, all else here seconds.
    wait = min(max(0.0, deadline - time.monotonic()), 1e6) * 1000
    return [by_fd[fd] for fd, _ in poll.poll(wait)]


class Channel:
    """JSON lines, and descriptors, over a socket between two of our processes.

    Methods for who speaks: tell, fail.  For who listens: receive, and fds, which holds what
    came along, in order; whoever takes one closes it.  A line each: a person can read it, too.
    """

    def __init__(self, end: socket.socket) -> None:
        self.end, self.buffer = end, b""
        self.fds: List[int] = []  # that came along, whoever takes them

    def fileno(self) -> int:
        """Return what poll(2) asks for; -1 once it is closed."""
        return self.end.fileno()

    def tell(self, event: str, fds: Sequence[int] = (), **facts: Any) -> bool:
        """Say something; tell whether somebody is left to hear it.  See: unix(7), SCM_RIGHTS."""
        # An application says what it likes: what JSON does not know (a time) is said as text.
        data = json.dumps(dict(facts, event=event), default=str).encode() + b"\n"
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError):
            # With the line's first byte: Linux carries no fds over a stream without any.
            self.end.sendall(data[self.end.sendmsg([data], rights):])
            return True
        return False

    def receive(self, seconds: float) -> Message:
        """Return the next message; its event is ENDED at the end or for nonsense, or LATE."""
        deadline = time.monotonic() + seconds
        # A stream knows no messages: a line may come in pieces, or two lines at once.
        while b"\n" not in self.buffer:
            if not readable([self], deadline):
                return {"event": LATE}
            data = self.take()
            self.buffer += data
            if not data or len(self.buffer) > MAX_MESSAGE or len(self.fds) > MAX_FDS:
                return {"event": ENDED}
        # What follows the line stays: two words may have come in one piece.
        line, _, self.buffer = self.buffer.partition(b"\n")
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(line.decode())
            if isinstance(message, dict) and isinstance(message.get("event"), str):
                return message
        return {"event": ENDED}

    def take(self) -> bytes:
        """Return what can be read now, b"" at the end.  See: cmsg(3).

        Close-on-exec from the first moment: another thread may fork and exec in between.
        """
        try:
            data, ancillary, _, _ = self.end.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * MAX_FDS),
                                                     getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        except OSError:                 # ECONNRESET: it died with something of ours unread
            return b""
        for level, kind, cargo in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                # A message that was cut may end in half an int.
                self.fds += array.array("i", cargo[:len(cargo) // 4 * 4])
        return data

    def fail(self, error: BaseException) -> bool:
        """Say why there will be no daemon; tell whether somebody is left to hear it."""
        fatal = as_fatal(error)
        # Both must fit into one message, or nothing is heard: JSON may need twelve bytes for a
        # character.  Of a text the beginning says most, of a trace the end.
        return self.tell("fatal", text=str(fatal)[:MAX_MESSAGE // 32], status=fatal.status,
                         trace=fatal.trace[-(MAX_MESSAGE // 24):])


NOBODY = Channel(socket.socket(socket.AF_UNIX))         # is not there: hears, and says, nothing
NOBODY.end.close()


class Start(NamedTuple):
    """What a daemon has when it begins: it grows from step to step, and from hand to hand."""
    plan: Plan
    # From systemd, or from the daemon that it replaces (section 17):
    sockets: Sequence[socket.socket] = ()
    control: socket.socket = NOBODY.end     # a library's daemon has none
    legacy: Optional[int] = None            # memory that the application shares with its heir
    talk: Channel = NOBODY                  # the conversation with the predecessor
    predecessor: Optional[int] = None       # its pid
    # What step 3 opened as root, for whoever the daemon is later:
    server: Any = None                      # what bind() returned
    lock: int = -1                          # read-only
    pidfile: int = -1
    pidfile_stat: Any = None                # a script may close our fds, and reuse their numbers
    stdio: Sequence[Optional[int]] = ()     # None: that stream stays where it is (run)
    # Whom it talks to:
    session: Optional[int] = None           # that the starter made; None: run has none
    leash: Channel = NOBODY                 # to the starter
    report: Channel = NOBODY                # to the command
    notifier: socket.socket = NOBODY.end    # to systemd


class Hosting(NamedTuple):
    """What a kind of daemon does where the kinds differ; the table HOSTS has one for each kind."""
    prepare: Callable[[Start], Any]     # step 3, as root: make ready, return the server
    live: Callable[[Start], int]        # steps 7 and 8, as the daemon's user: the exit status


class Child(Channel):
    """A process that we forked: the channel to it, whose other end it has, and its end.

    Instance variables: born and deadline, on the monotonic clock; result, its wait status: while
    that is None, its pid cannot come to mean another one.
    """

    def __init__(self, pid: int, end: socket.socket) -> None:
        super().__init__(end)
        self.pid = pid
        self.born = time.monotonic()
        self.deadline = float("inf")        # when to kill it, once it was told to drain
        self.result: Optional[int] = None  # of wait(2): then it is dead

    def hear(self, event: str, seconds: float) -> str:
        """Return the event once it says so, or ENDED, or LATE; what came before was for nobody."""
        # The deadline is for all of it: who talks without end would keep us for ever.
        deadline, said = time.monotonic() + seconds, ""
        while True:
            said = str(self.receive(deadline - time.monotonic())["event"])
            if said in (event, ENDED, LATE):
                return said

    def wait(self, options: int = 0) -> Optional[int]:
        """Return its wait status, None if it lives (with WNOHANG)."""
        if self.result is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.bury(status)
        return self.result

    def bury(self, status: int) -> None:
        """Note that it is dead, and what wait(2) said."""
        # Kept: a second waitpid(2) on that number could wait for a stranger.
        self.result = status
        self.end.close()            # the end of a stream can be read for ever: nobody shall poll it

    def kill(self) -> None:
        """End it for good.  Nobody has waited for it: so the pid is still its own."""
        if self.result is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


class Returned(BaseException):
    """We are a library's daemon: back to the script that called startstop(), through all frames."""


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Have signals wait: a handler that raises would make us forget what we have just forked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    try:
        yield
    finally:
        # Not SIG_SETMASK: a library's daemon goes back through here, with a mask of its own.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED - before)


def flush_streams() -> None:
    """Write what print() has kept."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):    # None, closed, full, or without a reader
            stream.flush()


def fork(life: Callable[[Channel], Any]) -> Child:
    """Return a new child that lives that life and ends with it.

    After fork(2) there are two of us, on two copies of one stack.  The parent returns from here;
    the child never does: below it lies what is its parent's to do.  (But for Returned.)
    """
    flush_streams()             # or what print() has kept would be written by both
    # Between fork(2) and its own handlers the child has ours.
    with trying_to("start a process"), undisturbed():
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            ours.close()
            live(life, Channel(theirs))
    theirs.close()                      # while we hold it as well, its death is no EOF
    return Child(pid, ours)


def live(life: Callable[[Channel], Any], channel: Channel) -> None:
    """Live a child's life, and end with it."""
    status = 1
    try:
        # In this order: what came meanwhile is ours, and meets no handler of the parent's.
        reset_handlers()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        life(channel)
        status = 0
    except (KeyboardInterrupt, Returned):
        raise
    except BaseException as error:                  # asyncio's CancelledError, too
        if isinstance(error, SystemExit) and not isinstance(error.code, str):
            status = exit_status(error)
        else:                                       # sys.exit("why") is said, too
            # The log first: who hears it may kill us.
            fatal = as_fatal(error, "go on")
            log("%s%s" % (fatal.trace, fatal))
            channel.fail(error)
    finally:
        # Whatever it was, what lies below us on the stack is our parent's to do.
        if not isinstance(sys.exc_info()[1], Returned):
            flush_streams()
            os._exit(status)


def failure(child: Channel, message: Message) -> Fatal:
    """Return as an exception what was said instead of what was due."""
    if message["event"] == "fatal":
        # No other status, for who says it may have been taken over: 3 or 130 mean something else.
        status = 2 if message.get("status") == 2 else 1
        return Fatal(str(message.get("text")), status, str(message.get("trace", "")))
    if not isinstance(child, Child):
        return Fatal("unable to start: the command that asked for it is gone")
    # It may have closed its end, and go on.  But not at once: whom SIGKILL meets in the middle of
    # exit(2), when its end is closed already, is said to have died of that.
    if not wait_until(lambda: child.wait(os.WNOHANG) is not None, ALIVE):
        child.kill()
    return Fatal("unable to start: it %s before it was ready" % describe(child.wait() or 0))


def expect(waiting: Sequence[Channel], word: str, seconds: float,
           watched: Sequence[Channel] = ()) -> Message:
    """Return when all the waiting have said the word (what the last one said); watch the others.

    Raises Fatal when one of all ends, or says anything else, and when the time is up.
    """
    deadline, missing, message = time.monotonic() + seconds, list(waiting), {}
    # Also when nobody is missing any more: who has died since is noticed before we go on.
    while missing or readable(watched, 0):
        # One poll for all: the first that fails shall be heard before the slowest that does not.
        heard = readable(missing + list(watched), deadline)
        if not heard:
            raise Fatal("unable to start: not ready after %g s" % seconds)
        for child in heard:
            message = child.receive(deadline - time.monotonic())
            if message["event"] != word:
                raise failure(child, message)
            if child in missing:
                missing.remove(child)
    return message


# -- 7. Leaving the terminal -------------------------------------------------
# Why two forks?  setsid(2) makes a session that has no terminal, but not for a group leader,
# which a command typed into a shell is; hence the first.  The leader of a session could acquire
# a terminal by opening one (credentials(7)); hence the second.  The third article calls
# setsid() once more in its main(), for a group of its own, and gives back what the second fork
# won.  setpgid(2) gives the group without the session.
#
# Who says what at a start.  Each fork() makes a socket pair.  The daemon talks to the command over
# that of the first, since the starter will be gone; that of the second is its leash.
#
#   COMMAND                         STARTER                         DAEMON
#   takes the turn (byte 0)
#   fork -------------------------> holds byte 2; bind(), files
#                                   setsid, fork -----------------> children, probe
#   <------------------------------------------------- "ready" ---
#   notes it all in the lock file
#   --- "go" (no Ctrl-C any more) -------------------------------> instance lock, pidfile, listen
#   ===== here is the point of no return: before it we undo everything, after it nothing ======
#                                   <------------- "placed" ------
#                                   exits: nothing is left to undo
#                                                                   tells the old daemon to leave
#   <-------------------------------------------------- "done" ---  (restart: see section 17)
#   greets; gives the turn back
#
# Whoever dies before the point is noticed: the starter by the command (EOF), as long as there
# is no daemon; then the daemon by the starter (EOF on the leash), and the command by the daemon
# (EOF instead of "go").  Who kills the starter after the second fork changes nothing: the start
# goes on.  What the daemon fails of goes over the leash: the starter takes all back first, and
# then says "fatal".  A command that is killed, hung up or blocked after it has no power any
# more: good.

# What is open so far: the caller's files, and Python's own, which are told apart by not being
# inheritable (PEP 446).  What a script opens before it calls startstop() is its own to keep.
LEFT_OPEN = [int(fd) for fd in (os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else range(256))
             if int(fd) > 2]
ENDINGS = {signal.SIGTERM, signal.SIGINT}
HANDLED = ENDINGS | {signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}


def open_stdio() -> None:
    """Open what the caller closed of fds 0 to 2: no file of ours may become its stdout."""
    with trying_to("open %s" % os.devnull):
        fd = os.open(os.devnull, os.O_RDWR)
        while fd <= 2:
            os.set_inheritable(fd, True)        # as a standard stream is
            fd = os.open(os.devnull, os.O_RDWR)
        os.close(fd)
    # For a stream that was closed Python has None, in which print() loses its text in silence.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def close_inherited() -> None:
    """Close what the caller left open, from a list: RLIMIT_NOFILE may be 2^30.

    A pipe of cron's or ssh's that stayed open in a daemon would keep its reader waiting for ever.
    """
    for fd in LEFT_OPEN:
        with contextlib.suppress(OSError):          # it was closed since
            # Inheritable is what the caller left, and no number of a file that we have opened.
            if os.get_inheritable(fd):
                os.close(fd)


def unignore_signals(spared: Iterable[int] = ()) -> None:
    """Undo what the caller ignored or blocked: both survive fork and exec.  See: signal(7)."""
    ours = {signal.SIGPIPE, signal.SIGXFSZ}         # Python itself ignores these
    for signum in set(range(1, signal.NSIG)) - ours - set(spared):
        with contextlib.suppress(OSError, ValueError):      # KILL, STOP, holes in the numbering
            if signal.getsignal(signum) == signal.SIG_IGN:
                signal.signal(signum, signal.SIG_DFL)
    # With SIGTERM blocked, each `stop` would end in SIGKILL after its timeout.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def set_handlers(signums: Iterable[int], handler: Any, spares_ignored: bool = False) -> None:
    """Handle signals; but what the caller ignores may have to stay so (nohup meant all of us)."""
    for signum in signums:
        if not (spares_ignored and signal.getsignal(signum) is signal.SIG_IGN):
            signal.signal(signum, handler)


def do_nothing(signum: int, frame: Optional[FrameType]) -> None:
    """Take no notice of a signal.  Not SIG_IGN: children would inherit that, over exec too."""


def end_once() -> None:
    """Leave at TERM and INT by the normal exit, once, so that every `finally` runs."""
    owner = os.getpid()

    def on_end(signum: int, frame: Optional[FrameType]) -> None:
        if os.getpid() != owner:        # a child of Python 3.6, which knows no register_at_fork
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        set_handlers(ENDINGS, do_nothing)
        raise SystemExit(0)
    set_handlers(ENDINGS, on_end)


def reset_handlers() -> None:
    """Give a child default handlers: its parent's would signal the parent's family."""
    signal.set_wakeup_fd(-1)
    set_handlers(HANDLED, signal.SIG_DFL, spares_ignored=True)


def guard_forks() -> None:
    """Have whoever forks, here and in workers, make a child with default handlers.

    Between fork(2) and these it has its parent's, and Python forgets a signal that came meanwhile:
    a multiprocessing.Pool that is ended at once would wait for ever.  So they are blocked until
    then, in the thread that forks.  (Since Python 3.7.)
    """
    masks: Dict[int, Iterable[int]] = {}        # by thread: two may fork at a time

    def before() -> None:
        masks[_thread.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop(_thread.get_ident()))

    def after_in_child() -> None:
        reset_handlers()
        after()
    getattr(os, "register_at_fork", lambda **_: None)(
        before=before, after_in_parent=after, after_in_child=after_in_child)


def be_starter(start: Start, turn: Lock) -> None:
    """Live as the starter: do what needs root or the terminal, then see the daemon to its place."""
    # From here on the terminal is still there, and root's rights: what fails is told in full.
    end_once()                                  # bind() may hang: so its `finally` runs
    set_handlers({signal.SIGINT, signal.SIGHUP}, do_nothing)    # for the command: it will tell us
    # The fd only: record locks are not inherited, and the command's is not touched by this.
    # Before we open the file again, for closing any fd of it would drop our own lock.
    turn.close()
    # What the predecessor sent, and nobody asked for.  The command has it, too: no close lingers.
    for fd in LET_GO + start.talk.fds:
        os.close(fd)
    try:
        start = bind(start)
        # After bind(), since that fails most often, and then there is less to take back.
        start = open_files(start)._replace(session=os.getpid())
        detach(start)
    except Returned:                    # a library's daemon, on its way to the script
        raise
    except BaseException as error:
        # In this order: who hears "fatal" ends us, and it shall find nothing half undone.
        set_handlers(ENDINGS, do_nothing)
        end_all(lambda: family(os.getpid()), end_family, 0)
        take_back(start.server)
        # Last.  No command any more: then we tidy, holding byte 2.
        if not start.report.fail(error):
            tidy(start.plan, [], start.predecessor is None)
    sys.exit(1)                         # to live(): no atexit, which is the command's


def bind(start: Start) -> Start:
    """Step 3, its first half: let the next command wait, and the application bind."""
    path = start.plan.files.lock
    # The lock first: whatever bind() makes, the next command waits until it is undone.  A read
    # lock, through a read-only fd: the daemon inherits the fd, but never the lock.
    lock = open_regular(path, os.O_RDONLY, PRIVATE)
    with trying_to("lock %s" % path, "--pidfile on a local file system"):
        fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, UNDOING)
    return start._replace(lock=lock, server=HOSTS[start.plan.kind].prepare(start))


def take_back(server: Any) -> None:
    """Have the application undo what bind() made (a password that nobody will ever see).

    Only in the starter, and only while the daemon has no place: nobody else may ever call it.
    """
    try:
        call(server, "abandon")
    except Exception as error:
        warn("unable to undo what bind() made: %s" % because(error))


def call(server: Any, name: str, otherwise: Any = None) -> Any:
    """Call what an application need not have.

    A server is any object with serve_forever(): whatever else it knows makes its life better.
    """
    return getattr(server, name, lambda: otherwise)()


def detach(start: Start) -> NoReturn:
    """Step 4.  setsid, and the second fork; see the daemon to its place.

    The daemon itself ends this step, in begin(): it moves its stdio.
    Runs as: root.  See: setsid(2), daemon(7); twistd: daemonize.
    """
    with trying_to("start a process"):
        # Allowed, since a child of fork(2) does not lead its group.
        os.setsid()
        unignore_signals()
    with undisturbed():
        daemon = fork(lambda leash: sys.exit(begin(start._replace(leash=leash))))
        # SIGTERM is the command's "I give up".  The daemon is killed, for nothing of its work has
        # begun; receive() sees its end; and be_starter() takes back what is there.
        signal.signal(signal.SIGTERM, end_family)
    message = daemon.receive(float("inf"))
    if message["event"] != "placed":
        raise failure(daemon, message)
    os._exit(0)


def end_family(*_: object) -> None:
    """Kill, as the starter, the daemon and what it has started."""
    signal_each(family(os.getpid()), signal.SIGKILL, True)


def redirect(stdio: Sequence[Optional[int]]) -> None:
    """Point fds 0 to 2 at what step 3 opened: children, C code and crashes log there, too."""
    for number, fd in enumerate(stdio):
        if fd is not None:
            os.dup2(fd, number)
    # A set, and last: stdout and stderr may be one fd.
    for moved in {fd for fd in stdio if fd is not None}:
        os.close(moved)                 # or a log that was rotated away would keep its space
    if stdio[1] is not None:
        for number, name in ((1, "stdout"), (2, "stderr")):
            # A line at a time: what is printed is in the log at once.  And in UTF-8, which never
            # fails: under env -i the caller's streams know ASCII only.
            stream = os.fdopen(number, "w", 1, "utf-8", "backslashreplace", closefd=False)
            setattr(sys, name, stream)


def point_log_at(fd: int) -> None:
    """Log to another file from now on.

    In each process for itself: an fd's number is its process's, the open file is everybody's.
    """
    # dup2(2) swaps the file behind a number in one step: no thread ever meets a closed fd 1.
    os.dup2(fd, 1)
    os.dup2(fd, 2)


# -- 8. The jail, and giving up root -----------------------------------------

def set_environment(plan: Plan) -> None:
    """Step 5.  Enter the jail and the working directory; HOME, USER, LOGNAME follow the uid.

    No fd of a folder outside may be open by now: fchdir(2) on it would lead out of the jail.
    Runs as: root.  See: chroot(2), umask(2); twistd: setupEnvironment.
    """
    if plan.chroot is not None:
        with trying_to("enter %s" % plan.chroot):
            os.chroot(plan.chroot)
            # chroot(2) leaves the working directory outside, and ".." would lead on from there.
            os.chdir("/")
    with trying_to("enter %s" % plan.rundir):
        os.chdir(plan.rundir)
    os.umask(plan.options.umask)
    user = plan.identity
    if user is not None:
        os.environ.update(HOME=user.home, USER=user.name, LOGNAME=user.name)


def set_ids(uid: int, gid: int) -> None:
    """Set real, effective and saved ids.  On macOS root's setuid(2) sets all three."""
    if hasattr(os, "setresuid"):
        # gid first: without root's uid we may not change it.  Three of each: a saved uid of 0 is
        # a way back, for seteuid(2) and for whoever takes the daemon over.
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    else:
        os.setgid(gid)
        os.setuid(uid)


def switch_user(identity: Optional[Identity]) -> None:
    """Step 6.  Become the daemon's user, for good: groups, gid, uid, and the proof.

    Runs as: root, then the daemon user.  See: setresuid(2), credentials(7); twistd: switchUidGid.
    """
    if identity is None:
        return
    with trying_to("switch to uid %d, gid %d" % identity[:2], NEEDS_CAPABILITIES):
        os.setgroups(identity.groups)       # root's own would stay
        set_ids(identity.uid, identity.gid)
    if identity.uid != 0:
        with contextlib.suppress(PermissionError):
            os.setuid(0)
            raise Fatal("unable to give up root: setuid(0) still succeeds")


# -- 9. Being the daemon -----------------------------------------------------
# Why this order?  The stdio moves before anything else can fail: from then on the log has it.  (And
# here, not in the starter, which may still have something to say on the terminal.)  The jail is
# entered before the user changes, since chroot(2) is root's; nothing of yours has run as root but
# the import and bind().  The children come before the place: as long as the old daemon has it, a
# new one that cannot serve costs nothing.  At the end it is the reverse: first the children go,
# then the pidfile is emptied, so that an empty pidfile means that nothing is left.

def begin(start: Start) -> int:
    """Be the daemon: the end of step 4, then steps 5 to 8; return the exit status."""
    with trying_to("leave the terminal"):
        if start.session is not None and start.plan.kind != "library":  # it may call setsid(2)
            os.setpgid(0, 0)
        close_inherited()
        redirect(start.stdio)
    # By number, not sys.stderr: it writes into whatever fd 2 means at the time of the crash.
    faulthandler.enable(2)
    if start.plan.chroot or start.plan.identity:
        # What is imported late must be here by now: a jail has no library, a user may not read it.
        # Not without need: a daemon keeps what it has imported.
        import subprocess, threading, traceback       # noqa: F401
        if start.plan.kind == "program":
            prctl(PR_GET_DUMPABLE, 0)   # changes nothing, but imports ctypes for die_with_parent()
    set_environment(start.plan)
    switch_user(start.plan.identity)
    return HOSTS[start.plan.kind].live(start)


def take_place(start: Start, settle: Callable[[], Any], **facts: Any) -> None:
    """Become the daemon of this pidfile, at the command's word.  The picture is in section 7.

    "go" is waited for, since the command has something to do in between that may fail: it notes
    the start.  Who took the place at once would have to give it back then, seen by monitors.
    settle: what the host does in its place, before the command hears that all is done.
    """
    # Who does not say it in time (Ctrl-Z) is as good as gone: nobody could tell it more.
    start.report.tell("ready", pid=os.getpid(), **facts)
    if start.report is not NOBODY and start.report.receive(GO)["event"] != "go":
        raise Fatal("unable to start: the command that asked for it is gone")
    # The lock, then the name: who reads the pidfile in between finds the old pid, which is dead or
    # still serves.  Then the socket, for who asks it must be able to believe both.
    take_instance(start.lock, start.predecessor)
    write_pidfile(start.pidfile, os.getpid())
    if start.control is not NOBODY.end:
        # Not in step 3: SO_PEERCRED names who called listen(2) last.
        with trying_to("listen on the control socket"):
            start.control.listen(MAX_TALKS)
    start.leash.tell("placed")          # somebody killed the starter: good as well
    start.leash.end.close()
    settle()
    start.report.tell("done")           # it may be gone: now that is as good
    start.report.end.close()


def finish(start: Start, owner: int) -> None:
    """Step 8.  Empty the pidfile if it still names us, for which no right on its folder is needed.

    Runs as: the daemon user.  See: unlink(2) EACCES, ftruncate(2); twistd: removePIDFile.
    """
    if os.getpid() != owner:            # a child that a script forked, at its own exit
        return
    with contextlib.suppress(OSError):  # a script closed our fd
        is_ours = os.path.samestat(os.fstat(start.pidfile), start.pidfile_stat)
        if is_ours and os.pread(start.pidfile, 32, 0).strip() == b"%d" % owner:
            os.ftruncate(start.pidfile, 0)


class Host:
    """What a daemon hosts, and the children that it lives in: the same for a program and workers.

    Hosts override: fresh (start children, see them prove themselves), spawn (start one more),
    settle (we have the place), on_death, tend, on_end, reload, facts.

    Instance variables: children, at work, and size, how many there should be (0: it is leaving);
    leaving, children that were told to drain; ends, sockets that no child may have; is_owner, the
    pidfile and instance lock are ours; is_over, the loop may end; result, the exit status then;
    is_reloading, what is under way can be given up.
    For a restart (section 17) only: heir, verbs.
    """

    retry = TICK            # seconds until a child that could not be forked is tried again

    def __init__(self, start: Start) -> None:
        self.start, self.plan, self.server = start, start.plan, start.server
        self.children: List[Child] = []
        self.leaving: List[Child] = []
        self.is_owner = self.is_over = self.is_reloading = False
        self.obstacle = log_obstacle(start.plan)    # why the log is not rotated; "" if it is
        self.result = 0                 # exit status
        self.size, self.restarts = 1, 0     # children that there should be; 0: it is leaving
        self.pause, self.next_start = 0.0, 0.0      # before one is started again; from when on
        self.last_error = ""
        self.verbs: Dict[str, Callable[[Channel], bool]] = {}
        self.heir: Optional[Channel] = None         # the conversation that took our sockets
        self.ends = [start.report.end, start.talk.end, start.leash.end]

    def fork(self, life: Callable[[Channel], Any]) -> Child:
        """Return a new child that lives that life, with nothing of the daemon's in its hands."""
        def shed_and_live(channel: Channel) -> None:
            if self.start.session is not None:      # so that its killpg(0) reaches only its own
                os.setpgid(0, 0)
            for end in self.ends:
                end.close()
            # Who takes a worker over shall find neither of them.  Harmless for the lock: that is
            # the daemon's, and fork(2) gave us none to lose.
            os.close(self.start.pidfile)
            os.close(self.start.lock)
            life(channel)
        child = fork(shed_and_live)
        # A child with a copy of a sibling's channel would keep EOF from that sibling.
        # In place: the loop and the conversations add theirs to the same list.
        self.ends[:] = [end for end in self.ends if end.fileno() >= 0] + [child.end]
        return child

    def reap(self) -> None:
        """Wait for whoever ended; kill who was told to drain, and whose time is up.

        For anybody: as pid 1 of a container, or as a subreaper, we get orphans.  See: wait(2).
        """
        # Before we wait: who is killed now is reaped a moment later, by the same loop.
        for child in self.leaving:
            if time.monotonic() > child.deadline:
                os.kill(child.pid, signal.SIGKILL)      # not waited for: the pid is still its own
        with contextlib.suppress(ChildProcessError):        # there is none; (0, 0): all live
            for pid, status in iter(lambda: os.waitpid(-1, os.WNOHANG), (0, 0)):
                for child in [c for c in self.children + self.leaving if c.pid == pid]:
                    child.bury(status)
                    if child in self.children:
                        self.on_death(child, status)
        self.children = [child for child in self.children if child.result is None]
        self.leaving = [child for child in self.leaving if child.result is None]

    def on_death(self, child: Child, status: int) -> None:
        """Note an unexpected death; the pause before the next start grows while they die young.

        Without it bad code would fill the log, and keep a core busy with nothing but forks.
        """
        if self.is_over:                # we have ended it
            return
        self.complain("%s %d %s" % (self.plan.name, child.pid, describe(status)))
        # SIGKILL comes from outside (a person, the OOM killer) and tells nothing of the code.
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        is_settled = is_killed or time.monotonic() - child.born > SETTLED
        self.pause = 0.0 if is_settled else min(BACKOFF[1], max(BACKOFF[0], 2 * self.pause))
        self.next_start = time.monotonic() + self.pause

    def complain(self, text: str) -> None:
        """Log a mistake, and keep it for `status`."""
        self.last_error = "%s %s" % (time.strftime("%Y-%m-%d %H:%M:%S"), text.partition("\n")[0])
        log(text)

    def reopen(self, fds: List[int]) -> str:
        """Log to the first of fds, or else to what its name means now; return why not all do."""
        if self.plan.files.logfile is None:         # the output is not ours
            return ""
        path = inside(self.plan.files.logfile, self.plan.chroot)
        try:
            if path is None and not fds:
                raise Fatal("unable to open %s: it is outside the chroot\n"
                            "try: daemonize.py reload, as root" % self.plan.files.logfile)
            # With the daemon's own rights.
            new = fds.pop(0) if fds else open_regular(str(path), APPENDING, 0o640, is_log=True)
        except Fatal as error:
            self.complain("%s: the old log is kept" % error)
            return str(error)
        point_log_at(new)
        for child in self.children + self.leaving:
            child.tell("reopen", [new])
        os.close(new)
        self.obstacle = log_obstacle(self.plan)
        # Each one, even after a "no".  (Who is leaving is busy; a program says nothing: its end is
        # closed.)
        said = [child.hear("reopened", ANSWER) for child in self.children]
        return "a worker did not reopen the log" if LATE in said else ""

    # What hosts override.

    def fresh(self) -> List[Child]:
        """Return new children that have proved themselves; raise Fatal if they do not."""
        raise NotImplementedError

    def settle(self) -> None:
        """Do what had to wait until the place is ours."""
        self.is_owner = True

    def spawn(self) -> Child:
        """Return a new child, at work."""
        raise NotImplementedError

    def tend(self) -> None:
        """Start a child where one is missing, when its time has come."""
        # One at a time: where forking fails, or code is bad, the pause is for each of them.
        # And nobody once the end was told to all: who came later would not hear of it.
        is_missing = not self.is_over and len(self.children) < self.size
        if is_missing and time.monotonic() >= self.next_start:
            self.next_start = time.monotonic() + self.retry     # if even this fails
            self.children.append(self.spawn())
            self.next_start = 0.0
            self.restarts += 1

    def on_end(self) -> bool:
        """Tell whether all shall be told to end now: a service may drain first."""
        self.is_over = True
        return True

    def reload(self) -> str:
        """Have what is hosted read its files again; return why not, "" if done."""
        raise NotImplementedError

    def facts(self) -> Message:
        """Return what is to be said of what is hosted."""
        return {}


def log_obstacle(plan: Plan) -> str:
    """Return why this process cannot rename and reopen the log, "" if it can, or need not."""
    log = plan.files.logfile
    if plan.kind != "app" or not plan.options.log_bytes or log is None or log == os.devnull:
        return ""
    path = inside(log, plan.chroot)
    if path is None:
        return "it is outside the chroot"
    is_ours = os.access(os.path.dirname(path), os.W_OK | os.X_OK)
    return "" if is_ours else "uid %d may not write in %s" % (os.getuid(), os.path.dirname(path))


class Daemon:
    """The daemon's own life: it waits for signals, for its children, and for commands.

    It is the only thread of its process (threads and fork(2) do not mix), and it runs no code of
    yours but the short calls of the contract.  Commands are served one after the other: a reload
    under way keeps a status waiting, no worker.

    Instance variables: verbs, what commands may ask for: methods, ours or the host's, that get
    the conversation, answer on it, and tell whether somebody has heard it; talks, the
    conversations, the oldest first.
    """

    def __init__(self, start: Start, host: Host) -> None:
        self.start, self.plan, self.host = start, start.plan, host
        self.signals: Set[int] = set()
        self.is_told = self.is_warned = False
        # With who is told to end; short until we have the place: a start that fails says so soon.
        self.patience = min(TICK, self.plan.options.timeout)
        # Handlers only note a number; this pair wakes poll(2) up (signal.set_wakeup_fd).
        self.wake, self.waker = socket.socketpair()
        self.wake.setblocking(False)
        self.waker.setblocking(False)
        start.control.setblocking(False)     # who called may have hung up before we accept
        host.ends += [self.wake, self.waker, start.control]
        self.verbs: Dict[str, Callable[[Channel], bool]] = dict(host.verbs)
        self.verbs["status"] = self.answer_status
        self.verbs["reload"] = lambda talk: talk.tell("reload", reason=self.reload(talk.fds))
        self.talks: List[Channel] = []
        # Now: of one that has hung up nothing is left to be asked.  (Only `run` can have one.)
        self.has_terminal = foreground_group() is not None

    def live(self) -> int:
        """Step 7.  Start the children, take the place; then do what comes, until it is over.

        Runs as: the daemon user.  See: listen(2); twistd: startApplication, startReactor.
        """
        guard_forks()
        # Until we have the place SIGTERM just ends us: there is nothing yet that could be lost.
        end_once()
        try:
            # As in the picture of section 7: able, ready, the place; nobody is let in before.
            self.host.children = self.host.fresh()
            # Before the pidfile names us, for who reads it may signal us at once; and while
            # end_once() is in force that would end us, when the old daemon has perhaps left.
            # The wakeup fd first: a signal that is noted, but wakes nobody, waits for a tick.
            signal.set_wakeup_fd(self.waker.fileno())
            # What run's caller ignores stays so: nohup means SIGHUP, `&` in a script SIGINT.
            set_handlers(HANDLED, self.note, spares_ignored=self.start.session is None)
            addresses = ", ".join(map(str, self.host.facts().get("addresses", [])))
            take_place(self.start, self.host.settle, addresses=addresses,
                       obstacle=self.host.obstacle,
                       greeting=getattr(self.start.server, "greeting", None))
            if not self.host.is_over:           # run of a program that has ended: it has failed
                notify(self.start, "READY=1\nSTATUS=" + addresses)
            if self.host.obstacle:      # also where nobody greets: run, a restart from cron
                log("unable to rotate the log: " + self.host.obstacle)
            self.patience = self.plan.options.timeout
            while not self.host.is_over:
                self.step()
        finally:
            self.end()
        return self.host.result

    def note(self, signum: int, frame: Optional[FrameType]) -> None:
        """Note a signal; when it is the end, wait for no reload, which may hang in a probe."""
        self.signals.add(signum)
        if signum in ENDINGS and self.host.is_reloading:
            self.host.is_reloading = False      # once: what it has forked is to be killed
            raise Fatal("it is told to end")

    def step(self) -> None:
        """Wait a moment for what comes, and do it."""
        try:
            # A tick at the latest, for what gives no sign: a pause that is over, a full log.
            sources = [self.wake, *self.talks]
            if self.host.is_owner:      # else the heir listens on the same socket: its calls
                sources.insert(0, self.start.control)
            for source in readable(sources, time.monotonic() + TICK):
                if source is self.wake:
                    self.wake.recv(4096)
                elif source is self.start.control:
                    self.accept()
                elif source in self.talks:      # else the call just now drove it out
                    self.answer(source)
            # Who was told to end has not just died: systemd tells all of us at a time.
            if self.signals & ENDINGS:
                self.on_signals()
            # The dead first: a signal that asks for a reload shall find the living.  Who is
            # missing last: a reload has just brought a full set.
            self.host.reap()
            self.on_signals()
            self.host.tend()
            # It gives no sign of its own, and nothing else depends on that name while we live.
            if not self.is_warned and os.fstat(self.start.lock).st_nlink == 0:
                self.is_warned = True
                self.host.complain("somebody removed %s: commands will not find us"
                                   % self.plan.files.lock)
        except Exception as error:      # no fds, no processes: say so, and go on
            self.host.complain("unable to act: %s" % because(error))
            time.sleep(TICK)

    def on_signals(self) -> None:
        """Do what the signals ask for that came since the last look."""
        # At once, for a handler may add to it at any time; what comes now is for the next look.
        signals, self.signals = self.signals, set()
        # Where there is a terminal HUP says that it is gone; else custom made it "reload".
        is_hung_up = signal.SIGHUP in signals and self.has_terminal
        if signals & ENDINGS or is_hung_up:
            if self.host.on_end():
                self.tell_family(signal.SIGINT if signal.SIGINT in signals else signal.SIGTERM)
        elif signal.SIGHUP in signals:
            self.reload([])
        elif signal.SIGUSR1 in signals:
            self.host.reopen([])

    def tell_family(self, signum: int) -> None:
        """Send a signal to all that we have started, once: they may need more than a moment."""
        # Ctrl-C in a terminal went to all of its foreground group, which `run` is a part of.  A
        # second KeyboardInterrupt would hit the program in the midst of its clean-up.
        has_got_it = signum == signal.SIGINT and foreground_group() == os.getpgrp()
        if not self.is_told and not has_got_it:
            for number in (signum, signal.SIGCONT):     # who was stopped obeys when it goes on
                signal_each(self.family(), number, self.start.session is not None)
        self.is_told = True

    def family(self) -> List[Process]:
        """Return all of ours that still lives; in a jail without /proc, our children."""
        # First: who is waited for has no group to be asked for, and its number may be another's.
        self.host.reap()
        members = {process.pid: process for process in family(self.start.session)}
        for child in self.host.children + self.host.leaving:
            pgid = os.getpgid(child.pid)
            members.setdefault(child.pid, Process(child.pid, os.getpid(), pgid, -1, ""))
        return list(members.values())

    def end(self) -> None:
        """End what we have started, then empty the pidfile."""
        # A second SIGTERM, or Ctrl-C, shall not cut this short.
        set_handlers(HANDLED - {signal.SIGCHLD}, do_nothing)
        signal.set_wakeup_fd(-1)        # nobody empties it any more, and Python minds a full one
        notify(self.start, "STOPPING=1")
        self.tell_family(signal.SIGTERM)
        try:
            by_group = self.start.session is not None
            # The pidfile comes after this: while it names us, something of us may live.
            if end_all(self.family, lambda: signal_each(self.family(), signal.SIGKILL, by_group),
                       self.patience):
                log("what did not end within %g s was killed" % self.patience)
        finally:
            if self.host.is_owner:
                finish(self.start, os.getpid())
                # Last, and not when we leave: what it removes (a unix socket's name) is the heir's.
                call(self.start.server, "server_close")

    def accept(self) -> None:
        """Take a command's call; anybody's but ours and root's is hung up."""
        try:
            end = self.start.control.accept()[0]
        except (BlockingIOError, ConnectionError):      # it hung up; or the heir was faster
            return
        # Its mode 0600 does that on Linux; older BSDs ignore the mode of a socket (unix(7)).
        if peer_of(end)[1] not in (None, 0, os.getuid()):
            end.close()
            return
        # For what we answer: who asks, and reads nothing, shall not hold us up.
        end.settimeout(ANSWER)
        self.host.ends.append(end)      # a child that had it would keep the command waiting
        # It is in before the oldest is out: so whoever calls is heard, however many say nothing.
        self.talks.append(Channel(end))
        silent = [talk for talk in self.talks if talk is not self.host.heir]
        if len(silent) > MAX_TALKS:     # who says nothing shall keep nobody out
            self.hang_up(silent[0])

    def answer(self, talk: Channel) -> None:
        """Do what a command asks for."""
        event = talk.receive(0)["event"]
        if event == LATE:               # half a line, so far
            return
        is_heard = False
        try:
            is_heard = event in self.verbs and self.verbs[event](talk)
        except BaseException as error:
            self.host.complain("unable to answer %s: %s" % (event, because(error)))
        if not is_heard:                # at once: who asked shall not wait for what never comes
            self.hang_up(talk)

    def hang_up(self, talk: Channel) -> None:
        """End a conversation; when it is the heir's, there will be none."""
        for fd in talk.fds:
            os.close(fd)
        talk.end.close()
        if talk in self.talks:
            self.talks.remove(talk)
        if talk is self.host.heir:
            self.host.heir = None
            if self.host.is_owner:      # it has not told us to leave: we are the daemon in all
                write_pidfile(self.start.pidfile, os.getpid())
                self.start.control.listen(MAX_TALKS)

    def answer_status(self, talk: Channel) -> bool:
        """Say how we are; the log's size by its fd, for its name may be outside of our jail."""
        path = self.plan.files.logfile
        return talk.tell("status", said=dict(
            self.host.facts(), restarts=self.host.restarts, last_error=self.host.last_error,
            log=path, log_bytes=os.fstat(1).st_size if path else 0))

    def reload(self, new_log: List[int]) -> str:
        """Have all files read again; return why not, "" if done.

        new_log: an fd of it, if a command has opened one.  The log first, and whatever else is
        refused: it may have been renamed, and what is written to the old one is lost when
        logrotate compresses it.
        """
        # systemd hears of the beginning, too: else `systemctl reload` would not wait for the end.
        notify(self.start, "RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        reason = self.host.reopen(new_log) or self.host.reload()
        if reason:
            self.host.complain("reload refused: " + reason)
        else:
            log("reloaded")
        notify(self.start, "READY=1\nSTATUS=" + (reason.replace("\n", "; ") or "reloaded"))
        return reason


def foreground_group() -> Optional[int]:
    """Return whom Ctrl-C at our terminal is for; None without one.  See: tty(4), tcgetpgrp(3)."""
    with contextlib.suppress(OSError), open("/dev/tty", "rb", 0) as tty:
        return os.tcgetpgrp(tty.fileno())
    return None


def notify(start: Start, text: str) -> None:
    """Tell systemd how we are, if it asked.  See: sd_notify(3)."""
    with contextlib.suppress(OSError):      # a supervisor that is gone has no say in our life
        start.notifier.send(text.encode())


# -- 10. A word with the daemon ----------------------------------------------
# A command and a running daemon (whose side stands in section 9) talk over a unix socket beside
# the pidfile:
#
#   COMMAND                               DAEMON
#   "status" ---------------------------> looks at itself
#   <-------------- "status", said -----
#   "reload", an fd of the log ---------> reads all files again, or refuses
#   <-------------- "reload", reason ----
#   "sockets", "leave"                    a restart: section 17
#
# The daemon serves root and its own user.  The command treats the daemon as hostile: it may have
# been taken over.  One deadline for an exchange, 64 KiB and 64 fds at most, no text printed raw.
# And what came from it is never closed: that could be a connection with SO_LINGER, for whose end
# close(2) waits as long as its owner likes.  exit(2) does not wait.

def dial(files: Files) -> Channel:
    """Return the command's end of a conversation with whoever listens at the control socket."""
    if not exists(files.folder):            # a first `status`, before anything was started
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), files.folder)
    # A failure of ours says nothing of the daemon: Fatal, where all others are OSError.
    with trying_to("dial %s" % files.control):
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.chdir(files.folder)              # as in bind_control()
    end.settimeout(ANSWER)
    try:
        end.connect(os.path.basename(files.control))
    except OSError:
        end.close()
        raise
    return Channel(end)


# What a command does not close (see above).  By number, since a socket object closes at its end;
# in a list, for a starter gets copies of all by fork(2), which it can close: they are not the last
# ones, and so nothing lingers.
LET_GO: List[int] = []


def listener_of(files: Files) -> Tuple[Optional[int], Optional[int]]:
    """Return (pid, uid) of who listens at the control socket; raise OSError if nobody does."""
    end = dial(files).end
    listener = peer_of(end)
    LET_GO.append(end.detach())
    return listener


def converse(files: Files, pid: int, verb: str, seconds: float = ANSWER, fds: Sequence[int] = (),
             notice: str = "") -> Tuple[Channel, Message]:
    """Ask the daemon for something; return the conversation, and its answer, which has that name.

    notice: what to say to a person who has to wait for longer than usual.

    Whoever owns the folder can bind a socket there.  The kernel says who listens: we talk to
    nobody but the daemon, root and ourselves (a starter, in a restart).  Raises OSError if nobody
    answers.
    """
    # The pid, and not the uid alone, for a daemon: another process of that user would do as well
    # for an attacker, but not for the person who wants to know how the daemon is.
    talk = dial(files)
    listener, uid = peer_of(talk.end)
    if listener not in (None, pid) and uid not in (0, os.geteuid()):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "another process listens there")
    talk.tell(verb, fds)
    message = talk.receive(ANSWER if notice else seconds)
    if notice and message["event"] == LATE:
        warn(notice)
        message = talk.receive(seconds)
    # ("reloaded" was its word in earlier versions.)
    if message["event"] not in (verb, verb + "ed"):
        LET_GO.append(talk.end.detach())
        raise TimeoutError(errno.ETIMEDOUT, "it does not answer")
    return talk, message


def ask(files: Files, pid: int, verb: str, *more: Any) -> Message:
    """Return the daemon's answer to one question; raise OSError if there is none."""
    talk, message = converse(files, pid, verb, *more)
    LET_GO.append(talk.end.detach())
    return message


# -- 11. Ending a daemon -----------------------------------------------------
# First a handle on the process (a pidfd cannot come to mean another one), then the proof that
# this process holds the instance lock, then the signal.  And when root ends a daemon of another
# uid, a child that became that uid does it: whatever was arranged for us, the kernel lets it
# reach no other user's process.  (setresuid, not seteuid: with a real uid of 0, kill(2) would
# still be root's.)

class Target:
    """A daemon to be ended, with its session if a start made it.

    Instance variables: pidfd, -1 where there is none; session, None for `run`, whose neighbours
    are not ours; birth, None when the proof has failed: then nobody is signalled.
    """

    def __init__(self, lock: Lock, pid: int) -> None:
        self.pid, self.pidfd = pid, -1
        record = lock.record()
        with contextlib.suppress(OSError, TypeError):       # it is dead; there is no pidfd_open
            self.pidfd = pidfd_open(pid)
            LET_GO.append(self.pidfd)           # no heir or worker is to have it
        # The uid is the kernel's word: the process itself cannot choose it.
        process, self.identity = look_at(pid), identity_of(pid)
        # Asked after the handle was opened: so all mean one process, or we have nobody.
        is_it = process is not None and lock.holder() == pid
        self.session = process.sid if process and is_it and record and record.detached else None
        self.birth = process.birth if process and is_it else None

    def leader(self) -> List[Process]:
        """Return the daemon itself, while it is left."""
        process = look_at(self.pid)
        return [process] if process and process.birth == self.birth else []

    def members(self) -> List[Process]:
        """Return who is left: until the last has left, the session's number is its own.

        So nobody else can be in it.  Children that called setsid(2) are not: README says so.
        """
        if self.session is None:
            return self.leader()
        return [p for p in processes() if p.sid == self.session]

    def send(self, signum: int) -> None:
        """Signal the daemon, and nobody else."""
        def action() -> None:
            if self.pidfd >= 0:
                pidfd_send_signal(self.pidfd, signum)
            elif self.leader():         # looked at again, just before
                os.kill(self.pid, signum)
        if self.birth is not None:
            as_user(self.identity, action)

    def send_all(self, signum: int) -> None:
        """Signal who is left, too."""
        self.send(signum)
        rest = [p for p in self.members() if p.pid != self.pid]
        if rest:
            as_user(self.identity, lambda: signal_each(rest, signum, False))


def as_user(identity: Optional[Identity], action: Callable[[], Any]) -> None:
    """Send a signal with that user's rights only.  That nobody is left to get it is as good."""
    if identity is None:
        with contextlib.suppress(ProcessLookupError):
            action()
        return

    def act(user: Identity) -> None:
        try:
            os.setgroups(user.groups)
            set_ids(user.uid, user.gid)
            with contextlib.suppress(ProcessLookupError):
                action()
        except OSError as error:
            sys.exit(error.errno)
    child = fork(lambda channel: act(identity))
    result = os.WEXITSTATUS(child.wait() or 0)
    if result:
        raise OSError(result, os.strerror(result))


def end_daemon(target: Target, timeout: float, is_told: bool = False) -> bool:
    """End a daemon and what it started: SIGTERM, wait, SIGKILL.  True if that was needed.

    First the daemon alone, which tells the others; then who is left.  is_told: to drain, by its
    heir.
    """
    with trying_to("stop pid %d" % target.pid):
        # One deadline for both halves: --timeout is what a person waits.
        deadline = time.monotonic() + timeout
        if not is_told:
            target.send(signal.SIGTERM)
            target.send(signal.SIGCONT)             # one that was stopped obeys when it goes on
        was_killed = end_all(target.leader, lambda: target.send(signal.SIGKILL), timeout)
        # The daemon is gone, and with it whoever knew its children: now the session tells.
        target.send_all(signal.SIGTERM)
        left = max(0.0, deadline - time.monotonic())
        return end_all(target.members, lambda: target.send_all(signal.SIGKILL), left) or was_killed


# -- 12. Programs ------------------------------------------------------------
# Nobody can ask a program whether it serves.  So two signs must do: exec(2) closes its end of the
# channel (what failed before that is said there), and it is alive a moment later.

class Program(Host):
    """Any program, as the daemon's child: it gets SIGHUP at `reload`, and may be started again.

    It leads a group of its own, in the daemon's session, and holds no fd of the daemon's: it may
    close all that it has, fork and kill as it likes, and the lock stays where it is.
    """

    retry = BACKOFF[1]      # what cannot be executed will hardly be there in a second
    patience = 0.0          # until when what a dead program has left may end by itself

    def fresh(self) -> List[Child]:
        """Start it; it has started once it was executed, and lives a moment later."""
        # In the daemon, and not in the command: a start that is interrupted ends with both.
        child = self.spawn()
        if not wait_until(lambda: child.wait(os.WNOHANG) is not None, ALIVE):
            return [child]
        if self.start.report is not NOBODY:
            cure = "" if child.result else "\ntry: its option for the foreground"
            raise Fatal("unable to start: it %s before it was ready%s" % (
                describe(child.result or 0), cure))
        self.on_death(child, child.result or 0)     # run: it ends as the program did
        return []

    def spawn(self) -> Child:
        """Start it, and wait until it is executed."""
        child = self.fork(self.execute)
        # exec(2) closes its end: then there is nothing to read but the end.
        message = child.receive(self.plan.options.start_timeout)
        if message["event"] == "fatal":
            child.kill()
            raise failure(child, message)
        return child

    def execute(self, channel: Channel) -> None:
        """Become the program.  See: execve(2)."""
        # First: whatever follows may take its time, and the daemon may be killed meanwhile.
        die_with_parent()
        # execve(2) resets handlers, but what is ignored stays so; `yes | head` relies on SIGPIPE.
        set_handlers({signal.SIGPIPE, signal.SIGXFSZ}, signal.SIG_DFL)
        os.environ.setdefault("PYTHONUNBUFFERED", "1")      # what it prints is in the log at once
        if "LISTEN_FDS" in os.environ:      # systemd's sockets, which are meant for it
            os.environ["LISTEN_PID"] = str(os.getpid())
            for fd in range(3, 3 + int(os.environ["LISTEN_FDS"])):
                os.set_inheritable(fd, True)
        # In the jail, and as the user: what counts is what that user may execute there.
        path = find_program(self.plan.command[0])
        with trying_to("execute %s" % path):
            os.execv(path, self.plan.command)

    def on_death(self, child: Child, status: int) -> None:
        """End with the program, as it did; or start it again, with --respawn."""
        is_ended = self.is_over         # by us
        super().on_death(child, status)
        if self.plan.options.respawn and not is_ended:
            signal_each(self.rest(), signal.SIGTERM, True)
            self.patience = time.monotonic() + self.plan.options.timeout
            return
        self.is_over, self.size = True, 0
        signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        self.result = 128 + signum if signum else os.WEXITSTATUS(status)
        if is_ended and signum in ENDINGS:      # as it was told to
            self.result = 0

    def rest(self) -> List[Process]:
        """Return what a program that is dead has left: it may hold the port of the next one.

        Of `run` nobody knows: it may have had children before, and as pid 1 gets anybody's.
        """
        lives = [child for child in self.children if child.result is None]
        is_ours = self.start.session is not None and not lives and not self.is_over
        return family(self.start.session) if is_ours else []

    def tend(self) -> None:
        """Start the program again when its time has come, and nothing of the last one is left."""
        rest = self.rest()
        if not rest:
            super().tend()
        elif time.monotonic() > self.patience:
            signal_each(rest, signal.SIGKILL, True)

    def reload(self) -> str:
        """Pass SIGHUP on, if the program has a handler: else it would die of it."""
        for child in self.children:
            if not handles(child.pid, signal.SIGHUP):
                return "it does not handle SIGHUP, and would end"
            os.kill(child.pid, signal.SIGHUP)
        return "" if self.children else "it does not run: it is to be started again"

    def facts(self) -> Message:
        """Return what is to be said of the program."""
        return {"program": " ".join(self.plan.command),
                "program_pid": [child.pid for child in self.children]}


def find_program(name: str) -> str:
    """Return the path of a program.  Not execvp(3)'s way: Python imports modules for that."""
    found, folders = "no such program", os.environ["PATH"].split(":")
    for path in [name] if "/" in name else [os.path.join(folder, name) for folder in folders]:
        if os.path.isfile(path):
            if os.access(path, os.X_OK):
                return path
            found = os.strerror(errno.EACCES)
    raise Fatal("unable to execute %s: %s" % (name, found))


def check_script(start: Start) -> None:
    """Step 3 of a program: see the commonest mistake of who starts a script.

    Its path stays as it was typed, for the program may mean something else by that word.  And the
    program itself is looked up by who executes it: root may not see what is in a user's home.
    """
    plan = start.plan
    script = script_of(plan.command) if plan.chroot is None else None
    if script and os.path.exists(plan.hosted) and not os.path.exists(
            os.path.join(plan.rundir, script)):
        cured = plan._replace(words=plan.words + ["--rundir", plan.cwd])
        raise Fatal("unable to start %s: it is in %s, the daemon in %s (--rundir)\ntry: %s" % (
            script, plan.cwd, plan.rundir, command_line(plan.action, cured)))


# -- 13. The commands --------------------------------------------------------
# Each takes the turn first, and looks second: what it has seen stays so until it gives the turn
# back.  Only `status` and `reload` go without: they change nothing that another one relies on, and
# shall not wait for a start that hangs.  And these two, and `stop`, ask first whether the name is
# known at all: to stop, or look at, what never ran shall leave no lock file behind.

# -- 13.1 start ---------------------------------------------------------------

def start(plan: Plan) -> int:
    """Start the daemon unless it runs; return when it is ready."""
    with Turn(plan) as turn:
        pid = turn.holder()
        if pid is None:
            launch(Start(plan, inherited_sockets(plan)), turn)
        else:
            say_running(plan, turn.record(), pid)
    return 0


def say_running(plan: Plan, record: Optional[Record], pid: int) -> None:
    """Say that it runs already; and what is not as it was asked for.

    Another program under that name is a failure: who is told "already running" believes that
    what was asked for serves.  Other options are none: cron starts each minute.
    """
    if record and (record.kind, record.hosted) != (plan.kind, plan.hosted):
        raise Fatal("unable to start %s: the name is held by pid %d, which hosts %s\n"
                    "try: --name" % (plan.hosted, pid, record.hosted))
    say(plan, "%s is already running with pid %d" % (plan.name, pid))
    if record and (record.words, record.arguments) != (plan.words, plan.arguments):
        say(plan, "it was started with other options\ntry: %s" % command_line("restart", plan))


def command_line(action: str, plan: Plan) -> str:
    """Return a command that can be pasted, with the words that were typed.

    Quoted as a shell wants it, since a path may hold a blank.
    """
    words = ["daemonize.py", action] + plan.words
    return quoted(words + ([] if plan.arguments is None else ["--"] + plan.arguments))


def quoted(words: Sequence[str]) -> str:
    """Return words as a shell wants them."""
    import shlex
    return " ".join(map(shlex.quote, words))


def launch(start: Start, turn: Lock) -> None:
    """Start the daemon, and see it to its place.  The picture is in section 7."""
    plan = start.plan
    # First the list of what is not there yet: only that may be removed, if this fails.
    with Made(plan, turn) as made:
        with undisturbed():             # until we know whom to undo
            made.starter = fork(lambda report: be_starter(start._replace(report=report), turn))
        facts = expect([made.starter], "ready", plan.options.start_timeout)
        # Before "go": a full disk can still be undone.  And afterwards this alone proves who a
        # script is that closes the lock's fd.
        turn.note(plan, int(facts.get("pid", 0)))
    made.starter.tell("go")
    see_placed(made)
    # Last, and the starter is gone, which holds byte 2: who reads it may type the next command.
    greet(plan, facts)
    if plan.kind == "library":
        # Not by exit(3): what the script had before its call (temporary folders, files to be
        # flushed, `finally`, threads) is the daemon's now, and would be ended for it.
        os._exit(0)


def see_placed(made: "Made") -> None:
    """Find out how a start ends after "go".  Raises Fatal if it failed, Unknown if none can tell.

    "go" is the command's last word: an interrupt from here on leaves the new daemon where it is.
    But until "placed" the start can still fail, and then the command helps to undo it:

        the daemon says   the starter      so the daemon
        "done"            has ended        has its place, and serves
        "fatal"           -                failed before it had its place, and says why
        nothing (EOF)     ended with 0     had its place ("placed"), and died there: Unknown
        nothing (EOF)     otherwise        died before it had its place
        else              -                is late, or lies: Unknown
    """
    plan, starter = made.plan, made.starter
    assert starter is not None
    message = starter.receive(2 * ANSWER)
    word = message["event"]
    if word in (ENDED, "done"):         # it should end now: but who was taken over may keep it
        wait_until(lambda: starter.wait(os.WNOHANG) is not None, ANSWER)
    if word == "fatal" or word == ENDED and starter.result != 0:
        error = failure(starter, message)
        made.undo(error)
        raise error
    if word != "done" or starter.result is None:
        raise Unknown("unable to tell whether %s has started\ntry: daemonize.py status" % plan.name,
                      trace=log_since(plan, made.logged))


class Made(ContextManager["Made"]):
    """What a start has made so far; `with` takes it back if the start fails.

    Only what was not there before is removed.  A folder that another start could be using is
    safe: all this happens under the turn.
    """

    def __init__(self, plan: Plan, turn: Lock) -> None:
        files = plan.files
        self.plan, self.turn, self.logfile = plan, turn, files.logfile
        self.starter: Optional[Child] = None
        self.server: Any = None                     # of run, which has no starter
        self.before = turn.read()                   # the record of the last start
        self.new = [path for path in (files.pidfile, files.control, files.logfile)
                    if path and not exists(path)]       # lock and folder are the turn's affair
        logfile = self.logfile or ""
        self.logged = os.path.getsize(logfile) if os.path.exists(logfile) else 0
        if self.logfile == "":
            default_files(plan.name)                # raises, and says why there is no place
        # Root's folder for the default log is the daemon user's, for rotation renames.  Under the
        # turn: a start that finds its daemon running makes nothing.  See: rename(2).
        folder = "/var/log/" + plan.name
        if os.geteuid() == 0 and os.path.dirname(self.logfile or "") == folder:
            self.new += [folder] if make_folder(folder, 0o750, plan.identity) else []

    def __exit__(self, _: object, error: Optional[BaseException], trace: object) -> None:
        if error is not None and not isinstance(error, Returned):   # for that see fork()
            self.undo(error)

    def undo(self, error: BaseException) -> None:
        """Take all back; add what the log says to why the start has failed."""
        set_handlers(ENDINGS | {signal.SIGHUP}, do_nothing)   # an impatient second Ctrl-C
        starter = self.starter
        # The processes before the files: they still write.
        if starter is not None:
            # It ends the daemon, and undoes what bind() made: only it has the server.
            if starter.result is None:
                os.kill(starter.pid, signal.SIGTERM)
            if not wait_until(lambda: starter.wait(os.WNOHANG) is not None, 2 * ANSWER):
                # It hangs.  Its number, and its session's, is its own: nobody has waited for it.
                signal_each([p for p in processes() if p.sid == starter.pid], signal.SIGKILL, False)
                starter.kill()
        take_back(self.server)
        if isinstance(error, Fatal) and not error.trace and error.status == 1:
            error.trace = log_since(self.plan, self.logged)
        tidy(self.plan, self.new, lock_holder(self.turn.fd, INSTANCE) is None)
        if self.turn.read() != self.before:     # last, for it may fail as well
            rewrite(self.turn.fd, self.before, self.turn.path)


def tidy(plan: Plan, new: List[str], is_alone: bool = True) -> None:
    """Remove what a failed start made, but a log that says something; empty an older pidfile.

    That one was there before us, and so stays; but it must name nobody, unless (not is_alone) it
    is the pidfile of a daemon that goes on: of the predecessor of an heir that failed.
    """
    # By lstat, and with the user's rights for the log: its folder may lead elsewhere by now.
    for path in sorted(new, key=len, reverse=True):     # what is in a folder before the folder
        identity = plan.identity if path == plan.files.logfile else None
        with contextlib.suppress(OSError, Fatal), careful(path, identity):  # not there, not empty
            facts = os.lstat(path)
            if stat.S_ISDIR(facts.st_mode):
                os.rmdir(path)
            elif path != plan.files.logfile or facts.st_size == 0:
                os.unlink(path)
    if is_alone and os.path.lexists(plan.files.pidfile):
        with contextlib.suppress(Fatal):            # an odd one, which was refused, stays as it is
            fd = open_pidfile(plan.files.pidfile)
            os.ftruncate(fd, 0)
            os.close(fd)


def greet(plan: Plan, facts: Message) -> None:
    """Say that it runs, where, and what it has to say once."""
    where = ", listening on %s" % facts["addresses"] if facts.get("addresses") else ""
    pid = str(facts.get("pid"))
    # replace(), and not "%": a message of somebody's may have another % in it, or none.
    text = plan.startmsg or "%s is running with pid %s%s" % (plan.name, pid, where)
    say(plan, text.replace("%s", pid))
    if facts.get("obstacle"):   # said while somebody reads it, and not in a log grown for a year
        warn("unable to rotate %s: %s\ntry: --log-bytes 0, and logrotate" % (
            plan.files.logfile, facts["obstacle"]))
    if facts.get("greeting"):
        emit(1, str(facts["greeting"]).rstrip("\n") + "\n")


def log_since(plan: Plan, size: int) -> str:
    """Return the last lines of what was logged beyond that size: by this start, not by an older.

    The program's own last words say more than its exit status, and who starts it sees no log.
    """
    path = plan.files.logfile
    if not path:
        return ""
    with contextlib.suppress(Fatal, OSError), careful(path, plan.identity):
        with open(open_regular(path, os.O_RDONLY, 0o640, is_log=True), "rb") as stream:
            stream.seek(max(size, os.fstat(stream.fileno()).st_size - MAX_MESSAGE))
            lines = stream.read().decode("utf-8", "replace").splitlines()[-30:]
        return "the log (%s) says:\n%s\n" % (path, "\n".join(lines)) if lines else ""
    return ""


# -- 13.2 stop ----------------------------------------------------------------

def stop(plan: Plan) -> int:
    """End the daemon and what it started; return when nothing of it is left."""
    if is_unknown(plan):
        say_stopped(plan)
        return 0
    with Turn(plan) as turn:
        pid = turn.holder()
        if pid is None:
            say_stopped(plan)
        else:
            if plan.action != "stop":       # startstop()'s restart
                check_outside(plan, Target(turn, pid))
            stop_daemon(plan, turn, pid)
        # The names last, when nobody holds the lock any more: as long as something of it lives,
        # monitors find its pid.  Both may be there after a kill -9, too.
        for path in (plan.files.pidfile, plan.files.control):
            with trying_to("remove %s" % path), contextlib.suppress(
                    FileNotFoundError, IsADirectoryError):
                os.unlink(path)                     # a name; what it may link to stays as it is
    return 0


def is_unknown(plan: Plan) -> bool:
    """Tell whether nothing was ever started by that name: then nothing is made to find that out."""
    if not exists(plan.files.lock):
        check_orphan(plan, lambda: exists(plan.files.lock))
    return not exists(plan.files.lock)


def say_stopped(plan: Plan) -> None:
    """Say that it does not run, and where we have looked.

    Who meant another user's daemon of that name sees it from the path.
    """
    say(plan, "%s is not running (%s)" % (plan.name, plan.files.pidfile))


def stop_daemon(plan: Plan, turn: Lock, pid: int) -> None:
    """End the daemon, and whoever else holds its lock; say so, once it is so.

    "Stopped" is a promise to the next command line (`stop && rm -r ...`, `stop && start`).
    """
    # The lock decides, here as well: "stopped" is when nobody holds it any more.
    was_killed = end_daemon(Target(turn, pid), plan.options.timeout)
    for _ in range(100):            # a restart that was killed may have left two; or a liar more
        left = turn.holder()
        if left is None:
            break
        end_daemon(Target(turn, left), plan.options.timeout)
    else:
        raise Fatal("unable to stop %s: pid %s holds its lock" % (plan.name, left))
    if was_killed:
        emit(1, "%s did not end within %g s: killed\n" % (plan.name, plan.options.timeout))
    else:
        say(plan, "%s is stopped" % plan.name)


# -- 13.3 status and reload ---------------------------------------------------

def holder_of(plan: Plan) -> Tuple[Optional[int], Optional[Record]]:
    """Return the pid of the running daemon, and the record of its start, without a turn."""
    if is_unknown(plan):
        return None, None
    # Read-only, and no byte taken: whoever starts or stops it meanwhile is not held up by us.
    with Lock(plan, os.O_RDONLY) as lock:
        return lock.holder(), lock.record()


def status(plan: Plan) -> int:
    """Say whether the daemon runs, and what it says of itself; exit status as LSB has it.

    Whether it runs is the kernel's word alone: a daemon that hangs, and answers nothing, runs.
    """
    # Without a turn: who only looks must never wait, nor keep others waiting.
    pid, record = holder_of(plan)
    facts = stopped_facts(plan) if pid is None else running_facts(plan, pid, record)
    if plan.options.json:
        emit(1, json.dumps(facts) + "\n")
    else:
        emit(1, report_of(facts))
    # LSB's numbers; its 4, "unknown", is what any failure of ours becomes: see report_fatal().
    return {"running": 0, "dead": 1}.get(facts["state"], 3)


def stopped_facts(plan: Plan) -> Message:
    """Return what is left of a daemon that does not run.

    A pid that is left says that it was killed; whose it is today says whether that was long ago.
    """
    path = plan.files.pidfile
    content = read_pidfile(path)
    if not content:
        return {"name": plan.name, "state": "not running", "pidfile": path}
    facts = {"name": plan.name, "state": "dead", "pidfile": path, "content": content}
    # Where the folder is another's it may hold anything: what is no pid is shown, and no more.
    if content.isdecimal() and len(content) < 10 and look_at(int(content)):
        facts["note"] = "pid %s belongs to a stranger now" % content
    return facts


def running_facts(plan: Plan, pid: int, record: Optional[Record]) -> Message:
    """Return what the daemon says, and above it what the kernel says.

    A daemon that does not answer is no failure of ours: that is what was to be found out.
    """
    facts, ids = {}, ids_of(pid)        # type: Message, Any
    # A script with startstop() has no control socket: the kernel's facts must do.
    if record is None or record.kind != "library":
        try:
            said = ask(plan.files, pid, "status").get("said")
            facts = said if isinstance(said, dict) else {}
        except OSError as error:
            facts["note"] = "unable to ask it: %s" % because(error)
    user = ""
    with contextlib.suppress(KeyError, TypeError):      # it has no name; nobody tells its ids
        user = pwd.getpwuid(ids[0]).pw_name
    known = {"name": plan.name, "state": "running", "pid": pid, "uid": ids and ids[0],
             "user": user, "uptime": age_of(look_at(pid))}
    return dict(known, **dict(facts, **known))      # the kernel's first, and not to be overruled


def report_of(facts: Message) -> str:
    r"""Return facts as lines for a person.

    >>> report_of({"name": "a", "state": "running", "pid": 7, "uptime": 61, "addresses": ["b"],
    ...            "uid": 1, "user": "jim", "last_error": "", "x_y": ["c", "d"]})
    'a is running: pid 7, up 0:01:01, on b\n  user    jim (1)\n  x y     c d\n'
    """
    import datetime
    facts = dict(facts)
    line = "%s is %s" % (facts.pop("name"), facts.pop("state"))
    if "pid" in facts:
        uptime = datetime.timedelta(seconds=int(facts.pop("uptime")))
        line += ": pid %s, up %s" % (facts.pop("pid"), uptime)
        facts["user"] = "%s (%s)" % (facts.get("user") or "uid", facts.pop("uid", None))
    addresses = facts.pop("addresses", None)
    if addresses:
        line += ", on " + words_of(addresses)
    rows = [(words_of(key).replace("_", " "), words_of(value)) for key, value in facts.items()
            if value not in ("", None, [])]
    width = max([len(key) for key, _ in rows] + [6])
    return line.replace("\n", "\\n") + "\n" + "".join(
        "  %-*s  %s\n" % (width, key, value) for key, value in rows)


def words_of(value: Any) -> str:
    """Return a fact in one line: what an application says shall not look like a line of ours."""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return str(value).replace("\n", "\\n")


def reload(plan: Plan) -> int:
    """Have the daemon read its files again, with its own rights; say why if it refuses."""
    pid, record = holder_of(plan)
    if pid is None:
        say_stopped(plan)
        return 3
    if record is not None and record.kind == "library":
        # Nobody can ask a script.  The kernel knows (SigCgt in /proc/PID/status).
        reason = "" if handles(pid, signal.SIGHUP) else "it does not handle SIGHUP, and would end"
        if not reason:
            # Through a Target, as for `stop`: proved to be the daemon, and signalled as its user.
            with Lock(plan, os.O_RDONLY) as lock, trying_to("signal pid %d" % pid):
                Target(lock, pid).send(signal.SIGHUP)
    else:
        # We open the log for it: it may have no right to do so (root's folder, another's jail).
        # As whom it runs the kernel says, where its log is the record: not the daemon, which may be
        # hostile, and not the options that --uid or --logfile would have today.
        fds = [open_log(record.logfile, identity_of(pid))] if record and record.logfile else []
        # As long as a start may take: fresh workers have to prove themselves.
        try:
            message = ask(plan.files, pid, "reload", plan.options.start_timeout, fds)
            reason = str(message.get("reason", "it talks nonsense"))
        except OSError as error:
            reason = "%s\ntry: daemonize.py restart" % because(error)
    if reason:                          # its lines are not to look like ours; ours name this daemon
        cure = command_line("restart", plan)
        raise Fatal("unable to reload %s: %s" % (plan.name, reason.replace(
            "\ndaemonize:", "\n  daemonize:").replace("try: daemonize.py restart", "try: " + cure)))
    say(plan, "%s is reloaded" % plan.name)
    return 0


def identity_of(pid: int) -> Optional[Identity]:
    """Return as whom a daemon runs, where root asks, and it is not root."""
    ids = ids_of(pid)
    if os.geteuid() != 0 or ids is None or ids[0] == 0:
        return None
    return Identity(ids[0], ids[1], "", "/", [ids[1]])


# -- 13.4 run -----------------------------------------------------------------

def run(plan: Plan) -> int:
    """Live in the foreground: for systemd, containers, supervisord, debugging.

    No fork, no setsid, and we stay in the group of who started us: what ends that ends us, too.
    """
    # Nothing to reopen yet, and without a terminal nothing that could hang up.
    set_handlers({signal.SIGUSR1} | ({signal.SIGHUP} if foreground_group() is None else set()),
                 do_nothing, spares_ignored=True)
    # Both look at the environment, and take what they find out of it: a child of ours that knows
    # these protocols must not believe that it is meant.
    begun = Start(plan, inherited_sockets(plan), notifier=open_notifier())
    with Turn(plan) as turn:
        pid = turn.holder()
        if pid is not None:
            raise Fatal("unable to run %s: already running with pid %d" % (plan.name, pid))
        with Made(plan, turn) as made:
            begun = bind(begun)
            made.server = begun.server
            begun = open_files(begun)
            # Now, though it may still fail: in its place it has no right to, and no turn.  So a
            # run counts as a start as soon as all is bound and opened.
            turn.note(plan, os.getpid())
    # That closed the turn's fd, and so dropped all our locks: for this moment, which is shorter
    # than any start, another command may begin.  It will be told that we run, or we that it does.
    unignore_signals(spared=(signal.SIGHUP, signal.SIGINT))
    # Orphans of our children become ours, so that we can end them: we have no session of our own.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    return begin(begun)


def open_notifier() -> socket.socket:
    """Return a socket to the supervisor that wants to know how we are.  See: sd_notify(3)."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return NOBODY.end
    with trying_to("connect to NOTIFY_SOCKET %s" % address):
        notifier = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # "@" is for the zero byte of Linux' abstract names: an environment variable holds none.
        notifier.connect("\0" + address[1:] if address.startswith("@") else address)
    notifier.setblocking(False)         # a supervisor that reads nothing shall not stop us
    return notifier


def adopt(fd: int) -> Optional[socket.socket]:
    """Return the listening stream socket that was passed to us as fd; None for anything else.

    Asked of the kernel: systemd passes what a .socket file says, a hostile daemon what it likes.
    """
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    passed = socket.socket(fileno=fd)
    kind = passed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
    if kind != socket.SOCK_STREAM or not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        passed.detach()
        return None
    # What systemd passes is inheritable: each child of ours would hold the port, too.  (All else
    # stays so, and is closed with what the caller left open.)
    os.set_inheritable(fd, False)
    if sys.version_info < (3, 7) and IS_LINUX:          # 3.6 guesses AF_INET
        domain = passed.getsockopt(socket.SOL_SOCKET, getattr(socket, "SO_DOMAIN"))
        passed = socket.socket(domain, kind, 0, passed.detach())
    return passed


def inherited_sockets(plan: Plan) -> List[socket.socket]:
    """Return the sockets that systemd passed to this very process.  See: sd_listen_fds(3).

    A program's stay what they are, for Program.execute() to pass on.
    """
    # Ours only if the pid is: a shell between systemd and us has passed on what was its own.
    is_ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    number = os.environ.get("LISTEN_FDS", "")
    fds = range(3, 3 + int(number)) if is_ours and number.isdecimal() else range(0)
    with trying_to("take over the %s fds of LISTEN_FDS" % number):
        if fds and plan.kind == "program":
            for fd in fds:
                os.set_inheritable(fd, False)       # or close_inherited() would close it
            return []
        # A child that knows the protocol would take fds 3, 4, ... of ours for its own.
        for name in ("LISTEN_FDS", "LISTEN_FDNAMES"):
            os.environ.pop(name, None)
        return [passed for passed in map(adopt, fds) if passed is not None]


# -- 14. The library call ----------------------------------------------------

def startstop(stdout: str = "/dev/null", stderr: Optional[str] = None, stdin: str = "/dev/null",
              pidfile: str = "pid.txt", startmsg: str = "started with pid %s", **more: Any) -> None:
    """Do what sys.argv[1] says: start and restart return, in the daemon; the others exit.

    (The process that you typed exits in any case: with 0, once the daemon runs.  What follows in
    sys.argv is the script's own.)

    Clark Evans' call, in front of any script:

        if __name__ == "__main__":
            startstop(stdout="/tmp/deamon.log", pidfile="/tmp/deamon.pid")
            main()

    The daemon leads neither session nor group: main() may call os.setsid(), as the third article
    does.  `stop` ends its whole session, with a SIGTERM handler in main() or without.  more: uid,
    gid, umask, chroot, rundir, timeout, start_timeout, as on the command line; exit status, too.
    """
    action = sys.argv[1] if len(sys.argv) > 1 else ""
    try:
        if action not in ("start", "stop", "restart", "reload", "status"):
            raise Fatal("usage: %s start|stop|restart|reload|status" % sys.argv[0], 2)
        open_stdio()
        flush_streams()         # now, while nobody waits for us: a full pipe may take its time
        # As in main(): who ignores SIGCHLD cannot wait for a child.  No more of main() than that,
        # for what else this process handles, and its umask, is the script's affair.
        try:
            set_handlers({signal.SIGCHLD}, signal.SIG_DFL)
        except ValueError:
            raise Fatal("unable to %s: startstop() works in the main thread only" % action)
        plan = library_plan(action, pidfile, stdout, more)._replace(
            stdin=absolute(stdin, caller_folder()), startmsg=startmsg,
            stderr=absolute(stderr, caller_folder()) if stderr else None)
        if action == "restart":
            stop(plan)
        result = COMMANDS[plan.action](plan)
    except Returned:                    # we are the daemon: back to the script
        return
    except Fatal as error:
        result = report_fatal(error, action == "status")
    sys.exit(result)


def library_plan(action: str, pidfile: str, logfile: str, more: Dict[str, Any]) -> Plan:
    """Return the command line's plan with what a call gives instead.  Raises TypeError."""
    names = {"uid", "gid", "umask", "chroot", "rundir", "timeout", "start_timeout"}
    for name in set(more) - names:
        raise TypeError("startstop() got an unexpected keyword argument %r" % name)
    if more.get("umask") is not None:
        more["umask"] = "%o" % more["umask"]
    words = ["--%s=%s" % (name.replace("_", "-"), value)
             for name, value in more.items() if value is not None]
    script = absolute(sys.argv[0], caller_folder())
    name = re.sub("[^A-Za-z0-9._-]", "_", os.path.basename(script)) or "script"
    # restart is stop and start, since a script has no sockets that we know of.
    action = "start" if action == "restart" else action
    return parse([action, "--name=" + name, "--pidfile=" + pidfile, "--logfile=" + logfile]
                 + words)._replace(kind="library", hosted=script, words=words)


def live_in_script(start: Start) -> NoReturn:
    """Be the daemon of a script: take the place, and go back to where it called startstop()."""
    take_place(start, lambda: None)
    reset_handlers()
    # By atexit: after the last thread, and after all that the script itself registers from now on.
    atexit.register(finish, start, os.getpid())
    raise Returned


# == PART II: A DAEMON THAT SERVES ===========================================


# -- 15. Applications --------------------------------------------------------
# Whether a file is an application is asked before it runs: a script that has no bind() would begin
# its work at the import, as root, and in the starter.  It is loaded there and not in the command,
# so that `stop` needs no working code.  The options are read twice: in step 1 what we know, after
# the import all of it, since only then add_arguments() can be asked.

def has_bind(source: str, path: str) -> bool:
    """Tell an application from a script without running it: is `bind` a name of its top level?

    By Python's own symbol table: the word may also stand in a string, or in another function.

    >>> has_bind("try:\\n    from a import bind\\nexcept ImportError: pass", "x.py")
    True
    >>> has_bind("def f():\\n    bind = 1\\nsocket.bind()", "x.py")
    False
    """
    import symtable             # here: only --app asks
    try:
        symbol = symtable.symtable(source, path, "exec").lookup("bind")
    except KeyError:
        return bool(re.search(r"^from\s.*\simport\s+\*", source, re.MULTILINE))
    return symbol.is_assigned() or symbol.is_imported()


def check_application(path: str) -> None:
    """Refuse what is no application before it runs: a script is a program."""
    import importlib.util
    try:
        with trying_to("load %s" % path), open(path, "rb") as stream:
            source = importlib.util.decode_source(stream.read())
        if has_bind(source, path):
            return
    except (SyntaxError, ValueError) as error:      # ValueError: a zip file has null bytes
        raise as_fatal(error, "load %s" % path)
    raise Fatal("unable to host %s: it defines no bind() at its top level\n"
                "try: daemonize.py start -- python3 %s" % (path, path), 2)


def load(path: str) -> ModuleType:
    """Import the application at path under its own name.  What it raises is its caller's."""
    import importlib.util       # here: stop, status and reload import nothing
    if not os.path.isfile(path):
        raise Fatal("unable to load %s: no such file" % path)
    name = os.path.splitext(os.path.basename(path))[0]
    # As for `python3 FILE.py`: it finds the modules that lie beside it.
    sys.path.insert(0, os.path.dirname(path))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise Fatal("unable to load %s: its name does not end in .py" % path)
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as `import` has it: its classes are looked up here (pickle, dataclasses).
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def bind_application(start: Start) -> Any:
    """Step 3, the application's part.  Parse its options, let it bind; returns its server.

    Runs as: root.  See: twistd: privilegedStartService.
    """
    # First of all: even the import may read a file by a relative name.  (The daemon's own folder
    # is entered in step 5; a relative path among the options was not meant from there.)
    plan = start.plan
    enter_folder(plan)
    # For __pycache__, which others may have to read; what bind() makes is private, as before.
    with contextlib.ExitStack() as back:
        back.callback(os.umask, os.umask(plan.options.umask))
        module = load(plan.hosted)
    sys.argv = [plan.hosted] + (plan.arguments or [])
    if not callable(getattr(module, "bind", None)):
        raise Fatal("unable to host %s: its bind is no function" % plan.hosted, 2)
    return getattr(module, "bind")(options_for(module, start))


def enter_folder(plan: Plan) -> None:
    """Be where the options were typed: the application's relative paths are meant from there."""
    try:
        os.chdir(plan.cwd or "/")
    except OSError as error:
        if not isinstance(error, PermissionError):      # su nobody, in /root
            warn("the folder of the last start is gone: %s; relative paths mean /" % plan.cwd)
        with trying_to("enter /"):
            os.chdir("/")


def private_files(plan: Plan) -> List[str]:
    """Return our own files, which an application that serves files should serve to nobody.

    Also those that are not there yet: a rotated log appears while it serves.
    """
    files, log = plan.files, plan.files.logfile
    logs = [log] + ["%s.%d" % (log, n + 1) for n in range(plan.options.log_keep)] if log else []
    return [files.pidfile, files.lock, files.control] + logs


def options_for(module: ModuleType, start: Start) -> argparse.Namespace:
    """Return what bind() gets: the application's own options, and a written list of ours."""
    plan = start.plan
    # One parser knows all options, so that a typo in either half is refused.
    parsed = vars(build_parser(module).parse_args(plan.spoken))
    foreign = set(vars(build_parser().parse_args([])))
    uid, gid = plan.identity[:2] if plan.identity else (None, None)
    ours = {"action": plan.action, "name": plan.name, "sockets": list(start.sockets),
            "legacy": start.legacy, "uid": uid, "gid": gid, "chroot": plan.chroot,
            "workers": plan.options.workers, "config_prefix": plan.files.prefix,
            "pidfile": plan.files.pidfile if plan.options.pidfile else None,
            "may_create": plan.action != "run" and not plan.options.quiet,
            "predecessor": start.predecessor, "private_files": private_files(plan)}
    taken = set(parsed) & set(ours) - foreign
    if taken:
        raise Fatal("unable to host %s: --%s is an option of daemonize.py" % (
            plan.hosted, taken.pop().replace("_", "-")), 2)
    own = {key: value for key, value in parsed.items() if key not in foreign}
    return argparse.Namespace(**dict(own, **ours))


# -- 16. Workers -------------------------------------------------------------
#
#   DAEMON                          WORKER (a thread of it listens)
#   fork ------------------------>  serve_forever()
#   <------------------ "able" ---  as it enters it
#   a prober asks once: can it answer?
#   "release" ------------------->  of an heir: the old daemon has stopped accepting, begin
#   "reopen", an fd ------------->  logs there from now on
#   <-------------- "reopened" ---
#   "drain" --------------------->  accepts nobody, answers what it has, ends serve_forever()
#   <-------------- "draining" ---
#   (dies) - - - - EOF - - - - - >  exits at once: nothing of a dead daemon may hold the port

class Service(Host):
    """An application, in workers that are replaced when they die, or reload, or leave.

    The server lives in this process, too, but is never served here: it is what each fork(2) makes
    a worker of.  So reload() runs here, once, and fresh workers have what it has read.

    Methods for the loop: tend, on_end.  For commands: reload, hand_over, leave.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        typed = self.plan.options.workers
        self.size = max(1, int(getattr(self.server, "workers", 1) if typed is None else typed))
        self.is_heir = start.talk is not NOBODY
        if self.is_heir:                # its workers accept nobody yet: no client shall meet both
            call(self.server, "hold")
        self.verbs = {"sockets": self.hand_over, "leave": self.leave}

    def fresh(self) -> List[Child]:
        """Return a full set of new workers that have proved themselves; if one fails none stays."""
        fresh: List[Any] = []
        try:
            # All at once, and then wait: they need as long as one.
            for _ in range(self.size):
                fresh.append(self.spawn())
            # And see whether who asked for us is gone: then so are we.
            expect(fresh, "able", self.plan.options.start_timeout, [self.start.report])
            # After the workers: it asks them, over the sockets that they serve.
            prober = self.fork(self.probe)
            try:
                expect([prober], "able", self.plan.options.start_timeout,
                       fresh + [self.start.report])
            finally:
                prober.kill()
        except BaseException as error:
            for child in fresh:
                child.kill()
            if isinstance(error, Fatal):            # 2, usage, is for bind()
                error.status = 1
            raise
        return fresh

    def work(self, channel: Channel) -> None:
        """Serve, with one thread that listens to the daemon.

        SIGTERM ends it by SystemExit in the main thread, so that the application's `finally` runs.
        """
        import threading
        end_once()
        # These are for the daemon.
        set_handlers({signal.SIGHUP, signal.SIGUSR1}, do_nothing, spares_ignored=True)
        if self.is_heir and self.is_owner:      # forked since settle(): nobody will say it
            call(self.server, "release")
        # A thread, since the main one belongs to serve_forever(), and may never look up.
        threading.Thread(target=obey, args=(self.server, channel), daemon=True).start()
        channel.tell("able")
        self.server.serve_forever()

    def probe(self, channel: Channel) -> None:
        """Ask the workers one question, from outside; in a child, since it may hang.

        What that means only the application knows: we know no HTTP, only whether it raises.
        Without a probe they must live for a moment, like a program.
        """
        getattr(self.server, "probe", lambda: time.sleep(ALIVE))()
        channel.tell("able")

    def settle(self) -> None:
        """Tell the old daemon to leave; when it accepts nobody any more, let the workers begin."""
        super().settle()
        if self.is_heir:
            self.start.talk.tell("leave")       # it may be dead: even better
            # It gives its lock up when its workers drain.  If not, we are the daemon all the same.
            wait_until(lambda: lock_holder(self.start.lock, INSTANCE) is None, ANSWER)
            self.start.talk.end.close()
            for child in self.children:
                child.tell("release")

    def spawn(self) -> Child:
        """Return a new worker."""
        return self.fork(self.work)

    def tend(self) -> None:
        """Start who is missing, rotate a full log; see when a leave is done."""
        super().tend()
        self.is_over = self.is_over or not self.size and not self.leaving
        self.rotate()

    def retire(self) -> None:
        """Tell all workers to finish what they have, and go.

        Each has --timeout seconds from now; reap() ends who needs more.
        """
        for child in self.children:
            child.deadline = time.monotonic() + self.plan.options.timeout
            child.tell("drain")
        self.leaving += self.children
        self.children = []

    def on_end(self) -> bool:
        """End; but with sockets from systemd, which stay, answer first what was accepted."""
        if not self.start.sockets or self.is_heir or not self.size:
            return super().on_end()
        self.retire()
        self.size = 0
        return False

    def reload(self) -> str:
        """Have the application read its files again; return why not, "" if done.

        Once, in this process; fresh workers inherit what was read, and the old ones drain.
        """
        if not self.size:
            return "it is leaving: another one takes its place"
        self.is_reloading = True
        try:
            call(self.server, "reload")
            # The right side runs first: if it raises, the old workers are still in place.
            fresh = self.fresh()
        except BaseException as error:  # SystemExit, too: it refuses this reload, and no more
            trace = as_fatal(error, "reload").trace
            if trace:
                log("reload: " + trace)
            return refusal_of(error, self.plan.chroot is not None)
        finally:
            self.is_reloading = False
        self.retire()
        self.children = fresh
        return ""

    def facts(self) -> Message:
        """Return what the application says of itself; if it raises, what.

        It may be called at any time: in this process no request is served.
        """
        facts = {"workers": [child.pid for child in self.children], "log_rotation": self.obstacle}
        try:
            return dict(call(self.server, "status", {}), **facts)
        except BaseException as error:
            return dict(facts, note="unable to ask the application: %s" % because(error))

    def rotate(self) -> None:
        """Rename the log and its elders once it is full, and open a new one.

        The oldest is renamed over: nobody has had it open for LOG_KEEP rotations.
        """
        path = inside(self.plan.files.logfile or "", self.plan.chroot)
        is_ours = self.is_owner and self.plan.options.log_bytes and not self.obstacle
        if not path or not is_ours or os.fstat(1).st_size < self.plan.options.log_bytes:
            return
        try:
            keep = self.plan.options.log_keep
            elders = ["%s.%d" % (path, n) for n in range(keep, 0, -1)] + [path]
            for older, name in zip(elders, elders[1:]):         # the oldest first
                with contextlib.suppress(FileNotFoundError):
                    os.rename(name, older)
            if not keep:
                os.unlink(path)
            self.obstacle = self.reopen([])     # to rename on would push the elders out
        except OSError as error:
            self.obstacle = because(error)
            self.complain("unable to rotate %s: %s" % (path, self.obstacle))

    # A restart: the picture is in section 17.

    def hand_over(self, talk: Channel) -> bool:
        """Send our sockets, and the memory that the application shares with its heir.

        Control socket, listening sockets, memory, in this order; the other side looks itself.
        """
        self.heir = talk                # first: if it is gone already, we are the daemon again
        sockets = list(getattr(self.server, "sockets", []))[:MAX_FDS - 2]
        legacy = getattr(self.server, "legacy", None)
        fds = [self.start.control.fileno()] + [passed.fileno() for passed in sockets]
        return talk.tell("sockets", fds + [legacy] * (legacy is not None))

    def leave(self, talk: Channel) -> bool:
        """Drain and go: the heir is there, and has shared the instance lock until now."""
        self.is_owner = False
        # A second reload, or HUP, must not fork anybody now: we hold the port, and the heir does.
        workers, self.size = self.children, 0
        self.retire()
        for child in workers:           # none accepts any more: only then may the heir's begin
            child.hear("draining", TICK)
        # With this, whom lock_holder() names is the heir.
        fcntl.lockf(self.start.lock, fcntl.LOCK_UN, 1, INSTANCE)
        return True


def obey(server: Any, channel: Channel) -> None:
    """Follow the daemon, in a thread of a worker; when it is gone, go."""
    while True:
        # Blocked while it waits: after SIGSTOP the kernel gives a signal to any thread that takes
        # it, and the main one, whose `finally` it is for, would sleep on.
        with undisturbed():
            event = channel.receive(3600)["event"]      # an hour, and again
        if event == ENDED:
            os._exit(1)
        elif event == "release":
            call(server, "release")
        elif event == "reopen":
            # Several words may come at once, and the fd with the first of them: so it is not
            # closed but here.
            fd = channel.fds.pop(0)
            point_log_at(fd)
            os.close(fd)
            channel.tell("reopened")
        elif event == "drain":
            getattr(server, "drain", end_main_thread)()
            channel.tell("draining")


def end_main_thread() -> None:
    """Have a main thread that knows no drain() end as by SIGTERM.

    Until it does: a signal that comes between Python's look at its flags and a system call that
    blocks is noticed only when the call returns.  And by pthread_kill(3): kill(2) may give the
    signal to any thread, and a main thread that sits in a system call would not wake up.
    """
    import threading
    while True:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(POLL)


def refusal_of(error: BaseException, is_jailed: bool) -> str:
    """Return why a reload was refused, with a cure where there is one.

    The daemon has not the rights that bind() had: what only root can read, only a restart reads.
    And from a jail it does not even see what lies outside.
    """
    reason = str(as_fatal(error, "reload")).replace("unable to reload: ", "", 1)
    out_of_reach = (PermissionError, FileNotFoundError) if is_jailed else PermissionError
    if isinstance(error.__context__ or error, out_of_reach):
        return reason.partition("\n")[0] + "\ntry: daemonize.py restart"
    return reason


# -- 17. Restart -------------------------------------------------------------
# An application's sockets go from the old daemon to the new one: no client ever meets a closed
# port.  The conversation on which they came is inherited, too, and it is the HEIR that tells the
# old one to leave, when it has the place: no command is needed for that any more.
#
#   COMMAND                    OLD DAEMON                       HEIR (its start: section 7)
#   "sockets" ---------------> hands over: control socket,
#   <-- "sockets", fds ------- listening sockets, legacy
#   fork ------------------------------------------------------> children hold, probe
#   <---------------------------------------------- "ready" ----
#   --- "go" --------------------------------------------------> shares the instance lock; pidfile
#   ===== the point of no return ======
#                              <---------------------- "leave" -
#                              workers drain, accept nobody
#                              gives the instance lock up - - -> "release" to its workers
#   <----------------------------------------------- "done" ----
#   waits until the old one has left; SIGKILL after --timeout
#
# If the heir fails before, it hangs up, and the old one is the daemon again in all: hang_up().

def restart(plan: Plan) -> int:
    """Replace the daemon by a new one; where it has sockets to hand over, without a gap."""
    os.environ.pop("LISTEN_FDS", None)      # another's: who restarts brings no sockets
    if plan.is_bare and is_unknown(plan):
        repeat(plan, None)              # which says so; no lock file is left behind
    with Turn(plan) as turn:
        pid, record = turn.holder(), turn.record()
        if record is not None and record.kind == "library":
            raise Fatal("unable to restart %s: it is a script of its own\ntry: python3 %s restart"
                        % (plan.name, record.hosted))
        if pid is not None and record is not None and not record.detached:
            raise Fatal("unable to restart %s: it runs in the foreground of what started it\n"
                        "try: systemctl restart %s" % (plan.name, plan.name))
        plan = repeat(plan, record) if plan.is_bare else plan
        if pid is None:
            launch(Start(plan), turn)
            return 0
        # Only an application has sockets to hand over, and only another one can take them.
        kinds = {plan.kind, record.kind if record else plan.kind}
        replace(plan, turn, pid, kinds == {"app"})
    return 0


def repeat(plan: Plan, record: Optional[Record]) -> Plan:
    """Return the plan of the last start, made anew from the words that it left in the lock file.

    The words, and not the plan: whatever they name (a user, a link, an @FILE) may mean something
    else today, and is looked up today.  Root repeats no words that others could have put there.
    """
    is_safe = os.geteuid() != 0 or is_trusted(plan.files.folder)
    if record is None or not is_safe:
        reason = "others than root can write beside it" if record else "it is not known"
        raise Fatal("unable to repeat the last start of %s: %s\n"
                    "try: daemonize.py start, or restart with options" % (plan.name, reason))
    dashes = [] if record.arguments is None else ["--"] + record.arguments
    # Relative paths in the old words meant the old folder; a link in it may lead elsewhere by now.
    again = parse(["restart"] + record.words + dashes, record.cwd)
    again.options.quiet = plan.options.quiet
    if any(word.startswith("--timeout") for word in plan.spoken):
        again.options.timeout = plan.options.timeout
    return again._replace(name=record.name,
                          files=again.files._replace(pidfile=plan.files.pidfile))


def replace(plan: Plan, turn: Lock, pid: int, has_sockets: bool) -> None:
    """Start the new daemon on the old one's sockets, then see the old one out; or in reverse.

    In reverse where there is nothing to hand over; and where the old one is mute: hung, stopped,
    or without its socket.  Then a gap is better than no restart.  What fails on our side is
    another thing: then nothing is stopped.
    """
    target, heir = Target(turn, pid), Start(plan)   # now: when it leaves, it holds no lock
    try:
        if has_sockets:
            heir = take_over(plan, pid)
    except OSError as error:
        warn("pid %d hands nothing over (%s): it is stopped first" % (pid, because(error)))
    if heir.talk is NOBODY:
        check_outside(plan, target)
        # What can be seen is seen before anything is lost.  (In a jail only from inside.)
        if plan.kind == "program" and plan.chroot is None:
            find_program(plan.command[0])
            check_script(heir)
        see_out(plan, target, "end")
    try:
        launch(heir, turn)
    except Unknown:                     # the old one may serve, the new one, or nobody
        raise
    except BaseException as error:      # what that means for who is served the lock knows
        if lock_holder(turn.fd, INSTANCE) is None:
            warn("nothing runs now")
        elif isinstance(error, Exception):      # Ctrl-C: both may hold it
            warn("the old one keeps serving with pid %d" % pid)
        raise
    if heir.talk is not NOBODY:
        # The heir has them now.  Not by close(2): that may linger; exit(2) does not.
        for end in [heir.talk.end, heir.control, *heir.sockets]:
            end.detach()
        see_out(plan, target, "drain")


def check_outside(plan: Plan, target: Target) -> None:
    """Refuse a restart that a process of the daemon's own has typed: it would end half-way."""
    if os.getpid() in [process.pid for process in target.members()]:
        # (sys.argv[0] is -c where we have begun again.)
        script = plan.hosted if plan.kind == "library" else os.path.abspath(__file__)
        raise Fatal("unable to restart %s: this command is a part of it, and would end with it\n"
                    "try: setsid -f python3 %s" % (plan.name, quoted([script] + sys.argv[1:])))


def see_out(plan: Plan, target: Target, how: str) -> None:
    """End the old daemon; one that drains was told to by the new one."""
    if end_daemon(target, plan.options.timeout, how == "drain"):
        warn("pid %d did not %s within %g s: killed" % (target.pid, how, plan.options.timeout))


def take_over(plan: Plan, pid: int) -> Start:
    """Return what the old daemon hands over.  It may send anything: only what fits is taken.

    The application compares the addresses with what is asked for, and closes the others.
    """
    # As long as a start may take: it may be busy with a reload, whose workers prove themselves.
    talk, _ = converse(plan.files, pid, "sockets", plan.options.start_timeout,
                       notice="waiting up to %g s for pid %d, which is busy, or hangs" % (
                           plan.options.start_timeout, pid))
    sockets, control, legacy = [], NOBODY.end, None     # type: Any, socket.socket, Any
    # By what the kernel says of each, whatever the daemon calls it.
    fds, talk.fds = talk.fds, []
    for fd in fds:
        passed = adopt(fd)
        if passed and control is NOBODY.end and is_control(passed, plan.files):
            control = passed
        elif passed:
            sockets.append(passed)
        elif legacy is None and is_legacy(fd):
            legacy = fd
        else:
            talk.fds.append(fd)
    return Start(plan, sockets, control, legacy, talk, pid)


def is_control(passed: socket.socket, files: Files) -> bool:
    """Tell whether a socket is the one that listens at the control socket's path.

    listen(2) makes SO_PEERCRED name who called it: so whoever dials there now must meet us.
    """
    with contextlib.suppress(OSError):
        if passed.family == socket.AF_UNIX:
            passed.listen(MAX_TALKS)
            return listener_of(files)[0] in (None, os.getpid())
    return False


F_GET_SEALS, F_SEAL_SHRINK = 1034, 2        # fcntl(2); the module has them since Python 3.8


def is_legacy(fd: int) -> bool:
    """Tell whether it is memory that an heir can map: nobody can cut it, which would be SIGBUS."""
    facts = os.fstat(fd)
    is_small_file = stat.S_ISREG(facts.st_mode) and facts.st_size <= MAX_LEGACY
    with contextlib.suppress(OSError):      # a file, no memfd
        return is_small_file and bool(fcntl.fcntl(fd, F_GET_SEALS) & F_SEAL_SHRINK)
    return False


# -- 18. Other systems -------------------------------------------------------
# What Linux has and others lack (or a jail, a container, an old Python), in one place.

def has_proc() -> bool:
    """Tell whether there is a /proc as Linux has it.

    Asked each time: a jail, or a container that is being set up, may lose or gain it.
    """
    return os.path.exists(PROC + "/self/stat")


PS = "ps -A -o pid= -o ppid= -o pgid= -o stat= -o ruid= -o rgid="


def ask_ps() -> Dict[int, List[str]]:
    """Return what ps(1) says of all processes by pid, {} where there is none."""
    import subprocess
    try:
        with subprocess.Popen(PS.split(), stdout=subprocess.PIPE) as ps:
            lines = ps.communicate()[0].decode().splitlines()
    except (ImportError, OSError):      # a jail has neither the module nor ps
        return {}
    rows = [line.split() for line in lines]
    # ps lists itself, too: a child of ours that is gone by now.
    return {int(row[0]): row[1:] for row in rows if row and row[0] != str(ps.pid)}


def by_ps() -> Dict[int, Process]:
    """Return all living processes where there is no /proc.  See: ps(1), getsid(2).

    No birth there, so no record can prove who is who: the lock alone does.
    """
    found = {}
    for pid, (ppid, pgid, state, _, _) in ask_ps().items():
        if state[0] not in "ZX":
            sid = -1
            with contextlib.suppress(OSError):      # it ended; OpenBSD tells of our session only
                sid = os.getsid(pid)
            found[pid] = Process(pid, int(ppid), int(pgid), sid, "")
    return found


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process, where that is possible.  See: prctl(2)."""
    with contextlib.suppress(ImportError, OSError, AttributeError):     # a jail, another system
        import ctypes           # here: of daemons only `run`, and a jailed program's, need it
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


PR_SET_PDEATHSIG, PR_GET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 3, 36


def die_with_parent() -> None:
    """Have a program end with its daemon, though somebody killed that by SIGKILL.

    By the kernel: there is no channel whose end a program would notice.  See: prctl(2).
    """
    daemon = os.getppid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != daemon:          # it was faster
        os._exit(1)


# -- 19. The command line ----------------------------------------------------
# What is wrong with a command line is said before anything happens: no turn is taken, no folder is
# made.  So the order is: cut at --, read each @FILE (once: it may be a pipe), parse what we know,
# and only then look up what it names.  A restart needs two things more: which words were typed at
# all (a default is no word), and these words themselves, for the lock file.

# What can be hosted: what root does for it in step 3, and how it lives from step 7 on.
HOSTS: Dict[str, Hosting] = {
    "app": Hosting(bind_application, lambda start: Daemon(start, Service(start)).live()),
    "program": Hosting(check_script, lambda start: Daemon(start, Program(start)).live()),
    "library": Hosting(lambda start: None, live_in_script)}
COMMANDS = {"start": start, "stop": stop, "restart": restart, "reload": reload,
            "status": status, "run": run}
STARTING = ("start", "restart", "run")
NEUTRAL = {"--name", "--pidfile", "--timeout", "--quiet"}       # a restart with others is not bare
HELP = """Run an application or a program as a daemon.

  start    return when it is ready       run      the same in the foreground
  stop     end it and what it started    reload   passwords, and the log, again
  restart  new code, no request lost     status   0 running, 1 dead, 3 not, 4 ?"""
EXAMPLES = """@FILE reads options from FILE (shell quoting, # comments).  Examples:
  daemonize.py start --uid www --bind :80
  daemonize.py start -- python3 $PWD/FILE.py
  daemonize.py start --name nap -- sleep 1000"""


def refuse(message: str, cure: str = "daemonize.py -h") -> NoReturn:
    """Refuse a command line, in the words of all other complaints.

    Instead of argparse's own error(), which prints a usage of ten lines above the reason.
    """
    raise Fatal("unable to understand the command line: %s\ntry: %s" % (message, cure), 2)


def bounded(kind: Callable[[str], float], lowest: float, highest: float) -> Callable[[str], float]:
    """Return a converter for numbers from lowest to highest.

    NaN is not between any two numbers, and so refused as well.
    """
    def number(text: str) -> float:     # argparse says: "invalid number value"
        value = kind(text)
        if not lowest <= value <= highest:
            raise ValueError
        return value
    return number


def build_parser(application: Optional[ModuleType] = None) -> argparse.ArgumentParser:
    """Return the one parser; with the application's options once it is loaded."""
    parser = argparse.ArgumentParser(
        prog="daemonize.py", add_help=False, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="daemonize.py ACTION [options] [--app FILE.py] [-- ARG ...]\n"
        "       daemonize.py ACTION [options] -- COMMAND [ARG ...]",
        description=HELP, epilog=EXAMPLES)
    parser.error = refuse       # type: ignore[method-assign]
    # Here, and not where each option is added: there its help would no longer fit into a line.
    parser.set_defaults(umask=UMASK, timeout=TIMEOUT, start_timeout=START_TIMEOUT,
                        log_bytes=LOG_BYTES, log_keep=LOG_KEEP)     # of all others: None, or False
    add_options(parser.add_argument_group("daemon options").add_argument)
    getattr(application, "add_arguments", lambda parser: None)(parser)
    return parser


def add_options(add: Callable[..., Any]) -> None:
    """Add the daemon's own options; what stands in brackets is the default."""
    seconds: Dict[str, Any] = dict(metavar="SECONDS", type=bounded(float, 0, 1e6))
    add("--app", metavar="FILE.py", help="application to host (%s)" % os.path.basename(APPLICATION))
    add("--name", help="name of the daemon and its files (that of what it hosts)")
    add("--pidfile", metavar="FILE", help="(root: /run/NAME.pid, others: ~/.NAME/pid)")
    add("--logfile", metavar="FILE", help="(/var/log/NAME/NAME.log, ~/.NAME/log; run: none)")
    add("--rundir", metavar="DIR", help="working directory (/)")
    add("--chroot", metavar="DIR", help="jail (none; needs root)")
    add("--umask", metavar="OCTAL", type=bounded(lambda text: int(text, 8), 0, 0o777),
        help="of the application (%03o)" % UMASK)
    add("--uid", metavar="USER", help="become this user after binding (stay; needs root)")
    add("--gid", metavar="GROUP", help="and this group (the user's)")
    add("--workers", metavar="N", type=bounded(int, 1, 1024),
        help="processes that serve (as the application says: one per CPU, or 1)")
    add("--respawn", action="store_true", help="start a program again when it ended")
    add("--timeout", help="to stop, drain; then SIGKILL (%g)" % TIMEOUT, **seconds)
    add("--start-timeout", help="to be ready (%g)" % START_TIMEOUT, **seconds)
    add("--log-bytes", metavar="N", type=bounded(int, 0, 1 << 62),
        help="rotate the log at this size; 0: never (%d)" % LOG_BYTES)
    add("--log-keep", metavar="N", type=bounded(int, 0, 1000), help="so many (%d)" % LOG_KEEP)
    add("--quiet", action="store_true", help="say nothing on success, for cron")
    add("--json", action="store_true", help="status for programs")
    add("-h", "--help", action="store_true", help="show this, and the options of the application")
    add("--version", action="store_true", help="show the version")


WORD_OR_COMMENT = (r"""(?s)((?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^\s'"\\#])"""
                   r"""(?:\\.|'[^']*'|"(?:\\.|[^"\\])*"|[^\s'"\\])*)|#[^\n]*""")


def split_words(text: str) -> List[str]:
    """Return the words of an options file: shell quoting, and comments.

    By hand, since for shlex a "#" in mid-word begins a comment, too.

    >>> split_words("--a 'b c' # d\\n--e f#g \\"#h\\"")
    ['--a', 'b c', '--e', 'f#g', '#h']
    """
    import shlex
    return shlex.split(re.sub(WORD_OR_COMMENT, lambda found: found.group(1) or "", text))


def expand(typed: List[str], folder: str) -> Tuple[List[str], List[str]]:
    """Return argv to be noted, and argv with each @FILE replaced by the options in it.

    A file is noted by its name: so a restart reads what it says then.  A pipe can be read once.
    """
    noted, spoken = [], []              # type: List[str], List[str]
    for word in typed:
        named = read = [word]
        if word.startswith("@"):
            path = absolute(word[1:], folder)
            try:
                with open(path, encoding="utf-8") as stream:
                    read = split_words(stream.read())
            except (OSError, ValueError) as error:
                raise Fatal("unable to read %s: %s" % (path, because(error)), 2)
            named = ["@" + path] if os.path.isfile(path) else read
        noted += named
        spoken += read
    return noted, spoken


INTERPRETER = r"(python|pypy|perl|ruby|node|php|lua|sh|bash|dash|zsh|ksh|ash)[0-9.]*"


def script_of(command: Sequence[str]) -> Optional[str]:
    """Return the FILE in `python3 FILE`, `sh FILE` and their like.

    >>> script_of(["/usr/bin/python3.8", "-u", "a.py", "b"]), script_of(["sh", "-c", "a"])
    ('a.py', None)
    """
    if re.fullmatch(INTERPRETER, os.path.basename(command[0])):
        for word in command[1:]:
            if not word.startswith("-"):
                return word
            if not re.fullmatch("-[bBdEIOqsSuvx]+", word):      # others may take a value, or code
                return None
    return None


def name_of(given: Optional[str], hosted: str) -> str:
    """Return the daemon's name: --name, or else what it hosts, without its extension.

    It becomes part of file names that root opens: so no slash, and nothing that a shell minds.
    """
    name = os.path.splitext(os.path.basename(hosted))[0] if given is None else given
    if not re.fullmatch(r"\.*[A-Za-z0-9_-][A-Za-z0-9._-]*", name):     # not . and ..
        raise Fatal("unable to name it %s: letters, digits and ._- only\ntry: --name" % name, 2)
    return name


def wanted_files(action: str, name: str, options: argparse.Namespace, folder: str) -> Files:
    """Return the default files, with what --pidfile and --logfile say instead.

    A user without a home can still name both; then only the application's own files have no place.
    """
    try:
        pidfile, logfile, prefix = default_files(name)
    except Fatal:
        if options.pidfile is None:
            raise
        pidfile = logfile = prefix = ""     # without --logfile a start is refused: see Made
    if options.pidfile is not None:
        pidfile = absolute(options.pidfile, folder)
    if options.logfile is not None:
        logfile = log_path(action, options.logfile, folder)
    elif action == "run":
        logfile = None
    return Files(pidfile, logfile, prefix)


def log_path(action: str, logfile: str, folder: str) -> Optional[str]:
    """Return the log's path; None for the caller's own streams, by any of their names.

    Containers collect what is printed: nginx' image has links to /dev/stdout for logs.
    """
    streams = ("-", "/dev/stdout", "/dev/stderr", "/proc/self/fd/1", "/proc/self/fd/2")
    if logfile not in streams and not (os.path.islink(logfile) and os.readlink(logfile) in streams):
        return absolute(logfile, folder)
    if action == "run":
        return None
    raise Fatal("unable to log to %s: a daemon leaves it\ntry: daemonize.py run" % logfile, 2)


def cut(argv: List[str]) -> Tuple[List[str], Optional[List[str]]]:
    """Return what stands before the first --, and after it (None: there is none).

    What follows is a program's, and never looked at: not for @FILE, not for -h.
    """
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1:] if "--" in argv else None


def parse(argv: List[str], folder: Optional[str] = None) -> Plan:
    """Step 1.  Return what is to be done; the application's own options wait until it is loaded.

    That is in the starter: stop, status and reload load nothing, for broken new code must not
    prevent them.  Words that we do not know are the application's there, and here foreign.
    """
    is_again = folder is not None
    folder = caller_folder() if folder is None else folder
    argv, arguments = cut(argv)
    action = argv[0] if argv else ""
    if action not in COMMANDS:
        refuse("expected one of %s, not %r" % (", ".join(COMMANDS), action))
    parser, (words, spoken) = build_parser(), expand(argv[1:], folder)
    options, foreign = parser.parse_known_args(spoken)
    is_program = arguments is not None and options.app is None
    # Whoever types one more word than these means a new set of options, and the whole set.
    # The words are asked, not what is parsed: a default that was typed is a word, too.
    typed = {word.partition("=")[0] for word in spoken if word.startswith("-")}
    is_bare = action == "restart" and not is_program and not foreign and typed <= NEUTRAL
    if action in STARTING and not is_program and not is_bare:
        foreign = []                        # the application's, which will say if they are not
        if options.app is not None:
            check_application(absolute(options.app, folder))
    elif action not in STARTING:            # those of an @FILE may be for other actions
        foreign = parser.parse_known_args([word for word in argv[1:] if word[:1] != "@"])[1]
    if foreign:
        is_name = len(foreign) == 1 and foreign[0][0] != "-" and not is_program
        refuse("unrecognized arguments: %s" % " ".join(foreign),
               "daemonize.py %s --name %s" % (action, foreign[0]) if is_name else "daemonize.py -h")
    plan = resolve(Plan(action, words, spoken, arguments, folder, is_bare, options))
    is_known = action in ("start", "run") or options.name or options.app or is_program
    # Not of words that are parsed again: restart knows the name, and has the lock file open, which
    # to open and close once more would cost it its turn.
    return plan if is_known or is_again or not options.pidfile else renamed(plan)


def resolve(plan: Plan) -> Plan:
    """Look up every path and name: after step 1 nothing is relative.

    All of them are outside paths, as the caller sees them, with --chroot as well.
    """
    options, folder, arguments = plan.options, plan.cwd, plan.arguments
    # First, since it decides how all that follows is read.
    if options.chroot == "":            # --chroot "$UNSET": to be in no jail must not be a slip
        refuse("--chroot is empty")
    chroot = None if options.chroot is None else absolute(options.chroot, folder)
    plan = plan._replace(hosted=absolute(options.app, folder) if options.app else APPLICATION)
    if arguments is not None and options.app is None:
        if not arguments:
            refuse("no COMMAND after --")
        program, script = arguments[0], script_of(arguments)
        # A path is made absolute once: a virtual environment's python finds itself by argv[0].
        # In a jail it is the jail's, as in chroot(8).
        program = absolute(program, "/" if chroot else folder) if "/" in program else program
        hosted = absolute(script, "/" if chroot else folder) if script else program
        plan = plan._replace(kind="program", hosted=hosted, command=(program, *arguments[1:]))
    rundir = "/" if options.rundir is None else inside(absolute(options.rundir, folder), chroot)
    if rundir is None:
        raise Fatal("unable to use --rundir %s: it is not below --chroot" % options.rundir, 2)
    # Names of users are looked up where they are needed: `stop @FILE` works though --uid is gone.
    name, is_start = name_of(options.name, plan.hosted), plan.action in STARTING
    return plan._replace(
        name=name, files=wanted_files(plan.action, name, options, folder), chroot=chroot,
        identity=look_up_identity(options.uid, options.gid) if is_start else None, rundir=rundir)


def renamed(plan: Plan) -> Plan:
    """Call the daemon by the name that its start noted, where only its pidfile is given.

    "authserver is stopped", said of somebody's sleep, frightens at three in the morning.
    """
    name = os.path.splitext(os.path.basename(plan.files.pidfile))[0]
    # Whatever fails, the command itself will say so.
    with contextlib.suppress(Fatal), Lock(plan, os.O_RDONLY) as lock:
        record = lock.record()
        name = record.name if record else name
    return plan._replace(name=name)


def show_help(action: str, typed: List[str], is_program: bool) -> None:
    """Print the options of the daemon, and of the application that would be started.

    That one is loaded for it, though help should run no code: nobody else knows its options.
    """
    app = build_parser().parse_known_args(typed)[0].app
    path = absolute(app, caller_folder()) if app else APPLICATION
    is_loaded = (action in STARTING or action not in COMMANDS) and (app or not is_program)
    emit(1, build_parser(load(path) if is_loaded else None).format_help())


def report_fatal(error: Fatal, is_status: bool) -> int:
    """Print why, return the exit status; of `status` 4, for there 1 is an answer: dead."""
    emit(2, "%sdaemonize: fatal: %s\n" % (error.trace, error))
    return 4 if is_status and error.status == 1 else error.status


def main(argv: List[str]) -> int:
    """Do one command; return its exit status.

    0 done, 1 failed, 2 usage, 130 interrupted; `status` has the numbers of LSB.
    """
    action, (words, arguments) = argv[0] if argv else "", cut(argv)
    try:
        open_stdio()            # before we open anything that could become fd 1
        # Ignored signals survive exec: without SIGCHLD no child of ours could be waited for.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        set_handlers({signal.SIGTERM}, signal.default_int_handler)        # a start tidies up
        set_handlers({signal.SIGHUP}, signal.default_int_handler, spares_ignored=True)
        os.umask(0o077)         # what we make is private until a line gives it a mode
        os.environ.setdefault("PATH", PATH)
        # Before parse(): who asks for help has the rest of the line not right yet.
        if "--version" in words:
            emit(1, "daemonize.py %s\n" % __version__)
        elif {"-h", "--help"} & set(words):
            show_help(action, words, arguments is not None)
        else:
            plan = parse(argv)          # which refuses what is no action
            return COMMANDS[plan.action](plan)
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report_fatal(as_fatal(error, action), action == "status")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
