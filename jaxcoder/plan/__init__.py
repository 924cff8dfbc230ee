"""A run on hardware that is not there: compiled, counted, timed by a model, and put into words.

topology.py     names of topologies, their chips and links
compile.py      the real training step, compiled for a topology, in a process of its own
hlo.py          what the compiled program does: collectives, FLOPs, trip counts
workload.py     what a dense decoder does, by formula: for meshes not compiled, and for models of others
time_model.py   work into seconds, by a roofline
published.py    published runs of others; calibration.py: the time model compared with them
search.py       meshes, microbatches and remat policies, ranked by the model
report.py       the plan in words and as JSON
"""
