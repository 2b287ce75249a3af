"Which pictures are lines on white, which a dark page turns round; images stay as they are"

import json
import re
from functools import cache

from places import NBS

PAINTS = {
    "imshow",
    "contourf",
    "pcolormesh",
    "show_images",
    "show_sheet",
    "image_grid",
    "Image",
}
DRAWN = "drawn"  # class of a picture that a dark page may turn round


def paints(
    code: str,
    others: set = frozenset(),  # Names of functions that paint
) -> bool:
    "Whether code shows images, or shades that mean something"
    return not (PAINTS | others).isdisjoint(re.findall(r"\w+", code))


@cache
def template_paints(
    template: str,  # E.g. trade_off
) -> bool:
    "Whether a figure's template shows images, or shades that mean something"
    text = (NBS / "experiments" / f"{template}.ipynb").read_text(encoding="utf8")
    cells = json.loads(text)["cells"]
    return any(paints("".join(c["source"])) for c in cells if c["cell_type"] == "code")
