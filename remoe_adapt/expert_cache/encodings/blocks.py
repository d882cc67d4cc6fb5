from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockType:
    name: str
    number: int
    values: int
    bytes: int
    def row_bytes(self, cols: int) -> int:
        return -(-cols // self.values) * self.bytes
