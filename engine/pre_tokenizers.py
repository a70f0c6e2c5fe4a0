"""How byte-pair vocabularies cut a text into words before they merge, by the names that GGUF files give it.

A kind is a chain of patterns: each splits what the one before left into its matches and what lies between them. The
patterns are those of the models' own tokenizers; where llama.cpp (src/llama-vocab.cpp) writes a different one because
its own regular expressions can do less, the model's counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tokenizers import Regex, pre_tokenizers

from kvasir.engine.errors import ConfigError


@dataclass(frozen=True)
class PreTokenizer:
    """The facts of one kind."""

    patterns: tuple[str, ...]
    mapped: tuple[str, ...] = ()
    """Further ones, that see GPT-2's printable bytes: there a half of some letters is a number."""
    whole_words: bool = False
    """A word that is in the vocabulary is that token, whatever the merges make of it."""
    add_bos: bool = False
    """A plain prompt begins with BOS where the file doesn't say."""
    nfc: bool = False
    """Text is brought to Unicode's composed form first."""
    raw: bool = False
    """Tokens are text with U+2581 for a space, and <0xNN> for single bytes; otherwise GPT-2's printable bytes."""

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The chain for `tokenizers`; byte-level kinds end in bytes."""
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(_regex(pattern), "isolated") for pattern in self.patterns
        ]
        if not self.raw:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        steps += [pre_tokenizers.Split(_regex(pattern), "isolated") for pattern in self.mapped]
        return pre_tokenizers.Sequence(steps)


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # tokenizers raises Exception itself
        text = f"the tokenizer's pattern {pattern!r:.80} isn't a regular expression: {error}"
        raise ConfigError(text, param="tokenizer") from error


def pre_tokenizer(name: str) -> PreTokenizer:
    """The kind that `tokenizer.ggml.pre` names; ConfigError for an unknown one."""
    if name not in _KINDS:
        known = ", ".join(sorted(_KINDS))
        raise ConfigError(f"the pre-tokenizer {name!r} (tokenizer.ggml.pre) isn't supported; supported: {known}")
    return _KINDS[name]


_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LINES = r"[^\n]+|\n+"
_HAN_KANA = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_HAN_HANGUL = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"

_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10C7}\x{10CD}\x{10D0}-\x{10FF}\x{1C80}-\x{1C88}\x{2D00}-\x{2D2D}"
    r"\x{A790}-\x{A7FA}\x{AB30}-\x{AB68}\x{10570}-\x{105BC}\x{16E40}-\x{16E7F}\x{1D400}-\x{1D7CB}\x{1DF00}-\x{1DF1E}]]"
)
"""The letters that DeepSeek-LLM's pattern lists range by range: the cased ones, without some newer blocks."""

_ASIAN = (
    r"[\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{F900}-\x{FAFF}\x{3040}-\x{309F}\x{30A0}-\x{30FF}\x{FF65}-\x{FF9F}"
    r"\x{2F00}-\x{2FDF}\x{E00}-\x{E7F}\x{E80}-\x{EFF}\x{1780}-\x{17FF}\x{1000}-\x{109F}\x{AA60}-\x{AA7F}"
    r"\x{A9E0}-\x{A9FF}\x{AC00}-\x{D7AF}\x{1100}-\x{11FF}]+"
)
_YOUTU = (
    r"[\x{AC00}-\x{D7A3}\x{3131}-\x{318E}]+|[\x{FF01}\x{2026}\x{201C}\x{201D}\x{2018}\x{2019}\x{2014}\x{FF1A}\x{FF1B}"
    r"\x{FF0C}\x{3001}-\x{303F}\x{FE30}-\x{FE4F}]+|[\x{3105}-\x{312F}]+|" + _HAN_KANA
)


def _cl100k(
    digits: str, letters: str = r"\p{L}+", signs: str = r"[^\s\p{L}\p{N}]+[\r\n]*", suffix: str = _SUFFIX
) -> str:
    """OpenAI's cl100k pattern and its relatives: suffixes, words with one sign before them, digits, signs, spaces."""
    return rf"{suffix}|[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}| ?{signs}|{_SPACES}"


def _o200k(
    digits: str, suffix: str = _SUFFIX + "?", without: str = "", signs: str = r"[^\s\p{L}\p{N}]+[\r\n/]*"
) -> str:
    """OpenAI's o200k pattern and its relatives: as before, and a word ends where a capital follows a small letter."""
    upper, lower = (
        rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]",
        rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{without}]",
    )
    sign = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{sign}{upper}*{lower}+{suffix}|{sign}{upper}+{lower}*{suffix}"
    return rf"{words}|{digits}| ?{signs}|{_SPACES}"


def _deepseek(signs: str = r"[\p{P}\p{S}]+[\r\n]*", spaces: str = _SPACES) -> str:
    """DeepSeek-V3's main pattern: a word takes its accents along, and one ASCII sign before Latin letters."""
    ascii_word = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    return rf"{ascii_word}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?{signs}|{spaces}"


_LLAMA3 = PreTokenizer((_cl100k(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer((_cl100k(r"\p{N}"),))
_WORDS = PreTokenizer((_GPT2,))
_DIGIT_THEN_WORDS = PreTokenizer((r"\p{N}", _GPT2))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _HAN_KANA, _deepseek()))
_GPT4O = PreTokenizer((_o200k(r"\p{N}{1,3}"),))
_BLOOM = PreTokenizer((r" ?[^(\s|.,!?…。，、।۔،)]+",))
_AYA = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", *_GPT4O.patterns))
_BAILING = PreTokenizer(
    (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",)
)

_KINDS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "afmoe": PreTokenizer((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _ASIAN, _deepseek())),
    "chameleon": PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_HANGUL, r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?{_CASED}+",
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
            r"\s+$",
            _HAN_HANGUL,
            r"\p{N}+",
        )
    ),
    "exaone-moe": PreTokenizer(
        (
            rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        )
    ),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2), mapped=(r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gemma4": PreTokenizer((_LINES,), add_bos=True, raw=True),
    "jais-2": PreTokenizer(
        (
            _LLAMA3.patterns[0].removesuffix(r"\s+(?!\S)|\s+")
            + "|".join(rf"\s{{{2**k}}}(?!\S)" for k in range(9, 1, -1))
            + r"|\s{1,2}(?!\S)|\s{1}",
        )
    ),
    "kimi-k2": PreTokenizer(
        (r"\p{Han}+|" + _o200k(r"\p{N}{1,3}", without=r"&&[^\p{Han}]", signs=r"[^\s\p{L}\p{N}]+[\r\n]*"),)
    ),
    "laguna": PreTokenizer((_LINES, *_QWEN2.patterns)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _cl100k(r"\p{N}+")), whole_words=True),
    "qwen35": PreTokenizer((_cl100k(r"\p{N}", r"[\p{L}\p{M}]+", r"[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),), nfc=True),
    "sarvam-moe": PreTokenizer((_LINES,), raw=True),
    "seed-coder": PreTokenizer((_cl100k(r"\p{N}", signs=r"[^\s\p{L}\p{N}\r\n]+"),)),
    "spark2_5": PreTokenizer(
        (r"\p{N}{1,3}", _HAN_KANA, _deepseek(r"[\p{P}\p{S}]+", r"[\r\n]|\s+(?!\S)|\s+"), r"\p{N}")
    ),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "tekken": PreTokenizer((_o200k(r"\p{N}", suffix=""),), whole_words=True, add_bos=True),
    "ufakzeka": PreTokenizer((_QWEN2.patterns[0].removeprefix(_SUFFIX + "|"),)),
    "viking": PreTokenizer((*_BLOOM.patterns, r"\p{N}")),
    "youtu": PreTokenizer((_YOUTU, _o200k(r"\p{N}")), whole_words=True),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), _BAILING),
    **dict.fromkeys(("bloom", "gpt3-finnish", "poro-chat"), _BLOOM),
    **dict.fromkeys(("cohere2moe", "tiny_aya"), _AYA),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "hy_v4", "joyai-llm"), _DEEPSEEK3),
    **dict.fromkeys(
        ("codeshell", "exaone", "mellum2", "minerva-7b", "refact", "smollm", "starcoder"), _DIGIT_THEN_WORDS
    ),
    "command-r": replace(_DIGIT_THEN_WORDS, nfc=True),
    **dict.fromkeys(("gpt-4o", "kanana2", "llama4", "minimax-m2", "talkie"), _GPT4O),
    "granite-embed-multi-97m": replace(_GPT4O, whole_words=True),
    "granite-embed-multi-311m": PreTokenizer((_LINES,), add_bos=True, raw=True),
    **dict.fromkeys(("chatglm-bpe", "dbrx", "glm4", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(
        ("falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral"),
        replace(_LLAMA3, whole_words=True, add_bos=True),
    ),
    **dict.fromkeys(("grok-2", "hunyuan", "megrez", "solar-open", "stablelm2"), _QWEN2),
    **dict.fromkeys(("deepseek-r1-qwen", "f2llmv2", "kormo", "qwen2"), replace(_QWEN2, nfc=True)),
    **dict.fromkeys(
        ("a.x-4.0", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "jina-de", "jina-es"), _WORDS
    ),
    **dict.fromkeys(("jina-v1-en", "jina-v2-code", "jina-v2-de", "jina-v2-es", "mellum", "modern-bert"), _WORDS),
    **dict.fromkeys(("phi-2", "roberta-bpe", "trillion"), _WORDS),
    **dict.fromkeys(("mpt", "olmo"), replace(_WORDS, nfc=True)),
}
