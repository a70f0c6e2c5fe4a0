"""Worker: a rank other than 0. Connects to rank 0, loads its share of the model, then executes what it is told.

`python -m kvasir.engine.worker` reads what it needs to know as JSON from its standard input.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from kvasir.engine.config import EngineConfig
from kvasir.engine.errors import KvasirError

if TYPE_CHECKING:
    from kvasir.engine.exchange import Exchange
    from kvasir.engine.load import Loaded
    from kvasir.engine.spoke import Spoke

PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
ECHOES = ("closed by peer", "reset by peer", "is gone", "imed out")
"""What an exchange says when another rank is to blame: no traceback is worth printing then."""


def run(config: EngineConfig, address: str, token: str, rank: int, *, gone: Callable[[], None]) -> None:
    """Serve as this rank until rank 0 is done (returns) or gone (`gone` is called, in another thread). What fails here is
    told to rank 0 and raised."""
    from kvasir.engine.spoke import Spoke
    from kvasir.engine.watcher import Watcher

    spoke = Spoke(address, token, rank, os.getpid(), gone=gone)
    beside = spoke.host == address.rpartition(":")[0]  # rank 0, which looks at its node's processes itself
    watcher = None
    try:
        watcher = None if beside else Watcher(address, token, rank)
        _serve(config, spoke, rank, token)
    except EOFError:
        return
    except Exception as error:  # whatever it is, rank 0 must hear of it
        _tell(spoke, config, error)
        raise
    finally:
        spoke.close()
        if watcher is not None:
            watcher.close()


def _serve(config: EngineConfig, spoke: Spoke, number: int, token: str) -> None:
    from kvasir.engine.answers import Answers
    from kvasir.engine.codec import decode_step
    from kvasir.engine.executor import grammars_of, rank_of
    from kvasir.engine.frames import FETCHED, encode_tickets
    from kvasir.engine.load import load
    from kvasir.engine.memory import resolve_device
    from kvasir.engine.mesh import Place, join
    from kvasir.engine.reach import check_reach, meeting_place
    from kvasir.engine.remote_grammars import GrammarServer

    spoke.send("awake")  # its libraries are here: from now on others may wait for it
    kind, content = spoke.receive()
    assert kind == "welcome"
    said = json.loads(content)
    place = Place(rank=number, **said["place"])
    host, port = said["store"]
    store = meeting_place(host, port, place.size, config.collective_timeout)
    check_reach(store, place, spoke.host, config.collective_timeout)
    device = resolve_device(config, place.device_index)
    one_shot = not config.disable_custom_all_reduce
    mesh = join(place, store, device, spoke.host, config.collective_timeout, token, one_shot=one_shot)
    mesh.assemble = spoke.assemble
    loaded = load(config, mesh)
    rank = rank_of(config, loaded, grammars := grammars_of(loaded))
    server = GrammarServer(grammars, lambda frame: spoke.send("grammar", frame))
    if (tiers := loaded.tiers) is not None:
        tiers.on_fetched = lambda ticket, count: spoke.send("fetched", FETCHED.pack(ticket, count))
    spoke.ready(said["board"], place.size)
    answers = Answers(spoke, partial(_tell, spoke, config), apart=rank.lags) if place.samples else None
    try:
        while True:
            kind, content = spoke.receive()
            if kind == "serve":
                rank.exchange = _lend(loaded, spoke, **json.loads(content))
                continue
            if kind == "grammar":
                server.take(content)
                continue
            step, results = decode_step(content)
            for result in results:
                rank.learn(result.step, result.token_ids)
            outcome = rank.launch(step)
            if step.moves is not None and step.moves.landing:
                spoke.send("spoiled", encode_tickets(outcome.spoiled))
            if answers is not None:
                answers.tell(outcome)
    except EOFError:
        if rank.exchange is not None:
            rank.exchange.close()
        if tiers is not None:
            tiers.close()
        raise
    finally:
        if answers is not None:
            answers.close()


def _tell(spoke: Spoke, config: EngineConfig, error: BaseException) -> None:
    """Rank 0, what has failed here."""
    spoke.send("failed", json.dumps(_explained(error, config)).encode())


def _lend(loaded: Loaded, spoke: Spoke, host: str | None, secret: str) -> Exchange | None:
    """Take part in the exchange of blocks with other groups, from now on."""
    from kvasir.engine.frames import FETCHED

    exchange = loaded.exchange()
    if exchange is not None:
        exchange.puller.on_fetched = lambda *said: spoke.send("fetched", FETCHED.pack(*said))
    spoke.send("serving", b"" if exchange is None else exchange.listen(host or spoke.host, secret).encode())
    return exchange


def config_of(said: Mapping[str, Any]) -> EngineConfig:
    """The configuration that `json_of` wrote."""
    lists = {name: tuple(value) for name, value in said.items() if isinstance(value, list)}
    return EngineConfig(**{**said, **lists})


def json_of(config: EngineConfig) -> dict[str, Any]:
    """As JSON has it."""
    return asdict(config)


def _explained(error: BaseException, config: EngineConfig) -> dict[str, Any]:
    """`final`: the configuration is to blame. An exchange that ended late is another rank's fault, not of a line of ours."""
    from kvasir.engine.executor import hangs
    from kvasir.engine.reach import UnreachableError

    if isinstance(error, UnreachableError):
        return {"why": str(error), "final": False}
    if isinstance(error, KvasirError):
        return {"why": error.message, "final": True, "param": error.param}
    if isinstance(error, RuntimeError) and "imed out" in str(error) and "--collective-timeout" not in str(error):
        return {"why": hangs(config), "final": False}
    where = traceback.extract_tb(error.__traceback__)
    at = f" (at {os.path.basename(where[-1].filename)}:{where[-1].lineno})" if where else ""
    return {"why": f"{type(error).__name__}: {error}{at}", "final": False}


def _woken_by_orphaning() -> None:
    """Linux continues this process when the one that started it ends: should it stand still (SIGSTOP) it sees so, and ends, too.
    That happens as well when the thread that started it ends, and changes nothing then."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGCONT)


def main() -> None:
    """The process of a local rank; `processes` starts it."""
    _woken_by_orphaning()
    said = json.load(sys.stdin)
    try:
        run(config_of(said["config"]), said["address"], said["token"], said["rank"], gone=lambda: os._exit(1))
    except Exception as error:
        echo = isinstance(error, RuntimeError) and any(words in str(error) for words in ECHOES)
        if not (isinstance(error, KvasirError) or echo):  # rank 0 says it
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)  # the interpreter's own end would wait for the device, which may wait for another rank


if __name__ == "__main__":
    main()
