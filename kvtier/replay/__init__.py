"""The laboratory: what eviction policies would have done on a trace of requests (docs/replay.md).

`trace.py` reads traces (`lines.py`: text files of any of them), `workloads.py` makes them up, `convert.py` takes other people's, `stats.py`
describes them. `lab.py` replays one tier, `tiers.py` several, `link.py` times the way up; `optimum.py` is the ceiling. `capacities.py`
reads what is asked for, `runs.py` puts policies side by side for the command line, `show.py` prints and draws. Nobody here moves a page or
needs torch.
"""
