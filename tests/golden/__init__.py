"""Golden cases: what the paper's published algorithms answer on given inputs.

`python -m tests.golden DIR` checks a folder. A case is one JSON file: inputs in ms, GB (1e9 bytes), rates per ms, with
servers, clients and blocks from 1; the expected answers; and `comparable`, which tells where no tie leaves a choice to
the implementation.
"""
