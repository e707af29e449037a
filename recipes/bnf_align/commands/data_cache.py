"""`bnf data cache`: the tokens that are kept on this machine, listed or removed."""

import time
from collections.abc import Sequence
from datetime import date

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnf_core.config import DataCacheConfig
from bnf_core.data.token_cache import Entry, TokenCache, cache_folder
from bnf_core.errors import UserError


def data_cache(config: DataCacheConfig, console: Console) -> list[Entry]:
    """Print what is there, or remove it; returns what stays.

    Raises:
        UserError: something cannot be read or removed.
    """
    cache = TokenCache(cache_folder())
    before = time.time() - config.unused_days * 86_400
    try:
        entries = cache.entries()
    except OSError as error:
        raise UserError(f"{error.filename or cache.folder} cannot be read: {error.strerror or error}") from error
    chosen = [entry for entry in entries if entry.used <= before]
    if not config.remove:
        console.print(f"{escape(str(cache.folder))}: {_amount(chosen)}", highlight=False, soft_wrap=True)
        if chosen:
            console.print(_table(chosen))
        return entries
    removed = []
    for entry in chosen:
        try:
            if cache.remove(entry):
                removed.append(entry)
            else:
                console.print(f"[yellow]{escape(str(entry.folder))} is being made: it stays[/yellow]", soft_wrap=True)
        except OSError as error:
            raise UserError(f"{entry.folder} cannot be removed: {error.strerror or error}") from error
    console.print(f"{escape(str(cache.folder))}: removed {_amount(removed)}", highlight=False, soft_wrap=True)
    return [entry for entry in entries if entry not in removed]


def _amount(entries: Sequence[Entry]) -> str:
    return f"{len(entries):,} tables of tokens, {_megabytes(sum(entry.size for entry in entries))}"


def _table(entries: Sequence[Entry]) -> Table:
    table = Table("data", "rows", "tokens", "size", "last used", "folder")
    for entry in entries:
        data, day = entry.data or "not whole: made again when needed", date.fromtimestamp(entry.used).isoformat()
        numbers = (f"{entry.rows:,}", f"{entry.tokens:,}", _megabytes(entry.size))
        table.add_row(escape(data), *numbers, day, entry.folder.name)
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


Config = DataCacheConfig


def run(config: DataCacheConfig, console: Console) -> int:
    data_cache(config, console)
    return 0
