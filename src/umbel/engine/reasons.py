"""Why a client has no answer, in words that hold none of its data."""

import re
import traceback
from pathlib import Path

from umbel.config import ConfigError
from umbel.ledger import BudgetError
from umbel.method import MethodError
from umbel.privacy import PrivacyError
from umbel.server import Refused
from umbel.wire import WireError

MOST_REASON = 300
"""Characters of the reason why a client has no answer."""

WITHOUT_ROWS = (WireError, MethodError, Refused, BudgetError, PrivacyError)
"""Errors of ours whose messages are made of the server's request, of names, of shapes and of spent ε, and never of a row."""


def reason(error: BaseException) -> str:
    """Returns type, message and place of a client's failure, without its data, for whoever runs the server.

    Whatever a message quotes may be a row, so it is left out, but for errors of ours that carry none; so is what a `KeyError`
    looked for. A `ConfigError` shows rows and columns to their owner, also without quotes: of it only the beginning is told,
    up to the first quote or bracket. Directories are left out of the place.

    >>> reason(ValueError("could not convert string to float: 'Jane Doe'"))
    'ValueError: could not convert string to float: … (place unknown)'
    """
    where = f" ({place(error)})"
    text = " ".join(str(error).split())
    if isinstance(error, KeyError):
        text = "…"
    elif isinstance(error, ConfigError):
        text = _BEFORE_DATA.match(text)[0].rstrip() + " …"  # type: ignore[index]  # it matches any text
    elif not isinstance(error, WITHOUT_ROWS):
        text = _without_quotes(text)
    text = f"{type(error).__name__}: {text}"
    most = MOST_REASON - len(where)
    return (text if len(text) <= most else text[: most - 1] + "…") + where


def place(error: BaseException) -> str:
    """Returns where an error was raised, as file name and line; no directories, which may name people."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"[-100:] if frames else "place unknown"


_QUOTED = re.compile(r"""(?<!\w)[bBrRuUfF]{0,2}(?:'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`[^`]*`|‘[^’]*’|“[^”]*”|«[^»]*»)(?!\w)""")
_BEFORE_DATA = re.compile(r"""[^'"`‘’“”«»(\[{]*""")
_QUOTE = re.compile(r"""['"`‘’“”«»]""")
_NOT = re.compile(r"(?<=n)['’](?=t\b)")


def _without_quotes(text: str) -> str:
    """Replaces quoted text by "…"; from the first quote on that has no pair (in a name?) nothing is left."""
    marked = _NOT.sub("\0", text.replace("\0", "…"))
    left = _QUOTED.sub("…", marked)
    odd = _QUOTE.search(left)
    return (left if odd is None else left[: odd.start()] + "…").replace("\0", "'")
