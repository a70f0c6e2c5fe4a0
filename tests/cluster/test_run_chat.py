"""A conversation with a model that never ends: what Ctrl-C does, wherever it strikes."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvasir.cluster.run_chat import Conversation


class Endless:
    """Answers for ever; Ctrl-C is pressed before its third token, inside the task or while the loop waits."""

    def __init__(self, *, inside: bool) -> None:
        self.inside, self.open = inside, 0

    def render_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [1]

    async def generate(self, prompt: list[int], sampling: Any, request_id: str) -> AsyncIterator[Any]:
        self.open += 1
        try:
            for count in range(1, 10**6):
                if count == 3:
                    self._press()
                await asyncio.sleep(0.001)
                yield SimpleNamespace(outputs=[SimpleNamespace(text="x" * count, token_ids=[1] * count)])
        finally:
            self.open -= 1

    def _press(self) -> None:
        if self.inside:
            signal.raise_signal(signal.SIGINT)
        else:
            asyncio.get_running_loop().call_later(0.01, signal.raise_signal, signal.SIGINT)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("inside", [True, False])
def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(inside: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = Endless(inside=inside)
    conversation = Conversation(model, None, {}, verbose=False)  # type: ignore[arg-type]
    for turn in (1, 2):
        assert conversation.ask("go on") is False
        assert capsys.readouterr().out.endswith(" [stopped]\n")
        assert model.open == 0, "the request must end with the answer"
        assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * turn
    assert conversation.messages[1]["content"].startswith("xx")
    with pytest.raises(KeyboardInterrupt):  # between answers it is what it always was
        signal.raise_signal(signal.SIGINT)
    conversation.close()
