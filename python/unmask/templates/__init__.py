"""Canvases with holes: text templates (`[[MASK*8]]`) and JSON scaffolds from a schema, for `unmask.infill`."""

from .ending import end_fields
from .scaffold import Scaffold
from .text import escape, parse_template

__all__ = ["Scaffold", "end_fields", "escape", "parse_template"]
