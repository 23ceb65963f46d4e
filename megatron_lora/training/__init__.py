"""One rank's run: jobs, optimizer, executor, reports, saving."""
