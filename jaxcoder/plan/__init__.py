"""Plans a run for hardware that need not be attached: memory, step time and cost, compiled or modelled.

topology.py     names of topologies, their chips and links
compile.py      the training step, compiled for a topology in a process of its own
hlo.py          collectives, FLOPs and cycles of the compiled program
workload.py     FLOPs, memory traffic and transfers by formula
time_model.py   seconds of that work, by a roofline
published.py    published training runs; calibration.py: the time model compared with them
search.py       meshes, microbatches and remat policies, ranked by the model
report.py       the plan as text and as JSON
"""
