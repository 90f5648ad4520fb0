"""Escaping of texts in CSV files that people open in a spreadsheet."""


def csv_cell(text: str) -> str:
    """Puts an apostrophe before a text that a spreadsheet would take for a formula.

    A verb such as "=cmd|..." would otherwise be run when the file is opened.
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
