"""The SQLite file of the store: where it lies, and what its tables are."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvasir.cluster import stored_items
from kvasir.engine.errors import ConfigError

VERSION = 1
MEMORY = ":memory:"
_SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA foreign_keys = ON;
CREATE TABLE IF NOT EXISTS object (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, principal TEXT NOT NULL,
    created REAL NOT NULL, expires REAL NOT NULL, size INTEGER NOT NULL, open INTEGER NOT NULL,
    owner TEXT NOT NULL, lease REAL NOT NULL, body BLOB NOT NULL, private BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS listed ON object (principal, kind, number);
CREATE INDEX IF NOT EXISTS expiring ON object (expires);
CREATE INDEX IF NOT EXISTS working ON object (kind, lease) WHERE open;
CREATE TABLE IF NOT EXISTS part (
    id TEXT NOT NULL REFERENCES object (id) ON DELETE CASCADE, number INTEGER NOT NULL, failed INTEGER NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY (id, number)) WITHOUT ROWID;
"""


def default_path(environ: Mapping[str, str]) -> str:
    """Where state is kept when nobody says where."""
    state = Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return str(state / "kvasir" / "state.sqlite3")


def opened(path: str) -> sqlite3.Connection:
    try:
        if path == MEMORY:
            return _prepared(path)
        folder = Path(path).parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone(folder):
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # prompts and answers are in it
            return _prepared(path)
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"--state-path {path}: {error}", param="state_path") from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of gateways that start at once one turns on write-ahead logging: SQLite lets two of them wait for each other, until one's
    timeout."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _prepared(path: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
    try:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"it has version {version} of the state, this program writes {VERSION}")
        fill = "" if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'item'").fetchone() else stored_items.FILL
        db.executescript(f"{_SCHEMA}BEGIN IMMEDIATE;{stored_items.SCHEMA}{fill}COMMIT;PRAGMA user_version = {VERSION};")
    except BaseException:
        db.close()
        raise
    return db
