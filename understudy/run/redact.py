"""What must not be written down, and what must not reach a terminal: secrets, and characters that steer it."""

from __future__ import annotations

import os
import re

SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
MIN_SECRET_LENGTH = 8  # characters: what is shorter is no secret, and would be found in the middle of words
URL_CREDENTIALS = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*://)[^\s/@:'\"]*(?::[^\s/@'\"]*)?@")
CONTROL_CHARACTERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed
    "\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"  # direction, invisible
)


def redact(text: str) -> str:
    """Text without the values of environment variables that are secrets by their name, and without a URL's credentials.

    >>> redact("git clone https://me:hunter2@example.org/x")
    'git clone https://[redacted]@example.org/x'
    """
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and value in text and SECRET_NAME.search(name):
            text = text.replace(value, f"[{name}]")
    return URL_CREDENTIALS.sub(r"\g<scheme>[redacted]@", text) if "://" in text else text


def printable(text: str) -> str:
    r"""Text as a terminal may show it: escapes, other control characters and changes of direction in their written form.

    >>> printable("a\x1b[2Jb\u202ec")
    'a\\x1b[2Jb\\u202ec'
    """
    return CONTROL_CHARACTERS.sub(lambda match: repr(match[0])[1:-1], text)
