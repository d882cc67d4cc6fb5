"""What we rely on inside transformers, PEFT, accelerate and torch: seen in one table, asked in one place.

`table.RELIED_ON` lists every assumption with who uses it; `contracts` checks each on the installed versions, as
`remoe doctor --contracts`, `make newest` and `tests/contracts` do. `kv_cache` knows the names of the KV cache.
"""
