"""Labels in any script on Matplotlib's pictures."""

import contextlib
import functools
import logging
import unicodedata
from collections.abc import Iterable

from fontTools.unicodedata import script, script_name
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

logger = logging.getLogger(__name__)

# Stands for letters that no installed font has. Matplotlib's own font has it.
MISSING = "\N{WHITE SQUARE}"

# Packages of Debian and Ubuntu with the letters of a script (its code in ISO 15924).
_CJK = ("Bopo", "Hang", "Hani", "Hira", "Kana")
_PACKAGES = dict.fromkeys(_CJK, "fonts-noto-cjk") | {"Zyyy": "fonts-symbola"}
_OTHER_PACKAGE = "fonts-noto-core"

# The font family for each letter that has been looked for, None if there is none.
_family_of: dict[str, str | None] = {}


def set_label_fonts(texts: Iterable[Text]) -> None:
    """Make texts that are not drawn yet show their letters literally, in whatever script.

    Installed fonts that have the letters are added behind a text's own. Where there is none,
    squares are drawn, and the log says once which package has one. ``$`` and ``\\`` lose their
    meaning as mathematics, and a line break becomes a space. Letters are joined and ordered, as
    Arabic, Hebrew, Devanagari and others need it, by Matplotlib from version 3.11 on; before, they
    are drawn one by one from left to right.

    Args:
        texts: such as ``visualizer.output.ax.texts``, what Detectron2's visualizers have written.
    """
    texts = list(texts)
    needed = {}  # letters that a text's own fonts do not have
    for text in texts:
        text.set(text=_clean(text.get_text()), parse_math=False, usetex=False)
        needed[text] = _missing_letters(text.get_text(), tuple(text.get_fontfamily()))
    _find_families(set().union(*needed.values()))
    for text, letters in needed.items():
        families = {_family_of[letter]: None for letter in sorted(letters)}  # each once
        text.set_fontfamily([*text.get_fontfamily(), *filter(None, families)])
        squares = {ord(letter): MISSING for letter in letters if _family_of[letter] is None}
        text.set_text(text.get_text().translate(squares))


def _clean(text: str) -> str:
    """The text in one line, with letters put together from parts, and squares for no characters."""
    text = unicodedata.normalize("NFC", " ".join(text.split()))
    return "".join(MISSING if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


@functools.cache
def _missing_letters(text: str, families: tuple[str, ...]) -> set[str]:
    letters = {MISSING, *(c for c in text if not _is_invisible(c))}
    for family in families:
        path = font_manager.findfont(FontProperties(family=[family]))
        letters -= _letters_in(str(path), letters)
    return letters


def _is_invisible(letter: str) -> bool:
    """Whether it is a joiner, a mark of direction or the like, which needs no font."""
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"


def _letters_in(path: str, letters: Iterable[str]) -> set[str]:
    """Those of the letters that a font file has."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # moved or damaged
        return set()
    return {c for c in letters if font.get_char_index(ord(c))}


def _find_families(letters: Iterable[str]) -> None:
    """Look for the letters in all installed fonts, as few as will do, and note the families."""
    missing = set(letters) - _family_of.keys()
    if not missing:
        return
    found = {family: _letters_in(path, missing) for family, path in _installed_fonts().items()}
    while missing:
        # Letters without serifs go with Matplotlib's own.
        best = max(found, key=lambda family: (len(found[family] & missing), "Sans" in family))
        if not found[best] & missing:
            break
        _family_of.update(dict.fromkeys(found[best] & missing, best))
        missing -= found[best]
    _family_of.update(dict.fromkeys(missing))
    _report(missing)


@functools.cache
def _installed_fonts() -> dict[str, str]:
    """The regular font of each installed family, a file, in the order of the families' names."""
    manager = font_manager.fontManager
    # Matplotlib remembers from its first use on a computer what is installed there.
    known = {entry.fname for entry in manager.ttflist}
    for path in set(font_manager.findSystemFonts()) - known:
        with contextlib.suppress(OSError, RuntimeError):  # damaged, or of bitmaps as coloured emoji
            manager.addfont(path)
    fonts: dict[str, str] = {}
    for entry in manager.ttflist:
        # Last Resort has frames for letters. Of a file with several fonts the first is looked at.
        if (
            entry.style == "normal"
            and entry.weight in (400, 500)
            and "Last Resort" not in entry.name
        ):
            if getattr(entry, "index", 0) == 0:
                fonts.setdefault(entry.name, entry.fname)
    return dict(sorted(fonts.items()))


_reported: set[str] = set()


def _report(missing: set[str]) -> None:
    """Log which scripts the letters belong to and what to install, once for each package."""
    scripts: dict[str, list[str]] = {}
    for code in sorted({script(letter) for letter in missing}):
        package = _PACKAGES.get(code, _OTHER_PACKAGE)
        name = "symbols or emoji" if code == "Zyyy" else script_name(code)
        scripts.setdefault(package, []).append(name)
    for package in scripts.keys() - _reported:
        _reported.add(package)
        names = ", ".join(scripts[package])
        logger.warning(
            f"No installed font has all letters of the class names ({names}): squares are drawn "
            "for them. Install a font that has them; on Debian and Ubuntu: apt-get install "
            f"{package}"
        )
