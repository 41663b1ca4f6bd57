"""What a network says of every picture of a folder or of shards, in one file.

The pictures are cut into parts: a shard each, or so many pictures of a folder. A part that is done
stands as a file in `OUTPUT.parts`, and what a run is of stands beside it in `run.json`. So a run
that was stopped goes on behind its last whole part, and processes that share one need not talk:
each does every so many parts and leaves a mark that it has come, and the one that finds all marks
and all parts joins these. Batches never reach over the end of a part: what is written depends on
neither the number of processes nor on stops.
"""
