"""How many files a rank may hold open, set by each rank of a job before it starts."""

import resource


def raisable():
    """A shell's limit, which is too low for many datasets, below the machine's."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 4096))


def too_few():
    """Enough to start, not for many datasets."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))
