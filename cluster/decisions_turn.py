"""Where an answer is the model's own: behind what its chat template writes in front of it, before what ends its turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from kvasir.cluster.call import Conversation
from kvasir.cluster.reading import thoughts_begun
from kvasir.cluster.served_model import ServedModel
from kvasir.engine.errors import UnsupportedError
from kvasir.engine.tokenizer import Tokenizer

_PROBE = "probe answer"
_NEAR = 16
"""Characters in front of an answer that settle how it is split into tokens."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Of one model, for conversations that are rendered with the same variables."""

    shown: bool
    """The answer stands where the template shows one that was given; else behind the prompt for it. They differ where that
    prompt begins thoughts, or leaves the model to choose a channel."""
    end: tuple[int, ...]
    """The token with which the model ends its turn: without it an answer that begins another one would count for both."""

    @classmethod
    async def of(cls, model: ServedModel, conversation: Conversation, ends: Sequence[int]) -> Turn:
        """ends: the model's end-of-text tokens. UnsupportedError when the template doesn't show what the model answered."""
        asked = await model.render(conversation)
        before, after = await _shown(model, conversation)
        tokenizer = model.need_tokenizer("questions")
        found = [token for token in tokenizer.encode(after, add_special_tokens=False)[:4] if token in ends]
        return cls(before.startswith(asked) or _goes_on(model, asked, before), tuple(found[:1] or ends[:1]))

    async def before(self, model: ServedModel, conversation: Conversation) -> str:
        """Everything in front of the answer."""
        return (await _shown(model, conversation))[0] if self.shown else await model.render(conversation)

    def answers(self, tokenizer: Tokenizer, before: str, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each answer, behind those of `before` without the spaces at its end."""
        head = before.rstrip(" ")
        near, space = head[-_NEAR:], before[len(head) :]
        known = tokenizer.encode(near, add_special_tokens=False)
        found = []
        for text in texts:
            ids = tokenizer.encode(near + space + text, add_special_tokens=False)
            apart = ids[: len(known)] == known
            own = ids[len(known) :] if apart else tokenizer.encode(space + text, add_special_tokens=False)
            found.append([*own, *self.end])
        return found


def _goes_on(model: ServedModel, asked: str, before: str) -> bool:
    """Something else than the answer comes behind the prompt `asked`, which isn't how the answer's text begins."""
    if model.tools is not None and model.tools.whole is not None:
        return True
    begun, open_ = (False, True) if model.thoughts is None else thoughts_begun(asked, model.thoughts)
    unknown = asked[len(before) :].strip() if asked.startswith(before) else ""
    return begun or (open_ and bool(unknown))


async def _shown(model: ServedModel, conversation: Conversation) -> tuple[str, str]:
    """What stands in front of an answer that was given, and behind it."""
    said = [*conversation.messages, {"role": "assistant", "content": _PROBE}]
    text = await model.render(dataclasses.replace(conversation, messages=said, add_generation_prompt=False))
    before, probe, after = text.rpartition(_PROBE)
    if not probe:
        why = f"the chat template of {model.name!r} doesn't show what the model answered, so no answer can be scored"
        raise UnsupportedError(why, param="questions")
    return before, after
