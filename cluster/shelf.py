"""What a gateway keeps for its clients, behind both of its doors."""

from __future__ import annotations

from collections.abc import Mapping

from kvasir.cluster.background import Background
from kvasir.cluster.batches_api import Batches
from kvasir.cluster.config import GatewayConfig
from kvasir.cluster.conversations_api import Conversations
from kvasir.cluster.desk import Desk
from kvasir.cluster.files import Files
from kvasir.cluster.responses import Responses
from kvasir.cluster.store import Store
from kvasir.cluster.stored_chats import Chats


class Shelf:
    """One store, the work on what is in it, and what can be asked of each kind of it."""

    def __init__(self, desk: Desk, config: GatewayConfig, environ: Mapping[str, str]) -> None:
        self.ttl_s = config.response_ttl_s
        self.store = Store.open(config.state_path, config.max_state_bytes, environ)
        self.background = Background(desk, self.store)
        self.chats = Chats(self.store, self.ttl_s)
        self.conversations = Conversations(self.store, self.ttl_s)
        self.responses = Responses(desk, self.store, self.background, self.ttl_s)
        self.files = Files(self.store)
        self.batches = Batches(self.store, self.background, self.ttl_s)

    async def close(self) -> None:
        """End what runs; what is stored stays."""
        await self.background.close()
        self.store.close()
