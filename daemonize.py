#!/usr/bin/env python3
# MIT licence.  One file, standard library only: copy it and run it.  After Clark Evans' recipe
# (2003), twistd's order of steps, and three articles that found out why the order matters.
"""Run an application, a script or a program as a well-behaved Unix daemon.

    python3 daemonize.py start                      # authserver.py, which lies beside this file
    python3 daemonize.py start --app FILE.py        # your application, or script
    python3 daemonize.py start -- COMMAND ARG ...   # any program
    python3 daemonize.py status | reload | restart | stop       (or `run`: in the foreground)

Or, in a script of your own: `from daemonize import startstop`.

The life of a daemon.  Three processes take part: the COMMAND that you typed, the STARTER that
it forks, and the DAEMON that the starter forks.  (`run` has one: it is the daemon.)

    step                                process  uid     twistd's step (and its place)
    1 parse; make each path absolute    command  caller
    2 the turn: byte 0 of PIDFILE.lock  command  caller  checkPID (1)
    3 app.bind(): ports, keys; open     starter  root    privilegedStartService (9),
      log, pidfile, lock, control                        startLogger (3)
    4 fork, setsid, fork; stdio         starter  root    daemonize (7)
    5 chroot, chdir, umask              daemon   root    setupEnvironment (4-6)
    6 groups, gid, uid; the proof       daemon   ->user  switchUidGid (10)
    7 workers, probe, report ready;     daemon   user    startApplication (11),
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
READY is "it answers".  PREDECESSOR and HEIR are the old and the new daemon of a restart.

What ps shows.  The session was made by the starter, which is gone.  An application leads a
group of its own (`kill -- -PID` reaches its children, too) but no session (so it can never
acquire a terminal):

    $ ps -o pid,ppid,pgid,sid,tty,cmd
      PID  PPID  PGID   SID TT   CMD
     4243     1  4243  4242 ?    python3 daemonize.py start        the daemon
     4244  4243  4243  4242 ?    python3 daemonize.py start        a worker

Layout: 0 messages, 1 who and where, 2 processes, 3 files, 4 the lock, 5 leaving the terminal,
6 giving up root, 7 hosting, 8 the daemon's loop, 9 the control socket, 10 ending, 11 commands,
12 the library call, 13 the command line.  Start at the bottom.
"""
import argparse
import array
import atexit
import contextlib
import errno
import faulthandler
import fcntl
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
from types import CodeType, FrameType, ModuleType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Set, Tuple
try:
    import grp
    import pwd
except ImportError:
    sys.exit("daemonize: fatal: unable to run here: this system has neither fork nor users")

__version__ = "1.0"
__all__ = ["main", "startstop"]

# Hosted unless --app or -- names another.  Resolved on import: before Python 3.9 a script's
# __file__ may be relative, and a restart changes folder before it asks.
APPLICATION = os.path.join(os.path.dirname(os.path.abspath(__file__)), "authserver.py")
TIMEOUT = 10.0                  # seconds that stop and drain wait before SIGKILL
START_TIMEOUT = 30.0            # seconds after which a start that is not ready has failed
UMASK = 0o027                   # for the application's files: nothing for others
LOG_BYTES, LOG_KEEP = 10 << 20, 5       # size at which the log is rotated; rotated logs kept
ALIVE = 0.3                     # seconds a script or program must live to count as started
ANSWER = 5.0                    # seconds for one exchange over a channel; what SIGKILL may take
POLL = 0.02                     # seconds between two looks where there is nothing to wait on
TICK = 1.0                      # seconds between two looks of an idle daemon; a short patience
SETTLED = 1.0                   # seconds: the death of an older worker is bad luck, not bad code
BACKOFF = (0.1, 30.0)           # seconds: first and longest pause before bad code is tried again
MAX_MESSAGE = 1 << 16           # bytes of one message
MAX_SOCKETS = 64                # descriptors handed over at once
PROC = "/proc"                  # where it is missing (macOS, BSD), ps(1) is asked
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"   # under env -i there is none
IS_LINUX = sys.platform.startswith("linux")
# A pidfd is a handle, not a number: it cannot come to mean another process (pidfd_open(2)).
pidfd_open = getattr(os, "pidfd_open", None)                    # type: Any  # Linux, Python 3.9
pidfd_send_signal = getattr(signal, "pidfd_send_signal", None)  # type: Any
Handler = Callable[[int, Optional[FrameType]], Any]


# -- 0. Messages -------------------------------------------------------------

class Fatal(Exception):
    """The command cannot do as asked: words for a person, an exit status, maybe a traceback."""

    def __init__(self, message: str, status: int = 1, trace: str = "") -> None:
        super().__init__(message)
        self.status, self.trace = status, trace


def as_fatal(error: BaseException) -> Fatal:
    """Return any exception as a Fatal; with its traceback, unless it was raised for a person.

    An application marks such an error by an attribute `status`, 1 or 2.
    """
    if isinstance(error, Fatal):
        return error
    if getattr(error, "status", None) in (1, 2):
        return Fatal(str(error), getattr(error, "status"))
    # Three arguments: before Python 3.10 one, the exception, is not enough.
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return Fatal("unable to start: %s" % because(error), trace=trace)


def because(error: BaseException) -> str:
    """Return the reason in an exception without Python's dressing.

    >>> because(OSError(errno.ELOOP, "Too many levels")), because(KeyError("x"))
    ('is a symbolic link', "KeyError: 'x'")
    """
    if isinstance(error, OSError) and error.strerror:       # ELOOP is what O_NOFOLLOW gives
        return "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
    return "%s: %s" % (type(error).__name__, error)


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
    emit(2, "daemonize: warning: %s\n" % text)


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


# -- 1. Who and where --------------------------------------------------------

class Identity(NamedTuple):
    """The user that the daemon becomes; name is "" where the passwd database has no entry."""
    uid: int
    gid: int
    name: str
    home: str
    groups: List[int]           # looked up in step 1: a jail has no group database, either


def look_up_identity(user: Optional[str], group: Optional[str]) -> Optional[Identity]:
    """Return whom --uid and --gid (names or numbers) ask for; None for: stay who you are.

    In step 1, since a jail has no passwd database.  See: getpwnam(3), getgrnam(3).
    """
    if user is None and group is None:
        return None
    if os.geteuid() != 0:
        raise Fatal("unable to switch to %s: only root may" % (user or group))
    gid = None
    try:
        if group is not None:
            # isdecimal(), not isdigit(): that one also accepts "²", which int() does not.
            gid = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        name = "root" if user is None else user
        entry = pwd.getpwuid(int(name)) if name.isdecimal() else pwd.getpwnam(name)
        if (gid or 0) >= (1 << 32) - 1:
            raise OverflowError("no such number")
    except (KeyError, OverflowError, ValueError) as error:      # ValueError: thousands of digits
        # 2^32 - 1 is no id: to setresuid(2) and setresgid(2) it means "leave this one as it is".
        if user and re.fullmatch("[0-9]{1,10}", user) and gid is not None and max(
                int(user), gid) < (1 << 32) - 1:
            return Identity(int(user), gid, "", "/", [gid])
        raise Fatal("unable to switch to %s: %s" % (user or group, str(error).strip("'\"")))
    gid = entry.pw_gid if gid is None else gid
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


def default_files(name: str) -> Files:
    """Return the files that effective uid and name stand for, nothing else: cron must find them."""
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


def absolute(path: str) -> str:
    """Return path resolved against the caller's folder, once and for all (step 1)."""
    try:
        return os.path.abspath(path)
    except FileNotFoundError:
        raise Fatal("unable to resolve %s: the current directory is gone" % path)


def wanted_files(options: argparse.Namespace) -> Files:
    """Return the default files, with what --pidfile and --logfile say instead."""
    try:
        files = default_files(options.name)
    except Fatal:
        if options.pidfile is None:
            raise
        files = Files("", "", "")       # a start without --logfile is refused later: prepare()
    if options.action == "run":
        files = files._replace(logfile=None)
    if options.pidfile is not None:
        files = files._replace(pidfile=absolute(options.pidfile))
    if options.logfile is not None:
        files = files._replace(logfile=absolute(options.logfile))
    return files


# -- 2. Processes ------------------------------------------------------------

class Process(NamedTuple):
    """What the kernel says of a living process: nothing that a file could forge."""
    pid: int
    ppid: int
    pgid: int
    sid: int                    # -1 where only ps(1) can be asked
    uid: int                    # real


def processes() -> List[Process]:
    """Return all living processes; zombies are dead, unless only their main thread is.

    The uid is not the owner of /proc/PID: who changed its uid is not dumpable, and its folder
    belongs to root.  See: proc(5), /proc/pid; prctl(2), PR_SET_DUMPABLE.
    """
    if not os.path.exists(PROC + "/self/status"):
        return processes_by_ps()
    found = []
    for name in os.listdir(PROC):
        if name.isdigit():
            with contextlib.suppress(OSError, KeyError):        # it ended while we were looking
                with open("%s/%s/status" % (PROC, name), "rb") as stream:
                    facts = dict(re.findall(rb"^(\w+):\s+(\S+)", stream.read(), re.MULTILINE))
                keys = (b"Pid", b"PPid", b"NSpgid", b"NSsid", b"Uid")
                if facts[b"State"] not in (b"Z", b"X") or facts[b"Threads"] != b"1":
                    found.append(Process(*(int(facts[key]) for key in keys)))
    return found


def processes_by_ps() -> List[Process]:
    """Return the same where there is no /proc.  See: ps(1), the part that POSIX has.

    [] in a jail, which has neither: there the daemon signals its group, and only that; who ends it
    from outside (stop) sees the rest through.
    """
    command = ["ps", "-A"]
    for key in ("pid", "ppid", "pgid", "ruid", "stat"):
        command += ["-o", key + "="]
    try:
        import subprocess       # here, for such systems only
        with subprocess.Popen(command, stdout=subprocess.PIPE) as ps:
            lines = ps.communicate()[0].decode().splitlines()
    except (ImportError, OSError):
        return []
    # ps lists itself, too: a child of ours that is gone by now.
    rows = [line.split() for line in lines if line.split()[0] != str(ps.pid)]
    return [Process(int(r[0]), int(r[1]), int(r[2]), -1, int(r[3])) for r in rows
            if r[4][0] not in "ZX"]


def find_process(pid: Optional[int]) -> Optional[Process]:
    return next((p for p in processes() if p.pid == pid), None)


def birth_of(pid: Optional[int]) -> str:
    """Return when a living process began; no two share pid and birth.  See: proc(5), field 22.

    "" when it is dead, and where there is no /proc.
    """
    try:
        # Start times count from boot: without the boot's id, two boots could show the same one.
        with open(PROC + "/sys/kernel/random/boot_id") as boot, \
                open("%s/%s/stat" % (PROC, pid), "rb") as stream:
            # Field 2 is the name, which may hold spaces and brackets: count from the last one on.
            # There 0 is the state, 17 num_threads, 19 starttime (fields 3, 20 and 22).
            facts = stream.read().rpartition(b")")[2].split()
            is_alive = facts[0] not in (b"Z", b"X") or facts[17] != b"1"
            return boot.read().strip() + ":" + facts[19].decode() if is_alive else ""
    except OSError:
        return ""


def family(groups: Tuple[int, ...]) -> List[Process]:
    """Return what this process started and still lives: descendants, and the groups it made."""
    everyone, mine, size = processes(), {os.getpid()}, 0
    # Again until nothing is new: a child may stand in the list before its parent.
    while size != len(mine):
        size = len(mine)
        mine |= {p.pid for p in everyone if p.ppid in mine}
    # An orphan's parent is init: we know it by its group.  In our session only: once a group is
    # empty, its number may go to a stranger's.
    sid = os.getsid(0)          # its leader is our starter, if not ourselves: not ours to end
    return [p for p in everyone if p.pid not in (os.getpid(), sid)
            and (p.pid in mine or p.pgid in groups and p.sid in (sid, -1))]


def kill_each(members: List[Process], signum: int) -> None:
    for process in members:
        with contextlib.suppress(ProcessLookupError, PermissionError):      # one that became root
            os.kill(process.pid, signum)


def end_family(groups: Tuple[int, ...], timeout: float) -> None:
    """End what this process started; it was told already, and has timeout seconds to obey."""
    end_all(lambda: family(groups), lambda signum: kill_each(family(groups), signum), timeout)


def end_all(members: Callable[[], List[Process]], send: Callable[[int], None],
            timeout: float) -> bool:
    """Wait until there are no members; SIGKILL after timeout seconds.  True if that was needed."""
    deadline, killed = time.monotonic() + timeout, False
    while True:
        left = members()
        if not left:
            return killed
        if time.monotonic() > deadline + ANSWER:
            pids = ", ".join(str(process.pid) for process in left)
            raise Fatal("unable to stop pids %s: SIGKILL had no effect" % pids)
        if time.monotonic() > deadline:
            # Each time to who is there now: a member may have forked since the last look.
            send(signal.SIGKILL)
            killed = True
        # Polled: most of them are not our children, and wait(2) is for children only.
        time.sleep(POLL)


# -- 3. Files ----------------------------------------------------------------
# Root opens files where others may write: that is how daemons become a way to root
# (CVE-2016-1247: nginx's log folder belonged to its user).  The rules: no symlink is followed
# (O_NOFOLLOW); nothing is opened but a regular file with one name (a FIFO would block, a hard
# link would be someone's file); only what we created changes its owner, and through the fd.

def open_regular(path: str, flags: int, mode: int, is_log: bool = False) -> int:
    """Open a regular file that has one name; create it with exactly that mode, under any umask.

    It must belong to root or us.  A log need not, and may be /dev/null.  Raises Fatal.
    """
    # O_NONBLOCK: open(2) of a FIFO would wait for its other end.  O_NOCTTY: a terminal, opened
    # for a log, must not become ours.
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        try:
            # Two tries, to know who made it: only our own file gets its mode, past the umask.
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, mode)
            os.fchmod(fd, mode)
        except FileExistsError:
            fd = os.open(path, flags)
    except OSError as error:
        raise Fatal("unable to open %s: %s" % (path, because(error)))
    # Asked of the fd: the path may mean another file by now.
    facts, problem = os.fstat(fd), ""
    if not stat.S_ISREG(facts.st_mode):
        problem = "" if is_log and path == os.devnull else "not a regular file"
    elif facts.st_nlink > 1:
        problem = "it has another name (a hard link)"
    elif not is_log and facts.st_uid not in (0, os.geteuid()):
        problem = "it belongs to uid %d" % facts.st_uid
    elif mode == 0o600 and facts.st_mode & 0o077:       # a pidfile, renamed to be the lock file?
        problem = "others can read it"
    if problem:
        os.close(fd)
        raise Fatal("unable to open %s: %s" % (path, problem))
    return fd


def is_trusted(folder: str) -> bool:
    """Tell whether only root and the caller can change what the path leads to.

    Each folder on the way, through links too, must be theirs, and closed to others or sticky (as
    /tmp is).  Raises OSError where there is no such folder.
    """
    os.stat(folder)                             # a loop of links ends here
    # names is a stack, the next one last: what a link says is put on top of what remains.
    path, names = "/", folder.split("/")[::-1]
    while True:
        facts = os.lstat(path)
        is_link = stat.S_ISLNK(facts.st_mode)
        is_open = facts.st_mode & 0o022 and not facts.st_mode & stat.S_ISVTX and not is_link
        if is_open or facts.st_uid not in (0, os.geteuid()):
            return False
        if is_link:
            target = os.readlink(path)
            names += target.split("/")[::-1]
            path = "/" if target.startswith("/") else os.path.dirname(path)
        if not names:
            return True
        # normpath() is wrong on a path with links ("link/.." is elsewhere): here are none left.
        path = os.path.normpath(os.path.join(path, names.pop()))


def check_folder(folder: str) -> None:
    """Refuse, as root, a pidfile's folder that others could swap: it may be theirs, not its way."""
    if not os.path.isdir(folder):
        raise Fatal("unable to use %s: no such directory" % folder)
    if os.geteuid() != 0 or is_trusted(folder):
        return
    parent = os.path.dirname(folder)        # in a sticky one its owner could move the folder away
    if os.path.islink(folder) or not is_trusted(parent) or os.stat(parent).st_mode & 0o022:
        raise Fatal("unable to trust %s: others than root can change where it leads" % folder)


@contextlib.contextmanager
def acting_as(identity: Optional[Identity]) -> Iterator[None]:
    """Lend root the effective ids of the daemon's user, by which the kernel judges."""
    if identity is None:
        yield
        return
    groups, gid = os.getgroups(), os.getegid()
    # Groups, gid, uid: the first two need root's effective uid.  And back in reverse.
    os.setgroups(identity.groups)
    os.setegid(identity.gid)
    os.seteuid(identity.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(gid)
        os.setgroups(groups)


@contextlib.contextmanager
def careful(path: str, identity: Optional[Identity]) -> Iterator[bool]:
    """Have root's rights only where nobody else can change the path's folder; yields whether so."""
    folder = os.path.dirname(path)
    is_safe = os.path.isdir(folder) and is_trusted(folder) and not os.stat(folder).st_mode & 0o022
    with acting_as(None if is_safe else identity):
        yield is_safe


def open_log(path: str, identity: Optional[Identity]) -> int:
    """Return the log's fd, for appending; a new log is the daemon user's from its first byte.

    Runs as: root; in a folder that others may change, with the user's rights.
    See: open(2) O_APPEND; twistd: startLogger.
    """
    is_new, owner = not os.path.lexists(path), identity.uid if identity else os.geteuid()
    with careful(path, identity) as is_safe:
        fd = open_regular(path, os.O_WRONLY | os.O_APPEND, 0o640, is_log=True)
    if not is_safe and os.fstat(fd).st_uid not in (0, owner, os.geteuid()):
        raise Fatal("unable to open %s: it belongs to uid %d" % (path, os.fstat(fd).st_uid))
    if is_new and is_safe and identity is not None:
        os.fchown(fd, identity.uid, identity.gid)
    return fd


def rotation_obstacle(options: argparse.Namespace) -> str:
    """Return why the daemon will not be able to rename and reopen its log, "" if it will."""
    path = options.files.logfile
    if path is None or path == os.devnull:
        return ""
    if inside(path, options.chroot) is None:
        return "it is outside the chroot"
    # access(2) judges by the REAL uid, which is root's even here; faccessat(2) can do better.
    folder, by_effective_ids = os.path.dirname(path), os.access in os.supports_effective_ids
    with acting_as(options.identity):
        if os.access(folder, os.W_OK | os.X_OK, effective_ids=by_effective_ids):
            return ""
        return "uid %d may not write in %s" % (os.geteuid(), folder)


def inside(path: Optional[str], chroot: Optional[str]) -> Optional[str]:
    """Return what the path is called inside the jail, None if it is not there.

    >>> inside("/jail/log/a", "/jail"), inside("/jail2/a", "/jail"), inside("/a", None)
    ('/log/a', None, '/a')
    """
    if path is None or chroot is None or chroot == "/" or "/" not in path:
        return path
    return path[len(chroot):] or "/" if (path + "/").startswith(chroot + "/") else None


@contextlib.contextmanager
def working_in(folder: str) -> Iterator[None]:
    """Enter folder for a moment: unix(7) addresses hold 108 bytes, on macOS and BSD 104."""
    here = None
    with contextlib.suppress(PermissionError):      # su nobody, in /root: nowhere to go back to
        here = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.chdir(folder)
        yield
    finally:
        if here is not None:
            os.fchdir(here)
            os.close(here)


def bind_control(path: str) -> socket.socket:
    """Return a unix socket bound at path, 0600, not listening yet.  See: unix(7)."""
    control, name = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), os.path.basename(path)
    with working_in(os.path.dirname(path)):
        umask = os.umask(0o177)         # and not chmod(2): the name may be another's by then
        try:
            # A dead daemon's socket is still there, and bind(2) takes no name that exists.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            control.bind(name)
        except OSError as error:
            raise Fatal("unable to bind %s: %s" % (path, because(error)))
        finally:
            os.umask(umask)
    return control


class Opened(NamedTuple):
    """What step 3 opened as root, for whoever the daemon is later."""
    stdin: int
    stdout: Optional[int]       # None: the output stays where it is (run)
    stderr: Optional[int]
    pidfile: int
    lock: int                   # read-only
    control: Optional[socket.socket]        # applications only


def open_files(options: argparse.Namespace) -> Opened:
    """Step 3.  Open what the daemon's user could not open, or could be tricked with, later.

    Runs as: root.  See: open(2); twistd: startLogger, openPIDFile.
    """
    files, control = options.files, None
    if options.kind == "app":
        # Beside the old one's, which answers until the new one is ready; attend() renames it.
        control = bind_control(files.control + (".new" if options.predecessor else ""))
    output = open_log(files.logfile, options.identity) if files.logfile else None
    pidfile = open_regular(files.pidfile, os.O_RDWR, 0o644)
    if os.fstat(pidfile).st_uid == os.geteuid():
        os.fchmod(pidfile, 0o644)       # an older one, too
    return Opened(
        stdin=os.open(options.stdin, os.O_RDONLY | os.O_CLOEXEC),
        stdout=output,
        stderr=open_log(options.stderr, options.identity) if options.stderr else output,
        pidfile=pidfile,
        lock=open_regular(files.lock, os.O_RDONLY, 0o600),
        control=control)


def write_pidfile(fd: int, pid: int) -> None:
    """Name the daemon in the pidfile, through the fd that root opened."""
    data = b"%d\n" % pid
    try:
        # Written first, cut second: whoever reads in between finds a pid in the first line.
        os.pwrite(fd, data, 0)
        os.ftruncate(fd, len(data))
    except OSError as error:
        raise Fatal("unable to write the pidfile: %s" % because(error))


def read_pidfile(path: str) -> str:
    """Return what the pidfile says, "" if it is empty or absent.  It informs, it proves nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as stream:
            is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
            # A pid is short; that the file is, nobody promises.
            return stream.read(32).decode("latin-1").strip() if is_regular else "(no regular file)"
    except FileNotFoundError:
        return ""
    except OSError as error:
        return "(%s)" % because(error)


# -- 4. The lock -------------------------------------------------------------
# Who is the daemon?  Not whom a file names: a pid in a file outlives its process, the kernel
# gives it to a stranger, and whoever owns the file writes it.  (`start-stop-daemon --stop` on
# root's pidfile signals every process of the machine, if it holds "-1".)  The kernel knows.  A
# POSIX record lock (fcntl(2), "Advisory record locking") dies with its process, is not inherited
# over fork(2), and F_GETLK returns its holder's pid.  So there are two bytes, in PIDFILE.lock:
#
#   byte 0  the turn: a command holds a WRITE lock on it while it changes something
#   byte 1  the instance lock: the daemon holds a READ lock, through an fd opened read-only by root
#
# The file is 0600: no other user can open it and keep root's commands waiting.  The daemon cannot
# write it: so it may also hold, for `restart`, what the last start was asked for.  One trap: a
# process loses ALL its locks on a file when it closes ANY fd of it; so it opens it once.

TURN, INSTANCE = 0, 1
FLOCK = struct.Struct("hhqqi" if IS_LINUX else "qqihhi")    # struct flock: Linux; macOS and BSD


def lock_holder(fd: int, byte: int) -> Optional[int]:
    """Return the pid of another process that holds a lock on the byte.

    By hand: fcntl.lockf() takes and releases such locks, but cannot ask for F_GETLK.
    """
    # Asked for as a writer would: then readers are in the way, and are named, too.
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
    fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, INSTANCE)
    holder = lock_holder(fd, INSTANCE)
    if holder not in (None, -1, predecessor):
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, INSTANCE)
        raise Fatal("unable to start: already running with pid %s" % holder)


class Lock:
    """PIDFILE.lock: who is the daemon, and what its last start was asked for."""

    def __init__(self, files: Files, flags: int) -> None:
        check_folder(files.folder)
        self.path = files.lock
        self.fd = open_regular(self.path, flags, 0o600)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it, which gives up every lock that this process has on it."""
        # A daemon comes here twice: in launch(), and where the `with` of its command ends.
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def holder(self) -> Optional[int]:
        """Return the pid of the running daemon, None if there is none.

        A script or program may close all its fds (daemons do), and the lock with them; then pid
        and time of birth, which its start noted, prove it as well.
        """
        pid, record = lock_holder(self.fd, INSTANCE), self.record()
        if pid not in (None, -1):       # -1: a lock that names nobody (fcntl(2), OFD)
            return pid
        is_noted = record.get("birth") and is_trusted(os.path.dirname(self.path))
        return record["pid"] if is_noted and birth_of(record["pid"]) == record["birth"] else None

    def record(self) -> Dict[str, Any]:
        """Return what was noted of the last start, {} if none has succeeded yet."""
        with contextlib.suppress(ValueError):           # empty, or torn by a full disk
            # pread(2), not open().read(): to close a second fd would drop our locks (the trap).
            record = json.loads(os.pread(self.fd, os.fstat(self.fd).st_size, 0).decode())
            return record if isinstance(record, dict) else {}
        return {}

    def note(self, options: argparse.Namespace, pid: int = 0) -> None:
        """Note what a start was asked for, and whom it started."""
        keys = ("argv", "arguments", "cwd", "kind", "detached")
        record = dict({key: getattr(options, key) for key in keys}, pid=pid, birth=birth_of(pid))
        # Not a new file and rename(2), which would be atomic: the locks are on this inode.
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, json.dumps(record).encode(), 0)


class Turn(Lock):
    """The right to change the state of one daemon: `with Turn(options) as turn`.

    Runs as: caller.  See: fcntl(2); twistd: checkPID (without a lock: two in a race both start).
    """

    def __init__(self, options: argparse.Namespace) -> None:
        """Wait for it, and say for whom; who has it may need a whole start and a whole stop."""
        super().__init__(options.files, os.O_RDWR)
        # After a moment, not at once: most waits are shorter than what there is to read.
        told_at = time.monotonic() + TICK
        deadline = time.monotonic() + options.start_timeout + options.timeout
        while not self.take():
            holder = lock_holder(self.fd, TURN)
            if time.monotonic() > deadline:
                raise Fatal("unable to lock %s: pid %s is still busy with it" % (self.path, holder))
            if time.monotonic() > told_at:
                told_at = deadline + TICK       # once
                warn("waiting for pid %s, which is busy with %s" % (holder, self.path))
            time.sleep(POLL)

    def take(self) -> bool:
        """Try to take the turn."""
        if os.fstat(self.fd).st_nlink == 0:     # a first start failed, and took its files with it
            self.close()
            self.fd = open_regular(self.path, os.O_RDWR, 0o600)
        try:
            fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, TURN)
            # This may be the lock of a file that a failed start has just removed: of no use.
            return os.fstat(self.fd).st_nlink > 0
        except (BlockingIOError, PermissionError):      # EAGAIN, EACCES: POSIX allows either
            holder = lock_holder(self.fd, TURN)
        process = find_process(holder)
        if holder == -1 or process and process.uid not in (0, os.geteuid()):
            # Only a daemon that was taken over locks this byte, through its fd: do not wait.
            # -1 is an open file description lock (fcntl(2)), which names nobody.
            warn("pid %d, no command, holds the turn of %s: ignored" % (holder or 0, self.path))
            return True
        return False


# -- 5. Leaving the terminal -------------------------------------------------
# Why two forks?  setsid(2) makes a session that has no terminal, but not for a group leader,
# which a command typed into a shell is; hence the first.  The leader of a session could acquire
# a terminal by opening one (credentials(7)); hence the second.  The third article calls
# setsid() once more in its main(), for a group of its own, and gives back what the second fork
# won.  setpgid(2) gives the group without the session.

# Who says what.  Report: daemon "ready" (or "fatal"; its parent: "died"), command "own", daemon
# "owned" (lock and pidfile are its), command "begin" (the old one is told to leave), daemon
# "began".  Control: "status", "reload" -> "reloaded", "sockets" (fds come along), "leave" ->
# "leaving".  Workers: "able" of themselves; "drain" -> "draining"; "reopen" -> "reopened".

ENDED, LATE = "", "\0late"      # what receive() returns for want of a message; nobody can send it


def peer_of(end: socket.socket) -> Tuple[Optional[int], Optional[int]]:
    """Return (pid, uid) of a unix socket's other side; (None, None) where no system call tells."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None, None
    pid, uid, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def readable(ends: List[socket.socket], deadline: float) -> List[socket.socket]:
    """Return which can be read, [] at the deadline.  By poll(2): select(2) stops at fd 1023."""
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    # poll(2) counts milliseconds, all else here seconds.
    ready = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
    return [end for end in ends if end.fileno() in ready]


class Channel:
    """JSON lines over a socket between command, daemon and workers; the other end may lie."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.buffer = end, b""

    def send(self, event: str, **facts: Any) -> None:
        self.end.sendall(json.dumps(dict(facts, event=event)).encode() + b"\n")

    def receive(self, deadline: float) -> Dict[str, Any]:
        """Return the next message; its event is ENDED at the end or for nonsense, or LATE."""
        # A stream knows no messages: a line may come in pieces, or two lines at once.
        while b"\n" not in self.buffer:
            if not readable([self.end], deadline):
                return {"event": LATE}
            try:
                data = self.end.recv(MAX_MESSAGE)
            except OSError:             # ECONNRESET: it died with something of ours unread
                data = b""
            self.buffer += data
            if not data or len(self.buffer) > MAX_MESSAGE:
                return {"event": ENDED}
        line, _, self.buffer = self.buffer.partition(b"\n")
        with contextlib.suppress(ValueError, RecursionError):
            message = json.loads(line.decode())
            if isinstance(message, dict) and isinstance(message.get("event"), str):
                return message if message["event"] != LATE else {"event": ENDED}
        return {"event": ENDED}

    def fail(self, error: BaseException) -> None:
        """Say why there will be no daemon, unless nobody listens any more."""
        fatal = as_fatal(error)
        # The end of a trace says most.  An eighth: JSON may need six bytes for a character.
        trace = fatal.trace[-MAX_MESSAGE // 8:]
        with contextlib.suppress(OSError):
            self.send("fatal", text=str(fatal), status=fatal.status, trace=trace)


def failure(message: Dict[str, Any], otherwise: str) -> Fatal:
    """Return as an exception what was said instead of what was due."""
    if message["event"] == "fatal":
        status = 2 if message.get("status") == 2 else 1
        return Fatal(str(message.get("text")), status, str(message.get("trace", "")))
    if message["event"] == "died" and isinstance(message.get("status"), int):
        otherwise = "it %s before it was ready" % describe(message["status"])
    return Fatal("unable to start: " + otherwise)


def open_stdio() -> None:
    """Open what the caller closed of fds 0 to 2: no file of ours may become its stdout."""
    fd = os.open(os.devnull, os.O_RDWR)
    while fd <= 2:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def close_inherited() -> None:
    """Close what the caller left open: what Python opens is close-on-exec (PEP 446), that is not.

    From a list of what is open, not by a loop to RLIMIT_NOFILE, which may be 2^30.
    """
    fds = map(int, os.listdir("/dev/fd")) if os.path.isdir("/dev/fd") else range(1024)
    for fd in fds:
        with contextlib.suppress(OSError):          # the fd of this very listing
            # Only what the caller left is inheritable: files that we have opened are safe.
            if fd > 2 and os.get_inheritable(fd):
                os.close(fd)


def reset_signals() -> None:
    """Undo what the caller ignored or blocked: both survive fork and exec.  See: signal(7)."""
    ours = (signal.SIGPIPE, signal.SIGXFSZ)         # Python itself ignores these
    for signum in set(range(1, signal.NSIG)) - set(ours):
        with contextlib.suppress(OSError, ValueError):      # KILL, STOP, holes in the numbering
            if signal.getsignal(signum) == signal.SIG_IGN:
                signal.signal(signum, signal.SIG_DFL)
    # With SIGTERM blocked, each `stop` would end in SIGKILL after its timeout.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def detach(report: Channel, opened: Opened, abandon: Callable[[], None]) -> None:
    """Step 4.  Fork, setsid, fork; only the daemon returns, with its stdio moved.

    Runs as: root.  See: setsid(2), daemon(7); twistd: daemonize.
    """
    # Allowed, since a child of fork(2) does not lead its group.
    os.setsid()
    reset_signals()
    daemon = os.fork()
    if daemon:
        watch_birth(daemon, report, abandon)
    # on_end() was for bind() (be_starter); until step 7 installs its own, the default will do.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    redirect(opened)
    # By number, not sys.stderr: it writes into whatever fd 2 means at the time of the crash.
    faulthandler.enable(2)


def watch_birth(daemon: int, report: Channel, abandon: Callable[[], None]) -> NoReturn:
    """Live on as the daemon's parent, to tell how it died.  The command ends us (end_starter)."""
    # An application or program has a group of its own pid; a script or library is in ours.
    groups = (os.getpgrp(), daemon)
    signal.signal(signal.SIGTERM, lambda signum, frame: end_family(groups, 0))
    status = os.waitpid(daemon, 0)[1]
    end_family(groups, 0)
    abandon()
    with contextlib.suppress(OSError):              # the command is gone, too
        report.send("died", status=status)
    # Not sys.exit(): atexit and unwritten buffers are the command's, of which we are a copy.
    os._exit(0)


def redirect(opened: Opened) -> None:
    """Point fds 0 to 2 at what step 3 opened: children, C code and crashes log there, too."""
    moved = set()                       # stdout and stderr may be one fd
    for number, fd in enumerate((opened.stdin, opened.stdout, opened.stderr)):
        if fd is not None:
            os.dup2(fd, number)
            moved.add(fd)
    for fd in moved:
        os.close(fd)                    # or a log that was rotated away would keep its space


# -- 6. The jail, and giving up root -----------------------------------------

def set_environment(options: argparse.Namespace) -> None:
    """Step 5.  Enter the jail and the working directory; HOME, USER, LOGNAME follow the uid.

    No fd of a folder outside may be open by now: fchdir(2) on it would lead out of the jail.
    Runs as: root.  See: chroot(2), umask(2); twistd: setupEnvironment.
    """
    try:
        if options.chroot is not None:
            os.chroot(options.chroot)
            # chroot(2) leaves the working directory outside, and ".." would lead on from there.
            os.chdir("/")
        os.chdir(options.rundir)
    except OSError as error:
        raise Fatal("unable to enter %s: %s" % (error.filename, because(error)))
    os.umask(options.umask)
    user = options.identity
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
    uid, gid = identity.uid, identity.gid
    try:
        os.setgroups(identity.groups)       # root's own would stay
        set_ids(uid, gid)
    except OSError as error:
        raise Fatal("unable to switch to uid %d, gid %d: %s" % (uid, gid, because(error)))
    if uid != 0:
        with contextlib.suppress(PermissionError):
            os.setuid(0)
            raise Fatal("unable to give up root: setuid(0) still succeeds")


# -- 7. Hosting --------------------------------------------------------------

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


def has_bind(tree: Any) -> bool:
    """Tell an application from a script without running it: does its top level define `bind`?"""
    names: List[Any] = []
    for node in tree.body:
        # What has `names` imports, what has `targets` assigns, what has `name` is def or class.
        names += [alias.asname or alias.name for alias in getattr(node, "names", ())
                  if hasattr(alias, "name")]
        names += [getattr(target, "id", None) for target in getattr(node, "targets", ())]
        names.append(getattr(node, "name", None))
    return "bind" in names


def script_code(path: str) -> Optional[CodeType]:
    """Return the code of a script, read once: what was looked at runs; None for an application."""
    import ast                  # here: only --app asks
    try:
        with open(path, "rb") as stream:
            tree = ast.parse(stream.read(), path)
        return None if has_bind(tree) else compile(tree, path, "exec")
    except (OSError, SyntaxError, ValueError) as error:
        shown = "".join(traceback.format_exception_only(type(error), error))
        raise Fatal("unable to load %s: %s" % (path, because(error)),
                    trace="" if isinstance(error, OSError) else shown)


def adopt(fd: int) -> Optional[socket.socket]:
    """Return the listening stream socket that was passed to us as fd; close anything else."""
    # What systemd passes is inheritable: each child of ours would hold the port, too.
    os.set_inheritable(fd, False)
    if stat.S_ISSOCK(os.fstat(fd).st_mode):
        passed = socket.socket(fileno=fd)
        kind = passed.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        is_listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if is_listening and kind == socket.SOCK_STREAM:
            if sys.version_info < (3, 7) and IS_LINUX:          # 3.6 guesses AF_INET
                domain = passed.getsockopt(socket.SOL_SOCKET, getattr(socket, "SO_DOMAIN"))
                passed = socket.socket(domain, kind, 0, passed.detach())
            return passed
        passed.detach()
    os.close(fd)
    return None


def inherited_sockets() -> List[socket.socket]:
    """Return the sockets that systemd passed to this very process.  See: sd_listen_fds(3)."""
    # Popped: a child that knows the protocol would take fds 3, 4, ... of ours for its own.
    is_ours = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    number = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    fds = range(3, 3 + int(number)) if is_ours and number.isdigit() else range(0)
    try:
        return [passed for passed in map(adopt, fds) if passed is not None]
    except OSError as error:
        raise Fatal("unable to take over the %s fds of LISTEN_FDS: %s" % (number, because(error)))


def bind_application(options: argparse.Namespace) -> Any:
    """Step 3, the application's part.  Parse its options, let it bind; returns its server.

    Runs as: root.  See: twistd: privilegedStartService.
    """
    umask = os.umask(options.caller_umask)          # for __pycache__; what bind() makes is private
    try:
        module = load(options.app_path)
    finally:
        os.umask(umask)
    parsed = build_parser(module).parse_args([options.action] + expand(options.argv))
    # This parse has the application's options; step 1's paths, absolute by now, go on top.
    vars(parsed).update(vars(options))
    parsed.uid, parsed.gid = options.identity[:2] if options.identity else (None, None)
    return module.bind(parsed)


def host_script(options: argparse.Namespace, opened: Opened) -> None:
    """Run a Python file as __main__; its end is the daemon's end."""
    path = inside(options.files.logfile, options.chroot)
    install_handlers(options, lambda signum, frame: reopen_log(path))
    sys.argv = [options.app_path] + (options.arguments or [])
    sys.path.insert(0, os.path.dirname(options.app_path))
    ours, script, daemon = sys.modules["__main__"], ModuleType("__main__"), os.getpid()
    script.__file__ = options.app_path
    sys.modules["__main__"] = script
    try:
        exec(options.code, script.__dict__)
    finally:
        sys.modules["__main__"] = ours
        if os.getpid() == daemon:       # and not a child that the script forked, at its own end
            if signal.getsignal(signal.SIGTERM) is not on_wake:     # our handler has told nobody
                guard()
                kill_each(family(options.groups()), signal.SIGTERM)
            end_family(options.groups(), options.timeout)
            os.ftruncate(opened.pidfile, 0)


def host_program(options: argparse.Namespace, opened: Opened) -> NoReturn:
    """Become the program.  The lock's fd goes with it: record locks survive execve(2)."""
    os.set_inheritable(opened.lock, True)
    # execve(2) resets handlers, but what is ignored stays so; `yes | head` relies on SIGPIPE.
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(signum, signal.SIG_DFL)
    # not execvp(3)'s way: Python imports modules for that, which the daemon's user may not read
    path = shutil.which(inside(options.program, options.chroot) or "")
    if path is None:
        raise Fatal("unable to execute %s: no such program" % options.arguments[0])
    try:
        os.execv(path, options.arguments)
    except OSError as error:
        raise Fatal("unable to execute %s: %s" % (path, because(error)))


def reopen_log(path: Optional[str]) -> bool:
    """Point stdout and stderr at what the log's name means now; False if that is impossible."""
    if path is None:
        return False
    try:
        fd = open_regular(path, os.O_WRONLY | os.O_APPEND, 0o640, is_log=True)
    except Fatal as error:
        log("%s: the old log is kept" % error)
        return False
    # dup2(2) swaps the file behind a number in one step: no thread ever meets a closed fd 1.
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    return True


# -- 8. The daemon's loop ----------------------------------------------------

HANDLED = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD}


def on_wake(signum: int, frame: Optional[FrameType]) -> None:
    """Do nothing: a number that matters went to the wake-up fd, and the loop reads it there."""


def guard() -> None:
    """Take no notice of further endings: we are in the group that we signal (the third article).

    Not by SIG_IGN, which children would inherit, and Python trips over before 3.8.9 (bpo-43406).
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, on_wake)


def on_end(signum: int, frame: Optional[FrameType]) -> None:
    """Leave by the normal exit, so that every `finally` of the application runs; once."""
    guard()
    raise SystemExit(0)


def install_handlers(options: argparse.Namespace, on_event: Handler) -> None:
    """Handle TERM and INT as the third article does, HUP and USR1 by on_event.  See: signal(7)."""
    def on_sigterm(signum: int, frame: Optional[FrameType]) -> None:
        guard()
        tell_family(options)
        raise SystemExit(0)
    for signum in (signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, on_event)
    for signum in endings(options):
        signal.signal(signum, on_sigterm)


def endings(options: argparse.Namespace) -> List[signal.Signals]:
    # Where there is a terminal HUP says that it is gone; where none is, custom made it "reload".
    return [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * options.has_terminal


def tell_family(options: argparse.Namespace) -> None:
    """Send SIGTERM to what this process has started.

    In one call where we made the group.  A group that we only live in (`run` under cron's shell,
    or beside `| tee` in a terminal) is not ours to signal: then to each descendant, as to those
    that left the group.
    """
    groups = options.groups()
    if groups:
        # getpgrp(), not 0: killpg(0) is undefined in POSIX (killpg(3p)), though it works on Linux.
        os.killpg(os.getpgrp(), signal.SIGTERM)
    kill_each([p for p in family(()) if p.pgid not in groups], signal.SIGTERM)


def call(server: Any, name: str, otherwise: Any = None) -> Any:
    """Call what an application need not have."""
    return getattr(server, name, lambda: otherwise)()


def drain_or_end(server: Any) -> None:
    """Ask an application to finish what it has; one that cannot is ended as by SIGTERM."""
    if hasattr(server, "drain"):
        server.drain()
    else:
        end_main_thread()


def end_main_thread() -> NoReturn:
    """Have the main thread, which is not the caller's, act on SIGTERM; until it does.

    Once is not enough: a signal that comes between Python's look at its flags and a system call
    that blocks is noticed only when the call returns.
    """
    while True:
        # Not kill(2): the kernel may give that to any thread, and a main thread that sits in a
        # system call would not wake up to run the handler.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(POLL)


def exit_status(error: SystemExit) -> int:
    return error.code if isinstance(error.code, int) else int(error.code is not None)


def notify(options: argparse.Namespace, text: str) -> None:
    """Tell systemd how we are.  See: sd_notify(3)."""
    if options.notifier is not None:
        with contextlib.suppress(OSError):      # a supervisor that is gone has no say in our life
            options.notifier.send(text.encode())


def take_place(options: argparse.Namespace, opened: Opened) -> None:
    """Become the daemon of this pidfile."""
    take_instance(opened.lock, options.predecessor)
    write_pidfile(opened.pidfile, os.getpid())


def become_owner(report: Channel, take: Callable[[], None]) -> None:
    """Take lock and pidfile, then begin, at the command's word; without it there is no daemon."""
    # Two words, since between them the old daemon leaves: each side knows how far the other got.
    for word, action, reply in (("own", take, "owned"), ("begin", lambda: None, "began")):
        if report.receive(time.monotonic() + START_TIMEOUT)["event"] != word:
            raise Fatal("unable to start: the command that asked for it is gone")
        action()
        report.send(reply)


class Child:
    """A process that the daemon forked, and the channel to it."""

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid, self.channel = pid, channel
        self.born = time.monotonic()
        self.deadline = float("inf")        # when to kill it, once it was told to drain
        self.result: Optional[int] = None   # of wait(2): from then on the pid may be a stranger's

    def tell(self, event: str) -> None:
        with contextlib.suppress(OSError):  # it died: reap() will see
            self.channel.send(event)

    def has_said(self, event: str, deadline: float) -> bool:
        while True:                 # "able" is of one that replaced a dead one: nobody waits for it
            said = self.channel.receive(deadline)["event"]
            if said in (event, ENDED, LATE):
                return bool(said == event)


class Daemon:
    """The daemon's own life above, or beside, the application's: workers, signals, log, control.

    With workers it is the only thread of its process (threads and fork(2) do not mix).  Without,
    it is a thread beside serve_forever(), which has the main thread, where Python runs handlers.
    """

    def __init__(self, options: argparse.Namespace, opened: Opened, server: Any) -> None:
        self.options, self.opened, self.server = options, opened, server
        assert opened.control is not None           # open_files(): an application has one
        self.control = opened.control
        self.size = getattr(server, "workers", 0) if options.workers is None else options.workers
        self.log_path = inside(options.files.logfile, options.chroot)
        self.obstacle = options.obstacle            # why the log is not rotated; "" if it is
        self.workers: List[Child] = []
        self.leaving: List[Child] = []              # workers that drain
        self.talks: List[Channel] = []              # open conversations on the control socket
        self.heir: Optional[Channel] = None         # who took our sockets
        self.ends: List[socket.socket] = []         # of the channels to all children
        self.is_owner = self.is_leaving = False
        self.restarts, self.pause, self.next_start = 0, 0.0, 0.0
        self.last_error = ""
        self.born = time.monotonic()
        # Python runs a handler between any two instructions of the main thread: no place to work.
        # So handlers do nothing, and the number comes through this pair (signal.set_wakeup_fd).
        self.wake, self.waker = socket.socketpair()
        self.waker.setblocking(False)

    def live(self, report: Optional[Channel], prober: Optional[Child]) -> None:
        """Step 7.  Start the workers, have them probed, report ready; then do what comes.

        Runs as: the daemon user.  See: listen(2); twistd: startApplication, startReactor.
        """
        self.control.listen(8)          # not in step 3: SO_PEERCRED names who called listen()
        if report is None:
            self.own()
        if self.options.predecessor:
            call(self.server, "hold")   # no client shall meet the old and the new one in turn
        self.workers = self.bring_up(prober)
        if report is not None:
            greeting = str(getattr(self.server, "greeting", None) or "")
            with contextlib.suppress(BrokenPipeError):      # begin() will say that it is gone
                report.send("ready", greeting=greeting, addresses=self.addresses())
            self.begin(report)
        call(self.server, "release")    # whom we replace takes no more requests
        notify(self.options, "READY=1\nSTATUS=%s" % self.addresses())
        # `not self.size`: then this is a thread, and ends with the process, not by itself.
        while self.workers or self.leaving or not self.is_leaving or not self.size:
            try:
                self.step()
            except Exception as error:  # no fds, no processes, the application's status(): go on
                self.complain("unable to act: %s" % because(error))
                time.sleep(TICK)

    def own(self) -> None:
        take_place(self.options, self.opened)
        self.is_owner = True

    def begin(self, report: Channel) -> None:
        """Become the owner, then begin, each at the command's word.

        If the command dies between the two, only the predecessor knows whether it was told to
        leave.  Its lock is gone: it was, and we stay.  It keeps it: it was not, and we go.
        """
        try:
            become_owner(report, self.own)
        except Fatal:
            if not self.is_owner:
                raise
            deadline = time.monotonic() + ANSWER
            while lock_holder(self.opened.lock, INSTANCE) is not None:
                if time.monotonic() > deadline:     # it was never told to leave: so we do
                    self.is_owner = False
                    write_pidfile(self.opened.pidfile, self.options.predecessor)
                    raise
                time.sleep(POLL)

    def step(self) -> None:
        """Wait a moment for what comes, and do it."""
        ends = [self.wake, self.control] + [talk.end for talk in self.talks]
        for end in readable(ends, time.monotonic() + TICK):
            if end is self.wake:
                self.on_signals()
            elif end is self.control:
                self.accept()
            else:
                self.answer(next(talk for talk in self.talks if talk.end is end))
        self.reap()
        self.replace_dead()
        if self.is_full():
            self.rotate()

    def on_signals(self) -> None:
        """Do what HUP and USR1 ask for.  See: signal(7); signal.set_wakeup_fd."""
        numbers = set(self.wake.recv(4096))
        if numbers & set(endings(self.options)):
            end_main_thread()           # the main thread is another, or this line is not reached
        elif signal.SIGHUP in numbers:
            self.reload()
        elif signal.SIGUSR1 in numbers:
            self.reopen()

    def end(self) -> None:
        """Step 8.  End what we started, then empty the pidfile, for which no folder is needed.

        Runs as: the daemon user.  See: unlink(2) EACCES, ftruncate(2); twistd: removePIDFile.
        """
        guard()
        signal.set_wakeup_fd(-1)
        notify(self.options, "STOPPING=1")
        tell_family(self.options)
        end_family(self.options.groups(), self.options.timeout)
        if self.is_owner:
            os.ftruncate(self.opened.pidfile, 0)
            call(self.server, "server_close")       # when we leave, that is the new one's now

    def complain(self, text: str) -> None:
        self.last_error = text
        log(text)

    # -- workers

    def fork(self, life: Callable[[Channel], None]) -> Child:
        """Return a new child that lives that life; signals wait until it has its own handlers."""
        ours, theirs = socket.socketpair()
        # Between fork(2) and shed() the child has the daemon's handler: SIGTERM would make it
        # signal the whole group.
        signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
        try:
            pid = os.fork()
            if pid == 0:
                ours.close()
                self.be_child(life, Channel(theirs))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        theirs.close()
        # For shed(): a worker with a copy of a sibling's channel would keep EOF from that sibling.
        self.ends = [end for end in self.ends if end.fileno() >= 0] + [ours]
        return Child(pid, Channel(ours))

    def be_child(self, life: Callable[[Channel], None], channel: Channel) -> NoReturn:
        """Live a child's life; no exception gets out of it."""
        status = 1
        try:
            self.shed()
            life(channel)
            status = 0
        except SystemExit as error:
            status = exit_status(error)
        except BaseException as error:
            channel.fail(error)
            log("%s%s" % (as_fatal(error).trace, error))
        finally:
            with contextlib.suppress(Exception):    # the last print(), into a log that is full
                sys.stdout.flush()
            # Not `return`: below us on the stack is the daemon, whose `finally` ends everybody.
            os._exit(status)

    def shed(self) -> None:
        """Give up, in a child, what is the daemon's: handlers, lock, its ends of the channels."""
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGHUP, signal.SIGUSR1):
            signal.signal(signum, signal.SIG_IGN)
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, on_end)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
        for end in self.ends + [talk.end for talk in self.talks] + [self.control]:
            end.close()
        # Harmless for the lock: that is the daemon's, and fork(2) gave us none to lose.
        os.close(self.opened.pidfile)
        os.close(self.opened.lock)

    def work(self, channel: Channel) -> None:
        """Serve, with one thread that listens to the daemon."""
        threading.Thread(target=self.obey, args=(channel,), daemon=True).start()
        channel.send("able")
        self.server.serve_forever()

    def obey(self, channel: Channel) -> None:
        """Follow the daemon; when it is gone, go: nothing of a dead daemon may hold the port."""
        while True:
            # An hour, and again: poll(2) has its milliseconds in an int.
            event = channel.receive(time.monotonic() + 3600)["event"]
            if event == ENDED:
                os._exit(1)
            elif event == "drain":
                drain_or_end(self.server)
                channel.send("draining")
            elif event == "reopen":
                reopen_log(self.log_path)
                channel.send("reopened")

    def probe(self, channel: Channel) -> None:
        """Ask the workers one question, from outside."""
        self.server.probe()
        channel.send("able")

    def bring_up(self, prober: Optional[Child] = None) -> List[Child]:
        """Return a full set of new workers that have proved themselves; if one fails none stays."""
        fresh: List[Child] = []
        try:
            for _ in range(self.size):
                fresh.append(self.fork(self.work))
            self.await_able(fresh, [])
            if fresh and hasattr(self.server, "probe"):
                prober = self.fork(self.probe)
            self.prove(fresh, prober)
        except BaseException:
            for child in fresh + ([prober] if prober else []):
                if child.result is None:
                    os.kill(child.pid, signal.SIGKILL)
                    os.waitpid(child.pid, 0)
                child.channel.end.close()
            raise
        return fresh

    def prove(self, fresh: List[Child], prober: Optional[Child]) -> None:
        """Have new workers probed; without a probe they must live for a moment, like a script."""
        if prober is not None:
            self.await_able([prober], fresh)
            prober.result = os.waitpid(prober.pid, 0)[1]
            prober.channel.end.close()
        elif readable([child.channel.end for child in fresh], time.monotonic() + ALIVE):
            self.await_able([], fresh)

    def await_able(self, waiting: List[Child], watched: List[Child]) -> None:
        """Return when all the waiting are able; raise Fatal when one of all ends first."""
        waiting, deadline = list(waiting), time.monotonic() + self.options.start_timeout
        while waiting or readable([child.channel.end for child in watched], 0):
            ends = readable([child.channel.end for child in waiting + watched], deadline)
            if not ends:
                raise Fatal("unable to start: not ready after %g s" % self.options.start_timeout)
            for child in [child for child in waiting + watched if child.channel.end in ends]:
                message = child.channel.receive(deadline)
                if message["event"] == LATE:        # half a line: the next look is the last
                    continue
                if message["event"] != "able":
                    child.result = os.waitpid(child.pid, 0)[1]
                    fatal = failure(message, "a process of it %s" % describe(child.result))
                    raise Fatal(str(fatal), 1, fatal.trace)     # 2, usage, is for bind()
                waiting.remove(child)

    def reap(self) -> None:
        """Wait for the workers that ended; kill those whose time to drain is up."""
        for child in self.workers + self.leaving:
            if time.monotonic() > child.deadline:
                os.kill(child.pid, signal.SIGKILL)      # not waited for: the pid is still its own
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                child.channel.end.close()
                if child in self.leaving:
                    self.leaving.remove(child)
                else:
                    self.mourn(child, status)

    def mourn(self, child: Child, status: int) -> None:
        """Note an unexpected death; the pause before the next start grows while they die young."""
        self.workers.remove(child)
        self.complain("worker %d %s" % (child.pid, describe(status)))
        # SIGKILL comes from outside (a person, the OOM killer) and tells nothing of the code.
        is_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        is_settled = is_killed or time.monotonic() - child.born > SETTLED
        self.pause = 0.0 if is_settled else min(BACKOFF[1], max(BACKOFF[0], 2 * self.pause))
        self.next_start = time.monotonic() + self.pause

    def replace_dead(self) -> None:
        """Start a worker where one is missing."""
        missing = 0 if self.is_leaving else self.size - len(self.workers)
        if missing > 0 and time.monotonic() >= self.next_start:
            self.workers.append(self.fork(self.work))
            self.restarts += 1

    def retire(self, children: List[Child]) -> None:
        """Tell workers to finish what they have, and go."""
        for child in children:
            child.deadline = time.monotonic() + self.options.timeout
            child.tell("drain")
        self.leaving += children

    def reload(self) -> str:
        """Have the application read its files again, reopen the log; return why not, "" if done.

        Once, in this process; fresh workers inherit what was read, and the old ones drain.
        """
        notify(self.options, "RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        reason = ""
        try:
            call(self.server, "reload")
            # The right side runs first: if it raises, the old workers are still in place.
            old, self.workers = self.workers, self.bring_up()
            self.retire(old)
            self.reopen()
            log("reloaded")
        except Exception as error:      # whatever it is, it refuses this reload, and no more
            fatal = as_fatal(error)
            reason = str(fatal).replace("unable to start: ", "", 1)
            if isinstance(error.__context__ or error, PermissionError):     # root could, we cannot
                reason = reason.partition("\n")[0] + "\ntry: daemonize.py restart"
            self.complain("reload refused: %s%s" % (fatal.trace, reason))
        said = reason.replace("\n", "; ") or self.addresses()
        notify(self.options, "READY=1\nSTATUS=%s" % said)
        return reason

    # -- the log

    def reopen(self) -> bool:
        """Open the log's name again, here and in the workers; True if all have done it."""
        if not reopen_log(self.log_path):
            return False
        children, deadline = self.workers + self.leaving, time.monotonic() + ANSWER
        for child in children:
            child.tell("reopen")
        self.obstacle = self.options.obstacle
        said = [child.has_said("reopened", deadline) for child in children]     # each one, even
        return all(said)                                                        # after a "no"

    def is_full(self) -> bool:
        """Tell whether it is for us, and time, to rotate the log."""
        return bool(self.is_owner and self.log_path and self.options.log_bytes
                    and not self.obstacle and os.fstat(1).st_size >= self.options.log_bytes)

    def rotate(self) -> None:
        """Rename the log and its elders, open a new one; delete the oldest, once nobody has it."""
        names = ["%s.%d" % (self.log_path, n) for n in range(self.options.log_keep + 1, 0, -1)]
        try:
            for elder, name in zip(names, names[1:] + [str(self.log_path)]):    # the oldest first
                with contextlib.suppress(FileNotFoundError):
                    os.rename(name, elder)
        except OSError as error:
            self.obstacle = because(error)
            self.complain("unable to rotate %s: %s" % (self.log_path, self.obstacle))
            return
        if not self.reopen():           # to rename on would push the elders out
            self.obstacle = "unable to reopen it"
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(names[0])

    # -- the control socket

    def accept(self) -> None:
        """Take a command's call; anybody's but ours and root's is hung up."""
        end = self.control.accept()[0]
        # Its mode 0600 does that on Linux; older BSDs ignore the mode of a socket (unix(7)).
        if peer_of(end)[1] in (None, 0, os.getuid()) and len(self.talks) < 8:
            end.settimeout(ANSWER)
            self.talks.append(Channel(end))
        else:
            end.close()

    def answer(self, talk: Channel) -> None:
        """Do what a command asks for."""
        try:
            event = talk.receive(time.monotonic())["event"]     # LATE: half a line, so far
            if event == "status":
                talk.send("status", said=self.status())
            elif event == "reload":
                talk.send("reloaded", reason=self.reload())
            elif event == "sockets":
                self.heir = talk
                self.hand_over(talk.end)
            elif event == "leave":
                self.leave()
                talk.send("leaving")
        except OSError:                 # it hung up in mid-sentence
            event = ENDED
        if event == ENDED:
            talk.end.close()
            self.talks.remove(talk)
            if talk is self.heir and self.is_owner:     # the new one failed, maybe late
                write_pidfile(self.opened.pidfile, os.getpid())

    def hand_over(self, end: socket.socket) -> None:
        """Send our listening sockets.  See: unix(7), SCM_RIGHTS."""
        sockets = getattr(self.server, "sockets", [])[:MAX_SOCKETS]
        fds = array.array("i", [passed.fileno() for passed in sockets])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        # With a line of text: Linux carries no fds over a stream without at least one byte.
        end.sendmsg([b'{"event": "sockets"}\n'], rights)

    def leave(self) -> None:
        """Drain and go: a new daemon is there, and has shared the instance lock until now."""
        # First of all: with this, whom lock_holder() names is the new daemon.
        fcntl.lockf(self.opened.lock, fcntl.LOCK_UN, 1, INSTANCE)
        self.is_leaving, self.is_owner = True, False
        workers, self.workers = self.workers, []
        self.retire(workers)
        deadline = time.monotonic() + TICK
        for child in workers:           # so that the command can tell the new one to begin
            child.has_said("draining", deadline)
        if not self.size:
            drain_or_end(self.server)

    def facts(self) -> Dict[str, Any]:
        """Return what the application says of itself."""
        return dict(call(self.server, "status", {}))

    def addresses(self) -> str:
        return ", ".join(map(str, self.facts().get("addresses", [])))

    def status(self) -> Dict[str, Any]:
        return dict(self.facts(), uptime=round(time.monotonic() - self.born, 1),
                    restarts=self.restarts, workers=[child.pid for child in self.workers],
                    last_error=self.last_error, log=self.options.files.logfile,
                    log_bytes=os.fstat(1).st_size if self.log_path else 0,
                    log_rotation=self.obstacle)


def host_application(options: argparse.Namespace, opened: Opened, server: Any,
                     report: Optional[Channel]) -> None:
    """Step 7.  Give the main thread to the daemon's loop; without workers, to serve_forever()."""
    daemon, pid = Daemon(options, opened, server), os.getpid()
    install_handlers(options, on_wake)
    signal.signal(signal.SIGCHLD, on_wake)
    # From now on C code writes each signal's number to the pair, before any Python handler runs.
    signal.set_wakeup_fd(daemon.waker.fileno())
    try:
        if daemon.size:
            daemon.live(report, None)
        else:
            serve_beside(daemon, report)
    finally:
        if os.getpid() == pid:          # and not a child that serve_forever() forked
            daemon.end()


def serve_beside(daemon: Daemon, report: Optional[Channel]) -> None:
    """Serve in this process, the daemon's loop in a thread.  The prober is forked before that."""
    prober = daemon.fork(daemon.probe) if hasattr(daemon.server, "probe") else None
    failed: List[BaseException] = []

    def live_beside() -> None:
        try:
            daemon.live(report, prober)
        except BaseException as error:
            failed.append(error)
            end_main_thread()
    try:
        threading.Thread(target=live_beside, daemon=True).start()
        daemon.server.serve_forever()
    finally:
        # In place of the SystemExit by which end_main_thread() got us out of serve_forever().
        if failed:
            raise failed[0]


# -- 9. The control socket, the command's end --------------------------------
# The daemon may have been taken over.  So there is one deadline for each exchange, 64 KiB and 64
# fds at most, no fd but of listening stream sockets, and no text printed raw.

@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in whatever call this process sits after so many seconds.

    A socket's timeout does not cover close(2): an fd that came over the channel, taken or not, may
    be a connection with SO_LINGER, and closing it waits for as long as its owner likes.
    """
    def on_sigalrm(signum: int, frame: Optional[FrameType]) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "it does not answer")
    signal.signal(signal.SIGALRM, on_sigalrm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


class Control:
    """A conversation with the daemon that has that pid.  Raises OSError if it does not talk."""

    def __init__(self, files: Files, pid: int) -> None:
        # .new stays where a restart was killed between the old one's leave and the rename
        for name in (files.control + ".new", files.control):
            end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.channel = Channel(end)
            try:
                end.settimeout(ANSWER)
                with working_in(files.folder):
                    end.connect(os.path.basename(name))
                # Whoever owns the folder can bind a socket there; the kernel says who listens.
                if peer_of(end)[0] in (None, pid):
                    return
                raise ConnectionRefusedError(errno.ECONNREFUSED, "another process listens there")
            except OSError:
                end.close()
                if name == files.control:
                    raise

    def ask(self, event: str, wait: float = ANSWER) -> Dict[str, Any]:
        # Later than receive()'s own deadline: it is for the calls that have none.
        with limited(wait + TICK):
            self.channel.send(event)
            return self.answer(wait)

    def answer(self, wait: float = ANSWER) -> Dict[str, Any]:
        message = self.channel.receive(time.monotonic() + wait)
        if message["event"] in (ENDED, LATE):
            raise TimeoutError(errno.ETIMEDOUT, "it does not answer")
        return message

    def take_sockets(self) -> List[socket.socket]:
        """Return the daemon's listening sockets.  See: cmsg(3), unix(7)."""
        fds = array.array("i")
        with limited(ANSWER + TICK):
            self.channel.send("sockets")
            # Not receive(): fds come along with the bytes, and recv(2) would throw them away.
            data, ancillary, _, _ = self.channel.end.recvmsg(
                MAX_MESSAGE, socket.CMSG_SPACE(4 * MAX_SOCKETS),
                getattr(socket, "MSG_CMSG_CLOEXEC", 0))
            self.channel.buffer += data
            for level, kind, cargo in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    # A message that was cut may end in half an int.
                    fds.frombytes(cargo[:len(cargo) - len(cargo) % fds.itemsize])
            sockets = [passed for passed in map(adopt, fds) if passed is not None]
            self.answer()
        return sockets

    def close(self) -> None:
        with contextlib.suppress(OSError), limited(TICK):
            self.channel.end.close()


# -- 10. Ending a daemon -----------------------------------------------------
# First a handle on the process (a pidfd cannot come to mean another one), then the proof that
# this process holds the instance lock, then the signal.  And when root ends a daemon of another
# uid, a child that became that uid does it: whatever was arranged for us, the kernel lets it
# reach no other user's process.  (setresuid, not seteuid: with a real uid of 0, kill(2) would
# still be root's.)

class Target:
    """A daemon to be ended, with its group if a start made it."""

    def __init__(self, lock: Lock, pid: int) -> None:
        self.pid, self.pidfd = pid, -1
        self.has_group = bool(lock.record().get("detached"))
        with contextlib.suppress(OSError, TypeError):       # it is dead; there is no pidfd_open
            self.pidfd = pidfd_open(pid)
        process = find_process(pid)
        # asked after the handle was opened: so all three mean one process, or we have nobody
        self.process = process if lock.holder() == pid else None

    def members(self) -> List[Process]:
        """Return who is left."""
        mine = self.process
        return [p for p in processes() if mine is not None and p.sid == mine.sid
                and (p.pid == mine.pid or self.has_group and p.pgid == mine.pgid)]

    def leader(self) -> List[Process]:
        """Return the daemon itself, while it is left."""
        return [p for p in self.members() if p.pid == self.pid]

    def send(self, signum: int) -> None:
        """Signal the daemon, and nobody else."""
        if self.process is None:
            return
        if self.pidfd >= 0:
            as_uid(self.process.uid, lambda: pidfd_send_signal(self.pidfd, signum))
        elif self.leader():             # looked at again, just before
            as_uid(self.process.uid, lambda: os.kill(self.pid, signum))

    def send_all(self, signum: int) -> None:
        """Signal who is left of the group, too: until the last has left, its number is its own."""
        self.send(signum)
        if self.process is not None and self.has_group and self.members():
            pgid = self.process.pgid
            as_uid(self.process.uid, lambda: os.killpg(pgid, signum))


def as_uid(uid: int, action: Callable[[], Any]) -> None:
    """Send a signal with that user's rights only.  That nobody is left to get it is as good."""
    if os.geteuid() != 0 or uid == 0:
        with contextlib.suppress(ProcessLookupError):
            action()
        return
    child = os.fork()
    if child == 0:
        result = 0
        try:
            os.setgroups([])
            set_ids(uid, os.getgid())
            action()
        except OSError as error:
            result = 0 if isinstance(error, ProcessLookupError) else error.errno or 255
        finally:
            os._exit(result)
    result = os.WEXITSTATUS(os.waitpid(child, 0)[1])
    if result:
        raise OSError(result, os.strerror(result))


def end_daemon(target: Target, timeout: float, is_told: bool = False) -> bool:
    """End a daemon and its group: SIGTERM, wait, SIGKILL; True if that was needed.

    First the daemon alone, whose handler tells the others; then who is left.
    """
    try:
        deadline = time.monotonic() + timeout
        if not is_told:
            target.send(signal.SIGTERM)
            target.send(signal.SIGCONT)             # one that was stopped obeys when it goes on
        was_killed = end_all(target.leader, target.send, timeout)
        target.send_all(signal.SIGTERM)
        return end_all(target.members, target.send_all, deadline - time.monotonic()) or was_killed
    except OSError as error:
        raise Fatal("unable to stop pid %d: %s" % (target.pid, because(error)))


# -- 11. The commands --------------------------------------------------------

def tell(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        emit(1, text + "\n")


# -- 11.1 start ---------------------------------------------------------------

def start(options: argparse.Namespace) -> int:
    """Start the daemon unless it runs; return when it is ready (and in a library's daemon)."""
    new = make_folders(options)
    with Turn(options) as turn:
        pid = turn.holder()
        if pid is None:
            launch(options, turn, new)
        else:
            tell(options, "%s is already running with pid %d" % (options.name, pid))
    return 0


def make_folders(options: argparse.Namespace) -> List[str]:
    """Make the folders of the default files; return what a start that fails has to remove.

    The log's folder is the daemon user's: rotation renames, and rename(2) needs the folder.
    """
    files, identity = options.files, options.identity
    mine = [os.path.dirname(path) for path in (files.pidfile, files.logfile) if path]
    new = [path for path in (files.pidfile, files.control, files.lock, files.logfile)
           if path and not os.path.lexists(path)]
    is_root = os.geteuid() == 0
    folder = "/var/log/" + options.name if is_root else files.prefix.rstrip("/")
    if folder in mine and not os.path.lexists(folder):
        os.mkdir(folder, 0o700)
        new.append(folder)      # no other: a folder that we did not make is not ours to remove
        # By fd from here: what was looked at is what changes its owner, whoever swaps the names.
        fd = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.fchmod(fd, 0o750 if is_root else 0o700)
        if identity is not None:
            os.fchown(fd, identity.uid, identity.gid)
        os.close(fd)
    return new


def tidy(options: argparse.Namespace, new: List[str]) -> None:
    """Remove what a failed start made, but a log that says something; empty an older pidfile."""
    for path in new:
        identity = options.identity if path == options.files.logfile else None
        with contextlib.suppress(OSError), careful(path, identity):     # not there, not empty
            facts = os.lstat(path)
            if stat.S_ISDIR(facts.st_mode):
                os.rmdir(path)
            elif path != options.files.logfile or facts.st_size == 0:
                os.unlink(path)
    if options.predecessor is None and os.path.lexists(options.files.pidfile):
        with contextlib.suppress(Fatal):            # an odd one, which was refused, stays as it is
            fd = open_regular(options.files.pidfile, os.O_RDWR, 0o644)
            os.ftruncate(fd, 0)
            os.close(fd)


def launch(options: argparse.Namespace, turn: Lock, new: List[str],
           old: Optional[Control] = None) -> None:
    """Fork the starter, see the daemon to its place.  Returns in a library's daemon, too."""
    ours, theirs = socket.socketpair()
    logfile = options.files.logfile
    logged = os.path.getsize(logfile) if os.path.isfile(logfile) else 0
    starter = os.fork()
    if starter == 0:
        # The fd only: record locks are not inherited, and the command's is not touched by this.
        turn.close()
        ours.close()
        if old is not None:
            old.close()
        be_starter(options, Channel(theirs))
        return
    # While we hold the starter's end as well, its death is no EOF: there twistd hangs for ever.
    for end in [theirs] + options.sockets:
        end.close()
    try:
        with ours:
            attend(options, Channel(ours), turn, old)
    except BaseException as error:
        result = end_starter(starter)
        if isinstance(error, EOFError):
            error = Fatal("unable to start: it %s before it was ready" % describe(result))
        if isinstance(error, Fatal) and not error.trace and error.status == 1 and old is None:
            error.trace = log_since(options, logged)
        tidy(options, new)
        raise error from None
    # By SIGKILL, which no handler sees: the daemon stays, and init becomes its parent.
    os.kill(starter, signal.SIGKILL)
    os.waitpid(starter, 0)


def attend(options: argparse.Namespace, report: Channel, turn: Lock,
           old: Optional[Control]) -> None:
    """Wait until the daemon is ready, give it the place, have the old one leave, let it begin."""
    facts = expect(report, "ready", options.start_timeout)
    report.send("own")
    expect(report, "owned", ANSWER)
    options.detached = True
    # Before "begin": a program may close the lock's fd at once; then only this note proves it.
    if old is None:
        turn.note(options, turn.holder() or 0)
    else:
        with contextlib.suppress(OSError):          # no answer: succeed() waits, and ends it
            old.ask("leave")
        try:
            os.rename(options.files.control + ".new", options.files.control)
        except OSError as error:
            warn("unable to rename the control socket: %s" % because(error))
    report.send("begin")
    expect(report, "began", ANSWER)
    # Not earlier: had the new one failed, `restart` must repeat the old one's options.
    if old is not None:
        turn.note(options)
    if options.kind in ("script", "program"):
        message = report.receive(time.monotonic() + ALIVE)
        if message["event"] != LATE:
            raise failure(message, "it ended")
    if options.kind == "library":
        text = options.startmsg
        tell(options, text % turn.holder() if "%" in text else text)
    else:
        greet(options, facts)


def expect(report: Channel, event: str, wait: float) -> Dict[str, Any]:
    """Return the message that is due, or raise what came instead."""
    message = report.receive(time.monotonic() + wait)
    if message["event"] == LATE:
        raise Fatal("unable to start: not ready after %g s" % wait)
    if message["event"] == ENDED:       # os._exit(), SIGKILL: nobody could report it
        raise EOFError
    if message["event"] != event:
        raise failure(message, "%s came instead of %s" % (message["event"], event))
    return message


def end_starter(starter: int) -> int:
    """Have the starter end the daemon and itself, by SIGKILL if bind() hangs; its wait status."""
    os.kill(starter, signal.SIGTERM)    # not waited for yet: the pid is its own
    deadline = time.monotonic() + 2 * ANSWER
    while True:
        pid, result = os.waitpid(starter, os.WNOHANG)
        if pid:
            return result
        if time.monotonic() > deadline:
            os.kill(starter, signal.SIGKILL)
        time.sleep(POLL)


def greet(options: argparse.Namespace, facts: Dict[str, Any]) -> None:
    where = ", listening on %s" % facts["addresses"] if facts.get("addresses") else ""
    pid = read_pidfile(options.files.pidfile)
    tell(options, "%s is running with pid %s%s" % (options.name, pid, where))
    if facts.get("greeting"):
        emit(1, str(facts["greeting"]).rstrip("\n") + "\n")


def log_since(options: argparse.Namespace, size: int) -> str:
    """Return the last lines of what was logged beyond that size."""
    path = options.files.logfile
    with contextlib.suppress(Fatal, OSError), careful(path, options.identity):
        with open(open_regular(path, os.O_RDONLY, 0o640, is_log=True), "rb") as stream:
            stream.seek(max(size, os.fstat(stream.fileno()).st_size - MAX_MESSAGE))
            lines = stream.read().decode("utf-8", "replace").splitlines()[-30:]
        return "the log (%s) says:\n%s\n" % (path, "\n".join(lines)) if lines else ""
    return ""


def be_starter(options: argparse.Namespace, report: Channel) -> None:
    """Live as the starter, then as the daemon, then exit.  Returns only in a library's daemon."""
    is_daemon, status = False, 0
    signal.signal(signal.SIGTERM, on_end)           # bind() may hang: so its `finally` runs
    try:
        opened, server = prepare(options)
        detach(report, opened, getattr(server, "abandon", lambda: None))
        is_daemon = True
        if options.kind in ("app", "program"):      # a script may want to call setsid() itself
            os.setpgid(0, 0)
        # A function: a script may call setsid() later, and then its group is another.
        options.groups = lambda: (os.getpgrp(),)
        become_daemon(options, opened, server, report)
        if options.kind == "library":
            return
    except SystemExit as error:
        status = exit_status(error)
        if isinstance(error.code, str):             # sys.exit("why")
            report.fail(Fatal(error.code))
    except BaseException as error:
        status = 1
        if is_daemon:
            log("%s%s" % (as_fatal(error).trace, as_fatal(error)))
        report.fail(error)
    if not is_daemon:
        os._exit(status)                            # what atexit would do is the command's
    sys.exit(status)


def prepare(options: argparse.Namespace) -> Tuple[Opened, Any]:
    """Step 3, with the terminal still there: the application's ports and files, and our files."""
    check_folder(options.files.folder)
    if options.files.logfile == "":
        default_files(options.name)     # raises, and says why there is none
    options.obstacle = rotation_obstacle(options)
    server = bind_application(options) if options.kind == "app" else None
    if server is not None and options.obstacle and options.log_bytes:
        warn("unable to rotate %s: %s" % (options.files.logfile, options.obstacle))
    try:
        return open_files(options), server
    except BaseException:
        call(server, "abandon")
        raise


def become_daemon(options: argparse.Namespace, opened: Opened, server: Any,
                  report: Optional[Channel]) -> None:
    """Steps 5 to 8."""
    set_environment(options)
    switch_user(options.identity)
    if options.kind == "app":
        host_application(options, opened, server, report)
        return
    if report is None:
        take_place(options, opened)
    else:
        report.send("ready")
        become_owner(report, lambda: take_place(options, opened))
    notify(options, "READY=1")
    if options.kind == "program":
        host_program(options, opened)
    elif options.kind == "script":
        host_script(options, opened)
    else:
        signal.signal(signal.SIGHUP, on_wake)       # `reload` must not end who handles no HUP
        atexit.register(forget, os.getpid(), opened.pidfile)


def forget(pid: int, pidfile: int) -> None:
    """Empty the pidfile when a library's daemon exits; not when a child that it forked does."""
    if os.getpid() == pid:
        os.ftruncate(pidfile, 0)


# -- 11.2 stop and restart ----------------------------------------------------

def stop(options: argparse.Namespace) -> int:
    """End the daemon and its group; return when nothing of it is left."""
    if not os.path.lexists(options.files.lock):     # it was never started
        tell(options, "%s is not running" % options.name)
        return 0
    with Turn(options) as turn:
        pid = turn.holder()
        if pid is None:
            tell(options, "%s is not running" % options.name)
        elif end_daemon(Target(turn, pid), options.timeout):
            emit(1, "%s did not end within %g s: killed\n" % (options.name, options.timeout))
        else:
            tell(options, "%s is stopped" % options.name)
        for _ in range(100):                        # its children, if it let them have the lock
            pid = turn.holder()
            if pid is None:
                break
            end_daemon(Target(turn, pid), options.timeout)
        else:
            raise Fatal("unable to stop %s: pid %s holds its lock" % (options.name, pid))
        control = options.files.control
        for path in (options.files.pidfile, control, control + ".new"):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                os.unlink(path)                     # a name; what it may link to stays as it is
    return 0


def restart(options: argparse.Namespace) -> int:
    """Replace the daemon by a new one; where it has sockets to hand over, without a gap."""
    if not os.path.lexists(options.files.lock):     # it was never started
        return start(options)
    with Turn(options) as turn:
        pid, record = turn.holder(), turn.record()
        if pid is not None and not record.get("detached"):
            raise Fatal("unable to restart %s: it runs in the foreground of what started it\n"
                        "try: systemctl restart" % options.name)
        if options.is_bare and (record or pid is not None):
            options = repeat(options, record)
        if pid is None:
            launch(options, turn, make_folders(options))
        elif options.kind != "app" or record["kind"] != "app" or not succeed(options, turn, pid):
            stop_and_start(options, turn, pid)
    return 0


def repeat(options: argparse.Namespace, record: Dict[str, Any]) -> argparse.Namespace:
    """Return the options of the last start, which are what it left in the lock file."""
    if not record or not is_trusted(options.files.folder):
        reason = "others than root can write beside it" if record else "it is not known"
        raise Fatal("unable to repeat the last start of %s: %s\n"
                    "try: restart with options" % (options.name, reason))
    # Relative paths in the old options meant the old folder.
    try:
        os.chdir(record["cwd"] or "/")
    except OSError:
        warn("the folder of the last start is gone: %s; relative paths mean /" % record["cwd"])
        os.chdir("/")
    arguments = record["arguments"]
    again = parse(["restart"] + record["argv"] + (["--"] + arguments if arguments else []))
    again.files = again.files._replace(pidfile=options.files.pidfile)
    again.quiet, again.caller_umask = options.quiet, options.caller_umask
    again.timeout = options.timeout if "timeout" in options.typed else again.timeout
    return again


def succeed(options: argparse.Namespace, turn: Lock, pid: int) -> bool:
    """Start the new daemon on the old one's sockets, see the old one out; False if it is mute."""
    target, old = Target(turn, pid), None       # now: when it leaves, it will show no lock
    try:
        old = Control(options.files, pid)
        options.sockets = old.take_sockets()
    except OSError as error:
        if old is not None:
            old.close()         # in limited time: what it sent, and we left there, may linger
        warn("pid %d hands nothing over (%s): it is stopped first" % (pid, because(error)))
        return False
    options.predecessor = pid
    with contextlib.closing(old):
        try:
            launch(options, turn, make_folders(options) + [options.files.control + ".new"], old)
        except Exception as error:
            text = "%s\ndaemonize: fatal: the old one keeps serving with pid %d"
            fatal = as_fatal(error)
            raise Fatal(text % (fatal, pid), fatal.status, fatal.trace)
        if end_daemon(target, options.timeout, is_told=True):
            warn("pid %d did not drain within %g s: killed" % (pid, options.timeout))
    return True


def stop_and_start(options: argparse.Namespace, turn: Lock, pid: int) -> None:
    """Restart what has nothing to hand over; look first whether there is something to start."""
    if options.kind == "program" and shutil.which(options.program) is None:
        raise Fatal("unable to execute %s: no such program" % options.arguments[0])
    new = make_folders(options)         # may fail, too: before anything is stopped
    if end_daemon(Target(turn, pid), options.timeout):
        warn("pid %d did not end within %g s: killed" % (pid, options.timeout))
    try:
        launch(options, turn, new + [options.files.pidfile, options.files.control])
    except Exception as error:
        fatal = as_fatal(error)
        raise Fatal("%s\ndaemonize: fatal: nothing runs now" % fatal, fatal.status, fatal.trace)


# -- 11.3 reload and status ---------------------------------------------------

def reload(options: argparse.Namespace) -> int:
    """Have the daemon read its files again, with its own rights; say why if it refuses."""
    pid = holder_of(options.files)
    if pid is None:
        tell(options, "%s is not running" % options.name)
        return 3
    try:
        if not os.path.lexists(options.files.control):  # script, program: they know what HUP means
            with Lock(options.files, os.O_RDONLY) as lock:
                Target(lock, pid).send(signal.SIGHUP)
            tell(options, "%s has got SIGHUP" % options.name)
            return 0
        with contextlib.closing(Control(options.files, pid)) as control:
            reason = str(control.ask("reload", options.start_timeout).get("reason"))
    except OSError as error:
        reason = because(error)
    if reason:                          # its lines are not to look like ours
        raise Fatal("unable to reload %s: %s" % (options.name, reason.replace("\n", "\n  ")))
    tell(options, "%s is reloaded" % options.name)
    return 0


def holder_of(files: Files) -> Optional[int]:
    """Return the pid of the running daemon, without a turn."""
    if not os.path.lexists(files.lock):
        return None
    with Lock(files, os.O_RDONLY) as lock:
        return lock.holder()


def status(options: argparse.Namespace) -> int:
    """Say whether the daemon runs, and what it says of itself; exit status as LSB has it."""
    pid = holder_of(options.files)
    facts = stopped_facts(options) if pid is None else running_facts(options, pid)
    emit(1, (json.dumps(facts) if options.json else one_line(facts)) + "\n")
    return {"running": 0, "dead": 1}.get(facts["state"], 3)


def stopped_facts(options: argparse.Namespace) -> Dict[str, Any]:
    path = options.files.pidfile
    content = read_pidfile(path)
    if not content:
        return {"name": options.name, "state": "not running"}
    facts = {"name": options.name, "state": "dead", "pidfile": path, "content": content}
    if content.isdecimal() and find_process(int(content)):
        facts["note"] = "pid %s belongs to a stranger now" % content
    return facts


def running_facts(options: argparse.Namespace, pid: int) -> Dict[str, Any]:
    """Return what the daemon says, and above it what the kernel says."""
    started = os.path.getmtime(options.files.lock)      # a start wrote it last
    facts: Dict[str, Any] = {"uptime": round(time.time() - started, 1)}
    if os.path.lexists(options.files.control):
        try:
            with contextlib.closing(Control(options.files, pid)) as control:
                said = control.ask("status").get("said")
            facts = said if isinstance(said, dict) else {}
        except OSError as error:
            facts["note"] = because(error)
    process = find_process(pid)
    known = {"name": options.name, "state": "running", "pid": pid,
             "uid": process.uid if process else None}
    return {**known, **facts, **known}      # the kernel's first, and not to be overruled


def one_line(facts: Dict[str, Any]) -> str:
    """Return facts as one line for a person.

    >>> one_line({"name": "a", "state": "running", "pid": 7, "last_error": "", "on": ["b", "c"]})
    'a is running: pid 7, on b c'
    """
    details = []
    for key, value in facts.items():
        if key not in ("name", "state") and value not in ("", None, []):
            text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            details.append("%s %s" % (key.replace("_", " "), text))
    line = "%s is %s%s" % (facts["name"], facts["state"], ": " * bool(details) + ", ".join(details))
    return line.replace("\n", "\\n")


# -- 11.4 run -----------------------------------------------------------------

def run(options: argparse.Namespace) -> int:
    """Live in the foreground: for systemd, containers, supervisord, debugging.

    No fork (but as pid 1) and no setsid: who started us keeps us.
    """
    options.notifier = open_notifier()
    if os.getpid() == 1:
        be_init()
    new = make_folders(options)
    with Turn(options) as turn:
        pid = turn.holder()
        if pid is not None:
            raise Fatal("unable to run %s: already running with pid %d" % (options.name, pid))
        try:
            opened, server = prepare(options)
        except BaseException:
            tidy(options, new)
            raise
        turn.note(options, os.getpid() if options.kind != "app" else 0)
    # After the `with`: when that closed the turn's fd, it would have dropped this lock as well.
    take_instance(opened.lock, None)                # its fd is the only one from here on
    reset_signals()
    options.has_terminal = has_terminal()
    if not options.has_terminal and os.getpgrp() != os.getpid():
        os.setpgid(0, 0)                            # no shell's job control is about this one
        options.groups = lambda: (os.getpgrp(),)
    redirect(opened)
    become_daemon(options, opened, server, None)
    return 0


def has_terminal() -> bool:
    """Tell whether there is a controlling terminal.  See: tty(4)."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    except OSError:
        return False


def open_notifier() -> Optional[socket.socket]:
    """Return a socket to the supervisor that wants to know how we are.  See: sd_notify(3)."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return None
    notifier = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        # "@" is for the zero byte of Linux' abstract names: an environment variable holds none.
        notifier.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:
        raise Fatal("unable to connect to NOTIFY_SOCKET %s: %s" % (address, because(error)))
    return notifier


def be_init() -> None:
    """As pid 1 of a container: pass signals on to the daemon, reap orphans, exit as it does."""
    # Blocked until the handlers stand: pid 1 without a handler does not even get the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    child = os.fork()
    if child:
        def pass_on(signum: int, frame: Optional[FrameType]) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signum)
        for signum in HANDLED - {signal.SIGCHLD}:
            signal.signal(signum, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    while child:
        # Any child: every orphan of the container is ours, and a zombie until somebody waits.
        pid, result = os.wait()
        if pid == child:
            is_killed = os.WIFSIGNALED(result)
            os._exit(128 + os.WTERMSIG(result) if is_killed else os.WEXITSTATUS(result))


# -- 12. The library call ----------------------------------------------------

def startstop(stdout: str = "/dev/null", stderr: Optional[str] = None, stdin: str = "/dev/null",
              pidfile: str = "pid.txt", startmsg: str = "started with pid %s", **more: Any) -> None:
    """Do what sys.argv[1] says: start returns in the daemon; stop, restart, reload, status exit.

    Clark Evans' call, in front of any script:

        if __name__ == "__main__":
            startstop(stdout="/tmp/deamon.log", pidfile="/tmp/deamon.pid")
            main()

    The daemon leads neither session nor group: main() may call os.setsid(), as the third article
    does.  `stop` ends its whole group, with a SIGTERM handler in main() or without.  more: uid,
    gid, umask, chroot, rundir, timeout, start_timeout, as on the command line; exit status, too.
    """
    try:
        action = sys.argv[1] if len(sys.argv) == 2 else ""
        if action not in ("start", "stop", "restart", "reload", "status"):
            raise Fatal("usage: %s start|stop|restart|reload|status" % sys.argv[0], 2)
        options = library_options(action, pidfile, stdout, more)
        options.stdin, options.stderr = absolute(stdin), absolute(stderr or stdout)
        options.startmsg, command = startmsg, os.getpid()
        if action == "restart":
            stop(options)
            action = "start"
        result = COMMANDS[action](options)
        if os.getpid() == command:      # start returns in the daemon as well, as fork(2) does
            sys.exit(result)
    except Fatal as error:
        sys.exit(report_fatal(error, sys.argv[1:2] == ["status"]))


def library_options(action: str, pidfile: str, logfile: str,
                    more: Dict[str, Any]) -> argparse.Namespace:
    """Return the command line's options with what a call gives instead.  Raises TypeError."""
    open_stdio()
    options = build_parser().parse_args([action])
    for name, value in more.items():
        if name not in ("uid", "gid", "umask", "chroot", "rundir", "timeout", "start_timeout"):
            raise TypeError("startstop() got an unexpected keyword argument %r" % name)
        is_number = name in ("umask", "timeout", "start_timeout")
        setattr(options, name, value if value is None or is_number else str(value))
    options.name = os.path.basename(sys.argv[0])
    options.pidfile, options.logfile = pidfile, logfile
    settle(options, [], None)
    options.kind = "library"
    close_inherited()
    return options


# -- 13. The command line ----------------------------------------------------

COMMANDS = {"start": start, "stop": stop, "restart": restart, "reload": reload,
            "status": status, "run": run}
STARTING = ("start", "restart", "run")
HELP = """Run an application, a script or a program as a daemon.

  start    return when it is ready (0; 1: why not)   run      the same in the foreground
  stop     end it and all that it started            reload   read passwords, open the log again
  restart  new code, no request lost                 status   0 running, 1 dead, 3 not, 4 unknown"""
EXAMPLES = """@FILE reads options from FILE (shell quoting, # comments).  Examples:
  daemonize.py start --uid nobody --bind :80
  daemonize.py start --name nap -- sleep 1000"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints look like all the others."""

    def error(self, message: str) -> NoReturn:
        raise Fatal("unable to understand the command line: %s\ntry: daemonize.py -h" % message, 2)


def bounded(kind: Callable[[str], float], highest: float) -> Callable[[str], float]:
    """Return a converter for numbers from 0 to highest."""
    def convert(text: str) -> float:
        value = kind(text)
        if not 0 <= value <= highest:
            raise ValueError
        return value
    convert.__name__ = "number"         # argparse: "invalid number value"
    return convert


def build_parser(application: Optional[ModuleType] = None) -> Parser:
    """Return the one parser; with the application's options once it is loaded."""
    parser = Parser(prog="daemonize.py", add_help=False, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    usage="daemonize.py ACTION [options] [--app FILE.py] [-- ARG ...]\n"
                    "       daemonize.py ACTION [options] -- COMMAND [ARG ...]",
                    description=HELP, epilog=EXAMPLES)
    parser.add_argument("action", metavar="ACTION", choices=list(COMMANDS), help=argparse.SUPPRESS)
    add_options(parser.add_argument_group("daemon options").add_argument)
    getattr(application, "add_arguments", lambda parser: None)(parser)
    return parser


def add_options(add: Callable[..., Any]) -> None:
    """Add the daemon's own options; what stands in brackets is the default."""
    duration: Dict[str, Any] = dict(metavar="SECONDS", type=bounded(float, 1e6))
    add("--app", metavar="FILE.py",
        help="application or script to host (%s)" % os.path.basename(APPLICATION))
    add("--name", help="name of the daemon and its files (the application's)")
    add("--pidfile", metavar="FILE", help="(root: /run/NAME.pid, others: ~/.NAME/pid)")
    add("--logfile", metavar="FILE", help="(/var/log/NAME/NAME.log, ~/.NAME/log; run: none)")
    add("--rundir", metavar="DIR", default="/", help="working directory (%(default)s)")
    add("--chroot", metavar="DIR", help="jail (none; needs root)")
    add("--umask", metavar="OCTAL", type=bounded(lambda text: int(text, 8), 0o777), default=UMASK,
        help="of the application (027)")
    add("--uid", metavar="USER", help="become this user after binding (stay; needs root)")
    add("--gid", metavar="GROUP", help="and this group (the user's)")
    add("--workers", metavar="N", type=bounded(int, 1024),
        help="processes that serve; 0: the daemon itself (as the application says)")
    add("--timeout", default=TIMEOUT, help="to stop, drain; then SIGKILL (%(default)g)", **duration)
    add("--start-timeout", default=START_TIMEOUT, help="to be ready (%(default)g)", **duration)
    add("--log-bytes", metavar="N", type=bounded(int, 1 << 62), default=LOG_BYTES,
        help="rotate the log at this size; 0: never (%(default)d)")
    add("--log-keep", metavar="N", type=bounded(int, 1000), default=LOG_KEEP,
        help="rotated logs to keep (%(default)d)")
    add("--quiet", action="store_true", help="say nothing on success, for cron")
    add("--json", action="store_true", help="status for programs")
    add("-h", "--help", action="store_true", help="show this, and the options of the application")


def expand(argv: List[str]) -> List[str]:
    """Return argv with each @FILE replaced by the options in it."""
    result: List[str] = []
    for argument in argv:
        if not argument.startswith("@"):
            result.append(argument)
            continue
        try:
            with open(argument[1:], encoding="utf-8") as stream:
                result += shlex.split(stream.read(), comments=True)
        except (OSError, ValueError) as error:
            raise Fatal("unable to read %s: %s" % (argument[1:], because(error)), 2)
    return result


def typed(parser: Parser, words: List[str], options: argparse.Namespace) -> Set[str]:
    """Return which options were typed: by a parse without defaults, for one may type a default."""
    blank = argparse.Namespace(**dict.fromkeys(vars(options)))
    found = vars(parser.parse_known_args(words, blank)[0])
    return {key for key, value in found.items() if value is not None}


def name_of(options: argparse.Namespace, arguments: Optional[List[str]]) -> str:
    """Return the daemon's name: --name, or else what it hosts, without .py."""
    hosted = arguments[0] if options.kind == "program" and arguments else options.app_path
    name = re.sub(r"\.py\Z", "", os.path.basename(hosted)) if options.name is None else options.name
    if not re.fullmatch(r"\.*[A-Za-z0-9_-][A-Za-z0-9._-]*", name):     # not . and ..
        raise Fatal("unable to name it %s: letters, digits and ._- only\ntry: --name" % name, 2)
    return str(name)


def parse(argv: List[str]) -> argparse.Namespace:
    """Step 1.  Return the daemon's options; the application's own wait until it is loaded."""
    cut = argv.index("--") if "--" in argv else len(argv)
    words, arguments = expand(argv[:cut]), argv[cut + 1:] if "--" in argv else None
    if words and words[0] in ("-h", "--help"):
        words = ["start"] + words
    parser = build_parser()
    options, extra = parser.parse_known_args(words)
    named = {"action", "name", "pidfile", "timeout", "quiet"}
    options.typed = typed(parser, words, options)
    options.is_bare = not extra and arguments is None and options.typed <= named
    options.kind = "app"
    options.app_path = APPLICATION if options.app is None else absolute(options.app)
    if arguments is not None and options.app is None:
        options.kind = "program"
        if not arguments:
            parser.error("no COMMAND after --")
    options.name = name_of(options, arguments)
    if options.help:
        return options
    if options.action in STARTING:
        if options.app:
            options.code = script_code(options.app_path)
            options.kind = "app" if options.code is None else "script"
        if options.kind != "app" and extra:
            parser.error("unrecognized arguments: %s" % " ".join(extra))
    # argv as typed, with @FILE unread: so a restart reads the file as it is then.
    settle(options, argv[1:cut], arguments)
    return options


def settle(options: argparse.Namespace, argv: List[str], arguments: Optional[List[str]]) -> None:
    """Look up every path and name: after step 1 nothing is relative."""
    try:
        options.cwd = os.getcwd()
    except FileNotFoundError:
        options.cwd = None
    options.argv, options.arguments = argv, arguments
    options.program = arguments[0] if arguments else ""
    if "/" in options.program:
        options.program = absolute(options.program)
    options.files = wanted_files(options)
    options.chroot = absolute(options.chroot) if options.chroot else None
    options.rundir = inside(absolute(options.rundir), options.chroot) or "/"
    options.identity = None
    if options.action in STARTING:
        options.identity = look_up_identity(options.uid, options.gid)
    options.config_prefix = options.files.prefix
    options.may_create = options.action != "run" and not options.quiet
    options.stdin, options.stderr, options.notifier = os.devnull, None, None
    options.sockets, options.predecessor = [], None
    options.has_terminal = options.detached = False
    options.groups = lambda: ()         # the process groups that this process made


def report_fatal(error: Fatal, is_status: bool) -> int:
    """Print why, return the exit status; of `status` 4, for there 1 is an answer: dead."""
    emit(2, "%sdaemonize: fatal: %s\n" % (error.trace, error))
    return 4 if is_status and error.status == 1 else error.status


def main(argv: List[str]) -> int:
    """Do one command; return its exit status."""
    open_stdio()
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)       # a start tidies up
        # Before close_inherited(), which would take systemd's sockets for the caller's litter.
        sockets = inherited_sockets()
        close_inherited()
        # What we make is private until a line gives it a mode; step 5 has the application's umask.
        umask = os.umask(0o077)
        os.environ.setdefault("PATH", PATH)
        options = parse(argv)
        options.sockets, options.caller_umask = sockets, umask
        if options.help:
            is_loaded = options.action in STARTING and options.kind == "app"
            build_parser(load(options.app_path) if is_loaded else None).print_help()
            return 0
        return COMMANDS[options.action](options)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return report_fatal(as_fatal(error), argv[:1] == ["status"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
