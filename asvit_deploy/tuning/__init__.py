"""What adaptive brings a network on this machine, and what it costs: found out, then said.

Pictures calibrate or judge, never both. On the calibrating ones methods are fitted and chosen for
each budget (`contenders`, `search`); the judging ones show what the artefacts made of them get
wrong (`certify`); those that may be taken are timed beside what one would run instead (`latency`);
and one sentence comes of it (`verdict`).
"""
