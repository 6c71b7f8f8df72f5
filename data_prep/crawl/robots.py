"""robots.txt as RFC 9309 has it: the longest matching rule decides, `*` and `$` are wildcards."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Robots:
    """The rules for one user agent: (allowed, pattern) in order, and the delay asked for in s."""

    rules: tuple[tuple[bool, str], ...] = ()
    delay: float = 0.0

    def refusal(self, path: str) -> str | None:
        """The rule that refuses `path` (with its query), or None where it may be fetched."""
        fitting = [
            (len(pattern), allowed, pattern)
            for allowed, pattern in self.rules
            if _matches(pattern, path)
        ]
        # Of equally long rules the one that allows wins, as True is larger than False.
        _, allowed, pattern = max(fitting, default=(0, True, ""))
        return None if allowed else f"Disallow: {pattern}"


def read_robots(text: str, agent: str) -> Robots:
    """The rules of the groups that name `agent` (a product token), else those for `*`."""
    groups: dict[str, list[tuple[bool, str]]] = {}
    delays: dict[str, float] = {}
    names: list[str] = []
    in_rules = False
    for line in text.splitlines()[:5000]:
        name, _, value = line.split("#", 1)[0].partition(":")
        name, value = name.strip().lower(), value.strip()
        if name == "user-agent":
            names = [] if in_rules else names
            in_rules = False
            names.append(value.lower())
            groups.setdefault(value.lower(), [])
            continue
        in_rules = in_rules or name in ("allow", "disallow", "crawl-delay")
        for group in names:
            if name in ("allow", "disallow") and value:
                groups[group].append((name == "allow", value))
            elif name == "crawl-delay" and re.fullmatch(r"\d{1,5}(\.\d+)?", value):
                delays[group] = float(value)
    mine = agent.lower() if agent.lower() in groups else "*"
    return Robots(tuple(groups.get(mine, ())), delays.get(mine, 0.0))


def _matches(pattern: str, path: str) -> bool:
    """In time linear in `path` and the number of wildcards, which a regular expression isn't."""
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    at = len(first)
    last = rest.pop() if rest and pattern.endswith("$") else None
    for part in rest:
        at = path.find(part, at)
        if at < 0:
            return False
        at += len(part)
    if last is not None:
        return path.endswith(last) and len(path) - len(last) >= at
    return at == len(path) or not pattern.endswith("$")
