"""Decoding from a disk: arms and regimes, each in a process and a memory group of its own."""

from remoe_adapt.bench.decode.bench import DecodeOptions, quickly, run_decode
