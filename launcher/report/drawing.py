"""Drawing: SVG with live text, and PNG where a font has every character of the figure."""

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "PingFang SC"),
    *("Microsoft YaHei", "WenQuanYi Micro Hei", "SimHei"),
)
_BROWSER_FONTS = ", ".join(f"'{name}'" for name in _FONTS) + ", sans-serif"
ACCENT, INK, QUIET, LINE, GROUND = "#1763b6", "#1c2024", "#5d646b", "#d9dcdf", "#ffffff"

Draw = Callable[[Any], None]


@dataclass(frozen=True)
class Drawing:
    """A figure; `lack` says why there is no PNG."""

    name: str
    title: str
    svg: str
    png: bytes | None = None
    lack: str | None = None
    on_page: bool = True

    @property
    def inline(self) -> str:
        """The SVG for a page that has the colours as variables, light and dark."""
        svg = self.svg[self.svg.index("<svg") :]
        names = {ACCENT: "accent", INK: "ink", QUIET: "quiet", LINE: "line", GROUND: "plate"}
        for colour, name in names.items():
            svg = svg.replace(f": {colour}", f": var(--{name})")
        # matplotlib numbers its groups anew in each figure, and a page's ids must be different.
        svg = re.sub(r'<g id="[a-zA-Z0-9.]+_[0-9_]+"', "<g", svg)
        svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.S)
        width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
        # In points; a page's text is larger than that of a printed figure.
        room = f"max-width: {1.33 * float(width):.0f}px"
        opening = (
            f'<svg viewBox="0 0 {width} {height}" style="{room}" role="img" '
            f'aria-label="{html.escape(self.title)}">'
        )
        return opening + svg[svg.index(">") + 1 :]


def draw(
    name: str,
    title: str,
    size: tuple[float, float],
    paint: Draw,
    *,
    png: bool = True,
    on_page: bool = True,
) -> Drawing:
    """Make a figure of `size` inches; `paint` draws on its axes.

    The same content gives the same bytes. A PNG is only made where the fonts found have every
    character of the figure: a box in place of a character would be worse than no picture.
    """
    # Imported here: it takes half a second, which an import of reports should not cost.
    import matplotlib
    from matplotlib.figure import Figure

    chinese = cjk_font()
    with matplotlib.rc_context(_style(chinese, name)), _quiet():
        figure = Figure(figsize=size, layout="constrained", facecolor=GROUND)
        paint(figure.add_subplot())
        text, image = io.StringIO(), io.BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # what was laid out for the SVG stays
        missing = _without_glyph(figure, chinese) if png else ""
        if png and not missing:
            figure.savefig(image, format="png", dpi=160, metadata={"Software": None})
    # A browser is asked for the fonts it may have, whatever is installed here.
    svg = re.sub('font-family: [^;"]*', f"font-family: {_BROWSER_FONTS}", text.getvalue())
    lack = f"no font here has {missing[:20]}; install fonts-noto-cjk" if missing else None
    return Drawing(name, title, svg, image.getvalue() or None, lack, on_page)


@cache
def cjk_font() -> str | None:
    """The file of a font with Chinese characters, known to matplotlib from now on."""
    from matplotlib import font_manager

    wanted = [name.replace(" ", "").lower() for name in _FONTS]
    wanted = [re.sub("cjk(sc|jp)$", "cjk", name) for name in wanted]
    found: list[tuple[int, str]] = []
    for file in font_manager.findSystemFonts():
        name = re.sub(r"[^a-z]", "", Path(file).stem.lower())
        ranks = [place for place, want in enumerate(wanted) if name.startswith(want)]
        bold = not re.search("regular|^[^-]*$", Path(file).stem.lower())
        if ranks and not bold:
            found.append((ranks[0], file))
    for _, file in sorted(found):
        if _covers(file, "弹幕分类"):
            font_manager.fontManager.addfont(file)
            return file
    return None


def _style(chinese: str | None, salt: str) -> Any:
    return {
        # The same content gives the same names inside an SVG.
        "svg.hashsalt": salt,
        "font.family": [*([_family(chinese)] if chinese else []), "DejaVu Sans"],
        "font.size": 9,
        "text.parse_math": False,
        # Of the shapes that one character has in different countries, the Chinese one.
        "text.language": "zh-Hans",
        "text.color": INK,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": False,
        "xtick.color": QUIET,
        "ytick.color": QUIET,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "axes.facecolor": GROUND,
        "svg.fonttype": "none",
    }


@cache
def _family(file: str) -> str:
    from matplotlib.font_manager import FontProperties

    return FontProperties(fname=file).get_name()


@cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(file).get_charmap())


def _covers(file: str, text: str) -> bool:
    return all(ord(character) in _characters(file) for character in text)


def _without_glyph(figure: "Figure", chinese: str | None) -> str:
    """The characters of a figure drawn before that no font of the picture has."""
    from matplotlib import font_manager, text

    files = [font_manager.findfont("DejaVu Sans"), *([chinese] if chinese else [])]
    said = "".join(one.get_text() for one in figure.findobj(text.Text))
    return "".join(
        sorted({c for c in said if not c.isspace() and not any(_covers(file, c) for file in files)})
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of missing characters: live text needs none here, and PNGs are checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
