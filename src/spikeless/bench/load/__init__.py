"""The load of a benchmark in Locust, and the floor of its generator's own latency."""

#: The lines of progress that a load generator writes to standard output begin with
#: this.
LINE_PREFIX = "spikeless-load: "
