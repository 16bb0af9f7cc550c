"""Checkpoints of other libraries, both ways: what they wrote becomes one of ours, and the reverse.

Nothing foreign is executed: pickles are read as inert trees of opcodes.
"""

from dcp_resume.interop.exporting import ExportOptions, ExportResult, export_checkpoint
from dcp_resume.interop.formats import Format, Leftovers
from dcp_resume.interop.importing import ImportOptions, ImportResult, import_checkpoint
from dcp_resume.interop.opening import detect_format, locate_source, open_foreign

__all__ = [
    "ExportOptions",
    "ExportResult",
    "Format",
    "ImportOptions",
    "ImportResult",
    "Leftovers",
    "detect_format",
    "export_checkpoint",
    "import_checkpoint",
    "locate_source",
    "open_foreign",
]
