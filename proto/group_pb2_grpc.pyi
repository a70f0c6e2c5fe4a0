from typing import Any

class GroupStub:
    def __init__(self, channel: Any) -> None: ...
    Connect: Any

class GroupServicer:
    def Connect(self, request_iterator: Any, context: Any) -> Any: ...

def add_GroupServicer_to_server(servicer: Any, server: Any) -> None: ...
