"""Which stored response or conversation holds an item, so that an item can be named by its id alone.

Triggers keep the table, whoever writes: an item is there as long as what holds it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import orjson

Json = dict[str, Any]


def _of_response(rows: str, column: str, path: str) -> str:
    """Add the items in one column of `rows`, each called `new`; a trigger has one such row by itself."""
    return f"""
    INSERT OR IGNORE INTO item SELECT json_extract(value, '$.id'), new.id, -1
    FROM {rows}json_each(CAST(new.{column} AS TEXT), '{path}') WHERE new.kind = 'response';"""


_READ, _WRITTEN = ("private", "$.items"), ("body", "$.output")
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS item (
    id TEXT NOT NULL, object TEXT NOT NULL REFERENCES object (id) ON DELETE CASCADE,
    number INTEGER NOT NULL,  -- of its part; -1: it is in the object itself
    PRIMARY KEY (id, object, number)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS held ON item (object, number);
CREATE TRIGGER IF NOT EXISTS response_put AFTER INSERT ON object BEGIN
    {_of_response("", *_READ)}{_of_response("", *_WRITTEN)}
END;
CREATE TRIGGER IF NOT EXISTS response_changed AFTER UPDATE OF body ON object BEGIN {_of_response("", *_WRITTEN)} END;
CREATE TRIGGER IF NOT EXISTS said AFTER INSERT ON part
WHEN (SELECT kind FROM object WHERE id = new.id) = 'conversation' BEGIN
    INSERT OR IGNORE INTO item VALUES (json_extract(CAST(new.data AS TEXT), '$.id'), new.id, new.number);
END;
CREATE TRIGGER IF NOT EXISTS dropped AFTER DELETE ON part BEGIN
    DELETE FROM item WHERE object = old.id AND number = old.number;
END;
"""
FILL = f"""
{_of_response("object AS new, ", *_READ)}{_of_response("object AS new, ", *_WRITTEN)}
INSERT OR IGNORE INTO item SELECT json_extract(CAST(data AS TEXT), '$.id'), id, number
FROM part WHERE id IN (SELECT id FROM object WHERE kind = 'conversation');
"""
"""For a file from before the table."""
_HOLDER = """
SELECT item.object, item.number FROM item JOIN object ON object.id = item.object
WHERE item.id = ? AND principal = ? AND expires > ? ORDER BY object.number DESC, item.number DESC LIMIT 1
"""


def items_of(db: sqlite3.Connection, ids: Sequence[str], principal: str) -> dict[str, Json]:
    """Those of the items that there are, by id; of several with one id the newest."""

    @cache
    def of_response(object_id: str) -> dict[str, Json]:
        row = db.execute("SELECT private, body FROM object WHERE id = ?", (object_id,)).fetchone()
        private, body = map(orjson.loads, row)
        return {item["id"]: item for item in (*private["items"], *body["output"])}

    found: dict[str, Json] = {}
    for item_id in dict.fromkeys(ids):
        holder = db.execute(_HOLDER, (item_id, principal, time.time())).fetchone()
        if holder is not None and holder[1] < 0:
            found[item_id] = of_response(holder[0])[item_id]
        elif holder is not None:
            (data,) = db.execute("SELECT data FROM part WHERE id = ? AND number = ?", holder).fetchone()
            found[item_id] = orjson.loads(data)
    return found
