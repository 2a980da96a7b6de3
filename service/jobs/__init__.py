"""Training jobs: a queue in the catalog, and one process of `nibble train` for each that runs.

job          what a job is, and which states follow which
order        what a client may order, and the run's config that comes of it
files        training files on the disk
queue        the rows: jobs and what happened to them
process      one process of `nibble train`, confined
launcher     what confines it, before it becomes that process
progress     what a run's log tells
history      states and steps of a job as one list of events
publication  the trained adapter through the ordinary upload
runner       the threads that check, run, stop and publish
"""
