"""The tables of docs/reference/options.md, made of the declarations of the options.

    PYTHONPATH=. python tests/support/options_page.py --write     writes them into the page, between their marks

A test holds the page to them. A table is asked for by the names of typed dicts: <!-- options: StepOptions -->.
"""

import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torchcurv
from torchcurv.curv import options as of_blocks
from torchcurv.optim import options as of_optimizers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "options.md"
MARKED = re.compile(r"(<!-- options: ([\w ]+) -->\n).*?(<!-- end -->)", re.S)
OPTIMIZERS = ("SecondOrderOptimizer", "Preconditioner", "VIOptimizer")


def with_tables(page: str) -> str:
    """The page with its tables as the declarations say them."""
    return MARKED.sub(lambda found: f"{found[1]}\n{table(*found[2].split())}\n\n{found[3]}", page)


def table(*topics: str) -> str:
    rows = ["| option | type | default | read | meaning |", "|---|---|---|---|---|"]
    for topic in topics:
        hints = get_type_hints(getattr(of_optimizers, topic, None) or getattr(of_blocks, topic), include_extras=True)
        for name, hint in hints.items():
            option = hint.__metadata__[0]
            read = {"structure": "when built", "live": "each step", "optimizer": "whole optimizer"}[option.scope]
            cells = (f"`{name}`", f"`{spelled(hint.__origin__)}`", defaults(name, option), read, option.doc)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def defaults(name: str, option: Any) -> str:
    """The default, and that of an optimizer where it is another; "none": it has no such option."""
    tables = {one: getattr(torchcurv, one).table for one in OPTIMIZERS}
    own = {one: table[name].default for one, table in tables.items() if name in table}
    main = own.get(OPTIMIZERS[0], next(iter(own.values()), option.default))
    others = [
        f"`{shown(value)}` in {one}" for one, value in own.items() if value != main or type(value) is not type(main)
    ]
    return ", ".join([f"`{shown(main)}`", *others])


def shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def spelled(hint: Any) -> str:
    """A type as one writes it, without the modules of its names."""
    if get_origin(hint) is None or not get_args(hint):
        return getattr(hint, "__name__", str(hint)).replace("NoneType", "None")
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(hint)).replace("NoneType", "None")


if __name__ == "__main__":
    text = with_tables(PAGE.read_text())
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text)
    else:
        print(text)
