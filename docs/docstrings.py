"""Our docstrings as griffe reads them: a blank line before each section, and plain code as code."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"(?<!\n)\n(?=(Args|Returns|Raises|Yields):)", "\n\n", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m)^(In plain code):\n", r"\1\n\n", text)
