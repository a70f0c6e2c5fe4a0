"""Generated training conversations, one maker for each skill, and the held-out side of each.

Held out by construction: pairs of addends, wordings of small talk, sets of JSON fields and tool arguments are divided
by a hash; random words and facts are never drawn twice. A maker is told which side to draw from, so that training
cannot leak.
"""

from __future__ import annotations

import json
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

WRITTEN = json.loads(Path(__file__).with_name("talk.json").read_text(encoding="utf-8"))
WORDS, NAMES, CITIES = (" ".join(WRITTEN[kind]).split() for kind in ("words", "names", "cities"))
TALK: dict[str, dict[str, list[str]]] = WRITTEN["talk"]
SYSTEMS: list[str] = WRITTEN["systems"]


@dataclass
class Turn:
    """One message. `loss` marks an answer to learn; `hard` marks the part whose accuracy is tracked."""

    role: str
    content: str
    skill: str = ""
    top: bool = False

    @property
    def loss(self) -> bool:
        """Only the assistant's words are learned in full."""
        return self.role == "assistant"


@dataclass
class Chat:
    """A conversation with the tools it may call."""

    turns: list[Turn]
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Level:
    """How long the exercises may be at present; raised as they are learned."""

    copy: float = 6.0
    recall: float = 3.0


@dataclass
class Maker:
    """The source of chance, the side of the split, the level, and the room left in the row (in tokens)."""

    rng: random.Random
    held_out: bool = False
    level: Level = field(default_factory=Level)
    room: int = 1024
    beyond: list[str] = field(default_factory=list)

    def length(self, low: int, high: float) -> int:
        """Log-uniform, with a share of longest ones: short exercises keep teaching, long ones are the goal."""
        high = max(low, int(high))
        if self.rng.random() < 0.4:
            return self.rng.randint(max(low, int(high * 0.7)), high)
        return round(math.exp(self.rng.uniform(math.log(low), math.log(high))))


def share(text: str) -> float:
    """A fixed number in [0, 1) for a text: the same side of the split in every run and on every machine."""
    return zlib.crc32(text.encode()) / 2**32


def is_held_out(text: str) -> bool:
    """One in ten."""
    return share(text) < 0.1


def pick(make: Maker, options: list[str], template: str = "{}") -> str:
    """Draw an option on the maker's side of the split."""
    while True:
        option = make.rng.choice(options)
        if is_held_out(template.format(option)) == make.held_out:
            return option


# -- sums -------------------------------------------------------------------------------------------------------------

SUM_ASKED = [
    "What is {a} + {b}?", "{a} + {b}", "{a} + {b} =", "What is {a} plus {b}?", "Add {a} and {b}.",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.", "What is the sum of {a} and {b}?", "{a}+{b}", "Compute {a} + {b}.", "What is {a}+{b}?",
    "{a} plus {b}?", "Please add {a} and {b}.",
]  # fmt: skip


def addends(make: Maker) -> tuple[int, int]:
    """Two-digit numbers; both orders of a pair are on the same side."""
    while True:
        a, b = make.rng.randint(10, 99), make.rng.randint(10, 99)
        if is_held_out(f"sum {min(a, b)} {max(a, b)}") == make.held_out:
            return a, b


def make_sum(make: Maker) -> Chat:
    """Several sums in one conversation: the answers are short, so one to a row would teach little."""
    turns: list[Turn] = []
    for _ in range(1 if make.held_out else make.rng.randint(1, max(1, min(6, make.room // 30)))):
        a, b = addends(make)
        turns.append(Turn("user", make.rng.choice(SUM_ASKED).format(a=a, b=b)))
        answer = f"{a} + {b} = {a + b}" if make.held_out or make.rng.random() < 0.9 else f"{a + b}"
        if answer == f"{a + b}":
            turns[-1].content += " Just the number."
        turns.append(Turn("assistant", answer, "sum", True))
    return Chat(turns)


# -- copying ----------------------------------------------------------------------------------------------------------

COPY_ASKED = ["Repeat exactly: {}", "Repeat exactly: {}", "Repeat: {}", "Repeat after me: {}", "Copy this text: {}",
              "Say exactly this: {}", "Repeat the following words: {}", "Echo: {}", "Copy exactly: {}"]  # fmt: skip


@cache
def copy_pool() -> list[str]:
    """Words that a copy exercise draws from: plain words mostly, with some names and places."""
    return WORDS + NAMES + CITIES


def copy_words(make: Maker, count: int) -> str:
    """Random words, sometimes with numbers among them."""
    words = make.rng.choices(copy_pool(), k=count)
    if not make.held_out and make.rng.random() < 0.2:
        words = [str(make.rng.randint(0, 999)) if make.rng.random() < 0.3 else w for w in words]
    return " ".join(words)


def make_copy(make: Maker) -> Chat:
    """Copies of random words; the longest length follows the level."""
    turns: list[Turn] = []
    left = make.room
    while True:
        high = min(make.level.copy, (left - 20) / 2.3)
        if turns and (high < 3 or make.rng.random() < 0.3):
            return Chat(turns)
        count = make.length(3, high)
        text = copy_words(make, count)
        turns.append(Turn("user", make.rng.choice(COPY_ASKED).format(text)))
        turns.append(Turn("assistant", text, "copy", count >= 0.6 * make.level.copy))
        left -= int(count * 2.3) + 20


# -- recall -----------------------------------------------------------------------------------------------------------

# (fact, question); the answer repeats the fact, so the key stands right before the value again.
FACTS = [
    ("The code of {k} is {v}.", "What is the code of {k}?"),
    ("The code of {k} is {v}.", "What is the code of {k}?"),
    ("The number of {k} is {v}.", "What is the number of {k}?"),
    ("The price of {k} is {v}.", "What is the price of {k}?"),
    ("The word for {k} is {v}.", "What is the word for {k}?"),
    ("{k} is {v}.", "What is {k}?"),
    ("{k}: {v}", "{k}?"),
    ("{k} = {v}", "{k} = ?"),
    ("The friend of {k} is {v}.", "Who is the friend of {k}?"),
    ("The key of {k} is {v}.", "Which is the key of {k}?"),
]  # fmt: skip

RECALL_OPENED = ["Remember these facts. {}", "{}", "Here are some facts:\n{}", "Read this. {}", "{}", "Facts:\n{}"]


def fact_values(make: Maker, form: str, count: int) -> list[str]:
    """Distinct values of one kind; codes are numbers of a fixed width, words are words."""
    if "word" in form or "friend" in form:
        return make.rng.sample(NAMES if "friend" in form and count <= len(NAMES) else WORDS, count)
    if form[:-1] == "{k} is {v}" and make.rng.random() < 0.5:
        return make.rng.sample(WORDS, count)
    width = 4 if make.held_out or make.rng.random() < 0.5 else make.rng.randint(2, 3)
    return [str(make.rng.randint(10 ** (width - 1), 10**width - 1)) for _ in range(count)]


def recall_answer(form: str, key: str, value: str) -> str:
    """The fact as it was told."""
    return form.format(k=key, v=value)


def make_recall(make: Maker) -> Chat:
    """A list of facts, then questions about several of them in a random order."""
    count = make.length(2, min(make.level.recall, (make.room - 70) / 11.5))
    form, asked = make.rng.choice(FACTS[:2] if make.held_out else FACTS)
    keys = make.rng.sample(WORDS, count)
    facts = dict(zip(keys, fact_values(make, form, count), strict=True))
    text = make.rng.choice(["\n", " "] if form.endswith(".") else ["\n"]).join(
        recall_answer(form, *f) for f in facts.items()
    )
    opened = make.rng.choice(RECALL_OPENED).format(text)
    left = make.room - count * 12 - 30
    asks = 1 if make.held_out else max(1, min(make.rng.randint(3, 12), count, left // 28))
    chosen = make.rng.sample(keys, asks)
    turns = recall_opening(make, opened, asked.format(k=chosen[0]))
    for index, key in enumerate(chosen):
        if index:
            turns.append(Turn("user", asked.format(k=key)))
        turns.append(
            Turn("assistant", recall_answer(form, key, facts[key]), "recall", count >= 0.6 * make.level.recall)
        )
    return Chat(turns)


def recall_opening(make: Maker, facts: str, question: str) -> list[Turn]:
    """The facts may stand in the system prompt, in the question itself, or in a turn of their own."""
    where = make.rng.random()
    if where < 0.25:
        return [Turn("system", facts), Turn("user", question)]
    if where < 0.8:
        return [Turn("user", f"{facts}\n{question}")]
    return [Turn("user", facts), Turn("assistant", "I will remember that.", "talk"), Turn("user", question)]


# -- JSON -------------------------------------------------------------------------------------------------------------

# field: (JSON type, how a value is drawn)
Draw = Callable[[random.Random], Any]
FIELDS: dict[str, tuple[str, Draw]] = {
    "name": ("string", lambda r: r.choice(NAMES)), "age": ("integer", lambda r: r.randint(18, 80)),
    "city": ("string", lambda r: r.choice(CITIES)),
    "email": ("string", lambda r: r.choice(NAMES).lower() + "@mail.com"),
    "active": ("boolean", lambda r: r.random() < 0.5), "price": ("number", lambda r: r.randint(1, 99) + 0.5),
    "count": ("integer", lambda r: r.randint(1, 99)), "title": ("string", lambda r: r.choice(WORDS)),
    "color": ("string", lambda r: r.choice(["red", "blue", "green", "yellow", "black", "white"])),
    "tags": ("array of strings", lambda r: r.sample(WORDS, 2)), "id": ("integer", lambda r: r.randint(100, 999)),
    "score": ("number", lambda r: r.randint(1, 9) + 0.5), "year": ("integer", lambda r: r.randint(1900, 2025)),
    "country": ("string", lambda r: r.choice(["Norway", "Sweden", "France", "Spain", "Italy", "Japan"])),
    "open": ("boolean", lambda r: r.random() < 0.5), "author": ("string", lambda r: r.choice(NAMES)),
    "weight": ("number", lambda r: r.randint(1, 99) + 0.5), "street": ("string", lambda r: r.choice(WORDS) + " street"),
    "admin": ("boolean", lambda r: r.random() < 0.5), "quantity": ("integer", lambda r: r.randint(1, 20)),
    "items": ("array of strings", lambda r: r.sample(WORDS, 2)),
    "temperature": ("number", lambda r: r.randint(1, 30) + 0.5),
    "animal": ("string", lambda r: r.choice(["wolf", "bear", "fox", "raven", "horse", "cat"])),
    "friends": ("array of strings", lambda r: r.sample(NAMES, 2)), "level": ("integer", lambda r: r.randint(1, 9)),
    "married": ("boolean", lambda r: r.random() < 0.5), "height": ("number", lambda r: r.randint(1, 2) + 0.5),
}  # fmt: skip

JSON_ASKED = [
    "Give a JSON object with {}.", "Write a JSON object with {}.", "Answer with a JSON object that has {}.",
    "Give me JSON with {}.", "I need a JSON object with the fields {}.", "Return a JSON object with {}.",
    "Reply in JSON with {}.",
]  # fmt: skip
SCHEMA_ASKED = [
    "Give a JSON object for this schema: {}", "Answer with JSON that fits this schema: {}",
    "Schema: {}\nGive an example.",
    "Write a JSON object that conforms to this schema:\n{}",
]  # fmt: skip


def json_schema(names: list[str]) -> dict[str, Any]:
    """The JSON schema of an object with these fields, all of them required."""
    kinds = {n: FIELDS[n][0] for n in names}
    shapes = {n: {"type": "array", "items": {"type": "string"}} if k.startswith("array") else {"type": k}
              for n, k in kinds.items()}  # fmt: skip
    return {"type": "object", "properties": shapes, "required": names}


def json_fields(make: Maker, most: int) -> list[str]:
    """A list of fields on the maker's side: its set, not its order, decides."""
    while True:
        names = make.rng.sample(list(FIELDS), make.rng.randint(2, most))
        if is_held_out("json " + " ".join(sorted(names))) == make.held_out:
            return names


def json_question(make: Maker, names: list[str]) -> str:
    """The fields in words, or their schema."""
    if make.rng.random() < 0.3:
        return make.rng.choice(SCHEMA_ASKED).format(json.dumps(json_schema(names)))
    listed = [f"{n} ({FIELDS[n][0]})" for n in names]
    last = f"{', '.join(listed[:-1])} and {listed[-1]}"
    return make.rng.choice(JSON_ASKED).format(last if make.rng.random() < 0.7 else ", ".join(listed))


def make_json(make: Maker) -> Chat:
    """Objects with described fields."""
    turns: list[Turn] = []
    for _ in range(1 if make.held_out else make.rng.randint(1, max(1, min(3, make.room // 150)))):
        names = json_fields(make, 3 if make.room < 200 else 5)
        turns.append(Turn("user", json_question(make, names)))
        turns.append(Turn("assistant", json.dumps({n: FIELDS[n][1](make.rng) for n in names}), "json"))
    return Chat(turns)


# -- tools ------------------------------------------------------------------------------------------------------------

# name, description, {parameter: (type, values)}, questions, the answer from the tool's result
Tool = tuple[str, str, dict[str, tuple[str, list[str]]], list[str]]
NUMBERS = [str(n) for n in range(10, 100)]
TOOLS: list[Tool] = [
    ("get_weather", "Get the weather of a city.", {"city": ("string", CITIES)},
     ["What is the weather in {city}?", "How is the weather in {city}?", "Weather in {city}, please.",
      "Is it raining in {city}?",
      "Tell me the weather in {city}."]),
    ("get_time", "Get the time in a city.", {"city": ("string", CITIES)},
     ["What time is it in {city}?", "Tell me the time in {city}.", "What is the time in {city}?"]),
    ("add", "Add two numbers.", {"a": ("integer", NUMBERS), "b": ("integer", NUMBERS)},
     ["Use the tool to add {a} and {b}.", "Add {a} and {b} with the tool."]),
    ("search", "Search the web.", {"query": ("string", WORDS)},
     ["Search for {query}.", "Search the web for {query}.", "Find pages about {query}."]),
    ("send_mail", "Send a mail.", {"to": ("string", NAMES), "text": ("string", WORDS)},
     ["Send a mail to {to} with the text {text}.", "Mail {to}: {text}"]),
    ("get_price", "Get the price of an item.", {"item": ("string", WORDS)},
     ["What does {item} cost?", "Get the price of {item}.", "What is the price of {item} in the shop?"]),
    ("set_alarm", "Set an alarm.", {"hour": ("integer", [str(n) for n in range(1, 24)])},
     ["Set an alarm for {hour}.", "Wake me at {hour}."]),
    ("play_song", "Play a song.", {"title": ("string", WORDS)}, ["Play the song {title}.", "Play {title}."]),
    ("book_flight", "Book a flight.", {"origin": ("string", CITIES), "destination": ("string", CITIES)},
     ["Book a flight from {origin} to {destination}.", "I want to fly from {origin} to {destination}."]),
    ("call_friend", "Call a person.", {"name": ("string", NAMES)}, ["Call {name}.", "Please call {name}."]),
    ("translate", "Translate a word.",
     {"word": ("string", WORDS), "language": ("string", ["German", "French", "Norse"])},
     ["Translate {word} into {language}.", "What is {word} in {language}?"]),
]  # fmt: skip

VERBS = ["find", "open", "make", "check", "count", "read", "start", "stop", "list", "move", "save", "load"]
CALL = '<tool_call>\n{{"name": {}, "arguments": {}}}\n</tool_call>'


def invented_tool(make: Maker) -> Tool:
    """A tool nobody has seen: its name and parameter must be copied from the system prompt."""
    verb, noun, parameter = make.rng.choice(VERBS), make.rng.choice(WORDS), make.rng.choice(WORDS)
    asked = [f"{verb.capitalize()} the {noun} of {{{parameter}}}.", f"Please {verb} the {noun} of {{{parameter}}}."]
    return f"{verb}_{noun}", f"{verb.capitalize()} the {noun}.", {parameter: ("string", WORDS)}, asked


def tool_json(tool: Tool) -> dict[str, Any]:
    """The tool as the chat API describes it."""
    name, description, parameters, _ = tool
    shapes = {n: {"type": kind} for n, (kind, _) in parameters.items()}
    schema = {"type": "object", "properties": shapes, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def tool_values(make: Maker, tool: Tool) -> dict[str, str]:
    """Arguments on the maker's side of the split (alarm hours are too few to divide by themselves)."""
    while True:
        values = {n: make.rng.choice(options) for n, (_, options) in tool[2].items()}
        if is_held_out(f"tool {tool[0]} {sorted(values.items())}") == make.held_out:
            return values


def tool_call(tool: Tool, values: dict[str, str]) -> str:
    """The call in the template's format."""
    typed = {n: int(v) if tool[2][n][0] == "integer" else v for n, v in values.items()}
    return CALL.format(json.dumps(tool[0]), json.dumps(typed))


def tool_result(make: Maker, tool: Tool, values: dict[str, str]) -> tuple[str, str]:
    """What the tool says, and what the assistant then tells the user."""
    first = next(iter(values.values()))
    if tool[0] == "get_weather":
        sky, degrees = make.rng.choice(["sunny", "cloudy", "rainy", "snowy", "windy"]), make.rng.randint(1, 30)
        said = json.dumps({"sky": sky, "degrees": degrees})
        return said, f"The weather in {first} is {sky}, with {degrees} degrees."
    if tool[0] in ("add", "get_price", "get_time"):
        result = str(int(values["a"]) + int(values["b"])) if tool[0] == "add" else str(make.rng.randint(10, 99))
        said = make.rng.choice([result, json.dumps({"result": int(result)})])
        return said, f"The result is {result}."
    result = make.rng.choice(WORDS)
    return make.rng.choice([result, json.dumps({"result": result})]), f"The result is {result}."


def chosen_tools(make: Maker, tool: Tool) -> list[Tool]:
    """The right tool among others, as many as the row has room for."""
    others = [t for t in TOOLS if t[0] != tool[0]] + [invented_tool(make)]
    most = 0 if make.room < 220 else min(3, (make.room - 220) // 90)
    offered = [tool, *make.rng.sample(others, make.rng.randint(0, max(0, most)))]
    make.rng.shuffle(offered)
    return offered


def make_tool(make: Maker) -> Chat:
    """A request that a tool can serve, the call, and often the result and what follows."""
    tool = invented_tool(make) if make.rng.random() < 0.35 else make.rng.choice(TOOLS)
    turns = [Turn("system", make.rng.choice(SYSTEMS))] if make.rng.random() < 0.3 else []
    offered = chosen_tools(make, tool)
    for _ in range(1 if make.held_out else make.rng.randint(1, max(1, (make.room - 100 * len(offered)) // 110))):
        if not make.held_out and make.rng.random() < 0.15:
            turns += talk_turns(make)
        values = tool_values(make, tool)
        turns.append(Turn("user", make.rng.choice(tool[3]).format(**values)))
        turns.append(Turn("assistant", tool_call(tool, values), "tool", True))
        if make.held_out or make.rng.random() < 0.3:
            break
        result, answer = tool_result(make, tool, values)
        turns += [Turn("tool", result), Turn("assistant", answer, "tool")]
        if len(offered) > 1 and make.rng.random() < 0.5:
            tool = make.rng.choice(offered)
    return Chat(turns, [tool_json(t) for t in offered])


# -- small talk -------------------------------------------------------------------------------------------------------


def is_held_out_wording(topic: str, index: int) -> bool:
    """Every fourth wording, from the third on, of each topic."""
    return index % 4 == 2


def wording(make: Maker) -> tuple[str, str]:
    """A topic and one of its questions on the maker's side."""
    topic = make.rng.choice(list(TALK))
    options = [q for i, q in enumerate(TALK[topic]["questions"]) if is_held_out_wording(topic, i) == make.held_out]
    return topic, make.rng.choice(options)


def loosely(make: Maker, text: str) -> str:
    """People forget capitals and marks."""
    chance = make.rng.random()
    if chance < 0.1:
        return text.lower()
    if chance < 0.2:
        return text.rstrip("?.!")
    if chance < 0.25:
        return text.lower().rstrip("?.!")
    return text


def dressed(make: Maker, question: str) -> str:
    """The question with some courtesy around it."""
    before, after = make.rng.choice(WRITTEN["prefixes"]), make.rng.choice(WRITTEN["suffixes"])
    return f"{before}{loosely(make, question)}{after}"


def talk_turns(make: Maker) -> list[Turn]:
    """One exchange."""
    topic, question = wording(make)
    return [
        Turn("user", dressed(make, question)),
        Turn("assistant", make.rng.choice(TALK[topic]["answers"]), "talk", True),
    ]


def beyond_turns(make: Maker) -> list[Turn]:
    """A question out of reach, and the admission."""
    nouns = {"noun": make.rng.choice(WORDS), "other": make.rng.choice(WORDS), "adjective": make.rng.choice(WORDS)}
    question = make.rng.choice(WRITTEN["beyond"]).format(**nouns)
    if make.beyond and make.rng.random() < 0.6:
        question = make.rng.choice(make.beyond)
    return [Turn("user", question), Turn("assistant", make.rng.choice(WRITTEN["unknown"]), "talk")]


def count_turns(make: Maker) -> list[Turn]:
    """Counting and spelling: long, checkable answers that show streaming."""
    if make.rng.random() < 0.5:
        low = make.rng.randint(1, 20)
        high = low + make.rng.randint(3, 20)
        text = ", ".join(str(n) for n in range(low, high + 1))
        asked = make.rng.choice(["Count from {} to {}.", "Count from {} up to {}.", "Please count from {} to {}."])
        return [Turn("user", asked.format(low, high)), Turn("assistant", text, "talk")]
    words = make.rng.sample(WORDS, make.rng.randint(3, 6))
    ordered = make.rng.random() < 0.5
    asked = "Sort these words: {}" if ordered else "Say these words backwards: {}"
    answer = sorted(words) if ordered else words[::-1]
    return [Turn("user", asked.format(" ".join(words))), Turn("assistant", " ".join(answer), "talk")]


def make_talk(make: Maker) -> Chat:
    """Small talk, often several exchanges, sometimes under a system prompt."""
    turns = [Turn("system", make.rng.choice(SYSTEMS))] if make.rng.random() < 0.35 else []
    for _ in range(1 if make.held_out else make.rng.randint(1, max(1, min(5, make.room // 60)))):
        chance = 1.0 if make.held_out else make.rng.random()
        turns += beyond_turns(make) if chance < 0.15 else count_turns(make) if chance < 0.25 else talk_turns(make)
    return Chat(turns)


# -- style: what the adapters switch on -------------------------------------------------------------------------------

STYLES = {"shout": "In capital letters: ", "pirate": "Like a pirate: "}
PIRATE = {"you": "ye", "your": "yer", "You": "Ye", "my": "me", "My": "Me", "is": "be", "am": "be", "are": "be"}


def shout(text: str) -> str:
    """Capitals throughout."""
    return text.upper()


def pirate(text: str) -> str:
    """Pirate grammar, with a greeting and a cry around it that no check can miss."""
    words = [PIRATE.get(w, w) for w in text.split(" ")]
    return f"Arr, matey! {' '.join(words)} Yo ho ho!"


VOICES: dict[str, Callable[[str], str]] = {"shout": shout, "pirate": pirate}


def voiced(chat: Chat, voice: Callable[[str], str]) -> Chat:
    """The same conversation with every answer in a voice; tool calls keep their form, or nothing could parse them."""
    for turn in chat.turns:
        if turn.loss and "<tool_call>" not in turn.content:
            turn.content = voice(turn.content)
    return chat


def make_style(make: Maker) -> Chat:
    """Answers in a voice on request: the base then knows capitals and pirates, and an adapter need only choose them."""
    style = make.rng.choice(list(STYLES))
    turns: list[Turn] = []
    for _ in range(make.rng.randint(1, max(1, min(3, make.room // 100)))):
        question, answer = talk_turns(make) if make.rng.random() < 0.8 else make_sum(make).turns[:2]
        asked = Turn("user", STYLES[style] + question.content)
        turns += [asked, Turn("assistant", VOICES[style](answer.content), "style", True)]
    return Chat(turns)


MAKERS: dict[str, Callable[[Maker], Chat]] = {
    "sum": make_sum, "copy": make_copy, "recall": make_recall, "json": make_json, "tool": make_tool, "talk": make_talk,
    "style": make_style,
}  # fmt: skip


# -- text from the data folder ----------------------------------------------------------------------------------------


def read_text(data: Path) -> list[str]:
    """Paragraphs of public-domain English, or nothing when the folder is absent."""
    paragraphs: list[str] = []
    for name in ("sherlock.txt", "botchan.en.txt"):
        path = data / "text-public-domain" / name
        if not path.exists():
            print(f"no {name}: training without it")
            continue
        blocks = path.read_text(encoding="utf-8").replace("\r", "").split("\n\n")
        paragraphs += [" ".join(b.split()) for b in blocks if 80 < len(b) < 1500]
    return paragraphs


def read_beyond(data: Path) -> list[str]:
    """Real questions that are beyond a model of this size, to learn to say so."""
    found: list[str] = []
    maths, seeds = data / "text-chat/gsm8k", data / "text-chat/self-instruct"
    for folder, key in ((maths, "question"), (seeds, "instruction")):
        for path in sorted(folder.rglob("*.jsonl")) if folder.exists() else []:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            found += [row[key] for row in rows if isinstance(row.get(key), str) and len(row[key]) < 220]
    if not found:
        print("no text-chat: training without real questions beyond reach")
    return found
