"""Qwench and other quantizers side by side: the same checkpoint, calibration rows and bits; KL, processor time and memory.

Each entrant runs in a process of its own, the others' in the environments that `make engines` makes. What they write is judged by one reader, ours, on held-out rows, and
opened by the engine that it is meant for. How to run it: `python -m benchmarks.peers --help`; what it showed: `benchmarks/results/peers-*.md`, and docs/log.md says why.

    entrants    who takes part, with what settings
    recipes     our side of each pair, as recipes
    running     a process, and what it took
    judging     what is in the folder that it left
    table       all of it as Markdown
    workers/    one script for each tool, run by that tool's own Python
"""
