"""Personal data that people leave in chats: found by pattern, and masked.

What is found is a lower bound: no pattern knows a real name, or a number spelt in words.
"""

import re

MASKS = {
    "e-mail": "[e-mail]",
    "phone number": "[phone]",
    "account": "[account]",
    "name after @": "@[name]",
    "long digit run": "[digits]",
}
"""The kinds of personal data looked for, and what takes the place of each."""

# One character for one, so that a match lies at the same place in the original.
_NARROW = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | {0x3000: 0x20}
_HINT = re.compile(r"[@＠\d]")  # nothing is personal without one of these
_LAUGH = re.compile(r"(?:23{2,}+|(\d)\1{2,}+)++")  # 23336666 is no number

_SERVICE = r"(?<![a-z])(?:qq|vx|wx|wechat|weixin)|扣扣|企鹅号|微信|薇信|威信|群号|加群|加[qv]"
_PATTERN = re.compile(
    # A bounded local part: without it, a long run of letters would take quadratic time.
    r"(?P<mail>[a-z0-9._%+-]{1,64}@[a-z0-9-]+(?:[.。][a-z0-9-]+)+)"
    r"|(?P<phone>(?<!\d)(?:(?:\+|00)?86[- ]?)?1[3-9]\d[- ]?\d{4}[- ]?\d{4}(?!\d)"
    r"|(?<!\d)0\d{2,3}-\d{7,8}(?!\d))"
    rf"|(?P<service>{_SERVICE})(?P<link>[号群是为: ]{{0,4}})"
    r"(?P<account>(?=[a-z_-]*\d)(?:\d{5,}+|[a-z][a-z0-9_-]{5,19}+)(?!\w*@))"
    r"|(?P<name>@[\w·-]+)"
    r"|(?P<digits>\d{7,}x?)",
    re.IGNORECASE,
)
_KIND_OF = dict(zip(("mail", "phone", "account", "name", "digits"), MASKS, strict=True))


def mask(text: str) -> str:
    """`text` with each finding replaced as `MASKS` says; a text without one is unchanged."""
    masked, end = "", 0
    for kind, start, stop in _findings(text):
        masked += text[end:start] + MASKS[kind]
        end = stop
    return masked + text[end:]


def kinds(text: str) -> list[str]:
    """The kind of each finding in `text`, in their order there.

    * "e-mail": also with a full-width @ or full stop;
    * "phone number": a Chinese mobile number (1[3-9] and nine digits, in one piece or 3-4-4,
      perhaps after +86), or a land line with its area code and a hyphen;
    * "account": a QQ number or WeChat name, only right after a word that says so (QQ, 微信, 群号);
    * "name after @";
    * "long digit run": 7 digits or more that are no laugh (23333333, 66666666, 23336666).
    """
    return [kind for kind, _, _ in _findings(text)]


def _findings(text: str) -> list[tuple[str, int, int]]:
    """Kind, start and end of what is personal in `text`."""
    if not _HINT.search(text):
        return []
    found = []
    for match in _PATTERN.finditer(text.translate(_NARROW)):
        group = str(match.lastgroup)
        if group == "digits" and _LAUGH.fullmatch(match[group]):
            continue
        found.append((_KIND_OF[group], *match.span(group)))
    return found
