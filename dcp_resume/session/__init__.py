"""One save or one load, from start to outcome, and the run's log that decides it."""
