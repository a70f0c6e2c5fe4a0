"""Text to token ids and back. Streaming decode emits every character once and whole. No torch, no transformers."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import tokenizers

from kvasir.engine.chat_template import ChatTemplates
from kvasir.engine.errors import ClientError, ConfigError
from kvasir.engine.gguf_tokenizer import read_gguf_tokenizer
from kvasir.engine.hub import eos_token_ids
from kvasir.engine.tokenizer_files import load_tokenizer
from kvasir.engine.tokenizer_models import byte_characters

Piece = Union[str, bytes, None]
"""What a token adds to the text: whole characters, bytes that don't end on a character's border, or nothing at all."""

_DECODERS = frozenset({"ByteLevel", "ByteFallback", "Replace", "Fuse", "Strip", "Metaspace", "WordPiece"})


class Tokenizer:
    """A model's tokenizer and chat templates. All methods may be called from several threads at once."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, eos: Sequence[int], special: Mapping[str, str], templates: ChatTemplates
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._all = _Pieces(backend, skip_special_tokens=False)
        self._plain = _Pieces(backend, skip_special_tokens=True)
        self._showing: dict[frozenset[int], _Pieces] = {frozenset(): self._plain}
        self.templates = templates
        self.special_tokens = dict(special)
        """bos_token, eos_token, ... -> its text, as far as the model has them."""
        self.eos_token_ids = tuple(eos)
        self.bos_token_id = self.token_id(special.get("bos_token"))
        self.eos_token_id = self.token_id(special.get("eos_token"))
        self.added_tokens: Mapping[int, str] = self._all.added
        """Tokens that aren't the model's own words: id -> text."""
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, folder: Path, chat_template: str | None = None) -> Tokenizer:
        """The tokenizer in `folder`; `chat_template` (a file or the template itself) replaces the model's own."""
        loaded = load_tokenizer(folder)
        templates = ChatTemplates.load(folder, loaded.special, override=chat_template)
        eos = loaded.backend.token_to_id(loaded.special.get("eos_token", ""))
        ids = dict.fromkeys((*eos_token_ids(folder), *([] if eos is None else [eos])))
        return cls(loaded.backend, eos=tuple(ids), special=loaded.special, templates=templates)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], chat_template: str | None = None) -> Tokenizer:
        """The tokenizer that a GGUF file's metadata (key -> value) describes; `chat_template` as in `load`."""
        found = read_gguf_tokenizer(metadata)
        templates = ChatTemplates(found.chat_templates, found.special_tokens)
        if chat_template is not None:
            templates = templates.overridden(chat_template)
        return cls(found.backend, eos=found.eos_token_ids, special=found.special_tokens, templates=templates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` as the model wants a plain prompt (often a BOS in front).
        Rendered chats have theirs already: encode those without."""
        return list(self._backend.encode(_checked_text(text), add_special_tokens=add_special_tokens).ids)

    def encode_within(
        self, text: str, pair: str | None = None, *, limit: int | None = None, add_special_tokens: bool = True
    ) -> tuple[list[int], list[int], int]:
        """(ids, segment of each, tokens that were cut off) of a text or of two that are read together, as the model's own
        template joins them. Of what exceeds `limit` tokens the end is cut off: a pair's second text first."""
        backend = self._backend
        parts = [backend.encode(_checked_text(t), add_special_tokens=False) for t in (text, pair) if t is not None]
        lost = 0
        if limit is not None:
            over = sum(map(len, parts)) - limit
            over += backend.num_special_tokens_to_add(pair is not None) if add_special_tokens else 0
            for part in reversed(parts):
                cut = min(max(over, 0), len(part))
                part.truncate(len(part) - cut)
                over, lost = over - cut, lost + cut
        second = parts[1] if pair is not None else None
        joined = backend.post_process(parts[0], second, add_special_tokens)
        return list(joined.ids), list(joined.type_ids), lost

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        checked = [_checked_text(text) for text in texts]
        found = self._backend.encode_batch_fast(checked, add_special_tokens=add_special_tokens)
        return [list(encoding.ids) for encoding in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Malformed UTF-8 becomes U+FFFD as in `DecodeStream`, whose pieces add up to this."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.push(ids) + stream.finish()

    def stream(
        self,
        prompt_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> DecodeStream:
        """Decoder of what follows `prompt_ids`. Special tokens that are `shown` aren't skipped. Without
        `spaces_between_special_tokens` an added token that follows another one is written without the space that decoders
        of whole words (WordPiece) put before each token."""
        if skip_special_tokens:
            return DecodeStream(self._skipping(shown), prompt_ids)
        if spaces_between_special_tokens:
            return DecodeStream(self._all, prompt_ids)
        return _TightStream(self._all, prompt_ids)

    def _skipping(self, shown: frozenset[int]) -> _Pieces:
        if shown not in self._showing:
            self._showing[shown] = _Pieces(self._backend, skip_special_tokens=True, shown=shown)
        return self._showing[shown]

    def token_id(self, token: str | None) -> int | None:
        """Id of the token that is written `token` in the vocabulary."""
        return None if token is None else self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that the token adds in the middle of a text: b" the", or one byte of an emoji."""
        piece = self._all[token_id]
        return piece.encode() if isinstance(piece, str) else piece or b""

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, U+FFFD where they aren't UTF-8."""
        piece = self._all[token_id]
        return piece if isinstance(piece, str) else (piece or b"").decode(errors="replace")

    def definition(self) -> dict[str, Any]:
        """All of it, as a tokenizer.json has it. Takes a second for a large vocabulary."""
        found: dict[str, Any] = json.loads(self._backend.to_str())
        return found

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to read it. `chat_template` replaces the model's for this call,
        `variables` are what else the template knows (enable_thinking, ...). ClientError when it refuses."""
        return self.templates.render(
            messages,
            tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            source=chat_template,
            variables=variables,
        )


class DecodeStream:
    """Text of a growing sequence: `push` returns what became certain, never half a character, `finish` the rest.

    Costs O(1) per token. (tokenizers' own DecodeStream was tried: it raises "Invalid prefix" on 278 of 300 random
    sequences and decodes its whole backlog again for each malformed byte, 282 us a token after 2000.)
    """

    __slots__ = ("_first", "_pending", "_pieces")

    def __init__(self, pieces: _Pieces, prompt_ids: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._first = True
        self._pending = b""
        self.push(_tail(pieces, prompt_ids))

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete."""
        pieces = self._pieces
        text = ""
        for token in ids:
            piece = pieces[token]
            if piece.__class__ is str and not self._first and not self._pending:
                text += piece
            elif piece is not None:
                text += self._join(token, piece)
        return text

    def finish(self) -> str:
        """What is left of a character that never became whole."""
        text, self._pending = self._pieces.replace(self._pending), b""
        return text

    def _join(self, token: int, piece: str | bytes) -> str:
        if self._first:
            self._first = False
            piece = self._pieces.head(token, piece)
        if isinstance(piece, str):
            return self.finish() + piece
        data = self._pending + piece
        text, used = codecs.utf_8_decode(data, self._pieces.errors, False)
        self._pending = data[used:]
        return text


class _TightStream(DecodeStream):
    """Writes added tokens in a row without anything between them."""

    __slots__ = ("_after_added",)

    def __init__(self, pieces: _Pieces, prompt_ids: Sequence[int] = ()) -> None:
        self._after_added = False
        super().__init__(pieces, prompt_ids)

    def push(self, ids: Sequence[int]) -> str:
        """As `DecodeStream.push`."""
        text = ""
        for token in ids:
            content = self._pieces.added.get(token)
            text += self.finish() + content if content and self._after_added else super().push([token])
            self._after_added = content is not None
        return text


class _Pieces(dict[int, Piece]):
    """Token id -> what the token adds to a text that has begun already. Filled as tokens are met."""

    def __init__(
        self, backend: tokenizers.Tokenizer, *, skip_special_tokens: bool, shown: frozenset[int] = frozenset()
    ) -> None:
        super().__init__()
        self._backend = backend
        kinds = _decoder_kinds(backend)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._alphabet = {char: byte for byte, char in byte_characters().items()} if self._byte_level else {}
        added = backend.get_added_tokens_decoder()
        self.added = {token: entry.content for token, entry in added.items()}
        """Tokens that aren't the model's own words: id -> text."""
        self._skipped = {token for token, entry in added.items() if entry.special and skip_special_tokens} - shown
        self._anchor = -1 if self._byte_level else _anchor(backend, added)
        self.errors: Literal["replace", "kvasir_each_byte"] = "kvasir_each_byte" if self._byte_fallback else "replace"
        """How malformed UTF-8 is written: U+FFFD for each maximal subpart, or for each byte (byte fallback)."""

    def __missing__(self, token: int) -> Piece:
        piece = self[token] = self._piece(token)
        return piece

    def head(self, token: int, piece: str | bytes) -> str | bytes:
        """What `token` adds as the first of a text: some tokenizers drop a leading space."""
        if self._byte_level or (isinstance(piece, bytes) and piece >= b"\x80"):
            return piece
        return self._backend.decode([token], skip_special_tokens=False)

    def replace(self, rest: bytes) -> str:
        """Text of an incomplete character."""
        return codecs.utf_8_decode(rest, self.errors, True)[0] if rest else ""

    def _piece(self, token: int) -> Piece:
        text = self._backend.id_to_token(token) if token >= 0 else None
        if text is None or token in self._skipped:
            return None
        if self._byte_level:
            return _text_if_whole(self._bytes(text))
        if self._byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return bytes.fromhex(text[3:5])
        before = self._backend.decode([self._anchor], skip_special_tokens=False)
        return self._backend.decode([self._anchor, token], skip_special_tokens=False)[len(before) :]

    def _bytes(self, text: str) -> bytes:
        """Bytes of a byte-level token; one with characters outside of the alphabet (an added token) is plain text."""
        try:
            return bytes(self._alphabet[char] for char in text)
        except KeyError:
            return text.encode()


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("kvasir_each_byte", _each_byte)


def _text_if_whole(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _tail(pieces: _Pieces, prompt_ids: Sequence[int]) -> list[int]:
    """The last tokens of the prompt that the text after it depends on: back to one that ends a character, at most 4."""
    tail: list[int] = []
    for token in reversed(prompt_ids):
        piece = pieces[token]
        if piece is not None:
            tail.append(token)
        if isinstance(piece, str) or len(tail) == 4:
            break
    return tail[::-1]


def _anchor(backend: tokenizers.Tokenizer, added: Mapping[int, Any]) -> int:
    """A token that is plain text by itself: what another one adds is measured behind it."""
    for token in range(backend.get_vocab_size(with_added_tokens=True)):
        if token not in added and backend.decode([token], skip_special_tokens=False).isalpha():
            return token
    raise ConfigError("the tokenizer has no token that is a plain letter", param="tokenizer")


def _decoder_kinds(backend: tokenizers.Tokenizer) -> frozenset[str]:
    """Names of the decoder's parts. Only those that treat each token by itself can be streamed, others are refused."""
    if not backend.decoder:
        return frozenset()
    config: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    parts: list[dict[str, Any]] = config["decoders"] if config["type"] == "Sequence" else [config]
    kinds = frozenset(str(part["type"]) for part in parts)
    if kinds - _DECODERS:
        names, known = ", ".join(sorted(kinds - _DECODERS)), ", ".join(sorted(_DECODERS))
        raise ConfigError(f"tokenizer.json's decoder {names} isn't supported; supported: {known}", param="tokenizer")
    return kinds


def _checked_text(text: object) -> str:
    if not isinstance(text, str):
        raise ClientError(f"a text to tokenise must be a string, got {type(text).__name__}", param="prompt")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ClientError(f"the text isn't valid Unicode: {error.reason} at {error.start}", param="prompt") from error
    return text
