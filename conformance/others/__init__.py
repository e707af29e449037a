"""Other published forms of the BNF loss, held to the same suite: `python -m others` writes docs/scoreboard.md."""
