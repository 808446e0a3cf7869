"""The benchmark behind ``python -m int8_ops bench``: what is measured, against what, and how.

========= ==========================================================================
shapes    the suites, their floors and their targets: plain numbers, no torch
peers     every way to compute a shape, and how its output is checked
timing    CUDA-graph replay, the copy bandwidth, wall time; behind a protocol
facts     device, versions, commit
record    the JSON: written after every line, read back for tables and plots
report    tables, for a terminal and for Markdown, from one definition of their columns
cuda, cpu the two runs
========= ==========================================================================

``benchmarks/README.md`` in the source tree is the protocol in words. Times are in microseconds (us)
throughout, bandwidths in bytes a second.
"""
