"""Texts in CSV files that people open in a spreadsheet."""


def csv_cell(text: str) -> str:
    """A text that a spreadsheet doesn't take for a formula: "=cmd|..." as a verb would be run when the file is opened.

    An apostrophe goes before what begins as a formula does.
    """
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
