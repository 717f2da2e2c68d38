"""Pages: the table of which page is where (`table`), how its rows come, are linked and go (`rows`), and the columns of plain numbers it is
made of (`columns`)."""

from kvtier.columns import Exit
from kvtier.pages.columns import ABSENT, DEVICE, MOST_TIERS, NO_ROW, NO_TIER, READY, WRITING, Rows
from kvtier.pages.table import Links, PageTable, names_of

__all__ = ["ABSENT", "DEVICE", "MOST_TIERS", "NO_ROW", "NO_TIER", "READY", "WRITING", "Exit", "Links", "PageTable", "Rows", "names_of"]
