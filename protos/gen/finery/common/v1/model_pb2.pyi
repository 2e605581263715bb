from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class BaseModel(_message.Message):
    __slots__ = ("name", "sha256", "max_sequence_length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    max_sequence_length: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., max_sequence_length: _Optional[int] = ...) -> None: ...
