"""Encoding of preference pairs: the same conversation with either output, each as a row of its own.

Owns the field names of a pair in the errors that rows get. How a row becomes tokens is `encoding`'s.
"""

from __future__ import annotations

from finery_dataprep.encoding import EncodedRow, RowEncoder
from finery_dataprep.rows import Pair, Row, RowError


def encode_pair(encoder: RowEncoder, pair: Pair) -> tuple[EncodedRow, EncodedRow]:
    """The preferred and the other row; labels are the outputs'. Raises RowError in the pair's own field names, and TemplateError."""
    return _encode(encoder, pair.preferred, output="preferred_output"), _encode(encoder, pair.non_preferred, output="non_preferred_output")


def _encode(encoder: RowEncoder, row: Row, *, output: str) -> EncodedRow:
    try:
        return encoder.encode(row)
    except RowError as error:
        raise RowError(_field(error.field, output=output, last=len(row.messages) - 1), error.description) from None


def _field(field: str, *, output: str, last: int) -> str:
    """Where a field of the conversation stands in the file. What is said of the whole row holds for the input with this output."""
    if field == "row":
        return output
    if field == f"messages.{last}" or field.startswith(f"messages.{last}."):
        return f"{output}.0{field.removeprefix(f'messages.{last}')}"
    return f"input.{field}"
