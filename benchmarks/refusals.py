"""Options that a script would ignore beside others are refused."""

from __future__ import annotations

import argparse

from kvasir.engine.errors import ConfigError
from kvasir.engine.hub import locate


def refuse(parser: argparse.ArgumentParser, args: argparse.Namespace, beside: str, *names: str) -> None:
    """Exit with an error where one of these was given; `beside` says what doesn't read it."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} means nothing {beside}")


def refuse_unknown(parser: argparse.ArgumentParser, model: str) -> None:
    """Exit with an error where there is no such model: a process that is to load it can't say so as plainly."""
    try:
        locate(model)
    except ConfigError as error:
        parser.error(error.message)


def refuse_others(parser: argparse.ArgumentParser, args: argparse.Namespace, beside: str, *names: str) -> None:
    """The same for all but these, which are read."""
    refuse(parser, args, beside, *(name for name in vars(args) if name not in names))
